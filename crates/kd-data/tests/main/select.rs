use std::collections::BTreeSet;

use kd_data::{Dataset, Options, Splits};
use proptest::prelude::*;

use crate::support::{random_set, refusal, set_with};

fn splits(train: Dataset) -> Splits {
    Splits { info: train.info().clone(), test: Ok(train.clone()), train: Ok(train), validation: None, notes: vec![] }
}

fn records(set: &Dataset) -> Vec<u32> {
    (0..set.len()).map(|i| set.record(i)).collect()
}

proptest! {
    #[test]
    fn a_limited_set_is_balanced_and_repeatable(n in 20usize..300, classes in 2usize..8, part in 0.0f64..1.0, seed in any::<u64>()) {
        let limit = classes + ((n - classes) as f64 * part) as usize;
        let options = Options { train_limit: limit, ..Options::default() };
        let all = splits(random_set(n, [1, 2, 2], classes));
        let chosen = all.clone().select(&options, seed).unwrap();
        let train = chosen.train().unwrap();
        prop_assert_eq!(train.len(), limit);
        let counts: Vec<usize> = train.by_class().iter().map(Vec::len).collect();
        prop_assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1, "{:?}", counts);
        prop_assert_eq!(records(train), records(all.clone().select(&options, seed).unwrap().train().unwrap()));
        for i in 0..limit {
            prop_assert_eq!(train.image(i).unwrap().data, all.train().unwrap().image(train.record(i) as usize).unwrap().data);
        }
    }

    #[test]
    fn validation_takes_its_share_of_every_class(sizes in prop::collection::vec(1usize..60, 2..6), share in 0.05f64..0.95, seed in any::<u64>()) {
        let labels: Vec<u32> = sizes.iter().enumerate().flat_map(|(c, &n)| vec![c as u32; n]).collect();
        let all = splits(set_with(labels, [1, 1, 1], sizes.len()));
        let held = |n: usize| ((n as f64 * share).round() as usize).min(n - 1);
        prop_assume!(sizes.iter().any(|&n| held(n) > 0));
        let chosen = all.clone().select(&Options { validation: share, ..Options::default() }, seed).unwrap();
        let (train, validation) = (chosen.train().unwrap(), chosen.validation.as_ref().unwrap());
        for (c, &n) in sizes.iter().enumerate() {
            prop_assert_eq!(validation.by_class()[c].len(), held(n));
        }
        let union: BTreeSet<u32> = records(train).into_iter().chain(records(validation)).collect();
        prop_assert_eq!((union.len(), train.len() + validation.len()), (all.train().unwrap().len(), all.train().unwrap().len()));
    }
}

#[test]
fn a_limit_leaves_the_validation_set_alone() {
    let all = splits(random_set(200, [1, 2, 2], 4));
    let base = Options { validation: 0.25, ..Options::default() };
    let whole = all.clone().select(&base, 3).unwrap();
    let limited = all.clone().select(&Options { train_limit: 40, label_noise: 0.5, ..base.clone() }, 3).unwrap();
    assert_eq!(records(whole.validation.as_ref().unwrap()), records(limited.validation.as_ref().unwrap()));
    assert_eq!(limited.validation.as_ref().unwrap().labels(), limited.validation.as_ref().unwrap().given_labels());
    let other = all.select(&base, 4).unwrap();
    assert_ne!(records(whole.validation.as_ref().unwrap()), records(other.validation.as_ref().unwrap()));
}

#[test]
fn an_unbalanced_set_gives_what_it_has() {
    let labels = [vec![0; 3], vec![1; 50], vec![2; 50]].concat();
    let chosen = splits(set_with(labels, [1, 1, 1], 3)).select(&Options { train_limit: 33, ..Options::default() }, 0).unwrap();
    assert_eq!(chosen.train().unwrap().by_class().iter().map(Vec::len).collect::<Vec<_>>(), [3, 15, 15]);
}

#[test]
fn label_noise_strikes_its_share_and_all_other_classes_alike() {
    let (n, classes) = (20_000, 5);
    let chosen = splits(random_set(n, [1, 1, 1], classes)).select(&Options { label_noise: 0.4, ..Options::default() }, 11).unwrap();
    let train = chosen.train().unwrap();
    let mut shifts = vec![0; classes];
    for (noisy, given) in train.labels().iter().zip(train.given_labels()) {
        shifts[(*noisy as usize + classes - *given as usize) % classes] += 1;
    }
    assert_eq!(train.given_labels(), random_set(n, [1, 1, 1], classes).labels());
    // Five standard deviations: sqrt(n p (1-p)) is 69 for p = 0.6 and 42 for p = 0.1.
    assert!((f64::from(shifts[0]) - 12_000.0).abs() < 346.0, "{shifts:?}");
    assert!(shifts[1..].iter().all(|&s| (f64::from(s) - 2_000.0).abs() < 212.0), "{shifts:?}");

    let all = splits(random_set(50, [1, 1, 1], classes)).select(&Options { label_noise: 1.0, ..Options::default() }, 1).unwrap();
    let train = all.train().unwrap();
    assert!(train.labels().iter().zip(train.given_labels()).all(|(a, b)| a != b));
}

#[test]
fn noise_of_a_record_does_not_depend_on_what_else_was_chosen() {
    let all = splits(random_set(400, [1, 1, 1], 4));
    let noisy = |limit| all.clone().select(&Options { train_limit: limit, label_noise: 0.5, ..Options::default() }, 5).unwrap();
    let (whole, part) = (noisy(0), noisy(100));
    let (whole, part) = (whole.train().unwrap(), part.train().unwrap());
    assert!((0..100).all(|i| part.labels()[i] == whole.labels()[part.record(i) as usize]));
}

#[test]
fn fingerprints_tell_data_apart() {
    let all = splits(random_set(100, [1, 2, 2], 4));
    let print = |options: Options, seed| all.clone().select(&options, seed).unwrap().fingerprint();
    let plain = print(Options::default(), 0);
    assert_eq!(plain.len(), 64);
    assert_eq!(plain, print(Options::default(), 1), "a seed that nothing was chosen by changes nothing");
    let limited = Options { train_limit: 50, ..Options::default() };
    let prints = [
        plain,
        print(limited.clone(), 0),
        print(limited, 1),
        print(Options { validation: 0.5, ..Options::default() }, 0),
        print(Options { label_noise: 0.5, ..Options::default() }, 0),
    ];
    assert_eq!(prints.iter().collect::<BTreeSet<_>>().len(), prints.len());
}

#[test]
fn options_out_of_range_are_refused() {
    let all = splits(random_set(20, [1, 1, 1], 4));
    let refused = |options: Options| refusal(all.clone().select(&options, 0));
    assert!(refused(Options { train_limit: 3, ..Options::default() }).contains("train_limit = 3"));
    assert!(refused(Options { train_limit: 21, ..Options::default() }).contains("from 4 (the classes) to 20"));
    assert!(refused(Options { validation: 1.0, ..Options::default() }).contains("validation = 1"));
    assert!(refused(Options { validation: f64::NAN, ..Options::default() }).contains("validation = NaN"));
    assert!(refused(Options { validation: 0.01, ..Options::default() }).contains("no sample of any class"));
    assert!(refused(Options { label_noise: -0.1, ..Options::default() }).contains("label_noise = -0.1"));
}
