//! A network as the rest of the toolkit sees it.

use candle_core::{Tensor, Var};
use serde::Serialize;

use crate::{Cut, Error, Params, Result, Rng};

/// How a network is run.
#[derive(Clone, Copy, Debug)]
pub enum Mode {
    /// Batch statistics, running ones updated; dropout and drop-path drawn from the stream. Parameters are tracked when the network trains.
    Train(Rng),
    /// Batch statistics, running ones never written; no dropout.
    BatchStats,
    /// Running statistics, no dropout. Parameters are not tracked; a tracked input still receives its gradient.
    Eval,
}

/// One feature point of a network.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FeatureSpec {
    /// The module whose output it is.
    pub name: String,
    /// Channels (tokens: width).
    pub channels: usize,
    /// Height and width at the nominal input size (tokens: tokens and 1).
    pub size: [usize; 2],
    /// Whether it is the output of a ReLU.
    pub post_relu: bool,
    /// Whether a pre-activation twin exists ([`Cut::Preact`]).
    pub has_preact: bool,
    /// The batch norm right before the ReLU, by module name (OFD's margins).
    pub norm_before_relu: Option<String>,
}

/// What a network says about itself.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelSpec {
    /// Its name in the registry.
    pub name: String,
    /// Outputs of the classifier, `K`.
    pub classes: usize,
    /// Width of the classifier's input, `D`.
    pub embedding: usize,
    /// Channels, height, width of the nominal input.
    pub input: [usize; 3],
    /// [`Cut::Block`]s, the first being block 1.
    pub blocks: Vec<FeatureSpec>,
    /// [`Cut::Stage`]s, the first being stage 0.
    pub stages: Vec<FeatureSpec>,
    /// Whether there is a second, distillation head.
    pub logits_dist: bool,
}

/// The tensors that a run produced, by cut.
#[derive(Clone, Debug, Default)]
pub struct Outputs {
    found: Vec<(Cut, Tensor)>,
}

impl Outputs {
    /// From pairs; a later entry of the same cut replaces the earlier.
    pub fn new(pairs: impl IntoIterator<Item = (Cut, Tensor)>) -> Self {
        let mut own = Self::default();
        pairs.into_iter().for_each(|(cut, t)| own.insert(cut, t));
        own
    }

    /// Adds or replaces one.
    pub fn insert(&mut self, cut: Cut, tensor: Tensor) {
        self.found.retain(|(c, _)| *c != cut);
        self.found.push((cut, tensor));
    }

    /// The tensor at `cut`.
    ///
    /// # Errors
    /// When the run was not asked for it.
    pub fn get(&self, cut: Cut) -> Result<&Tensor> {
        self.found.iter().find(|(c, _)| *c == cut).map(|(_, t)| t).ok_or_else(|| Error::missing("this computation", cut.to_string()))
    }

    /// `[B,K]`.
    pub fn logits(&self) -> Result<&Tensor> {
        self.get(Cut::Logits)
    }

    /// `[B,D]`.
    pub fn embedding(&self) -> Result<&Tensor> {
        self.get(Cut::Embedding)
    }

    /// Output of stage `i`, 0 being the stem.
    pub fn stage(&self, i: usize) -> Result<&Tensor> {
        self.get(Cut::Stage(i))
    }

    /// Stage `i` before its last ReLU.
    pub fn preact(&self, i: usize) -> Result<&Tensor> {
        self.get(Cut::Preact(i))
    }

    /// Output of block `i`, counted from 1.
    pub fn block(&self, i: usize) -> Result<&Tensor> {
        self.get(Cut::Block(i))
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (Cut, &Tensor)> {
        self.found.iter().map(|(c, t)| (*c, t))
    }

    /// The same tensors outside any graph.
    #[must_use]
    pub fn detach(&self) -> Self {
        Self { found: self.found.iter().map(|(c, t)| (*c, t.detach())).collect() }
    }

    /// The samples at the positions `rows` `[L]`, in that order, within the graph.
    pub fn rows(&self, rows: &Tensor) -> Result<Self> {
        let found = self.found.iter().map(|(c, t)| Ok((*c, t.contiguous()?.index_select(rows, 0)?)));
        Ok(Self { found: found.collect::<Result<_>>()? })
    }
}

/// How a network's parameters are trained.
#[derive(Clone, Debug)]
pub enum Trainable {
    /// Not at all.
    Frozen,
    /// Through the flat buffers of [`Model::params`].
    Flat,
    /// Through candle variables (a user's own model).
    Vars(Vec<Var>),
}

/// The last linear layer of a frozen network: `logits = embedding weight^T + bias`.
#[derive(Clone, Debug)]
pub struct Classifier {
    /// `[K,D]`.
    pub weight: Tensor,
    /// `[K]`.
    pub bias: Option<Tensor>,
}

/// A network that can be run whole or from one cut to others.
///
/// kd-nn's `Network` is one; any candle model becomes one by implementing this trait.
pub trait Model: Send + Sync {
    /// What the network says about itself.
    fn spec(&self) -> &ModelSpec;

    /// Runs from `from`, where `x` is the tensor, far enough to produce every wanted cut.
    ///
    /// # Errors
    /// A cut that the network does not have, cannot be fed in, or does not lie behind `from`; a tensor of the wrong shape.
    fn run(&self, x: &Tensor, from: Cut, wanted: &[Cut], mode: Mode) -> Result<Outputs>;

    /// Flat values, gradients, names and statistics; `None` for a user's own candle model.
    fn params(&self) -> Option<&Params>;

    /// How the parameters are trained.
    fn trainable(&self) -> Trainable;

    /// The last linear layer, detached. A trainable network's classifier is applied with
    /// `run(rows, Cut::Embedding, &[Cut::Logits], mode)` instead, so that gradients reach it.
    fn classifier(&self) -> Result<Classifier>;

    /// The concrete type, for what only a graph can do (export, printing).
    fn as_any(&self) -> &dyn std::any::Any;
}
