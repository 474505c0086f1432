//! Running a tape backwards.

use std::sync::Arc;

use kd_core::Result;

use super::forward::{Inputs, Tape, clear, nth, subsampled};
use super::plan::{ConvStep, Kind, Step};
use super::value::{BehindNorm, Grad, Value};
use crate::graph::{BatchNorm, NodeId};
use crate::kernels::buffer::Buffer;
use crate::kernels::conv::{Conv, Padded};
use crate::kernels::layout::{self, Move};
use crate::kernels::norm;
use crate::kernels::pool::{self, AverageGrad, MaximumGrad};
use crate::kernels::threads::{Lanes, cut, each, ranges, scratch};
use crate::kernels::tile::Activation;
use crate::kernels::{Level, elementwise};

/// A backward pass over one tape. The tape itself stays as it is.
struct Backward<'a> {
    tape: &'a Tape,
    /// The network's gradients, to be added to.
    sink: Option<&'a mut [f32]>,
    /// Gradients of outputs, by node.
    grads: Vec<Option<Grad>>,
    /// Whether the input's gradient is wanted.
    input: bool,
}

impl Tape {
    /// Adds the parameters' gradients to the network's sink and returns the input's if it is wanted, from the gradients of outputs.
    pub(super) fn backward(&self, outputs: Vec<(NodeId, Buffer)>, input: bool) -> Result<Option<Arc<Buffer>>> {
        let run = |sink: Option<&mut [f32]>| {
            let mut pass = Backward { tape: self, sink, grads: vec![None; self.plan.shapes.len()], input };
            for (node, grad) in outputs {
                pass.give(node, Arc::new(grad));
            }
            for (at, step) in self.plan.steps.iter().enumerate().rev() {
                pass.step(at, step);
            }
            pass.grads[self.plan.from].take().map(|g| pass.stored(g, self.plan.from))
        };
        if self.tracked { self.params.grads().write::<f32, _>(|sink| run(Some(sink))) } else { Ok(run(None)) }
    }

    /// Notes that gradients arrived at parameters.
    fn reach(&self, params: impl IntoIterator<Item = usize>) {
        params.into_iter().for_each(|p| self.params.mark_reached(p));
    }
}

