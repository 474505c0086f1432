//! Length and direction of embeddings against the class means.
//!
//! ```text
//! ratio_b = |f_b| / |c_y|,   angle_b = arccos( f_b . c_y / (|f_b| |c_y|) ),   nd_b = 1 - f_b . e_y / max(|f_b|, |f_t,b|),   e_k = c_k / |c_k|
//! ```
//!
//! KD++ (Wang et al., "Improving Knowledge Distillation via Regularizing Feature Norm and Direction", ECCV 2024, arXiv 2305.17007) says that a
//! student profits from embeddings that are longer and closer in direction to the teacher's class means `c` `[K,D]`, the means of the teacher's
//! embedding over the training samples of a class ([`class_means`](crate::class_means)). `nd` is its loss, which needs embeddings of one width.
//! Where the widths differ and no adapter stands between, a network can only be held against its own means, which is given in any case.

use candle_core::{DType, Tensor};
use kd_core::Error;
use serde::Serialize;

use crate::Result;
use crate::analysis::stats::Summary;
use crate::analysis::sweep::Rows;
use crate::analysis::{check_rows, classes_of, dot, length};

/// Collects the embeddings of one network against one set of class means.
#[derive(Clone, Debug)]
pub struct Directions {
    means: Rows,
    lengths: Vec<f64>,
    samples: Vec<Sample>,
}

/// One sample.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Sample {
    /// Its label.
    pub label: usize,
    /// Length over the length of the class mean.
    pub ratio: f64,
    /// Cosine of the angle to the class mean; 0 for an embedding of no length.
    pub cosine: f64,
    /// Whether no other class mean is nearer in angle.
    pub nearest: bool,
    /// KD++'s loss, when the teacher's norms were given.
    pub nd: Option<f64>,
}

impl Sample {
    /// The angle in degrees.
    pub fn angle(&self) -> f64 {
        self.cosine.clamp(-1.0, 1.0).acos().to_degrees()
    }
}

/// Directions over some samples.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Direction {
    /// Length over the length of the class mean.
    pub ratio: Summary,
    /// Cosine of the angle to the class mean.
    pub cosine: Summary,
    /// The angle in degrees.
    pub angle: Summary,
    /// Share, in `[0, 1]`, of samples to which no other class mean is nearer in angle.
    pub nearest: f64,
    /// Mean of KD++'s loss; `None` without the teacher's norms.
    pub nd: Option<f64>,
}

/// Directions over a data set.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DirectionReport {
    /// Over all samples.
    pub all: Direction,
    /// By label; `None` for a class without a sample.
    pub classes: Vec<Option<Direction>>,
}

impl Directions {
    /// Against `means` `[K,D]`.
    ///
    /// # Errors
    /// Means that are no matrix, or of which one has no length.
    pub fn new(means: &Tensor) -> Result<Self> {
        let (_, width) = means.dims2()?;
        let means = Rows::new(means.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?, width);
        let lengths: Vec<f64> = means.iter().map(length).collect();
        if let Some(class) = lengths.iter().position(|l| !(l.is_finite() && *l > 0.0)) {
            return Err(Error::refused(format!("class means: the mean embedding of class {class} has no direction")).into());
        }
        Ok(Self { means, lengths, samples: vec![] })
    }

    /// Width of the embeddings that it takes.
    pub fn width(&self) -> usize {
        self.means.width
    }

    /// Adds a batch of embeddings `[B,D]`; `teacher` are the lengths of the teacher's embeddings of the same samples.
    ///
    /// # Errors
    /// Embeddings of another width than the means, a label that has no mean.
    pub fn add(&mut self, embedding: &Rows, labels: &[i64], teacher: Option<&[f64]>) -> Result<()> {
        check_rows("embedding", embedding, labels.len())?;
        if embedding.width != self.means.width {
            return Err(Error::shape("embedding", format!("[B, {}]", self.means.width), &[embedding.len(), embedding.width]).into());
        }
        for (i, (f, y)) in embedding.iter().zip(classes_of(labels, self.means.len())?).enumerate() {
            let norm = length(f);
            let along: Vec<f64> = self.means.iter().zip(&self.lengths).map(|(c, l)| dot(f, c) / l).collect();
            let longest = teacher.map(|t| norm.max(t[i]));
            self.samples.push(Sample {
                label: y,
                ratio: norm / self.lengths[y],
                cosine: if norm > 0.0 { along[y] / norm } else { 0.0 },
                nearest: along.iter().all(|a| *a <= along[y]),
                nd: longest.map(|l| if l > 0.0 { 1.0 - along[y] / l } else { 1.0 }),
            });
        }
        Ok(())
    }

