//! A network as data: layers in topological order, with named cuts.

use kd_core::{Cut, Error, FeatureSpec, ModelSpec, ParamsBuilder, Result};

use crate::init::Init;

/// Index of a node in its graph.
pub type NodeId = usize;

/// A convolution. Cross-correlation with zero padding, weight `[out, in/groups, kh, kw]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conv2d {
    /// Input channels.
    pub in_channels: usize,
    /// Output channels.
    pub out_channels: usize,
    /// Height and width of the kernel.
    pub kernel: [usize; 2],
    /// Vertical and horizontal stride.
    pub stride: [usize; 2],
    /// Zeros added: top, bottom, left, right.
    pub padding: [usize; 4],
    /// Vertical and horizontal distance of the taps.
    pub dilation: [usize; 2],
    /// Groups of channels that do not mix.
    pub groups: usize,
    /// Parameter index of the weight.
    pub weight: usize,
    /// Parameter index of the bias.
    pub bias: Option<usize>,
}

impl Conv2d {
    /// Output height and width for an input of `h` x `w`; `None` when the kernel does not fit.
    pub fn output(&self, h: usize, w: usize) -> Option<[usize; 2]> {
        let one = |n: usize, a: usize, b: usize, axis: usize| {
            let span = self.dilation[axis] * (self.kernel[axis] - 1) + 1;
            (n + a + b).checked_sub(span).map(|room| room / self.stride[axis] + 1)
        };
        Some([one(h, self.padding[0], self.padding[1], 0)?, one(w, self.padding[2], self.padding[3], 1)?])
    }
}

/// A transposed convolution with a square kernel, weight `[in, out, k, k]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConvTranspose2d {
    /// Input channels.
    pub in_channels: usize,
    /// Output channels.
    pub out_channels: usize,
    /// Height and width of the kernel.
    pub kernel: usize,
    /// Distance that neighbouring inputs get.
    pub stride: usize,
    /// Rows and columns cut off on every side; less than the kernel.
    pub padding: usize,
    /// Parameter index of the weight.
    pub weight: usize,
    /// Parameter index of the bias.
    pub bias: usize,
}

impl ConvTranspose2d {
    /// Output length for an input of length `n`; `None` when nothing is left.
    pub fn output(&self, n: usize) -> Option<usize> {
        ((n.checked_sub(1)? * self.stride) + self.kernel).checked_sub(2 * self.padding).filter(|&n| n > 0)
    }
}

/// A batch norm over axis 1 of `[B,C,..]`.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchNorm {
    /// Channels.
    pub channels: usize,
    /// Added to the variance.
    pub eps: f64,
    /// Share of the batch in the running statistics.
    pub momentum: f64,
    /// Parameter indices of scale and shift; `None` without them.
    pub affine: Option<(usize, usize)>,
    /// Statistic indices of the running mean and variance.
    pub running: (usize, usize),
    /// Counter index of `num_batches_tracked`.
    pub counter: usize,
}

/// A maximum or average pooling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Height and width of the window.
    pub kernel: [usize; 2],
    /// Vertical and horizontal stride.
    pub stride: [usize; 2],
    /// Padding on both sides, vertical and horizontal; of minus infinity for a maximum, of zeros for an average.
    pub padding: [usize; 2],
    /// Whether a last window that only partly fits counts.
    pub ceil: bool,
    /// Whether padded zeros count in an average's divisor.
    pub count_include_pad: bool,
}

impl Pool {
    /// A square window with stride equal to its size and no padding.
    pub fn new(kernel: usize) -> Self {
        Self { kernel: [kernel; 2], stride: [kernel; 2], padding: [0; 2], ceil: false, count_include_pad: true }
    }

    /// Sets the stride.
    #[must_use]
    pub fn stride(mut self, stride: usize) -> Self {
        self.stride = [stride; 2];
        self
    }

    /// Sets the padding.
    #[must_use]
    pub fn pad(mut self, padding: usize) -> Self {
        self.padding = [padding; 2];
        self
    }

    /// Output length along `axis` (0 height, 1 width) for an input of length `n`; `None` when the window does not fit.
    pub fn output(&self, n: usize, axis: usize) -> Option<usize> {
        let (k, s, p) = (self.kernel[axis], self.stride[axis], self.padding[axis]);
        let room = (n + 2 * p).checked_sub(k)?;
        let out = if self.ceil { room.div_ceil(s) + 1 } else { room / s + 1 };
        // PyTorch drops a last window that would begin in the padding beyond the input.
        Some(if self.ceil && (out - 1) * s >= n + p { out - 1 } else { out })
    }
}

