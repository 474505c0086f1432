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
//! Term: `ce`, the only one tagged [`Tag::Task`]. No parameters; its weight is that of its `[[loss]]` entry:
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
use kd_core::{LossTerms, Method, MethodEntry, Needs, ParityInputs, ParityOutput, Result, StepView, Tag};
use serde::{Deserialize, Serialize};

use crate::labels::{self, Labels};
use crate::registry::{parity_labels, parse};
use crate::{inputs, softmax};

/// No parameters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Params {}

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

struct Ce;

impl Method for Ce {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs::supervised()
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        ce(step.student()?.logits()?, labels::of(step.batch))
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
    parameters: &[],
    build: |params| parse::<Params>(params, |_| Ok(())).map(|_| Box::new(Ce) as Box<dyn Method>),
    parity,
    raw_terms: false,
};
