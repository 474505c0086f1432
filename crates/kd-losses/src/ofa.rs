//! `ofa`: every stage of the student predicts the classes and is taught by the teacher's prediction; made for unlike architectures.
//!
//! Hao et al., "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation", NeurIPS 2023,
//! arXiv 2310.19444.
//!
//! ```text
//! L(z, e) = -mean_b sum_k w_k log softmax(z/T)_k,    w_k = (p_k + [k = y])^e - [k = y],    p = softmax(z_t/T)
//! value   = logits_weight L(z_s, e_last) + stage_weight sum_i L(head_i(S_i), e_i)
//! ```
//!
//! With `e = 1` it is the cross-entropy with the teacher's prediction; a larger one gives the label more of the weight.
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `z_s`, `z_t` | logits of student and teacher (detached) | `[B,K]` |
//! | `S_i` | student's stages | `[B,C,H,W]` |
//! | `y` | labels; of soft targets (mixup) the heaviest class | `[B]` integers, or `[B,K]` probabilities |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `stages` | `[1,2,3,4]` | stages of the student up to `final_stage` | those that get a head |
//! | `eps` | `[1,1,1,1,1]` | > 0, usually >= 1 | e of each stage, then of the logits |
//! | `final_stage` | 4 | >= 1 | the student's last stage; 3 for the CIFAR resnets, with `stages = [1,2,3]` |
//! | `temperature` | 1 | > 0 | T; the loss has no factor T^2 |
//! | `logits_weight`, `stage_weight` | 1, 1 | >= 0 | |
//! | `bn_eps`, `bn_momentum` | 1e-5, 0.1 | > 0, 0..=1 | of the heads' batch norms |
//!
//! Terms: `logits`, `stage.i`. Use with `ce` (label smoothing 0.1 in the authors' configs) of weight 1. The teacher is seen through its
//! logits alone, so any architecture teaches any other. State: running statistics of the heads.
//!
//! Head of a convolutional student at stage i: `final_stage - i` blocks of two separable convolutions each (3x3 depthwise with stride 2,
//! 1x1, batch norm, ReLU; then the same with stride 1), doubling the width, the last one to `max(D_s, D_t)`; at `final_stage` a 1x1
//! convolution with bias instead. Then the mean and a linear layer. Weights: He's normal over outputs, the linear layer N(0, 0.02)
//! (the authors' normal is cut off at 2, a hundred deviations away), biases 0. Heads of transformer students (patch merging and
//! attention blocks) are not built; such a student is refused.
//!
//! Settings: ImageNet ResNet18 taught by DeiT-T e = 1.5, CIFAR-100 ResNet18 by Swin-T e = 1. `log(softmax)` of the release underflows for
//! gaps beyond 87 in f32; here it does not.

use std::sync::Arc;

use candle_core::Tensor;
use kd_core::{
    Cut, Error, LossTerms, Method, MethodEntry, Mode, Model, Needs, ParamDoc, ParityInputs, ParityOutput, Result, Setup, StateDict,
    StepView,
};
use kd_nn::{Conv, Graph, GraphBuilder, Init, Network};
use serde::{Deserialize, Serialize};

