//! Depthwise convolution: every channel alone, vectors along the channels. Bound by memory, not by arithmetic.

#![allow(unsafe_code, unsafe_op_in_unsafe_fn, reason = "register kernels on raw pointers; each entry states what it relies on")]
#![allow(clippy::needless_range_loop)] // indices of several arrays at once, unrolled by constants

use std::ops::Range;

use super::clock::Cost;
use super::conv::Pass;
use super::norm::activate;
use super::sweep::{Padded, Sweep};
use super::tile;
use super::vector::{Kernel, Lane, Vector};

/// A sweep over channels alone; the caller has checked that it stays inside its slices.
pub(crate) struct Forward<'a> {
    pub sweep: &'a Sweep,
    pub channels: usize,
    /// Its panels are `[tap][channel]`.
    pub pass: Pass<'a>,
}

/// The distance of neighbouring pixels in channels, where every row of taps is three neighbouring pixels; else 0.
fn threes(sweep: &Sweep, channels: usize) -> usize {
    let three = |r: &[usize]| r.len() == 3 && r[1] == r[0] + channels && r[2] == r[1] + channels;
    let regular = sweep.runs.chunks(3).all(three) && sweep.in_step.is_multiple_of(channels);
    if regular { sweep.in_step / channels } else { 0 }
}

impl Kernel for Forward<'_> {
    type Output = ();
    const NAME: &'static str = "depthwise";

    fn cost(&self) -> Cost {
        let pixels = self.pass.images * self.sweep.rows * self.sweep.cols;
        Cost { flops: 2 * pixels * self.sweep.taps.len() * self.channels, floats: pixels * (self.sweep.in_step + self.channels) }
    }

    #[inline(always)]
    fn run<V: Vector>(self) {
        let s = self.sweep;
        let out = self.pass.out.as_mut_ptr();
        let stride = threes(s, self.channels);
        // Pixels computed at once, as many as have registers; their sums share the loaded weights and inputs.
        let most = if V::TILE_ROWS[0] == 16 && stride == 1 { 8 } else { 4 };
        for image in 0..self.pass.images {
            for row in 0..s.rows {
                lanes!(V, self.channels, c, lane => {
                    for (col, p) in tile::parts(s.cols, most) {
                        let from = image * self.pass.x_image + row * s.in_row + col * s.in_step + c;
                        let to = image * self.pass.out_image + s.out + row * s.out_row + col * s.out_step + c;
                        // SAFETY: the caller checked that the last pixel's taps and outputs lie inside the slices.
                        unsafe {
                            let at = Place { x: self.pass.x.as_ptr().add(from), out: out.add(to), c, to, lane };
                            match (stride, p) {
                                (1, 8) => self.threes::<V, 8, 1>(at),
                                (1, 7) => self.threes::<V, 7, 1>(at),
                                (1, 6) => self.threes::<V, 6, 1>(at),
                                (1, 5) => self.threes::<V, 5, 1>(at),
                                (1, 4) => self.threes::<V, 4, 1>(at),
                                (1, 3) => self.threes::<V, 3, 1>(at),
                                (1, 2) => self.threes::<V, 2, 1>(at),
                                (2, 4) => self.threes::<V, 4, 2>(at),
                                (2, 3) => self.threes::<V, 3, 2>(at),
                                (2, 2) => self.threes::<V, 2, 2>(at),
                                (_, 4) => self.pixels::<V, 4>(at),
                                (_, 3) => self.pixels::<V, 3>(at),
                                (_, 2) => self.pixels::<V, 2>(at),
                                _ => self.pixels::<V, 1>(at),
                            }
                        }
                    }
                });
            }
        }
    }
}

/// Neighbouring pixels of one vector of channels.
struct Place<V: Vector> {
    x: *const f32,
    out: *mut f32,
    /// The first channel, and the number of the first output.
    c: usize,
    to: usize,
    lane: Lane<V>,
}

