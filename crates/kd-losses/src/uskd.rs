//! `uskd`: universal self-knowledge distillation, soft labels from the student itself and a Zipf distribution.
//!
//! Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and Customized Soft
//! Labels", ICCV 2023, arXiv 2303.13005.
//!
//! ```text
//! p = softmax(z),  p_w = softmax(fc(m)),  s = p_y
//! target     = -mean_b w log p_y,                w = stop(s^2 + 1 - mean_b s^2)
//! weak       = mean_b H(0.9 onehot(y) + 0.1/K, p_w)
//! non_target = mean_b H(Z, softmax(z without y)),  Z_k = 1/rank(k), without y, renormalised, detached
//! value      = alpha target + beta non_target + mu weak
//!
//! rank: by descending score, score = p_w / (1 - p_w[y] + rank_eps) + p / (1 - p[y] + rank_eps)             form = "paper"
//!                            score = p_w / (1 - p_w[y] + rank_eps) + log p / (1 - log p[y] + rank_eps)     form = "released"
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `z` | student logits | `[B,K]` |
//! | `m` | output of the next-to-last stage, averaged over positions; not detached: the weak branch trains the backbone | `[B,C]` |
//! | `fc` | a linear layer of the method's own, trained with the student | `[K,C]`, `[K]` |
//! | `y` | labels | `[B]` integers, or `[B,K]` probabilities (mixup, cutmix) |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `alpha`, `beta`, `mu` | 1, 0.1, 0.005 | >= 0 | weights of target, non_target, weak; all of the authors' ImageNet configs |
//! | `form` | `"paper"` | `"paper"`, `"released"` | which score ranks the classes |
//! | `zipf_slots` | `"all"` | `"all"`, `"non_target"` | whether the label takes part in the ranking and uses up a rank |
//! | `weak_smoothing` | 0.1 | 0..=1 | label smoothing of the weak branch |
//! | `rank_eps` | 1e-6 | > 0 | |
//!
//! Terms: `target`, `non_target`, `weak`. Use with `ce` of weight 1. CIFAR-100, ResNet-18: alpha = beta = mu = 0.1.
//!
//! `"paper"` is the code published with the preprint and what the text describes; `"released"`, the repository's head since July 2023,
//! ranks by log-probabilities, a side effect of replacing softmax by log-softmax. Both let the label use up a rank (`zipf_slots = "all"`);
//! `"non_target"` is another reading of the paper. Equal scores: the lower class first. Soft targets: the two largest entries of a row are
//! its labels, both removed from the non-targets and from both denominators (even where the second is 0, as released), each with its own
//! weight in `target` as in [`tf_nkd`](mod@crate::tf_nkd); the weak branch's labels become 0.9 times the targets plus 0.1/K. With no
//! class left over, `non_target` is 0. Scores that nearly tie may rank differently in f32 and f64.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use kd_core::{
    Cut, Error, LossTerms, Method, MethodEntry, Mode, Model, Needs, ParamDoc, ParityInputs, ParityOutput, Result, Setup, StepView,
};
use kd_nn::{GraphBuilder, Network};
use serde::{Deserialize, Serialize};

use crate::labels::{self, Labels};
use crate::registry::{parity_labels, parse};
use crate::softmax::{self, Softmax};
use crate::{inputs, tf_nkd};

/// Which score ranks the classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// Normalised probabilities of both branches.
    Paper,
    /// Log-probabilities of the final branch.
    Released,
}

/// Which classes share the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ZipfSlots {
    /// All: the label uses up a rank.
    All,
    /// Those that are no label.
    NonTarget,
}

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Weight of `target`, at least 0.
    pub alpha: f64,
    /// Weight of `non_target`, at least 0.
    pub beta: f64,
    /// Weight of `weak`, at least 0.
    pub mu: f64,
    /// Which score ranks the classes.
    pub form: Form,
    /// Which classes share the ranks.
    pub zipf_slots: ZipfSlots,
    /// Label smoothing of the weak branch, in 0..=1.
    pub weak_smoothing: f64,
    /// Added to the denominators of the score, above 0.
    pub rank_eps: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { alpha: 1.0, beta: 0.1, mu: 0.005, form: Form::Paper, zipf_slots: ZipfSlots::All, weak_smoothing: 0.1, rank_eps: 1e-6 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::not_negative("alpha", self.alpha)?;
        inputs::not_negative("beta", self.beta)?;
        inputs::not_negative("mu", self.mu)?;
        inputs::share("weak_smoothing", self.weak_smoothing)?;
        inputs::positive("rank_eps", self.rank_eps)
    }
}

