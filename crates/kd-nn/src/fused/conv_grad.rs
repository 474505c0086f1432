//! The backward pass of a convolution: both gradients in one pass over the images.

use super::finish::{Finish, lane_of};
use super::forward::{Inputs, Tape, clear, nth};
use super::value::Grad;
use crate::kernels::Level;
use crate::kernels::buffer::Buffer;
use crate::kernels::conv::{Conv, Group};
use crate::kernels::norm;
use crate::kernels::sweep::Padded;
use crate::kernels::threads::{Lanes, Share, cut, each, ranges, scratch};
use crate::kernels::winograd::{Points, Winograd};

/// Weights up to so many floats have their gradient summed per lane, so many lanes being kept; larger ones are divided among the threads
/// by rows of the product, each summed over the whole batch by one thread.
const LANE_SIZES: [(usize, usize); 2] = [(16 * 1024, 16), (64 * 1024, 8)];

/// Channels times outputs whose products of all points a thread sums at a time.
const CHANNELS: usize = 8 * 1024;

/// A weight gradient on the way.
pub(super) struct WeightSums {
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
    pub(super) fn gather(&self, conv: &Conv, grad: &mut [f32]) {
        let per_output = conv.weight_len() / conv.co;
        let ranges = ranges(conv.co);
        let parts = cut(grad, ranges.iter().map(|r| r.len() * per_output));
        each(ranges.into_iter().zip(parts).collect(), |(range, part)| conv.add_weight_grad(&self.weight, range, part));
    }

    pub(super) fn gather_bias(&self, grad: &mut [f32]) {
        let outputs = grad.len();
        for (o, g) in grad.iter_mut().enumerate() {
            *g += self.bias.iter().skip(o).step_by(outputs).sum::<f64>() as f32;
        }
    }
}

/// The backward pass of one convolution.
pub(super) struct ConvGrad<'a> {
    pub level: Level,
    pub inputs: Inputs<'a>,
    /// Packed weights for the input gradient.
    pub panels: Option<&'a [f32]>,
    /// The gradient of its output.
    pub grad: &'a Grad,
}

/// The gradient of its input, to be written.
pub(super) struct InputGrad<'a> {
    pub dx: &'a mut [f32],
    /// Whether to add to what is there.
    pub add: bool,
    /// What is done to it then.
    pub finish: Option<&'a Finish>,
}

