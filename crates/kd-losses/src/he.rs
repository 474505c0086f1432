//! `he`: hypersphere embedding, cross-entropy of logits divided by the feature's length.
//!
//! Xu et al., "Feature Normalized Knowledge Distillation for Image Classification" (FNKD), ECCV 2020, section 4, where it fine-tunes a
//! trained network.
//!
//! ```text
//! value = mean_b H(onehot(y), softmax(radius z / |f_s|))
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `z` | student logits | `[B,K]` |
//! | `f_s` | student embedding; the gradient runs through its length | `[B,D]` |
//! | `y` | labels | `[B]` integers, or `[B,K]` probabilities |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `radius` | 16 | > 0 | the paper's value is unknown |
//! | `eps` | 1e-12 | > 0 | a feature of at most this length is a constant of this length |
//!
//! Term: `ce`. It stands in the place of the `ce` method, not beside it. The predicted class does not change: its logits are divided by a
//! positive number.

use candle_core::Tensor;
use kd_core::{Cut, Error, LossTerms, Method, MethodEntry, Needs, ParamDoc, ParityInputs, ParityOutput, Result, StepView};
use serde::{Deserialize, Serialize};

use crate::labels::{self, Labels};
use crate::nd::EPS;
use crate::norms::row_norm;
use crate::registry::{parity_labels, parse};
use crate::{inputs, softmax};

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Length that every feature is brought to, above 0.
    pub radius: f64,
    /// Length at or below which a feature counts as a constant of this length, above 0.
    pub eps: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { radius: 16.0, eps: 1e-12 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::positive("radius", self.radius)?;
        inputs::positive("eps", self.eps)
    }
}

/// Cross-entropy of `logits` `[B,K]`, made from `embedding` `[B,D]`, as if the embedding had length `radius`; `labels` are class indices
/// `[B]` or class probabilities `[B,K]`.
///
/// # Errors
/// Tensors that are not finite, have no row or differ in their number; fewer than two classes, labels outside them; parameters out of
/// range.
pub fn he(logits: &Tensor, embedding: &Tensor, labels: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (b, k) = inputs::logits("student.logits", logits)?;
    if inputs::embedding("student.embedding", embedding)?.0 != b {
        return Err(Error::shape("student.embedding", format!("[{b}, D], a row for each row of the logits"), embedding.dims()));
    }
    let labels = Labels::new(labels, k, logits)?;
    let scaled = (logits.broadcast_div(&row_norm(embedding, params.eps)?)? * params.radius)?;
    let value = softmax::cross_entropy(&labels.q, &softmax::log_softmax(&scaled)?)?.mean_all()?;
    Ok(LossTerms::one("ce", value))
}

struct He {
    params: Params,
}

impl Method for He {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { student: vec![Cut::Embedding, Cut::Logits], ..Needs::supervised() }
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let student = step.student()?;
        he(student.logits()?, student.embedding()?, labels::of(step.batch), &self.params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    Ok(he(inputs.get("student.logits")?, inputs.get("student.embedding")?, parity_labels(inputs)?, &inputs.params()?)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "he",
    about: "hypersphere embedding: cross-entropy of logits divided by the feature's length",
    source: "Xu et al. (FNKD), ECCV 2020, section 4",
    year: 2020,
    parameters: &[ParamDoc { name: "radius", default: "16.0", range: "> 0", about: "length that every feature is brought to" }, EPS],
    build: |params| Ok(Box::new(He { params: parse(params, Params::validate)? })),
    parity,
    raw_terms: false,
};
