//! `ce`: cross-entropy with the labels, the task loss beside which most methods stand.
//!
//! ```text
//! ce = mean_b H(q_b, softmax(z_b)),   H(q, p) = -sum_k q_k log p_k
//! gradient of z: (softmax(z) - q) / B
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `z` | student logits | `[B,K]` |
//! | `q` | one-hot labels, or soft targets (mixup, cutmix) | labels `[B]` integers, or `[B,K]` probabilities |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `view` | 0 | 0..=7 | which augmented view of the samples is classified; MLLD classifies both of its views |
//!
//! Term: `ce`, the only one tagged [`Tag::Task`]. Its weight is that of its `[[loss]]` entry:
//!
//! | recipe | weight of `ce` |
//! |---|---|
//! | KD, CIFAR-100 (mdistiller) | 0.1 |
//! | KD, ImageNet (mdistiller, cls_KD) | 0.5 |
//! | DKD, KD++ and its relatives, NKD, tf-NKD, USKD, FNKD's normalised form | 1.0 |
//!
//! Computed from log-softmax: finite for logits of any size.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! let z = Tensor::new(&[[0f64, 0.0], [3.0, 0.0]], &Device::Cpu)?;
//! let y = Tensor::new(&[0i64, 1], &Device::Cpu)?;
//! let loss = kd_losses::ce(&z, &y)?.total()?.to_scalar::<f64>()?;
//! // log 2 and log(1 + e^3), averaged
//! assert!((loss - (2f64.ln() + 1.0 + 3f64.exp().ln_1p() - 1.0) / 2.0).abs() < 1e-12);
//! # Ok::<(), kd_core::Error>(())
//! ```

use candle_core::Tensor;
use kd_core::{Error, LossTerms, Method, MethodEntry, Needs, ParamDoc, ParityInputs, ParityOutput, Result, StepView, Tag};
use serde::{Deserialize, Serialize};

use crate::labels::{self, Labels};
use crate::registry::{parity_labels, parse};
use crate::{inputs, softmax};

/// Parameters; see the [module](self).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Which view of the samples is classified, from 0.
    pub view: usize,
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        if self.view <= 7 { Ok(()) } else { Err(Error::param("view", self.view, "in 0..=7")) }
    }
}

/// Cross-entropy of `student` `[B,K]` with `labels`, class indices `[B]` or class probabilities `[B,K]`.
///
/// # Errors
/// Logits that are not finite or have no row, fewer than two classes, labels outside them, probabilities that do not sum to 1.
pub fn ce(student: &Tensor, labels: &Tensor) -> Result<LossTerms> {
    let (_, k) = inputs::logits("student.logits", student)?;
    let labels = Labels::new(labels, k, student)?;
    let ce = softmax::cross_entropy(&labels.q, &softmax::log_softmax(student)?)?.mean_all()?;
    Ok(LossTerms::new().with_tag("ce", ce, 1.0, Tag::Task))
}

struct Ce {
    params: Params,
}

impl Method for Ce {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { views: self.params.view + 1, ..Needs::supervised() }
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let view = self.params.view;
        let student = step.student.get(view).ok_or_else(|| Error::missing(ENTRY.name, format!("the student's outputs on view {view}")))?;
        ce(student.logits()?, labels::of(step.batch))
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    inputs.params::<Params>()?;
    Ok(ce(inputs.get("student.logits")?, parity_labels(inputs)?)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "ce",
    about: "cross-entropy with the labels",
    source: "standard",
    year: 1989,
    parameters: &[ParamDoc { name: "view", default: "0", range: "0..=7", about: "which augmented view is classified" }],
    build: |params| Ok(Box::new(Ce { params: parse(params, Params::validate)? })),
    parity,
    raw_terms: false,
};
