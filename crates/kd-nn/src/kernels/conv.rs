//! Convolution: forward, input gradient, weight gradient.
//!
//! An image is copied once into a scratch image with zeros around it ([`Padded`]); then every tap is a constant offset and a convolution
//! is one or several [`Sweep`]s of the register kernels over it, with no special case at the border:
//!
//! - forward and weight gradient: one sweep, pixels `stride` apart, taps `dilation` apart;
//! - input gradient: one sweep over the output's gradient for each residue of the input position modulo the stride, with the taps that
//!   reach it (a stride-2 3x3 has four: 1, 2, 2 and 4 taps), written at a distance of `stride`. No zeros are inserted or multiplied.
//!
//! Neighbouring taps of a row are contiguous in memory, so a 3x3 is three runs of `3 ci` inputs. One image of `[h][w][c]` is the unit;
//! groups of images share a sweep so that big weights are read once for all.

#![allow(unsafe_code, unsafe_op_in_unsafe_fn, reason = "register kernels on raw pointers; each entry states what it relies on")]

use std::ops::Range;

use super::clock::Cost;
use super::depthwise;
use super::sweep::{Axis, Padded, Sweep, Walk, residues, sweep};
use super::tile::{self, Activation, Nn, Tn};
use super::vector::{Kernel, Level, Vector};
use super::winograd::{self, Ahead, Winograd};
use crate::graph::Conv2d;

/// Geometry of one convolution on one image size.
pub(crate) struct Conv {
    pub level: Level,
    pub ci: usize,
    pub co: usize,
    pub groups: usize,
    /// Taps of the kernel.
    pub area: usize,
    /// Output size.
    pub oh: usize,
    pub ow: usize,
    /// The input as the forward sweep and the weight gradient read it.
    pub input: Padded,
    /// The output's gradient as the backward sweeps read it.
    pub grad: Padded,
    forward: Sweep,
    backward: Vec<Sweep>,
    /// Forwards and backwards in Winograd's way, where that is allowed and pays.
    fast: Option<[Winograd; 2]>,
}

/// What is done with the sums of a forward sweep before they are stored.
#[derive(Clone, Copy, Default)]
pub(crate) struct Epilogue<'a> {
    pub bias: Option<&'a [f32]>,
    /// Images added to the output.
    pub residual: Option<&'a [f32]>,
    pub activation: Activation,
}

/// Padded images to be convolved together.
#[derive(Clone, Copy)]
pub(crate) struct Group<'a> {
    pub images: usize,
    pub x: &'a [f32],
    /// What is read after this; none where the output and all else are in the cache anyway.
    pub ahead: Option<Ahead<'a>>,
}

/// One sweep over a group of images.
pub(crate) struct Pass<'a> {
    pub images: usize,
    pub x: &'a [f32],
    /// Floats from one image to the next, on both sides.
    pub x_image: usize,
    pub panels: &'a [f32],
    pub out: &'a mut [f32],
    pub out_image: usize,
    pub epilogue: Epilogue<'a>,
    /// Whether the output is added to.
    pub add: bool,
}

