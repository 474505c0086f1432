//! Linear CKA: how similar the features of two places are, in one network or in two.
//!
//! ```text
//! CKA(X, Y) = HSIC(K, L) / sqrt( HSIC(K, K) HSIC(L, L) ),   K = X X^T, L = Y Y^T,   X [n,p], Y [n,q]: one row a sample
//! plain     HSIC_0 = tr(K H L H),   H = I - 1/n
//! unbiased  HSIC_1 = 1/(n(n-3)) [ tr(K' L') + (1'K'1)(1'L'1) / ((n-1)(n-2)) - 2/(n-2) 1'K'L'1 ],   X' = X without its diagonal
//! ```
//!
//! Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019; the unbiased estimator is Song et al.'s (JMLR 2012), averaged over
//! mini-batches before the quotient as in Nguyen et al., "Do Wide and Deep Networks Learn the Same Things?", ICLR 2021. 1 for equal features,
//! unchanged by rotations of the feature space and by scaling. The plain estimator is biased upwards where a place has more numbers than there are samples
//! (two places that have nothing in common approach 1), and depends on the size of a batch; the unbiased one needs four samples a batch and may be
//! a little below 0.
//!
//! Features are flattened, `[B,C,H,W]` to `[B,C*H*W]`, or averaged over their positions when `pool` is set.

use candle_core::{DType, Device, Tensor};
use kd_core::Error;

use crate::Result;

/// Which HSIC is estimated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Estimator {
    /// `HSIC_1`, averaged over batches, each weighted by its samples; batches of fewer than four are left out.
    Unbiased,
    /// `HSIC_0`; meant for one batch of all samples.
    Plain,
}

/// Collects batches of features of two lists of places.
#[derive(Clone, Debug)]
pub struct Cka {
    estimator: Estimator,
    pool: bool,
    samples: usize,
    left: Vec<f64>,
    right: Vec<f64>,
    cross: Vec<f64>,
}

impl Cka {
    /// With this estimator; `pool` averages features over their positions.
    pub fn new(estimator: Estimator, pool: bool) -> Self {
        Self { estimator, pool, samples: 0, left: vec![], right: vec![], cross: vec![] }
    }

    /// Adds a batch: the features of each place of either list, `[B, ...]`, the same samples throughout and the same places each time.
    ///
    /// # Errors
    /// Features of different numbers of samples; lists of another length than before.
    pub fn add(&mut self, left: &[&Tensor], right: &[&Tensor]) -> Result<()> {
        let n = left.first().map_or(Ok(0), |t| t.dim(0))?;
        if let Some(other) = left.iter().chain(right).find(|t| t.dims().first() != Some(&n)) {
            return Err(Error::shape("features", format!("[{n}, ...]"), other.dims()).into());
        }
        if n < self.least() {
            return Ok(());
        }
        let grams = |of: &[&Tensor]| of.iter().map(|t| self.gram(t)).collect::<Result<Vec<_>>>();
        let (k, l) = (grams(left)?, grams(right)?);
        if self.samples == 0 {
            (self.left, self.right) = (vec![0.0; k.len()], vec![0.0; l.len()]);
            self.cross = vec![0.0; k.len() * l.len()];
        }
        if (k.len(), l.len()) != (self.left.len(), self.right.len()) {
            return Err(Error::refused("CKA: a batch with other places than the one before").into());
        }
        let weight = match self.estimator {
            Estimator::Unbiased => n as f64,
            Estimator::Plain => 1.0,
        };
        for (i, k) in k.iter().enumerate() {
            self.left[i] += weight * self.hsic(k, k, n);
            for (j, l) in l.iter().enumerate() {
                self.cross[i * self.right.len() + j] += weight * self.hsic(k, l, n);
            }
        }
        for (j, l) in l.iter().enumerate() {
            self.right[j] += weight * self.hsic(l, l, n);
        }
        self.samples += n;
        Ok(())
    }

    /// The smallest batch that says anything.
    fn least(&self) -> usize {
        match self.estimator {
            Estimator::Unbiased => 4,
            Estimator::Plain => 2,
        }
    }

