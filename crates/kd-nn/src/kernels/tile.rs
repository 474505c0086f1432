//! The two register kernels that carry every dense product.
//!
//! ```text
//! nn   out[p][n]  = sum over k of x[p][k] w[k][n]     rows p of activations, weights packed in panels: forward, input gradients, linear
//! tn   out[k][n] += sum over p of x[p][k] d[p][n]     weight gradients
//! ```
//!
//! Both keep a tile of `P` x `Q` vectors of sums in registers; one step loads `Q` vectors, broadcasts `P` scalars and does `P Q` fused
//! multiply-adds. Tiles of every height exist, so that a row of pixels is cut into nearly equal tiles and no single row is left over.

#![allow(unsafe_code, unsafe_op_in_unsafe_fn, reason = "register kernels on raw pointers; each entry states what it relies on")]
#![allow(clippy::needless_range_loop)] // indices of several arrays at once, unrolled by constants

use super::vector::{Kernel, Level, Vector};

/// The rows of a tile one after another.
macro_rules! rows {
    ($p:ident < $count:expr => $body:block) => {
        unroll!($p in 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 => {
            if $p < $count {
                $body
            }
        })
    };
}

/// What happens to a sum before it is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Activation {
    #[default]
    None,
    Relu,
    Relu6,
}

/// One strip of tiles of `nn`, one below the other.
pub(crate) struct Nn<'a> {
    /// Tiles.
    pub tiles: usize,
    /// The first row's input.
    pub x: *const f32,
    /// Floats from one row's input to the next one's.
    pub x_step: usize,
    /// Offsets of the contiguous runs that make up a row's input.
    pub runs: &'a [usize],
    /// Floats in each run.
    pub run: usize,
    /// Panel `[runs][run][Q vectors]`.
    pub w: *const f32,
    /// The first row's output.
    pub out: *mut f32,
    /// Floats from one row's output to the next one's.
    pub out_step: usize,
    /// Floats of the last vector that exist.
    pub tail: usize,
    /// Added to every row; null for none.
    pub bias: *const f32,
    /// Added to every row, laid out as the output; null for none.
    pub residual: *const f32,
    /// Applied last.
    pub activation: Activation,
    /// Whether the sums are added to what the output holds.
    pub add: bool,
}

/// One tile of `tn`.
pub(crate) struct Tn {
    /// The first activation of the first pixel.
    pub x: *const f32,
    /// Floats from one pixel to the next, and from one row of pixels to the next.
    pub x_step: usize,
    pub x_row: usize,
    /// The first gradient of the first pixel, and its steps.
    pub d: *const f32,
    pub d_step: usize,
    pub d_row: usize,
    /// Rows of pixels, and pixels in each.
    pub rows: usize,
    pub cols: usize,
    /// The first row of the product.
    pub out: *mut f32,
    /// Floats from one row of the product to the next.
    pub out_step: usize,
    /// Floats of the last vector that exist.
    pub tail: usize,
}

struct NnTile<'a, const P: usize, const Q: usize>(&'a Nn<'a>);

impl<const P: usize, const Q: usize> Kernel for NnTile<'_, P, Q> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        if Q > V::TILE_ROWS.len() || P > V::TILE_ROWS[Q - 1] {
            unreachable!("invariant: tiles fit the registers");
        }
        for tile in 0..self.0.tiles {
            // SAFETY: `nn` vouches for the pointers.
            unsafe { nn_tile::<V, P, Q>(self.0, tile * P) }
        }
    }
}

#[inline(always)]
unsafe fn nn_tile<V: Vector, const P: usize, const Q: usize>(t: &Nn, row: usize) {
    let (first, out) = (t.x.add(row * t.x_step), t.out.add(row * t.out_step));
    let mut sums = [[V::splat(0.0); Q]; P];
    let mut w = t.w;
    let step = t.x_step;
    for &offset in t.runs {
        let mut x = first.add(offset);
        let end = x.add(t.run);
        while x < end {
            let mut wv = [V::splat(0.0); Q];
            for q in 0..Q {
                wv[q] = V::load(w.add(q * V::LANES));
            }
            rows!(p < P => {
                let b = V::splat(*x.add(p * step));
                for q in 0..Q {
                    sums[p][q] = sums[p][q].fma(b, wv[q]);
                }
            });
            w = w.add(Q * V::LANES);
            x = x.add(1);
        }
    }
    // Pass by pass: one loop with all of this in it is not unrolled, and then the sums are not in registers.
    let tail = Tail::<V>::of(t.tail);
    if !t.bias.is_null() {
        for q in 0..Q {
            let bias = load::<V, Q>(t.bias, q, tail);
            rows!(p < P => {
                sums[p][q] = sums[p][q].add(bias);
            });
        }
    }
    if !t.residual.is_null() {
        rows!(p < P => {
            for q in 0..Q {
                sums[p][q] = sums[p][q].add(load::<V, Q>(t.residual.add((row + p) * t.out_step), q, tail));
            }
        });
    }
    if t.add {
        rows!(p < P => {
            for q in 0..Q {
                sums[p][q] = sums[p][q].add(load::<V, Q>(out.add(p * t.out_step), q, tail));
            }
        });
    }
    if t.activation != Activation::None {
        rows!(p < P => {
            for q in 0..Q {
                sums[p][q] = sums[p][q].relu();
            }
        });
    }
    if t.activation == Activation::Relu6 {
        rows!(p < P => {
            for q in 0..Q {
                sums[p][q] = sums[p][q].min(V::splat(6.0));
            }
        });
    }
    store(&sums, out, t.out_step, tail);
}

