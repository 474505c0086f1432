//! Sets in their published layouts, as small as they can be.

use std::io::Write;
use std::path::{Path, PathBuf};

use image::{Rgb, RgbImage};
use kd_core::BatchSource;
use kd_data::{Dataset, Loader, LoaderOptions};

use crate::support::refusal;

fn save(root: &Path, name: &str, mark: u8) {
    let path = root.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    RgbImage::from_pixel(6, 6, Rgb([mark; 3])).save_with_format(path, image::ImageFormat::Png).unwrap();
}

fn text(root: &Path, name: &str, text: &str) {
    let path = root.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

fn open(source: &str, path: &Path) -> kd_data::Result<kd_data::Splits> {
    kd_data::open(&format!("{source}:{}", path.display()))
}

/// Label and first pixel of every sample.
fn contents(set: &Dataset) -> Vec<(u32, u8)> {
    (0..set.len()).map(|i| (set.labels()[i], set.image(i).unwrap().data[0])).collect()
}

#[test]
fn every_source_names_what_it_misses() {
    let dir = tempfile::tempdir().unwrap();
    for entry in kd_data::SOURCES.iter().filter(|e| !e.argument.is_empty()) {
        let message = refusal(open(entry.name, dir.path()));
        assert!(message.contains(&dir.path().display().to_string()) && message.contains("expected"), "{message}");
        assert!(kd_data::Pipeline::parse(entry.augment).is_ok(), "{}", entry.name);
    }
}

#[test]
fn cub_follows_its_tables() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("CUB_200_2011");
    text(&root, "classes.txt", "1 001.Auk\n2 002.Tern\n");
    text(&root, "images.txt", "1 001.Auk/a.jpg\n2 001.Auk/b.jpg\n3 002.Tern/c.jpg\n4 002.Tern/d.jpg\n");
    text(&root, "image_class_labels.txt", "1 1\n2 1\n3 2\n4 2\n");
    text(&root, "train_test_split.txt", "1 0\n2 1\n3 1\n4 0\n");
    for (name, mark) in [("001.Auk/a.jpg", 10), ("001.Auk/b.jpg", 20), ("002.Tern/c.jpg", 30), ("002.Tern/d.jpg", 40)] {
        save(&root, &format!("images/{name}"), mark);
    }
    for path in [dir.path(), &root] {
        let splits = open("cub200", path).unwrap();
        assert_eq!(splits.info.class_names, ["Auk", "Tern"]);
        assert_eq!(splits.info.groups.as_deref(), Some(&[0, 1][..]));
        assert_eq!(contents(splits.train().unwrap()), [(0, 20), (1, 30)]);
        assert_eq!(contents(splits.test().unwrap()), [(0, 10), (1, 40)]);
    }
    text(&root, "train_test_split.txt", "1 0\n2 1\n3 1\n");
    assert!(refusal(open("cub200", dir.path())).contains("image 4 (002.Tern/d.jpg)"));
    text(&root, "image_class_labels.txt", "1 1\n2 one\n");
    assert!(refusal(open("cub200", dir.path())).contains("image_class_labels.txt"));
    text(&root, "images.txt", "1 001.Auk/a.jpg\nx\n");
    let message = refusal(open("cub200", dir.path()));
    assert!(message.contains("images.txt") && message.contains("line 2"), "{message}");
}

#[test]
fn cars_are_found_wherever_they_lie() {
    for folders in [["cars_train", "cars_test"], ["car_data/train/Some Car 2012", "car_data/test/Some Car 2012"]] {
        let dir = tempfile::tempdir().unwrap();
        text(dir.path(), "names.csv", "Some Car 2012\nOther Car 2010\n");
        text(dir.path(), "anno_train.csv", "00001.jpg,1,2,3,4,2\n00002.jpg,1,2,3,4,1\n");
        text(dir.path(), "anno_test.csv", "00001.jpg,1,2,3,4,1\n");
        save(dir.path(), &format!("{}/00001.jpg", folders[0]), 10);
        save(dir.path(), &format!("{}/00002.jpg", folders[0]), 20);
        save(dir.path(), &format!("{}/00001.jpg", folders[1]), 30);
        let splits = open("stanford-cars", dir.path()).unwrap();
        assert_eq!(splits.info.class_names, ["Some Car 2012", "Other Car 2010"]);
        assert_eq!(contents(splits.train().unwrap()), [(1, 10), (0, 20)]);
        assert_eq!(contents(splits.test().unwrap()), [(0, 30)]);
        text(dir.path(), "anno_test.csv", "00001.jpg,1,2,3,4,3\n");
        assert!(refusal(open("stanford-cars", dir.path())).contains("1..=2"));
        text(dir.path(), "anno_test.csv", "00009.jpg,1,2,3,4,1\n");
        assert!(refusal(open("stanford-cars", dir.path())).contains("00009.jpg is in no folder"));
    }
}

