//! What a trained network, or a student beside its teacher, shows about itself.
//!
//! Each file is one analysis: an accumulator that takes batches as [`sweep`](fn@sweep) hands them over and ends in a report that serialises. None trains
//! anything; every number is computed in f64 from the networks' outputs in eval mode.
//!
//! | module | question | claim of |
//! |---|---|---|
//! | [`norms`] | how long embeddings are, of which class, right or wrong, clean or noisy | FNKD |
//! | [`directions`] | how far an embedding's length and direction are from its class mean | KD++ |
//! | [`decompose`] | KD as a target part and a rest, and the unequal sums of the rest | NKD |
//! | [`agreement`] | where student and teacher agree, and how sure they are | |
//! | [`correlation`] | which classes go together for one network and not for the other | CRD and DKD's figures |
//! | [`cka`] | how similar the stages of two networks are | Kornblith et al. |
//!
//! ```
//! use kd_train::analysis::{FeatureNorms, Rows};
//! let mut norms = FeatureNorms::default();
//! let embedding = Rows::new(vec![3.0, 4.0, 0.0, 1.0], 2);
//! let logits = Rows::new(vec![2.0, 0.0, 1.0, 0.0], 2);
//! norms.add(&embedding, &logits, &[0, 1])?; // the first is right, the second wrong
//! let report = norms.report(2);
//! assert_eq!([report.all.mean, report.correct.unwrap().mean, report.wrong.unwrap().mean], [3.0, 5.0, 1.0]);
//! # Ok::<(), kd_train::Error>(())
//! ```

pub mod agreement;
pub mod cka;
pub mod correlation;
pub mod decompose;
pub mod directions;
pub mod norms;
pub mod stats;
pub mod sweep;

pub use agreement::{Agreement, AgreementReport};
pub use cka::{Cka, Estimator};
pub use correlation::{CorrelationDifference, LogitCorrelation};
pub use decompose::{Decompose, DecomposeReport};
pub use directions::{DirectionReport, Directions};
pub use norms::{FeatureNorms, NoiseReport, NormReport};
pub use stats::{Summary, auc, histogram};
pub use sweep::{Rows, Seen, Side, sweep};

use kd_core::Error;

use crate::Result;

/// The label of each row as an index below `classes`.
fn classes_of(labels: &[i64], classes: usize) -> Result<Vec<usize>> {
    let index = |(position, &label): (usize, &i64)| match usize::try_from(label) {
        Ok(y) if y < classes => Ok(y),
        _ => Err(Error::Label { label, position, classes }.into()),
    };
    labels.iter().enumerate().map(index).collect()
}

/// Refuses rows that are not one for each label.
fn check_rows(what: &str, rows: &Rows, labels: usize) -> Result<()> {
    if rows.len() != labels {
        return Err(Error::shape(what, format!("[{labels}, {}]", rows.width), &[rows.len(), rows.width]).into());
    }
    Ok(())
}

/// Where a row is largest, the first of equals.
fn argmax(row: &[f64]) -> usize {
    (1..row.len()).fold(0, |best, k| if row[k] > row[best] { k } else { best })
}

/// `log sum exp` of the values, minus infinity for none.
fn log_sum_exp(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let max = values.clone().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY { max } else { max + values.map(|v| (v - max).exp()).sum::<f64>().ln() }
}

fn length(row: &[f64]) -> f64 {
    row.iter().map(|v| v * v).sum::<f64>().sqrt()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}