impl ConvGrad<'_> {
    pub(super) fn weight_sums(&self, tape: &Tape, bias: bool) -> WeightSums {
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

    /// Sums the weight's gradient and writes the input's, whichever is given, in one pass over the images; the sums of finishing the latter,
    /// by lane.
    pub(super) fn run(&self, tape: &Tape, weight: Option<&mut WeightSums>, input: Option<InputGrad>) -> Vec<f64> {
        match weight {
            Some(sums) if sums.by_row => match self.inputs.conv.winograd() {
                Some(w) => self.by_channel(tape, w, sums, input),
                None => self.by_row(tape, sums, input),
            },
            Some(sums) => self.by_lane(sums.lanes, Some(sums), input),
            None => self.by_lane(tape.lanes, None, input),
        }
    }

    fn by_lane(&self, lanes: Lanes, sums: Option<&mut WeightSums>, input: Option<InputGrad>) -> Vec<f64> {
        let conv = self.inputs.conv;
        let weight_len = conv.weight_len();
        let shares = lanes.shares();
        let (weight, bias): (&mut [f32], &mut [f64]) = match sums {
            Some(s) => (&mut s.weight, &mut s.bias),
            None => (&mut [], &mut []),
        };
        let (weighted, biased) = (!weight.is_empty(), !bias.is_empty());
        let weights = cut(weight, shares.iter().map(|s| if weighted { s.lanes.len() * weight_len } else { 0 }));
        let biases = cut(bias, shares.iter().map(|s| if biased { s.lanes.len() * conv.co } else { 0 }));
        let mut finished = finish_sums(&input, lanes);
        let inputs = self.divide(input, &shares, &mut finished);
        let parts: Vec<_> = shares.into_iter().zip(weights).zip(biases.into_iter().zip(inputs)).collect();
        each(parts, |((share, weight), (bias, mut input))| {
            let group = conv.group();
            let x_len = if weighted { self.inputs.scratch_len(group) } else { 0 };
            let d_len = if self.direct() { 0 } else { group * conv.grad.len() };
            let product_len = if weighted { conv.product_len() } else { 0 };
            scratch(x_len + d_len + product_len + conv.work_len(), |memory| {
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
                            let x = self.inputs.read(self.level, start, n, conv.input.image(), x_pad);
                            if product_len > 0 {
                                conv.weight_product(n, x, d, product, work);
                            } else {
                                conv.weight_grad(n, x, d, 0..weight_len / conv.co, nth_mut(weight, weight_len, at));
                            }
                        }
                        if biased {
                            self.bias(n, d, nth_mut(bias, conv.co, at));
                        }
                        if let Some(input) = &mut input {
                            let [a, b, c] = self.ahead(start + n, share.images.end.min(start + 2 * n), weighted);
                            let ahead = [a, b, c, input.finish.map_or(&[], |f| f.ahead(start, start + n))];
                            input.write(self, &share, start, Group { images: n, x: d, ahead: Some(&ahead) }, &lanes, work);
                        }
                    }
                    if product_len > 0 {
                        conv.finish_weight_grad(product, nth_mut(weight, weight_len, at));
                    }
                }
            });
        });
        finished
    }

    /// Reads all images once, keeping them padded, then lets every thread sum its rows of the weight's gradient over all of them.
    fn by_row(&self, tape: &Tape, sums: &mut WeightSums, input: Option<InputGrad>) -> Vec<f64> {
        let (conv, lanes) = (self.inputs.conv, tape.lanes);
        let (x_len, d_len) = (conv.input.len(), conv.grad.len());
        let (x_direct, d_direct, biased) = (self.inputs.direct(), self.direct(), !sums.bias.is_empty());
        let mut xs = tape.pool.take(if x_direct { 0 } else { lanes.images * x_len });
        let mut ds = tape.pool.take(if d_direct { 0 } else { lanes.images * d_len });
        let shares = lanes.shares();
        let x_parts = cut(&mut xs, shares.iter().map(|s| if x_direct { 0 } else { s.images.len() * x_len }));
        let d_parts = cut(&mut ds, shares.iter().map(|s| if d_direct { 0 } else { s.images.len() * d_len }));
        let biases = cut(&mut sums.bias, shares.iter().map(|s| if biased { s.lanes.len() * conv.co } else { 0 }));
        let mut finished = finish_sums(&input, lanes);
        let inputs = self.divide(input, &shares, &mut finished);
        let parts: Vec<_> = shares.into_iter().zip(x_parts.into_iter().zip(d_parts)).zip(biases.into_iter().zip(inputs)).collect();
        each(parts, |((share, (x_pad, d_pad)), (bias, mut input))| {
            let (first, all) = (share.images.start, share.images.len());
            clear(&conv.input, x_pad);
            clear(&conv.grad, d_pad);
            self.inputs.read(self.level, first, all, conv.input.image(), x_pad);
            let d = self.read_grad(first, all, d_pad);
            for (sums, lane) in bias.chunks_exact_mut(conv.co).zip(share.lanes.clone()) {
                let images = lanes.lane(lane);
                self.bias(images.len(), &d[(images.start - first) * d_len..], sums);
            }
            if let Some(input) = &mut input {
                let group = conv.group();
                scratch(conv.work_len(), |work| {
                    for (start, d) in (first..).step_by(group).zip(d[..all * d_len].chunks(group * d_len)) {
                        input.write(self, &share, start, Group { images: d.len() / d_len, x: d, ahead: None }, &lanes, work);
                    }
                });
            }
        });
        let d = match self.grad {
            Grad::Stored(d) if d_direct => &***d,
            _ => &*ds,
        };
        let x = if x_direct { self.inputs.x } else { &*xs };
        let ranges = ranges(conv.weight_len() / conv.co);
        let parts = cut(&mut sums.weight, ranges.iter().map(|r| r.len() * conv.co));
        each(ranges.into_iter().zip(parts).collect(), |(range, part)| conv.weight_grad(lanes.images, x, d, range, part));
        finished
    }

    /// Transforms all images once, then lets every thread sum the weight's gradient of its channels over all of them.
    fn by_channel(&self, tape: &Tape, w: &Winograd, sums: &mut WeightSums, input: Option<InputGrad>) -> Vec<f64> {
        let (conv, lanes) = (self.inputs.conv, tape.lanes);
        let (x_len, d_len, biased) = (conv.input.len(), conv.grad.len(), !sums.bias.is_empty());
        let shares = lanes.shares();
        let tiles: Vec<usize> = shares.iter().map(|s| s.images.len() * w.tiles_of_image()).collect();
        let lens: Vec<[usize; 2]> = tiles.iter().map(|&t| w.points_len(t)).collect();
        let mut vs = tape.pool.take(lens.iter().map(|l| l[0]).sum());
        let mut ds = tape.pool.take(lens.iter().map(|l| l[1]).sum());
        let (v_parts, d_parts) = (cut(&mut vs, lens.iter().map(|l| l[0])), cut(&mut ds, lens.iter().map(|l| l[1])));
        let biases = cut(&mut sums.bias, shares.iter().map(|s| if biased { s.lanes.len() * conv.co } else { 0 }));
        let mut finished = finish_sums(&input, lanes);
        let inputs = self.divide(input, &shares, &mut finished);
        let parts: Vec<_> = shares.into_iter().zip(v_parts.into_iter().zip(d_parts)).zip(biases.into_iter().zip(inputs)).collect();
        each(parts, |((share, (v, d_points)), (bias, mut input))| {
            let (group, all) = (conv.group(), share.images.len() * w.tiles_of_image());
            let (x_pad_len, d_pad_len) = (self.inputs.scratch_len(group), if self.direct() { 0 } else { group * d_len });
            scratch(x_pad_len + d_pad_len + conv.work_len(), |memory| {
                let (x_pad, memory) = memory.split_at_mut(x_pad_len);
                let (d_pad, work) = memory.split_at_mut(d_pad_len);
                clear(&conv.input, x_pad);
                clear(&conv.grad, d_pad);
                for start in share.images.clone().step_by(group) {
                    let n = group.min(share.images.end - start);
                    let (tiles, at) = (0..n * w.tiles_of_image(), (start - share.images.start) * w.tiles_of_image());
                    let d = self.read_grad(start, n, d_pad);
                    let x = self.inputs.read(self.level, start, n, conv.input.image(), x_pad);
                    w.spread_inputs(tiles.clone(), &x[..n * x_len], at, all, v);
                    w.spread_grads(tiles, &d[..n * d_len], conv.grad, at, all, d_points);
                    for (i, image) in (start..).zip(d.chunks_exact(d_len).take(n)).filter(|_| biased) {
                        self.bias(1, image, nth_mut(bias, conv.co, lanes.of(i) - share.lanes.start));
                    }
                    if let Some(input) = &mut input {
                        let ahead = self.ahead(start + n, share.images.end.min(start + 2 * n), true);
                        input.write(self, &share, start, Group { images: n, x: d, ahead: Some(&ahead) }, &lanes, work);
                    }
                }
            });
        });
        let (mut pairs, mut from) = (vec![], [0, 0]);
        for (&tiles, len) in tiles.iter().zip(&lens) {
            pairs.push(Points { tiles, v: &vs[from[0]..from[0] + len[0]], d: &ds[from[1]..from[1] + len[1]] });
            from = [from[0] + len[0], from[1] + len[1]];
        }
        let channels = ranges(conv.ci);
        let mut taps: Vec<Vec<&mut [f32]>> = channels.iter().map(|_| vec![]).collect();
        for tap in sums.weight.chunks_exact_mut(conv.ci * conv.co) {
            let rows = cut(tap, channels.iter().map(|r| r.len() * conv.co));
            taps.iter_mut().zip(rows).for_each(|(taps, row)| taps.push(row));
        }
        each(channels.into_iter().zip(taps).collect(), |(range, mut taps)| {
            // As many channels at a time as keep the products in the cache.
            let most = (CHANNELS / conv.co).max(1);
            scratch(w.product_len() / conv.ci * most, |product| {
                for start in range.clone().step_by(most) {
                    let some = start..range.end.min(start + most);
                    let from = (start - range.start) * conv.co;
                    let mut rows: Vec<&mut [f32]> = taps.iter_mut().map(|t| &mut t[from..from + some.len() * conv.co]).collect();
                    let len = w.product_len() / conv.ci * some.len();
                    w.weight_rows(&pairs, some, &mut rows, &mut product[..len]);
                }
            });
        });
        finished
    }

    /// What is read for images `start..end`.
    fn ahead(&self, start: usize, end: usize, weighted: bool) -> [&[f32]; 3] {
        let len = self.inputs.conv.out_image();
        let range = start * len..end.max(start) * len;
        let x = if weighted { self.inputs.ahead(start, end, self.inputs.conv.input.image()) } else { &[] };
        match self.grad {
            Grad::Stored(d) => [&d[range], &[], x],
            Grad::Norm(b) => [&b.d[range.clone()], &b.y[range], x],
        }
    }

    /// The parts of the input's gradient, and of the sums of finishing it, that the threads write.
    fn divide<'a>(&self, input: Option<InputGrad<'a>>, shares: &[Share], sums: &'a mut [f64]) -> Vec<Option<InputPart<'a>>> {
        let Some(InputGrad { dx, add, finish }) = input else { return shares.iter().map(|_| None).collect() };
        let len = self.inputs.conv.input.image();
        let dxs = cut(dx, shares.iter().map(|s| s.images.len() * len));
        let sums = cut(sums, shares.iter().map(|s| s.lanes.len() * finish.map_or(0, Finish::sums_len)));
        dxs.into_iter().zip(sums).map(|(dx, sums)| Some(InputPart { dx, add, finish, sums })).collect()
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

/// A thread's part of the input's gradient.
struct InputPart<'a> {
    dx: &'a mut [f32],
    add: bool,
    finish: Option<&'a Finish>,
    sums: &'a mut [f64],
}

impl InputPart<'_> {
    /// Writes and finishes the gradients of a group of images from `start` on.
    fn write(&mut self, job: &ConvGrad, share: &Share, start: usize, group: Group, lanes: &Lanes, work: &mut [f32]) {
        let len = job.inputs.conv.input.image();
        let from = (start - share.images.start) * len;
        let dx = &mut self.dx[from..from + group.images * len];
        let panels = job.panels.expect("invariant: weights are packed for every gradient that is wanted");
        job.inputs.conv.input_grad(group, panels, dx, self.add, work);
        if let Some(finish) = self.finish {
            for (i, d) in (start..).zip(dx.chunks_exact_mut(len)) {
                finish.image(job.level, i, d, lane_of(self.sums, lanes.of(i) - share.lanes.start, finish));
            }
        }
    }
}

/// Room for the sums of finishing an input's gradient.
fn finish_sums(input: &Option<InputGrad>, lanes: Lanes) -> Vec<f64> {
    input.as_ref().and_then(|i| i.finish).map_or(vec![], |f| f.sums(lanes.count))
}

fn nth_mut<T>(x: &mut [T], len: usize, i: usize) -> &mut [T] {
    &mut x[i * len..(i + 1) * len]
}
