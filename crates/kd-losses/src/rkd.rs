//! `rkd`: relational knowledge distillation, distances between samples and angles between triples of them.
//!
//! Park et al., "Relational Knowledge Distillation", CVPR 2019, arXiv 1904.05068.
//!
//! ```text
//! D_ij = |e_i - e_j|,  d = D / mean{D_ij : i != j}          distance = mean over B^2 of huber(d_s - d_t)
//! v_ij = (e_j - e_i) / |e_j - e_i|,  A_ijk = v_ij . v_ik    angle    = mean over B^3 of huber(A_s - A_t)
//! huber(x) = x^2/2 where |x| < 1, |x| - 1/2 elsewhere
//! value = distance_weight distance + angle_weight angle
//! ```
//!
//! The diagonal and the degenerate triples count in the means. The student's mean distance is differentiated.
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `e_s` | student embedding | `[B,D_s]` |
//! | `e_t` | teacher embedding, detached; of any width | `[B,D_t]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `distance_weight`, `angle_weight` | 25, 50 | >= 0 | the common benchmark's; the authors' metric learning: 1 and 2 |
//! | `squared` | false | | distances stay squared |
//! | `eps` | 1e-12 | > 0 | squared distances below it count as it, without a gradient |
//!
//! Terms: `distance`, `angle`. Recipe: `ce` of weight 1 beside this of weight 1, for every pair.
//!
//! Cost O(B^3 D), memory `B^2 D + B^3` numbers a side: at B = 64 and D = 256 1.3 million (5 MB in f32), at B = 256 34 million; a hundred times the
//! work of B = 64 at B = 300. No adapter, no state. The release expands `|e_i|^2 + |e_j|^2 - 2 e_i e_j`, which in f32 takes a distance of 0 between
//! rows of length 10 for 0.003; here rows are subtracted first. Equal rows have no direction and no gradient. One sample has no other: the
//! release gives NaN, this 0 without a gradient for a last batch of one, and `batch_size = 1` is refused.

use candle_core::{Device, Tensor};
use kd_core::{LossTerms, Method, MethodEntry, Needs, ParamDoc, ParityInputs, ParityOutput, Result, Setup, StepView};
use serde::{Deserialize, Serialize};

use crate::norms::unit;
use crate::registry::parse;
use crate::{inputs, pkt};

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Weight of `distance`, at least 0.
    pub distance_weight: f64,
    /// Weight of `angle`, at least 0.
    pub angle_weight: f64,
    /// Whether distances stay squared.
    pub squared: bool,
    /// Least squared distance, above 0.
    pub eps: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { distance_weight: 25.0, angle_weight: 50.0, squared: false, eps: 1e-12 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::not_negative("distance_weight", self.distance_weight)?;
        inputs::not_negative("angle_weight", self.angle_weight)?;
        inputs::positive("eps", self.eps)
    }
}

/// RKD on `student` `[B,D_s]` and `teacher` `[B,D_t]`, which is detached.
///
/// # Errors
/// Embeddings that are not finite, have no row or differ in their number; parameters out of range.
pub fn rkd(student: &Tensor, teacher: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (b, teacher) = inputs::one_batch(student, teacher)?;
    let terms =
        |distance, angle| LossTerms::new().with("distance", distance, params.distance_weight).with("angle", angle, params.angle_weight);
    if b == 1 {
        let nothing = Tensor::zeros((), student.dtype(), student.device())?;
        return Ok(terms(nothing.clone(), nothing));
    }
    let (s, t) = (differences(student)?, differences(&teacher)?);
    let distance = huber(&(distances(&s, params)? - distances(&t, params)?)?)?.mean_all()?;
    let angle = huber(&(angles(&s)? - angles(&t)?)?)?.mean_all()?;
    Ok(terms(distance, angle))
}

/// `e_j - e_i`, `[B,B,D]`.
fn differences(e: &Tensor) -> Result<Tensor> {
    Ok(e.unsqueeze(0)?.broadcast_sub(&e.unsqueeze(1)?)?)
}

/// Distances `[B,B]` divided by their mean.
fn distances(differences: &Tensor, params: &Params) -> Result<Tensor> {
    let b = differences.dim(0)?;
    let squares = differences.sqr()?.sum(2)?;
    let others: Vec<f64> = (0..b * b).map(|i| f64::from(u8::from(i / b != i % b))).collect();
    let others = Tensor::from_vec(others, (b, b), &Device::Cpu)?.to_dtype(squares.dtype())?.to_device(squares.device())?;
    // The diagonal, too, is the constant eps before it is masked: a square root of 0 has no finite gradient.
    let longer = squares.detach().gt(params.eps)?;
    let squares = longer.where_cond(&squares, &(squares.zeros_like()? + params.eps)?)?;
    let distances = ((if params.squared { squares } else { squares.sqrt()? }) * others)?;
    let mean = (distances.sum_all()? / (b * (b - 1)) as f64)?;
    Ok(distances.broadcast_div(&mean)?)
}

/// Cosines `[B,B,B]` between the directions from one sample to two others.
fn angles(differences: &Tensor) -> Result<Tensor> {
    let (b, _, d) = differences.dims3()?;
    let directions = unit(&differences.reshape((b * b, d))?, 1e-12)?.reshape((b, b, d))?;
    Ok(directions.matmul(&directions.transpose(1, 2)?.contiguous()?)?)
}

fn huber(x: &Tensor) -> Result<Tensor> {
    let sign = x.detach().sign()?;
    let near = x.detach().abs()?.lt(1.0)?;
    Ok(near.where_cond(&(x.sqr()? * 0.5)?, &((x * sign)? - 0.5)?)?)
}

struct Rkd {
    params: Params,
}

impl Method for Rkd {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        pkt::embeddings()
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        inputs::pairs(ENTRY.name, setup)
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        rkd(step.student()?.embedding()?, step.teacher()?.embedding()?, &self.params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    Ok(rkd(inputs.get("student.embedding")?, inputs.get("teacher.embedding")?, &inputs.params()?)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "rkd",
    about: "relational distillation: distances between samples, angles between triples; O(B^3)",
    source: "Park et al., CVPR 2019, arXiv 1904.05068",
    year: 2019,
    parameters: &[
        ParamDoc { name: "distance_weight", default: "25.0", range: ">= 0", about: "weight of the distances" },
        ParamDoc { name: "angle_weight", default: "50.0", range: ">= 0", about: "weight of the angles" },
        ParamDoc { name: "squared", default: "false", range: "true | false", about: "squared distances" },
        ParamDoc { name: "eps", default: "1e-12", range: "> 0", about: "least squared distance" },
    ],
    build: |params| Ok(Box::new(Rkd { params: parse(params, Params::validate)? })),
    parity,
    raw_terms: true,
};
