//! Running a tape backwards.

use std::sync::Arc;

use kd_core::Result;

use super::conv_grad::{ConvGrad, InputGrad};
use super::finish::{Finish, Sums, lane_of};
use super::forward::{Inputs, Tape, nth, subsampled};
use super::plan::{ConvStep, Kind, Step};
use super::value::{BehindNorm, Grad, Value};
use crate::graph::{BatchNorm, NodeId};
use crate::kernels::buffer::Buffer;
use crate::kernels::clock::{self, Cost};
use crate::kernels::layout::{self, Move};
use crate::kernels::norm;
use crate::kernels::pool::{self, AverageGrad, MaximumGrad};
use crate::kernels::threads::{cut, each, scratch};
use crate::kernels::{Level, elementwise};

/// A backward pass over one tape. The tape itself stays as it is.
struct Backward<'a> {
    tape: &'a Tape,
    /// The network's gradients, to be added to.
    sink: Option<&'a mut [f32]>,
    /// Gradients of outputs, by node.
    grads: Vec<Option<Grad>>,
    /// Whether they are [`Finish`]ed, by node.
    finished: Vec<bool>,
    /// The sums of batch norms' gradients that finishing has left, by node.
    sums: Vec<Option<Sums>>,
    /// Whether the input's gradient is wanted.
    input: bool,
}

impl Tape {
    /// Adds the parameters' gradients to the network's sink and returns the input's if it is wanted, from the gradients of outputs.
    pub(super) fn backward(&self, outputs: Vec<(NodeId, Buffer)>, input: bool) -> Result<Option<Arc<Buffer>>> {
        let run = |sink: Option<&mut [f32]>| {
            let nodes = self.plan.shapes.len();
            let mut pass =
                Backward { tape: self, sink, grads: vec![None; nodes], finished: vec![false; nodes], sums: vec![None; nodes], input };
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
        let tape = self.tape;
        let cost = || {
            let (cost, conv) = (tape.plan.cost(step, tape.lanes.images), matches!(step.kind, Kind::Conv(_)));
            // Two gradients, where one forward pass is one product.
            Cost { flops: cost.flops * if conv && self.wants(tape.plan.input_of(step)) { 2 } else { 1 }, floats: 2 * cost.floats }
        };
        // Known before `run` borrows everything; nobody asks while nobody profiles.
        let cost = if clock::on() { cost() } else { Cost::default() };
        clock::at(|| tape.plan.place(step, &tape.params, "backward"), false, || cost, || self.run(at, step, grad));
    }

    fn run(&mut self, at: usize, step: &Step, mut grad: Grad) {
        if let Some(finish) = Finish::of(self.tape, step.out).filter(|_| !self.finished[step.out]) {
            grad = Grad::Stored(self.finish(&finish, self.stored(grad, step.out)));
        }
        match &step.kind {
            Kind::Conv(conv) => self.conv(at, conv, &grad),
            kind => {
                let grad = self.stored(grad, step.out);
                self.other(step.out, kind, grad);
            }
        }
    }

    /// Finishes a gradient that no convolution has finished on the way.
    fn finish(&mut self, finish: &Finish, grad: Arc<Buffer>) -> Arc<Buffer> {
        let (tape, level, len) = (self.tape, self.level(), finish.len);
        let mut sums = finish.sums(tape.lanes.count);
        let shares = tape.lanes.shares();
        let mut own = match Arc::try_unwrap(grad) {
            Ok(mine) => mine,
            // Someone else still reads it as it is.
            Err(shared) if finish.changes() => tape.map(len, |i, out| out.copy_from_slice(nth(&shared, len, i))),
            Err(shared) => {
                let parts = cut(&mut sums, shares.iter().map(|s| s.lanes.len() * finish.sums_len()));
                each(shares.into_iter().zip(parts).collect(), |(share, sums)| {
                    share.images.for_each(|i| {
                        finish.sum(level, i, nth(&shared, len, i), lane_of(sums, tape.lanes.of(i) - share.lanes.start, finish))
                    });
                });
                self.keep(finish, &sums);
                return shared;
            }
        };
        let parts = cut(&mut own, shares.iter().map(|s| s.images.len() * len));
        let sums_parts = cut(&mut sums, shares.iter().map(|s| s.lanes.len() * finish.sums_len()));
        each(shares.into_iter().zip(parts).zip(sums_parts).collect(), |((share, part), sums)| {
            for (i, d) in share.images.clone().zip(part.chunks_exact_mut(len)) {
                finish.image(level, i, d, lane_of(sums, tape.lanes.of(i) - share.lanes.start, finish));
            }
        });
        self.keep(finish, &sums);
        Arc::new(own)
    }

    fn keep(&mut self, finish: &Finish, lanes: &[f64]) {
        for (node, sums) in finish.collect(lanes) {
            self.sums[node] = Some(sums);
        }
    }

    fn conv(&mut self, at: usize, step: &ConvStep, grad: &Grad) {
        if let (Some(residual), Grad::Stored(data)) = (step.residual, grad) {
            self.give(residual, data.clone());
        }
        let tape = self.tape;
        let (x, lens) = tape.value(step.x).view();
        let job = ConvGrad {
            level: self.level(),
            inputs: Inputs { conv: &step.conv, x, lens },
            panels: tape.packed(at).backward.as_deref(),
            grad,
        };
        let mut weight = self.sink.is_some().then(|| job.weight_sums(tape, step.bias.is_some()));
        if self.wants(step.x) {
            let finish = Finish::of(tape, step.x).filter(|_| tape.plan.first_reader[step.x] == at);
            let mut sums = vec![];
            self.write(step.x, |tape, dx, add| sums = job.run(tape, weight.as_mut(), Some(InputGrad { dx, add, finish: finish.as_ref() })));
            if let Some(finish) = finish {
                self.finished[step.x] = true;
                self.keep(&finish, &sums);
            }
        } else {
            job.run(tape, weight.as_mut(), None);
        }
        if let (Some(sums), Some(sink)) = (weight, &mut self.sink) {
            let entries = tape.params.entries();
            sums.gather(&step.conv, &mut sink[entries[step.weight].range()]);
            tape.reach([step.weight]);
            if let Some(bias) = step.bias {
                sums.gather_bias(&mut sink[entries[bias].range()]);
                tape.reach([bias]);
            }
        }
    }

    fn norm(&mut self, out: NodeId, x: NodeId, bn: &BatchNorm, only_reader: bool, d: Arc<Buffer>) {
        let tape = self.tape;
        let Value::Seen { raw, norm, .. } = tape.value(out).clone() else {
            unreachable!("invariant: the output of a batch norm");
        };
        let (len, channels) = (tape.shape(out).len(), bn.channels);
        // With running statistics the mean does not move with the input.
        let Sums { s1, s2 } = self.sums[out].take().unwrap_or_else(|| Sums { s1: vec![0.0; channels], s2: vec![0.0; channels] });
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
            Kind::Norm { x, norm, only_reader, .. } => self.norm(out, *x, norm, *only_reader, d),
            Kind::Add { a, b, .. } => {
                self.give(*a, d.clone());
                self.give(*b, d);
            }
            Kind::Rectify { x, .. } => self.give(*x, d),
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