impl Forward<'_> {
    /// `P` pixels, `S` pixels apart, under rows of three taps: every input is loaded once.
    #[inline(always)]
    unsafe fn threes<V: Vector, const P: usize, const S: usize>(&self, at: Place<V>) {
        let mut sums = [V::splat(0.0); P];
        let mut w = self.pass.panels.as_ptr().add(at.c);
        for row in self.sweep.runs.chunks_exact(3) {
            let x = at.x.add(row[0]);
            let w0 = at.lane.load(w);
            let w1 = at.lane.load(w.add(self.channels));
            let w2 = at.lane.load(w.add(2 * self.channels));
            w = w.wrapping_add(3 * self.channels);
            unroll!(i in 0 1 2 3 4 5 6 7 8 9 => {
                if i < (P - 1) * S + 3 {
                    let v = at.lane.load(x.add(i * self.channels));
                    if i.is_multiple_of(S) && i / S < P {
                        sums[i / S] = sums[i / S].fma(w0, v);
                    }
                    if i >= 1 && (i - 1).is_multiple_of(S) && (i - 1) / S < P {
                        sums[(i - 1) / S] = sums[(i - 1) / S].fma(w1, v);
                    }
                    if i >= 2 && (i - 2).is_multiple_of(S) && (i - 2) / S < P {
                        sums[(i - 2) / S] = sums[(i - 2) / S].fma(w2, v);
                    }
                }
            });
        }
        self.finish(sums, at);
    }

    /// `P` pixels under any taps.
    #[inline(always)]
    unsafe fn pixels<V: Vector, const P: usize>(&self, at: Place<V>) {
        let mut sums = [V::splat(0.0); P];
        let mut w = self.pass.panels.as_ptr().wrapping_add(at.c);
        for &offset in &self.sweep.runs {
            let wv = at.lane.load(w);
            unroll!(p in 0 1 2 3 => {
                if p < P {
                    sums[p] = sums[p].fma(wv, at.lane.load(at.x.add(offset + p * self.sweep.in_step)));
                }
            });
            w = w.wrapping_add(self.channels);
        }
        self.finish(sums, at);
    }

    #[inline(always)]
    unsafe fn finish<V: Vector, const P: usize>(&self, sums: [V; P], at: Place<V>) {
        let (lane, step, epilogue) = (at.lane, self.sweep.out_step, &self.pass.epilogue);
        let bias = if let Some(bias) = epilogue.bias { lane.load(bias.as_ptr().add(at.c)) } else { V::splat(0.0) };
        unroll!(p in 0 1 2 3 4 5 6 7 => {
            if p < P {
                let mut v = sums[p].add(bias);
                if let Some(residual) = epilogue.residual {
                    v = v.add(lane.load(residual.as_ptr().add(at.to + p * step)));
                }
                let out = at.out.add(p * step);
                if self.pass.add {
                    v = v.add(lane.load(out));
                }
                lane.store(activate(v, epilogue.activation), out);
            }
        });
    }
}

/// The weight gradient, `[tap][channel]`; the caller has checked that it stays inside its slices.
pub(crate) struct WeightGrad<'a> {
    pub sweep: &'a Sweep,
    pub channels: usize,
    pub images: usize,
    pub x: &'a [f32],
    pub x_image: usize,
    pub dy: &'a [f32],
    pub grad: Padded,
    /// The taps wanted.
    pub k: Range<usize>,
    pub dw: &'a mut [f32],
}

/// Taps whose sums are kept in registers at once.
const TAPS: usize = 9;

impl Kernel for WeightGrad<'_> {
    type Output = ();
    const NAME: &'static str = "depthwise weight";

    fn cost(&self) -> Cost {
        let pixels = self.images * self.sweep.rows * self.sweep.cols;
        Cost { flops: 2 * pixels * self.sweep.taps.len() * self.channels, floats: pixels * (self.sweep.in_step + self.channels) }
    }

    #[inline(always)]
    fn run<V: Vector>(mut self) {
        let three = threes(self.sweep, self.channels) == 1 && self.k == (0..TAPS);
        for image in 0..self.images {
            lanes!(V, self.channels, c, lane => {
                if three {
                    // SAFETY: the caller checked the last pixel's taps and gradients against the slices.
                    unsafe { self.nine(image, c, lane) };
                } else {
                    for (at, taps) in tile::parts(self.k.len(), TAPS) {
                        // SAFETY: the caller checked the last pixel's taps and gradients against the slices.
                        unsafe {
                            match taps {
                                9 => self.taps::<V, 9>(image, c, at, lane),
                                8 => self.taps::<V, 8>(image, c, at, lane),
                                7 => self.taps::<V, 7>(image, c, at, lane),
                                6 => self.taps::<V, 6>(image, c, at, lane),
                                5 => self.taps::<V, 5>(image, c, at, lane),
                                4 => self.taps::<V, 4>(image, c, at, lane),
                                3 => self.taps::<V, 3>(image, c, at, lane),
                                2 => self.taps::<V, 2>(image, c, at, lane),
                                _ => self.taps::<V, 1>(image, c, at, lane),
                            }
                        }
                    }
                }
            });
        }
    }
}

