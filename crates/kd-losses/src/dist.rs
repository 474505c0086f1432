//! `dist`: the correlation of predictions, of each sample over the classes and of each class over the batch.
//!
//! Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv 2205.10536.
//!
//! ```text
//! p = softmax(z/T),  q = softmax(v/T)
//! rho(a, b) = sum (a - mean a)(b - mean b) / (|a - mean a| |b - mean b| + eps)
//! inter = T^2 (1 - mean_b rho(p[b,:], q[b,:]))        over the classes of each sample
//! intra = T^2 (1 - mean_k rho(p[:,k], q[:,k]))        over the samples of each class
//! value = beta inter + gamma intra
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `z` | student logits | `[B,K]` |
//! | `v` | teacher logits, detached | `[B,K]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `beta`, `gamma` | 1, 1 | >= 0 | weights of inter and intra |
//! | `temperature` | 1 | > 0 | T; 4 on CIFAR-100, 1 on ImageNet |
//! | `eps` | 1e-8 | > 0 | added to the product of the lengths |
//!
//! Terms: `inter` (weight `beta`), `intra` (weight `gamma`). Labels are not used. The authors' recipe: `ce` of weight 1 beside this of
//! weight 2; CIFAR-100 at batch 64, lr 0.05 (0.01 for MobileNetV2 and the ShuffleNets), divided by 10 after 150, 180 and 210 of 240 epochs.
//! CIFAR-100 top-1 published: wrn40_2-wrn40_1 74.43, res56-res20 71.75, res32x4-res8x4 76.31, res50-mobileV2 68.66,
//! res32x4-shuffleV1 76.34, res32x4-shuffleV2 77.35; ImageNet R34-R18 72.07, R50-MobileNet 73.24.
//!
//! Cost O(BK), no state. Everything is centred before it is multiplied. A constant row or column has correlation 0 without a gradient; so a
//! batch of one sample gives an intra of T^2 without a gradient. torchdistill clamps the product of the lengths instead of adding `eps`,
//! the authors' first release has no temperature; both differ from this for vanishing lengths alone.

use candle_core::Tensor;
use kd_core::{LossTerms, Method, MethodEntry, Needs, ParamDoc, ParityInputs, ParityOutput, Result, StepView};
use serde::{Deserialize, Serialize};

use crate::norms::length;
use crate::registry::parse;
use crate::{inputs, softmax};

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Weight of `inter`, at least 0.
    pub beta: f64,
    /// Weight of `intra`, at least 0.
    pub gamma: f64,
    /// T, above 0.
    pub temperature: f64,
    /// Added to the product of the lengths, above 0.
    pub eps: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { beta: 1.0, gamma: 1.0, temperature: 1.0, eps: 1e-8 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::not_negative("beta", self.beta)?;
        inputs::not_negative("gamma", self.gamma)?;
        inputs::positive("temperature", self.temperature)?;
        inputs::positive("eps", self.eps)
    }
}

/// DIST on `student` `[B,K]` and `teacher` `[B,K]`, which is detached.
///
/// # Errors
/// Logits that are not finite, differ in shape, have no row or fewer than two classes; parameters out of range.
pub fn dist(student: &Tensor, teacher: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (_, _, teacher) = inputs::both_logits(student, teacher)?;
    let t = params.temperature;
    let p = softmax::log_softmax(&(student / t)?)?.exp()?;
    let q = softmax::log_softmax(&(teacher / t)?)?.exp()?;
    let apart = |rho: Tensor| -> Result<Tensor> { Ok(((1.0 - rho.mean_all()?)? * (t * t))?) };
    let inter = apart(correlation(&p, &q, params.eps)?)?;
    let intra = apart(correlation(&p.t()?, &q.t()?, params.eps)?)?;
    Ok(LossTerms::new().with("inter", inter, params.beta).with("intra", intra, params.gamma))
}

/// Pearson's correlation of each row of `a` with the same row of `b`, `[rows]`.
fn correlation(a: &Tensor, b: &Tensor, eps: f64) -> Result<Tensor> {
    let centred = |x: &Tensor| -> Result<Tensor> {
        let x = x.contiguous()?;
        Ok(x.broadcast_sub(&x.mean_keepdim(1)?)?)
    };
    let (a, b) = (centred(a)?, centred(b)?);
    let lengths = ((length(&a)? * length(&b)?)? + eps)?;
    Ok(((&a * &b)?.sum_keepdim(1)? / lengths)?.squeeze(1)?)
}

struct Dist {
    params: Params,
}

impl Method for Dist {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs::logits()
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        dist(step.student()?.logits()?, step.teacher()?.logits()?, &self.params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    Ok(dist(inputs.get("student.logits")?, inputs.get("teacher.logits")?, &inputs.params()?)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "dist",
    about: "correlation of predictions: each sample over the classes, each class over the batch",
    source: "Huang et al., NeurIPS 2022, arXiv 2205.10536",
    year: 2022,
    parameters: &[
        ParamDoc { name: "beta", default: "1.0", range: ">= 0", about: "weight of the samples' correlation" },
        ParamDoc { name: "gamma", default: "1.0", range: ">= 0", about: "weight of the classes' correlation" },
        ParamDoc { name: "temperature", default: "1.0", range: "> 0", about: "T; 4 on CIFAR-100" },
        ParamDoc { name: "eps", default: "1e-8", range: "> 0", about: "added to the product of the lengths" },
    ],
    build: |params| Ok(Box::new(Dist { params: parse(params, Params::validate)? })),
    parity,
    raw_terms: true,
};
