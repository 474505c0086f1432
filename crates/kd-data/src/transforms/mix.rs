//! `mixup:A` and `cutmix:A`: images of a batch mixed with others of the same batch, and their labels with them.
//!
//! Every sample `i` gets a partner `j` by a random permutation of the batch; one `l` is drawn for the whole batch from the distribution
//! Beta(A, A).
//!
//! ```text
//! mixup    x = l x_i + (1 - l) x_j                                                   (Zhang et al., ICLR 2018)
//! cutmix   x = x_i, in a box of sides sqrt(1 - l) of the image's around a random centre x_j;   (Yun et al., ICCV 2019)
//!          what of the box lies in the image sets l to 1 - its share of the area
//! targets  l onehot(y_i) + (1 - l) onehot(y_j)
//! ```
//! `labels` of the batch become the heavier class of each row (`y_i` where both weigh the same). All views share partners, `l` and box.

use candle_core::WithDType;
use kd_core::Rng;

use super::{Step, TransformEntry};

pub(super) const MIXUP: TransformEntry = TransformEntry {
    name: "mixup",
    about: "weighted mean of two images and of their labels, weight from Beta(A, A)",
    argument: "A (above 0)",
    parse: |argument| Some(Step::Batch(Mix { kind: Kind::Mixup, alpha: alpha(argument)? })),
};
pub(super) const CUTMIX: TransformEntry = TransformEntry {
    name: "cutmix",
    about: "a box of another image, labels weighted by area, drawn from Beta(A, A)",
    argument: "A (above 0)",
    parse: |argument| Some(Step::Batch(Mix { kind: Kind::Cutmix, alpha: alpha(argument)? })),
};

fn alpha(argument: &str) -> Option<f64> {
    argument.parse().ok().filter(|a| (1e-3..=1e3).contains(a))
}

/// A mixture of the images of a batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mix {
    kind: Kind,
    alpha: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Mixup,
    Cutmix,
}

/// What was drawn for one batch.
pub(crate) struct Drawn {
    /// The partner of each sample.
    partners: Vec<u32>,
    /// The weight of the sample itself.
    own: f64,
    /// Rows and columns of the partner's box; `None` for mixup.
    area: Option<[std::ops::Range<usize>; 2]>,
}

impl Mix {
    pub(crate) fn draw(&self, samples: usize, [height, width]: [usize; 2], rng: Rng) -> Drawn {
        let partners = rng.named("partners").permutation(samples);
        let own = beta(self.alpha, rng.named("weight"));
        if self.kind == Kind::Mixup {
            return Drawn { partners, own, area: None };
        }
        let span = |draw, extent: usize| {
            let side = (extent as f64 * (1.0 - own).sqrt()) as usize;
            let centre = rng.below(draw, extent as u64) as usize;
            centre.saturating_sub(side / 2)..(centre + side / 2).min(extent)
        };
        let area = [span(0, height), span(1, width)];
        let share = (area[0].len() * area[1].len()) as f64 / (height * width) as f64;
        Drawn { partners, own: 1.0 - share, area: Some(area) }
    }
}

impl Drawn {
    /// Mixes images of `[H,W]` planes, `size` values each.
    pub(crate) fn images<T: WithDType>(&self, images: &[T], size: usize, [height, width]: [usize; 2]) -> Vec<T> {
        let mut mixed = images.to_vec();
        let (own, other) = (T::from_f64(self.own), T::from_f64(1.0 - self.own));
        for (to, &partner) in mixed.chunks_exact_mut(size).zip(&self.partners) {
            let from = &images[partner as usize * size..][..size];
            match &self.area {
                None => to.iter_mut().zip(from).for_each(|(to, &from)| *to = own * *to + other * from),
                Some([rows, columns]) => {
                    for (to, from) in to.chunks_exact_mut(height * width).zip(from.chunks_exact(height * width)) {
                        for row in rows.clone() {
                            let span = row * width + columns.start..row * width + columns.end;
                            to[span.clone()].copy_from_slice(&from[span]);
                        }
                    }
                }
            }
        }
        mixed
    }

    /// Soft targets, `samples` rows of `classes`.
    pub(crate) fn targets(&self, labels: &[i64], classes: usize) -> Vec<f64> {
        let mut targets = vec![0.0; labels.len() * classes];
        for (row, (&label, &partner)) in targets.chunks_exact_mut(classes).zip(labels.iter().zip(&self.partners)) {
            row[label as usize] += self.own;
            row[labels[partner as usize] as usize] += 1.0 - self.own;
        }
        targets
    }

    /// The heavier class of each row.
    pub(crate) fn labels(&self, labels: &[i64]) -> Vec<i64> {
        match self.own >= 0.5 {
            true => labels.to_vec(),
            false => self.partners.iter().map(|&p| labels[p as usize]).collect(),
        }
    }
}

/// From Beta(a, a): `x / (x + y)` of two draws from Gamma(a).
fn beta(a: f64, rng: Rng) -> f64 {
    let (x, y) = (log_gamma_draw(a, rng.fork(0)), log_gamma_draw(a, rng.fork(1)));
    1.0 / (1.0 + (y - x).exp())
}

/// The logarithm of a draw from Gamma(a) (Marsaglia and Tsang, "A Simple Method for Generating Gamma Variables", 2000); below a = 1 by their
/// boost, Gamma(a + 1) u^(1/a), which in logarithms does not underflow.
fn log_gamma_draw(a: f64, rng: Rng) -> f64 {
    if a < 1.0 {
        return log_gamma_draw(a + 1.0, rng.fork(0)) + (1.0 - rng.uniform(0)).ln() / a;
    }
    let d = a - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    let tries = (0..).find_map(|i| {
        let z = rng.normal(2 * i);
        let v = (1.0 + c * z).powi(3);
        let accepted = v > 0.0 && (1.0 - rng.uniform(2 * i + 1)).ln() < 0.5 * z * z + d - d * v + d * v.ln();
        accepted.then(|| (d * v).ln())
    });
    tries.expect("invariant: more than nine tries in ten are accepted")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beta_has_its_moments() {
        for a in [0.2, 0.8, 1.0, 3.0] {
            let n = 40_000;
            let draws: Vec<f64> = (0..n).map(|i| beta(a, Rng::new(4).fork(i))).collect();
            assert!(draws.iter().all(|d| (0.0..=1.0).contains(d)));
            let mean = draws.iter().sum::<f64>() / n as f64;
            let variance = draws.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / n as f64;
            // Var Beta(a, a) = 1 / (4 (2a + 1)).
            assert!((mean - 0.5).abs() < 0.012 && (variance * 4.0 * (2.0 * a + 1.0) - 1.0).abs() < 0.04, "{a}: {mean} {variance}");
        }
    }
}
