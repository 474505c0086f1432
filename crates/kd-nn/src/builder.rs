//! Writing a graph down, layer by layer.

use kd_core::{Cut, Error, ModelSpec, ParamsBuilder, Result};

use crate::graph::{BatchNorm, Conv2d, ConvTranspose2d, Graph, Node, NodeId, Op, Pool};
use crate::init::Init;

/// A convolution still to be placed: output channels and kernel size, everything else by default
/// (stride 1, no padding, one group, no bias, PyTorch's initialisation).
#[derive(Clone, Debug)]
pub struct Conv {
    out: usize,
    kernel: [usize; 2],
    stride: [usize; 2],
    padding: [usize; 4],
    dilation: [usize; 2],
    groups: usize,
    bias: Option<Option<Init>>,
    init: Init,
}

impl Conv {
    /// `out` channels, a square kernel.
    pub fn new(out: usize, kernel: usize) -> Self {
        Self { out, kernel: [kernel; 2], stride: [1; 2], padding: [0; 4], dilation: [1; 2], groups: 1, bias: None, init: Init::Default }
    }

    /// A rectangular kernel, height and width.
    #[must_use]
    pub fn kernel(mut self, h: usize, w: usize) -> Self {
        self.kernel = [h, w];
        self
    }

    /// The same stride on both axes.
    #[must_use]
    pub fn stride(mut self, stride: usize) -> Self {
        self.stride = [stride; 2];
        self
    }

    /// The same padding on all four sides.
    #[must_use]
    pub fn pad(mut self, padding: usize) -> Self {
        self.padding = [padding; 4];
        self
    }

    /// Padding top, bottom, left, right.
    #[must_use]
    pub fn padding(mut self, padding: [usize; 4]) -> Self {
        self.padding = padding;
        self
    }

    /// Different strides, vertical and horizontal.
    #[must_use]
    pub fn strides(mut self, stride: [usize; 2]) -> Self {
        self.stride = stride;
        self
    }

    /// The same dilation on both axes.
    #[must_use]
    pub fn dilation(mut self, dilation: usize) -> Self {
        self.dilation = [dilation; 2];
        self
    }

    /// Groups; as many as channels makes it depthwise.
    #[must_use]
    pub fn groups(mut self, groups: usize) -> Self {
        self.groups = groups;
        self
    }

    /// With a bias, initialised as PyTorch does.
    #[must_use]
    pub fn bias(mut self) -> Self {
        self.bias = Some(None);
        self
    }

    /// With a bias, initialised so.
    #[must_use]
    pub fn bias_init(mut self, init: Init) -> Self {
        self.bias = Some(Some(init));
        self
    }

    /// Initialises the weight so.
    #[must_use]
    pub fn init(mut self, init: Init) -> Self {
        self.init = init;
        self
    }
}

/// Writes a [`Graph`] down in reading order: every call adds a layer behind the cursor and moves the cursor to it.
///
/// Names are PyTorch module paths, so that state-dict keys fall out. The first mistake is reported by [`GraphBuilder::finish`].
///
/// ```
/// use kd_core::Cut;
/// use kd_nn::{Conv, GraphBuilder};
///
/// let mut b = GraphBuilder::new("tiny", &[3, 8, 8]);
/// b.conv("conv1", Conv::new(16, 3).pad(1));
/// b.batch_norm("bn1");
/// let skip = b.relu();
/// b.conv("conv2", Conv::new(16, 3).pad(1));
/// b.add(skip);
/// b.relu();
/// b.stage(0, "conv2", None);
/// b.global_avg_pool();
/// b.cut(Cut::Embedding);
/// b.linear("fc", 10);
/// b.cut(Cut::Logits);
/// let graph = b.finish().unwrap();
/// assert_eq!(graph.param_count(), 3 * 16 * 9 + 32 + 16 * 16 * 9 + 170);
/// assert_eq!(graph.params().entries()[0].name, "conv1.weight");
/// ```
#[derive(Debug)]
pub struct GraphBuilder {
    name: String,
    nodes: Vec<Node>,
    cuts: Vec<(Cut, NodeId)>,
    features: Vec<(Cut, String, Option<String>)>,
    params: ParamsBuilder,
    inits: Vec<Init>,
    here: NodeId,
    error: Option<Error>,
}

