use std::path::{Path, PathBuf};

use crate::support::refusal;

/// `n` records of `labels` label bytes (class i mod K, coarse = fine / 5) and pixels that tell record, plane and place.
fn write(dir: &Path, name: &str, n: usize, labels: usize) -> PathBuf {
    std::fs::create_dir_all(dir).unwrap();
    let mut bytes = vec![];
    for i in 0..n {
        match labels {
            1 => bytes.push((i % 10) as u8),
            _ => bytes.extend([(i % 100 / 5) as u8, (i % 100) as u8]),
        }
        bytes.extend((0..3072).map(|p| pixel(i, p)));
    }
    let path = dir.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn pixel(record: usize, place: usize) -> u8 {
    ((record * 7 + place * 13) % 251) as u8
}

fn spec(source: &str, dir: &Path) -> String {
    format!("{source}:{}", dir.display())
}

#[test]
fn cifar10_joins_its_five_batches() {
    let dir = tempfile::tempdir().unwrap();
    let inner = dir.path().join("cifar-10-batches-bin");
    for i in 1..=5 {
        write(&inner, &format!("data_batch_{i}.bin"), 10 + i, 1);
    }
    write(&inner, "test_batch.bin", 4, 1);
    for folder in [dir.path(), &inner] {
        let splits = kd_data::open(&spec("cifar10", folder)).unwrap();
        let train = splits.train().unwrap();
        assert_eq!((train.len(), splits.test().unwrap().len()), (11 + 12 + 13 + 14 + 15, 4));
        assert_eq!(splits.info.class_names[9], "truck");
        // Sample 13 is record 2 of the second file.
        assert_eq!((train.labels()[13], train.image(13).unwrap().data[3071]), (2, pixel(2, 3071)));
    }
}

#[test]
fn a_test_batch_alone_can_be_evaluated() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "test_batch.bin", 4, 1);
    write(dir.path(), "data_batch_1.bin", 4, 1);
    let splits = kd_data::open(&spec("cifar10", dir.path())).unwrap();
    assert_eq!(splits.test().unwrap().len(), 4);
    let message = refusal(splits.train());
    assert!(message.contains("training") && message.contains("data_batch_2.bin is missing"), "{message}");
    assert!(refusal(splits.select(&Default::default(), 0)).contains("data_batch_2.bin"));
}

#[test]
fn cifar100_reads_both_labels_and_its_groups() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "train.bin", 200, 2);
    write(dir.path(), "test.bin", 100, 2);
    std::fs::write(dir.path().join("fine_label_names.txt"), (0..100).map(|i| format!("name{i}\n")).collect::<String>()).unwrap();
    let fine = kd_data::open(&spec("cifar100", dir.path())).unwrap();
    let coarse = kd_data::open(&spec("cifar100-coarse", dir.path())).unwrap();
    assert_eq!(fine.train().unwrap().labels()[107], 7);
    assert_eq!(coarse.train().unwrap().labels()[107], 1);
    assert_eq!(fine.info.groups.as_deref().unwrap()[..6], [0, 0, 0, 0, 0, 1]);
    assert_eq!((fine.info.class_names.len(), fine.info.class_names[7].as_str()), (100, "name7"));
    assert_eq!((coarse.info.class_names.len(), coarse.info.class_names[14].as_str()), (20, "people"));
    assert_eq!(coarse.info.groups, None);
    assert_eq!(fine.train().unwrap().image(107).unwrap().data, coarse.train().unwrap().image(107).unwrap().data);
    assert_ne!(fine.fingerprint(), coarse.fingerprint());
}

#[test]
fn damaged_files_are_named_with_what_would_be_right() {
    let dir = tempfile::tempdir().unwrap();
    let message = refusal(kd_data::open(&spec("cifar100", dir.path())));
    assert!(message.contains(&dir.path().display().to_string()) && message.contains("train.bin, test.bin"), "{message}");

    let path = write(dir.path(), "train.bin", 3, 2);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[3074 * 2 + 1] = 100;
    std::fs::write(&path, &bytes).unwrap();
    let message = refusal(kd_data::open(&spec("cifar100", dir.path())));
    assert!(message.contains("train.bin") && message.contains("record 2 has label 100") && message.contains("0..=99"), "{message}");

    // Two records of one class in different groups.
    bytes[3074 * 2] = 3;
    bytes[3074 * 2 + 1] = 1;
    std::fs::write(&path, &bytes).unwrap();
    let message = refusal(kd_data::open(&spec("cifar100", dir.path())));
    assert!(message.contains("record 2 puts fine label 1 into coarse label 3"), "{message}");

    for length in [0, 3073, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..length]).unwrap();
        let message = refusal(kd_data::open(&spec("cifar100", dir.path())));
        assert!(message.contains("train.bin") && message.contains(&format!("{length} bytes, expected a multiple of 3074")), "{message}");
    }

    write(dir.path(), "train.bin", 3, 2);
    std::fs::write(dir.path().join("fine_label_names.txt"), "one\ntwo\n").unwrap();
    let message = refusal(kd_data::open(&spec("cifar100", dir.path())));
    assert!(message.contains("fine_label_names.txt") && message.contains("2 class names, expected 100"), "{message}");
}
