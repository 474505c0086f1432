//! Which samples a run sees: validation split, class-balanced training subset, label noise.
//!
//! All three are functions of the seed and the record numbers. They apply in this order, so that the validation set depends on nothing but
//! its share and the seed, and holds the source's own labels.

use kd_core::Rng;
use serde::{Deserialize, Serialize};

use crate::{Dataset, Error, Result};

/// What to do with the training set before training.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Size of a class-balanced training subset; 0: all. The classes take turns until it is full (a small class may run out), so that their
    /// counts differ by one at most.
    pub train_limit: usize,
    /// Share of each class of the training set held out for model selection, in `[0, 1)`, rounded; every class keeps a sample.
    pub validation: f64,
    /// Probability, in `[0, 1]`, that a training label is replaced by one of the other classes, all equally likely.
    pub label_noise: f64,
}

pub(crate) fn select(train: &Dataset, options: &Options, seed: u64) -> Result<(Dataset, Option<Dataset>)> {
    if !(0.0..1.0).contains(&options.validation) {
        return Err(Error::option("validation", options.validation, "at least 0 and less than 1"));
    }
    if !(0.0..=1.0).contains(&options.label_noise) {
        return Err(Error::option("label_noise", options.label_noise, "between 0 and 1"));
    }
    let root = Rng::new(seed);
    let (mut train, validation) = match options.validation {
        0.0 => (train.clone(), None),
        share => {
            let (train, held) = split(train, share, root.named("validation"));
            (train, Some(held))
        }
    };
    if validation.as_ref().is_some_and(Dataset::is_empty) {
        return Err(Error::option("validation", options.validation, "larger: it rounds to no sample of any class"));
    }
    if options.train_limit > 0 {
        train = limit(&train, options.train_limit, root.named("train_limit"))?;
    }
    if options.label_noise > 0.0 {
        add_noise(&mut train, options.label_noise, root.named("label_noise"))?;
    }
    Ok((train, validation))
}

/// The samples of each class in a random order that depends on the seed and the records alone.
fn shuffled_classes(set: &Dataset, rng: Rng) -> Vec<Vec<u32>> {
    let mut classes = set.by_class();
    for list in &mut classes {
        list.sort_by_cached_key(|&p| rng.bits(u64::from(set.record(p as usize))));
    }
    classes
}

/// What stays, and the rounded `share` of each class that is taken out; every class keeps a sample.
pub(crate) fn split(set: &Dataset, share: f64, rng: Rng) -> (Dataset, Dataset) {
    let (mut rest, mut held) = (Vec::new(), Vec::new());
    for class in shuffled_classes(set, rng) {
        let n = ((class.len() as f64 * share).round() as usize).min(class.len().saturating_sub(1));
        held.extend(&class[..n]);
        rest.extend(&class[n..]);
    }
    (sorted_subset(set, rest), sorted_subset(set, held))
}

fn limit(set: &Dataset, limit: usize, rng: Rng) -> Result<Dataset> {
    let classes = shuffled_classes(set, rng);
    if limit < classes.len() || limit > set.len() {
        let allowed = format!("0 (all), or from {} (the classes) to {} (the training samples)", classes.len(), set.len());
        return Err(Error::option("train_limit", limit, allowed));
    }
    Ok(in_turns(set, &classes, limit))
}

/// `n` samples: the first of each class's list, then the second of each, and so on.
pub(crate) fn in_turns(set: &Dataset, classes: &[Vec<u32>], n: usize) -> Dataset {
    let longest = classes.iter().map(Vec::len).max().unwrap_or(0);
    let turns = (0..longest).flat_map(|turn| classes.iter().filter_map(move |class| class.get(turn).copied()));
    sorted_subset(set, turns.take(n).collect())
}

fn sorted_subset(set: &Dataset, mut positions: Vec<u32>) -> Dataset {
    positions.sort_unstable();
    set.subset(&positions)
}

fn add_noise(set: &mut Dataset, share: f64, rng: Rng) -> Result<()> {
    let classes = set.classes() as u64;
    if classes < 2 {
        return Err(Error::option("label_noise", share, "0 where there is only one class"));
    }
    let noisy = |(i, &label): (usize, &u32)| {
        let rng = rng.fork(u64::from(set.record(i)));
        if rng.uniform(0) < share { ((u64::from(label) + 1 + rng.below(1, classes - 1)) % classes) as u32 } else { label }
    };
    let labels = set.labels().iter().enumerate().map(noisy).collect();
    set.relabel(labels);
    Ok(())
}
