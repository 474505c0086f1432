//! Where a student agrees with its teacher, and how sure the two are.
//!
//! ```text
//! agreement = share of samples with argmax z = argmax v,   kl = mean_b KL( softmax(v/T) || softmax(z/T) )
//! ECE = sum_bins n_bin / N |accuracy_bin - confidence_bin|
//! ```
//!
//! The expected calibration error and its reliability diagram are Guo et al.'s ("On Calibration of Modern Neural Networks", ICML 2017): samples
//! are put into equally wide bins by the largest probability (temperature 1); a calibrated network is right as often as it is sure. Fidelity to the teacher
//! is not accuracy: a student may be right where its teacher is wrong, which is counted apart.

use kd_core::Error;
use kd_core::metrics::{Bin, Calibration};
use serde::Serialize;

use crate::Result;
use crate::analysis::sweep::Rows;
use crate::analysis::{argmax, check_rows, classes_of, log_sum_exp};

/// Collects batches.
#[derive(Clone, Debug)]
pub struct Agreement {
    temperature: f64,
    counts: Counts,
    kl: f64,
    teacher: Calibration,
    student: Calibration,
}

/// Numbers of samples; the five cases are all there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// All.
    pub total: usize,
    /// Both networks predict the same class, right or wrong.
    pub agree: usize,
    /// Both predict the label.
    pub both_right: usize,
    /// Only the teacher does.
    pub teacher_right: usize,
    /// Only the student does.
    pub student_right: usize,
    /// Both predict the same wrong class.
    pub same_wrong: usize,
    /// Both are wrong, in different ways.
    pub different_wrong: usize,
}

/// How sure a network is and how right.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Confidence {
    /// Share of samples, in `[0, 1]`, whose label is predicted.
    pub accuracy: f64,
    /// Mean of the largest probability.
    pub confidence: f64,
    /// Expected calibration error, in `[0, 1]`.
    pub ece: f64,
    /// The bins of the reliability diagram.
    pub bins: Vec<Bin>,
}

/// Agreement over a data set.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AgreementReport {
    /// The cases.
    pub counts: Counts,
    /// Share of samples, in `[0, 1]`, for which both predict the same class.
    pub agreement: f64,
    /// Mean divergence of the student's distribution from the teacher's, in nats, without the factor `T^2`.
    pub kl: f64,
    /// The teacher.
    pub teacher: Confidence,
    /// The student.
    pub student: Confidence,
}

impl Agreement {
    /// Divergences at `temperature`, diagrams with `bins` bins (15 is customary).
    ///
    /// # Errors
    /// A temperature that is not above 0.
    pub fn new(temperature: f64, bins: usize) -> Result<Self> {
        if !(temperature.is_finite() && temperature > 0.0) {
            return Err(Error::param("temperature", temperature, "more than 0").into());
        }
        let calibration = Calibration::new(bins);
        Ok(Self { temperature, counts: Counts::default(), kl: 0.0, teacher: calibration.clone(), student: calibration })
    }

    /// Adds a batch of logits `[B,K]`.
    ///
    /// # Errors
    /// Logits that differ in shape, a label beyond them.
    pub fn add(&mut self, teacher: &Rows, student: &Rows, labels: &[i64]) -> Result<()> {
        check_rows("teacher logits", teacher, labels.len())?;
        check_rows("student logits", student, labels.len())?;
        if student.width != teacher.width {
            return Err(Error::shape("student logits", format!("[B, {}]", teacher.width), &[student.len(), student.width]).into());
        }
        let c = &mut self.counts;
        for ((v, z), y) in teacher.iter().zip(student.iter()).zip(classes_of(labels, teacher.width)?) {
            let (a, b) = (argmax(v), argmax(z));
            c.total += 1;
            c.agree += usize::from(a == b);
            *match (a == y, b == y) {
                (true, true) => &mut c.both_right,
                (true, false) => &mut c.teacher_right,
                (false, true) => &mut c.student_right,
                (false, false) if a == b => &mut c.same_wrong,
                (false, false) => &mut c.different_wrong,
            } += 1;
            self.kl += kl(v, z, self.temperature);
        }
        for (calibration, rows) in [(&mut self.teacher, teacher), (&mut self.student, student)] {
            let logits: Vec<f32> = rows.values.iter().map(|v| *v as f32).collect();
            calibration.add(&logits, rows.width, labels);
        }
        Ok(())
    }

