//! What a piece of a graph is compiled to: steps, each one fused kernel pass (or two) over the batch.
//!
//! ```text
//! batch statistics   conv, then norm with the ReLU behind it: a norm stores nothing, its readers normalise as they read
//! running statistics conv with the norm folded into its weights, the sum and the ReLU behind it done as it stores
//! both               sum with the ReLU behind it; everything else by itself
//! ```

use kd_core::{Params, Result};

use crate::graph::{BatchNorm, Conv2d, Graph, NodeId, Op};
use crate::kernels::Level;
use crate::kernels::clock::{Cost, Place};
use crate::kernels::conv::Conv;
use crate::kernels::elementwise::Function;
use crate::kernels::layout::{self, Move};
use crate::kernels::pool::Windows;
use crate::kernels::sweep::Padded;
use crate::kernels::tile::Activation;

/// A compiled piece, for one input size.
pub(super) struct Plan {
    /// The network's name.
    pub name: String,
    pub level: Level,
    pub from: NodeId,
    pub wanted: Vec<NodeId>,
    pub steps: Vec<Step>,
    /// Shape of every node's output, by node.
    pub shapes: Vec<Shape>,
    /// The step that makes a node's output, by node; `usize::MAX` where none does.
    makers: Vec<usize>,
    /// The step that reads a node first, by node, and so contributes to its gradient last.
    pub first_reader: Vec<usize>,
    /// The step that reads a node last, by node; `usize::MAX` for wanted ones.
    pub last_use: Vec<usize>,
    /// Whether one node reads a node, and nobody outside, by node.
    pub private: Vec<bool>,
    /// Whether parameters lie between `from` and the node, by node.
    pub trainable: Vec<bool>,
}

impl Plan {
    /// The step that makes a node's output.
    pub(super) fn maker(&self, node: NodeId) -> Option<usize> {
        Some(self.makers[node]).filter(|&at| at < self.steps.len())
    }

    /// The first node that a step reads.
    pub(super) fn input_of(&self, step: &Step) -> NodeId {
        step.inputs()[0]
    }

    /// What a profile calls a step: the prefix of its parameters, or what it does.
    pub(super) fn place(&self, step: &Step, params: &Params, pass: &'static str) -> Place {
        let module = |name: &str| name.rsplit_once('.').map_or(name, |(module, _)| module).to_string();
        let layer = match &step.kind {
            Kind::Conv(conv) => module(&params.entries()[conv.weight].name),
            Kind::Norm { norm, .. } => module(&params.stat_entries()[norm.running.0].name),
            kind => format!("{} {}", kind.name(), step.out),
        };
        Place { network: self.name.clone(), layer, pass }
    }

    /// What a step's definition takes forwards, its input read and its output written once.
    pub(super) fn cost(&self, step: &Step, images: usize) -> Cost {
        let read: usize = step.inputs().iter().map(|&i| self.shapes[i].len()).sum();
        let flops = if let Kind::Conv(conv) = &step.kind { 2 * conv.conv.macs() } else { 0 };
        Cost { flops: images * flops, floats: images * (read + self.shapes[step.out].len()) }
    }

    /// Whether the gradient of a node's output is wanted, when those of the parameters or of the input are.
    pub(super) fn wants_grad(&self, node: NodeId, params: bool, input: bool) -> bool {
        input || (params && self.trainable[node])
    }
}

/// An image per sample, or one number per channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Shape {
    /// Channels, height, width; the latter 1 for a vector.
    pub image: [usize; 3],
    /// Whether candle sees `[B,C]`.
    pub vector: bool,
}

impl Shape {
    fn of(dims: &[usize]) -> Self {
        match *dims {
            [c, h, w] => Self { image: [c, h, w], vector: false },
            _ => Self { image: [dims.iter().product(), 1, 1], vector: true },
        }
    }

    /// Floats per sample.
    pub(super) fn len(&self) -> usize {
        self.image.iter().product()
    }

    pub(super) fn channels(&self) -> usize {
        self.image[0]
    }

    /// The image without anything around it.
    pub(super) fn unpadded(&self) -> Padded {
        let [c, h, w] = self.image;
        Padded::none([h, w, c])
    }
}

/// One pass over the batch that produces the output of node `out`.
pub(super) struct Step {
    pub out: NodeId,
    pub kind: Kind,
}

