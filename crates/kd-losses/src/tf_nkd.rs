//! `tf_nkd`: teacher-free normalised knowledge distillation, the student's own confidence as soft label.
//!
//! Yang et al., "Rethinking Knowledge Distillation via Cross-Entropy", arXiv 2208.10139 (2022).
//!
//! ```text
//! s = softmax(z)_y,   w = stop(s + 1 - mean_b s)
//! value = -mean_b w log softmax(z)_y
//! soft targets: j runs over the two largest of each row, u_j their values;
//!         w_j = stop(s_j + u_j - mean_b s_j), 0 where u_j = 0;   value = -mean_b sum_j w_j log softmax(z)_j
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `z` | student logits | `[B,K]` |
//! | `y` | labels | `[B]` integers, or `[B,K]` probabilities (mixup, cutmix) |
//!
//! No parameters. Term: `soft`. Use with `ce` of weight 1. The batch mean ties the samples of a batch together, but carries no gradient; in
//! a batch of one, w = 1 and the loss is cross-entropy. Among equal target values the lower class comes first. The authors' repository
//! dropped tf-NKD when USKD ([`uskd`](mod@crate::uskd)) came.

use candle_core::Tensor;
use kd_core::{LossTerms, Method, MethodEntry, Needs, ParityInputs, ParityOutput, Result, StepView};
use serde::{Deserialize, Serialize};

use crate::labels::{self, Labels};
use crate::registry::{parity_labels, parse};
use crate::{inputs, softmax};

/// No parameters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Params {}

/// Teacher-free NKD on `student` `[B,K]` with `labels`, class indices `[B]` or class probabilities `[B,K]`.
///
/// # Errors
/// As [`ce`](crate::ce()).
pub fn tf_nkd(student: &Tensor, labels: &Tensor) -> Result<LossTerms> {
    let (_, k) = inputs::logits("student.logits", student)?;
    let labels = Labels::new(labels, k, student)?;
    Ok(LossTerms::one("soft", target(&softmax::log_softmax(student)?, &labels, |s| Ok(s.clone()))?))
}

/// `-mean_b sum_j w_j log p_j` with the detached weight `g(p_j) + u_j - mean_b g(p_j)`, 0 where `u_j` is 0.
pub(crate) fn target(log_p: &Tensor, labels: &Labels, g: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> Result<Tensor> {
    let mut rows = Tensor::zeros(log_p.dim(0)?, log_p.dtype(), log_p.device())?;
    for pick in labels.picks()? {
        let log_p_j = labels::at(log_p, &pick.one_hot)?;
        let g_j = g(&log_p_j.detach().exp()?)?;
        let present = pick.share.gt(0.0)?.to_dtype(log_p.dtype())?;
        let w = ((&g_j + &pick.share)?.broadcast_sub(&g_j.mean_all()?)? * present)?;
        rows = (rows - (w * log_p_j)?)?;
    }
    Ok(rows.mean_all()?)
}

struct TfNkd;

impl Method for TfNkd {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs::supervised()
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        tf_nkd(step.student()?.logits()?, labels::of(step.batch))
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    inputs.params::<Params>()?;
    Ok(tf_nkd(inputs.get("student.logits")?, parity_labels(inputs)?)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "tf_nkd",
    about: "teacher-free NKD: cross-entropy weighted by the student's own, batch-centred confidence",
    source: "Yang et al., arXiv 2208.10139",
    year: 2022,
    parameters: &[],
    build: |params| parse::<Params>(params, |_| Ok(())).map(|_| Box::new(TfNkd) as Box<dyn Method>),
    parity,
    raw_terms: false,
};
