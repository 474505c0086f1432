//! Numbers about numbers: summaries, the area under a ROC curve.

use serde::Serialize;

/// Count, mean, deviation and range of some values.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// How many there are.
    pub n: usize,
    /// Their mean.
    pub mean: f64,
    /// Their standard deviation, of the values themselves (divided by `n`).
    pub sd: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Summary {
    /// Of `values`; `None` when there is none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let (mut n, mut mean, mut squares) = (0usize, 0.0, 0.0);
        let (mut min, mut max) = (f64::INFINITY, f64::NEG_INFINITY);
        for v in values {
            // Welford's update keeps its digits where the mean is large beside the deviation.
            n += 1;
            let step = v - mean;
            mean += step / n as f64;
            squares += step * (v - mean);
            (min, max) = (f64::min(min, v), f64::max(max, v));
        }
        (n > 0).then(|| Self { n, mean, sd: (squares / n as f64).sqrt(), min, max })
    }

    /// Of `values` by class: one entry for each of `classes` classes, `None` where a class has no value.
    pub fn by_class(classes: usize, values: impl IntoIterator<Item = (usize, f64)>) -> Vec<Option<Self>> {
        let mut lists = vec![vec![]; classes];
        for (class, value) in values {
            lists[class].push(value);
        }
        lists.into_iter().map(Self::of).collect()
    }
}

/// Area under the ROC curve of a score that should be larger for `positive` than for `negative` samples: the probability that a random
/// positive scores above a random negative, ties counting half (Mann-Whitney). 0.5 says nothing, 1 separates; `None` when a side is empty.
pub fn auc(positive: &[f64], negative: &[f64]) -> Option<f64> {
    if positive.is_empty() || negative.is_empty() {
        return None;
    }
    let mut all: Vec<(f64, bool)> = positive.iter().map(|&v| (v, true)).chain(negative.iter().map(|&v| (v, false))).collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut below, mut won, mut at) = (0usize, 0.0, 0);
    while at < all.len() {
        let end = at + all[at..].iter().take_while(|v| v.0 == all[at].0).count();
        let positives = all[at..end].iter().filter(|v| v.1).count();
        let negatives = end - at - positives;
        won += positives as f64 * (below as f64 + 0.5 * negatives as f64);
        below += negatives;
        at = end;
    }
    Some(won / (positive.len() as f64 * negative.len() as f64))
}

/// A histogram: the share of `values` in each of `bins` equally wide bins from `low` to `high`. What lies outside counts in the nearest bin.
pub fn histogram(values: &[f64], low: f64, high: f64, bins: usize) -> Vec<f64> {
    let mut shares = vec![0.0; bins.max(1)];
    let last = shares.len() - 1;
    for v in values {
        // A cast of a negative number or NaN is 0.
        let bin = ((v - low) / (high - low) * bins as f64) as usize;
        shares[bin.min(last)] += 1.0 / values.len() as f64;
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_counts_everything_once() {
        assert_eq!(histogram(&[-1.0, 0.0, 0.4, 0.5, 0.9, 1.0, 7.0, 0.99], 0.0, 1.0, 2), [0.375, 0.625]);
        assert_eq!(histogram(&[], 0.0, 1.0, 2), [0.0, 0.0]);
    }

    #[test]
    fn a_summary_of_known_numbers() {
        let s = Summary::of([1e9 + 2.0, 1e9 + 4.0, 1e9 + 4.0, 1e9 + 4.0, 1e9 + 5.0, 1e9 + 5.0, 1e9 + 7.0, 1e9 + 9.0]).unwrap();
        assert_eq!((s.n, s.mean, s.min, s.max), (8, 1e9 + 5.0, 1e9 + 2.0, 1e9 + 9.0));
        assert!((s.sd - 2.0).abs() < 1e-6, "{}", s.sd);
        assert_eq!(Summary::of([]), None);
        assert_eq!(Summary::by_class(2, [(1, 3.0)]), [None, Some(Summary { n: 1, mean: 3.0, sd: 0.0, min: 3.0, max: 3.0 })]);
    }

    #[test]
    fn auc_counts_pairs() {
        // Of the six pairs three are won, one is tied.
        assert_eq!(auc(&[3.0, 1.0], &[2.0, 1.0, 4.0]), Some((2.0 + 0.5) / 6.0));
        assert_eq!(auc(&[1.0, 2.0], &[0.0]), Some(1.0));
        assert_eq!(auc(&[0.0], &[1.0, 2.0]), Some(0.0));
        assert_eq!(auc(&[5.0, 5.0], &[5.0]), Some(0.5));
        assert_eq!(auc(&[], &[1.0]), None);
        // Against counting pairs one by one.
        let rng = kd_core::Rng::new(3);
        let draw = |from: u64, n: u64| (from..from + n).map(|i| rng.below(i, 9) as f64).collect::<Vec<_>>();
        let (p, q) = (draw(0, 37), draw(100, 53));
        let pair = |a: f64, b: f64| if a > b { 1.0 } else { f64::from(a == b) / 2.0 };
        let slow: f64 = p.iter().flat_map(|&a| q.iter().map(move |&b| pair(a, b))).sum::<f64>() / (37.0 * 53.0);
        assert!((auc(&p, &q).unwrap() - slow).abs() < 1e-12);
    }
}