impl Conv {
    /// The geometry for images of `h` x `w`; `fast` allows Winograd's algorithm.
    pub(crate) fn new(level: Level, conv: &Conv2d, h: usize, w: usize, fast: bool) -> Self {
        let [oh, ow] = conv.output(h, w).expect("invariant: shapes were checked");
        let (ci, co, groups) = (conv.in_channels, conv.out_channels, conv.groups);
        let (k, s, d, pad) = (conv.kernel, conv.stride, conv.dilation, conv.padding);
        let sizes = [(h, oh, pad[0]), (w, ow, pad[2])];
        let fast = fast && winograd::pays(conv, [h, w]);
        let mut input = Padded::new([h, w, ci], pad);
        if fast {
            input.reach(winograd::extent(oh), winograd::extent(ow));
        }

        let ahead = |axis: usize| {
            let taps = (0..k[axis]).map(|t| ((t * d[axis]) as isize, t)).collect();
            Axis { count: sizes[axis].1, first: 0, taps }
        };
        let (from, to) = (Walk { channels: ci, cols: input.cols, step: s }, Walk { channels: co, cols: ow, step: [1; 2] });
        let forward = sweep(&ahead(0), &ahead(1), k[1], groups, from, to);

        let residues = [0, 1].map(|a| residues(sizes[a].0, sizes[a].2, k[a], s[a], d[a]));
        let [(top, bottom), (left, right)] = [0, 1].map(|a| {
            let (mut before, mut after) = (0, 0);
            for axis in &residues[a] {
                for &(offset, _) in &axis.taps {
                    before = before.max(-offset);
                    after = after.max((axis.count - 1) as isize + offset - (sizes[a].1 - 1) as isize);
                }
            }
            (before as usize, after as usize)
        });
        let mut grad = Padded::new([oh, ow, co], [top, bottom, left, right]);
        if fast {
            grad.reach(winograd::extent(h).max(top + winograd::whole(oh)), winograd::extent(w).max(left + winograd::whole(ow)));
        }
        let (from, to) = (Walk { channels: co, cols: grad.cols, step: [1; 2] }, Walk { channels: ci, cols: w, step: s });
        let [ys, xs] = residues;
        let (ys, xs) = (ys.into_iter().map(|a| a.shifted(top)), xs.into_iter().map(|a| a.shifted(left)).collect::<Vec<_>>());
        let backward = ys.flat_map(|y| xs.iter().map(|x| sweep(&y, x, k[1], groups, from, to)).collect::<Vec<_>>()).collect();
        let fast = fast.then(|| {
            let forward = Winograd { level, channels: ci, outputs: co, rows: oh, cols: ow, input };
            [forward, Winograd { level, channels: co, outputs: ci, rows: h, cols: w, input: grad }]
        });
        Self { level, ci, co, groups, area: k[0] * k[1], oh, ow, input, grad, forward, backward, fast }
    }

    /// Whether every channel is convolved alone.
    fn depthwise(&self) -> bool {
        self.groups > 1 && self.groups == self.ci && self.groups == self.co
    }

    /// Input and output channels of a group.
    fn split(&self) -> (usize, usize) {
        (self.ci / self.groups, self.co / self.groups)
    }

    /// Floats of an output image.
    pub(crate) fn out_image(&self) -> usize {
        self.oh * self.ow * self.co
    }

    /// Floats of the weight.
    pub(crate) fn weight_len(&self) -> usize {
        self.co * self.ci / self.groups * self.area
    }

    /// Multiply-adds of an image.
    pub(crate) fn macs(&self) -> usize {
        self.oh * self.ow * self.weight_len()
    }

    /// Floats of the packed weights of the forward sweep.
    pub(crate) fn forward_len(&self) -> usize {
        self.fast.map_or_else(|| self.panels_len(std::slice::from_ref(&self.forward), false), |[w, _]| w.packed_len())
    }

    /// Floats of the packed weights of the input gradient.
    pub(crate) fn backward_len(&self) -> usize {
        self.fast.map_or_else(|| self.panels_len(&self.backward, true), |[_, w]| w.packed_len())
    }

    /// Floats of work memory.
    pub(crate) fn work_len(&self) -> usize {
        self.fast.map_or(0, |ways| ways.map(|w| w.work_len()).into_iter().max().unwrap_or(0))
    }

    /// Floats that a weight gradient is summed in before [`Conv::finish_weight_grad`].
    pub(crate) fn product_len(&self) -> usize {
        self.fast.map_or(0, |[w, _]| w.product_len())
    }

    /// Images handled together: so few that what is made of them stays in the second-level cache, but enough for weights that do not to
    /// be worth reading.
    pub(crate) fn group(&self) -> usize {
        match self.fast {
            Some([w, _]) => w.images(),
            None if self.weight_len() > 128 * 1024 => (256 * 1024 / (self.input.len() + self.out_image())).max(1),
            None => (64 * 1024 / (self.input.len() + self.out_image())).max(1),
        }
    }

    fn panels_len(&self, sweeps: &[Sweep], back: bool) -> usize {
        if self.depthwise() {
            return sweeps.iter().map(|s| s.taps.len() * self.co).sum();
        }
        sweeps.iter().map(|s| self.groups * tile::packed_len(self.level, self.outputs(back), s.depth())).sum()
    }

