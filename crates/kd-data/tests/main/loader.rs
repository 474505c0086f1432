use std::sync::Arc;

use candle_core::{DType, Device};
use kd_core::{BatchSource, Rng};
use kd_data::{Image, Loader, LoaderOptions, Normalise, Pipeline, Transform};
use proptest::prelude::*;

use crate::support::{Seen, epoch, random_set, refusal};

fn options(batch_size: usize, threads: usize) -> LoaderOptions {
    let augment = vec![Pipeline::parse(&["pad-crop:1", "flip"]).unwrap()];
    LoaderOptions { batch_size, threads, seed: 5, views: 2, augment, ..LoaderOptions::default() }
}

#[test]
fn threads_change_nothing() {
    let data = random_set(53, [3, 5, 6], 4);
    let runs: Vec<Vec<Seen>> = [1, 2, 4].map(|t| epoch(&mut Loader::train(&data, &options(8, t)).unwrap(), 3, 0)).into();
    assert_eq!(runs[0].len(), 7);
    assert_eq!(runs[0][6].1.len(), 5, "the last batch is shorter");
    assert!(runs[0] == runs[1] && runs[0] == runs[2]);
}

#[test]
fn a_restart_within_an_epoch_goes_on_where_it_stopped() {
    let data = random_set(53, [3, 5, 6], 4);
    let whole = epoch(&mut Loader::train(&data, &options(8, 1)).unwrap(), 3, 0);
    let mut loader = Loader::train(&data, &options(8, 2)).unwrap();
    for first in [4, 0, 6, 7] {
        assert!(epoch(&mut loader, 3, first) == whole[first..], "from batch {first}");
    }
    // Left in the middle: what was made ahead must not leak into the next epoch.
    loader.start(2, 0).unwrap();
    loader.next_batch().unwrap().unwrap();
    assert!(epoch(&mut loader, 3, 0) == whole);
}

#[test]
fn an_epoch_holds_every_sample_once_in_an_order_of_its_own() {
    let data = random_set(40, [1, 3, 3], 4);
    let mut loader = Loader::train(&data, &options(7, 1)).unwrap();
    let order = |batches: &[Seen]| batches.iter().flat_map(|b| b.2.clone()).collect::<Vec<u32>>();
    let (first, second) = (epoch(&mut loader, 0, 0), epoch(&mut loader, 1, 0));
    assert_ne!(order(&first), order(&second));
    assert_eq!(order(&first), Rng::new(5).named("order").fork(0).permutation(40));
    for batches in [&first, &second] {
        let mut all = order(batches);
        all.sort_unstable();
        assert_eq!(all, (0..40).collect::<Vec<_>>());
        assert!(batches.iter().all(|b| b.1.iter().zip(&b.2).all(|(&label, &i)| label == i64::from(data.labels()[i as usize]))));
    }
}

#[test]
fn views_and_epochs_augment_differently() {
    let data = random_set(30, [1, 6, 6], 3);
    let mut loader = Loader::train(&data, &options(30, 1)).unwrap();
    let (first, second) = (epoch(&mut loader, 0, 0), epoch(&mut loader, 1, 0));
    assert_ne!(first[0].0[0], first[0].0[1], "two views");
    let of_sample = |seen: &Seen, sample: u32| {
        let at = seen.2.iter().position(|&i| i == sample).unwrap();
        seen.0[0][at * 36..][..36].to_vec()
    };
    assert!((0..30).any(|s| of_sample(&first[0], s) != of_sample(&second[0], s)));
    let mut other = Loader::train(&data, &LoaderOptions { seed: 6, ..options(30, 1) }).unwrap();
    assert_ne!(epoch(&mut other, 0, 0)[0].2, first[0].2, "another seed");
}

