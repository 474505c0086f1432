use std::io::Write;
use std::path::{Path, PathBuf};

use image::{ImageFormat, Rgb, RgbImage};
use kd_core::BatchSource;
use kd_data::{Dataset, Loader, LoaderOptions, Options, Pipeline};

use crate::support::{epoch, refusal};

/// A picture whose every pixel tells its place and `mark`.
fn picture([height, width]: [u32; 2], mark: u8) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| Rgb([mark, (x * 7) as u8, (y * 11) as u8]))
}

fn save(root: &Path, name: &str, size: [u32; 2], mark: u8) -> PathBuf {
    let path = root.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    picture(size, mark).save(&path).unwrap();
    path
}

/// `train` and `test` of two classes, `n` images each, of sizes that `size` gives.
fn tree(root: &Path, n: u8, size: impl Fn(u8) -> [u32; 2]) {
    for (split, class, mark) in [("train", "cat", 0), ("train", "dog", 50), ("test", "cat", 100), ("test", "dog", 150)] {
        for i in 0..n {
            save(root, &format!("{split}/{class}/{i:03}.png"), size(i), mark + i);
        }
    }
}

/// The same files in one archive, deflated or stored by turns.
fn archive(folder: &Path, to: &Path) {
    let mut zip = zip::ZipWriter::new(std::fs::File::create(to).unwrap());
    let mut pending = vec![folder.to_path_buf()];
    let mut turn = false;
    while let Some(dir) = pending.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
                continue;
            }
            turn = !turn;
            let method = if turn { zip::CompressionMethod::Deflated } else { zip::CompressionMethod::Stored };
            let name = path.strip_prefix(folder).unwrap().to_str().unwrap().replace('\\', "/");
            zip.start_file(name, zip::write::SimpleFileOptions::default().compression_method(method)).unwrap();
            zip.write_all(&std::fs::read(&path).unwrap()).unwrap();
        }
    }
    zip.finish().unwrap();
}

fn open(path: &Path) -> kd_data::Result<kd_data::Splits> {
    kd_data::open(&format!("imagefolder:{}", path.display()))
}

/// The mark of each sample's picture.
fn marks(set: &Dataset) -> Vec<u8> {
    (0..set.len()).map(|i| set.image(i).unwrap().data[0]).collect()
}

#[test]
fn a_folder_is_read_in_order() {
    let dir = tempfile::tempdir().unwrap();
    tree(dir.path(), 3, |_| [4, 5]);
    // What must not be taken for data.
    std::fs::write(dir.path().join("train/cat/notes.txt"), "x").unwrap();
    std::fs::write(dir.path().join("train/cat/.hidden.png"), "x").unwrap();
    std::fs::write(dir.path().join("README.md"), "x").unwrap();
    let splits = open(dir.path()).unwrap();
    let train = splits.train().unwrap();
    assert_eq!(splits.info.class_names, ["cat", "dog"]);
    assert_eq!(splits.info.shape, [3, 4, 5]);
    assert_eq!((train.labels(), marks(train)), (&[0, 0, 0, 1, 1, 1][..], vec![0, 1, 2, 50, 51, 52]));
    assert_eq!(marks(splits.test().unwrap()), [100, 101, 102, 150, 151, 152]);
    assert!(splits.validation.is_none() && splits.notes.is_empty());
    let image = train.image(1).unwrap();
    assert_eq!(image.shape(), [3, 4, 5]);
    let expected = picture([4, 5], 1);
    for (x, y, pixel) in expected.enumerate_pixels() {
        let at = (y * 5 + x) as usize;
        assert_eq!([image.data[at], image.data[20 + at], image.data[40 + at]], pixel.0);
    }
}