/// What a node computes.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Op {
    /// The graph's input.
    Input,
    /// A convolution.
    Conv2d(Conv2d),
    /// A transposed convolution.
    ConvTranspose2d(ConvTranspose2d),
    /// A batch norm.
    BatchNorm(BatchNorm),
    /// `max(x, 0)`, gradient 0 at 0.
    Relu,
    /// `min(max(x, 0), 6)`.
    Relu6,
    /// `x` where it is above 0, `slope x` elsewhere.
    LeakyRelu {
        /// The slope.
        slope: f64,
    },
    /// `x Phi(x)` with the exact error function.
    Gelu,
    /// `x sigmoid(x)`.
    Silu,
    /// `x min(max(x + 3, 0), 6) / 6`.
    Hardswish,
    /// `min(max(x + 3, 0), 6) / 6`.
    Hardsigmoid,
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
    /// Sum of two tensors of equal shape.
    Add,
    /// Product of two tensors of equal shape, or of `[B,C,H,W]` with `[B,C,1,1]`.
    Mul,
    /// Joined along the channels.
    Concat,
    /// `len` channels from `start` on.
    Slice {
        /// First channel.
        start: usize,
        /// Number of channels.
        len: usize,
    },
    /// `[B, g, C/g, ..]` transposed to `[B, C/g, g, ..]`.
    ChannelShuffle {
        /// Groups.
        groups: usize,
    },
    /// Channels of zeros before and after (option A shortcut).
    PadChannels {
        /// Zero channels in front.
        before: usize,
        /// Zero channels behind.
        after: usize,
    },
    /// Every `stride`-th row and column (option A shortcut).
    Subsample {
        /// The stride.
        stride: usize,
    },
    /// Maximum of each window; among equals the first in row-major order takes the gradient.
    MaxPool(Pool),
    /// Mean of each window.
    AvgPool(Pool),
    /// Mean of each of `h` x `w` bins; bin i covers `floor(i n/out) .. ceil((i+1) n/out)`.
    AdaptiveAvgPool {
        /// Output height and width.
        output: [usize; 2],
    },
    /// Nearest neighbour to a fixed size, `floor(i in/out)`.
    ResizeNearest {
        /// Output height and width.
        output: [usize; 2],
    },
    /// Mean over height and width, `[B,C,H,W]` to `[B,C]`.
    GlobalAvgPool,
    /// `[B,C,H,W]` to `[B,CHW]`.
    Flatten,
    /// `x W^T + b` along the last axis, weight `[out,in]`.
    Linear {
        /// Output width.
        out: usize,
        /// Parameter index of the weight.
        weight: usize,
        /// Parameter index of the bias.
        bias: Option<usize>,
    },
    /// Zeroes elements with probability `p` and scales the others by `1/(1-p)`, in train mode.
    Dropout {
        /// The probability.
        p: f64,
    },
    /// Zeroes whole samples with probability `p` and scales the others by `1/(1-p)`, in train mode.
    DropPath {
        /// The probability.
        p: f64,
    },
}