/// The last vector of a row.
#[derive(Clone, Copy)]
struct Tail<V: Vector> {
    mask: V::Mask,
    whole: bool,
}

impl<V: Vector> Tail<V> {
    #[inline(always)]
    fn of(lanes: usize) -> Self {
        Self { mask: V::first(lanes), whole: lanes == V::LANES }
    }
}

/// Vector `q` of `Q` behind `p`, the last one masked.
#[inline(always)]
unsafe fn load<V: Vector, const Q: usize>(p: *const f32, q: usize, tail: Tail<V>) -> V {
    let p = p.add(q * V::LANES);
    if q + 1 == Q { V::load_masked(p, tail.mask) } else { V::load(p) }
}

/// Stores a tile. Masked stores are slow on some CPUs: only where a row ends inside a vector.
#[inline(always)]
unsafe fn store<V: Vector, const P: usize, const Q: usize>(sums: &[[V; Q]; P], out: *mut f32, step: usize, tail: Tail<V>) {
    rows!(p < P => {
        for q in 0..Q - 1 {
            sums[p][q].store(out.add(p * step + q * V::LANES));
        }
    });
    let last = out.add((Q - 1) * V::LANES);
    if tail.whole {
        rows!(p < P => {
            sums[p][Q - 1].store(last.add(p * step));
        });
    } else {
        rows!(p < P => {
            sums[p][Q - 1].store_masked(last.add(p * step), tail.mask);
        });
    }
}

struct TnTile<'a, const P: usize, const Q: usize>(&'a Tn);

impl<const P: usize, const Q: usize> Kernel for TnTile<'_, P, Q> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        if Q > V::TILE_ROWS.len() || P > V::TILE_ROWS[Q - 1] {
            unreachable!("invariant: tiles fit the registers");
        }
        // SAFETY: `tn` vouches for the pointers.
        unsafe { tn_tile::<V, P, Q>(self.0) }
    }
}

#[inline(always)]
unsafe fn tn_tile<V: Vector, const P: usize, const Q: usize>(t: &Tn) {
    let tail = Tail::<V>::of(t.tail);
    let mut sums = [[V::splat(0.0); Q]; P];
    rows!(p < P => {
        for q in 0..Q {
            sums[p][q] = load::<V, Q>(t.out.add(p * t.out_step), q, tail);
        }
    });
    for row in 0..t.rows {
        let mut x = t.x.add(row * t.x_row);
        let mut d = t.d.add(row * t.d_row);
        for _ in 0..t.cols {
            let mut dv = [V::splat(0.0); Q];
            for q in 0..Q {
                dv[q] = load::<V, Q>(d, q, tail);
            }
            rows!(p < P => {
                let b = V::splat(*x.add(p));
                for q in 0..Q {
                    sums[p][q] = sums[p][q].fma(b, dv[q]);
                }
            });
            x = x.wrapping_add(t.x_step);
            d = d.wrapping_add(t.d_step);
        }
    }
    store(&sums, t.out, t.out_step, tail);
}

/// One function per tile size, chosen at run time.
macro_rules! by_size {
    ($tile:ident, $args:expr, $p:expr, $q:expr) => {
        by_size!(@ $tile, $args, $p, $q;
            1: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; 2: 1 2 3 4 5 6 7 8 9 10 11 12; 3: 1 2 3 4 5 6 7 8; 4: 1 2 3 4 5 6)
    };
    (@ $tile:ident, $args:expr, $p:expr, $q:expr; $($qs:literal: $($ps:literal)+);+) => {
        match $q {
            $($qs => match $p {
                $($ps => V::call($tile::<$ps, $qs>($args)),)+
                _ => unreachable!("invariant: tiles fit the registers"),
            },)+
            _ => unreachable!("invariant: tiles fit the registers"),
        }
    };
}