#[test]
fn a_weak_and_a_strong_view_have_their_own_lists() {
    let data = random_set(10, [1, 6, 6], 2);
    let augment = vec![Pipeline::none(), Pipeline::parse(&["flip"]).unwrap()];
    let mut loader = Loader::train(&data, &LoaderOptions { views: 3, augment, batch_size: 10, ..LoaderOptions::default() }).unwrap();
    let seen = epoch(&mut loader, 0, 0).remove(0);
    for (at, &i) in seen.2.iter().enumerate() {
        let plain: Vec<f32> = data.image(i as usize).unwrap().data.iter().map(|&v| ((f64::from(v) / 255.0 - 0.4) / 0.3) as f32).collect();
        assert_eq!(seen.0[0][at * 36..][..36], plain);
    }
    assert!(seen.0[1] != seen.0[0] && seen.0[2] != seen.0[0] && seen.0[1] != seen.0[2]);
}

proptest! {
    #[test]
    fn evaluation_is_the_data_in_order(n in 1usize..40, c in 1usize..4, h in 1usize..6, w in 1usize..6, batch in 1usize..12, threads in 1usize..3) {
        let data = random_set(n, [c, h, w], 3);
        let normalise = Normalise { mean: (0..c).map(|c| c as f64 * 0.2).collect(), std: (0..c).map(|c| 0.5 + c as f64).collect() };
        let options = LoaderOptions { dtype: DType::F64, normalise: Some(normalise.clone()), ..options(batch, threads) };
        let mut loader = Loader::eval(&data, &options).unwrap();
        prop_assert_eq!((loader.samples(), loader.batches(), loader.shape()), (n, n.div_ceil(batch), [c, h, w]));
        loader.start(0, 0).unwrap();
        let mut at = 0;
        while let Some(b) = loader.next_batch().unwrap() {
            prop_assert_eq!(b.images.len(), 1);
            prop_assert_eq!(b.images[0].dims(), [b.len(), c, h, w]);
            let images = b.images[0].flatten_all().unwrap().to_vec1::<f64>().unwrap();
            for (k, image) in images.chunks(c * h * w).enumerate() {
                for (p, &value) in image.iter().enumerate() {
                    let channel = p / (h * w);
                    let expected = (f64::from(data.image(at + k).unwrap().data[p]) / 255.0 - normalise.mean[channel]) / normalise.std[channel];
                    prop_assert_eq!(value, expected);
                }
            }
            prop_assert_eq!(b.indices.to_vec1::<u32>().unwrap(), (at as u32..(at + b.len()) as u32).collect::<Vec<_>>());
            at += b.len();
        }
        prop_assert_eq!(at, n);
    }
}

#[test]
fn a_last_short_batch_can_be_left_out() {
    let data = random_set(20, [1, 3, 3], 2);
    let mut loader = Loader::train(&data, &LoaderOptions { drop_last: true, ..options(8, 1) }).unwrap();
    assert_eq!((loader.samples(), loader.batches()), (16, 2));
    assert_eq!(epoch(&mut loader, 0, 0).iter().map(|b| b.1.len()).collect::<Vec<_>>(), [8, 8]);
}

#[test]
fn a_dropped_loader_ends_its_threads() {
    let data = random_set(500, [1, 3, 3], 2);
    let held = Arc::strong_count(data.info());
    for threads in [1, 2] {
        // Far more batches than places, so that the thread stands blocked at a full channel, or is just starting.
        let mut loader = Loader::train(&data, &options(2, threads)).unwrap();
        loader.start(0, 0).unwrap();
        loader.next_batch().unwrap().unwrap();
        loader.start(1, 0).unwrap();
        drop(loader);
        assert_eq!(Arc::strong_count(data.info()), held, "a thread still holds the data");
    }
}

#[derive(Debug)]
struct Breaks;

impl Transform for Breaks {
    fn apply(&self, image: &mut Image, _: &mut Vec<u8>, _: Rng) {
        assert!(image.data[0] < 200, "a bright corner");
    }
}