    /// Shares and means over what was added; `None` when that is nothing.
    pub fn report(&self) -> Option<AgreementReport> {
        let n = self.counts.total as f64;
        (n > 0.0).then(|| AgreementReport {
            counts: self.counts,
            agreement: self.counts.agree as f64 / n,
            kl: self.kl / n,
            teacher: confidence(&self.teacher),
            student: confidence(&self.student),
        })
    }
}

/// Term by term: the difference of two cross-entropies would lose digits.
fn kl(v: &[f64], z: &[f64], t: f64) -> f64 {
    let norm = |x: &[f64]| log_sum_exp(x.iter().map(|a| a / t));
    let (v_all, z_all) = (norm(v), norm(z));
    v.iter().zip(z).map(|(v, z)| (v / t - v_all).exp() * ((v / t - v_all) - (z / t - z_all))).sum()
}

fn confidence(of: &Calibration) -> Confidence {
    let bins = of.bins();
    let n = bins.iter().map(|b| b.n).sum::<usize>().max(1) as f64;
    let weighted = |value: fn(&Bin) -> f64| bins.iter().filter(|b| b.n > 0).map(|b| b.n as f64 * value(b)).sum::<f64>() / n;
    Confidence { accuracy: weighted(|b| b.accuracy), confidence: weighted(|b| b.confidence), ece: of.error(), bins }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_is_counted_once() {
        // Label 0 throughout; predictions (teacher, student): 0 0, 0 1, 1 0, 1 1, 1 2.
        let one_hot = |at: &[usize]| Rows::new(at.iter().flat_map(|&k| (0..3).map(move |j| if j == k { 2.0 } else { 0.0 })).collect(), 3);
        let mut a = Agreement::new(1.0, 15).unwrap();
        a.add(&one_hot(&[0, 0, 1, 1, 1]), &one_hot(&[0, 1, 0, 1, 2]), &[0; 5]).unwrap();
        let r = a.report().unwrap();
        let c = Counts { total: 5, agree: 2, both_right: 1, teacher_right: 1, student_right: 1, same_wrong: 1, different_wrong: 1 };
        assert_eq!(r.counts, c);
        assert!((r.agreement - 0.4).abs() < 1e-12 && (r.teacher.accuracy - 0.4).abs() < 1e-12);
        // Three pairs differ: KL of (e^2, 1, 1) and (1, e^2, 1) is 2 (q_0 - q_1).
        let sum = 2f64.exp() + 2.0;
        assert!((r.kl - 0.6 * 2.0 * (2f64.exp() - 1.0) / sum).abs() < 1e-12, "{}", r.kl);
        // All samples have one confidence, so one bin: ECE is its distance from 0.4.
        let sure = 2f64.exp() / sum;
        assert!((r.teacher.confidence - sure).abs() < 1e-9 && (r.teacher.ece - (sure - 0.4)).abs() < 1e-9);
        assert_eq!(r.teacher.bins.iter().filter(|b| b.n > 0).count(), 1);
    }

    #[test]
    fn a_network_agrees_with_itself() {
        let logits = Rows::new(vec![1.0, -2.0, 0.5, 80.0, -80.0, 0.0], 3);
        let mut a = Agreement::new(4.0, 15).unwrap();
        a.add(&logits, &logits, &[0, 2]).unwrap();
        let r = a.report().unwrap();
        assert_eq!((r.agreement, r.kl), (1.0, 0.0));
        assert!(Agreement::new(f64::NAN, 15).is_err() && Agreement::new(1.0, 15).unwrap().report().is_none());
    }
}
