//! KD taken apart as NKD does it.
//!
//! ```text
//! q = softmax(v/T), p = softmax(z/T),   KD = -sum_k q_k log p_k = target + rest
//! target = -q_y log p_y                                 cross-entropy of the label, weighted by the teacher
//! rest   = -sum_{k!=y} q_k log p_k = (1-q_y) [ H(q^, p^) - log(1-p_y) ],   x^_k = x_k / (1-x_y)
//! ```
//!
//! Yang et al. (arXiv 2208.10139 and 2303.13005) see KD as a cross-entropy of the label plus an extra term of the same form, the rest, and point
//! at what keeps the student from matching it: the non-target probabilities of teacher and student have unequal sums, `1-q_y` and `1-p_y`, so
//! no student can have the same ones while it disagrees on the label. NKD therefore normalises both and takes `H(q^, p^)`, the shape of the rest
//! alone. The last line above splits what KD has instead: the shape, weighted by `1-q_y` (little, where the teacher is sure), and a
//! pull on the student's own sum. All terms are per sample, in nats, without the factor `T^2`; KD is its cross-entropy form, of which
//! `kl` is what a student can still gain.

use kd_core::Error;
use serde::Serialize;

use crate::Result;
use crate::analysis::stats::Summary;
use crate::analysis::sweep::Rows;
use crate::analysis::{check_rows, classes_of, log_sum_exp};

/// Collects batches.
#[derive(Clone, Debug)]
pub struct Decompose {
    temperature: f64,
    samples: Vec<Sample>,
}

/// One sample; see the [module](self).
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Sample {
    /// Its label.
    pub label: usize,
    /// `KD`.
    pub kd: f64,
    /// `KL(q || p)`.
    pub kl: f64,
    /// `target`.
    pub target: f64,
    /// `rest`.
    pub rest: f64,
    /// `(1-q_y) H(q^, p^)`, the part of the rest that its shape makes.
    pub rest_shape: f64,
    /// `-(1-q_y) log(1-p_y)`, the part that the student's sum makes.
    pub rest_sum: f64,
    /// `H(q^, p^)`, NKD's non-target term at this temperature.
    pub normalised: f64,
    /// `KL(q^ || p^)`, what a student can still gain of it.
    pub normalised_kl: f64,
    /// `1-q_y`.
    pub teacher_sum: f64,
    /// `1-p_y`.
    pub student_sum: f64,
}

/// Means over some samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Parts {
    /// How many there are.
    pub n: usize,
    /// Mean of `KD`.
    pub kd: f64,
    /// Mean of `KL(q || p)`.
    pub kl: f64,
    /// Mean of the target part.
    pub target: f64,
    /// Mean of the rest.
    pub rest: f64,
    /// Mean of the rest's part that its shape makes.
    pub rest_shape: f64,
    /// Mean of the part that the student's sum makes.
    pub rest_sum: f64,
    /// Mean of `H(q^, p^)`.
    pub normalised: f64,
    /// Mean of `KL(q^ || p^)`.
    pub normalised_kl: f64,
    /// Mean of the teacher's non-target probabilities' sum.
    pub teacher_sum: f64,
    /// Mean of the student's.
    pub student_sum: f64,
    /// Mean of the distance between the two.
    pub sum_gap: f64,
    /// Share, in `[0, 1]`, of samples whose student's sum is larger.
    pub student_larger: f64,
}

/// The decomposition over a data set.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DecomposeReport {
    /// Over all samples.
    pub all: Parts,
    /// By label; `None` for a class without a sample.
    pub classes: Vec<Option<Parts>>,
}

impl Decompose {
    /// At `temperature`.
    ///
    /// # Errors
    /// A temperature that is not above 0.
    pub fn new(temperature: f64) -> Result<Self> {
        if !(temperature.is_finite() && temperature > 0.0) {
            return Err(Error::param("temperature", temperature, "more than 0").into());
        }
        Ok(Self { temperature, samples: vec![] })
    }

    /// Adds a batch of logits `[B,K]`.
    ///
    /// # Errors
    /// Logits that differ in shape or have fewer than two classes, a label beyond them.
    pub fn add(&mut self, teacher: &Rows, student: &Rows, labels: &[i64]) -> Result<()> {
        let k = teacher.width;
        check_rows("teacher logits", teacher, labels.len())?;
        check_rows("student logits", student, labels.len())?;
        if student.width != k || k < 2 {
            return Err(Error::shape("student logits", format!("[B, {}]", k.max(2)), &[student.len(), student.width]).into());
        }
        for ((v, z), y) in teacher.iter().zip(student.iter()).zip(classes_of(labels, k)?) {
            self.samples.push(sample(v, z, y, self.temperature));
        }
        Ok(())
    }

    /// The samples, in the order in which they came.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// Means over what was added, of a data set with `classes` classes; `None` when that is nothing.
    pub fn report(&self, classes: usize) -> Option<DecomposeReport> {
        let of_class = |k: usize| parts(self.samples.iter().filter(|s| s.label == k));
        Some(DecomposeReport { all: parts(self.samples.iter())?, classes: (0..classes).map(of_class).collect() })
    }
}