impl Op {
    /// Its name in messages and drawings.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Input => "input",
            Self::Conv2d(_) => "conv2d",
            Self::ConvTranspose2d(_) => "conv_transpose2d",
            Self::BatchNorm(_) => "batch_norm",
            Self::Relu => "relu",
            Self::Relu6 => "relu6",
            Self::LeakyRelu { .. } => "leaky_relu",
            Self::Gelu => "gelu",
            Self::Silu => "silu",
            Self::Hardswish => "hardswish",
            Self::Hardsigmoid => "hardsigmoid",
            Self::Sigmoid => "sigmoid",
            Self::Add => "add",
            Self::Mul => "mul",
            Self::Concat => "concat",
            Self::Slice { .. } => "slice",
            Self::ChannelShuffle { .. } => "channel_shuffle",
            Self::PadChannels { .. } => "pad_channels",
            Self::Subsample { .. } => "subsample",
            Self::MaxPool(_) => "max_pool",
            Self::AvgPool(_) => "avg_pool",
            Self::AdaptiveAvgPool { .. } => "adaptive_avg_pool",
            Self::ResizeNearest { .. } => "resize_nearest",
            Self::GlobalAvgPool => "global_avg_pool",
            Self::Flatten => "flatten",
            Self::Linear { .. } => "linear",
            Self::Dropout { .. } => "dropout",
            Self::DropPath { .. } => "drop_path",
        }
    }

    /// The shape of its output without the batch, from those of its inputs.
    ///
    /// # Errors
    /// Inputs that it cannot take.
    pub fn output_shape(&self, inputs: &[&[usize]]) -> Result<Vec<usize>> {
        let x = *inputs.first().ok_or_else(|| Error::missing(self.kind(), "an input"))?;
        let image = || match *x {
            [c, h, w] => Ok([c, h, w]),
            _ => Err(Error::shape(self.kind(), "[channels, height, width]", x)),
        };
        let fits = |size: Option<usize>| size.filter(|&n| n > 0).ok_or_else(|| Error::shape(self.kind(), "at least the kernel's size", x));
        Ok(match self {
            Self::Conv2d(conv) => {
                let [c, h, w] = image()?;
                if c != conv.in_channels {
                    return Err(Error::shape("conv2d", format!("{} channels", conv.in_channels), x));
                }
                let [oh, ow] = conv.output(h, w).ok_or_else(|| Error::shape("conv2d", "at least the kernel's size", x))?;
                vec![conv.out_channels, oh, ow]
            }
            Self::ConvTranspose2d(conv) => {
                let [c, h, w] = image()?;
                if c != conv.in_channels {
                    return Err(Error::shape("conv_transpose2d", format!("{} channels", conv.in_channels), x));
                }
                vec![conv.out_channels, fits(conv.output(h))?, fits(conv.output(w))?]
            }
            Self::BatchNorm(bn) => {
                if x.first() != Some(&bn.channels) {
                    return Err(Error::shape("batch_norm", format!("{} channels", bn.channels), x));
                }
                x.to_vec()
            }
            Self::Add | Self::Mul => {
                let y = *inputs.get(1).ok_or_else(|| Error::missing(self.kind(), "a second input"))?;
                let gate = matches!(self, Self::Mul) && matches!((x, y), ([c, _, _], [d, 1, 1]) if c == d);
                if x != y && !gate {
                    return Err(Error::shape(self.kind(), format!("{x:?} on both sides"), y));
                }
                x.to_vec()
            }
            Self::Concat => {
                let mut out = x.to_vec();
                for y in &inputs[1..] {
                    if y.len() != x.len() || y[1..] != x[1..] {
                        return Err(Error::shape("concat", format!("{x:?} but for the channels"), y));
                    }
                    out[0] += y[0];
                }
                out
            }
            Self::Slice { start, len } => {
                if x.is_empty() || start + len > x[0] {
                    return Err(Error::shape("slice", format!("at least {} channels", start + len), x));
                }
                let mut out = x.to_vec();
                out[0] = *len;
                out
            }
            Self::ChannelShuffle { groups } => {
                if x.is_empty() || *groups == 0 || x[0] % groups != 0 {
                    return Err(Error::shape("channel_shuffle", format!("channels divisible by {groups}"), x));
                }
                x.to_vec()
            }
            Self::PadChannels { before, after } => {
                let [c, h, w] = image()?;
                vec![before + c + after, h, w]
            }
            Self::Subsample { stride } => {
                let [c, h, w] = image()?;
                vec![c, h.div_ceil(*stride), w.div_ceil(*stride)]
            }
            Self::MaxPool(p) | Self::AvgPool(p) => {
                let [c, h, w] = image()?;
                vec![c, fits(p.output(h, 0))?, fits(p.output(w, 1))?]
            }
            Self::AdaptiveAvgPool { output } | Self::ResizeNearest { output } => vec![image()?[0], output[0], output[1]],
            Self::GlobalAvgPool => vec![image()?[0]],
            Self::Flatten => vec![x.iter().product()],
            Self::Linear { out, .. } => {
                let mut shape = x.to_vec();
                if let Some(last) = shape.last_mut() {
                    *last = *out;
                }
                shape
            }
            Self::Input
            | Self::Relu
            | Self::Relu6
            | Self::LeakyRelu { .. }
            | Self::Gelu
            | Self::Silu
            | Self::Hardswish
            | Self::Hardsigmoid
            | Self::Sigmoid
            | Self::Dropout { .. }
            | Self::DropPath { .. } => x.to_vec(),
        })
    }
}

/// One layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// What it computes.
    pub op: Op,
    /// From which nodes; all of them come earlier.
    pub inputs: Vec<NodeId>,
    /// Its PyTorch module path; empty for layers without parameters.
    pub name: String,
    /// Its output's shape without the batch, at the nominal input size.
    pub shape: Vec<usize>,
}

/// A network's layers, parameters and cuts. Built by [`crate::GraphBuilder`].
#[derive(Clone, Debug)]
pub struct Graph {
    pub(crate) nodes: Vec<Node>,
    pub(crate) cuts: Vec<(Cut, NodeId)>,
    pub(crate) params: ParamsBuilder,
    pub(crate) inits: Vec<Init>,
    pub(crate) spec: ModelSpec,
}

impl Graph {
    /// The layers in topological order; node 0 is the input.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Names and shapes of parameters and statistics.
    pub fn params(&self) -> &ParamsBuilder {
        &self.params
    }

    /// How parameter `index` is initialised.
    pub fn init(&self, index: usize) -> &Init {
        &self.inits[index]
    }

    /// Name, classes, stages, blocks.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The cuts in graph order.
    pub fn cuts(&self) -> &[(Cut, NodeId)] {
        &self.cuts
    }

