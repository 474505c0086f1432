//! `sifn`: stepwise increasing feature norm, an ablation of KD++.
//!
//! Xu et al., "Larger Norm More Transferable", ICCV 2019; in Wang et al., ECCV 2024, arXiv 2305.17007.
//!
//! ```text
//! value = mean_b (stop(|f_s|) + step - |f_s|)^2
//! ```
//!
//! The value is always `step^2`; its gradient `-2 step f_s / (|f_s| B)` lengthens every feature at the same pace.
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `f_s` | student embedding | `[B,D]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `step` | 1 | >= 0 | KD++'s value is unknown |
//! | `eps` | 1e-12 | > 0 | a feature of at most this length is a constant: no gradient |
//!
//! Term: `norm`. No teacher, no labels.

use candle_core::Tensor;
use kd_core::{Cut, LossTerms, Method, MethodEntry, Needs, ParamDoc, ParityInputs, ParityOutput, Result, StepView};
use serde::{Deserialize, Serialize};

use crate::inputs;
use crate::nd::EPS;
use crate::norms::row_norm;
use crate::registry::parse;

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// By how much each feature should be longer, at least 0.
    pub step: f64,
    /// Length at or below which a feature receives no gradient, above 0.
    pub eps: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { step: 1.0, eps: 1e-12 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::not_negative("step", self.step)?;
        inputs::positive("eps", self.eps)
    }
}

/// Stepwise increase of the length of `embedding` `[B,D]`.
///
/// # Errors
/// An embedding that is not finite or has no row, parameters out of range.
pub fn sifn(embedding: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    inputs::embedding("student.embedding", embedding)?;
    let norm = row_norm(embedding, params.eps)?;
    // The difference of the lengths first: it is exactly 0, and adding the step to a long length would round it.
    let missing = ((norm.detach() - norm)? + params.step)?;
    Ok(LossTerms::one("norm", missing.sqr()?.mean_all()?))
}

struct Sifn {
    params: Params,
}

impl Method for Sifn {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { student: vec![Cut::Embedding], ..Needs::default() }
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        sifn(step.student()?.embedding()?, &self.params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    Ok(sifn(inputs.get("student.embedding")?, &inputs.params()?)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "sifn",
    about: "stepwise increasing feature norm (ablation of KD++)",
    source: "Xu et al., ICCV 2019; Wang et al., ECCV 2024, arXiv 2305.17007",
    year: 2019,
    parameters: &[ParamDoc { name: "step", default: "1.0", range: ">= 0", about: "by how much each feature should be longer" }, EPS],
    build: |params| Ok(Box::new(Sifn { params: parse(params, Params::validate)? })),
    parity,
    raw_terms: false,
};
