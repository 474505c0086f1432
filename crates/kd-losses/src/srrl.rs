//! `srrl`: the student's feature behind an adapter is fed to the teacher's own classifier.
//!
//! Yang et al., "Knowledge Distillation via Softmax Regression Representation Learning", ICLR 2021, openreview ZzwDy_wiWv.
//!
//! ```text
//! x       = relu(bn(conv1x1(student's feature)))          brought to the teacher's width
//! feature = mean over all elements of (x - t)^2
//! softmax_regression = mean over all elements of (W x + b - z_t)^2
//! value   = feature_weight feature + softmax_weight softmax_regression
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | student's feature | `embedding`: its embedding; `feature_map`: the map of its last stage, `x` being averaged over it afterwards | `[B,D_s]`, `[B,C_s,H,W]` |
//! | `t` | the teacher's embedding, or the mean of its last map; detached | `[B,D_t]` |
//! | `W`, `b` | the teacher's classifier, frozen: the gradient passes through it into `x` | `[K,D_t]`, `[K]` |
//! | `z_t` | the teacher's logits, detached | `[B,K]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `variant` | `"embedding"` | `"embedding"`, `"feature_map"` | the CIFAR toolboxes' form (SimKD, CTKD); the authors' on ImageNet |
//! | `feature_weight`, `softmax_weight` | 1, 1 | >= 0 | |
//! | `bn_eps`, `bn_momentum` | 1e-5, 0.1 | > 0, 0..=1 | of the adapter's batch norm |
//!
//! Terms: `feature`, `softmax_regression`. State: the running statistics of the adapter, which is trained with the student and thrown away.
//! Cost: one 1x1 convolution `D_s D_t` and the classifier on `[B,D_t]`. Weights are drawn as the authors do, N(0, sqrt(2 / D_t)).
//!
//! Settings: ImageNet, 100 epochs, batch 512, learning rate 0.2, `ce` 1. In CTKD's scripts weight 1 beside `ce` 0.1 and `kd` 0.9. The
//! paper's own CIFAR settings are unknown here. Published, ImageNet top-1: R34-R18 71.73, R50-MobileNet 72.49.

use std::sync::Arc;

use candle_core::Tensor;
use kd_core::{
    Classifier, Cut, Error, LossTerms, Method, MethodEntry, Mode, Model, Needs, ParamDoc, ParityInputs, ParityOutput, Result, Setup,
    StateDict, StepView,
};
use kd_nn::{Conv, Graph, GraphBuilder, Init, Network, ops};
use serde::{Deserialize, Serialize};

use crate::registry::parse;
use crate::{inputs, named_graph};

/// Where the adapter stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// Behind the pooled embedding.
    Embedding,
    /// Behind the last stage's map; pooled afterwards.
    FeatureMap,
}

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Where the adapter stands.
    pub variant: Variant,
    /// Weight of `feature`, at least 0.
    pub feature_weight: f64,
    /// Weight of `softmax_regression`, at least 0.
    pub softmax_weight: f64,
    /// Epsilon of the adapter's batch norm, above 0.
    pub bn_eps: f64,
    /// The batch's share of the adapter's running statistics, in 0..=1.
    pub bn_momentum: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { variant: Variant::Embedding, feature_weight: 1.0, softmax_weight: 1.0, bn_eps: 1e-5, bn_momentum: 0.1 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::not_negative("feature_weight", self.feature_weight)?;
        inputs::not_negative("softmax_weight", self.softmax_weight)?;
        inputs::positive("bn_eps", self.bn_eps)?;
        inputs::share("bn_momentum", self.bn_momentum)
    }

    /// The adapter from maps of `channels` and this size to `width` channels.
    fn adapter(&self, channels: usize, size: [usize; 2], width: usize) -> Result<Graph> {
        let mut b = GraphBuilder::new("srrl.transfer", &[channels, size[0], size[1]]);
        b.conv("conv", Conv::new(width, 1).init(Init::HeFanOut));
        b.batch_norm_as("bn", true, self.bn_eps, self.bn_momentum);
        b.relu();
        b.global_avg_pool();
        b.cut(Cut::Embedding);
        b.finish()
    }
}