pub(super) enum Kind {
    /// A convolution or linear layer.
    Conv(Box<ConvStep>),
    Norm {
        x: NodeId,
        norm: BatchNorm,
        activation: Activation,
        /// Of the batch; else the running ones.
        batch: bool,
        /// Whether nothing but this step reads the convolution before it.
        only_reader: bool,
    },
    Add {
        a: NodeId,
        b: NodeId,
        activation: Activation,
    },
    /// ReLU or ReLU6 by itself.
    Rectify {
        x: NodeId,
        activation: Activation,
    },
    Function {
        x: NodeId,
        function: Function,
    },
    /// Product; `gate` has one number per channel if it is not of `x`'s size.
    Mul {
        x: NodeId,
        gate: NodeId,
    },
    /// Channels of several inputs put together; what none of them fills is zero.
    Channels {
        sources: Vec<(NodeId, Vec<Move>)>,
        full: bool,
    },
    Subsample {
        x: NodeId,
        stride: usize,
    },
    Max {
        x: NodeId,
        windows: Windows,
    },
    Average {
        x: NodeId,
        windows: Windows,
    },
    Flatten {
        x: NodeId,
    },
    /// Dropout of elements, or of whole samples.
    Drop {
        x: NodeId,
        p: f64,
        samples: bool,
    },
}

impl Kind {
    fn name(&self) -> &'static str {
        match self {
            Self::Conv(_) => "convolution",
            Self::Norm { .. } => "norm",
            Self::Add { .. } => "add",
            Self::Rectify { .. } => "relu",
            Self::Function { .. } => "function",
            Self::Mul { .. } => "multiply",
            Self::Channels { .. } => "channels",
            Self::Subsample { .. } => "subsample",
            Self::Max { .. } => "max pool",
            Self::Average { .. } => "average pool",
            Self::Flatten { .. } => "flatten",
            Self::Drop { .. } => "dropout",
        }
    }
}

pub(super) struct ConvStep {
    pub x: NodeId,
    pub conv: Conv,
    pub weight: usize,
    pub bias: Option<usize>,
    /// The batch norm behind it, with running statistics.
    pub fold: Option<BatchNorm>,
    /// Added to the output.
    pub residual: Option<NodeId>,
    pub activation: Activation,
    /// Whether a batch norm wants the output's moments.
    pub moments: bool,
}

impl Step {
    /// The nodes it reads.
    pub(super) fn inputs(&self) -> Vec<NodeId> {
        match &self.kind {
            Kind::Conv(c) => std::iter::once(c.x).chain(c.residual).collect(),
            Kind::Add { a, b, .. } | Kind::Mul { x: a, gate: b } => vec![*a, *b],
            Kind::Channels { sources, .. } => sources.iter().map(|s| s.0).collect(),
            Kind::Norm { x, .. }
            | Kind::Rectify { x, .. }
            | Kind::Function { x, .. }
            | Kind::Subsample { x, .. }
            | Kind::Max { x, .. }
            | Kind::Average { x, .. }
            | Kind::Flatten { x }
            | Kind::Drop { x, .. } => vec![*x],
        }
    }
}

/// Whether the fused executor has a node at all.
pub(super) fn supports(graph: &Graph, id: NodeId) -> bool {
    let node = &graph.nodes()[id];
    // Tokens `[N,D]` are the reference executor's.
    let known = |id: NodeId| matches!(graph.nodes()[id].shape.len(), 1 | 3);
    known(id)
        && node.inputs.iter().all(|&i| known(i))
        && match &node.op {
            Op::Linear { .. } => node.shape.len() == 1,
            Op::Input | Op::ResizeNearest { .. } | Op::ConvTranspose2d(_) | Op::LeakyRelu { .. } => false,
            _ => true,
        }
}

/// What plans are compiled from, and how.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub level: Level,
    pub graph: &'a Graph,
    /// Whether batch norms use the batch's statistics.
    pub batch: bool,
    /// Whether Winograd's algorithm is allowed.
    pub fast: bool,
}

/// Floats of an activation, times images, that a thread may work on at a time without losing them from its cache.
const ACTIVATION: usize = 32 * 1024;

