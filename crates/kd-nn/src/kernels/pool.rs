//! Pooling over images of `[row][column][channel]`.
//!
//! Loops over whole pixels; the compiler makes vectors along the channels of them, with the instructions of the level.

use std::ops::Range;

use super::vector::{Kernel, Level, Vector};
use crate::graph::Pool;

/// Which input cells belong to which output cell, along both axes, and by what an average divides.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Windows {
    pub w: usize,
    pub channels: usize,
    rows: Vec<Window>,
    cols: Vec<Window>,
}

/// The cells of one output position along an axis.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Window {
    cells: Range<usize>,
    /// Cells that an average counts.
    counted: usize,
}

impl Windows {
    /// Of a maximum or average pooling.
    pub(crate) fn pool(pool: &Pool, [channels, h, w]: [usize; 3]) -> Self {
        let axis = |axis: usize, n: usize| {
            let (k, s, p) = (pool.kernel[axis], pool.stride[axis], pool.padding[axis]);
            (0..pool.output(n, axis).unwrap_or(0))
                .map(|i| {
                    // Positions count from the padding; what ceil mode adds beyond it never counts.
                    let (start, end) = (i * s, (i * s + k).min(n + 2 * p));
                    let cells = start.max(p).min(n + p) - p..end.clamp(p, n + p) - p;
                    let counted = if pool.count_include_pad { end - start } else { cells.len() };
                    Window { cells, counted }
                })
                .collect()
        };
        Self { w, channels, rows: axis(0, h), cols: axis(1, w) }
    }

    /// Of an adaptive pooling: bin i covers `floor(i n / out) .. ceil((i + 1) n / out)`.
    pub(crate) fn adaptive(output: [usize; 2], [channels, h, w]: [usize; 3]) -> Self {
        let axis = |n: usize, out: usize| {
            (0..out)
                .map(|i| {
                    let cells = i * n / out..((i + 1) * n).div_ceil(out);
                    Window { counted: cells.len(), cells }
                })
                .collect()
        };
        Self { w, channels, rows: axis(h, output[0]), cols: axis(w, output[1]) }
    }

    /// Calls `f` for every output cell with its number, its windows and the area that an average divides by.
    #[inline(always)]
    fn each(&self, mut f: impl FnMut(usize, &Range<usize>, &Range<usize>, usize)) {
        for (i, y) in self.rows.iter().enumerate() {
            for (j, x) in self.cols.iter().enumerate() {
                f(i * self.cols.len() + j, &y.cells, &x.cells, y.counted * x.counted);
            }
        }
    }

    #[inline(always)]
    fn pixel(&self, y: usize, x: usize) -> Range<usize> {
        let at = (y * self.w + x) * self.channels;
        at..at + self.channels
    }
}

/// Means of one image.
pub(crate) struct Average<'a> {
    pub windows: &'a Windows,
    pub x: &'a [f32],
    pub out: &'a mut [f32],
}

impl Kernel for Average<'_> {
    type Output = ();
    const NAME: &'static str = "average";

    #[inline(always)]
    fn run<V: Vector>(self) {
        let c = self.windows.channels;
        self.windows.each(|cell, rows, cols, area| {
            let out = &mut self.out[cell * c..][..c];
            out.fill(0.0);
            for y in rows.clone() {
                for x in cols.clone() {
                    out.iter_mut().zip(&self.x[self.windows.pixel(y, x)]).for_each(|(o, v)| *o += v);
                }
            }
            let factor = 1.0 / area as f32;
            out.iter_mut().for_each(|o| *o *= factor);
        });
    }
}

/// Adds the gradient of means to that of one image.
pub(crate) struct AverageGrad<'a> {
    pub windows: &'a Windows,
    pub dy: &'a [f32],
    pub dx: &'a mut [f32],
}

impl Kernel for AverageGrad<'_> {
    type Output = ();
    const NAME: &'static str = "average gradient";

    #[inline(always)]
    fn run<V: Vector>(self) {
        let c = self.windows.channels;
        self.windows.each(|cell, rows, cols, area| {
            let (dy, factor) = (&self.dy[cell * c..][..c], 1.0 / area as f32);
            for y in rows.clone() {
                for x in cols.clone() {
                    self.dx[self.windows.pixel(y, x)].iter_mut().zip(dy).for_each(|(o, v)| *o += v * factor);
                }
            }
        });
    }
}

/// Whether `v` replaces the maximum `m` so far: among equals the first stays, a NaN wins as in PyTorch.
#[inline(always)]
fn replaces(v: f32, m: f32) -> bool {
    v > m || v.is_nan()
}

/// Maxima of one image.
pub(crate) struct Maximum<'a> {
    pub windows: &'a Windows,
    pub x: &'a [f32],
    pub out: &'a mut [f32],
}

impl Kernel for Maximum<'_> {
    type Output = ();
    const NAME: &'static str = "maximum";

    #[inline(always)]
    fn run<V: Vector>(self) {
        let c = self.windows.channels;
        self.windows.each(|cell, rows, cols, _| {
            let out = &mut self.out[cell * c..][..c];
            out.fill(f32::NEG_INFINITY);
            for y in rows.clone() {
                for x in cols.clone() {
                    out.iter_mut().zip(&self.x[self.windows.pixel(y, x)]).for_each(|(o, &v)| *o = if replaces(v, *o) { v } else { *o });
                }
            }
        });
    }
}

/// Adds the gradient of maxima to that of one image: all of it to the first cell that holds the maximum.
pub(crate) struct MaximumGrad<'a> {
    pub windows: &'a Windows,
    pub x: &'a [f32],
    pub dy: &'a [f32],
    pub dx: &'a mut [f32],
    /// `2 channels` floats: the maximum so far and which cell of the window it is.
    pub scratch: &'a mut [f32],
}

impl Kernel for MaximumGrad<'_> {
    type Output = ();
    const NAME: &'static str = "maximum gradient";

    #[inline(always)]
    fn run<V: Vector>(self) {
        let c = self.windows.channels;
        let (best, which) = self.scratch[..2 * c].split_at_mut(c);
        self.windows.each(|cell, rows, cols, _| {
            best.fill(f32::NEG_INFINITY);
            which.fill(0.0);
            let mut number = 0.0;
            for y in rows.clone() {
                for x in cols.clone() {
                    for ((b, w), &v) in best.iter_mut().zip(which.iter_mut()).zip(&self.x[self.windows.pixel(y, x)]) {
                        let better = replaces(v, *b);
                        *b = if better { v } else { *b };
                        *w = if better { number } else { *w };
                    }
                    number += 1.0;
                }
            }
            let dy = &self.dy[cell * c..][..c];
            let mut number = 0.0;
            for y in rows.clone() {
                for x in cols.clone() {
                    for ((o, w), d) in self.dx[self.windows.pixel(y, x)].iter_mut().zip(which.iter()).zip(dy) {
                        *o += if *w == number { *d } else { 0.0 };
                    }
                    number += 1.0;
                }
            }
        });
    }
}

/// Runs a pooling kernel on the level.
pub(crate) fn run<K: Kernel<Output = ()>>(level: Level, kernel: K) {
    level.run(kernel);
}
