//! `wsld`: weighted soft labels, less distillation where the student is right already.
//!
//! Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective", ICLR 2021, arXiv 2102.00650.
//!
//! ```text
//! soft_b = H(softmax(v/T), softmax(z/T))
//! w_b    = 1 - exp(-CE(z, y) / (CE(v, y) + eps)),  at temperature 1, a constant
//! value  = T^2 mean_b w_b soft_b
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `z` | student logits | `[B,K]` |
//! | `v` | teacher logits, detached | `[B,K]` |
//! | `y` | labels | `[B]` integers, or `[B,K]` probabilities |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `temperature` | 2 | > 0 | T; 4 on CIFAR-100 |
//! | `eps` | 1e-7 | > 0 | added to the teacher's cross-entropy |
//!
//! Term: `weighted_soft`. Recipe: `ce` of weight 1 beside this of weight 2.5 (ImageNet, the authors' code; R34-R18 72.04, R50-MobileNet 71.52);
//! weight 2.25 at T = 4 on CIFAR-100 (the paper). A cross-entropy, not a divergence: the teacher's entropy remains. A sure teacher drives the
//! weight to 1, a perfect student to 0. Cost O(BK), no state.

use candle_core::Tensor;
use kd_core::{LossTerms, Method, MethodEntry, Needs, ParamDoc, ParityInputs, ParityOutput, Result, StepView};
use serde::{Deserialize, Serialize};

use crate::inputs;
use crate::labels::{self, Labels};
use crate::registry::{parity_labels, parse};
use crate::softmax::{self, Softmax};

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// T, above 0.
    pub temperature: f64,
    /// Added to the teacher's cross-entropy, above 0.
    pub eps: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { temperature: 2.0, eps: 1e-7 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::positive("temperature", self.temperature)?;
        inputs::positive("eps", self.eps)
    }
}

/// WSLD on `student` `[B,K]` and `teacher` `[B,K]`, which is detached; `labels` are class indices `[B]` or class probabilities `[B,K]`.
///
/// # Errors
/// Logits that are not finite, differ in shape, have no row or fewer than two classes; labels outside them; parameters out of range.
pub fn wsld(student: &Tensor, teacher: &Tensor, labels: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (_, k, teacher) = inputs::both_logits(student, teacher)?;
    let labels = Labels::new(labels, k, student)?;
    let hard = |x: &Tensor| softmax::cross_entropy(&labels.q, &softmax::log_softmax(&x.detach())?);
    let ratio = (hard(student)? / (hard(&teacher)? + params.eps)?)?.relu()?;
    let weight = (1.0 - ratio.neg()?.exp()?)?;
    let t = params.temperature;
    let soft = Softmax::new(&(student / t)?)?.cross_entropy_with(&Softmax::new(&(teacher / t)?)?)?;
    Ok(LossTerms::one("weighted_soft", ((soft * weight)?.mean_all()? * (t * t))?))
}

struct Wsld {
    params: Params,
}

impl Method for Wsld {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { labels: true, ..Needs::logits() }
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        wsld(step.student()?.logits()?, step.teacher()?.logits()?, labels::of(step.batch), &self.params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    Ok(wsld(inputs.get("student.logits")?, inputs.get("teacher.logits")?, parity_labels(inputs)?, &inputs.params()?)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "wsld",
    about: "weighted soft labels: less distillation where the student is right already",
    source: "Zhou et al., ICLR 2021, arXiv 2102.00650",
    year: 2021,
    parameters: &[
        ParamDoc { name: "temperature", default: "2.0", range: "> 0", about: "T" },
        ParamDoc { name: "eps", default: "1e-7", range: "> 0", about: "added to the teacher's cross-entropy" },
    ],
    build: |params| Ok(Box::new(Wsld { params: parse(params, Params::validate)? })),
    parity,
    raw_terms: true,
};