/// SRRL of the adapted feature `x` `[B,D]` against the teacher's `embedding` `[B,D]` and `logits` `[B,K]`, both detached.
///
/// # Errors
/// Tensors that are not finite or do not fit together; a classifier of another width; parameters out of range.
pub fn srrl(x: &Tensor, embedding: &Tensor, logits: &Tensor, classifier: &Classifier, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (b, d, t) = inputs::both_embeddings(x, embedding)?;
    let (rows, k) = inputs::logits("teacher.logits", logits)?;
    if rows != b {
        return Err(Error::shape("teacher.logits", format!("[{b},K]"), logits.dims()));
    }
    if classifier.weight.dims() != [k, d] {
        return Err(Error::shape("the teacher's classifier", format!("[{k}, {d}]"), classifier.weight.dims()));
    }
    let weight = inputs::constant(&classifier.weight, x)?;
    let bias = classifier.bias.as_ref().map(|b| inputs::constant(b, x)).transpose()?;
    let feature = (x - t)?.sqr()?.mean_all()?;
    let cross = ops::linear(x, &weight, bias.as_ref())?;
    let regression = (cross - inputs::constant(logits, x)?)?.sqr()?.mean_all()?;
    Ok(LossTerms::new().with("feature", feature, params.feature_weight).with("softmax_regression", regression, params.softmax_weight))
}

struct Prepared {
    adapter: Arc<Network>,
    classifier: Classifier,
    /// What the adapter is fed, and the teacher's side of it.
    cuts: (Cut, Cut),
}

struct Srrl {
    params: Params,
    prepared: Option<Prepared>,
}

impl Method for Srrl {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    /// The last stages are known once both networks are: after [`Method::prepare`].
    fn needs(&self) -> Needs {
        let (student, teacher) = self.prepared.as_ref().map_or((Cut::Embedding, Cut::Embedding), |p| p.cuts);
        Needs { student: vec![student], teacher: vec![teacher, Cut::Logits], teacher_model: true, ..Needs::default() }
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        let teacher = setup.teacher(ENTRY.name)?;
        let (s, t) = (setup.models.student.spec(), teacher.spec());
        let (cuts, channels, size) = match self.params.variant {
            Variant::Embedding => ((Cut::Embedding, Cut::Embedding), s.embedding, [1, 1]),
            Variant::FeatureMap => {
                let (own, last) = (last_map(s)?, last_map(t)?);
                if t.stages[last].channels != t.embedding {
                    return Err(Error::refused(format!(
                        "srrl: the classifier of {} takes {} numbers, its last stage has {} channels; use variant = \"embedding\"",
                        t.name, t.embedding, t.stages[last].channels
                    )));
                }
                ((Cut::Stage(own), Cut::Stage(last)), s.stages[own].channels, s.stages[own].size)
            }
        };
        if setup.batch_size * size[0] * size[1] < 2 {
            return Err(Error::refused("srrl: batch norm in training mode needs a batch of at least 2 samples, got 1"));
        }
        let adapter = Network::new(self.params.adapter(channels, size, t.embedding)?, setup.dtype, setup.device)?;
        adapter.init(setup.rng.named("transfer"))?;
        self.prepared = Some(Prepared { adapter: Arc::new(adapter), classifier: classifier(teacher, setup)?, cuts });
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        self.prepared.iter().map(|p| Arc::clone(&p.adapter) as Arc<dyn Model>).collect()
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let p = self.prepared.as_ref().ok_or_else(|| Error::missing(ENTRY.name, "its adapter (`prepare` builds it)"))?;
        let (student, teacher) = (step.student()?, step.teacher()?);
        let x = as_map(student.get(p.cuts.0)?)?;
        if x.dim(0)? * x.dim(2)? * x.dim(3)? < 2 {
            return Err(Error::refused("srrl: batch norm in training mode needs a batch of at least 2 samples, got 1"));
        }
        let x = p.adapter.run(&x, Cut::Input, &[Cut::Embedding], Mode::Train(step.rng.named("transfer")))?;
        srrl(x.embedding()?, &pooled(teacher.get(p.cuts.1)?)?, teacher.logits()?, &p.classifier, &self.params)
    }
}

