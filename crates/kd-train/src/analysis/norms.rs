//! The length of embeddings: by class, of right and wrong predictions, of clean and noisy labels.
//!
//! ```text
//! |f_b| = sqrt(sum_d f_bd^2),   f = the input of the classifier, [B,D]
//! ```
//!
//! FNKD (Xu et al., "Feature Normalized Knowledge Distillation for Image Classification", ECCV 2020) divides by `|f|` in place of a
//! temperature, since it finds short embeddings where images are hard to tell: its figure 3 shows the images of the smallest and the largest
//! norms. If that is so, the norm of a wrong prediction is smaller than that of a right one, and a network that was trained on labels of which
//! some are noise gives these samples a smaller norm. Both are measured as the area under a ROC curve ([`auc`]), 0.5 saying nothing; beside the
//! norm stands the cross-entropy of the given label, the usual detector of noisy labels, to compare with.

use serde::Serialize;

use crate::Result;
use crate::analysis::stats::{Summary, auc};
use crate::analysis::sweep::Rows;
use crate::analysis::{argmax, check_rows, classes_of, length, log_sum_exp};

/// One sample.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Sample {
    /// Length of its embedding.
    pub norm: f64,
    /// Its label.
    pub label: usize,
    /// What the network takes it for.
    pub predicted: usize,
    /// Cross-entropy of its label.
    pub loss: f64,
}

/// Collects samples.
#[derive(Clone, Debug, Default)]
pub struct FeatureNorms {
    samples: Vec<Sample>,
}

/// Norms over a data set.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NormReport {
    /// Of all samples.
    pub all: Summary,
    /// Of those whose label is predicted.
    pub correct: Option<Summary>,
    /// Of the others.
    pub wrong: Option<Summary>,
    /// Probability that a wrong prediction has a smaller norm than a right one.
    pub auc_wrong: Option<f64>,
    /// By label; `None` for a class without a sample.
    pub classes: Vec<Option<Summary>>,
}

/// Norms and label noise.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NoiseReport {
    /// Of samples with a replaced label.
    pub noisy: Option<Summary>,
    /// Of the others.
    pub clean: Option<Summary>,
    /// Probability that a noisy sample has a smaller norm than a clean one.
    pub auc_norm: Option<f64>,
    /// Probability that a noisy sample has a larger cross-entropy than a clean one.
    pub auc_loss: Option<f64>,
}

impl FeatureNorms {
    /// Adds a batch: `embedding` `[B,D]`, `logits` `[B,K]`, labels.
    ///
    /// # Errors
    /// Rows that do not fit each other, a label beyond the logits.
    pub fn add(&mut self, embedding: &Rows, logits: &Rows, labels: &[i64]) -> Result<()> {
        check_rows("embedding", embedding, labels.len())?;
        check_rows("logits", logits, labels.len())?;
        let labels = classes_of(labels, logits.width)?;
        for ((f, z), label) in embedding.iter().zip(logits.iter()).zip(labels) {
            let loss = log_sum_exp(z.iter().copied()) - z[label];
            self.samples.push(Sample { norm: length(f), label, predicted: argmax(z), loss });
        }
        Ok(())
    }

    /// The samples, in the order in which they came.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// The norms of the samples that `keep` accepts.
    fn norms(&self, keep: impl Fn(&Sample) -> bool) -> Vec<f64> {
        self.samples.iter().filter(|s| keep(s)).map(|s| s.norm).collect()
    }

    /// Summaries over what was added, of a data set with `classes` classes.
    ///
    /// # Panics
    /// When nothing was added, or a label is no class.
    pub fn report(&self, classes: usize) -> NormReport {
        let (correct, wrong) = (self.norms(|s| s.label == s.predicted), self.norms(|s| s.label != s.predicted));
        NormReport {
            all: Summary::of(self.norms(|_| true)).expect("invariant: a sweep has a sample"),
            auc_wrong: auc(&negated(&wrong), &negated(&correct)),
            correct: Summary::of(correct),
            wrong: Summary::of(wrong),
            classes: Summary::by_class(classes, self.samples.iter().map(|s| (s.label, s.norm))),
        }
    }

