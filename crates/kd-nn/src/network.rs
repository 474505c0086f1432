//! A graph with parameters: the [`Model`] made of a graph.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device, Tensor};
use kd_core::{Classifier, Cut, Error, Mode, Model, ModelSpec, Outputs, Params, Result, Rng, Trainable};

use crate::graph::{Graph, NodeId, Op};
use crate::{Level, fused, reference};

/// Which executor a network uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Executor {
    /// The fused one where it can, the reference one elsewhere.
    #[default]
    Auto,
    /// Always the reference executor.
    Reference,
    /// The fused executor; what it cannot run is an error.
    Fused,
}

/// How exactly the fused executor computes convolutions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// Direct sums.
    Strict,
    /// Faster algorithms where their error is of f32's own size.
    #[default]
    Fast,
}

/// A network made of a [`Graph`]: flat parameters, two executors.
pub struct Network {
    graph: Arc<Graph>,
    params: Arc<Params>,
    trainable: AtomicBool,
    executor: Executor,
    precision: Precision,
    fused: fused::State,
}

impl Network {
    /// A trainable network; scales are 1, running variances 1, everything else 0 until [`Network::init`] or a state dict is loaded.
    pub fn new(graph: Graph, dtype: DType, device: &Device) -> Result<Self> {
        if !matches!(dtype, DType::F32 | DType::F64) {
            return Err(Error::param("dtype", dtype.as_str(), "f32 or f64"));
        }
        let params = graph.params().clone().build(dtype, device)?;
        params.assign(|name| {
            let shape = graph.params().stats().iter().find(|e| e.name == name).map(|e| e.shape.as_slice());
            shape.filter(|_| name.ends_with("running_var")).and_then(|s| Tensor::ones(s, dtype, device).ok())
        })?;
        let network = Self {
            graph: Arc::new(graph),
            params: Arc::new(params),
            trainable: AtomicBool::new(true),
            executor: Executor::Auto,
            precision: Precision::Fast,
            fused: fused::State::default(),
        };
        Ok(network)
    }

    /// Draws every parameter anew; each depends on the stream and its own name alone, so that a neighbour shifts nothing.
    pub fn init(&self, rng: Rng) -> Result<()> {
        let values: Vec<f64> =
            self.params.entries().iter().enumerate().flat_map(|(i, e)| self.graph.init(i).values(&e.shape, rng.named(&e.name))).collect();
        self.params.values().set(&Tensor::from_vec(values, self.params.count(), &Device::Cpu)?)
    }

    /// Chooses the executor.
    #[must_use]
    pub fn with_executor(mut self, executor: Executor) -> Self {
        self.executor = executor;
        self
    }

    /// Chooses the precision of the fused executor.
    #[must_use]
    pub fn with_precision(mut self, precision: Precision) -> Self {
        self.precision = precision;
        self
    }

    /// Chooses the instruction set of the fused executor's kernels, the CPU's best by default.
    #[must_use]
    pub fn with_level(mut self, level: Level) -> Self {
        self.fused = fused::State::new(level);
        self
    }

    /// Freezes or thaws all parameters.
    pub fn set_trainable(&self, trainable: bool) {
        self.trainable.store(trainable, Ordering::Release);
    }

    /// The same network, frozen: a teacher.
    #[must_use]
    pub fn frozen(self) -> Self {
        self.set_trainable(false);
        self
    }

    /// Its layers and cuts.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Its parameters.
    pub fn parameters(&self) -> &Params {
        &self.params
    }

    pub(crate) fn shared_parameters(&self) -> Arc<Params> {
        self.params.clone()
    }

