//! `nd`: norm and direction of the student's feature, the loss of KD++.
//!
//! Wang et al., "Improving Knowledge Distillation via Regularizing Feature Norm and Direction", ECCV 2024, arXiv 2305.17007.
//!
//! ```text
//! value = mean_b [ 1 - f_s . e_y / max(|f_s|, |f_t|) ],   e_k = c_k / |c_k|
//! ```
//!
//! One minus a ratio of lengths, in 0..=2: the loss lengthens the student's feature along the class direction until it is as long as the
//! teacher's, and from then on only turns it.
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `f_s` | student embedding (behind the adapter, if there is one) | `[B,D]` |
//! | `f_t` | teacher embedding, detached | `[B,D]` |
//! | `c` | class means of the teacher's embedding ([`ClassMeans`]) | `[K,D]` |
//! | `y` | labels; of soft targets (mixup) the means are mixed before they are normalised | `[B]` integers, or `[B,K]` probabilities |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `adapter` | `"auto"` | `"auto"`, `"none"`, `"bn_dropout_linear"` | see [`Adapter`]; auto: only where the widths differ |
//! | `eps` | 1e-12 | > 0 | a feature of at most this length is a constant of this length |
//! | `bn_eps` | 1e-5 | > 0 | of the adapter's batch norm |
//! | `dropout` | 0.5 | 0..1 | of the adapter |
//!
//! Term: `nd`. Gradient of `f_s`: where `|f_t| > |f_s|` the denominator is a constant, `-e_y / (|f_t| B)`; otherwise it runs through the
//! student's length, a tie included, as in the release. A student feature of no length before a teacher's of some counts 1 with the first
//! gradient; where both have none the sample counts 1 without a gradient (the release gives NaN). The release loops over samples and
//! calls the distance's per-sample form the loss; the mean over the batch is the same number. Weights beside `ce` and `kd`:
//! [`kd_pp`](mod@crate::kd_pp).
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use kd_losses::{ClassMeans, nd::Params};
//! let t = |v: [[f64; 2]; 2]| Tensor::new(&v, &Device::Cpu);
//! let means = ClassMeans::new(&t([[2.0, 0.0], [0.0, 3.0]])?)?;
//! let y = Tensor::new(&[0i64, 1], &Device::Cpu)?;
//! // along its class at half the teacher's length: 1/2; at a right angle to it: 1
//! let loss = kd_losses::nd(&t([[1.0, 0.0], [4.0, 0.0]])?, &t([[0.0, 2.0], [2.0, 0.0]])?, &means, &y, &Params::default())?;
//! assert!((loss.total()?.to_scalar::<f64>()? - 0.75).abs() < 1e-12);
//! # Ok::<(), kd_core::Error>(())
//! ```

use std::sync::Arc;

use candle_core::Tensor;
use kd_core::{Cut, Error, LossTerms, Method, MethodEntry, Model, Needs, ParamDoc, ParityInputs, ParityOutput, Result, Setup, StepView};
use kd_nn::Network;
use serde::{Deserialize, Serialize};

use crate::adapter::{self, Adapter};
use crate::class_means::ClassMeans;
use crate::inputs;
use crate::labels::{self, Labels};
use crate::norms::row_norm;
use crate::registry::{parity_labels, parse};

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
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
        Self { adapter: Adapter::Auto, eps: 1e-12, bn_eps: 1e-5, dropout: 0.5 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::positive("eps", self.eps)?;
        self.adapter_config().validate()
    }

    pub(crate) fn adapter_config(&self) -> adapter::Config {
        adapter::Config { kind: self.adapter, bn_eps: self.bn_eps, dropout: self.dropout }
    }
}

