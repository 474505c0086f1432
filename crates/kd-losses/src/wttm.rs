//! `wttm`: the teacher's prediction is transformed by a power and matched at the student's own temperature.
//!
//! Zheng and Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024, arXiv 2402.11148.
//!
//! ```text
//! p_k   = v_k^gamma / U,   U = sum_k v_k^gamma,   v = softmax(z_t)
//! value = mean_b U_b KL(p || softmax(z_s))        without `weighted` (TTM): mean_b KL(p || softmax(z_s))
//! ```
//!
//! A power `gamma` is a temperature `1 / gamma` on the teacher's side alone; that the student has none adds a Renyi entropy to the loss,
//! which keeps it from being overconfident. `U` is large where the teacher is unsure: such samples weigh more. Against [`kd`](mod@crate::kd)
//! there is no temperature of the student and no factor `T^2`.
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `z_s`, `z_t` | logits of student and teacher (detached) | `[B,K]` |
//! | `U` | sample weight, in 1..=K^(1-gamma) for `gamma` up to 1; detached | `[B]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `gamma` | 0.2 | > 0 | the power |
//! | `weighted` | true | | false: TTM |
//!
//! Term: `wttm`. Use with `ce` of weight 1. The authors' examples: vgg13-vgg8 TTM with gamma 0.1 and weight 45; vgg13-vgg8 CRD 0.8 with
//! WTTM, gamma 0.2 and weight 4. Their values for the other pairs were not found. Cost O(BK), no state.
//!
//! Checked: formula read in the authors' code (zkxufo/TTM), value and gradient against an independent f64 implementation. The release
//! takes powers of probabilities that may have underflowed; here the power acts on logarithms.
//!
//! Published, CIFAR-100 top-1: wrn40_2-wrn16_2 76.37, wrn40_2-wrn40_1 74.58, res56-res20 71.92, res110-res20 71.67, res110-res32 74.13,
//! res32x4-res8x4 76.06, vgg13-vgg8 74.44; ImageNet R34-R18 72.19, R50-MobileNet 73.09.

use candle_core::Tensor;
use kd_core::{LossTerms, Method, MethodEntry, Needs, ParamDoc, ParityInputs, ParityOutput, Result, StepView};
use serde::{Deserialize, Serialize};

use crate::inputs;
use crate::registry::parse;
use crate::softmax::{self, Softmax};

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// The power, above 0.
    pub gamma: f64,
    /// Whether samples of which the teacher is unsure weigh more.
    pub weighted: bool,
}

impl Default for Params {
    fn default() -> Self {
        Self { gamma: 0.2, weighted: true }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::positive("gamma", self.gamma)
    }
}

/// Transformed teacher matching of `student` `[B,K]` and `teacher` `[B,K]`, which is detached.
///
/// # Errors
/// Logits that are not finite, differ in shape, have no row or fewer than two classes; parameters out of range.
pub fn wttm(student: &Tensor, teacher: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (.., teacher) = inputs::both_logits(student, teacher)?;
    let powers = (softmax::log_softmax(&teacher)? * params.gamma)?;
    let kl = Softmax::new(student)?.kl(&Softmax::new(&powers)?)?;
    let kl = if params.weighted { (kl * powers.exp()?.sum(1)?)? } else { kl };
    Ok(LossTerms::one("wttm", kl.mean_all()?))
}

struct Wttm {
    params: Params,
}

impl Method for Wttm {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs::logits()
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        wttm(step.student()?.logits()?, step.teacher()?.logits()?, &self.params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    Ok(wttm(inputs.get("student.logits")?, inputs.get("teacher.logits")?, &inputs.params()?)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "wttm",
    about: "the student matches a power of the teacher's prediction, samples weighted by how unsure the teacher is",
    source: "Zheng and Yang, ICLR 2024, arXiv 2402.11148",
    year: 2024,
    parameters: &[
        ParamDoc { name: "gamma", default: "0.2", range: "> 0", about: "power of the teacher's prediction" },
        ParamDoc { name: "weighted", default: "true", range: "true | false", about: "false: every sample alike (TTM)" },
    ],
    build: |params| Ok(Box::new(Wttm { params: parse(params, Params::validate)? })),
    parity,
    raw_terms: true,
};
