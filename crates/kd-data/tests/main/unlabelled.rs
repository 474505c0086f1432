use std::path::Path;

use image::{GrayImage, Luma, Rgb, RgbImage};
use kd_core::{BatchSource, UNLABELLED};
use kd_data::{Loader, LoaderOptions, Pipeline, Unlabelled};

use crate::support::{Seen, epoch, random_set, refusal};

/// `n` grey pictures of `side` pixels, each of one value from 100 on, in two folders.
fn pictures(root: &Path, n: u32, side: u32) {
    for i in 0..n {
        let path = root.join(format!("{}/{i:03}.png", i % 2));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        GrayImage::from_pixel(side, side, Luma([100 + i as u8])).save(path).unwrap();
    }
}

fn folder(root: &Path) -> Unlabelled {
    Unlabelled::open(&format!("folder:{}", root.display())).unwrap()
}

fn options(batch_size: usize, threads: usize, unlabelled: Option<Unlabelled>) -> LoaderOptions {
    let augment = vec![Pipeline::parse(&["pad-crop:1", "flip"]).unwrap()];
    LoaderOptions { batch_size, threads, seed: 5, augment, unlabelled, ..LoaderOptions::default() }
}

#[test]
fn every_batch_has_its_share_of_labels() {
    let dir = tempfile::tempdir().unwrap();
    pictures(dir.path(), 31, 6);
    let data = random_set(22, [1, 6, 6], 4);
    let run = |threads| {
        let mut loader = Loader::train(&data, &options(8, threads, Some(folder(dir.path())))).unwrap();
        assert_eq!((loader.batches(), loader.samples(), loader.records(), loader.unlabelled()), (6, 48, 53, 31));
        (epoch(&mut loader, 0, 0), epoch(&mut loader, 1, 0), epoch(&mut loader, 1, 4))
    };
    let (first, second, end) = run(1);
    assert!(run(2) == (first.clone(), second.clone(), end.clone()));
    assert!(end == second[4..]);
    let alone: Vec<u32> = epoch(&mut Loader::train(&data, &options(8, 1, None)).unwrap(), 0, 0).iter().flat_map(|b| b.2.clone()).collect();
    for (number, batches) in [&first, &second].into_iter().enumerate() {
        let all: Vec<u32> = batches.iter().flat_map(|b| b.2.clone()).collect();
        let mut sorted = all.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), 48, "each image once at most");
        if number == 0 {
            let labelled: Vec<u32> = all.into_iter().filter(|i| *i < 22).collect();
            assert_eq!(labelled, alone[..labelled.len()], "the labelled ones keep their order");
        }
        for (_, labels, indices) in batches {
            let known = labels.iter().filter(|l| **l != UNLABELLED).count();
            // 8 * 22 / 53 = 3.3
            assert!((3..=4).contains(&known), "{labels:?}");
            for (label, index) in labels.iter().zip(indices) {
                assert_eq!(*label, data.labels().get(*index as usize).map_or(UNLABELLED, |l| i64::from(*l)));
            }
        }
    }
}

#[test]
fn images_are_those_of_the_folder_brought_to_size() {
    let dir = tempfile::tempdir().unwrap();
    pictures(dir.path(), 9, 13);
    let data = random_set(9, [1, 6, 6], 3);
    let batches: Vec<Seen> =
        epoch(&mut Loader::train(&data, &LoaderOptions { augment: vec![], ..options(18, 1, Some(folder(dir.path()))) }).unwrap(), 0, 0);
    let (images, _, indices) = &batches[0];
    for (image, index) in images[0].chunks_exact(36).zip(indices).filter(|(_, i)| **i >= 9) {
        // By name: the even ones lie in the first folder.
        let k = [0, 2, 4, 6, 8, 1, 3, 5, 7][*index as usize - 9];
        let expected = (f64::from(100 + k) / 255.0 - 0.4) / 0.3;
        assert!(image.iter().all(|v| (f64::from(*v) - expected).abs() < 1e-5), "sample {index}: {image:?}");
    }
    // Colour to grey, and any data set with its labels forgotten.
    RgbImage::from_pixel(20, 30, Rgb([255, 0, 0])).save(dir.path().join("red.png")).unwrap();
    assert_eq!(folder(dir.path()).len(), 10);
    let digits = kd_data::open("digits").unwrap();
    let mut loader = Loader::train(digits.train().unwrap(), &options(64, 1, Some(Unlabelled::open("digits").unwrap()))).unwrap();
    assert_eq!(epoch(&mut loader, 0, 0).iter().flat_map(|b| b.1.clone()).filter(|l| *l == UNLABELLED).count(), 40 * 64 / 2);
}

#[test]
fn stl10_has_images_of_no_class() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stl10_binary/unlabeled_X.bin");
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, vec![7; 2 * 3 * 96 * 96]).unwrap();
    let spec = format!("stl10:{}", dir.path().display());
    assert_eq!(Unlabelled::open(&spec).unwrap().len(), 2);
    std::fs::write(&path, vec![7; 100]).unwrap();
    assert!(refusal(Unlabelled::open(&spec)).contains("unlabeled_X.bin: 100 bytes"));
    std::fs::remove_file(&path).unwrap();
    assert!(refusal(Unlabelled::open(&spec)).contains("unlabeled_X.bin"));
}

#[test]
fn what_cannot_be_joined_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    pictures(dir.path(), 40, 6);
    let data = random_set(10, [1, 6, 6], 2);
    let refused = |options: &LoaderOptions| refusal(Loader::train(&data, options).map(|_| ()));
    let message = refused(&options(9, 1, Some(folder(dir.path()))));
    assert!(message.contains("batch_size = 9") && message.contains("at least 10") && message.contains("10 labelled among 50"), "{message}");
    Loader::train(&data, &options(10, 1, Some(folder(dir.path())))).unwrap();
    let mixed = LoaderOptions { augment: vec![Pipeline::parse(&["mixup:1"]).unwrap()], ..options(10, 1, Some(folder(dir.path()))) };
    assert!(refused(&mixed).contains("mixup"));
    // What evaluates sees the labelled ones alone.
    assert_eq!(Loader::eval(&data, &mixed).unwrap().samples(), 10);
    std::fs::create_dir(dir.path().join("empty")).unwrap();
    assert!(refusal(Unlabelled::open(&format!("folder:{}", dir.path().join("empty").display()))).contains("no image"));
    assert!(refusal(Unlabelled::open("folder:/no/where")).contains("/no/where"));
    assert!(refusal(Unlabelled::open("dijits")).contains("did you mean `digits`"));
    std::fs::write(dir.path().join("0/000.png"), "no image").unwrap();
    assert!(refusal(Unlabelled::open(&format!("folder:{}", dir.path().display()))).contains("000.png"));
}