/// USKD on `student` `[B,K]` and the weak branch's logits `weak` `[B,K]` (a linear layer on a middle feature); `labels` are class indices
/// `[B]` or class probabilities `[B,K]`.
///
/// # Errors
/// Logits that are not finite, differ in shape, have no row or fewer than two classes; labels outside them; parameters out of range.
pub fn uskd(student: &Tensor, weak: &Tensor, labels: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (b, k) = inputs::logits("student.logits", student)?;
    inputs::logits("weak logits", weak)?;
    if weak.dims() != student.dims() {
        return Err(Error::shape("weak logits", format!("{:?}, as the student's", student.dims()), weak.dims()));
    }
    let labels = Labels::new(labels, k, student)?;
    let (log_p, log_w) = (softmax::log_softmax(student)?, softmax::log_softmax(weak)?);

    let target = tf_nkd::target(&log_p, &labels, |s| s.sqr())?;

    let smoothed = (&labels.q * (1.0 - params.weak_smoothing))? + params.weak_smoothing / k as f64;
    let weak = softmax::cross_entropy(&smoothed?, &log_w)?.mean_all()?;

    let picks = labels.picks()?;
    let non_target = if picks.len() < k {
        let mut others = Tensor::ones((b, k), student.dtype(), student.device())?;
        for pick in &picks {
            others = (others - &pick.one_hot)?;
        }
        let zipf = zipf(&score(&log_p, &log_w, &others, params)?, &others, params.zipf_slots)?;
        Softmax::over(student, &others)?.cross_entropy(&zipf)?.mean_all()?
    } else {
        Tensor::zeros((), student.dtype(), student.device())?
    };
    Ok(LossTerms::new().with("target", target, params.alpha).with("non_target", non_target, params.beta).with("weak", weak, params.mu))
}

/// What ranks the classes, `[B,K]`, detached.
fn score(log_p: &Tensor, log_w: &Tensor, others: &Tensor, params: &Params) -> Result<Tensor> {
    // 1 - p[y] as the sum of the others: next to a sure prediction the difference keeps no digit in f32.
    let normalised = |log: &Tensor| -> Result<Tensor> {
        let p = log.detach().exp()?;
        let rest = (p.clone() * others)?.sum_keepdim(1)?;
        Ok(p.broadcast_div(&(rest + params.rank_eps)?)?)
    };
    let own = match params.form {
        Form::Paper => normalised(log_p)?,
        Form::Released => {
            let log_p = log_p.detach();
            let at_labels = (&log_p * (1.0 - others)?)?.sum_keepdim(1)?;
            log_p.broadcast_div(&((1.0 - at_labels)? + params.rank_eps)?)?
        }
    };
    Ok((normalised(log_w)? + own)?)
}

/// The Zipf distribution over the classes that are no label, by descending score; of equal scores the lower class first.
fn zipf(score: &Tensor, others: &Tensor, slots: ZipfSlots) -> Result<Tensor> {
    let scores = score.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let others = others.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let mut z = Vec::with_capacity(score.elem_count());
    for (scores, others) in scores.iter().zip(&others) {
        let mut order: Vec<usize> = (0..scores.len()).filter(|&c| slots == ZipfSlots::All || others[c] > 0.0).collect();
        order.sort_by(|&i, &j| scores[j].total_cmp(&scores[i]));
        let mut row = vec![0.0; scores.len()];
        for (rank, &class) in order.iter().enumerate() {
            row[class] = others[class] / (rank + 1) as f64;
        }
        let sum: f64 = row.iter().sum();
        z.extend(row.iter().map(|v| v / sum));
    }
    Ok(Tensor::from_vec(z, score.shape(), score.device())?.to_dtype(score.dtype())?)
}