    /// Which executor would run from `from` to `wanted`: `"fused"` or `"reference"`.
    pub fn executor_of(&self, from: Cut, wanted: &[Cut]) -> Result<&'static str> {
        let (from, wanted) = (self.graph.cut(from)?, self.nodes(wanted)?);
        let piece = self.graph.piece(from, &wanted)?;
        Ok(if self.use_fused(&piece)? { "fused" } else { "reference" })
    }

    fn nodes(&self, cuts: &[Cut]) -> Result<Vec<NodeId>> {
        cuts.iter().map(|&c| self.graph.cut(c)).collect()
    }

    fn use_fused(&self, piece: &[NodeId]) -> Result<bool> {
        let able = self.params.device().is_cpu() && self.params.dtype() == DType::F32 && fused::supports(&self.graph, piece);
        match self.executor {
            Executor::Auto => Ok(able),
            Executor::Reference => Ok(false),
            Executor::Fused if able => Ok(true),
            Executor::Fused => {
                let missing = piece.iter().find(|&&id| !fused::supports(&self.graph, &[id]));
                let why = missing.map_or_else(
                    || "it runs f32 on the CPU only".to_string(),
                    |&id| format!("it has no `{}`", self.graph.nodes()[id].op.kind()),
                );
                Err(Error::refused(format!("{}: the fused executor cannot run this: {why}", self.graph.spec().name)))
            }
        }
    }
}

impl Network {
    /// [`Model::run`] with every parameter tracked whatever the mode, for checks of gradients with running statistics.
    /// A trainer never wants this: in [`Mode::Eval`] it takes the reference executor.
    pub fn run_tracked(&self, x: &Tensor, from: Cut, wanted: &[Cut], mode: Mode) -> Result<Outputs> {
        self.execute(x, from, wanted, mode, true)
    }

    fn execute(&self, x: &Tensor, from: Cut, wanted: &[Cut], mode: Mode, tracked: bool) -> Result<Outputs> {
        let start = self.graph.cut(from)?;
        let mut targets = self.nodes(wanted)?;
        let cuts = targets.clone();
        targets.sort_unstable();
        targets.dedup();
        if x.dtype() != self.params.dtype() {
            return Err(Error::refused(format!(
                "{}: the tensor at `{from}` is {}, the network {}",
                self.spec().name,
                x.dtype().as_str(),
                self.params.dtype().as_str()
            )));
        }
        let nominal = &self.graph.nodes()[start].shape;
        if x.rank() != nominal.len() + 1 || x.dims()[0] == 0 || x.dims()[1] != nominal[0] {
            let expected = format!("[batch, {}{}]", nominal[0], ", height, width".repeat(usize::from(nominal.len() == 3)));
            return Err(Error::shape(format!("{} at `{from}`", self.spec().name), expected, x.dims()));
        }
        let piece = self.graph.piece(start, &targets)?;
        // Folded batch norms have no gradient of their own.
        let folded = tracked && matches!(mode, Mode::Eval);
        let job = fused::Job { graph: &self.graph, params: &self.params, x, from: start, piece: &piece, wanted: &targets, mode, tracked };
        let found = if !folded && self.use_fused(&piece)? {
            fused::run(&self.fused, &job, self.precision)?
        } else {
            self.graph.shapes(start, &x.dims()[1..], &piece)?;
            reference::run(&job)?
        };
        let at = |node: NodeId| targets.binary_search(&node).ok().map(|i| found[i].clone());
        Ok(Outputs::new(wanted.iter().zip(cuts).filter_map(|(&cut, node)| at(node).map(|t| (cut, t)))))
    }
}

impl Model for Network {
    fn spec(&self) -> &ModelSpec {
        self.graph.spec()
    }

    fn run(&self, x: &Tensor, from: Cut, wanted: &[Cut], mode: Mode) -> Result<Outputs> {
        let tracked = self.trainable.load(Ordering::Acquire) && !matches!(mode, Mode::Eval);
        self.execute(x, from, wanted, mode, tracked)
    }

    fn params(&self) -> Option<&Params> {
        Some(&self.params)
    }

    fn trainable(&self) -> Trainable {
        if self.trainable.load(Ordering::Acquire) { Trainable::Flat } else { Trainable::Frozen }
    }

    fn classifier(&self) -> Result<Classifier> {
        let node = &self.graph.nodes()[self.graph.cut(Cut::Logits)?];
        let Op::Linear { weight, bias, .. } = node.op else {
            return Err(Error::refused(format!("{}: its logits do not come from a linear layer", self.spec().name)));
        };
        Ok(Classifier { weight: self.params.value(weight)?, bias: bias.map(|b| self.params.value(b)).transpose()? })
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