#[test]
fn a_panic_in_the_thread_reaches_the_consumer() {
    let data = random_set(64, [1, 3, 3], 2);
    for threads in [1, 2] {
        let augment = vec![Pipeline::new(vec![Arc::new(Breaks)])];
        let mut loader = Loader::train(&data, &LoaderOptions { augment, ..options(4, threads) }).unwrap();
        loader.start(0, 0).unwrap();
        let error = loop {
            match loader.next_batch() {
                Ok(batch) => assert!(batch.is_some(), "the epoch ended without an error"),
                Err(e) => break e.to_string(),
            }
        };
        assert!(error.contains("panicked") && error.contains("a bright corner"), "{error}");
        assert!(loader.next_batch().is_err(), "an epoch that broke must not look finished");
    }
}

/// Loaders over data in which each sample is a class of its own, so that soft targets tell who was mixed with whom.
fn mixed(specs: &[&str], threads: usize) -> (Vec<Seen>, Vec<Vec<Vec<f32>>>, Vec<Seen>) {
    let data = random_set(20, [2, 6, 5], 20);
    let with = |specs: &[&str]| LoaderOptions { augment: vec![Pipeline::parse(specs).unwrap()], ..options(8, threads) };
    let plain = epoch(&mut Loader::train(&data, &with(&["flip"])).unwrap(), 4, 0);
    let mut loader = Loader::train(&data, &with(&[&["flip"], specs].concat())).unwrap();
    loader.start(4, 0).unwrap();
    let (mut batches, mut targets) = (vec![], vec![]);
    while let Some(batch) = loader.next_batch().unwrap() {
        targets.push(batch.targets.as_ref().unwrap().to_vec2::<f32>().unwrap());
        batches.push(crate::support::seen(&batch));
    }
    (batches, targets, plain)
}

/// The row of the heavier and of the lighter share of a target, with the weight of sample `own`.
fn shares(target: &[f32], own: i64) -> (f32, Option<usize>) {
    let partner = target.iter().enumerate().position(|(class, &share)| share > 0.0 && class as i64 != own);
    (target[own as usize], partner)
}

#[test]
fn mixup_weights_images_and_labels_alike() {
    let (mixed, targets, plain) = mixed(&["mixup:0.8"], 2);
    let mut partners = 0;
    for ((mixed, targets), plain) in mixed.iter().zip(&targets).zip(&plain) {
        let weights: Vec<f32> = targets.iter().zip(&plain.1).map(|(t, &own)| shares(t, own).0).filter(|w| *w < 1.0).collect();
        assert!(weights.iter().all(|w| (w - weights[0]).abs() < 1e-6), "one weight a batch");
        for (row, (target, &own)) in targets.iter().zip(&plain.1).enumerate() {
            assert!((target.iter().sum::<f32>() - 1.0).abs() < 1e-6);
            let (weight, partner) = shares(target, own);
            let from = partner.map_or(row, |p| plain.1.iter().position(|&l| l == p as i64).unwrap());
            partners += usize::from(partner.is_some());
            for view in 0..2 {
                for i in 0..60 {
                    let (a, b) = (plain.0[view][row * 60 + i], plain.0[view][from * 60 + i]);
                    assert!((mixed.0[view][row * 60 + i] - (weight * a + (1.0 - weight) * b)).abs() < 1e-5);
                }
            }
            let heavier = if weight >= 0.5 { own } else { partner.unwrap() as i64 };
            assert_eq!(mixed.1[row], heavier);
        }
        assert_eq!(mixed.2, plain.2);
    }
    assert!(partners > 10);
}