impl Source<'_> {
    /// Compiles a piece for inputs of shape `given` (without the batch).
    ///
    /// With `alone`, into a chain of plans, each with the images that a thread best takes through it at a time: it ends where a single
    /// tensor goes on and the activations become much smaller (or larger).
    pub(super) fn chain(
        self,
        from: NodeId,
        given: &[usize],
        piece: &[NodeId],
        wanted: &[NodeId],
        alone: bool,
    ) -> Result<Vec<(Plan, Option<usize>)>> {
        let shapes: Vec<Shape> = self.graph.shapes(from, given, piece)?.iter().map(|s| Shape::of(s)).collect();
        if !alone {
            return Ok(vec![(self.compile(from, &shapes, piece, wanted), None)]);
        }
        let mut plans = vec![];
        let (mut start, mut at) = (from, 0);
        for (end, group) in self.sections(&shapes, piece) {
            let nodes = &piece[at..end];
            let goes_on = end < piece.len();
            let own: Vec<NodeId> = nodes.iter().copied().filter(|n| wanted.contains(n) || (goes_on && *n == piece[end - 1])).collect();
            plans.push((self.compile(start, &shapes, nodes, &own), Some(group)));
            (start, at) = (piece[end - 1], end);
        }
        Ok(plans)
    }

    /// Cuts a piece into sections, each up to (excluding) a place in `piece`, and the images to take through it together.
    fn sections(&self, shapes: &[Shape], piece: &[NodeId]) -> Vec<(usize, usize)> {
        let nodes = self.graph.nodes();
        // The earliest node that anything behind a place still reads.
        let mut reads = vec![usize::MAX; piece.len() + 1];
        for (at, &id) in piece.iter().enumerate().rev() {
            reads[at] = nodes[id].inputs.iter().copied().fold(reads[at + 1], usize::min);
        }
        let ends = |at: usize| at == piece.len() || (reads[at] == piece[at - 1] && !absorbed(&nodes[piece[at]].op));
        let mut sections: Vec<(usize, usize)> = vec![];
        let (mut largest, mut weight) = (1, 1);
        for (at, &id) in piece.iter().enumerate() {
            largest = largest.max(shapes[id].len());
            if let Op::Conv2d(c) = &nodes[id].op {
                weight = weight.max(c.out_channels * c.in_channels / c.groups * c.kernel[0] * c.kernel[1]);
            }
            if ends(at + 1) {
                // Weights that fill the cache are to be read for more than a few pixels.
                let least = if weight > 128 * 1024 { (32 * ACTIVATION / largest).min(32) } else { 1 };
                let group = (ACTIVATION / largest).max(least).max(1);
                match sections.last_mut() {
                    Some((end, old)) if group < 2 * *old && *old < 2 * group => *end = at + 1,
                    _ => sections.push((at + 1, group)),
                }
                (largest, weight) = (1, 1);
            }
        }
        sections
    }

    fn compile(self, from: NodeId, shapes: &[Shape], piece: &[NodeId], wanted: &[NodeId]) -> Plan {
        let mut readers = vec![0; shapes.len()];
        piece.iter().flat_map(|&id| &self.graph.nodes()[id].inputs).for_each(|&i| readers[i] += 1);
        let moved = |id: NodeId| {
            let mut readers = piece.iter().map(|&r| &self.graph.nodes()[r]).filter(|r| r.inputs.contains(&id));
            readers.all(|r| matches!(r.op, Op::Concat | Op::Slice { .. } | Op::ChannelShuffle { .. } | Op::PadChannels { .. }))
        };
        let mut compiler = Compiler {
            source: self,
            shapes,
            passing: (0..shapes.len()).map(|id| id != from && !wanted.contains(&id) && moved(id)).collect(),
            private: (0..shapes.len()).map(|id| id != from && readers[id] == 1 && !wanted.contains(&id)).collect(),
            steps: vec![],
            step_of: vec![usize::MAX; shapes.len()],
        };
        piece.iter().for_each(|&id| compiler.node(id));
        let Compiler { mut steps, private, passing, .. } = compiler;
        steps.retain(|s| !(passing[s.out] && matches!(s.kind, Kind::Channels { .. })));
        let (mut makers, mut first_reader) = (vec![usize::MAX; shapes.len()], vec![usize::MAX; shapes.len()]);
        let mut last_use = vec![0; shapes.len()];
        let mut trainable = vec![false; shapes.len()];
        for (at, step) in steps.iter().enumerate() {
            let inputs = step.inputs();
            let own = match &step.kind {
                Kind::Conv(_) => true,
                Kind::Norm { norm, .. } => norm.affine.is_some(),
                _ => false,
            };
            trainable[step.out] = own || inputs.iter().any(|&i| trainable[i]);
            makers[step.out] = at;
            for &i in &inputs {
                first_reader[i] = first_reader[i].min(at);
                last_use[i] = at;
            }
        }
        wanted.iter().for_each(|&w| last_use[w] = usize::MAX);
        Plan {
            name: self.graph.spec().name.clone(),
            level: self.level,
            from,
            wanted: wanted.to_vec(),
            steps,
            shapes: shapes.to_vec(),
            makers,
            first_reader,
            last_use,
            private,
            trainable,
        }
    }
}

