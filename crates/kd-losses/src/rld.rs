//! `rld`: refined logits: the teacher's confidence for the label, and its correlations among the classes that it ranks below the label.
//!
//! Sun et al., "Knowledge Distillation with Refined Logits", ICCV 2025, arXiv 2408.07703.
//!
//! ```text
//! scd   = Ta^2 mean_b KL( (v_max, 1 - v_max) || (p_y, 1 - p_y) )     v, p = softmax of teacher and student at temperature Ta
//! mcd   = T^2 mean_b KL( v' || p' )                                  softmaxes at T over the classes with z_t < z_t[y]
//! value = alpha scd + beta mcd
//! ```
//!
//! A teacher that is wrong still says how sure one can be (`v_max`, whichever class it is) and how the classes that it does not mistake
//! for the label relate; what contradicts the label is left out.
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `z_s`, `z_t` | logits of student and teacher (detached) | `[B,K]` |
//! | `y` | labels; of soft targets (mixup) the heaviest class | `[B]` integers, or `[B,K]` probabilities |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `alpha` | 1 | >= 0 | weight of `scd` |
//! | `beta` | 8 | >= 0 | weight of `mcd` |
//! | `alpha_temperature` | 1 | > 0 | Ta |
//! | `temperature` | 4 | > 0 | T |
//!
//! Terms: `scd` (sample confidence), `mcd` (masked correlation), both with their squared temperature. Use with `ce` of weight 1 and
//! `warmup_epochs = 20` (1 on ImageNet). The authors' settings: CIFAR-100 the defaults; ImageNet beta 0.5, T 1. Cost O(BK), no state.
//!
//! A sample whose label the teacher ranks last has no class left: its `mcd` is 0 without a gradient, which is what the release's
//! softmax over nothing but -1e9 gives. Classes that tie with the label are left out with it. Where logits tie for the maximum any of them
//! gives the same `v_max`. Checked: formula and defaults read in the authors' code (zju-SWJ/RLD), value and gradient against an
//! independent f64 implementation; the paper's text was not compared.

use candle_core::Tensor;
use kd_core::{LossTerms, Method, MethodEntry, Needs, ParamDoc, ParityInputs, ParityOutput, Result, StepView};
use serde::{Deserialize, Serialize};

use crate::inputs;
use crate::labels::{self, Labels};
use crate::registry::{parity_labels, parse};
use crate::softmax::{Softmax, one_against_others};

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Weight of `scd`, at least 0.
    pub alpha: f64,
    /// Weight of `mcd`, at least 0.
    pub beta: f64,
    /// Ta, above 0.
    pub alpha_temperature: f64,
    /// T, above 0.
    pub temperature: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { alpha: 1.0, beta: 8.0, alpha_temperature: 1.0, temperature: 4.0 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::not_negative("alpha", self.alpha)?;
        inputs::not_negative("beta", self.beta)?;
        inputs::positive("alpha_temperature", self.alpha_temperature)?;
        inputs::positive("temperature", self.temperature)
    }
}

/// RLD of `student` `[B,K]` by `teacher` `[B,K]`, which is detached; `labels` are class indices `[B]` or class probabilities `[B,K]`.
///
/// # Errors
/// Logits that are not finite, differ in shape, have no row or fewer than two classes; labels outside them; parameters out of range.
pub fn rld(student: &Tensor, teacher: &Tensor, labels: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (_, k, teacher) = inputs::both_logits(student, teacher)?;
    let y = Labels::new(labels, k, student)?.one_hot()?;

    let ta = params.alpha_temperature;
    let top = first_maximum(&teacher)?;
    let confidence = Softmax::new(&one_against_others(&(student / ta)?, &y)?)?;
    let target = Softmax::new(&one_against_others(&(&teacher / ta)?, &top)?)?;
    let scd = (confidence.kl(&target)?.mean_all()? * (ta * ta))?;

    let t = params.temperature;
    let at_label = labels::at(&teacher, &y)?.unsqueeze(1)?;
    let below = teacher.broadcast_lt(&at_label)?.to_dtype(student.dtype())?;
    let some = below.max_keepdim(1)?; // 0 where no class is left
    let keep = (&below + below.ones_like()?.broadcast_mul(&(1.0 - &some)?)?)?;
    let (p, v) = (Softmax::over(&(student / t)?, &keep)?, Softmax::over(&(teacher / t)?, &keep)?);
    let mcd = ((p.kl(&v)? * some.squeeze(1)?)?.mean_all()? * (t * t))?;
    Ok(LossTerms::new().with("scd", scd, params.alpha).with("mcd", mcd, params.beta))
}

/// `[B,K]`, 1 at the first maximum of each row.
fn first_maximum(z: &Tensor) -> Result<Tensor> {
    let k = z.dim(1)?;
    let index = z.argmax_keepdim(1)?.to_dtype(candle_core::DType::I64)?;
    let classes = Tensor::arange(0i64, k as i64, z.device())?.unsqueeze(0)?;
    Ok(index.broadcast_eq(&classes)?.to_dtype(z.dtype())?)
}

struct Rld {
    params: Params,
}

impl Method for Rld {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { labels: true, ..Needs::logits() }
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        rld(step.student()?.logits()?, step.teacher()?.logits()?, labels::of(step.batch), &self.params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    Ok(rld(inputs.get("student.logits")?, inputs.get("teacher.logits")?, parity_labels(inputs)?, &inputs.params()?)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "rld",
    about: "refined logits: the teacher's confidence goes to the label, its correlations count among the classes below the label",
    source: "Sun et al., ICCV 2025, arXiv 2408.07703",
    year: 2024,
    parameters: &[
        ParamDoc { name: "alpha", default: "1.0", range: ">= 0", about: "weight of the sample's confidence" },
        ParamDoc { name: "beta", default: "8.0", range: ">= 0", about: "weight of the masked correlations" },
        ParamDoc { name: "alpha_temperature", default: "1.0", range: "> 0", about: "temperature of the confidence" },
        ParamDoc { name: "temperature", default: "4.0", range: "> 0", about: "temperature of the correlations" },
    ],
    build: |params| Ok(Box::new(Rld { params: parse(params, Params::validate)? })),
    parity,
    raw_terms: true,
};
