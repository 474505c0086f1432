use kd_core::Rng;
use kd_data::{Loader, LoaderOptions};
use sha2::{Digest, Sha256};

use crate::support::refusal;

/// From the original file: images of each digit.
const COUNTS: [usize; 10] = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180];

/// Row `record` of the original file, wherever the split put it: (value 0..=16 of each pixel, digit).
fn record(splits: &kd_data::Splits, record: u32) -> (Vec<u8>, u32) {
    let sets = [splits.train().unwrap(), splits.test().unwrap()];
    let (set, i) = sets.into_iter().find_map(|s| (0..s.len()).find(|&i| s.record(i) == record).map(|i| (s, i))).unwrap();
    (set.image(i).unwrap().data.iter().map(|&p| ((u16::from(p) * 16 + 127) / 255) as u8).collect(), set.labels()[i])
}

#[test]
fn splits_hold_the_original_file() {
    let digits = kd_data::open("digits").unwrap();
    let (train, test) = (digits.train().unwrap(), digits.test().unwrap());
    for (digit, (train, test)) in train.by_class().iter().zip(test.by_class()).enumerate() {
        assert_eq!((train.len(), test.len()), (COUNTS[digit] - 50, 50), "digit {digit}");
    }
    let rows: Vec<_> = (0..1797).map(|r| record(&digits, r)).collect();
    let labels = rows.iter().map(|r| r.1 as u8);
    let pixels = rows.iter().flat_map(|r| r.0.iter().copied());
    let hash = Sha256::digest(labels.chain(pixels).collect::<Vec<u8>>());
    assert_eq!(format!("{hash:x}"), "e1d88a0854e29e01d16358d2cd026aa8fc20dfc4cdb3fce004300857ea82aa70");
}

#[test]
fn first_row_reads_as_in_the_csv() {
    let (pixels, label) = record(&kd_data::open("digits").unwrap(), 0);
    assert_eq!(label, 0);
    assert_eq!(pixels[..24], [0, 0, 5, 13, 9, 1, 0, 0, 0, 0, 13, 15, 10, 15, 5, 0, 0, 3, 15, 2, 0, 11, 8, 0]);
}

#[test]
fn split_follows_the_stated_rule() {
    let digits = kd_data::open("digits").unwrap();
    let test: Vec<u32> = (0..500).map(|i| digits.test().unwrap().record(i)).collect();
    let mut expected = vec![];
    for digit in 0..10 {
        let of_digit = Rng::new(0).named("digits").permutation(1797).into_iter().filter(|&r| record(&digits, r).1 == digit);
        expected.extend(of_digit.take(50));
    }
    expected.sort_unstable();
    assert_eq!(test, expected);
}

#[test]
fn constants_are_those_of_the_training_set() {
    let digits = kd_data::open("digits").unwrap();
    let measured = Loader::eval(digits.train().unwrap(), &LoaderOptions::default()).unwrap().mean_std().unwrap();
    let stated = &digits.info.normalise;
    assert!((measured.mean[0] - stated.mean[0]).abs() < 1e-8 && (measured.std[0] - stated.std[0]).abs() < 1e-8, "{measured:?}");
}

#[test]
fn wrong_names_are_refused_with_the_right_one() {
    let message = refusal(kd_data::open("digitz"));
    assert!(message.contains("`digitz`") && message.contains("did you mean `digits`?") && message.contains("cifar100-coarse"), "{message}");
    assert!(!refusal(kd_data::open("q")).contains("did you mean"));
    assert!(refusal(kd_data::open("digits:here")).contains("takes nothing"));
    assert!(refusal(kd_data::open("cifar10")).contains("cifar10:DIR"));
    assert!(refusal(kd_data::open("cifar10:")).contains("cifar10:DIR"));
}
