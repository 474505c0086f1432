//! `kd`: knowledge distillation by softened logits.
//!
//! Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", NIPS 2014 workshop, arXiv 1503.02531.
//!
//! ```text
//! form = "kl":             value = T^2 mean_b KL(softmax(v/T) || softmax(z/T))
//! form = "cross_entropy":  value = T^2 mean_b H(softmax(v/T), softmax(z/T))
//! gradient of z (both):    T (softmax(z/T) - softmax(v/T)) / B
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `z` | student logits | `[B,K]` |
//! | `v` | teacher logits, detached | `[B,K]` |
//! | `T` | `temperature` | |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `temperature` | 4 | > 0 | |
//! | `form` | `"kl"` | `"kl"`, `"cross_entropy"` | the latter adds the teacher's entropy: another value, the same gradient |
//! | `t_squared` | true | | false leaves out the factor T^2 (FNKD, equation 4) |
//!
//! Term: `kd`. Labels are not used; put `ce` beside it:
//!
//! | recipe | T | `ce` | `kd` | form |
//! |---|---|---|---|---|
//! | mdistiller, CIFAR-100 / ImageNet | 4 / 1 | 0.1 / 0.5 | 0.9 / 0.5 | kl |
//! | KD++ (see [`kd_pp`](mod@crate::kd_pp)), CIFAR-100 / ImageNet | 4 / 1 | 1.0 | per pair | kl |
//! | cls_KD, CIFAR-100 R34-R18 / ImageNet | 3 / 1 | 0.5 | 0.5 | cross_entropy |
//! | FNKD, equation 4 | 1 (table 1) | 0.5 | 0.5 | cross_entropy without T^2 |
//! | FNKD's script, `distill` | 3 | 0.5 | 0.5 | cross_entropy with T^2 |
//!
//! The divergence is summed element by element: as a difference of two cross-entropies it would lose three digits in f32 at T = 20.
//! Releases that take the logarithm of a softmax (cls_KD) give NaN at logits of +-80 in f32; this one stays finite.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use kd_losses::kd::Params;
//! let z = Tensor::new(&[[0f64, 0.0]], &Device::Cpu)?;
//! let v = Tensor::new(&[[3f64.ln(), 0.0]], &Device::Cpu)?; // 3/4, 1/4 at T = 1
//! let loss = kd_losses::kd(&z, &v, &Params { temperature: 1.0, ..Params::default() })?.total()?.to_scalar::<f64>()?;
//! assert!((loss - (0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln())).abs() < 1e-12);
//! # Ok::<(), kd_core::Error>(())
//! ```

use candle_core::Tensor;
use kd_core::{LossTerms, Method, MethodEntry, Needs, ParamDoc, ParityInputs, ParityOutput, Result, StepView};
use serde::{Deserialize, Serialize};

use crate::inputs;
use crate::registry::parse;
use crate::softmax::Softmax;

/// What is measured between the two distributions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// Kullback-Leibler divergence: 0 for equal logits.
    Kl,
    /// Cross-entropy: the divergence plus the teacher's entropy.
    CrossEntropy,
}

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// T, above 0.
    pub temperature: f64,
    /// What is measured.
    pub form: Form,
    /// Whether the value is multiplied by T^2, which keeps the size of the gradient independent of T.
    pub t_squared: bool,
}

impl Default for Params {
    fn default() -> Self {
        Self { temperature: 4.0, form: Form::Kl, t_squared: true }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::positive("temperature", self.temperature)
    }
}

/// Distillation of `student` `[B,K]` by `teacher` `[B,K]`, which is detached.
///
/// # Errors
/// Logits that are not finite, differ in shape, have no row or fewer than two classes; parameters out of range.
pub fn kd(student: &Tensor, teacher: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (_, _, teacher) = inputs::both_logits(student, teacher)?;
    let t = params.temperature;
    let rows = rows(&(student / t)?, &(teacher / t)?, params.form)?;
    let scale = if params.t_squared { t * t } else { 1.0 };
    Ok(LossTerms::one("kd", (rows.mean_all()? * scale)?))
}

/// Each row's measure between logits that are divided by T already, `[B]`.
pub(crate) fn rows(z: &Tensor, v: &Tensor, form: Form) -> Result<Tensor> {
    let (p, q) = (Softmax::new(z)?, Softmax::new(v)?);
    match form {
        Form::Kl => p.kl(&q),
        Form::CrossEntropy => p.cross_entropy_with(&q),
    }
}

struct Kd {
    params: Params,
}

impl Method for Kd {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs::logits()
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        kd(step.student()?.logits()?, step.teacher()?.logits()?, &self.params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    Ok(kd(inputs.get("student.logits")?, inputs.get("teacher.logits")?, &inputs.params()?)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "kd",
    about: "softened logits of the teacher (Hinton)",
    source: "Hinton et al., NIPS 2014 workshop, arXiv 1503.02531",
    year: 2015,
    parameters: &[
        ParamDoc { name: "temperature", default: "4.0", range: "> 0", about: "T" },
        ParamDoc {
            name: "form",
            default: "\"kl\"",
            range: "\"kl\" | \"cross_entropy\"",
            about: "divergence, or plus the teacher's entropy",
        },
        ParamDoc { name: "t_squared", default: "true", range: "true | false", about: "multiply by T^2" },
    ],
    build: |params| Ok(Box::new(Kd { params: parse(params, Params::validate)? })),
    parity,
    raw_terms: false,
};