impl Backward<'_> {
    fn level(&self) -> Level {
        self.tape.plan.level
    }

    /// Whether a node's gradient is wanted.
    fn wants(&self, node: NodeId) -> bool {
        self.tape.plan.wants_grad(node, self.sink.is_some(), self.input)
    }

    /// A gradient as plain memory.
    fn stored(&self, grad: Grad, node: NodeId) -> Arc<Buffer> {
        match grad {
            Grad::Stored(data) => data,
            Grad::Norm(behind) => Arc::new(self.behind_norm(&behind, node)),
        }
    }

    fn behind_norm(&self, behind: &BehindNorm, node: NodeId) -> Buffer {
        let (level, shape) = (self.level(), self.tape.shape(node));
        let (len, around) = (shape.len(), shape.unpadded());
        let factors = behind.factors();
        self.tape.map(len, |i, out| norm::fill_grad(level, nth(&behind.d, len, i), nth(&behind.y, len, i), factors, &around, out))
    }

    /// Adds a gradient to those of a node.
    fn give(&mut self, node: NodeId, grad: Arc<Buffer>) {
        if !self.wants(node) {
            return;
        }
        if self.grads[node].is_none() {
            self.grads[node] = Some(Grad::Stored(grad));
            return;
        }
        let len = self.tape.shape(node).len();
        self.write(node, |tape, out, _| tape.for_each(out, len, |i, out| elementwise::accumulate(nth(&grad, len, i), out)));
    }

    /// Lets `f` write a node's gradient, or add to it if there is one already (the flag says so).
    fn write(&mut self, node: NodeId, f: impl FnOnce(&Tape, &mut [f32], bool)) {
        let tape = self.tape;
        let len = tape.shape(node).len();
        let old = self.grads[node].take().map(|g| self.stored(g, node));
        let add = old.is_some();
        let mut out = match old.map(Arc::try_unwrap) {
            None => tape.pool.take(tape.lanes.images * len),
            Some(Ok(mine)) => mine,
            // Someone else still reads it.
            Some(Err(shared)) => tape.map(len, |i, out| out.copy_from_slice(nth(&shared, len, i))),
        };
        f(tape, &mut out, add);
        self.grads[node] = Some(Grad::Stored(Arc::new(out)));
    }

    /// As [`Backward::write`], image by image; an image is zero before the first gradient is added.
    fn add(&mut self, node: NodeId, f: impl Fn(usize, &mut [f32]) + Sync) {
        if !self.wants(node) {
            return;
        }
        let len = self.tape.shape(node).len();
        self.write(node, |tape, out, add| {
            tape.for_each(out, len, |i, out| {
                if !add {
                    out.fill(0.0);
                }
                f(i, out);
            });
        });
    }

    fn step(&mut self, at: usize, step: &Step) {
        let Some(grad) = self.grads[step.out].take() else { return };
        if !self.wants(step.out) {
            return;
        }
        match &step.kind {
            Kind::Conv(conv) => self.conv(at, step.out, conv, grad),
            kind => {
                let grad = self.stored(grad, step.out);
                self.other(step.out, kind, grad);
            }
        }
    }

    /// The gradient before an activation, from its output (or its input).
    fn unmask(&self, activation: Activation, v: &[f32], grad: Arc<Buffer>, node: NodeId) -> Arc<Buffer> {
        if activation == Activation::None {
            return grad;
        }
        let (level, len) = (self.level(), self.tape.shape(node).len());
        let mask = |i: usize, out: &mut [f32]| elementwise::mask(level, activation, nth(v, len, i), out);
        Arc::new(match Arc::try_unwrap(grad) {
            Ok(mut mine) => {
                self.tape.for_each(&mut mine, len, mask);
                mine
            }
            Err(shared) => self.tape.map(len, |i, out| {
                out.copy_from_slice(nth(&shared, len, i));
                mask(i, out);
            }),
        })
    }

    fn conv(&mut self, at: usize, out: NodeId, step: &ConvStep, mut grad: Grad) {
        if step.activation != Activation::None {
            let stored = self.stored(grad, out);
            let value = self.tape.stored(out);
            grad = Grad::Stored(self.unmask(step.activation, &value, stored, out));
        }
        if let (Some(residual), Grad::Stored(data)) = (step.residual, &grad) {
            self.give(residual, data.clone());
        }
        let tape = self.tape;
        let inputs = Inputs { conv: &step.conv, lens: tape.value(step.x).view().1, x: tape.value(step.x).view().0 };
        let job = ConvGrad { level: self.level(), inputs, panels: tape.packed(at).backward.as_deref(), grad: &grad };
        let mut sums = self.sink.is_some().then(|| job.sums(tape, step.bias.is_some()));
        if self.wants(step.x) {
            self.write(step.x, |tape, dx, add| job.run(tape, sums.as_mut(), Some((dx, add))));
        } else {
            job.run(tape, sums.as_mut(), None);
        }
        if let (Some(sums), Some(sink)) = (sums, &mut self.sink) {
            let entries = tape.params.entries();
            sums.gather(&step.conv, &mut sink[entries[step.weight].range()]);
            tape.reach([step.weight]);
            if let Some(bias) = step.bias {
                sums.gather_bias(&mut sink[entries[bias].range()]);
                tape.reach([bias]);
            }
        }
    }

    fn norm(&mut self, out: NodeId, x: NodeId, bn: &BatchNorm, batch: bool, only_reader: bool, d: Arc<Buffer>) {
        let tape = self.tape;
        let Value::Seen { raw, norm, .. } = tape.value(out).clone() else {
            unreachable!("invariant: the output of a batch norm");
        };
        let (level, shape) = (self.level(), tape.shape(out));
        let (len, channels) = (shape.len(), shape.channels());
        let (mut s1, mut s2) = (vec![0.0; channels], vec![0.0; channels]);
        if batch {
            let mut lanes = vec![0.0f64; tape.lanes.count * 2 * channels];
            let shares = tape.lanes.shares();
            let parts = cut(&mut lanes, shares.iter().map(|s| s.lanes.len() * 2 * channels));
            each(shares.into_iter().zip(parts).collect(), |(share, part)| {
                for (lane, sums) in share.lanes.zip(part.chunks_exact_mut(2 * channels)) {
                    let (s1, s2) = sums.split_at_mut(channels);
                    for i in tape.lanes.lane(lane) {
                        norm::grad_sums(level, nth(&d, len, i), nth(&raw, len, i), norm.lens(), &norm.mean, s1, s2);
                    }
                }
            });
            for lane in lanes.chunks_exact(2 * channels) {
                s1.iter_mut().zip(&lane[..channels]).for_each(|(s, v)| *s += v);
                s2.iter_mut().zip(&lane[channels..]).for_each(|(s, v)| *s += v);
            }
        }
        if let (Some(sink), Some((scale, shift))) = (&mut self.sink, bn.affine) {
            let (scale_at, shift_at) = (tape.params.entries()[scale].range(), tape.params.entries()[shift].range());
            let inv = norm.inv.iter().map(|i| f64::from(*i));
            sink[scale_at].iter_mut().zip(inv.zip(&s2)).for_each(|(g, (inv, s2))| *g += (inv * s2) as f32);
            sink[shift_at].iter_mut().zip(&s1).for_each(|(g, s1)| *g += *s1 as f32);
            tape.reach([scale, shift]);
        }
        if !self.wants(x) {
            return;
        }
        let n = (tape.lanes.images * len / channels) as f64;
        let factor = |c: usize| (f64::from(norm.scale[c]), f64::from(norm.inv[c]));
        let behind = BehindNorm {
            k0: norm.scale.clone(),
            k1: (0..channels).map(|c| (-factor(c).0 * factor(c).1 * factor(c).1 * s2[c] / n) as f32).collect(),
            k2: (0..channels).map(|c| (-factor(c).0 * s1[c] / n) as f32).collect(),
            d,
            y: raw,
            norm,
        };
        if only_reader {
            self.grads[x] = Some(Grad::Norm(Arc::new(behind)));
        } else {
            let dx = self.behind_norm(&behind, x);
            self.give(x, Arc::new(dx));
        }
    }

    fn other(&mut self, out: NodeId, kind: &Kind, d: Arc<Buffer>) {
        let (tape, level, shape) = (self.tape, self.level(), self.tape.shape(out));
        let (len, channels) = (shape.len(), shape.channels());
        let dy = |i: usize| nth(&d, len, i);
        match kind {
            Kind::Conv(_) => unreachable!("invariant: done by its own function"),
            Kind::Norm { x, norm, batch, only_reader, .. } => self.norm(out, *x, norm, *batch, *only_reader, d),
            Kind::Add { a, b, activation } => {
                let d = if *activation == Activation::None { d } else { self.unmask(*activation, &tape.stored(out), d, out) };
                self.give(*a, d.clone());
                self.give(*b, d);
            }
            Kind::Rectify { x, activation } => {
                let d = self.unmask(*activation, &tape.stored(out), d, out);
                self.give(*x, d);
            }
            Kind::Function { x, function } => {
                let value = tape.stored(*x);
                self.add(*x, |i, dx| function.backward(nth(&value, len, i), dy(i), dx));
            }
            Kind::Mul { x, gate } => {
                let (xv, gv) = (tape.stored(*x), tape.stored(*gate));
                let by = tape.shape(*gate).len();
                self.add(*x, |i, dx| {
                    let factors = nth(&gv, by, i).iter().cycle();
                    dx.iter_mut().zip(dy(i)).zip(factors).for_each(|((o, d), g)| *o += d * g);
                });
                self.add(*gate, |i, dg| {
                    for (d, x) in dy(i).chunks_exact(by).zip(nth(&xv, len, i).chunks_exact(by)) {
                        dg.iter_mut().zip(d).zip(x).for_each(|((o, d), x)| *o += d * x);
                    }
                });
            }
            Kind::Channels { sources, .. } => {
                for (source, moves) in sources {
                    let back: Vec<Move> = moves.iter().map(|m| Move { from: m.to, to: m.from, len: m.len }).collect();
                    let to = tape.shape(*source).channels();
                    self.add(*source, |i, dx| layout::move_channels(&back, dy(i), channels, dx, to, true));
                }
            }
            Kind::Subsample { x, stride } => {
                let from = tape.shape(*x);
                self.add(*x, |i, dx| {
                    subsampled(from, *stride)
                        .zip(dy(i).chunks_exact(channels))
                        .for_each(|(at, d)| elementwise::accumulate(d, &mut dx[at..at + channels]));
                });
            }
            Kind::Max { x, windows } => {
                let (value, from) = (tape.stored(*x), tape.shape(*x).len());
                self.add(*x, |i, dx| {
                    scratch(2 * channels, |scratch| {
                        pool::run(level, MaximumGrad { windows, x: nth(&value, from, i), dy: dy(i), dx, scratch });
                    });
                });
            }
            Kind::Average { x, windows } => self.add(*x, |i, dx| pool::run(level, AverageGrad { windows, dy: dy(i), dx })),
            Kind::Flatten { x } => {
                let from = tape.shape(*x);
                self.add(*x, |i, dx| layout::add_flattened(dy(i), from.channels(), dx));
            }
            Kind::Drop { x, p, samples } => {
                let dx = tape.map(len, |i, dx| {
                    dx.copy_from_slice(dy(i));
                    tape.drop_out(out, *p, *samples, i, dx);
                });
                self.give(*x, Arc::new(dx));
            }
        }
    }
}