    /// Outputs of a group, of the forward sweep or of the input gradient.
    fn outputs(&self, back: bool) -> usize {
        if back { self.split().0 } else { self.split().1 }
    }

    /// Packs the weight `[co][ci/groups][kh][kw]` for [`Conv::forward`].
    pub(crate) fn pack_forward(&self, weight: &[f32], panels: &mut [f32]) {
        match self.fast {
            Some([w, _]) => w.pack(weight, false, panels),
            None => self.pack(std::slice::from_ref(&self.forward), false, weight, panels),
        }
    }

    /// Packs the weight for [`Conv::input_grad`].
    pub(crate) fn pack_backward(&self, weight: &[f32], panels: &mut [f32]) {
        match self.fast {
            Some([_, w]) => w.pack(weight, true, panels),
            None => self.pack(&self.backward, true, weight, panels),
        }
    }

    fn pack(&self, sweeps: &[Sweep], back: bool, weight: &[f32], mut panels: &mut [f32]) {
        let ((ci, co), area) = (self.split(), self.area);
        let by_out = (co, ci * area);
        let by_in = (ci, area);
        let (outputs, channels) = if back { (by_in, by_out) } else { (by_out, by_in) };
        for sweep in sweeps {
            if self.depthwise() {
                for &tap in &sweep.taps {
                    let (row, rest) = panels.split_at_mut(self.co);
                    row.iter_mut().zip(weight.chunks_exact(area)).for_each(|(p, w)| *p = w[tap]);
                    panels = rest;
                }
                continue;
            }
            for g in 0..self.groups {
                let (part, rest) = panels.split_at_mut(tile::packed_len(self.level, outputs.0, sweep.depth()));
                tile::pack(self.level, &weight[g * co * ci * area..], outputs, channels, &sweep.taps, part);
                panels = rest;
            }
        }
    }

    /// Convolves `images` padded images `x` into `out`, with [`Conv::work_len`] floats of work memory.
    pub(crate) fn forward(&self, group: Group, panels: &[f32], out: &mut [f32], epilogue: Epilogue, work: &mut [f32]) {
        let Group { images, x, ahead } = group;
        if let Some([w, _]) = &self.fast {
            return w.forward(images, x, panels, out, epilogue, false, ahead, work);
        }
        let (x_image, out_image) = (self.input.len(), self.out_image());
        self.sweep(&self.forward, false, Pass { images, x, x_image, panels, out, out_image, epilogue, add: false });
    }

    /// The gradient of the (unpadded) input images from `images` padded gradients `dy`; overwrites `dx` or adds to it.
    pub(crate) fn input_grad(&self, group: Group, panels: &[f32], dx: &mut [f32], add: bool, work: &mut [f32]) {
        let Group { images, x: dy, ahead } = group;
        if let Some([_, w]) = &self.fast {
            return w.forward(images, dy, panels, dx, Epilogue::default(), add, ahead, work);
        }
        let mut at = 0;
        for sweep in &self.backward {
            let len = self.panels_len(std::slice::from_ref(sweep), true);
            let pass = Pass {
                images,
                x: dy,
                x_image: self.grad.len(),
                panels: &panels[at..at + len],
                out: dx,
                out_image: self.input.image(),
                epilogue: Epilogue::default(),
                add,
            };
            self.sweep(sweep, true, pass);
            at += len;
        }
    }