use crate::labels::{self, Labels};
use crate::registry::{parity_labels, parse};
use crate::{inputs, named_graph, softmax};

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Stages of the student that get a head, ascending.
    pub stages: Vec<usize>,
    /// The exponent of each stage and, last, of the logits, above 0.
    pub eps: Vec<f64>,
    /// The number of the student's last stage.
    pub final_stage: usize,
    /// T, above 0.
    pub temperature: f64,
    /// Weight of `logits`, at least 0.
    pub logits_weight: f64,
    /// Weight of every `stage.i`, at least 0.
    pub stage_weight: f64,
    /// Epsilon of the heads' batch norms, above 0.
    pub bn_eps: f64,
    /// The batch's share of the heads' running statistics, in 0..=1.
    pub bn_momentum: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            stages: vec![1, 2, 3, 4],
            eps: vec![1.0; 5],
            final_stage: 4,
            temperature: 1.0,
            logits_weight: 1.0,
            stage_weight: 1.0,
            bn_eps: 1e-5,
            bn_momentum: 0.1,
        }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::positive("temperature", self.temperature)?;
        inputs::not_negative("logits_weight", self.logits_weight)?;
        inputs::not_negative("stage_weight", self.stage_weight)?;
        inputs::positive("bn_eps", self.bn_eps)?;
        inputs::share("bn_momentum", self.bn_momentum)?;
        if self.eps.len() != self.stages.len() + 1 {
            let allowed = format!("{} numbers: one for each of stages = {:?} and one for the logits", self.stages.len() + 1, self.stages);
            return Err(Error::param("eps", format!("{:?}", self.eps), allowed));
        }
        self.eps.iter().try_for_each(|&e| inputs::positive("eps", e))?;
        let ascending = self.stages.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || self.stages.last().is_some_and(|&last| last > self.final_stage) {
            let allowed = format!("ascending numbers of at most {}, the final_stage", self.final_stage);
            return Err(Error::param("stages", format!("{:?}", self.stages), allowed));
        }
        Ok(())
    }

    /// The head of maps `[channels, size]` of stage `i`, `width` wide before its linear layer.
    fn head(&self, i: usize, channels: usize, size: [usize; 2], width: usize, classes: usize) -> Result<Graph> {
        let mut b = GraphBuilder::new(format!("ofa.projector.{i}"), &[channels, size[0], size[1]]);
        let conv = |out, kernel: usize| Conv::new(out, kernel).pad(kernel / 2).init(Init::HeFanOut);
        let blocks = self.final_stage - i;
        for n in 0..blocks {
            let own = b.channels();
            let next = if n + 1 == blocks { width } else { 2 * own };
            for (half, (stride, out)) in [(2, own), (1, next)].into_iter().enumerate() {
                let half = half + 1;
                b.conv(&format!("sep{n}.dw{half}"), conv(own, 3).stride(stride).groups(own));
                b.conv(&format!("sep{n}.pw{half}"), conv(out, 1));
                b.batch_norm_as(&format!("sep{n}.bn{half}"), true, self.bn_eps, self.bn_momentum);
                b.relu();
            }
        }
        if blocks == 0 {
            b.conv("conv", conv(width, 1).bias_init(Init::Const(0.0)));
        }
        b.global_avg_pool();
        b.linear_with("fc", classes, Init::Normal(0.02), Some(Init::Const(0.0)));
        b.cut(Cut::Logits);
        b.finish()
    }
}

/// OFA of the student's `logits` `[B,K]` and of its heads' logits, one for each of `params.stages`; `teacher` `[B,K]` is detached.
///
/// # Errors
/// Logits that are not finite or differ in shape; another number of heads than stages; labels outside the classes; parameters out of range.
pub fn ofa(logits: &Tensor, heads: &[Tensor], teacher: &Tensor, labels: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (_, k, teacher) = inputs::both_logits(logits, teacher)?;
    if heads.len() != params.stages.len() {
        return Err(Error::refused(format!("ofa: {} heads for stages = {:?}", heads.len(), params.stages)));
    }
    let y = Labels::new(labels, k, logits)?.one_hot()?;
    let p = softmax::log_softmax(&(teacher / params.temperature)?)?.exp()?;
    let loss = |z: &Tensor, eps: f64| -> Result<Tensor> {
        let weights = if eps == 1.0 { p.clone() } else { ((&p + &y)?.powf(eps)? - &y)? };
        Ok(softmax::cross_entropy(&weights, &softmax::log_softmax(&(z / params.temperature)?)?)?.mean_all()?)
    };
    let mut terms = LossTerms::new().with("logits", loss(logits, params.eps[heads.len()])?, params.logits_weight);
    for ((head, &stage), &eps) in heads.iter().zip(&params.stages).zip(&params.eps) {
        let what = format!("student.head.{stage}.logits");
        inputs::logits(&what, head)?;
        if head.dims() != logits.dims() {
            return Err(Error::shape(what, format!("{:?}, as the student's logits", logits.dims()), head.dims()));
        }
        terms = terms.with(&format!("stage.{stage}"), loss(head, eps)?, params.stage_weight);
    }
    Ok(terms)
}

struct Ofa {
    params: Params,
    heads: Option<Vec<Arc<Network>>>,
}