    /// Samples that entered.
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// CKA of each left place (rows) with each right one; NaN where one of the two never changes.
    ///
    /// # Errors
    /// No batch was large enough.
    pub fn matrix(&self) -> Result<Vec<Vec<f64>>> {
        if self.samples == 0 {
            return Err(Error::refused(format!("CKA needs batches of at least {} samples", self.least())).into());
        }
        let entry = |i: usize, j: usize| {
            let scale = self.left[i].max(0.0).sqrt() * self.right[j].max(0.0).sqrt();
            if scale > 0.0 { self.cross[i * self.right.len() + j] / scale } else { f64::NAN }
        };
        Ok((0..self.left.len()).map(|i| (0..self.right.len()).map(|j| entry(i, j)).collect()).collect())
    }

    /// `K` of centred features, as the estimator takes it: centred features leave either estimate as it is and keep the digits of features far
    /// from 0.
    fn gram(&self, features: &Tensor) -> Result<Gram> {
        let pooled = match features.rank() {
            3.. if self.pool => features.flatten_from(2)?.mean(2)?,
            _ => features.flatten_from(1)?,
        };
        let centred = pooled.broadcast_sub(&pooled.mean_keepdim(0)?)?;
        let k = centred.matmul(&centred.t()?)?.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        let n = k.dim(0)?;
        let mut values = k.flatten_all()?.to_vec1::<f64>()?;
        if self.estimator == Estimator::Unbiased {
            (0..n).for_each(|i| values[i * n + i] = 0.0);
        }
        let sums: Vec<f64> = values.chunks_exact(n).map(|row| row.iter().sum()).collect();
        Ok(Gram { total: sums.iter().sum(), values, sums })
    }

    fn hsic(&self, k: &Gram, l: &Gram, n: usize) -> f64 {
        let n = n as f64;
        let product: f64 = k.values.iter().zip(&l.values).map(|(a, b)| a * b).sum();
        let rows: f64 = k.sums.iter().zip(&l.sums).map(|(a, b)| a * b).sum();
        match self.estimator {
            Estimator::Unbiased => (product + k.total * l.total / ((n - 1.0) * (n - 2.0)) - 2.0 / (n - 2.0) * rows) / (n * (n - 3.0)),
            Estimator::Plain => product + k.total * l.total / (n * n) - 2.0 / n * rows,
        }
    }
}

/// A symmetric matrix with its row sums.
struct Gram {
    values: Vec<f64>,
    sums: Vec<f64>,
    total: f64,
}

#[cfg(test)]
mod tests {
    use kd_core::Rng;

    use super::*;

    fn random(seed: u64, n: usize, p: usize) -> Tensor {
        let rng = Rng::new(seed);
        let values: Vec<f64> = (0..n * p).map(|i| rng.normal(i as u64)).collect();
        Tensor::from_vec(values, (n, p), &Device::Cpu).unwrap()
    }

    fn cka(estimator: Estimator, x: &Tensor, y: &Tensor) -> f64 {
        let mut cka = Cka::new(estimator, false);
        cka.add(&[x], &[y]).unwrap();
        cka.matrix().unwrap()[0][0]
    }

    /// Two features that share something, of different widths.
    fn related(n: usize) -> (Tensor, Tensor) {
        let x = random(1, n, 6);
        let y = (x.matmul(&random(2, 6, 9)).unwrap() + (random(3, n, 9) * 2.0).unwrap()).unwrap();
        (x, y)
    }

    const BOTH: [Estimator; 2] = [Estimator::Unbiased, Estimator::Plain];

    #[test]
    fn plain_is_the_quotient_of_frobenius_norms() {
        let (x, y) = related(20);
        let centre = |t: &Tensor| t.broadcast_sub(&t.mean_keepdim(0).unwrap()).unwrap();
        let (a, b) = (centre(&x), centre(&y));
        let norm = |a: &Tensor, b: &Tensor| {
            let m = a.t().unwrap().matmul(b).unwrap();
            m.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt()
        };
        let expected = norm(&b, &a).powi(2) / (norm(&a, &a) * norm(&b, &b));
        let got = cka(Estimator::Plain, &x, &y);
        assert!((got - expected).abs() < 1e-12, "{got} is not {expected}");
    }