/// Everything from logarithms, so that no sure network divides 0 by 0.
fn sample(v: &[f64], z: &[f64], y: usize, t: f64) -> Sample {
    let logs = |x: &[f64]| -> (Vec<f64>, f64, f64) {
        let scaled = x.iter().map(|a| a / t);
        let all = log_sum_exp(scaled.clone());
        let others = log_sum_exp(scaled.clone().enumerate().filter(|(k, _)| *k != y).map(|(_, a)| a));
        (scaled.collect(), all, others)
    };
    let (v, v_all, v_others) = logs(v);
    let (z, z_all, z_others) = logs(z);
    let over = |term: &dyn Fn(usize) -> f64| (0..v.len()).filter(|k| *k != y).map(term).sum::<f64>();
    let q = |k: usize| (v[k] - v_all).exp();
    let hat = |k: usize| (v[k] - v_others).exp();
    let teacher_sum = (v_others - v_all).exp();
    let target = -q(y) * (z[y] - z_all);
    let rest = over(&|k| -q(k) * (z[k] - z_all));
    let normalised = over(&|k| -hat(k) * (z[k] - z_others));
    Sample {
        label: y,
        kd: target + rest,
        kl: q(y) * ((v[y] - v_all) - (z[y] - z_all)) + over(&|k| q(k) * ((v[k] - v_all) - (z[k] - z_all))),
        target,
        rest,
        rest_shape: teacher_sum * normalised,
        rest_sum: -teacher_sum * (z_others - z_all),
        normalised,
        normalised_kl: over(&|k| hat(k) * ((v[k] - v_others) - (z[k] - z_others))),
        teacher_sum,
        student_sum: (z_others - z_all).exp(),
    }
}

fn parts<'a>(samples: impl Iterator<Item = &'a Sample> + Clone) -> Option<Parts> {
    let n = samples.clone().count();
    let mean = |value: fn(&Sample) -> f64| Summary::of(samples.clone().map(value)).map_or(f64::NAN, |s| s.mean);
    (n > 0).then(|| Parts {
        n,
        kd: mean(|s| s.kd),
        kl: mean(|s| s.kl),
        target: mean(|s| s.target),
        rest: mean(|s| s.rest),
        rest_shape: mean(|s| s.rest_shape),
        rest_sum: mean(|s| s.rest_sum),
        normalised: mean(|s| s.normalised),
        normalised_kl: mean(|s| s.normalised_kl),
        teacher_sum: mean(|s| s.teacher_sum),
        student_sum: mean(|s| s.student_sum),
        sum_gap: mean(|s| (s.teacher_sum - s.student_sum).abs()),
        student_larger: mean(|s| f64::from(s.student_sum > s.teacher_sum)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-12, "{a} is not {b}");
    }

    #[test]
    fn by_hand() {
        // Teacher 1/2 1/4 1/4, student 1/4 1/2 1/4, label 0.
        let log = |p: [f64; 3]| Rows::new(p.map(f64::ln).to_vec(), 3);
        let mut d = Decompose::new(1.0).unwrap();
        d.add(&log([0.5, 0.25, 0.25]), &log([0.25, 0.5, 0.25]), &[0]).unwrap();
        let s = d.samples()[0];
        let ln2 = 2f64.ln();
        close(s.target, 0.5 * 2.0 * ln2);
        close(s.rest, 0.25 * ln2 + 0.25 * 2.0 * ln2);
        close(s.kd, 1.75 * ln2);
        close(s.kl, 1.75 * ln2 - 1.5 * ln2);
        close(s.teacher_sum, 0.5);
        close(s.student_sum, 0.75);
        // Normalised: 1/2 1/2 against 2/3 1/3.
        close(s.normalised, 0.5 * 1.5f64.ln() + 0.5 * 3f64.ln());
        close(s.normalised_kl, s.normalised - ln2);
        close(s.rest_shape + s.rest_sum, s.rest);
        let all = d.report(3).unwrap();
        close(all.all.sum_gap, 0.25);
        assert_eq!((all.all.student_larger, all.classes[1]), (1.0, None));
    }

    #[test]
    fn the_parts_are_the_whole_at_any_temperature() {
        let rng = kd_core::Rng::new(5);
        let draw = |from: u64| Rows::new((from..from + 40).map(|i| 3.0 * rng.normal(i)).collect(), 8);
        let (v, z) = (draw(0), draw(100));
        for t in [0.5, 1.0, 4.0] {
            let mut d = Decompose::new(t).unwrap();
            d.add(&v, &z, &[0, 7, 3, 3, 1]).unwrap();
            for (s, (v, z)) in d.samples().iter().zip(v.iter().zip(z.iter())) {
                let soft = |x: &[f64]| -> Vec<f64> {
                    let e: Vec<f64> = x.iter().map(|a| (a / t).exp()).collect();
                    e.iter().map(|a| a / e.iter().sum::<f64>()).collect()
                };
                let (q, p) = (soft(v), soft(z));
                close(s.kd, q.iter().zip(&p).map(|(q, p)| -q * p.ln()).sum());
                close(s.kl, q.iter().zip(&p).map(|(q, p)| q * (q / p).ln()).sum());
                close(s.target + s.rest, s.kd);
                close(s.rest_shape + s.rest_sum, s.rest);
                close(s.teacher_sum, 1.0 - q[s.label]);
            }
        }
    }

    #[test]
    fn sure_networks_and_two_classes_stay_finite() {
        let mut d = Decompose::new(1.0).unwrap();
        d.add(&Rows::new(vec![2000.0, 0.0], 2), &Rows::new(vec![0.0, 2000.0], 2), &[0]).unwrap();
        let s = d.samples()[0];
        assert_eq!((s.normalised, s.normalised_kl, s.teacher_sum), (0.0, 0.0, 0.0));
        assert!(s.kd == 2000.0 && s.rest_sum == 0.0 && s.student_sum == 1.0, "{s:?}");
        assert!(Decompose::new(0.0).unwrap_err().to_string().contains("temperature"));
        assert!(d.add(&Rows::new(vec![1.0, 2.0], 2), &Rows::new(vec![1.0; 3], 3), &[0]).is_err());
    }
}