    /// One sweep for every group of channels.
    fn sweep(&self, sweep: &Sweep, back: bool, pass: Pass) {
        if pass.images == 0 || sweep.rows == 0 || sweep.cols == 0 {
            return;
        }
        let channels = if back { self.ci } else { self.co };
        let last = pass.images - 1;
        let last_in = last * pass.x_image + (sweep.rows - 1) * sweep.in_row + (sweep.cols - 1) * sweep.in_step;
        let last_out = last * pass.out_image + sweep.out + (sweep.rows - 1) * sweep.out_row + (sweep.cols - 1) * sweep.out_step;
        let reach = if self.depthwise() { channels } else { (self.groups - 1) * self.outputs(!back) + sweep.run };
        assert!(sweep.runs.iter().all(|r| last_in + r + reach <= pass.x.len()), "a sweep reads past its images");
        assert!(last_out + channels <= pass.out.len(), "a sweep writes past its images");
        assert!(pass.panels.len() >= self.panels_len(std::slice::from_ref(sweep), back), "a sweep needs its packed weights");
        assert!(pass.epilogue.bias.is_none_or(|b| b.len() == channels));
        assert!(pass.epilogue.residual.is_none_or(|r| r.len() >= last_out + channels));
        if self.depthwise() {
            return self.level.run(depthwise::Forward { sweep, channels, pass });
        }
        let n = self.outputs(back);
        let len = tile::packed_len(self.level, n, sweep.depth());
        for g in 0..self.groups {
            let epilogue = Epilogue {
                bias: pass.epilogue.bias.map(|b| &b[g * n..]),
                residual: pass.epilogue.residual.map(|r| &r[g * n..]),
                activation: pass.epilogue.activation,
            };
            let pass = Pass {
                x: &pass.x[g * self.outputs(!back)..],
                panels: &pass.panels[g * len..(g + 1) * len],
                out: &mut pass.out[g * n..],
                epilogue,
                ..pass
            };
            self.level.run(Dense { level: self.level, sweep, n, pass });
        }
    }

    /// Adds the weight's gradient to `dw`, laid out `[tap][ci/groups][co]`: from `images` padded inputs `x` and their gradients `dy`
    /// ([`Conv::grad`]'s layout), rows `k` of `tap * ci/groups + channel` only.
    pub(crate) fn weight_grad(&self, images: usize, x: &[f32], dy: &[f32], k: Range<usize>, dw: &mut [f32]) {
        let sweep = &self.forward;
        if images == 0 || k.is_empty() {
            return;
        }
        let last_in = (images - 1) * self.input.len() + (sweep.rows - 1) * sweep.in_row + (sweep.cols - 1) * sweep.in_step;
        let reach = if self.depthwise() { self.ci } else { (self.groups - 1) * self.split().0 + sweep.run };
        assert!(sweep.runs.iter().all(|r| last_in + r + reach <= x.len()), "a weight gradient reads past its images");
        assert!(images * self.grad.len() <= dy.len() && dw.len() == k.len() * self.co && k.end <= self.weight_len() / self.co);
        if self.depthwise() {
            let job = depthwise::WeightGrad { sweep, channels: self.co, images, x, x_image: self.input.len(), dy, grad: self.grad, k, dw };
            return self.level.run(job);
        }
        let (ci, co) = self.split();
        for g in 0..self.groups {
            self.level.run(DenseGrad {
                level: self.level,
                sweep,
                images,
                x: &x[g * ci..],
                x_image: self.input.len(),
                dy: &dy[self.grad.origin() + g * co..],
                dy_image: self.grad.len(),
                dy_step: self.co,
                dy_row: self.grad.row(),
                n: co,
                k: k.clone(),
                dw: &mut dw[g * co..],
                dw_step: self.co,
            });
        }
    }

    /// As [`Conv::weight_grad`] over all rows, but into a product of [`Conv::product_len`] floats, to be finished by
    /// [`Conv::finish_weight_grad`]. For convolutions that have one.
    pub(crate) fn weight_product(&self, images: usize, x: &[f32], dy: &[f32], product: &mut [f32], work: &mut [f32]) {
        if let Some([w, _]) = &self.fast {
            w.weight_grad(images, x, dy, self.grad, product, work);
        }
    }

    /// The forward direction in Winograd's way, if it is.
    pub(crate) fn winograd(&self) -> Option<&Winograd> {
        self.fast.as_ref().map(|[w, _]| w)
    }

    /// Adds a product to the weight's gradient.
    pub(crate) fn finish_weight_grad(&self, product: &[f32], dw: &mut [f32]) {
        if let Some([w, _]) = &self.fast {
            w.add_product(product, dw);
        }
    }

