//! `nd_infonce`: the own class mean against those of the other classes, an ablation of KD++.
//!
//! Wang et al., "Improving Knowledge Distillation via Regularizing Feature Norm and Direction", ECCV 2024, arXiv 2305.17007.
//!
//! ```text
//! value = mean_b H(onehot(y), softmax_k(cos(f_s, c_k) / temperature))
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `f_s` | student embedding (behind the adapter, if there is one) | `[B,D]` |
//! | `c` | class means of the teacher's embedding ([`ClassMeans`]) | `[K,D]` |
//! | `y` | labels | `[B]` integers, or `[B,K]` probabilities |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `temperature` | 0.1 | > 0 | the paper's value is unknown |
//! | `adapter`, `eps`, `bn_eps`, `dropout` | | | as in [`nd`](mod@crate::nd) |
//!
//! Term: `direction`. A feature of no length counts `log K` without a gradient. The teacher gives the class means once and is not run in
//! training.

use std::sync::Arc;

use candle_core::Tensor;
use kd_core::{Cut, LossTerms, Method, MethodEntry, Model, Needs, ParamDoc, ParityInputs, ParityOutput, Result, Setup, StepView};
use serde::{Deserialize, Serialize};

use crate::adapter::{self, Adapter};
use crate::class_means::ClassMeans;
use crate::labels::{self, Labels};
use crate::nd::{ADAPTER, BN_EPS, DROPOUT, EPS, Prepared};
use crate::norms::unit;
use crate::registry::{parity_labels, parse};
use crate::{inputs, softmax};

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Divides the cosines, above 0.
    pub temperature: f64,
    /// Which adapter stands behind the student's embedding.
    pub adapter: Adapter,
    /// Length at or below which a feature counts as none, above 0.
    pub eps: f64,
    /// Epsilon of the adapter's batch norm, above 0.
    pub bn_eps: f64,
    /// Dropout of the adapter, at least 0 and less than 1.
    pub dropout: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { temperature: 0.1, adapter: Adapter::Auto, eps: 1e-12, bn_eps: 1e-5, dropout: 0.5 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::positive("temperature", self.temperature)?;
        inputs::positive("eps", self.eps)?;
        self.adapter_config().validate()
    }

    fn adapter_config(&self) -> adapter::Config {
        adapter::Config { kind: self.adapter, bn_eps: self.bn_eps, dropout: self.dropout }
    }
}

/// Cross-entropy of the cosines between `student` `[B,D]` (adapted already) and every class mean; `labels` are class indices `[B]` or class
/// probabilities `[B,K]`. Of the parameters it uses `temperature` and `eps`.
///
/// # Errors
/// An embedding that is not finite, has no row or another width than the class means; labels outside the classes; parameters out of range.
pub fn nd_infonce(student: &Tensor, means: &ClassMeans, labels: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (_, d) = inputs::embedding("student.embedding", student)?;
    means.check_width(d)?;
    let labels = Labels::new(labels, means.classes(), student)?;
    let cosines = unit(student, params.eps)?.matmul(&means.directions(student)?.t()?)?;
    let log_p = softmax::log_softmax(&(cosines / params.temperature)?)?;
    Ok(LossTerms::one("direction", softmax::cross_entropy(&labels.q, &log_p)?.mean_all()?))
}

struct NdInfonce {
    params: Params,
    prepared: Prepared,
}

impl Method for NdInfonce {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { student: vec![Cut::Embedding], class_means: true, ..Needs::supervised() }
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        self.prepared = Prepared::new(setup, self.params.adapter_config(), ENTRY.name)?;
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        adapter::networks(self.prepared.adapter.as_ref())
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let student = adapter::apply(self.prepared.adapter.as_ref(), step)?;
        nd_infonce(&student, self.prepared.means(ENTRY.name)?, labels::of(step.batch), &self.params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let params: Params = inputs.params()?;
    let means = ClassMeans::new(inputs.get("class_means")?)?;
    let student = params.adapter_config().parity(inputs, means.dims().1)?;
    Ok(nd_infonce(&student, &means, parity_labels(inputs)?, &params)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "nd_infonce",
    about: "the own class mean against the others' (ablation of KD++)",
    source: "Wang et al., ECCV 2024, arXiv 2305.17007",
    year: 2023,
    parameters: &[
        ParamDoc { name: "temperature", default: "0.1", range: "> 0", about: "divides the cosines" },
        ADAPTER,
        EPS,
        BN_EPS,
        DROPOUT,
    ],
    build: |params| Ok(Box::new(NdInfonce { params: parse(params, Params::validate)?, prepared: Prepared::default() })),
    parity,
    raw_terms: false,
};