#[test]
fn a_zip_file_is_the_folder_in_it() {
    let dir = tempfile::tempdir().unwrap();
    tree(&dir.path().join("outer/inner"), 4, |_| [6, 5]);
    std::fs::create_dir_all(dir.path().join("outer/__MACOSX/train/cat")).unwrap();
    std::fs::write(dir.path().join("outer/__MACOSX/train/cat/._000.png"), "x").unwrap();
    let zip = dir.path().join("set.zip");
    archive(&dir.path().join("outer"), &zip);
    let (plain, zipped) = (open(&dir.path().join("outer/inner")).unwrap(), open(&zip).unwrap());
    assert_eq!(plain.info.class_names, zipped.info.class_names);
    let options = LoaderOptions { threads: 3, batch_size: 3, ..LoaderOptions::default() };
    let seen = |splits: &kd_data::Splits| epoch(&mut Loader::train(splits.train().unwrap(), &options).unwrap(), 0, 0);
    assert!(seen(&plain) == seen(&zipped));
    assert_eq!(seen(&zipped).len(), 3);
}

#[test]
fn formats_are_told_by_content_and_become_rgb() {
    let dir = tempfile::tempdir().unwrap();
    let white = RgbImage::from_pixel(4, 4, Rgb([255; 3]));
    let dynamic = image::DynamicImage::ImageRgb8(white);
    for (class, name, format) in [
        ("a", "x.png", ImageFormat::Jpeg),
        ("a", "y.JPG", ImageFormat::Png),
        ("b", "z.webp", ImageFormat::WebP),
        ("b", "w.jpeg", ImageFormat::Jpeg),
    ] {
        let path = dir.path().join("train").join(class).join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        dynamic.save_with_format(path, format).unwrap();
    }
    // Grey of 16 bits, and with an alpha channel.
    let grey = image::DynamicImage::ImageLumaA16(image::ImageBuffer::from_pixel(4, 4, image::LumaA([0x8080u16, 0x1234])));
    grey.save_with_format(dir.path().join("train/b/v.png"), ImageFormat::Png).unwrap();
    let splits = open(dir.path()).unwrap();
    for set in [splits.train().unwrap(), splits.test().unwrap()] {
        for i in 0..set.len() {
            let image = set.image(i).unwrap();
            assert!(
                image.shape() == [3, 4, 4] && (image.data.iter().all(|&v| v >= 254) || image.data.iter().all(|&v| v == 128)),
                "{image:?}"
            );
        }
    }
}

#[test]
fn the_sets_follow_from_the_folders() {
    let with = |folders: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        for folder in folders {
            for class in ["a", "b"] {
                for i in 0..10 {
                    save(dir.path(), &format!("{folder}/{class}/{i}.png"), [2, 2], i);
                }
            }
        }
        let splits = open(dir.path()).unwrap();
        let sizes =
            [Some(splits.train().unwrap().len()), splits.validation.as_ref().map(Dataset::len), splits.test().ok().map(Dataset::len)];
        (sizes, splits, dir)
    };
    assert_eq!(with(&["train", "val", "test"]).0, [Some(20), Some(20), Some(20)]);
    assert_eq!(with(&["Training", "valid"]).0, [Some(20), None, Some(20)]);
    assert_eq!(with(&["train", "test"]).0, [Some(20), None, Some(20)]);
    for folders in [&["train"][..], &["."], &["some/where"]] {
        let (sizes, splits, _dir) = with(folders);
        assert_eq!(sizes, [Some(16), None, Some(4)], "{folders:?}");
        assert_eq!(splits.test().unwrap().by_class().iter().map(Vec::len).collect::<Vec<_>>(), [2, 2]);
        assert!(splits.notes[0].contains("4 of 20"), "{:?}", splits.notes);
    }
    // The options' validation set comes on top, or in place of the source's own.
    let (_, splits, _dir) = with(&["train", "val", "test"]);
    let own = splits.clone().select(&Options::default(), 1).unwrap();
    assert_eq!(own.validation.unwrap().len(), 20);
    let asked = splits.select(&Options { validation: 0.5, ..Options::default() }, 1).unwrap();
    assert_eq!((asked.train.unwrap().len(), asked.validation.unwrap().len()), (10, 10));
}