    #[test]
    fn unbiased_is_the_mean_over_four_different_samples() {
        let (x, y) = related(7);
        let gram = |t: &Tensor| t.matmul(&t.t().unwrap()).unwrap().to_vec2::<f64>().unwrap();
        let (k, l) = (gram(&x), gram(&y));
        let hsic = |k: &[Vec<f64>], l: &[Vec<f64>]| {
            let (mut sum, mut count) = (0.0, 0.0);
            for a in 0..7 {
                for b in (0..7).filter(|b| *b != a) {
                    for c in (0..7).filter(|c| ![a, b].contains(c)) {
                        for d in (0..7).filter(|d| ![a, b, c].contains(d)) {
                            sum += k[a][b] * (l[a][b] + l[c][d] - 2.0 * l[a][c]);
                            count += 1.0;
                        }
                    }
                }
            }
            sum / count
        };
        let expected = hsic(&k, &l) / (hsic(&k, &k) * hsic(&l, &l)).sqrt();
        let got = cka(Estimator::Unbiased, &x, &y);
        assert!((got - expected).abs() < 1e-10, "{got} is not {expected}");
    }

    #[test]
    fn equal_rotated_scaled_and_shifted_features_are_the_same() {
        let (x, y) = related(12);
        // Two plane rotations and a swap of axes.
        let (c, s) = (0.6, 0.8);
        let mut q = vec![0.0; 36];
        for (i, j, v) in
            [(0, 0, c), (0, 1, -s), (1, 0, s), (1, 1, c), (2, 3, 1.0), (3, 2, 1.0), (4, 4, c), (4, 5, s), (5, 4, -s), (5, 5, c)]
        {
            q[i * 6 + j] = v;
        }
        let q = Tensor::from_vec(q, (6, 6), &Device::Cpu).unwrap();
        let turned = ((x.matmul(&q).unwrap() * 3.5).unwrap() + 100.0).unwrap();
        for estimator in BOTH {
            assert!((cka(estimator, &x, &x) - 1.0).abs() < 1e-12);
            assert!((cka(estimator, &x, &turned) - 1.0).abs() < 1e-9);
            let (a, b) = (cka(estimator, &x, &y), cka(estimator, &turned, &y));
            assert!((a - b).abs() < 1e-9 && a > 0.1 && a < 0.99, "{a} {b}");
            assert!((a - cka(estimator, &y, &x)).abs() < 1e-12);
        }
        // A map that is no rotation does change it.
        let stretched = x.broadcast_mul(&Tensor::new(&[[9f64, 1.0, 1.0, 1.0, 1.0, 1.0]], &Device::Cpu).unwrap()).unwrap();
        assert!(cka(Estimator::Plain, &x, &stretched) < 0.9);
    }

    #[test]
    fn unrelated_wide_features_fool_the_plain_estimator_alone() {
        let (x, y) = (random(5, 24, 400), random(6, 24, 400));
        assert!(cka(Estimator::Plain, &x, &y) > 0.8);
        assert!(cka(Estimator::Unbiased, &x, &y).abs() < 0.2);
    }

    #[test]
    fn batches_average_and_small_ones_are_left_out() {
        let (x, y) = related(11);
        let mut cka = Cka::new(Estimator::Unbiased, false);
        for (from, n) in [(0, 8), (8, 3)] {
            let part = |t: &Tensor| t.narrow(0, from, n).unwrap();
            cka.add(&[&part(&x), &part(&y)], &[&part(&y)]).unwrap();
        }
        assert_eq!(cka.samples(), 8);
        let matrix = cka.matrix().unwrap();
        assert!((matrix[1][0] - 1.0).abs() < 1e-12 && matrix.len() == 2);
        assert!(Cka::new(Estimator::Unbiased, false).matrix().is_err());
        assert!(cka.add(&[&x], &[&y]).is_err() && cka.add(&[&x], &[&random(1, 4, 2)]).is_err());
    }

    #[test]
    fn pooling_averages_positions_and_constants_have_no_similarity() {
        let x = random(8, 6, 24).reshape((6, 2, 3, 4)).unwrap();
        let pooled = x.flatten_from(2).unwrap().mean(2).unwrap();
        let mut cka = Cka::new(Estimator::Plain, true);
        let constant = Tensor::ones((6, 5), DType::F64, &Device::Cpu).unwrap();
        cka.add(&[&x], &[&pooled, &constant]).unwrap();
        let matrix = cka.matrix().unwrap();
        assert!((matrix[0][0] - 1.0).abs() < 1e-12 && matrix[0][1].is_nan());
    }
}