/// The number of a network's last stage, which must be a map.
fn last_map(spec: &kd_core::ModelSpec) -> Result<usize> {
    let last = spec.stages.len().checked_sub(1).ok_or_else(|| Error::refused(format!("srrl: {} has no stage", spec.name)))?;
    Ok(last)
}

/// The classifier of a frozen network, where the student's tensors are.
pub(crate) fn classifier(teacher: &dyn Model, setup: &Setup<'_>) -> Result<Classifier> {
    let Classifier { weight, bias } = teacher.classifier()?;
    let here = |t: Tensor| -> Result<Tensor> { Ok(t.detach().to_device(setup.device)?.to_dtype(setup.dtype)?) };
    Ok(Classifier { weight: here(weight)?, bias: bias.map(here).transpose()? })
}

/// The classifier of a parity call.
pub(crate) fn parity_classifier(inputs: &ParityInputs) -> Result<Classifier> {
    Ok(Classifier { weight: inputs.get("teacher.fc.weight")?.clone(), bias: inputs.find("teacher.fc.bias").cloned() })
}

/// `[B,D]` as `[B,D,1,1]`; a map as it is.
fn as_map(x: &Tensor) -> Result<Tensor> {
    match *x.dims() {
        [b, d] => Ok(x.reshape((b, d, 1, 1))?),
        [_, _, _, _] => Ok(x.clone()),
        _ => Err(Error::shape("srrl: the student's feature", "[B,D] or [B,C,H,W]", x.dims())),
    }
}

/// The mean of a map; an embedding as it is.
fn pooled(x: &Tensor) -> Result<Tensor> {
    if x.rank() == 4 { Ok(x.mean((2, 3))?) } else { Ok(x.clone()) }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let params: Params = inputs.params()?;
    params.validate()?;
    let feature = if params.variant == Variant::Embedding { "embedding" } else { "stage.last" };
    let x = inputs.get(&format!("student.{feature}"))?;
    inputs::finite(&format!("student.{feature}"), x)?;
    let (x, t) = (as_map(x)?, pooled(inputs.get(&format!("teacher.{feature}"))?)?);
    let (_, width) = inputs::embedding("the teacher's feature", &t)?;
    let (_, channels, h, w) = x.dims4()?;
    if x.dim(0)? * h * w < 2 {
        return Err(Error::refused("srrl: batch norm in training mode needs a batch of at least 2 samples, got 1"));
    }
    let mut state = StateDict::new();
    let graph = params.adapter(channels, [h, w], width)?;
    let x = named_graph::run(&graph, "transfer", inputs, &x, Cut::Embedding, &mut state)?;
    let terms = srrl(&x, &t, inputs.get("teacher.logits")?, &parity_classifier(inputs)?, &params)?;
    Ok(ParityOutput { terms, state })
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "srrl",
    about: "the student's feature, brought to the teacher's width, matches the teacher's feature and its logits behind the teacher's classifier",
    source: "Yang et al., ICLR 2021, openreview ZzwDy_wiWv",
    year: 2021,
    parameters: &[
        ParamDoc { name: "variant", default: "\"embedding\"", range: "\"embedding\" | \"feature_map\"", about: "where the adapter stands" },
        ParamDoc { name: "feature_weight", default: "1.0", range: ">= 0", about: "weight of the features' distance" },
        ParamDoc { name: "softmax_weight", default: "1.0", range: ">= 0", about: "weight of the logits' distance" },
        ParamDoc { name: "bn_eps", default: "1e-5", range: "> 0", about: "epsilon of the adapter's batch norm" },
        ParamDoc { name: "bn_momentum", default: "0.1", range: "0..=1", about: "the batch's share of its running statistics" },
    ],
    build: |params| Ok(Box::new(Srrl { params: parse(params, Params::validate)?, prepared: None })),
    parity,
    raw_terms: true,
};