/// Whether an operation is done by the one before it if it can be.
fn absorbed(op: &Op) -> bool {
    matches!(op, Op::BatchNorm(_) | Op::Relu | Op::Relu6 | Op::Add)
}

struct Compiler<'a> {
    source: Source<'a>,
    shapes: &'a [Shape],
    /// Nodes that one other node of the piece reads and nobody outside.
    private: Vec<bool>,
    /// Nodes that only movers of channels read.
    passing: Vec<bool>,
    steps: Vec<Step>,
    /// The step that makes a node's output, by node.
    step_of: Vec<usize>,
}

impl Compiler<'_> {
    fn push(&mut self, out: NodeId, kind: Kind) {
        self.step_of[out] = self.steps.len();
        self.steps.push(Step { out, kind });
    }

    /// The step whose output node `id` alone reads: what stands in `id` may be done there.
    fn absorber(&mut self, id: NodeId) -> Option<&mut Step> {
        if self.private[id] { self.steps.get_mut(self.step_of[id]) } else { None }
    }

    /// Lets step `at` produce node `out` instead of its own.
    fn rename(&mut self, input: NodeId, out: NodeId) {
        let at = self.step_of[input];
        self.step_of[out] = at;
        self.steps[at].out = out;
    }

    fn node(&mut self, id: NodeId) {
        let node = &self.source.graph.nodes()[id];
        let x = node.inputs.first().copied().unwrap_or(0);
        let channels = self.shapes[x].channels();
        match &node.op {
            Op::Input => {}
            Op::Conv2d(conv) => {
                let [_, h, w] = self.shapes[x].image;
                self.conv(id, x, conv, [h, w]);
            }
            Op::Linear { out, weight, bias } => {
                let conv = Conv2d {
                    in_channels: channels,
                    out_channels: *out,
                    kernel: [1; 2],
                    stride: [1; 2],
                    padding: [0; 4],
                    dilation: [1; 2],
                    groups: 1,
                    weight: *weight,
                    bias: *bias,
                };
                self.conv(id, x, &conv, [1; 2]);
            }
            Op::BatchNorm(norm) => self.norm(id, x, norm),
            Op::Relu => self.rectify(id, x, Activation::Relu),
            Op::Relu6 => self.rectify(id, x, Activation::Relu6),
            Op::Gelu => self.push(id, Kind::Function { x, function: Function::Gelu }),
            Op::Silu => self.push(id, Kind::Function { x, function: Function::Silu }),
            Op::Hardswish => self.push(id, Kind::Function { x, function: Function::Hardswish }),
            Op::Hardsigmoid => self.push(id, Kind::Function { x, function: Function::Hardsigmoid }),
            Op::Sigmoid => self.push(id, Kind::Function { x, function: Function::Sigmoid }),
            Op::Add => self.add(id, x, node.inputs[1]),
            Op::Mul => self.push(id, Kind::Mul { x, gate: node.inputs[1] }),
            Op::Concat => {
                let mut to = 0;
                let sources = node.inputs.iter().map(|&i| {
                    let len = self.shapes[i].channels();
                    to += len;
                    (i, vec![Move { from: 0, to: to - len, len }])
                });
                let sources = sources.collect();
                self.channels(id, sources, true);
            }
            Op::Slice { start, len } => self.channels(id, vec![(x, vec![Move { from: *start, to: 0, len: *len }])], true),
            Op::ChannelShuffle { groups } => self.channels(id, vec![(x, layout::shuffle(channels, *groups))], true),
            Op::PadChannels { before, .. } => self.channels(id, vec![(x, vec![Move { from: 0, to: *before, len: channels }])], false),
            Op::Subsample { stride } => self.push(id, Kind::Subsample { x, stride: *stride }),
            Op::MaxPool(pool) => self.push(id, Kind::Max { x, windows: Windows::pool(pool, self.shapes[x].image) }),
            Op::AvgPool(pool) => self.push(id, Kind::Average { x, windows: Windows::pool(pool, self.shapes[x].image) }),
            Op::AdaptiveAvgPool { output } => {
                self.push(id, Kind::Average { x, windows: Windows::adaptive(*output, self.shapes[x].image) });
            }
            Op::GlobalAvgPool => self.push(id, Kind::Average { x, windows: Windows::adaptive([1; 2], self.shapes[x].image) }),
            Op::Flatten => self.push(id, Kind::Flatten { x }),
            Op::Dropout { p } => self.push(id, Kind::Drop { x, p: *p, samples: false }),
            Op::DropPath { p } => self.push(id, Kind::Drop { x, p: *p, samples: true }),
            Op::ResizeNearest { .. } | Op::ConvTranspose2d(_) | Op::LeakyRelu { .. } => unreachable!("invariant: `supports` refuses it"),
        }
    }

    /// Channels moved, and moved again before anybody reads them, are moved once.
    fn channels(&mut self, id: NodeId, sources: Vec<(NodeId, Vec<Move>)>, mut full: bool) {
        let mut found: Vec<(NodeId, Vec<Move>)> = vec![];
        for (node, moves) in sources {
            match self.steps.get(self.step_of[node]).map(|s| &s.kind) {
                Some(Kind::Channels { sources, full: all }) if self.passing[node] => {
                    full &= all;
                    found.extend(sources.iter().map(|(first, before)| (*first, layout::compose(before, &moves))));
                }
                _ => found.push((node, moves)),
            }
        }
        found.retain(|(_, moves)| !moves.is_empty());
        self.push(id, Kind::Channels { sources: found, full });
    }

    fn conv(&mut self, id: NodeId, x: NodeId, conv: &Conv2d, [h, w]: [usize; 2]) {
        let step = ConvStep {
            x,
            conv: Conv::new(self.source.level, conv, h, w, self.source.fast),
            weight: conv.weight,
            bias: conv.bias,
            fold: None,
            residual: None,
            activation: Activation::None,
            moments: false,
        };
        self.push(id, Kind::Conv(Box::new(step)));
    }

    fn norm(&mut self, id: NodeId, x: NodeId, norm: &BatchNorm) {
        let batch = self.source.batch;
        let mut only_reader = false;
        // Folded weights round otherwise. A cut's bits, and those of everything behind it, must not depend on whether somebody wants it.
        let named = self.source.graph.cuts().iter().any(|c| c.1 == x);
        if let Some(Step { kind: Kind::Conv(conv), .. }) = self.absorber(x) {
            if batch {
                conv.moments = true;
                only_reader = true;
            } else if !named && conv.fold.is_none() && conv.residual.is_none() && conv.activation == Activation::None {
                conv.fold = Some(norm.clone());
                return self.rename(x, id);
            }
        }
        self.push(id, Kind::Norm { x, norm: norm.clone(), activation: Activation::None, batch, only_reader });
    }

    fn rectify(&mut self, id: NodeId, x: NodeId, kind: Activation) {
        let found = match self.absorber(x).map(|s| &mut s.kind) {
            Some(Kind::Conv(conv)) if !conv.moments => Some(&mut conv.activation),
            Some(Kind::Norm { activation, .. } | Kind::Add { activation, .. }) => Some(activation),
            _ => None,
        };
        match found {
            Some(activation) if *activation == Activation::None => {
                *activation = kind;
                self.rename(x, id);
            }
            _ => self.push(id, Kind::Rectify { x, activation: kind }),
        }
    }

    /// With running statistics, a sum is done by the later of its two terms if that is a convolution read by nobody else.
    fn add(&mut self, id: NodeId, a: NodeId, b: NodeId) {
        let (early, late) = if self.step_of[a].wrapping_add(1) < self.step_of[b].wrapping_add(1) { (a, b) } else { (b, a) };
        if !self.source.batch
            && let Some(Step { kind: Kind::Conv(conv), .. }) = self.absorber(late)
            && conv.residual.is_none()
            && conv.activation == Activation::None
        {
            conv.residual = Some(early);
            return self.rename(late, id);
        }
        self.push(id, Kind::Add { a, b, activation: Activation::None });
    }
}
