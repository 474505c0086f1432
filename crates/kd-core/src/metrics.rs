//! Accuracy, calibration, running means.

use serde::Serialize;

/// How many classes rank before `label` in one row of logits: larger logits, and equal ones of a lower class.
/// A NaN anywhere in the row ranks the label last.
pub fn rank(logits: &[f32], label: usize) -> usize {
    let Some(&own) = logits.get(label) else { return logits.len() };
    if logits.iter().any(|v| v.is_nan()) {
        return logits.len();
    }
    logits.iter().enumerate().filter(|&(k, &v)| v > own || (v == own && k < label)).count()
}

/// Counts over an evaluation.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Accuracy {
    /// Samples whose label ranks first.
    pub top1: usize,
    /// Samples whose label is among the first five.
    pub top5: usize,
    /// Samples seen.
    pub total: usize,
}

impl Accuracy {
    /// Counts one batch: `logits` row-major `[B,K]`.
    pub fn add(&mut self, logits: &[f32], classes: usize, labels: &[i64]) {
        for (row, &label) in logits.chunks_exact(classes).zip(labels) {
            let r = usize::try_from(label).map_or(classes, |y| rank(row, y));
            self.top1 += usize::from(r < 1);
            self.top5 += usize::from(r < 5);
            self.total += 1;
        }
    }

    /// Top-1 in percent.
    pub fn top1_percent(&self) -> f64 {
        percent(self.top1, self.total)
    }

    /// Top-5 in percent.
    pub fn top5_percent(&self) -> f64 {
        percent(self.top5, self.total)
    }
}

fn percent(part: usize, total: usize) -> f64 {
    if total == 0 { 0.0 } else { 100.0 * part as f64 / total as f64 }
}

/// Mean of values that arrive one by one, each with a weight.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mean {
    sum: f64,
    weight: f64,
}

impl Mean {
    /// Adds `value`, counted `weight` times.
    pub fn add(&mut self, value: f64, weight: f64) {
        self.sum += value * weight;
        self.weight += weight;
    }

    /// The mean so far; NaN before the first value.
    pub fn get(&self) -> f64 {
        self.sum / self.weight
    }
}

/// The samples of one range of confidence.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Bin {
    /// Lower end of the range.
    pub from: f64,
    /// Upper end.
    pub to: f64,
    /// Samples in it.
    pub n: usize,
    /// Share of them that are right; 0 without any.
    pub accuracy: f64,
    /// Their mean confidence; 0 without any.
    pub confidence: f64,
}

/// Expected calibration error over equally wide bins of confidence: `sum_bins n_b/N |accuracy_b - confidence_b|`
/// (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. 3).
#[derive(Clone, Debug)]
pub struct Calibration {
    bins: Vec<(usize, usize, f64)>, // samples, correct, sum of confidences
}

impl Calibration {
    /// With `bins` bins (15 is customary).
    pub fn new(bins: usize) -> Self {
        Self { bins: vec![(0, 0, 0.0); bins.max(1)] }
    }

    /// Counts one batch: `logits` row-major `[B,K]`.
    pub fn add(&mut self, logits: &[f32], classes: usize, labels: &[i64]) {
        for (row, &label) in logits.chunks_exact(classes).zip(labels) {
            let (mut best, mut max) = (0, f32::NEG_INFINITY);
            for (k, &v) in row.iter().enumerate() {
                if v > max {
                    (best, max) = (k, v);
                }
            }
            let sum: f64 = row.iter().map(|&v| f64::from(v - max).exp()).sum();
            let confidence = 1.0 / sum;
            if !confidence.is_finite() {
                continue;
            }
            let n = self.bins.len();
            let bin = &mut self.bins[((confidence * n as f64) as usize).min(n - 1)];
            bin.0 += 1;
            bin.1 += usize::from(best as i64 == label);
            bin.2 += confidence;
        }
    }

    /// The bins of a reliability diagram, from the least confident to the most.
    pub fn bins(&self) -> Vec<Bin> {
        let n = self.bins.len() as f64;
        let over = |sum: f64, n: usize| if n == 0 { 0.0 } else { sum / n as f64 };
        let bin = |(i, &(samples, correct, confidence)): (usize, &(usize, usize, f64))| Bin {
            from: i as f64 / n,
            to: (i + 1) as f64 / n,
            n: samples,
            accuracy: over(correct as f64, samples),
            confidence: over(confidence, samples),
        };
        self.bins.iter().enumerate().map(bin).collect()
    }

    /// The error, in `[0, 1]`.
    pub fn error(&self) -> f64 {
        let total: usize = self.bins.iter().map(|b| b.0).sum();
        let gap: f64 = self.bins.iter().map(|&(_, correct, conf)| (correct as f64 - conf).abs()).sum();
        if total == 0 { 0.0 } else { gap / total as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_lower_class_and_nan_is_wrong() {
        assert_eq!(rank(&[1.0, 1.0, 0.0], 0), 0);
        assert_eq!(rank(&[1.0, 1.0, 0.0], 1), 1);
        assert_eq!(rank(&[f32::NAN, 1.0], 1), 2);
        let mut a = Accuracy::default();
        a.add(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0], 6, &[0, 0]);
        assert_eq!(a, Accuracy { top1: 1, top5: 1, total: 2 });
    }

    #[test]
    fn sure_and_right_is_calibrated() {
        let mut c = Calibration::new(15);
        c.add(&[50.0, 0.0, 0.0, 50.0], 2, &[0, 1]);
        assert!(c.error() < 1e-9);
        let mut c = Calibration::new(15);
        c.add(&[50.0, 0.0], 2, &[1]);
        assert!((c.error() - 1.0).abs() < 1e-9);
        // Confidences 2/3 (right) and 3/4 (wrong) in halves of the range.
        let mut c = Calibration::new(2);
        c.add(&[2f32.ln(), 0.0, 3f32.ln(), 0.0], 2, &[0, 1]);
        let bins = c.bins();
        assert_eq!((bins[0].n, bins[0].accuracy, bins[1].n, bins[1].from, bins[1].to), (0, 0.0, 2, 0.5, 1.0));
        assert!((bins[1].confidence - 17.0 / 24.0).abs() < 1e-6 && bins[1].accuracy == 0.5);
    }

    #[test]
    fn mean_weighs() {
        let mut m = Mean::default();
        m.add(1.0, 1.0);
        m.add(4.0, 2.0);
        assert_eq!(m.get(), 3.0);
    }
}
