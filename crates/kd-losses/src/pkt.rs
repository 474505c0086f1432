//! `pkt`: probabilistic knowledge transfer, which samples of a batch look alike.
//!
//! Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018, arXiv 1803.10837.
//!
//! ```text
//! f = e / (|e| + eps),  C = (f f^T + 1) / 2,  P = C / (sum of its row)          [B,B], the diagonal included
//! value = mean over B^2 of P_t log((P_t + eps) / (P_s + eps))
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `e_s` | student embedding | `[B,D_s]` |
//! | `e_t` | teacher embedding, detached; of any width | `[B,D_t]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `eps` | 1e-7 | > 0 | |
//!
//! Term: `pkt`. The common benchmark's recipe: `ce` of weight 1 beside this of weight 30000, for every pair. The paper sums over the pairs of
//! different samples; the mean over B^2 with the diagonal is the released code's and what the tables were made with.
//!
//! Cost O(B^2 D), memory O(B^2); no adapter, no state. Both rows sum to one, so that `P_s - P_t` can be added to every element: the sum stays,
//! and what the logarithms of nearly equal numbers lose in f32 drops out. A batch of one sample gives 0; `batch_size = 1` is refused.

use candle_core::Tensor;
use kd_core::{Cut, LossTerms, Method, MethodEntry, Needs, ParamDoc, ParityInputs, ParityOutput, Result, Setup, StepView};
use serde::{Deserialize, Serialize};

use crate::inputs;
use crate::norms::length;
use crate::registry::parse;
use crate::softmax::with_slope;

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Added to lengths and probabilities, above 0.
    pub eps: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { eps: 1e-7 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::positive("eps", self.eps)
    }
}

/// PKT on `student` `[B,D_s]` and `teacher` `[B,D_t]`, which is detached.
///
/// # Errors
/// Embeddings that are not finite, have no row or differ in their number; parameters out of range.
pub fn pkt(student: &Tensor, teacher: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (b, teacher) = inputs::one_batch(student, teacher)?;
    let eps = params.eps;
    let similar = |e: &Tensor| -> Result<Tensor> {
        let f = e.broadcast_div(&(length(e)? + eps)?)?;
        let c = ((f.matmul(&f.t()?)? + 1.0)? * 0.5)?;
        Ok(c.broadcast_div(&c.sum_keepdim(1)?)?)
    };
    let (s, t) = (similar(student)?, similar(&teacher)?);
    let p = s.detach();
    let elements = ((&t * log_ratio(&t, &p, eps)?)? + (&p - &t)?)?;
    let slope = (1.0 - (&t / (&p + eps)?)?)?;
    let value = (with_slope(&elements, &s, &slope)?.sum_all()? / (b * b) as f64)?;
    Ok(LossTerms::one("pkt", value))
}

/// `log((t + eps) / (p + eps))` of constants, exact where they are close.
fn log_ratio(t: &Tensor, p: &Tensor, eps: f64) -> Result<Tensor> {
    let x = ((t - p)? / (p + eps)?)?;
    // log(1 + x) = log(u) x / (u - 1) for u the rounded 1 + x (Kahan).
    let u = (&x + 1.0)?;
    let close = u.eq(1.0)?.where_cond(&x, &((u.log()? * &x)? / (&u - 1.0)?)?)?;
    let apart = ((t + eps)?.log()? - (p + eps)?.log()?)?;
    Ok(x.lt(-0.5)?.where_cond(&apart, &close)?)
}

struct Pkt {
    params: Params,
}

impl Method for Pkt {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        embeddings()
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        inputs::pairs(ENTRY.name, setup)
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        pkt(step.student()?.embedding()?, step.teacher()?.embedding()?, &self.params)
    }
}

/// The embeddings of both sides and nothing else.
pub(crate) fn embeddings() -> Needs {
    Needs { student: vec![Cut::Embedding], teacher: vec![Cut::Embedding], ..Needs::default() }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    Ok(pkt(inputs.get("student.embedding")?, inputs.get("teacher.embedding")?, &inputs.params()?)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "pkt",
    about: "probabilistic knowledge transfer: similarities between the samples of a batch as probabilities",
    source: "Passalis and Tefas, ECCV 2018, arXiv 1803.10837",
    year: 2018,
    parameters: &[ParamDoc { name: "eps", default: "1e-7", range: "> 0", about: "added to lengths and probabilities" }],
    build: |params| Ok(Box::new(Pkt { params: parse(params, Params::validate)? })),
    parity,
    raw_terms: true,
};