impl Method for Ofa {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        let mut needs = Needs { labels: true, ..Needs::logits() };
        needs.student.extend(self.params.stages.iter().map(|&i| Cut::Stage(i)));
        needs
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        let (s, t) = (setup.models.student.spec(), setup.teacher(ENTRY.name)?.spec());
        let last = s.stages.len().saturating_sub(1);
        if !self.params.stages.is_empty() && self.params.final_stage != last {
            let stages: Vec<usize> = (1..=last).collect();
            let allowed = format!("{last}, the last stage of {}; use stages = {stages:?} with {} numbers in eps", s.name, stages.len() + 1);
            return Err(Error::param("ofa: final_stage", self.params.final_stage, allowed));
        }
        let width = s.embedding.max(t.embedding);
        let build = |&i: &usize| {
            let stage = &s.stages[i];
            if stage.size[1] == 1 && stage.size[0] > 1 {
                return Err(Error::refused(format!(
                    "ofa: stage {i} of {} holds tokens; heads of transformer students are not built, take a convolutional student",
                    s.name
                )));
            }
            let head = Network::new(self.params.head(i, stage.channels, stage.size, width, setup.classes)?, setup.dtype, setup.device)?;
            head.init(setup.rng.named("projector").fork(i as u64))?;
            Ok(Arc::new(head))
        };
        self.heads = Some(self.params.stages.iter().map(build).collect::<Result<_>>()?);
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        self.heads.iter().flatten().map(|h| Arc::clone(h) as Arc<dyn Model>).collect()
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let heads = self.heads.as_ref().ok_or_else(|| Error::missing(ENTRY.name, "its heads (`prepare` builds them)"))?;
        let student = step.student()?;
        let run = |(head, &i): (&Arc<Network>, &usize)| {
            let mode = Mode::Train(step.rng.named("projector").fork(i as u64));
            Ok(head.run(student.stage(i)?, Cut::Input, &[Cut::Logits], mode)?.logits()?.clone())
        };
        let heads = heads.iter().zip(&self.params.stages).map(run).collect::<Result<Vec<_>>>()?;
        ofa(student.logits()?, &heads, step.teacher()?.logits()?, labels::of(step.batch), &self.params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let params: Params = inputs.params()?;
    params.validate()?;
    let logits = inputs.get("student.logits")?;
    let (_, classes) = inputs::logits("student.logits", logits)?;
    let mut state = StateDict::new();
    let mut heads = vec![];
    for &i in &params.stages {
        if let Some(given) = inputs.find(&format!("student.head.{i}.logits")) {
            heads.push(given.clone());
            continue;
        }
        let name = format!("student.stage.{i}");
        let map = inputs.get(&name)?;
        let [_, channels, h, w] = *map.dims() else { return Err(Error::shape(name, "[B,C,H,W]", map.dims())) };
        inputs::finite(&name, map)?;
        let fc = inputs.get(&format!("param.projector.{i}.fc.weight"))?;
        let width = *fc.dims().get(1).ok_or_else(|| Error::shape(format!("param.projector.{i}.fc.weight"), "[K,D]", fc.dims()))?;
        let graph = params.head(i, channels, [h, w], width, classes)?;
        heads.push(named_graph::run(&graph, &format!("projector.{i}"), inputs, map, Cut::Logits, &mut state)?);
    }
    let terms = ofa(logits, &heads, inputs.get("teacher.logits")?, parity_labels(inputs)?, &params)?;
    Ok(ParityOutput { terms, state })
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "ofa",
    about: "every stage of the student predicts the classes and learns the teacher's prediction, the label's share raised to a power",
    source: "Hao et al., NeurIPS 2023, arXiv 2310.19444",
    year: 2023,
    parameters: &[
        ParamDoc { name: "stages", default: "[1,2,3,4]", range: "ascending, at most final_stage", about: "stages that get a head" },
        ParamDoc { name: "eps", default: "[1.0,1.0,1.0,1.0,1.0]", range: "> 0", about: "exponent of each stage, then of the logits" },
        ParamDoc { name: "final_stage", default: "4", range: "the student's last stage", about: "decides the heads' depths" },
        ParamDoc { name: "temperature", default: "1.0", range: "> 0", about: "T of both sides; no factor T^2" },
        ParamDoc { name: "logits_weight", default: "1.0", range: ">= 0", about: "weight of the logits' term" },
        ParamDoc { name: "stage_weight", default: "1.0", range: ">= 0", about: "weight of each stage's term" },
        ParamDoc { name: "bn_eps", default: "1e-5", range: "> 0", about: "epsilon of the heads' batch norms" },
        ParamDoc { name: "bn_momentum", default: "0.1", range: "0..=1", about: "the batch's share of their running statistics" },
    ],
    build: |params| Ok(Box::new(Ofa { params: parse(params, Params::validate)?, heads: None })),
    parity,
    raw_terms: true,
};