impl GraphBuilder {
    /// A graph with an input of the nominal shape `input` (without the batch): `[C,H,W]` or `[D]`.
    pub fn new(name: impl Into<String>, input: &[usize]) -> Self {
        let node = Node { op: Op::Input, inputs: vec![], name: String::new(), shape: input.to_vec() };
        Self {
            name: name.into(),
            nodes: vec![node],
            cuts: vec![],
            features: vec![],
            params: ParamsBuilder::default(),
            inits: vec![],
            here: 0,
            error: None,
        }
    }

    /// The node behind which the next layer goes.
    pub fn here(&self) -> NodeId {
        self.here
    }

    /// Moves the cursor.
    pub fn at(&mut self, node: NodeId) -> &mut Self {
        self.here = node;
        self
    }

    /// Channels (or width) at the cursor.
    pub fn channels(&self) -> usize {
        self.nodes[self.here].shape.first().copied().unwrap_or(0)
    }

    /// Shape without the batch at the cursor.
    pub fn shape(&self) -> &[usize] {
        &self.nodes[self.here].shape
    }

    fn push(&mut self, op: Op, inputs: Vec<NodeId>, name: &str) -> NodeId {
        let shapes: Vec<&[usize]> = inputs.iter().map(|&i| self.nodes[i].shape.as_slice()).collect();
        let shape = match op.output_shape(&shapes) {
            Ok(shape) => shape,
            Err(e) => {
                self.fail(Error::refused(format!("{}, layer `{name}`: {e}", self.name)));
                self.nodes[self.here].shape.clone()
            }
        };
        self.nodes.push(Node { op, inputs, name: name.to_string(), shape });
        self.here = self.nodes.len() - 1;
        self.here
    }

    fn fail(&mut self, e: Error) {
        self.error.get_or_insert(e);
    }

    fn param(&mut self, name: String, shape: &[usize], init: Init) -> usize {
        self.inits.push(init);
        self.params.param(name, shape)
    }

    /// A convolution with parameters `name.weight` and, with a bias, `name.bias`.
    pub fn conv(&mut self, name: &str, conv: Conv) -> NodeId {
        let cin = self.channels();
        if conv.groups == 0
            || !cin.is_multiple_of(conv.groups.max(1))
            || !conv.out.is_multiple_of(conv.groups.max(1))
            || conv.kernel.contains(&0)
            || conv.stride.contains(&0)
        {
            self.fail(Error::refused(format!(
                "{}, layer `{name}`: {cin} to {} channels in {} groups, kernel {:?}, stride {:?}: groups must divide both, kernel and stride be at least 1",
                self.name, conv.out, conv.groups, conv.kernel, conv.stride
            )));
            return self.here;
        }
        let shape = [conv.out, cin / conv.groups, conv.kernel[0], conv.kernel[1]];
        let weight = self.param(format!("{name}.weight"), &shape, conv.init);
        let bias = conv.bias.map(|init| {
            let init = init.unwrap_or_else(|| Init::default_bias(shape[1..].iter().product()));
            self.param(format!("{name}.bias"), &[conv.out], init)
        });
        let op = Op::Conv2d(Conv2d {
            in_channels: cin,
            out_channels: conv.out,
            kernel: conv.kernel,
            stride: conv.stride,
            padding: conv.padding,
            dilation: conv.dilation,
            groups: conv.groups,
            weight,
            bias,
        });
        self.push(op, vec![self.here], name)
    }