    /// The samples, in the order in which they came.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// Summaries over what was added; `None` when that is nothing.
    pub fn report(&self) -> Option<DirectionReport> {
        let of_class = |k: usize| summarise(self.samples.iter().filter(|s| s.label == k));
        Some(DirectionReport { all: summarise(self.samples.iter())?, classes: (0..self.means.len()).map(of_class).collect() })
    }
}

fn summarise<'a>(samples: impl Iterator<Item = &'a Sample> + Clone) -> Option<Direction> {
    let over = |value: fn(&Sample) -> f64| Summary::of(samples.clone().map(value));
    let nds: Option<Vec<f64>> = samples.clone().map(|s| s.nd).collect();
    Some(Direction {
        ratio: over(|s| s.ratio)?,
        cosine: over(|s| s.cosine)?,
        angle: over(Sample::angle)?,
        nearest: over(|s| f64::from(s.nearest))?.mean,
        nd: nds.and_then(Summary::of).map(|s| s.mean),
    })
}

/// The length of each row.
pub fn lengths(rows: &Rows) -> Vec<f64> {
    rows.iter().map(length).collect()
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn means() -> Tensor {
        Tensor::new(&[[2f64, 0.0], [0.0, 5.0]], &Device::Cpu).unwrap()
    }

    #[test]
    fn by_hand() {
        let mut d = Directions::new(&means()).unwrap();
        // Along its mean at half the length; at 45 degrees; away from it.
        d.add(&Rows::new(vec![1.0, 0.0, 3.0, 3.0, 0.0, 0.0], 2), &[0, 0, 1], Some(&[4.0, 1.0, 0.0])).unwrap();
        let s = d.samples();
        assert_eq!((s[0].ratio, s[0].cosine, s[0].nearest, s[0].nd), (0.5, 1.0, true, Some(0.75)));
        assert!((s[1].angle() - 45.0).abs() < 1e-9 && (s[1].nd.unwrap() - (1.0 - 0.5f64.sqrt())).abs() < 1e-12);
        assert!((s[1].ratio - 18f64.sqrt() / 2.0).abs() < 1e-12 && s[1].nearest);
        // No length: no direction, and KD++'s loss at its value for a right angle.
        assert_eq!((s[2].ratio, s[2].cosine, s[2].nd), (0.0, 0.0, Some(1.0)));
        let r = d.report().unwrap();
        assert!((r.classes[0].as_ref().unwrap().angle.mean - 22.5).abs() < 1e-9);
        assert_eq!((r.all.nearest, r.classes[1].as_ref().unwrap().ratio.n), (1.0, 1));
    }

    #[test]
    fn the_opposite_direction_is_not_nearest() {
        let mut d = Directions::new(&means()).unwrap();
        d.add(&Rows::new(vec![-1.0, 0.0], 2), &[0], None).unwrap();
        let s = d.samples()[0];
        assert_eq!((s.angle(), s.nearest, s.nd), (180.0, false, None));
        assert_eq!(d.report().unwrap().all.nd, None);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let zero = Tensor::new(&[[2f64, 0.0], [0.0, 0.0]], &Device::Cpu).unwrap();
        assert!(Directions::new(&zero).unwrap_err().to_string().contains("class 1"));
        let mut d = Directions::new(&means()).unwrap();
        assert!(d.add(&Rows::new(vec![1.0; 3], 3), &[0], None).unwrap_err().to_string().contains("[B, 2]"));
        assert!(d.add(&Rows::new(vec![1.0; 2], 2), &[2], None).is_err());
        assert!(d.report().is_none());
    }
}