    /// Adds the sum of `lanes` (whole weight gradients, in order) to the gradient of the weight `[co][ci/groups][kh][kw]`, of which `grad`
    /// holds the outputs `range`.
    pub(crate) fn add_weight_grad(&self, lanes: &[f32], range: Range<usize>, grad: &mut [f32]) {
        let (ci, rows) = (self.split().0, self.weight_len() / self.co);
        let mut sum = vec![0.0f32; range.len()];
        for row in 0..rows {
            for (i, lane) in lanes.chunks_exact(self.weight_len()).enumerate() {
                let part = &lane[row * self.co..][range.clone()];
                if i == 0 {
                    sum.copy_from_slice(part);
                } else {
                    sum.iter_mut().zip(part).for_each(|(s, v)| *s += v);
                }
            }
            let to = row % ci * self.area + row / ci;
            grad.iter_mut().skip(to).step_by(rows).zip(&sum).for_each(|(g, s)| *g += s);
        }
    }
}

/// A dense sweep of one group of channels.
struct Dense<'a> {
    level: Level,
    sweep: &'a Sweep,
    /// Outputs.
    n: usize,
    pass: Pass<'a>,
}

impl Kernel for Dense<'_> {
    type Output = ();
    const NAME: &'static str = "direct products";

    fn cost(&self) -> Cost {
        let (s, pixels) = (self.sweep, self.pass.images * self.sweep.rows * self.sweep.cols);
        Cost { flops: 2 * pixels * s.depth() * self.n, floats: pixels * (s.in_step + self.n) }
    }

    #[inline(always)]
    fn run<V: Vector>(self) {
        let (s, pass) = (self.sweep, self.pass);
        let (mut images, mut rows, mut cols) = (pass.images, s.rows, s.cols);
        // Pixels that follow one another across rows and images are one long row.
        if s.in_row == cols * s.in_step && s.out_row == cols * s.out_step {
            (rows, cols) = (1, rows * cols);
            if pass.x_image == cols * s.in_step && pass.out_image == cols * s.out_step {
                (images, cols) = (1, images * cols);
            }
        }
        let out = pass.out.as_mut_ptr();
        let mut panel = pass.panels;
        for block in tile::blocks(self.level, self.n) {
            let (own, rest) = panel.split_at(s.depth() * block.vectors * V::LANES);
            panel = rest;
            let most = V::TILE_ROWS[block.vectors - 1];
            for image in 0..images {
                for row in 0..rows {
                    for (col, p, tiles) in tile::strips(cols, most).into_iter().filter(|s| s.2 > 0) {
                        let to = image * pass.out_image + s.out + row * s.out_row + col * s.out_step + block.start;
                        let from = image * pass.x_image + row * s.in_row + col * s.in_step;
                        let at = |x: Option<&[f32]>, i: usize| x.map_or(std::ptr::null(), |x| x[i..].as_ptr());
                        let args = Nn {
                            tiles,
                            x: pass.x.as_ptr().wrapping_add(from),
                            x_step: s.in_step,
                            runs: &s.runs,
                            run: s.run,
                            w: own.as_ptr(),
                            // SAFETY: `Conv::sweep` checked the last pixel's outputs against the slice.
                            out: unsafe { out.add(to) },
                            out_step: s.out_step,
                            tail: block.tail,
                            bias: at(pass.epilogue.bias, block.start),
                            residual: at(pass.epilogue.residual, to),
                            activation: pass.epilogue.activation,
                            add: pass.add,
                        };
                        // SAFETY: `Conv::sweep` checked the last pixel's runs, outputs and residuals against the slices; the panel holds
                        // `depth` rows of the block's vectors.
                        unsafe { tile::nn::<V>(p, block.vectors, &args) };
                    }
                }
            }
        }
    }
}

/// The weight gradient of one group of channels.
struct DenseGrad<'a> {
    level: Level,
    sweep: &'a Sweep,
    images: usize,
    x: &'a [f32],
    x_image: usize,
    dy: &'a [f32],
    dy_image: usize,
    dy_step: usize,
    dy_row: usize,
    /// Outputs.
    n: usize,
    /// Rows of the product that are wanted.
    k: Range<usize>,
    dw: &'a mut [f32],
    dw_step: usize,
}