    /// A transposed convolution with bias, both initialised as PyTorch does, to `out` channels with a square kernel.
    pub fn conv_transpose(&mut self, name: &str, out: usize, kernel: usize, stride: usize, padding: usize) -> NodeId {
        let cin = self.channels();
        if stride == 0 || padding >= kernel {
            self.fail(Error::refused(format!(
                "{}, layer `{name}`: kernel {kernel}, stride {stride}, padding {padding}: stride must be at least 1, padding less than the kernel",
                self.name
            )));
            return self.here;
        }
        let weight = self.param(format!("{name}.weight"), &[cin, out, kernel, kernel], Init::Default);
        // PyTorch takes the weight's second axis for the inputs, here the outputs.
        let bias = self.param(format!("{name}.bias"), &[out], Init::default_bias(out * kernel * kernel));
        let op = ConvTranspose2d { in_channels: cin, out_channels: out, kernel, stride, padding, weight, bias };
        self.push(Op::ConvTranspose2d(op), vec![self.here], name)
    }

    /// A batch norm as PyTorch's default: scale and shift, eps 1e-5, momentum 0.1.
    pub fn batch_norm(&mut self, name: &str) -> NodeId {
        self.batch_norm_with(name, true, 1e-5)
    }

    /// A batch norm with or without scale and shift.
    pub fn batch_norm_with(&mut self, name: &str, affine: bool, eps: f64) -> NodeId {
        self.batch_norm_as(name, affine, eps, 0.1)
    }

    /// A batch norm, everything given. `momentum` is the batch's share of the running statistics.
    pub fn batch_norm_as(&mut self, name: &str, affine: bool, eps: f64, momentum: f64) -> NodeId {
        let c = self.channels();
        let affine = affine.then(|| {
            let weight = self.param(format!("{name}.weight"), &[c], Init::Const(1.0));
            (weight, self.param(format!("{name}.bias"), &[c], Init::Const(0.0)))
        });
        let mean = self.params.stat(format!("{name}.running_mean"), &[c]);
        let var = self.params.stat(format!("{name}.running_var"), &[c]);
        let counter = self.params.counter(format!("{name}.num_batches_tracked"));
        let op = Op::BatchNorm(BatchNorm { channels: c, eps, momentum, affine, running: (mean, var), counter });
        self.push(op, vec![self.here], name)
    }

    /// A linear layer with bias, both initialised as PyTorch does.
    pub fn linear(&mut self, name: &str, out: usize) -> NodeId {
        let fan_in = self.nodes[self.here].shape.last().copied().unwrap_or(0);
        self.linear_with(name, out, Init::Default, Some(Init::default_bias(fan_in)))
    }

    /// A linear layer, initialised so.
    pub fn linear_with(&mut self, name: &str, out: usize, init: Init, bias: Option<Init>) -> NodeId {
        let width = self.nodes[self.here].shape.last().copied().unwrap_or(0);
        let weight = self.param(format!("{name}.weight"), &[out, width], init);
        let bias = bias.map(|init| self.param(format!("{name}.bias"), &[out], init));
        self.push(Op::Linear { out, weight, bias }, vec![self.here], name)
    }

    /// Any layer without parameters, behind the cursor.
    pub fn layer(&mut self, op: Op) -> NodeId {
        if matches!(
            op,
            Op::Input | Op::Conv2d(_) | Op::ConvTranspose2d(_) | Op::BatchNorm(_) | Op::Linear { .. } | Op::Add | Op::Mul | Op::Concat
        ) {
            self.fail(Error::refused(format!("{}: `{}` has a method of its own", self.name, op.kind())));
            return self.here;
        }
        self.push(op, vec![self.here], "")
    }

    /// ReLU.
    pub fn relu(&mut self) -> NodeId {
        self.layer(Op::Relu)
    }

    /// Sum with `other`.
    pub fn add(&mut self, other: NodeId) -> NodeId {
        self.push(Op::Add, vec![self.here, other], "")
    }