/// Weights up to so many floats have their gradient summed per lane, so many lanes being kept; larger ones are divided among the threads
/// by rows of the product, each summed over the whole batch by one thread.
const LANE_SIZES: [(usize, usize); 2] = [(16 * 1024, 16), (64 * 1024, 8)];

/// A weight gradient on the way.
struct WeightSums {
    /// Lanes that are summed apart; 1 when rows are divided.
    lanes: Lanes,
    by_row: bool,
    /// `[lane][tap][ci/groups][co]`.
    weight: Buffer,
    /// `[lane][co]`, if there is a bias.
    bias: Vec<f64>,
}

impl WeightSums {
    /// Adds the sum of the lanes, in order, to the gradient of the weight.
    fn gather(&self, conv: &Conv, grad: &mut [f32]) {
        let per_output = conv.weight_len() / conv.co;
        let ranges = ranges(conv.co);
        let parts = cut(grad, ranges.iter().map(|r| r.len() * per_output));
        each(ranges.into_iter().zip(parts).collect(), |(range, part)| conv.add_weight_grad(&self.weight, range, part));
    }

    fn gather_bias(&self, grad: &mut [f32]) {
        let outputs = grad.len();
        for (o, g) in grad.iter_mut().enumerate() {
            *g += self.bias.iter().skip(o).step_by(outputs).sum::<f64>() as f32;
        }
    }
}