#[test]
fn tiny_imagenet_follows_its_tables() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("tiny-imagenet-200");
    text(&root, "wnids.txt", "n02\nn01\n");
    text(&root, "words.txt", "n01\tgoldfish, Carassius auratus\nn02\tshark\nn03\tother\n");
    text(&root, "val/val_annotations.txt", "v0.JPEG\tn02\t0\t0\t1\t1\nv1.JPEG\tn01\t0\t0\t1\t1\n");
    for (name, mark) in
        [("train/n01/images/n01_0.JPEG", 10), ("train/n02/images/n02_0.JPEG", 20), ("val/images/v0.JPEG", 30), ("val/images/v1.JPEG", 40)]
    {
        save(&root, name, mark);
    }
    save(&root, "test/images/t0.JPEG", 50);
    let splits = open("tiny-imagenet", dir.path()).unwrap();
    assert_eq!(splits.info.class_names, ["goldfish", "shark"]);
    assert_eq!(contents(splits.train().unwrap()), [(0, 10), (1, 20)]);
    assert_eq!(contents(splits.test().unwrap()), [(1, 30), (0, 40)]);
    text(&root, "val/val_annotations.txt", "v0.JPEG\tn09\t0\t0\t1\t1\n");
    assert!(refusal(open("tiny-imagenet", dir.path())).contains("val_annotations.txt: line 1"));
}

#[test]
fn stl10_stands_upright() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("stl10_binary");
    std::fs::create_dir_all(&root).unwrap();
    let pixel = |image: usize, c: usize, y: usize, x: usize| (image * 50 + c * 90 + y * 7 + x) as u8;
    let mut bytes = vec![];
    for image in 0..2 {
        for c in 0..3 {
            for x in 0..96 {
                bytes.extend((0..96).map(|y| pixel(image, c, y, x)));
            }
        }
    }
    std::fs::write(root.join("train_X.bin"), &bytes).unwrap();
    std::fs::write(root.join("train_y.bin"), [10, 1]).unwrap();
    let splits = open("stl10", dir.path()).unwrap();
    let train = splits.train().unwrap();
    assert_eq!((train.labels(), splits.info.class_names[9].as_str()), (&[9, 0][..], "truck"));
    let image = train.image(1).unwrap();
    for (c, y, x) in [(0, 0, 0), (0, 3, 0), (1, 0, 5), (2, 95, 94)] {
        assert_eq!(image.data[(c * 96 + y) * 96 + x], pixel(1, c, y, x));
    }
    assert!(refusal(splits.test()).contains("test_X.bin is missing"));
    std::fs::write(root.join("train_y.bin"), [10, 11]).unwrap();
    assert!(refusal(open("stl10", &root)).contains("label 11 of image 1"));
    std::fs::write(root.join("train_y.bin"), [10]).unwrap();
    assert!(refusal(open("stl10", &root)).contains("expected 27648"));
}

/// An IDX file of bytes.
fn idx(extents: &[u32], data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0, 8, extents.len() as u8];
    bytes.extend(extents.iter().flat_map(|e| e.to_be_bytes()));
    bytes.extend(data);
    bytes
}

fn gz(path: PathBuf, bytes: &[u8]) {
    let mut file = flate2::write::GzEncoder::new(std::fs::File::create(path).unwrap(), flate2::Compression::fast());
    file.write_all(bytes).unwrap();
    file.finish().unwrap();
}

#[test]
fn idx_files_plain_and_compressed() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("MNIST/raw");
    std::fs::create_dir_all(&raw).unwrap();
    let pixels: Vec<u8> = (0..3 * 6).collect();
    gz(raw.join("train-images-idx3-ubyte.gz"), &idx(&[3, 2, 3], &pixels));
    std::fs::write(raw.join("train-labels.idx1-ubyte"), idx(&[3], &[7, 0, 9])).unwrap();
    for path in [dir.path(), &raw] {
        let splits = open("mnist", path).unwrap();
        let train = splits.train().unwrap();
        assert_eq!((train.labels(), splits.info.shape), (&[7, 0, 9][..], [1, 2, 3]));
        assert_eq!(train.image(2).unwrap().data, pixels[12..]);
        assert!(refusal(splits.test()).contains("t10k-images-idx3-ubyte is missing"));
        let mut loader = Loader::train(train, &LoaderOptions::default()).unwrap();
        loader.start(0, 0).unwrap();
        assert_eq!(loader.next_batch().unwrap().unwrap().images[0].dims(), [3, 1, 2, 3]);
    }
    let wrong = |bytes: Vec<u8>, why: &str| {
        std::fs::write(raw.join("train-labels.idx1-ubyte"), bytes).unwrap();
        let message = refusal(open("mnist", dir.path()));
        assert!(message.contains("train-labels.idx1-ubyte") && message.contains(why), "{message}");
    };
    wrong(idx(&[3], &[7, 10, 9]), "label 10 of image 1");
    wrong(idx(&[2], &[7, 1]), "2 labels for 3 images");
    wrong(idx(&[4], &[7, 1, 2]), "cut short");
    wrong(idx(&[3, 1], &[7, 1, 2]), "00 00 08 01");
    wrong(vec![0, 0], "00 00 08 01");
    std::fs::remove_file(raw.join("train-labels.idx1-ubyte")).unwrap();
    assert!(refusal(open("mnist", dir.path()).unwrap().train()).contains("train-labels-idx1-ubyte is missing"));
}