    /// Product with `other`.
    pub fn mul(&mut self, other: NodeId) -> NodeId {
        self.push(Op::Mul, vec![self.here, other], "")
    }

    /// `nodes` joined along the channels, in the order given.
    pub fn concat(&mut self, nodes: &[NodeId]) -> NodeId {
        self.push(Op::Concat, nodes.to_vec(), "")
    }

    /// Maximum pooling.
    pub fn max_pool(&mut self, pool: Pool) -> NodeId {
        self.layer(Op::MaxPool(pool))
    }

    /// Average pooling.
    pub fn avg_pool(&mut self, pool: Pool) -> NodeId {
        self.layer(Op::AvgPool(pool))
    }

    /// Mean over height and width, to `[B,C]`.
    pub fn global_avg_pool(&mut self) -> NodeId {
        self.layer(Op::GlobalAvgPool)
    }

    /// Names the tensor at the cursor.
    pub fn cut(&mut self, cut: Cut) {
        if self.cuts.iter().any(|(c, _)| *c == cut) {
            self.fail(Error::refused(format!("{}: cut `{cut}` is named twice", self.name)));
        }
        self.cuts.push((cut, self.here));
    }

    /// Names the tensor at the cursor stage `i`, the output of module `name`; `norm` is the batch norm right before its last ReLU.
    pub fn stage(&mut self, i: usize, name: &str, norm: Option<&str>) {
        self.features.push((Cut::Stage(i), name.to_string(), norm.map(str::to_string)));
        self.cut(Cut::Stage(i));
    }

    /// Names the tensor at the cursor block `i` (from 1), the output of module `name`.
    pub fn block(&mut self, i: usize, name: &str) {
        self.features.push((Cut::Block(i), name.to_string(), None));
        self.cut(Cut::Block(i));
    }

    /// The graph, with its spec read off the cuts.
    ///
    /// # Errors
    /// The first mistake made while it was written.
    pub fn finish(mut self) -> Result<Graph> {
        if let Some(e) = self.error {
            return Err(e);
        }
        self.cuts.sort_by_key(|&(cut, node)| (node, cut));
        let find = |cut: Cut| self.cuts.iter().find(|(c, _)| *c == cut).map(|&(_, n)| n);
        let last = |cut: Cut| find(cut).and_then(|n| self.nodes[n].shape.last().copied()).unwrap_or(0);
        let features = |stages: bool| {
            let mut found: Vec<_> = self.features.iter().filter(|(c, ..)| matches!(c, Cut::Stage(_)) == stages).collect();
            found.sort_by_key(|(c, ..)| *c);
            let first = if stages { Cut::Stage(0) } else { Cut::Block(1) };
            for (k, (cut, ..)) in found.iter().enumerate() {
                let expected = if stages { Cut::Stage(k) } else { Cut::Block(k + 1) };
                if *cut != expected {
                    return Err(Error::refused(format!(
                        "{}: cuts of one kind count up from `{first}`, but `{expected}` is missing",
                        self.name
                    )));
                }
            }
            Ok(found
                .into_iter()
                .map(|(cut, name, norm)| {
                    let preact = matches!(cut, Cut::Stage(i) if find(Cut::Preact(*i)).is_some());
                    Graph::feature(&self.nodes, find(*cut).unwrap_or(0), name, preact, norm.clone())
                })
                .collect())
        };
        let input = &self.nodes[0].shape;
        let spec = ModelSpec {
            name: self.name.clone(),
            classes: last(Cut::Logits),
            embedding: last(Cut::Embedding),
            input: [input[0], input.get(1).copied().unwrap_or(1), input.get(2).copied().unwrap_or(1)],
            blocks: features(false)?,
            stages: features(true)?,
            logits_dist: find(Cut::LogitsDist).is_some(),
        };
        Ok(Graph { nodes: self.nodes, cuts: self.cuts, params: self.params, inits: self.inits, spec })
    }
}