    /// The norm of samples whose label is not the one that the source gives them (`given`, in the order of the samples).
    pub fn noise(&self, given: &[u32]) -> NoiseReport {
        let (noisy, clean): (Vec<_>, Vec<_>) = self.samples.iter().zip(given).partition(|(s, g)| s.label != **g as usize);
        let norms = |of: &[(&Sample, &u32)]| of.iter().map(|(s, _)| s.norm).collect::<Vec<_>>();
        let losses = |of: &[(&Sample, &u32)]| of.iter().map(|(s, _)| s.loss).collect::<Vec<_>>();
        NoiseReport {
            auc_norm: auc(&negated(&norms(&noisy)), &negated(&norms(&clean))),
            auc_loss: auc(&losses(&noisy), &losses(&clean)),
            noisy: Summary::of(norms(&noisy)),
            clean: Summary::of(norms(&clean)),
        }
    }

    /// The positions of the `n` samples with the smallest norm, ascending, and of the `n` with the largest, descending, among those that
    /// `keep` accepts; of equal norms the earlier first.
    pub fn extremes(&self, n: usize, keep: impl Fn(&Sample) -> bool) -> [Vec<usize>; 2] {
        let mut order: Vec<usize> = (0..self.samples.len()).filter(|&i| keep(&self.samples[i])).collect();
        let norm = |i: &usize| self.samples[*i].norm;
        order.sort_by(|a, b| norm(a).total_cmp(&norm(b)));
        let smallest = order.iter().copied().take(n).collect();
        order.sort_by(|a, b| norm(b).total_cmp(&norm(a)).then(a.cmp(b)));
        order.truncate(n);
        [smallest, order]
    }
}

fn negated(values: &[f64]) -> Vec<f64> {
    values.iter().map(|v| -v).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Norms 5, 1, 2, 13; predictions 0, 0, 1, 1.
    fn four() -> FeatureNorms {
        let mut norms = FeatureNorms::default();
        norms.add(&Rows::new(vec![3.0, 4.0, 0.0, -1.0], 2), &Rows::new(vec![1.0, 0.0, 2.0, 0.0], 2), &[0, 1]).unwrap();
        norms.add(&Rows::new(vec![2.0, 0.0, 5.0, 12.0], 2), &Rows::new(vec![0.0, 1.0, 0.0, 3.0], 2), &[1, 1]).unwrap();
        norms
    }

    #[test]
    fn by_hand() {
        let r = four().report(3);
        assert_eq!((r.all.n, r.all.mean, r.all.min, r.all.max), (4, 5.25, 1.0, 13.0));
        assert!((r.correct.unwrap().mean - 20.0 / 3.0).abs() < 1e-12);
        assert_eq!((r.wrong.unwrap().n, r.wrong.unwrap().mean), (1, 1.0));
        assert_eq!(r.auc_wrong, Some(1.0));
        assert_eq!(r.classes[0].unwrap().mean, 5.0);
        assert_eq!(r.classes[1].unwrap().max, 13.0);
        assert_eq!(r.classes[2], None);
        let loss = four().samples()[1].loss;
        assert!((loss - (2f64.exp() + 1.0).ln()).abs() < 1e-12, "{loss}");
    }

    #[test]
    fn noise_is_where_the_label_is_not_the_given_one() {
        // The second and third sample are noisy: norms 1 and 2 against 5 and 13.
        let r = four().noise(&[0, 0, 0, 1]);
        assert_eq!((r.noisy.unwrap().mean, r.clean.unwrap().mean, r.auc_norm), (1.5, 9.0, Some(1.0)));
        // Losses: noisy 2.127 and 0.313, clean 0.313 and 0.049. Three pairs won, one tied.
        assert_eq!(r.auc_loss, Some(3.5 / 4.0));
        let none = four().noise(&[0, 1, 1, 1]);
        assert_eq!((none.noisy, none.auc_norm), (None, None));
    }

    #[test]
    fn extremes_by_norm() {
        assert_eq!(four().extremes(2, |_| true), [vec![1, 2], vec![3, 0]]);
        assert_eq!(four().extremes(9, |s| s.label == 1), [vec![1, 2, 3], vec![3, 2, 1]]);
    }

    #[test]
    fn labels_beyond_the_logits_are_refused() {
        let e = FeatureNorms::default().add(&Rows::new(vec![1.0], 1), &Rows::new(vec![1.0, 0.0], 2), &[2]).unwrap_err();
        assert!(e.to_string().contains("label 2"), "{e}");
    }
}
