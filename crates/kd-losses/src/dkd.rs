//! `dkd`: decoupled knowledge distillation, the target class and the others apart.
//!
//! Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679.
//!
//! ```text
//! a = softmax(z/T)_y                            probability of the label
//! b = softmax(z/T) without y, renormalised      distribution over the other classes
//! tckd = T^2 mean_b KL([a_t, 1-a_t] || [a_s, 1-a_s])
//! nckd = T^2 mean_b KL(b_t || b_s)
//! value = alpha tckd + beta nckd
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `z` | student logits (`a_s`, `b_s`) | `[B,K]` |
//! | `v` | teacher logits, detached (`a_t`, `b_t`) | `[B,K]` |
//! | `y` | labels; of soft targets the heaviest class | `[B]` integers, or `[B,K]` probabilities |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `temperature` | 4 | > 0 | T |
//! | `alpha` | 1 | >= 0 | weight of the target part |
//! | `beta` | 8 | >= 0 | weight of the other classes |
//!
//! Terms: `tckd` (weight `alpha`), `nckd` (weight `beta`). Use with `ce` of weight 1 and a warm-up of 20 epochs (CIFAR-100, counted from
//! 1) or 1 epoch (ImageNet). The authors' settings (mdistiller):
//!
//! | pair | alpha | beta | T |
//! |---|---|---|---|
//! | CIFAR-100 res32x4-res8x4, res32x4-shuffleV1, res32x4-shuffleV2, res50-mobileV2, wrn40_2-shuffleV1 | 1 | 8 | 4 |
//! | CIFAR-100 res56-res20, res110-res32 | 1 | 2 | 4 |
//! | CIFAR-100 vgg13-vgg8, vgg13-mobileV2, wrn40_2-wrn16_2, wrn40_2-wrn40_1 | 1 | 6 | 4 |
//! | ImageNet R34-R18 / R50-MobileNet | 1 | 0.5 / 2 | 1 |
//!
//! The release subtracts 1000 from the label's logit and takes logarithms of summed softmax values: NaN in f32 at logits of +-80, and
//! for a teacher and student that are both exactly one-hot. Here `[a, 1-a]` is a softmax of two logits, the label's log-odds
//! `z_y/T - logsumexp(others/T)` and 0, and `b` a softmax over the others: the same numbers wherever the release's are finite. With two
//! classes `nckd` is exactly 0.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use kd_losses::dkd::Params;
//! let z = Tensor::new(&[[0f64, 0.0]], &Device::Cpu)?;
//! let v = Tensor::new(&[[3f64.ln(), 0.0]], &Device::Cpu)?; // a_t = 3/4, a_s = 1/2
//! let y = Tensor::new(&[0i64], &Device::Cpu)?;
//! let terms = kd_losses::dkd(&z, &v, &y, &Params { temperature: 1.0, ..Params::default() })?;
//! assert!((terms.total()?.to_scalar::<f64>()? - (0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln())).abs() < 1e-12);
//! # Ok::<(), kd_core::Error>(())
//! ```

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
    /// T, above 0.
    pub temperature: f64,
    /// Weight of the target part, at least 0.
    pub alpha: f64,
    /// Weight of the other classes, at least 0.
    pub beta: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { temperature: 4.0, alpha: 1.0, beta: 8.0 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::positive("temperature", self.temperature)?;
        inputs::not_negative("alpha", self.alpha)?;
        inputs::not_negative("beta", self.beta)
    }
}

/// Decoupled distillation of `student` `[B,K]` by `teacher` `[B,K]`, which is detached; `labels` are class indices `[B]` or class
/// probabilities `[B,K]`.
///
/// # Errors
/// Logits that are not finite, differ in shape, have no row or fewer than two classes; labels outside them; parameters out of range.
pub fn dkd(student: &Tensor, teacher: &Tensor, labels: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (_, k, teacher) = inputs::both_logits(student, teacher)?;
    let y = Labels::new(labels, k, student)?.one_hot()?;
    let t = params.temperature;
    let [tckd, nckd] = rows(&(student / t)?, &(teacher / t)?, &y)?;
    let mean = |rows: Tensor| -> Result<Tensor> { Ok((rows.mean_all()? * (t * t))?) };
    Ok(LossTerms::new().with("tckd", mean(tckd)?, params.alpha).with("nckd", mean(nckd)?, params.beta))
}

/// Both divergences of each row `[B]` between logits that are divided by T already, for the labels' one-hot rows `y`.
pub(crate) fn rows(z: &Tensor, v: &Tensor, y: &Tensor) -> Result<[Tensor; 2]> {
    let tckd = Softmax::new(&one_against_others(z, y)?)?.kl(&Softmax::new(&one_against_others(v, y)?)?)?;
    let others = (1.0 - y)?;
    let nckd = Softmax::over(z, &others)?.kl(&Softmax::over(v, &others)?)?;
    Ok([tckd, nckd])
}

struct Dkd {
    params: Params,
}

impl Method for Dkd {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { labels: true, ..Needs::logits() }
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        dkd(step.student()?.logits()?, step.teacher()?.logits()?, labels::of(step.batch), &self.params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    Ok(dkd(inputs.get("student.logits")?, inputs.get("teacher.logits")?, parity_labels(inputs)?, &inputs.params()?)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "dkd",
    about: "decoupled distillation: the target class and the others apart",
    source: "Zhao et al., CVPR 2022, arXiv 2203.08679",
    year: 2022,
    parameters: &[
        ParamDoc { name: "temperature", default: "4.0", range: "> 0", about: "T" },
        ParamDoc { name: "alpha", default: "1.0", range: ">= 0", about: "weight of the target class" },
        ParamDoc { name: "beta", default: "8.0", range: ">= 0", about: "weight of the other classes" },
    ],
    build: |params| Ok(Box::new(Dkd { params: parse(params, Params::validate)? })),
    parity,
    raw_terms: false,
};
