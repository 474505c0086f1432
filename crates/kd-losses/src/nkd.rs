//! `nkd`: normalised knowledge distillation.
//!
//! Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and Customized Soft
//! Labels", ICCV 2023, arXiv 2303.13005; first in arXiv 2208.10139.
//!
//! ```text
//! target     = -mean_b T_y log softmax(z)_y,   T_y = softmax(v)_y, at temperature 1 always
//! non_target = T^2 mean_b H(softmax(v_/T), softmax(z_/T)),   z_, v_ = the logits without the label's
//! value      = target + gamma non_target
//! ```
//!
//! Cross-entropies, not divergences: the value is not 0 for a student that equals its teacher.
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `z` | student logits | `[B,K]` |
//! | `v` | teacher logits, detached | `[B,K]` |
//! | `y` | labels; of soft targets (mixup) the heaviest class | `[B]` integers, or `[B,K]` probabilities |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `temperature` | 1 | > 0 | T of the non-target part |
//! | `gamma` | 1.5 | >= 0 | weight of the non-target part (called alpha in 2022) |
//!
//! Terms: `target`, `non_target` (weight `gamma`). Use with `ce` of weight 1. The authors' settings:
//!
//! | pair | T | gamma |
//! |---|---|---|
//! | ImageNet R34-R18, R50-MobileNet | 1 | 1.5 |
//! | ImageNet, DeiT pairs with ViTKD | 1 | 1.0 |
//! | CIFAR-100 R34-R18 | 3 | 3.5 |
//! | the papers' other CIFAR-100 pairs | unknown | unknown |
//!
//! The paper writes the renormalised probability as `T_i / (1 - T_y)`; a softmax over the other classes is the same number and stays
//! finite where `1 - T_y` underflows. The releases up to July 2023 mask by subtracting 1000 and divide (NaN in f32 at logits of +-80, and
//! with two classes); those of 2023-07-17 to 2023-10-10 left the target class among the non-targets, so results made with them are of
//! another loss. With two classes `non_target` is 0 without a gradient.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use kd_losses::nkd::Params;
//! let z = Tensor::new(&[[0f64, 0.0, 0.0]], &Device::Cpu)?;
//! let v = Tensor::new(&[[2f64.ln(), 0.0, 0.0]], &Device::Cpu)?; // T_y = 1/2
//! let y = Tensor::new(&[0i64], &Device::Cpu)?;
//! let loss = kd_losses::nkd(&z, &v, &y, &Params::default())?.total()?.to_scalar::<f64>()?;
//! assert!((loss - (0.5 * 3f64.ln() + 1.5 * 2f64.ln())).abs() < 1e-12);
//! # Ok::<(), kd_core::Error>(())
//! ```

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
    /// T of the non-target part, above 0.
    pub temperature: f64,
    /// Weight of the non-target part, at least 0.
    pub gamma: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { temperature: 1.0, gamma: 1.5 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::positive("temperature", self.temperature)?;
        inputs::not_negative("gamma", self.gamma)
    }
}

/// Normalised distillation of `student` `[B,K]` by `teacher` `[B,K]`, which is detached; `labels` are class indices `[B]` or class
/// probabilities `[B,K]`.
///
/// # Errors
/// Logits that are not finite, differ in shape, have no row or fewer than two classes; labels outside them; parameters out of range.
pub fn nkd(student: &Tensor, teacher: &Tensor, labels: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (_, k, teacher) = inputs::both_logits(student, teacher)?;
    let y = Labels::new(labels, k, student)?.one_hot()?;
    let target = target_rows(student, &teacher, &y)?.mean_all()?;

    let t = params.temperature;
    let non_target = (non_target_rows(&(student / t)?, &(teacher / t)?, &(1.0 - y)?)?.mean_all()? * (t * t))?;
    Ok(LossTerms::one("target", target).with("non_target", non_target, params.gamma))
}

/// `-T_y log S_y` of each row, `[B]`, at temperature 1; `v` is a constant.
pub(crate) fn target_rows(z: &Tensor, v: &Tensor, y: &Tensor) -> Result<Tensor> {
    let t_y = labels::at(&softmax::log_softmax(&v.detach())?, y)?.exp()?;
    Ok((t_y * labels::at(&softmax::log_softmax(z)?, y)?)?.neg()?)
}

/// The cross-entropy of each row over the classes that `keep` marks, `[B]`, of logits that are divided by T already.
pub(crate) fn non_target_rows(z: &Tensor, v: &Tensor, keep: &Tensor) -> Result<Tensor> {
    Softmax::over(z, keep)?.cross_entropy_with(&Softmax::over(v, keep)?)
}

struct Nkd {
    params: Params,
}

impl Method for Nkd {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { labels: true, ..Needs::logits() }
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        nkd(step.student()?.logits()?, step.teacher()?.logits()?, labels::of(step.batch), &self.params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    Ok(nkd(inputs.get("student.logits")?, inputs.get("teacher.logits")?, parity_labels(inputs)?, &inputs.params()?)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "nkd",
    about: "normalised distillation: the target class weighted by the teacher, the others renormalised",
    source: "Yang et al., ICCV 2023, arXiv 2303.13005",
    year: 2023,
    parameters: &[
        ParamDoc { name: "temperature", default: "1.0", range: "> 0", about: "T of the non-target part" },
        ParamDoc { name: "gamma", default: "1.5", range: ">= 0", about: "weight of the non-target part" },
    ],
    build: |params| Ok(Box::new(Nkd { params: parse(params, Params::validate)? })),
    parity,
    raw_terms: false,
};
