//! `crld`: two views of every sample teach each other's predictions, as far as the teacher is sure.
//!
//! Zhang et al., "Cross-View Consistency Regularisation for Knowledge Distillation", ACM MM 2024, arXiv 2412.16493.
//!
//! ```text
//! KD(s, t) = T^2 KL(softmax(z_t/T) || softmax(z_s/T))  of a student's view s and a teacher's view t, each weak (w) or strong (a)
//! within   = mean_b [max softmax(t_w) >= tau_weak]   (KD(s_w, t_w) + KD(s_a, t_a))
//! cross    = mean_b [max softmax(t_a) >= tau_strong] (KD(s_a, t_w) + KD(s_w, t_a))
//! value    = strong_ce_weight ce(s_a) + within_weight within + cross_weight cross
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `s_w`, `t_w` | logits of the first, weakly augmented view | `[B,K]` |
//! | `s_a`, `t_a` | logits of the second, strongly augmented one (RandAugment) | `[B,K]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `temperature` | 4 | > 0 | T |
//! | `within_weight`, `cross_weight` | 2, 0.5 | >= 0 | |
//! | `tau_weak`, `tau_strong` | 0.9, 0.2 | 0..=1 | confidence that the teacher must have, at temperature 1 |
//! | `strong_ce_weight` | 1 | >= 0 | cross-entropy of the strong view, part of the method |
//!
//! Terms: `strong_ce` (a task term), `within`, `cross`. Use with `ce` of weight 1, which sees the weak view. ImageNet: T 1, both
//! cross-entropies 2. Cost: both networks see every sample twice; O(BK) on top. No state.
//!
//! The mask of a term is that of one view although both teachers' views appear in it, as released. Checked: formula and values read in
//! two copies of the released code (scx-822/CRLD-main, haiduo/DeepKD), whose originals were not found; value and gradient against an
//! independent f64 implementation; the paper's text was not compared.

use candle_core::Tensor;
use kd_core::{LossTerms, Method, MethodEntry, Needs, ParamDoc, ParityInputs, ParityOutput, Result, StepView, Tag};
use serde::{Deserialize, Serialize};

use crate::registry::{parity_labels, parse};
use crate::softmax::Softmax;
use crate::{ce, inputs, labels};

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// T, above 0.
    pub temperature: f64,
    /// Weight of `within`, at least 0.
    pub within_weight: f64,
    /// Weight of `cross`, at least 0.
    pub cross_weight: f64,
    /// Confidence on the weak view from which `within` counts, in 0..=1.
    pub tau_weak: f64,
    /// Confidence on the strong view from which `cross` counts, in 0..=1.
    pub tau_strong: f64,
    /// Weight of the strong view's cross-entropy, at least 0.
    pub strong_ce_weight: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { temperature: 4.0, within_weight: 2.0, cross_weight: 0.5, tau_weak: 0.9, tau_strong: 0.2, strong_ce_weight: 1.0 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::positive("temperature", self.temperature)?;
        inputs::not_negative("within_weight", self.within_weight)?;
        inputs::not_negative("cross_weight", self.cross_weight)?;
        inputs::share("tau_weak", self.tau_weak)?;
        inputs::share("tau_strong", self.tau_strong)?;
        inputs::not_negative("strong_ce_weight", self.strong_ce_weight)
    }
}

/// CRLD of the logits `[B,K]` of two views, weak and strong, of the student and of the teacher, whose are detached; `labels` are class
/// indices `[B]` or class probabilities `[B,K]`.
///
/// # Errors
/// Logits that are not finite, differ in shape, have no row or fewer than two classes; labels outside them; parameters out of range.
pub fn crld(student: [&Tensor; 2], teacher: [&Tensor; 2], labels: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let [weak, strong] = student;
    let (.., t_weak) = inputs::both_logits(weak, teacher[0])?;
    let (.., t_strong) = inputs::both_logits(strong, teacher[1])?;
    if weak.dims() != strong.dims() {
        let expected = format!("{:?}, as the weak view's", weak.dims());
        return Err(kd_core::Error::shape("student.strong.logits", expected, strong.dims()));
    }
    let t = params.temperature;
    let soft = |z: &Tensor| -> Result<Softmax> { Softmax::new(&(z / t)?) };
    let (s, v) = ([soft(weak)?, soft(strong)?], [soft(&t_weak)?, soft(&t_strong)?]);
    let sure = |z: &Tensor, tau: f64| -> Result<Tensor> { Ok(Softmax::new(z)?.p().max(1)?.ge(tau)?.to_dtype(weak.dtype())?) };
    let masked = |a: Tensor, b: Tensor, mask: Tensor| -> Result<Tensor> { Ok((((a + b)? * mask)?.mean_all()? * (t * t))?) };
    let within = masked(s[0].kl(&v[0])?, s[1].kl(&v[1])?, sure(&t_weak, params.tau_weak)?)?;
    let cross = masked(s[1].kl(&v[0])?, s[0].kl(&v[1])?, sure(&t_strong, params.tau_strong)?)?;
    let mut terms = LossTerms::new();
    for term in ce(strong, labels)?.terms {
        terms = terms.with_tag("strong_ce", term.raw, params.strong_ce_weight * term.weight, Tag::Task);
    }
    Ok(terms.with("within", within, params.within_weight).with("cross", cross, params.cross_weight))
}

struct Crld {
    params: Params,
}

impl Method for Crld {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { labels: true, views: 2, ..Needs::logits() }
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let missing = || kd_core::Error::missing(ENTRY.name, "two views of each sample");
        let [weak, strong, ..] = step.student else { return Err(missing()) };
        let teacher = step.teachers.first().ok_or_else(|| kd_core::Error::missing(ENTRY.name, "a teacher"))?;
        let [t_weak, t_strong, ..] = teacher.as_slice() else { return Err(missing()) };
        let labels = labels::of(step.batch);
        crld([weak.logits()?, strong.logits()?], [t_weak.logits()?, t_strong.logits()?], labels, &self.params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let student = [inputs.get("student.logits")?, inputs.get("student.strong.logits")?];
    let teacher = [inputs.get("teacher.logits")?, inputs.get("teacher.strong.logits")?];
    Ok(crld(student, teacher, parity_labels(inputs)?, &inputs.params()?)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "crld",
    about: "weak and strong views distil within and across each other, where the teacher is sure enough",
    source: "Zhang et al., ACM MM 2024, arXiv 2412.16493",
    year: 2024,
    parameters: &[
        ParamDoc { name: "temperature", default: "4.0", range: "> 0", about: "T of both sides" },
        ParamDoc { name: "within_weight", default: "2.0", range: ">= 0", about: "weight of the same view's distillation" },
        ParamDoc { name: "cross_weight", default: "0.5", range: ">= 0", about: "weight of the other view's distillation" },
        ParamDoc { name: "tau_weak", default: "0.9", range: "0..=1", about: "confidence from which the same view's counts" },
        ParamDoc { name: "tau_strong", default: "0.2", range: "0..=1", about: "confidence from which the other view's counts" },
        ParamDoc { name: "strong_ce_weight", default: "1.0", range: ">= 0", about: "weight of the strong view's cross-entropy" },
    ],
    build: |params| Ok(Box::new(Crld { params: parse(params, Params::validate)? })),
    parity,
    raw_terms: true,
};