    /// The node at `cut`.
    ///
    /// # Errors
    /// A cut that this network does not have; the message lists those it has.
    pub fn cut(&self, cut: Cut) -> Result<NodeId> {
        if cut == Cut::Input {
            return Ok(0);
        }
        self.cuts.iter().find(|(c, _)| *c == cut).map(|&(_, n)| n).ok_or_else(|| {
            let known: Vec<_> = self.cuts.iter().map(|(c, _)| c.to_string()).collect();
            Error::refused(format!("{} has no cut `{cut}`; it has {}", self.spec.name, known.join(", ")))
        })
    }

    /// The nodes to compute, in order, for getting from `from` (its tensor given) to every node of `wanted`.
    ///
    /// # Errors
    /// When some path to a wanted node does not cross `from`.
    pub fn piece(&self, from: NodeId, wanted: &[NodeId]) -> Result<Vec<NodeId>> {
        let mut needed = vec![false; self.nodes.len()];
        for &w in wanted {
            needed[w] = true;
        }
        needed[from] = false;
        for id in (0..self.nodes.len()).rev() {
            if needed[id] {
                if id == 0 {
                    let cut = self.cuts.iter().find(|c| c.1 == from).map_or_else(|| format!("node {from}"), |c| c.0.to_string());
                    return Err(Error::refused(format!("{}: what is wanted does not lie behind `{cut}` alone", self.spec.name)));
                }
                for &input in &self.nodes[id].inputs {
                    if input != from {
                        needed[input] = true;
                    }
                }
            }
        }
        Ok((0..self.nodes.len()).filter(|&id| needed[id]).collect())
    }

    /// The output shapes (without the batch) of the nodes of a piece, when the tensor at `from` has the shape `given`; empty for other nodes.
    pub fn shapes(&self, from: NodeId, given: &[usize], piece: &[NodeId]) -> Result<Vec<Vec<usize>>> {
        let mut shapes = vec![vec![]; self.nodes.len()];
        shapes[from] = given.to_vec();
        for &id in piece {
            let node = &self.nodes[id];
            let inputs: Vec<&[usize]> = node.inputs.iter().map(|&i| shapes[i].as_slice()).collect();
            shapes[id] = node.op.output_shape(&inputs).map_err(|e| match e {
                Error::Shape { what, expected, got } if !node.name.is_empty() => {
                    Error::Shape { what: format!("{} ({what})", node.name), expected, got }
                }
                other => other,
            })?;
        }
        Ok(shapes)
    }

    /// The same network with every dropout and drop-path probability 0, as comparisons between frameworks need it.
    #[must_use]
    pub fn without_dropout(mut self) -> Self {
        for node in &mut self.nodes {
            if let Op::Dropout { p } | Op::DropPath { p } = &mut node.op {
                *p = 0.0;
            }
        }
        self
    }

    /// Trainable scalars.
    pub fn param_count(&self) -> usize {
        self.params.entries().iter().map(kd_core::ParamEntry::len).sum()
    }

    /// Multiply-accumulates per sample of convolutions and linear layers, at an input of `input` (its shape without the batch).
    pub fn macs(&self, input: &[usize]) -> Result<u64> {
        let all: Vec<NodeId> = (1..self.nodes.len()).collect();
        let shapes = self.shapes(0, input, &all)?;
        Ok(self
            .nodes
            .iter()
            .enumerate()
            .map(|(id, node)| {
                let from = node.inputs.first().map_or(&[][..], |&i| &shapes[i]);
                self.node_macs(node, from, &shapes[id])
            })
            .sum())
    }

    fn node_macs(&self, node: &Node, from: &[usize], out: &[usize]) -> u64 {
        let elements: u64 = out.iter().map(|&n| n as u64).product();
        match &node.op {
            Op::Conv2d(c) => elements * (c.kernel[0] * c.kernel[1] * c.in_channels / c.groups) as u64,
            // Every input meets every tap, those that fall into the padding included.
            Op::ConvTranspose2d(c) => {
                let input: u64 = from.iter().map(|&n| n as u64).product();
                input * (c.kernel * c.kernel * c.out_channels) as u64
            }
            Op::Linear { weight, .. } => elements * self.params.entries()[*weight].shape[1] as u64,
            _ => 0,
        }
    }

    /// The feature spec of a node under `name`.
    pub(crate) fn feature(nodes: &[Node], node: NodeId, name: &str, has_preact: bool, norm: Option<String>) -> FeatureSpec {
        let shape = &nodes[node].shape;
        FeatureSpec {
            name: name.to_string(),
            channels: shape.first().copied().unwrap_or(0),
            size: [shape.get(1).copied().unwrap_or(1), shape.get(2).copied().unwrap_or(1)],
            post_relu: matches!(nodes[node].op, Op::Relu | Op::Relu6),
            has_preact,
            norm_before_relu: norm,
        }
    }
}