#[test]
fn images_of_many_sizes_become_one() {
    let dir = tempfile::tempdir().unwrap();
    tree(dir.path(), 3, |i| [20 + u32::from(i), 30]);
    let splits = open(dir.path()).unwrap();
    let train = splits.train().unwrap();
    assert_eq!(splits.info.shape, [3, 224, 224]);
    let shape = |specs: &[&str], eval: bool| {
        let options = LoaderOptions { augment: vec![Pipeline::parse(specs).unwrap()], batch_size: 4, ..LoaderOptions::default() };
        let mut loader = if eval { Loader::eval(train, &options) } else { Loader::train(train, &options) }.unwrap();
        loader.start(0, 0).unwrap();
        let batch = loader.next_batch().unwrap().unwrap();
        assert_eq!(batch.images[0].dims()[1..], loader.shape());
        loader.shape()
    };
    assert_eq!(shape(&["flip"], false), [3, 224, 224]);
    for eval in [false, true] {
        assert_eq!(shape(&[], eval), [3, 224, 224]);
        assert_eq!(shape(&["random-resized-crop:16", "flip"], eval), [3, 16, 16]);
        assert_eq!(shape(&["resize:18", "center-crop:12", "pad-crop:2"], eval), [3, 12, 12]);
        assert_eq!(shape(&["resize:10x14"], eval), [3, 10, 14]);
    }
    let only_shorter = LoaderOptions { augment: vec![Pipeline::parse(&["resize:18"]).unwrap()], ..LoaderOptions::default() };
    assert!(refusal(Loader::train(train, &only_shorter).map(|_| ())).contains("center-crop:N"));
    let two_sizes = ["resize:8x8", "resize:9x9"].map(|s| Pipeline::parse(&[s]).unwrap()).to_vec();
    let message = refusal(Loader::train(train, &LoaderOptions { augment: two_sizes, views: 2, ..LoaderOptions::default() }).map(|_| ()));
    assert!(message.contains("[8, 8] and [9, 9]"), "{message}");
}

#[test]
fn sets_of_different_sizes_still_agree() {
    let dir = tempfile::tempdir().unwrap();
    for class in ["a", "b"] {
        save(dir.path(), &format!("train/{class}/0.png"), [8, 8], 0);
        save(dir.path(), &format!("test/{class}/0.png"), [9, 8], 0);
    }
    let splits = open(dir.path()).unwrap();
    let shape = |set: &Dataset| Loader::eval(set, &LoaderOptions::default()).unwrap().shape();
    assert_eq!([shape(splits.train().unwrap()), shape(splits.test().unwrap()), splits.info.shape], [[3, 224, 224]; 3]);
}

#[test]
fn the_cache_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    tree(dir.path(), 9, |i| [20 + u32::from(i % 3), 24]);
    let splits = open(dir.path()).unwrap();
    let weak = Pipeline::parse(&["resize:16x16", "pad-crop:2", "flip"]).unwrap();
    let strong = Pipeline::parse(&["resize:16x16", "flip", "randaugment:2", "cutout:4"]).unwrap();
    let run = |cache_bytes, threads| {
        let augment = vec![weak.clone(), strong.clone()];
        let options = LoaderOptions { cache_bytes, threads, augment, views: 2, batch_size: 5, seed: 3, ..LoaderOptions::default() };
        let mut loader = Loader::train(splits.train().unwrap(), &options).unwrap();
        [epoch(&mut loader, 0, 0), epoch(&mut loader, 1, 0), epoch(&mut loader, 1, 2)].concat()
    };
    let whole = run(1 << 20, 1);
    assert_eq!(whole.len(), 4 + 4 + 2);
    assert!(whole[8..] == whole[6..8]);
    // Nothing fits; five images of 768 bytes fit; everything fits.
    for budget in [0, 5_000, 1 << 20] {
        assert!(run(budget, 2) == whole, "{budget} bytes");
    }
}

