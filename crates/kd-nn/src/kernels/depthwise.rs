//! Depthwise convolution: every channel alone, vectors along the channels. Bound by memory, not by arithmetic.

#![allow(unsafe_code, unsafe_op_in_unsafe_fn)]
#![allow(clippy::needless_range_loop)] // indices of several arrays at once, unrolled by constants

use std::ops::Range;

use super::conv::{Padded, Pass, Sweep};
use super::tile::{self, Activation};
use super::vector::{Kernel, Vector};

/// Pixels computed at once; their sums share the loaded weights.
const PIXELS: usize = 4;

/// A sweep over channels alone; the caller has checked that it stays inside its slices.
pub(crate) struct Forward<'a> {
    pub sweep: &'a Sweep,
    pub channels: usize,
    /// Its panels are `[tap][channel]`.
    pub pass: Pass<'a>,
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let s = self.sweep;
        let out = self.pass.out.as_mut_ptr();
        for image in 0..self.pass.images {
            for row in 0..s.rows {
                for c in (0..self.channels).step_by(V::LANES) {
                    for (col, p) in tile::parts(s.cols, PIXELS) {
                        let from = image * self.pass.x_image + row * s.in_row + col * s.in_step + c;
                        let to = image * self.pass.out_image + s.out + row * s.out_row + col * s.out_step + c;
                        // SAFETY: the caller checked that the last pixel's taps and outputs lie inside the slices.
                        unsafe {
                            let (x, out) = (self.pass.x.as_ptr().add(from), out.add(to));
                            match p {
                                1 => self.pixels::<V, 1>(x, out, c, to),
                                2 => self.pixels::<V, 2>(x, out, c, to),
                                3 => self.pixels::<V, 3>(x, out, c, to),
                                _ => self.pixels::<V, PIXELS>(x, out, c, to),
                            }
                        }
                    }
                }
            }
        }
    }
}

impl Forward<'_> {
    /// `P` neighbouring pixels of the vector of channels `c`; `to` is the index of `out` in the output.
    #[inline(always)]
    unsafe fn pixels<V: Vector, const P: usize>(&self, x: *const f32, out: *mut f32, c: usize, to: usize) {
        let s = self.sweep;
        let mask = V::first((self.channels - c).min(V::LANES));
        let mut sums = [V::splat(0.0); P];
        let mut w = self.pass.panels.as_ptr().wrapping_add(c);
        for &offset in &s.runs {
            let wv = V::load_masked(w, mask);
            for p in 0..P {
                sums[p] = sums[p].fma(wv, V::load_masked(x.add(offset + p * s.in_step), mask));
            }
            w = w.wrapping_add(self.channels);
        }
        for p in 0..P {
            let mut v = sums[p];
            if let Some(bias) = self.pass.epilogue.bias {
                v = v.add(V::load_masked(bias.as_ptr().add(c), mask));
            }
            if let Some(residual) = self.pass.epilogue.residual {
                v = v.add(V::load_masked(residual.as_ptr().add(to + p * s.out_step), mask));
            }
            let out = out.add(p * s.out_step);
            if self.pass.add {
                v = v.add(V::load_masked(out, mask));
            }
            v = match self.pass.epilogue.activation {
                Activation::None => v,
                Activation::Relu => v.relu(),
                Activation::Relu6 => v.relu().min(V::splat(6.0)),
            };
            v.store_masked(out, mask);
        }
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

    #[inline(always)]
    fn run<V: Vector>(mut self) {
        for image in 0..self.images {
            for c in (0..self.channels).step_by(V::LANES) {
                for (at, taps) in tile::parts(self.k.len(), TAPS) {
                    // SAFETY: the caller checked the last pixel's taps and gradients against the slices.
                    unsafe {
                        match taps {
                            9 => self.taps::<V, 9>(image, c, at),
                            8 => self.taps::<V, 8>(image, c, at),
                            7 => self.taps::<V, 7>(image, c, at),
                            6 => self.taps::<V, 6>(image, c, at),
                            5 => self.taps::<V, 5>(image, c, at),
                            4 => self.taps::<V, 4>(image, c, at),
                            3 => self.taps::<V, 3>(image, c, at),
                            2 => self.taps::<V, 2>(image, c, at),
                            _ => self.taps::<V, 1>(image, c, at),
                        }
                    }
                }
            }
        }
    }
}

impl WeightGrad<'_> {
    /// `T` taps from the `at`-th wanted one on, of the vector of channels `c`.
    #[inline(always)]
    unsafe fn taps<V: Vector, const T: usize>(&mut self, image: usize, c: usize, at: usize) {
        let s = self.sweep;
        let mask = V::first((self.channels - c).min(V::LANES));
        let dw = self.dw.as_mut_ptr().add(at * self.channels + c);
        let mut runs = [0; T];
        runs.copy_from_slice(&s.runs[self.k.start + at..][..T]);
        let mut sums = [V::splat(0.0); T];
        for t in 0..T {
            sums[t] = V::load_masked(dw.add(t * self.channels), mask);
        }
        for row in 0..s.rows {
            let mut x = self.x.as_ptr().add(image * self.x_image + row * s.in_row + c);
            let mut d = self.dy.as_ptr().add(image * self.grad.len() + self.grad.origin() + row * self.grad.row() + c);
            for _ in 0..s.cols {
                let dv = V::load_masked(d, mask);
                for t in 0..T {
                    sums[t] = sums[t].fma(dv, V::load_masked(x.wrapping_add(runs[t]), mask));
                }
                x = x.wrapping_add(s.in_step);
                d = d.wrapping_add(self.channels);
            }
        }
        for t in 0..T {
            sums[t].store_masked(dw.add(t * self.channels), mask);
        }
    }
}
