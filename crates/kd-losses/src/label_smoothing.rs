//! `label_smoothing`: cross-entropy with labels mixed with the uniform distribution.
//!
//! Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016; equation 2 of FNKD (Xu et al., ECCV 2020).
//!
//! ```text
//! q = (1 - epsilon) onehot(y) + epsilon / K
//! value = mean_b H(q, softmax(z)) = (1 - epsilon) ce + epsilon mean_b mean_k -log softmax(z)_k
//! ```
//!
//! The uniform part includes the label's own class, as in PyTorch. Soft targets (mixup) take the place of the one-hot labels.
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `z` | student logits | `[B,K]` |
//! | `y` | labels | `[B]` integers, or `[B,K]` probabilities |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `epsilon` | 0.1 | 0..=1 | share of the uniform distribution; FNKD 0.2; 1 is the uniform distribution alone |
//!
//! Terms: `target` (weight `1 - epsilon`), `uniform` (weight `epsilon`).

use candle_core::Tensor;
use kd_core::{LossTerms, Method, MethodEntry, Needs, ParamDoc, ParityInputs, ParityOutput, Result, StepView};
use serde::{Deserialize, Serialize};

use crate::labels::{self, Labels};
use crate::registry::{parity_labels, parse};
use crate::{inputs, softmax};

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Share of the uniform distribution, in 0..=1.
    pub epsilon: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { epsilon: 0.1 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::share("epsilon", self.epsilon)
    }
}

/// Label smoothing on `student` `[B,K]` with `labels`, class indices `[B]` or class probabilities `[B,K]`.
///
/// # Errors
/// As [`ce`](crate::ce()), and parameters out of range.
pub fn label_smoothing(student: &Tensor, labels: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (_, k) = inputs::logits("student.logits", student)?;
    let labels = Labels::new(labels, k, student)?;
    let log_p = softmax::log_softmax(student)?;
    let target = softmax::cross_entropy(&labels.q, &log_p)?.mean_all()?;
    let uniform = log_p.mean_all()?.neg()?;
    Ok(LossTerms::new().with("target", target, 1.0 - params.epsilon).with("uniform", uniform, params.epsilon))
}

struct LabelSmoothing {
    params: Params,
}

impl Method for LabelSmoothing {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs::supervised()
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        label_smoothing(step.student()?.logits()?, labels::of(step.batch), &self.params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    Ok(label_smoothing(inputs.get("student.logits")?, parity_labels(inputs)?, &inputs.params()?)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "label_smoothing",
    about: "cross-entropy with labels mixed with the uniform distribution",
    source: "Szegedy et al., CVPR 2016; FNKD (ECCV 2020), eq. 2",
    year: 2016,
    parameters: &[ParamDoc { name: "epsilon", default: "0.1", range: "0..=1", about: "share of the uniform distribution" }],
    build: |params| Ok(Box::new(LabelSmoothing { params: parse(params, Params::validate)? })),
    parity,
    raw_terms: false,
};
