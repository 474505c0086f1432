//! Which classes go together: the correlation of class logits over a data set, and how it differs between two networks.
//!
//! ```text
//! R_jk = cov(z_j, z_k) / sqrt(var(z_j) var(z_k)),   over the samples;   difference = R(student) - R(teacher)
//! ```
//!
//! The figures of CRD (Tian et al., ICLR 2020, the RepDistiller code) and DKD (Zhao et al., CVPR 2022) show this difference as a heat map: the
//! paler, the better a method passes the teacher's relations between classes on. A logit that never changes correlates with nothing (0).

use candle_core::{DType, Device, Tensor};
use kd_core::Error;
use serde::Serialize;

use crate::Result;
use crate::analysis::sweep::Rows;

/// Collects the logits of one network.
#[derive(Clone, Debug)]
pub struct LogitCorrelation {
    classes: usize,
    n: usize,
    /// Where the sums are taken from: the mean of the first batch, so that large logits cost no digits.
    origin: Vec<f64>,
    sums: Vec<f64>,
    products: Vec<f64>,
}

/// How far two correlation matrices are apart.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CorrelationDifference {
    /// Mean of `|difference|` over all pairs of different classes.
    pub mean: f64,
    /// The largest `|difference|`.
    pub max: f64,
    /// The pair of classes that has it.
    pub pair: [usize; 2],
    /// Student minus teacher, `K` rows of `K`.
    pub matrix: Vec<f64>,
}

impl LogitCorrelation {
    /// Of a network with `classes` outputs.
    pub fn new(classes: usize) -> Self {
        Self { classes, n: 0, origin: vec![], sums: vec![0.0; classes], products: vec![0.0; classes * classes] }
    }

    /// Adds a batch of logits `[B,K]`.
    ///
    /// # Errors
    /// Logits of another width.
    pub fn add(&mut self, logits: &Rows) -> Result<()> {
        let k = self.classes;
        if logits.width != k {
            return Err(Error::shape("logits", format!("[B, {k}]"), &[logits.len(), logits.width]).into());
        }
        if logits.is_empty() {
            return Ok(());
        }
        if self.origin.is_empty() {
            let n = logits.len() as f64;
            self.origin = (0..k).map(|j| logits.iter().map(|row| row[j]).sum::<f64>() / n).collect();
        }
        let moved: Vec<f64> = logits.iter().flat_map(|row| row.iter().zip(&self.origin).map(|(v, o)| v - o)).collect();
        for row in moved.chunks_exact(k) {
            self.sums.iter_mut().zip(row).for_each(|(s, v)| *s += v);
        }
        let x = Tensor::from_vec(moved, (logits.len(), k), &Device::Cpu)?;
        let products = x.t()?.matmul(&x)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        self.products.iter_mut().zip(products).for_each(|(sum, p)| *sum += p);
        self.n += logits.len();
        Ok(())
    }

    /// `R`, `K` rows of `K`.
    pub fn matrix(&self) -> Vec<f64> {
        let (k, n) = (self.classes, self.n.max(1) as f64);
        let covariance = |i: usize, j: usize| self.products[i * k + j] / n - self.sums[i] * self.sums[j] / (n * n);
        let deviations: Vec<f64> = (0..k).map(|i| covariance(i, i).max(0.0).sqrt()).collect();
        let entry = |i: usize, j: usize| match deviations[i] * deviations[j] {
            _ if i == j => 1.0,
            0.0 => 0.0,
            scale => (covariance(i, j) / scale).clamp(-1.0, 1.0),
        };
        (0..k * k).map(|at| entry(at / k, at % k)).collect()
    }

    /// This network as the student of `teacher`.
    ///
    /// # Errors
    /// Different numbers of classes.
    pub fn difference(&self, teacher: &Self) -> Result<CorrelationDifference> {
        let k = self.classes;
        if teacher.classes != k {
            return Err(Error::refused(format!("correlations of {k} and of {} classes cannot be compared", teacher.classes)).into());
        }
        let matrix: Vec<f64> = self.matrix().iter().zip(teacher.matrix()).map(|(s, t)| s - t).collect();
        let pairs = (k * k).saturating_sub(k).max(1) as f64;
        let at = (0..k * k).fold(0, |best, i| if matrix[i].abs() > matrix[best].abs() { i } else { best });
        Ok(CorrelationDifference {
            mean: matrix.iter().map(|v| v.abs()).sum::<f64>() / pairs,
            max: matrix.get(at).map_or(0.0, |v| v.abs()),
            pair: [at / k.max(1), at % k.max(1)],
            matrix,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn against_the_definition_in_two_passes() {
        let rng = kd_core::Rng::new(9);
        let (n, k) = (23, 4);
        // Far from 0, one logit falling with another, one constant.
        let row = |i: u64| {
            let a = rng.normal(i);
            [1e6 + a, 1e6 - 2.0 * a, 7.0, rng.normal(1000 + i) + a]
        };
        let rows: Vec<[f64; 4]> = (0..n).map(row).collect();
        let mut c = LogitCorrelation::new(k);
        for part in rows.chunks(10) {
            c.add(&Rows::new(part.concat(), k)).unwrap();
        }
        let r = c.matrix();
        let mean = |j: usize| rows.iter().map(|x| x[j]).sum::<f64>() / n as f64;
        let covariance = |i: usize, j: usize| rows.iter().map(|x| (x[i] - mean(i)) * (x[j] - mean(j))).sum::<f64>();
        let expected = covariance(0, 3) / (covariance(0, 0) * covariance(3, 3)).sqrt();
        assert!((r[3] - expected).abs() < 1e-8, "{} is not {expected}", r[3]);
        assert!((r[1] + 1.0).abs() < 1e-8 && r[2] == 0.0 && r[10] == 1.0);
        assert!((0..k * k).all(|at| r[at] == r[at % k * k + at / k]), "not symmetric");
    }

    #[test]
    fn the_difference_names_its_worst_pair() {
        let mut teacher = LogitCorrelation::new(2);
        teacher.add(&Rows::new(vec![1.0, 1.0, 2.0, 2.0], 2)).unwrap();
        let mut student = LogitCorrelation::new(2);
        student.add(&Rows::new(vec![1.0, 2.0, 2.0, 1.0], 2)).unwrap();
        let d = student.difference(&teacher).unwrap();
        assert!((d.mean - 2.0).abs() < 1e-12 && (d.max - 2.0).abs() < 1e-12, "{d:?}");
        assert_eq!(d.pair, [0, 1]);
        assert_eq!(student.difference(&student).unwrap().max, 0.0);
        assert!(student.difference(&LogitCorrelation::new(3)).is_err());
    }
}