#[test]
fn mean_and_deviation_are_measured_on_what_is_shown() {
    let dir = tempfile::tempdir().unwrap();
    for (name, value) in [("a/0.png", 0), ("a/1.png", 255), ("b/0.png", 51), ("b/1.png", 102)] {
        let path = dir.path().join("train").join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        RgbImage::from_fn(8, 8, |x, _| if x < 4 { Rgb([value, 10, 20]) } else { Rgb([value, 30, 20]) }).save(path).unwrap();
    }
    save(dir.path(), "test/a/0.png", [8, 8], 0);
    let splits = open(dir.path()).unwrap();
    for threads in [1, 2] {
        let options =
            LoaderOptions { threads, augment: vec![Pipeline::parse(&["center-crop:4", "flip"]).unwrap()], ..LoaderOptions::default() };
        let measured = Loader::eval(splits.train().unwrap(), &options).unwrap().mean_std().unwrap();
        // Red: 0, 1, 0.2, 0.4; green: 10 and 30 of 255 in halves; blue: 20 of 255.
        let expected = ([0.4, 20.0 / 255.0, 20.0 / 255.0], [0.14f64.sqrt(), 10.0 / 255.0, 0.0]);
        for c in 0..3 {
            assert!((measured.mean[c] - expected.0[c]).abs() < 1e-12 && (measured.std[c] - expected.1[c]).abs() < 1e-8, "{measured:?}");
        }
    }
}

#[test]
fn what_is_wrong_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    assert!(refusal(open(&at("nowhere"))).contains("nowhere: expected a folder or a zip file"));
    std::fs::write(at("no.zip"), "not an archive").unwrap();
    assert!(refusal(open(&at("no.zip"))).contains("no.zip: expected a folder or a zip file"));

    std::fs::create_dir_all(at("empty")).unwrap();
    assert!(refusal(open(&at("empty"))).contains("no class folder"));
    save(&at("one"), "train/cat/0.png", [2, 2], 0);
    assert!(refusal(open(&at("one"))).contains("only one class (`cat`)"));
    save(&at("flat"), "0.png", [2, 2], 0);
    let message = refusal(open(&at("flat")));
    assert!(message.contains("0.png") && message.contains("in no class folder"), "{message}");

    tree(&at("ok"), 2, |_| [2, 2]);
    std::fs::create_dir_all(at("ok/train/eel")).unwrap();
    let message = refusal(open(&at("ok")));
    assert!(message.contains("train/eel") && message.contains("without an image"), "{message}");
    std::fs::remove_dir(at("ok/train/eel")).unwrap();

    let extra = save(&at("ok"), "test/fox/0.png", [2, 2], 0);
    let message = refusal(open(&at("ok")));
    assert!(message.contains("test/fox") && message.contains("no training images"), "{message}");
    std::fs::remove_dir_all(extra.parent().unwrap()).unwrap();

    // Images of no class may lie beside the splits.
    save(&at("ok"), "unlabelled/0.png", [2, 2], 0);
    open(&at("ok")).unwrap();

    std::fs::create_dir_all(at("ok/docs")).unwrap();
    save(&at("ok"), "more/cat/0.png", [2, 2], 0);
    assert!(refusal(open(&at("ok"))).contains("more: a folder beside train"));
    std::fs::remove_dir_all(at("ok/more")).unwrap();
    open(&at("ok")).unwrap();
}