/// The backward pass of one convolution.
struct ConvGrad<'a> {
    level: Level,
    inputs: Inputs<'a>,
    /// Packed weights for the input gradient.
    panels: Option<&'a [f32]>,
    grad: &'a Grad,
}

impl ConvGrad<'_> {
    fn sums(&self, tape: &Tape, bias: bool) -> WeightSums {
        let (conv, images) = (self.inputs.conv, tape.lanes.images);
        let len = conv.weight_len();
        let found = LANE_SIZES.iter().find(|(size, _)| len <= *size);
        let lanes = found.map_or(Lanes::new(images), |(_, lanes)| Lanes::at_most(images, *lanes));
        let by_row = found.is_none();
        let copies = if by_row { 1 } else { lanes.count };
        let bias = if bias { vec![0.0; lanes.count * conv.co] } else { vec![] };
        WeightSums { lanes, by_row, weight: tape.pool.zeros(copies * len), bias }
    }

    /// The output's gradients of images `start..start + n`, padded.
    fn read_grad<'a>(&'a self, start: usize, n: usize, pad: &'a mut [f32]) -> &'a [f32] {
        let (padded, len) = (&self.inputs.conv.grad, self.inputs.conv.out_image());
        if self.direct()
            && let Grad::Stored(d) = self.grad
        {
            return &d[start * len..(start + n) * len];
        }
        for (i, whole) in (start..start + n).zip(pad.chunks_exact_mut(padded.len())) {
            match self.grad {
                Grad::Stored(d) => norm::fill(self.level, nth(d, len, i), None, padded, whole),
                Grad::Norm(b) => norm::fill_grad(self.level, nth(&b.d, len, i), nth(&b.y, len, i), b.factors(), padded, whole),
            }
        }
        pad
    }

    /// Whether the output's gradients can be read where they are.
    fn direct(&self) -> bool {
        self.inputs.conv.grad.plain() && matches!(self.grad, Grad::Stored(_))
    }

    /// Sums the weight's gradient and writes the input's (or adds to it), whichever is given, in one pass over the images.
    fn run(&self, tape: &Tape, sums: Option<&mut WeightSums>, dx: Option<(&mut [f32], bool)>) {
        if let Some(sums) = sums {
            if sums.by_row { self.by_row(tape, sums, dx) } else { self.by_lane(sums.lanes, Some(sums), dx) }
        } else {
            self.by_lane(tape.lanes, None, dx);
        }
    }

    fn by_lane(&self, lanes: Lanes, sums: Option<&mut WeightSums>, dx: Option<(&mut [f32], bool)>) {
        let conv = self.inputs.conv;
        let (in_len, weight_len) = (conv.input.image(), conv.weight_len());
        let shares = lanes.shares();
        let add = dx.as_ref().is_some_and(|d| d.1);
        let (weight, bias): (&mut [f32], &mut [f64]) = match sums {
            Some(s) => (&mut s.weight, &mut s.bias),
            None => (&mut [], &mut []),
        };
        let (weighted, biased, wants_dx) = (!weight.is_empty(), !bias.is_empty(), dx.is_some());
        let per = |on: bool, n: usize| if on { n } else { 0 };
        let weights = cut(weight, shares.iter().map(|s| per(weighted, s.lanes.len() * weight_len)));
        let biases = cut(bias, shares.iter().map(|s| per(biased, s.lanes.len() * conv.co)));
        let dxs = cut(dx.map_or(&mut [], |d| d.0), shares.iter().map(|s| per(wants_dx, s.images.len() * in_len)));
        let parts: Vec<_> = shares.into_iter().zip(weights).zip(biases.into_iter().zip(dxs)).collect();
        each(parts, |((share, weight), (bias, dx))| {
            let group = conv.group();
            let (x_len, d_len) = (per(weighted, self.inputs.scratch_len(group)), per(!self.direct(), group * conv.grad.len()));
            let product_len = per(weighted, conv.product_len());
            scratch(x_len + d_len + product_len + conv.work_len(group), |memory| {
                let (x_pad, memory) = memory.split_at_mut(x_len);
                let (d_pad, memory) = memory.split_at_mut(d_len);
                let (product, work) = memory.split_at_mut(product_len);
                clear(&conv.input, x_pad);
                clear(&conv.grad, d_pad);
                for (at, lane) in share.lanes.clone().enumerate() {
                    let images = lanes.lane(lane);
                    product.fill(0.0);
                    for start in images.clone().step_by(group) {
                        let n = group.min(images.end - start);
                        let d = self.read_grad(start, n, d_pad);
                        if weighted {
                            let x = self.inputs.read(self.level, start, n, in_len, x_pad);
                            if product_len > 0 {
                                conv.weight_product(n, x, d, product, work);
                            } else {
                                conv.weight_grad(n, x, d, 0..weight_len / conv.co, &mut weight[at * weight_len..(at + 1) * weight_len]);
                            }
                        }
                        if biased {
                            self.bias(n, d, &mut bias[at * conv.co..(at + 1) * conv.co]);
                        }
                        if let (true, Some(panels)) = (wants_dx, self.panels) {
                            let from = (start - share.images.start) * in_len;
                            conv.input_grad(n, d, panels, &mut dx[from..from + n * in_len], add, work);
                        }
                    }
                    if product_len > 0 {
                        conv.finish_weight_grad(product, &mut weight[at * weight_len..(at + 1) * weight_len]);
                    }
                }
            });
        });
    }

    /// Reads all images once, keeping them padded, then lets every thread sum its rows of the weight's gradient over all of them.
    fn by_row(&self, tape: &Tape, sums: &mut WeightSums, dx: Option<(&mut [f32], bool)>) {
        let (conv, lanes) = (self.inputs.conv, tape.lanes);
        let in_len = conv.input.image();
        let (x_len, d_len) = (conv.input.len(), conv.grad.len());
        let hold = |direct: bool, len: usize| tape.pool.take(if direct { 0 } else { lanes.images * len });
        let (mut xs, mut ds) = (hold(self.inputs.direct(), x_len), hold(self.direct(), d_len));
        let shares = lanes.shares();
        let (add, wants_dx, biased) = (dx.as_ref().is_some_and(|d| d.1), dx.is_some(), !sums.bias.is_empty());
        let per = |on: bool, n: usize| if on { n } else { 0 };
        let x_parts = cut(&mut xs, shares.iter().map(|s| per(!self.inputs.direct(), s.images.len() * x_len)));
        let d_parts = cut(&mut ds, shares.iter().map(|s| per(!self.direct(), s.images.len() * d_len)));
        let biases = cut(&mut sums.bias, shares.iter().map(|s| per(biased, s.lanes.len() * conv.co)));
        let dxs = cut(dx.map_or(&mut [], |d| d.0), shares.iter().map(|s| per(wants_dx, s.images.len() * in_len)));
        let parts: Vec<_> = shares.into_iter().zip(x_parts.into_iter().zip(d_parts)).zip(biases.into_iter().zip(dxs)).collect();
        each(parts, |((share, (x_pad, d_pad)), (bias, dx))| {
            let (start, n) = (share.images.start, share.images.len());
            clear(&conv.input, x_pad);
            clear(&conv.grad, d_pad);
            self.inputs.read(self.level, start, n, in_len, x_pad);
            let d = self.read_grad(start, n, d_pad);
            for (sums, lane) in bias.chunks_exact_mut(conv.co).zip(share.lanes) {
                let images = lanes.lane(lane);
                self.bias(images.len(), &d[(images.start - start) * d_len..], sums);
            }
            if let (true, Some(panels)) = (wants_dx, self.panels) {
                let group = conv.group();
                scratch(conv.work_len(group), |work| {
                    for (d, dx) in d.chunks(group * d_len).zip(dx.chunks_mut(group * in_len)) {
                        conv.input_grad(dx.len() / in_len, d, panels, dx, add, work);
                    }
                });
            }
        });
        let d = match self.grad {
            Grad::Stored(d) if self.direct() => &***d,
            _ => &*ds,
        };
        let x = if self.inputs.direct() { self.inputs.x } else { &*xs };
        let rows = conv.weight_len() / conv.co;
        let ranges = ranges(rows);
        let parts = cut(&mut sums.weight, ranges.iter().map(|r| r.len() * conv.co));
        each(ranges.into_iter().zip(parts).collect(), |(range, part)| conv.weight_grad(lanes.images, x, d, range, part));
    }

    /// Adds the sums of the gradients of `n` padded images.
    fn bias(&self, n: usize, d: &[f32], sums: &mut [f64]) {
        let padded: &Padded = &self.inputs.conv.grad;
        for image in d.chunks_exact(padded.len()).take(n) {
            for y in 0..padded.h {
                norm::total(self.level, &image[padded.origin() + y * padded.row()..][..padded.w * padded.c], sums);
            }
        }
    }
}