/// Norm-and-direction loss of `student` `[B,D]` (adapted already) and `teacher` `[B,D]`, which is detached; `labels` are class indices
/// `[B]` or class probabilities `[B,K]`. Of the parameters it uses `eps`.
///
/// # Errors
/// Embeddings that are not finite, have no row or differ in shape from each other or in width from the class means; labels outside the
/// classes; parameters out of range.
pub fn nd(student: &Tensor, teacher: &Tensor, means: &ClassMeans, labels: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (_, d, teacher) = inputs::both_embeddings(student, teacher)?;
    means.check_width(d)?;
    let directions = means.of(&Labels::new(labels, means.classes(), student)?)?;
    let (n_s, n_t) = (row_norm(student, params.eps)?, row_norm(&teacher, params.eps)?);
    // A choice, not an elementwise maximum, which would halve the gradient of a tie.
    let longer = n_s.detach().ge(&n_t)?.where_cond(&n_s, &n_t)?;
    let alive = longer.detach().gt(params.eps)?.to_dtype(student.dtype())?;
    let along = (student.broadcast_mul(&alive)? * directions)?.sum_keepdim(1)?;
    let value = (1.0 - (along / longer)?)?.mean_all()?;
    Ok(LossTerms::one("nd", value))
}

/// What KD++ methods build once: the class means and the adapter to their width.
#[derive(Default)]
pub(crate) struct Prepared {
    means: Option<ClassMeans>,
    pub(crate) adapter: Option<Arc<Network>>,
}

impl Prepared {
    pub(crate) fn new(setup: &Setup<'_>, config: adapter::Config, method: &str) -> Result<Self> {
        let means = setup.class_means.ok_or_else(|| Error::missing(method, "class means"))?;
        let means = ClassMeans::new(&means.to_device(setup.device)?.to_dtype(setup.dtype)?)?;
        means.check_classes(setup.classes)?;
        Ok(Self { adapter: config.build(setup, means.dims().1, method)?, means: Some(means) })
    }

    pub(crate) fn means(&self, method: &str) -> Result<&ClassMeans> {
        self.means.as_ref().ok_or_else(|| Error::missing(method, "class means (`prepare` gives them)"))
    }
}

struct Nd {
    params: Params,
    prepared: Prepared,
}

impl Method for Nd {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        let embedding = vec![Cut::Embedding];
        Needs { student: embedding.clone(), teacher: embedding, labels: true, class_means: true, ..Needs::default() }
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
        let means = self.prepared.means(ENTRY.name)?;
        nd(&student, step.teacher()?.embedding()?, means, labels::of(step.batch), &self.params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let params: Params = inputs.params()?;
    let means = ClassMeans::new(inputs.get("class_means")?)?;
    let student = params.adapter_config().parity(inputs, means.dims().1)?;
    Ok(nd(&student, inputs.get("teacher.embedding")?, &means, parity_labels(inputs)?, &params)?.into())
}

/// Parameters that every loss with an adapter has.
pub(crate) const ADAPTER: ParamDoc = ParamDoc {
    name: "adapter",
    default: "\"auto\"",
    range: "\"auto\" | \"none\" | \"bn_dropout_linear\"",
    about: "brings the student's embedding to the teacher's width",
};
pub(crate) const EPS: ParamDoc =
    ParamDoc { name: "eps", default: "1e-12", range: "> 0", about: "a feature of at most this length is a constant" };
pub(crate) const BN_EPS: ParamDoc = ParamDoc { name: "bn_eps", default: "1e-5", range: "> 0", about: "of the adapter's batch norm" };
pub(crate) const DROPOUT: ParamDoc = ParamDoc { name: "dropout", default: "0.5", range: "0..1", about: "of the adapter" };

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "nd",
    about: "norm and direction of the embedding (the loss of KD++)",
    source: "Wang et al., ECCV 2024, arXiv 2305.17007",
    year: 2023,
    parameters: &[ADAPTER, EPS, BN_EPS, DROPOUT],
    build: |params| Ok(Box::new(Nd { params: parse(params, Params::validate)?, prepared: Prepared::default() })),
    parity,
    raw_terms: false,
};