impl Kernel for DenseGrad<'_> {
    type Output = ();
    const NAME: &'static str = "direct weight products";

    fn cost(&self) -> Cost {
        let pixels = self.images * self.sweep.rows * self.sweep.cols;
        Cost { flops: 2 * pixels * self.k.len() * self.n, floats: pixels * (self.sweep.in_step + self.n) + 2 * self.dw.len() }
    }

    #[inline(always)]
    fn run<V: Vector>(self) {
        let s = self.sweep;
        let (mut images, mut rows, mut cols) = (self.images, s.rows, s.cols);
        if s.in_row == cols * s.in_step && self.dy_row == cols * self.dy_step {
            (rows, cols) = (1, rows * cols);
            if self.x_image == cols * s.in_step && self.dy_image == cols * self.dy_step {
                (images, cols) = (1, images * cols);
            }
        }
        // Blocks of pixels whose operands (a square kernel's rows share theirs) stay in the first-level cache while all tiles of the
        // product pass over them.
        let pixels = (6 * 1024 / (s.run / s.runs.len() + self.n)).clamp(32, 512);
        let (row_block, col_block) = if rows == 1 { (1, pixels) } else { ((pixels / cols).max(1), cols) };
        let dw = self.dw.as_mut_ptr();
        for image in 0..images {
            for (row, row_count) in tile::parts(rows, row_block) {
                for (col, col_count) in tile::parts(cols, col_block) {
                    let x = image * self.x_image + row * s.in_row + col * s.in_step;
                    let d = image * self.dy_image + row * self.dy_row + col * self.dy_step;
                    for block in tile::blocks(self.level, self.n) {
                        let most = V::TILE_ROWS[block.vectors - 1];
                        for (r, run) in s.runs.iter().enumerate() {
                            let first = (r * s.run).max(self.k.start);
                            let end = ((r + 1) * s.run).min(self.k.end);
                            for (at, p) in tile::parts(end.saturating_sub(first), most) {
                                let k = first + at;
                                let args = Tn {
                                    x: self.x[x + run + k - r * s.run..].as_ptr(),
                                    x_step: s.in_step,
                                    x_row: s.in_row,
                                    d: self.dy[d + block.start..].as_ptr(),
                                    d_step: self.dy_step,
                                    d_row: self.dy_row,
                                    rows: row_count,
                                    cols: col_count,
                                    // SAFETY: `Conv::weight_grad` checked that `dw` holds the rows `k`.
                                    out: unsafe { dw.add((k - self.k.start) * self.dw_step + block.start) },
                                    out_step: self.dw_step,
                                    tail: block.tail,
                                };
                                // SAFETY: `Conv::weight_grad` checked the last pixel's runs and gradients against the slices, and `dw`.
                                unsafe { tile::tn::<V>(p, block.vectors, &args) };
                            }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn values(n: usize, seed: u64) -> Vec<f32> {
        (0..n as u64).map(|i| kd_core::Rng::new(seed).uniform(i) as f32 * 2.0 - 1.0).collect()
    }

    /// Every (output pixel, input pixel, tap) that meet, of one image.
    fn meet(conv: &Conv2d, h: usize, w: usize, mut f: impl FnMut(usize, usize, usize)) {
        let [oh, ow] = conv.output(h, w).unwrap();
        for (oy, ox, ky, kx) in (0..oh)
            .flat_map(|oy| (0..ow).map(move |ox| (oy, ox)))
            .flat_map(|(oy, ox)| (0..conv.kernel[0]).map(move |ky| (oy, ox, ky)))
            .flat_map(|(oy, ox, ky)| (0..conv.kernel[1]).map(move |kx| (oy, ox, ky, kx)))
        {
            let y = (oy * conv.stride[0] + ky * conv.dilation[0]).wrapping_sub(conv.padding[0]);
            let x = (ox * conv.stride[1] + kx * conv.dilation[1]).wrapping_sub(conv.padding[2]);
            if y < h && x < w {
                f(oy * ow + ox, y * w + x, ky * conv.kernel[1] + kx);
            }
        }
    }

    fn close(got: &[f32], want: &[f64], allowed: f64) -> Result<(), TestCaseError> {
        let norm = |it: &mut dyn Iterator<Item = f64>| it.map(|v| v * v).sum::<f64>().sqrt();
        let error = norm(&mut got.iter().zip(want).map(|(a, b)| f64::from(*a) - b));
        let scale = norm(&mut want.iter().copied()).max(1e-3);
        prop_assert!(got.len() == want.len() && error <= allowed * scale, "relative error {}", error / scale);
        Ok(())
    }

    fn pad(p: &Padded, images: &[f32]) -> Vec<f32> {
        let mut out = vec![f32::NAN; images.len() / p.image() * p.len()];
        for (whole, image) in out.chunks_exact_mut(p.len()).zip(images.chunks_exact(p.image())) {
            p.clear_border(whole);
            for (y, row) in image.chunks_exact(p.w * p.c).enumerate() {
                p.row_of(whole, y).copy_from_slice(row);
            }
        }
        out
    }

    fn check(conv: &Conv2d, h: usize, w: usize, images: usize) -> Result<(), TestCaseError> {
        let (ci, co, area) = (conv.in_channels, conv.out_channels, conv.kernel[0] * conv.kernel[1]);
        let (gi, go) = (ci / conv.groups, co / conv.groups);
        for (level, fast) in Level::available().into_iter().flat_map(|l| [(l, false), (l, true)]) {
            let plan = Conv::new(level, conv, h, w, fast);
            if fast && plan.fast.is_none() {
                continue;
            }
            let allowed = if fast { 1e-5 } else { 2e-6 };
            let mut work = vec![f32::NAN; plan.work_len()];
            let pixels = plan.oh * plan.ow;
            let x = values(images * h * w * ci, 1);
            let weight = values(plan.weight_len(), 2);
            let bias = values(co, 3);
            let residual = values(images * plan.out_image(), 4);
            let dy = values(images * plan.out_image(), 5);
            let (mut y, mut dx, mut dw) = (vec![0.0; dy.len()], vec![0.0; x.len()], vec![0.0; weight.len()]);
            for i in 0..images {
                meet(conv, h, w, |o, p, t| {
                    for (oc, c) in (0..co).flat_map(|oc| (0..gi).map(move |c| (oc, c))) {
                        let (yi, xi) = ((i * pixels + o) * co + oc, (i * h * w + p) * ci + oc / go * gi + c);
                        let wi = (oc * gi + c) * area + t;
                        let (xv, wv, dv) = (f64::from(x[xi]), f64::from(weight[wi]), f64::from(dy[yi]));
                        y[yi] += xv * wv;
                        dx[xi] += dv * wv;
                        dw[wi] += dv * xv;
                    }
                });
            }
            let padded = pad(&plan.input, &x);
            let mut panels = vec![f32::NAN; plan.forward_len()];
            plan.pack_forward(&weight, &mut panels);
            let mut out = vec![f32::NAN; dy.len()];
            plan.forward(Group { images, x: &padded, ahead: None }, &panels, &mut out, Epilogue::default(), &mut work);
            close(&out, &y, allowed)?;
            let full = Epilogue { bias: Some(&bias), residual: Some(&residual), activation: Activation::Relu };
            plan.forward(Group { images, x: &padded, ahead: None }, &panels, &mut out, full, &mut work);
            let folded: Vec<f64> =
                y.iter().enumerate().map(|(i, v)| (v + f64::from(bias[i % co]) + f64::from(residual[i])).max(0.0)).collect();
            close(&out, &folded, allowed)?;

            let grads = pad(&plan.grad, &dy);
            let mut panels = vec![f32::NAN; plan.backward_len()];
            plan.pack_backward(&weight, &mut panels);
            let mut out = vec![f32::NAN; x.len()];
            plan.input_grad(Group { images, x: &grads, ahead: None }, &panels, &mut out, false, &mut work);
            close(&out, &dx, allowed)?;
            plan.input_grad(Group { images, x: &grads, ahead: None }, &panels, &mut out, true, &mut work);
            close(&out, &dx.iter().map(|v| 2.0 * v).collect::<Vec<_>>(), allowed)?;

            // Two lanes, the rows of each in two halves; gathered in two halves of the outputs.
            let (len, rows, first) = (weight.len(), area * gi, images / 2);
            let mut lanes = vec![0.0; 2 * len];
            for (i, lane) in lanes.chunks_exact_mut(len).enumerate() {
                let (n, x, d) = match i {
                    0 => (first, &padded[..], &grads[..]),
                    _ => (images - first, &padded[first * plan.input.len()..], &grads[first * plan.grad.len()..]),
                };
                if fast {
                    let mut product = vec![0.0; plan.product_len()];
                    plan.weight_product(n, x, d, &mut product, &mut work);
                    plan.finish_weight_grad(&product, lane);
                    continue;
                }
                let (low, high) = lane.split_at_mut(rows / 2 * co);
                plan.weight_grad(n, x, d, 0..rows / 2, low);
                plan.weight_grad(n, x, d, rows / 2..rows, high);
            }
            let mut total = vec![0.0; len];
            let (low, high) = total.split_at_mut(co / 2 * rows);
            plan.add_weight_grad(&lanes, 0..co / 2, low);
            plan.add_weight_grad(&lanes, co / 2..co, high);
            close(&total, &dw, allowed)?;
        }
        Ok(())
    }

    fn square(ci: usize, co: usize, kernel: usize, stride: usize, pad: usize, groups: usize) -> Conv2d {
        Conv2d {
            in_channels: ci,
            out_channels: co,
            kernel: [kernel; 2],
            stride: [stride; 2],
            padding: [pad; 4],
            dilation: [1; 2],
            groups,
            weight: 0,
            bias: None,
        }
    }

    #[test]
    fn usual_shapes() {
        for (conv, h, w) in [
            (square(3, 16, 3, 1, 1, 1), 9, 7),
            (square(16, 16, 3, 1, 1, 1), 32, 32),
            (square(32, 64, 3, 2, 1, 1), 8, 9),
            (square(64, 64, 3, 1, 1, 1), 8, 8),
            (square(16, 35, 3, 1, 0, 1), 9, 8),
            (square(40, 20, 3, 1, 2, 1), 6, 7),
            (square(130, 128, 3, 1, 1, 1), 4, 4),
            (square(67, 130, 1, 1, 0, 1), 4, 5),
            (square(16, 32, 1, 2, 0, 1), 7, 8),
            (square(100, 37, 1, 1, 0, 1), 1, 1),
            (square(40, 40, 3, 1, 1, 40), 6, 6),
            (square(24, 24, 3, 2, 1, 24), 7, 6),
            (square(3, 8, 7, 2, 3, 1), 23, 22),
            (square(5, 5, 2, 3, 0, 1), 8, 8),
            (square(2, 3, 1, 1, 1, 1), 3, 2),
        ] {
            check(&conv, h, w, 3).unwrap();
        }
    }

    fn any_conv() -> impl Strategy<Value = (Conv2d, usize, usize, usize)> {
        let channels = (1usize..4, 1usize..20, 1usize..20, 0usize..3);
        let axis = || (1usize..6, 1usize..4, 0usize..3, 0usize..3, 1usize..3, 1usize..12);
        (channels, axis(), axis(), 1usize..4).prop_filter_map("fits", |((groups, gi, go, kind), y, x, images)| {
            let (groups, gi, go) = match kind {
                0 => (gi, 1, groups), // depthwise, with a multiplier
                1 => (1, gi, go),
                _ => (groups, gi, go),
            };
            let conv = Conv2d {
                in_channels: groups * gi,
                out_channels: groups * go,
                kernel: [y.0, x.0],
                stride: [y.1, x.1],
                padding: [y.2, y.3, x.2, x.3],
                dilation: [y.4, x.4],
                groups,
                weight: 0,
                bias: None,
            };
            conv.output(y.5, x.5).map(|_| (conv, y.5, x.5, images))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn any_shape((conv, h, w, images) in any_conv()) {
            check(&conv, h, w, images)?;
        }
    }
}