#[test]
fn an_unreadable_image_reaches_the_consumer_with_its_path() {
    let dir = tempfile::tempdir().unwrap();
    // More images than are looked at on opening; the broken one is not among those.
    tree(dir.path(), 40, |_| [6, 6]);
    let whole = std::fs::read(dir.path().join("train/dog/006.png")).unwrap();
    let odd = save(dir.path(), "odd.png", [6, 7], 0);
    let odd = (std::fs::read(&odd).unwrap(), std::fs::remove_file(&odd).unwrap()).0;
    let mut jpeg = std::io::Cursor::new(vec![]);
    picture([64, 64], 9).write_to(&mut jpeg, ImageFormat::Jpeg).unwrap();
    // With a byte of filling and a segment that holds an end marker, as a thumbnail does.
    let jpeg = [&jpeg.get_ref()[..2], &[0xFF, 0xFF, 0xE5, 0, 4, 0xFF, 0xD9], &jpeg.get_ref()[2..]].concat();
    std::fs::write(dir.path().join("train/dog/007.png"), &jpeg).unwrap();
    assert_eq!(open(dir.path()).unwrap().train().unwrap().image(47).unwrap().shape(), [3, 64, 64]);
    let mut webp = std::io::Cursor::new(vec![]);
    picture([64, 64], 9).write_to(&mut webp, ImageFormat::WebP).unwrap();
    let webp = webp.into_inner();
    for (bytes, why) in [
        (&whole[..whole.len() - 30], "not readable as an image"),
        (&jpeg[..jpeg.len() - 2], "cut short"),
        (&jpeg[..jpeg.len() / 2], "cut short"),
        (&jpeg[..30], "not readable as an image"),
        (&webp[..webp.len() / 2], "not readable as an image"),
        (b"hello", "not an image"),
        (&odd, "6x7 pixels where others have 6x6"),
    ] {
        std::fs::write(dir.path().join("train/dog/007.png"), bytes).unwrap();
        let splits = open(dir.path()).unwrap();
        for threads in [1, 2] {
            let mut loader =
                Loader::train(splits.train().unwrap(), &LoaderOptions { threads, batch_size: 8, ..LoaderOptions::default() }).unwrap();
            loader.start(0, 0).unwrap();
            let error = loop {
                match loader.next_batch() {
                    Ok(batch) => assert!(batch.is_some(), "the epoch ended without an error"),
                    Err(e) => break e.to_string(),
                }
            };
            assert!(error.contains("007.png") && error.contains(why), "{error}");
            assert!(loader.next_batch().is_err());
        }
    }
}

#[test]
fn huge_images_are_refused_before_they_are_decoded() {
    let dir = tempfile::tempdir().unwrap();
    tree(dir.path(), 2, |_| [6, 6]);
    // The head of a PNG that claims 20,000 x 20,000 pixels, and one that claims 16,000 x 16,000.
    for (side, why) in [(20_000u32, "not readable"), (16_000, "16000x16000 pixels")] {
        let mut png = vec![0x89, b'P', b'N', b'G', 13, 10, 26, 10, 0, 0, 0, 13];
        let mut head = b"IHDR".to_vec();
        head.extend(side.to_be_bytes());
        head.extend(side.to_be_bytes());
        head.extend([8, 2, 0, 0, 0]);
        let mut crc = flate2::Crc::new();
        crc.update(&head);
        png.extend(head);
        png.extend(crc.sum().to_be_bytes());
        png.extend([0, 0, 0, 0]);
        png.extend(b"IDAT");
        png.extend([0x35, 0xAF, 0x06, 0x1E]);
        std::fs::write(dir.path().join("train/cat/000.png"), png).unwrap();
        let message = refusal(open(dir.path()));
        assert!(message.contains("000.png") && message.contains(why), "{message}");
    }
}

#[test]
fn the_fingerprint_knows_names_and_sizes() {
    let dir = tempfile::tempdir().unwrap();
    tree(dir.path(), 2, |_| [6, 6]);
    let print = || open(dir.path()).unwrap().fingerprint();
    let before = print();
    assert_eq!(before, print());
    std::fs::rename(dir.path().join("train/cat/000.png"), dir.path().join("train/cat/0000.png")).unwrap();
    assert_ne!(before, print());
}
