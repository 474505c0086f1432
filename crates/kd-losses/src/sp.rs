//! `sp`: similarity-preserving distillation, which samples of a batch resemble each other.
//!
//! Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv 1907.09682.
//!
//! ```text
//! G(F)  = F F^T of the flattened maps,   N = each row divided by max(its length, eps)
//! value = sum_i |N(G(T_i)) - N(G(S_i))|^2 / B^2
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `S_i`, `T_i` | outputs of a stage, flattened by sample; channels and grids may differ | `[B,C,H,W]` |
//! | `G` | similarities | `[B,B]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `stages` | null | ascending | null: the last of each network |
//! | `eps` | 1e-12 | > 0 | |
//!
//! Terms: `stage.<i>`. Weight in the published CIFAR-100 tables: 3000, beside `ce` 1, for every pair. No adapter, no state.
//! Cost `O(B^2 C H W)`, cheap at a batch of 64; memory `B^2`.
//!
//! The similarities grow with the square of the features: f32 holds them, half precision would not. A batch of one has value and gradient
//! 0. On several GPUs the published runs see B per GPU.

use candle_core::Tensor;
use kd_core::{LossTerms, MethodEntry, ParamDoc, ParityInputs, ParityOutput, Result};
use kd_nn::ops;
use serde::{Deserialize, Serialize};

use crate::features::{Choice, Plain, StagePair, Stages, stages_doc};
use crate::inputs;
use crate::registry::parse;

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// The stages to compare; none: the last of each network.
    pub stages: Option<Vec<usize>>,
    /// The least length that a row is divided by, above 0.
    pub eps: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { stages: None, eps: 1e-12 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::positive("eps", self.eps)?;
        self.choice().validate()
    }

    fn choice(&self) -> Choice {
        Choice::outputs(&self.stages, Stages::Last)
    }
}

/// Similarity-preserving loss over `pairs`; the teacher's maps are detached.
///
/// # Errors
/// Maps that are not `[B,C,H,W]` or differ in their batch; parameters out of range.
pub fn sp(pairs: &[StagePair<'_>], params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let mut terms = LossTerms::new();
    for pair in pairs {
        let teacher = pair.teacher()?;
        let b = teacher.dim(0)?;
        let gap = (similarities(&teacher, params.eps)? - similarities(pair.student, params.eps)?)?;
        terms = terms.with(&pair.name(), (gap.sqr()?.sum_all()? / (b * b) as f64)?, 1.0);
    }
    Ok(terms)
}

fn similarities(f: &Tensor, eps: f64) -> Result<Tensor> {
    let rows = f.flatten_from(1)?;
    Ok(ops::l2_normalize(&rows.matmul(&rows.t()?)?, 1, eps)?)
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let params: Params = inputs.params()?;
    Ok(sp(&params.choice().parity(inputs)?, &params)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "sp",
    about: "similarity-preserving: which samples of the batch resemble each other",
    source: "Tung and Mori, ICCV 2019, arXiv 1907.09682",
    year: 2019,
    parameters: &[
        stages_doc("what is compared; null: the last of each network"),
        ParamDoc { name: "eps", default: "1e-12", range: "> 0", about: "least length that a row is divided by" },
    ],
    build: |params| {
        let params = parse(params, Params::validate)?;
        Ok(Box::new(Plain::new("sp", params.choice(), move |pairs: &[StagePair<'_>]| sp(pairs, &params))))
    },
    parity,
    raw_terms: true,
};