/// Computes tiles of `p` rows and `q` vectors.
///
/// # Safety
/// Every row's runs, the panel, the outputs, and bias and residual where not null, must be valid; outputs of all rows of
/// `(q - 1) LANES + tail` floats must be writable and overlap none of the others.
#[inline(always)]
pub(crate) unsafe fn nn<V: Vector>(p: usize, q: usize, args: &Nn) {
    by_size!(NnTile, args, p, q);
}

/// Adds a tile of `p` rows and `q` vectors to the product.
///
/// # Safety
/// `p` activations and `(q - 1) LANES + tail` gradients of every pixel must be readable, and as many outputs of `p` rows writable.
#[inline(always)]
pub(crate) unsafe fn tn<V: Vector>(p: usize, q: usize, args: &Tn) {
    by_size!(TnTile, args, p, q);
}

/// Cuts `0..n` into nearly equal parts of at most `most`, as (start, length).
pub(crate) fn parts(n: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = n.div_ceil(most);
    (0..count).map(move |i| {
        let start = i * n / count;
        (start, (i + 1) * n / count - start)
    })
}

/// Cuts `0..n` into nearly equal tiles of at most `most`: (start, size, count) of the taller and the lower ones.
pub(crate) fn strips(n: usize, most: usize) -> [(usize, usize, usize); 2] {
    let count = n.div_ceil(most).max(1);
    let (low, taller) = (n / count, n % count);
    [(0, low + 1, taller), (taller * (low + 1), low, if low == 0 { 0 } else { count - taller })]
}

/// A column block of a product: how many vectors from which output on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    /// First output.
    pub start: usize,
    /// Vectors.
    pub vectors: usize,
    /// Outputs of the last vector.
    pub tail: usize,
}

/// The column blocks that `n` outputs are computed in.
pub(crate) fn blocks(level: Level, n: usize) -> impl Iterator<Item = Block> {
    let lanes = level.lanes();
    parts(n.div_ceil(lanes), level.tile_rows().len()).map(move |(first, vectors)| {
        let start = first * lanes;
        Block { start, vectors, tail: (n - start - (vectors - 1) * lanes).min(lanes) }
    })
}

/// Floats of the panels of `n` outputs and `k` inputs.
pub(crate) fn packed_len(level: Level, n: usize, k: usize) -> usize {
    n.next_multiple_of(level.lanes()) * k
}

/// Packs weights `w[o * o_step + c * c_step + tap]` into panels `[block][tap][channel][vectors]`, outputs padded with zeros.
pub(crate) fn pack(level: Level, w: &[f32], outputs: (usize, usize), channels: (usize, usize), taps: &[usize], panels: &mut [f32]) {
    let ((n, o_step), (channels, c_step)) = (outputs, channels);
    let lanes = level.lanes();
    let mut rest = panels;
    for block in blocks(level, n) {
        let width = block.vectors * lanes;
        let real = width - lanes + block.tail;
        for &tap in taps {
            for c in 0..channels {
                let (row, next) = rest.split_at_mut(width);
                let from = &w[block.start * o_step + c * c_step + tap..];
                for (o, v) in row[..real].iter_mut().enumerate() {
                    *v = from[o * o_step];
                }
                row[real..].fill(0.0);
                rest = next;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_nearly_equal_and_cover() {
        assert_eq!(parts(32, 12).collect::<Vec<_>>(), [(0, 10), (10, 11), (21, 11)]);
        assert_eq!(parts(7, 6).collect::<Vec<_>>(), [(0, 3), (3, 4)]);
        assert_eq!(parts(0, 6).count(), 0);
        assert_eq!(strips(32, 12), [(0, 11, 2), (22, 10, 1)]);
        assert_eq!(strips(16, 16), [(0, 17, 0), (0, 16, 1)]);
        assert_eq!(strips(0, 4).map(|s| s.2), [0, 0]);
    }

    #[test]
    fn blocks_cover_the_outputs() {
        for level in Level::available() {
            for n in [1, 7, 16, 17, 67, 100, 512] {
                let lanes = level.lanes();
                let found: Vec<_> = blocks(level, n).collect();
                assert!(found.iter().all(|b| b.vectors <= level.tile_rows().len() && (1..=lanes).contains(&b.tail)));
                let total: usize = found.iter().map(|b| (b.vectors - 1) * lanes + b.tail).sum();
                assert_eq!(total, n);
            }
        }
    }
}
