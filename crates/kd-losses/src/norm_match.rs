//! `norm_match`: the student's feature as long as the teacher's, or equal to it; the "L2" ablation of KD++.
//!
//! Wang et al., "Improving Knowledge Distillation via Regularizing Feature Norm and Direction", ECCV 2024, arXiv 2305.17007.
//!
//! ```text
//! form = "norm":     value = mean_b (|f_s| - |f_t|)^2
//! form = "feature":  value = mean_b |f_s - f_t|^2
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `f_s` | student embedding (behind the adapter, if there is one) | `[B,D]` |
//! | `f_t` | teacher embedding, detached | `[B,D]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `form` | `"norm"` | `"norm"`, `"feature"` | the paper's baseline is one of the two; which is unknown |
//! | `adapter`, `eps`, `bn_eps`, `dropout` | | | as in [`nd`](mod@crate::nd) |
//!
//! Term: `norm`. No labels. A student feature of no length receives no gradient from the norm form.

use std::sync::Arc;

use candle_core::Tensor;
use kd_core::{Cut, LossTerms, Method, MethodEntry, Model, Needs, ParamDoc, ParityInputs, ParityOutput, Result, Setup, StepView};
use kd_nn::Network;
use serde::{Deserialize, Serialize};

use crate::adapter::{self, Adapter};
use crate::inputs;
use crate::nd::{ADAPTER, BN_EPS, DROPOUT, EPS};
use crate::norms::row_norm;
use crate::registry::parse;

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// The lengths.
    Norm,
    /// The features, summed over their width.
    Feature,
}

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// What is compared.
    pub form: Form,
    /// Which adapter stands behind the student's embedding.
    pub adapter: Adapter,
    /// Length at or below which a feature counts as a constant of this length, above 0.
    pub eps: f64,
    /// Epsilon of the adapter's batch norm, above 0.
    pub bn_eps: f64,
    /// Dropout of the adapter, at least 0 and less than 1.
    pub dropout: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { form: Form::Norm, adapter: Adapter::Auto, eps: 1e-12, bn_eps: 1e-5, dropout: 0.5 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::positive("eps", self.eps)?;
        self.adapter_config().validate()
    }

    fn adapter_config(&self) -> adapter::Config {
        adapter::Config { kind: self.adapter, bn_eps: self.bn_eps, dropout: self.dropout }
    }
}

/// Squared distance in length, or as features, between `student` `[B,D]` (adapted already) and `teacher` `[B,D]`, which is detached. Of the
/// parameters it uses `form` and `eps`.
///
/// # Errors
/// Embeddings that are not finite, have no row or differ in shape; parameters out of range.
pub fn norm_match(student: &Tensor, teacher: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (_, _, teacher) = inputs::both_embeddings(student, teacher)?;
    let value = match params.form {
        Form::Norm => (row_norm(student, params.eps)? - row_norm(&teacher, params.eps)?)?.sqr()?.mean_all()?,
        Form::Feature => (student - teacher)?.sqr()?.sum(1)?.mean_all()?,
    };
    Ok(LossTerms::one("norm", value))
}

struct NormMatch {
    params: Params,
    adapter: Option<Arc<Network>>,
}

impl Method for NormMatch {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { student: vec![Cut::Embedding], teacher: vec![Cut::Embedding], ..Needs::default() }
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        let width = setup.teacher(ENTRY.name)?.spec().embedding;
        self.adapter = self.params.adapter_config().build(setup, width, ENTRY.name)?;
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        adapter::networks(self.adapter.as_ref())
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        norm_match(&adapter::apply(self.adapter.as_ref(), step)?, step.teacher()?.embedding()?, &self.params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let params: Params = inputs.params()?;
    let teacher = inputs.get("teacher.embedding")?;
    let (_, width) = inputs::embedding("teacher.embedding", teacher)?;
    Ok(norm_match(&params.adapter_config().parity(inputs, width)?, teacher, &params)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "norm_match",
    about: "features as long as, or equal to, the teacher's (ablation of KD++)",
    source: "Wang et al., ECCV 2024, arXiv 2305.17007",
    year: 2023,
    parameters: &[
        ParamDoc { name: "form", default: "\"norm\"", range: "\"norm\" | \"feature\"", about: "what is compared" },
        ADAPTER,
        EPS,
        BN_EPS,
        DROPOUT,
    ],
    build: |params| Ok(Box::new(NormMatch { params: parse(params, Params::validate)?, adapter: None })),
    parity,
    raw_terms: false,
};