struct Uskd {
    params: Params,
    prepared: Option<(Cut, Arc<Network>)>,
}

impl Method for Uskd {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    /// The middle stage is known once the student is: after [`Method::prepare`].
    fn needs(&self) -> Needs {
        let mut needs = Needs::supervised();
        needs.student.extend(self.prepared.as_ref().map(|(stage, _)| *stage));
        needs
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        let spec = setup.models.student.spec();
        let Some(i) = spec.stages.len().checked_sub(2) else {
            return Err(Error::refused(format!("uskd: the student `{}` has no stage before its last", spec.name)));
        };
        let mut b = GraphBuilder::new("uskd.weak", &[spec.stages[i].channels]);
        b.linear("fc", setup.classes);
        b.cut(Cut::Logits);
        let network = Network::new(b.finish()?, setup.dtype, setup.device)?;
        network.init(setup.rng.named("weak"))?;
        self.prepared = Some((Cut::Stage(i), Arc::new(network)));
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        self.prepared.iter().map(|(_, network)| Arc::clone(network) as Arc<dyn Model>).collect()
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let (stage, network) = self.prepared.as_ref().ok_or_else(|| Error::missing(ENTRY.name, "its weak branch (`prepare` builds it)"))?;
        let student = step.student()?;
        let middle = pooled(student.get(*stage)?)?;
        let weak = network.run(&middle, Cut::Input, &[Cut::Logits], Mode::Train(step.rng.named("weak")))?;
        uskd(student.logits()?, weak.logits()?, labels::of(step.batch), &self.params)
    }
}

/// Mean over the positions: of `[B,C,H,W]` over height and width, of tokens `[B,N,C]` over the tokens.
fn pooled(x: &Tensor) -> Result<Tensor> {
    match x.rank() {
        4 => Ok(x.flatten_from(2)?.mean(2)?),
        3 => Ok(x.mean(1)?),
        _ => Ok(x.clone()),
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let student = inputs.get("student.logits")?;
    let (_, k) = inputs::logits("student.logits", student)?;
    let middle = inputs.get("student.mid_embedding")?;
    let (_, c) = inputs::embedding("student.mid_embedding", middle)?;
    let (weight, bias) = (inputs.get("param.fc.weight")?, inputs.get("param.fc.bias")?);
    if weight.dims() != [k, c] || bias.dims() != [k] {
        return Err(Error::shape("param.fc.weight", format!("[{k}, {c}] with a bias [{k}]"), weight.dims()));
    }
    let weak = middle.matmul(&weight.t()?)?.broadcast_add(bias)?;
    Ok(uskd(student, &weak, parity_labels(inputs)?, &inputs.params()?)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "uskd",
    about: "self-distillation: squared target confidence, Zipf ranks of a weak and the final prediction",
    source: "Yang et al., ICCV 2023, arXiv 2303.13005",
    year: 2023,
    parameters: &[
        ParamDoc { name: "alpha", default: "1.0", range: ">= 0", about: "weight of the target part" },
        ParamDoc { name: "beta", default: "0.1", range: ">= 0", about: "weight of the non-target part" },
        ParamDoc { name: "mu", default: "0.005", range: ">= 0", about: "weight of the weak branch" },
        ParamDoc { name: "form", default: "\"paper\"", range: "\"paper\" | \"released\"", about: "which score ranks the classes" },
        ParamDoc { name: "zipf_slots", default: "\"all\"", range: "\"all\" | \"non_target\"", about: "whether the label uses up a rank" },
        ParamDoc { name: "weak_smoothing", default: "0.1", range: "0..=1", about: "label smoothing of the weak branch" },
        ParamDoc { name: "rank_eps", default: "1e-6", range: "> 0", about: "added to the score's denominators" },
    ],
    build: |params| Ok(Box::new(Uskd { params: parse(params, Params::validate)?, prepared: None })),
    parity,
    raw_terms: false,
};