#[test]
fn cutmix_weights_labels_by_area() {
    let (mixed, targets, plain) = mixed(&["cutmix:1"], 1);
    let mut cut = 0;
    for ((mixed, targets), plain) in mixed.iter().zip(&targets).zip(&plain) {
        for (row, (target, &own)) in targets.iter().zip(&plain.1).enumerate() {
            let (weight, partner) = shares(target, own);
            let from = partner.map_or(row, |p| plain.1.iter().position(|&l| l == p as i64).unwrap());
            let foreign: Vec<usize> = (0..60).filter(|i| mixed.0[0][row * 60 + i] != plain.0[0][row * 60 + i]).collect();
            assert!(foreign.iter().all(|i| mixed.0[0][row * 60 + i] == plain.0[0][from * 60 + i]));
            // Two pixels of random images may be equal by chance.
            assert!((foreign.len() as f32 / 60.0 - (1.0 - weight)).abs() < 0.07, "{} {weight}", foreign.len());
            cut += usize::from(!foreign.is_empty());
        }
    }
    assert!(cut > 5);
}

#[test]
fn mixtures_do_not_depend_on_threads_and_vary_by_batch() {
    let both = ["mixup:0.8", "cutmix:1"];
    let (one, four) = (mixed(&both, 1), mixed(&both, 4));
    assert!(one.0 == four.0 && one.1 == four.1);
    let data = random_set(400, [1, 4, 4], 400);
    let options = LoaderOptions { augment: vec![Pipeline::parse(&both).unwrap()], ..options(8, 1) };
    let kinds = epoch(&mut Loader::train(&data, &options).unwrap(), 0, 0);
    let plain = epoch(&mut Loader::train(&data, &LoaderOptions { augment: vec![], ..options.clone() }).unwrap(), 0, 0);
    // cutmix leaves every pixel one of the batch's, mixup makes new ones.
    let cut = kinds.iter().zip(&plain).filter(|(k, p)| k.0[0].iter().all(|v| p.0[0].contains(v))).count();
    assert!((10..40).contains(&cut), "{cut} of 50");
    assert!(epoch(&mut Loader::train(&data, &options).unwrap(), 0, 30) == kinds[30..]);
    let mut eval = Loader::eval(&data, &options).unwrap();
    eval.start(0, 0).unwrap();
    assert!(eval.next_batch().unwrap().unwrap().targets.is_none());
}

#[test]
fn nonsense_is_refused() {
    let data = random_set(20, [3, 4, 4], 2);
    let refused = |options: LoaderOptions| refusal(Loader::train(&data, &options).map(|_| ()));
    assert!(refused(options(0, 1)).contains("batch_size = 0"));
    assert!(refused(LoaderOptions { views: 0, ..options(4, 1) }).contains("views = 0"));
    assert!(refused(LoaderOptions { prefetch: 0, ..options(4, 1) }).contains("prefetch = 0"));
    assert!(refused(LoaderOptions { drop_last: true, ..options(21, 1) }).contains("batch_size = 21"));
    assert!(refused(LoaderOptions { dtype: DType::U8, ..options(4, 1) }).contains("f32 or f64"));
    let one_channel = Some(Normalise::new(&[0.5], &[0.5]));
    assert!(refused(LoaderOptions { normalise: one_channel, ..options(4, 1) }).contains("3 numbers, one a channel"));
    let zero = Some(Normalise::new(&[0.5; 3], &[0.5, 0.0, 0.5]));
    assert!(refused(LoaderOptions { normalise: zero, ..options(4, 1) }).contains("3 positive numbers"));
    let wide = vec![Pipeline::parse(&["pad-crop:4"]).unwrap()];
    assert!(refused(LoaderOptions { augment: wide, ..options(4, 1) }).contains("4x4"));
    assert!(refusal(Loader::eval(&data.subset(&[]), &options(4, 1)).map(|_| ())).contains("0 samples"));

    let mut loader = Loader::eval(&data, &LoaderOptions { device: Device::Cpu, ..options(4, 1) }).unwrap();
    assert!(refusal(loader.next_batch()).contains("before an epoch was started"));
    assert!(refusal(loader.start(0, 6)).contains("which has 5 batches"));
}