impl WeightGrad<'_> {
    /// The first input and gradient of a row.
    #[inline(always)]
    unsafe fn row(&self, image: usize, row: usize, c: usize) -> (*const f32, *const f32) {
        let d = image * self.grad.len() + self.grad.origin() + row * self.grad.row() + c;
        (self.x.as_ptr().add(image * self.x_image + row * self.sweep.in_row + c), self.dy.as_ptr().add(d))
    }

    /// All taps of a 3x3 of stride 1, two pixels at a time: every input of a row is loaded once for both.
    #[inline(always)]
    unsafe fn nine<V: Vector>(&mut self, image: usize, c: usize, lane: Lane<V>) {
        let (s, n) = (self.sweep, self.channels);
        let dw = self.dw.as_mut_ptr().add(c);
        let rows = [s.runs[0], s.runs[3], s.runs[6]];
        let mut sums = [V::splat(0.0); TAPS];
        unroll!(t in 0 1 2 3 4 5 6 7 8 => { sums[t] = lane.load(dw.add(t * n)); });
        for row in 0..s.rows {
            let (mut x, mut d) = self.row(image, row, c);
            for _ in 0..s.cols / 2 {
                let (d0, d1) = (lane.load(d), lane.load(d.add(n)));
                unroll!(r in 0 1 2 => {
                    let from = x.add(rows[r]);
                    let (x0, x1) = (lane.load(from), lane.load(from.add(n)));
                    let (x2, x3) = (lane.load(from.add(2 * n)), lane.load(from.add(3 * n)));
                    sums[3 * r] = sums[3 * r].fma(d0, x0).fma(d1, x1);
                    sums[3 * r + 1] = sums[3 * r + 1].fma(d0, x1).fma(d1, x2);
                    sums[3 * r + 2] = sums[3 * r + 2].fma(d0, x2).fma(d1, x3);
                });
                (x, d) = (x.wrapping_add(2 * n), d.wrapping_add(2 * n));
            }
            if s.cols % 2 == 1 {
                let d0 = lane.load(d);
                unroll!(r in 0 1 2 => {
                    let from = x.add(rows[r]);
                    sums[3 * r] = sums[3 * r].fma(d0, lane.load(from));
                    sums[3 * r + 1] = sums[3 * r + 1].fma(d0, lane.load(from.add(n)));
                    sums[3 * r + 2] = sums[3 * r + 2].fma(d0, lane.load(from.add(2 * n)));
                });
            }
        }
        unroll!(t in 0 1 2 3 4 5 6 7 8 => { lane.store(sums[t], dw.add(t * n)); });
    }

    /// `T` taps from the `at`-th wanted one on, of the vector of channels `c`.
    #[inline(always)]
    unsafe fn taps<V: Vector, const T: usize>(&mut self, image: usize, c: usize, at: usize, lane: Lane<V>) {
        let s = self.sweep;
        let dw = self.dw.as_mut_ptr().add(at * self.channels + c);
        let mut runs = [0; T];
        runs.copy_from_slice(&s.runs[self.k.start + at..][..T]);
        let mut sums = [V::splat(0.0); T];
        for t in 0..T {
            sums[t] = lane.load(dw.add(t * self.channels));
        }
        for row in 0..s.rows {
            let (mut x, mut d) = self.row(image, row, c);
            for _ in 0..s.cols {
                let dv = lane.load(d);
                for t in 0..T {
                    sums[t] = sums[t].fma(dv, lane.load(x.wrapping_add(runs[t])));
                }
                x = x.wrapping_add(s.in_step);
                d = d.wrapping_add(self.channels);
            }
        }
        for t in 0..T {
            lane.store(sums[t], dw.add(t * self.channels));
        }
    }
}
