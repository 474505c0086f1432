//! Winograd's F(4x4, 3x3): a 3x3 convolution of stride 1 with a quarter of the multiplications.
//!
//! ```text
//! y = A^T [ (G g G^T) . (B^T d B) ] A        per tile: d 6x6 inputs, g the 3x3 kernel, y 4x4 outputs, . over 36 products
//! ```
//!
//! with the interpolation points 0, 1, -1, 2, -2 and infinity (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
//! CVPR 2016). Summed over channels, each of the 36 products is a matrix product over all tiles of a group of images, done by the `nn`
//! register kernel; the input gradient is the same with the kernel flipped and transposed. The weight gradient is the exact adjoint:
//! `dG = sum over tiles of (B^T d B) . (A dy A^T)`, 36 products by `tn`, and `dg = G^T dG G` at the end.
//!
//! The error is that of f32 times the growth of the transforms: about 1e-5 of the largest output where direct sums have 1e-6.

#![allow(unsafe_code, unsafe_op_in_unsafe_fn, reason = "register kernels on raw pointers; each entry states what it relies on")]
#![allow(clippy::needless_range_loop)] // indices of several arrays at once, unrolled by constants

use std::ops::Range;

use super::clock::Cost;
use super::conv::Epilogue;
use super::sweep::Padded;
use super::tile::{self, Activation, Nn, Tn};
use super::vector::{Kernel, Level, Vector};
use crate::graph::Conv2d;

/// Outputs of a tile along an axis.
const TILE: usize = 4;
/// Inputs of a tile along an axis.
const REACH: usize = 6;
/// Products of a tile.
const POINTS: usize = REACH * REACH;

/// Floats from the matrix of one point to that of the next one: never a power of two.
fn matrix(rows: usize, columns: usize) -> usize {
    rows * columns + 16
}

/// The geometry of one direction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Winograd {
    pub level: Level,
    /// Channels read and outputs.
    pub channels: usize,
    pub outputs: usize,
    /// Output size.
    pub rows: usize,
    pub cols: usize,
    /// The images read; they reach [`extent`] rows and columns.
    pub input: Padded,
}

/// Rows (or columns) of the padded input that whole tiles of `n` outputs read.
pub(crate) fn extent(n: usize) -> usize {
    whole(n) + REACH - TILE
}

/// `n` rounded up to whole tiles.
pub(crate) fn whole(n: usize) -> usize {
    n.next_multiple_of(TILE)
}

/// Whether a convolution can be done this way and gains by it: enough channels for the products to outweigh the transforms, and tiles
/// that are not mostly outside the image.
pub(crate) fn pays(conv: &Conv2d, size: [usize; 2]) -> bool {
    let filled = |[h, w]: [usize; 2]| 2 * h * w >= whole(h) * whole(w);
    conv.kernel == [3; 2]
        && conv.stride == [1; 2]
        && conv.dilation == [1; 2]
        && conv.groups == 1
        && conv.padding.iter().all(|&p| p <= 2)
        && conv.in_channels.min(conv.out_channels) >= 16
        && filled(size)
        && conv.output(size[0], size[1]).is_some_and(filled)
}

impl Winograd {
    /// Tiles of an image, down and across.
    fn tiles(&self) -> [usize; 2] {
        [self.rows.div_ceil(TILE), self.cols.div_ceil(TILE)]
    }

    /// Tiles that go through all three phases together: few enough for their points to stay in the second-level cache, enough for the
    /// transformed weight to be worth reading.
    fn block(&self) -> usize {
        (2 * 1024 / (self.channels + self.outputs)).max(32)
    }

    /// Images that fill a block.
    pub(crate) fn images(&self) -> usize {
        self.block().div_ceil(self.tiles_of_image())
    }

    /// Where a tile begins in images of `from` pixels.
    fn place(&self, tile: usize) -> [usize; 3] {
        let [down, across] = self.tiles();
        [tile / (down * across), tile / across % down, tile % across]
    }

    /// The blocks of the tiles of some images.
    fn blocks(&self, images: usize) -> impl ExactSizeIterator<Item = Range<usize>> + use<> {
        let (tiles, block) = (images * self.tiles_of_image(), self.block());
        (0..tiles.div_ceil(block)).map(move |i| i * block..tiles.min((i + 1) * block))
    }

    /// Floats of the transformed weight.
    pub(crate) fn packed_len(&self) -> usize {
        POINTS * tile::packed_len(self.level, self.outputs, self.channels)
    }

    /// Floats of work memory.
    pub(crate) fn work_len(&self) -> usize {
        POINTS * (matrix(self.block(), self.channels) + matrix(self.block(), self.outputs))
    }

    /// Floats of the gradient of the transformed weight.
    pub(crate) fn product_len(&self) -> usize {
        POINTS * self.channels * self.outputs
    }

    /// Transforms a weight `[output][channel][9]`, or with `flip` `[channel][output][9]` turned round, to panels.
    pub(crate) fn pack(&self, weight: &[f32], flip: bool, panels: &mut [f32]) {
        assert!(weight.len() == 9 * self.channels * self.outputs && panels.len() == self.packed_len());
        self.level.run(Pack { w: self, weight, flip, panels });
    }

    /// Convolves `images` padded images `x` into `out`, overwriting it or adding to it.
    #[expect(clippy::too_many_arguments, reason = "operands of one convolution")]
    pub(crate) fn forward(
        &self,
        images: usize,
        x: &[f32],
        panels: &[f32],
        out: &mut [f32],
        epilogue: Epilogue,
        add: bool,
        ahead: Option<Ahead>,
        work: &mut [f32],
    ) {
        let len = images * self.rows * self.cols * self.outputs;
        assert!(x.len() >= images * self.input.len() && out.len() >= len && panels.len() == self.packed_len());
        assert!(epilogue.residual.is_none_or(|r| r.len() >= len) && epilogue.bias.is_none_or(|b| b.len() == self.outputs));
        let (v, m) = work[..self.work_len()].split_at_mut(POINTS * matrix(self.block(), self.channels));
        let blocks = self.blocks(images);
        for (number, tiles) in self.blocks(images).enumerate() {
            let share = ahead.map(|ahead| Share { number, of: blocks.len(), ahead, next: &out[..len] });
            self.spread_inputs(tiles.clone(), x, 0, tiles.len(), v);
            self.level.run(Products { w: self, rows: tiles.len(), v, panels, m: &mut *m, share });
            self.level.run(Gather { w: self, tiles, m, out, epilogue, add });
        }
    }

    /// Adds to the gradient of the transformed weight, `[point][channel][output]`, from `images` padded inputs and their gradients.
    pub(crate) fn weight_grad(&self, images: usize, x: &[f32], dy: &[f32], grad: Padded, product: &mut [f32], work: &mut [f32]) {
        assert!(product.len() == self.product_len());
        let (v, d) = work[..self.work_len()].split_at_mut(POINTS * matrix(self.block(), self.channels));
        for tiles in self.blocks(images) {
            let all = tiles.len();
            self.spread_inputs(tiles.clone(), x, 0, all, v);
            self.spread_grads(tiles, dy, grad, 0, all, d);
            let pairs = [Points { tiles: all, v, d }];
            self.level.run(Correlate { w: self, pairs: &pairs, channels: 0..self.channels, product });
        }
    }

    /// Floats of the points of `tiles` tiles of inputs, and of gradients.
    pub(crate) fn points_len(&self, tiles: usize) -> [usize; 2] {
        [self.channels, self.outputs].map(|n| POINTS * matrix(tiles, n))
    }

    /// Transforms tiles of padded inputs and puts them from tile `at` of `all` on.
    pub(crate) fn spread_inputs(&self, tiles: Range<usize>, x: &[f32], at: usize, all: usize, v: &mut [f32]) {
        let channels = self.channels;
        assert!(tiles.end <= x.len() / self.input.len() * self.tiles_of_image() && at + tiles.len() <= all);
        assert!(v.len() >= POINTS * matrix(all, channels));
        self.level.run(Spread::<false> { w: self, tiles, x, from: self.input, origin: 0, channels, v, at, all });
    }

    /// Transforms tiles of padded gradients of the output, likewise.
    pub(crate) fn spread_grads(&self, tiles: Range<usize>, dy: &[f32], grad: Padded, at: usize, all: usize, d: &mut [f32]) {
        let channels = self.outputs;
        assert!(tiles.end <= dy.len() / grad.len() * self.tiles_of_image() && at + tiles.len() <= all);
        assert!(d.len() >= POINTS * matrix(all, channels));
        self.level.run(Spread::<true> { w: self, tiles, x: dy, from: grad, origin: grad.origin(), channels, v: d, at, all });
    }

    /// The weight's gradient for some of the channels, `[tap][channel][output]`, from the points of all tiles in parts.
    pub(crate) fn weight_rows(&self, pairs: &[Points], channels: Range<usize>, taps: &mut [&mut [f32]], product: &mut [f32]) {
        let len = channels.len() * self.outputs;
        assert!(taps.len() == 9 && taps.iter().all(|t| t.len() == len) && product.len() == POINTS * len);
        assert!(
            pairs
                .iter()
                .all(|p| p.v.len() >= POINTS * matrix(p.tiles, self.channels) && p.d.len() >= POINTS * matrix(p.tiles, self.outputs))
        );
        product.fill(0.0);
        self.level.run(Correlate { w: self, pairs, channels, product });
        self.level.run(Untransform { product, taps });
    }

    /// Adds a gradient of the transformed weight to one of the weight, `[tap][channel][output]`.
    pub(crate) fn add_product(&self, product: &[f32], dw: &mut [f32]) {
        let len = self.channels * self.outputs;
        assert!(product.len() == POINTS * len && dw.len() == 9 * len);
        let mut taps: Vec<&mut [f32]> = dw.chunks_exact_mut(len).collect();
        self.level.run(Untransform { product, taps: &mut taps });
    }

    /// Tiles of an image.
    pub(crate) fn tiles_of_image(&self) -> usize {
        self.tiles().iter().product()
    }
}

/// The points of some tiles: of their inputs and of the gradients of their outputs.
pub(crate) struct Points<'a> {
    pub tiles: usize,
    pub v: &'a [f32],
    pub d: &'a [f32],
}

/// `B^T d`: six inputs to six points.
#[inline(always)]
fn input<V: Vector>(d: [V; 6]) -> [V; 6] {
    let (two, four) = (V::splat(2.0), V::splat(4.0));
    let (minus_two, minus_four, minus_five) = (V::splat(-2.0), V::splat(-4.0), V::splat(-5.0));
    let even = d[4].fma(minus_four, d[2]);
    let odd = d[3].fma(minus_four, d[1]);
    let (e, o) = (d[4].sub(d[2]), d[3].sub(d[1]));
    [
        d[4].fma(minus_five, d[2]).fma(four, d[0]),
        even.add(odd),
        even.sub(odd),
        e.fma(two, o),
        e.fma(minus_two, o),
        d[5].fma(minus_five, d[3]).fma(four, d[1]),
    ]
}

/// `A^T m`: six points to four outputs.
#[inline(always)]
fn output<V: Vector>(m: [V; 6]) -> [V; 4] {
    let (sum, difference) = (m[1].add(m[2]), m[1].sub(m[2]));
    let (sum2, difference2) = (m[3].add(m[4]), m[3].sub(m[4]));
    [
        m[0].add(sum).add(sum2),
        difference.fma(V::splat(2.0), difference2),
        sum.fma(V::splat(4.0), sum2),
        difference.fma(V::splat(8.0), difference2).add(m[5]),
    ]
}

/// `A y`: four gradients of outputs to six points.
#[inline(always)]
fn gradient<V: Vector>(y: [V; 4]) -> [V; 6] {
    let (even, odd) = (y[0].add(y[2]), y[1].add(y[3]));
    let even2 = y[0].fma(V::splat(4.0), y[2]);
    let odd2 = y[1].add(y[1]).fma(V::splat(8.0), y[3]);
    [y[0], even.add(odd), even.sub(odd), even2.add(odd2), even2.sub(odd2), y[3]]
}

/// `G g`: three taps to six points.
#[inline(always)]
fn kernel<V: Vector>(g: [V; 3]) -> [V; 6] {
    let sixth = V::splat(-1.0 / 6.0);
    let sum = g[0].add(g[2]);
    let outer = g[0].mul(V::splat(1.0 / 24.0)).fma(V::splat(1.0 / 6.0), g[2]);
    let middle = g[1].mul(V::splat(1.0 / 12.0));
    [g[0].mul(V::splat(0.25)), sum.add(g[1]).mul(sixth), sum.sub(g[1]).mul(sixth), outer.add(middle), outer.sub(middle), g[2]]
}

/// `G^T p`: six points to three taps.
#[inline(always)]
fn taps<V: Vector>(p: [V; 6]) -> [V; 3] {
    let (sum, difference) = (p[1].add(p[2]), p[1].sub(p[2]));
    let (sum2, difference2) = (p[3].add(p[4]), p[3].sub(p[4]));
    let (sixth, twelfth, twentyfourth) = (V::splat(1.0 / 6.0), V::splat(1.0 / 12.0), V::splat(1.0 / 24.0));
    [
        p[0].mul(V::splat(0.25)).fma(V::splat(-1.0 / 6.0), sum).fma(twentyfourth, sum2),
        difference2.mul(twelfth).fma(V::splat(-1.0 / 6.0), difference),
        p[5].fma(V::splat(-1.0 / 6.0), sum).fma(sixth, sum2),
    ]
}

/// Vectors of channels: the first one's number and mask, whole ones apart from the last.
#[inline(always)]
fn vectors<V: Vector>(channels: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..channels).step_by(V::LANES).map(move |c| (c, (channels - c).min(V::LANES)))
}

#[inline(always)]
unsafe fn get<V: Vector, const WHOLE: bool>(p: *const f32, mask: V::Mask) -> V {
    if WHOLE { V::load(p) } else { V::load_masked(p, mask) }
}

#[inline(always)]
unsafe fn put<V: Vector, const WHOLE: bool>(v: V, p: *mut f32, mask: V::Mask) {
    if WHOLE { v.store(p) } else { v.store_masked(p, mask) }
}

/// Tiles of images to points: `v[point][tile][channel]`, `B^T d B` of inputs or (`GRAD`) `A y A^T` of gradients.
struct Spread<'a, const GRAD: bool> {
    w: &'a Winograd,
    tiles: Range<usize>,
    x: &'a [f32],
    from: Padded,
    /// Where the first tile begins in an image.
    origin: usize,
    channels: usize,
    v: &'a mut [f32],
    /// Where the tiles go among `all` of the points' rows.
    at: usize,
    all: usize,
}

impl<const GRAD: bool> Kernel for Spread<'_, GRAD> {
    type Output = ();
    const NAME: &'static str = if GRAD { "winograd gradients" } else { "winograd inputs" };

    fn cost(&self) -> Cost {
        let (read, flops) = if GRAD { (TILE * TILE, 80) } else { (POINTS, 12 * 12) };
        let n = self.tiles.len() * self.channels;
        Cost { flops: flops * n, floats: (read + POINTS) * n }
    }

    #[inline(always)]
    fn run<V: Vector>(self) {
        let step = matrix(self.all, self.channels);
        let v = self.v.as_mut_ptr();
        for (at, tile) in (self.at..).zip(self.tiles.clone()) {
            let [image, ty, tx] = self.w.place(tile);
            let from = image * self.from.len() + self.origin + TILE * (ty * self.from.row() + tx * self.channels);
            for (c, lanes) in vectors::<V>(self.channels) {
                // SAFETY: `Conv` gives padded images that hold whole tiles, and `work_len` floats for all tiles' points.
                unsafe {
                    let (x, v) = (self.x.as_ptr().add(from + c), v.add(at * self.channels + c));
                    let steps = [self.from.row(), self.channels, step];
                    if lanes == V::LANES {
                        spread::<V, GRAD, true>(x, v, steps, V::first(lanes));
                    } else {
                        spread::<V, GRAD, false>(x, v, steps, V::first(lanes));
                    }
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn spread<V: Vector, const GRAD: bool, const WHOLE: bool>(x: *const f32, v: *mut f32, [row, col, step]: [usize; 3], mask: V::Mask) {
    if GRAD {
        let c = [
            gradient(column::<V, 4, WHOLE>(x, row, mask)),
            gradient(column::<V, 4, WHOLE>(x.add(col), row, mask)),
            gradient(column::<V, 4, WHOLE>(x.add(2 * col), row, mask)),
            gradient(column::<V, 4, WHOLE>(x.add(3 * col), row, mask)),
        ];
        unroll!(y in 0 1 2 3 4 5 => {
            put_row::<V, WHOLE>(gradient([c[0][y], c[1][y], c[2][y], c[3][y]]), v.add(y * 6 * step), step, mask);
        });
    } else {
        let c = [
            input(column::<V, 6, WHOLE>(x, row, mask)),
            input(column::<V, 6, WHOLE>(x.add(col), row, mask)),
            input(column::<V, 6, WHOLE>(x.add(2 * col), row, mask)),
            input(column::<V, 6, WHOLE>(x.add(3 * col), row, mask)),
            input(column::<V, 6, WHOLE>(x.add(4 * col), row, mask)),
            input(column::<V, 6, WHOLE>(x.add(5 * col), row, mask)),
        ];
        unroll!(y in 0 1 2 3 4 5 => {
            put_row::<V, WHOLE>(input([c[0][y], c[1][y], c[2][y], c[3][y], c[4][y], c[5][y]]), v.add(y * 6 * step), step, mask);
        });
    }
}

/// `N` vectors, `step` floats apart.
#[inline(always)]
unsafe fn column<V: Vector, const N: usize, const WHOLE: bool>(p: *const f32, step: usize, mask: V::Mask) -> [V; N] {
    let mut found = [V::splat(0.0); N];
    unroll!(i in 0 1 2 3 4 5 => {
        if i < N {
            found[i] = get::<V, WHOLE>(p.add(i * step), mask);
        }
    });
    found
}

/// Stores six points.
#[inline(always)]
unsafe fn put_row<V: Vector, const WHOLE: bool>(points: [V; 6], p: *mut f32, step: usize, mask: V::Mask) {
    unroll!(i in 0 1 2 3 4 5 => {
        put::<V, WHOLE>(points[i], p.add(i * step), mask);
    });
}

/// Memory that will be read next: asked for while the products are computed, which need none of it.
pub(crate) type Ahead<'a> = &'a [&'a [f32]];

/// The share of one block in asking for memory ahead.
#[derive(Clone, Copy)]
struct Share<'a> {
    number: usize,
    of: usize,
    ahead: Ahead<'a>,
    /// What is written next.
    next: &'a [f32],
}

impl Share<'_> {
    /// Asks for what falls on one point of the block.
    #[inline(always)]
    fn prefetch<V: Vector>(&self, point: usize) {
        let (part, parts) = (self.number * POINTS + point, self.of * POINTS);
        for x in self.ahead.iter().copied().chain([self.next]) {
            let lines = x.len() / 16;
            for line in part * lines / parts..(part + 1) * lines / parts {
                V::prefetch(x.as_ptr().wrapping_add(line * 16));
            }
        }
    }
}

/// The 36 products: `m[point] = v[point] panels[point]`.
struct Products<'a> {
    w: &'a Winograd,
    /// Tiles.
    rows: usize,
    v: &'a [f32],
    panels: &'a [f32],
    m: &'a mut [f32],
    share: Option<Share<'a>>,
}

impl Kernel for Products<'_> {
    type Output = ();
    const NAME: &'static str = "winograd products";

    fn cost(&self) -> Cost {
        let w = self.w;
        let floats = self.rows * (w.channels + w.outputs) + w.channels * w.outputs;
        Cost { flops: 2 * POINTS * self.rows * w.channels * w.outputs, floats: POINTS * floats }
    }

    #[inline(always)]
    fn run<V: Vector>(self) {
        let (channels, outputs) = (self.w.channels, self.w.outputs);
        let (v_step, m_step) = (matrix(self.rows, channels), matrix(self.rows, outputs));
        let (mut panel, m) = (self.panels, self.m.as_mut_ptr());
        for point in 0..POINTS {
            if let Some(share) = self.share {
                share.prefetch::<V>(point);
            }
            for block in tile::blocks(self.w.level, outputs) {
                let (own, rest) = panel.split_at(channels * block.vectors * V::LANES);
                panel = rest;
                for (row, p, tiles) in tile::strips(self.rows, V::TILE_ROWS[block.vectors - 1]) {
                    let args = Nn {
                        tiles,
                        x: self.v[point * v_step + row * channels..].as_ptr(),
                        x_step: channels,
                        runs: &[0],
                        run: channels,
                        w: own.as_ptr(),
                        // SAFETY: inside the point's matrix.
                        out: unsafe { m.add(point * m_step + row * outputs + block.start) },
                        out_step: outputs,
                        tail: block.tail,
                        bias: std::ptr::null(),
                        residual: std::ptr::null(),
                        activation: Activation::None,
                        add: false,
                    };
                    if tiles > 0 {
                        // SAFETY: `rows` rows of `channels` and `outputs` floats lie behind each point, and a panel in `own`.
                        unsafe { tile::nn::<V>(p, block.vectors, &args) };
                    }
                }
            }
        }
    }
}

/// Points to images: `A^T m A`, and what follows a convolution.
struct Gather<'a> {
    w: &'a Winograd,
    tiles: Range<usize>,
    m: &'a [f32],
    out: &'a mut [f32],
    epilogue: Epilogue<'a>,
    add: bool,
}

impl Kernel for Gather<'_> {
    type Output = ();
    const NAME: &'static str = "winograd outputs";

    fn cost(&self) -> Cost {
        let n = self.tiles.len() * self.w.outputs;
        let more = usize::from(self.epilogue.residual.is_some()) + usize::from(self.add);
        Cost { flops: 100 * n, floats: (POINTS + TILE * TILE * (1 + more)) * n }
    }

    #[inline(always)]
    fn run<V: Vector>(self) {
        let w = self.w;
        let step = matrix(self.tiles.len(), w.outputs);
        let out = self.out.as_mut_ptr();
        for (number, tile) in self.tiles.clone().enumerate() {
            let [image, ty, tx] = w.place(tile);
            let to = ((image * w.rows + TILE * ty) * w.cols + TILE * tx) * w.outputs;
            let size = [(w.rows - TILE * ty).min(TILE), (w.cols - TILE * tx).min(TILE)];
            for (c, lanes) in vectors::<V>(w.outputs) {
                let at = |x: Option<&[f32]>, i: usize| x.map_or(std::ptr::null(), |x| x[i..].as_ptr());
                // SAFETY: `forward` checked output and residual; the points of every tile lie in `m`.
                unsafe {
                    let place = Place {
                        m: self.m.as_ptr().add(number * w.outputs + c),
                        step,
                        out: out.add(to + c),
                        row: w.cols * w.outputs,
                        col: w.outputs,
                        size,
                        bias: at(self.epilogue.bias, c),
                        residual: at(self.epilogue.residual, to + c),
                        activation: self.epilogue.activation,
                        add: self.add,
                    };
                    if lanes == V::LANES && size == [TILE; 2] {
                        gather::<V, true>(&place, V::first(lanes));
                    } else {
                        gather::<V, false>(&place, V::first(lanes));
                    }
                }
            }
        }
    }
}

/// One vector of channels of a tile's outputs.
struct Place {
    m: *const f32,
    step: usize,
    out: *mut f32,
    row: usize,
    col: usize,
    /// Outputs inside the image.
    size: [usize; 2],
    bias: *const f32,
    residual: *const f32,
    activation: Activation,
    add: bool,
}

#[inline(always)]
unsafe fn gather<V: Vector, const WHOLE: bool>(t: &Place, mask: V::Mask) {
    let step = 6 * t.step;
    let c = [
        output(column::<V, 6, WHOLE>(t.m, step, mask)),
        output(column::<V, 6, WHOLE>(t.m.add(t.step), step, mask)),
        output(column::<V, 6, WHOLE>(t.m.add(2 * t.step), step, mask)),
        output(column::<V, 6, WHOLE>(t.m.add(3 * t.step), step, mask)),
        output(column::<V, 6, WHOLE>(t.m.add(4 * t.step), step, mask)),
        output(column::<V, 6, WHOLE>(t.m.add(5 * t.step), step, mask)),
    ];
    let bias = if t.bias.is_null() { V::splat(0.0) } else { get::<V, WHOLE>(t.bias, mask) };
    unroll!(y in 0 1 2 3 => {
        if WHOLE || y < t.size[0] {
            let v = output([c[0][y], c[1][y], c[2][y], c[3][y], c[4][y], c[5][y]]);
            unroll!(i in 0 1 2 3 => {
                if WHOLE || i < t.size[1] {
                    finish::<V, WHOLE>(v[i], bias, t, y * t.row + i * t.col, mask);
                }
            });
        }
    });
}

/// What follows a convolution, for one pixel.
#[inline(always)]
unsafe fn finish<V: Vector, const WHOLE: bool>(v: V, bias: V, t: &Place, at: usize, mask: V::Mask) {
    let mut v = v.add(bias);
    if !t.residual.is_null() {
        v = v.add(get::<V, WHOLE>(t.residual.add(at), mask));
    }
    if t.add {
        v = v.add(get::<V, WHOLE>(t.out.add(at), mask));
    }
    if t.activation != Activation::None {
        v = v.relu();
    }
    if t.activation == Activation::Relu6 {
        v = v.min(V::splat(6.0));
    }
    put::<V, WHOLE>(v, t.out.add(at), mask);
}

/// The 36 products of a weight gradient: `product[point] += v[point]^T d[point]`.
struct Correlate<'a> {
    w: &'a Winograd,
    pairs: &'a [Points<'a>],
    /// The channels that `product` holds.
    channels: Range<usize>,
    product: &'a mut [f32],
}

impl Kernel for Correlate<'_> {
    type Output = ();
    const NAME: &'static str = "winograd weight products";

    fn cost(&self) -> Cost {
        let (tiles, n) = (self.pairs.iter().map(|p| p.tiles).sum::<usize>(), self.channels.len());
        let floats = tiles * (n + self.w.outputs) + 2 * n * self.w.outputs;
        Cost { flops: 2 * POINTS * tiles * n * self.w.outputs, floats: POINTS * floats }
    }

    #[inline(always)]
    fn run<V: Vector>(self) {
        let (channels, outputs) = (self.w.channels, self.w.outputs);
        let product = self.product.as_mut_ptr();
        for point in 0..POINTS {
            for block in tile::blocks(self.w.level, outputs) {
                for (c, p) in tile::parts(self.channels.len(), V::TILE_ROWS[block.vectors - 1]) {
                    for pair in self.pairs {
                        let (v_step, d_step) = (matrix(pair.tiles, channels), matrix(pair.tiles, outputs));
                        let args = Tn {
                            x: pair.v[point * v_step + self.channels.start + c..].as_ptr(),
                            x_step: channels,
                            x_row: 0,
                            d: pair.d[point * d_step + block.start..].as_ptr(),
                            d_step: outputs,
                            d_row: 0,
                            rows: 1,
                            cols: pair.tiles,
                            // SAFETY: inside the point's product.
                            out: unsafe { product.add((point * self.channels.len() + c) * outputs + block.start) },
                            out_step: outputs,
                            tail: block.tail,
                        };
                        // SAFETY: rows of `channels` and `outputs` floats lie behind each point for every tile; the caller checked it.
                        unsafe { tile::tn::<V>(p, block.vectors, &args) };
                    }
                }
            }
        }
    }
}

/// `G g G^T` of every kernel, into panels.
struct Pack<'a> {
    w: &'a Winograd,
    weight: &'a [f32],
    flip: bool,
    panels: &'a mut [f32],
}

impl Kernel for Pack<'_> {
    type Output = ();
    const NAME: &'static str = "winograd weights";

    fn cost(&self) -> Cost {
        Cost { flops: 0, floats: self.weight.len() + self.panels.len() }
    }

    #[inline(always)]
    fn run<V: Vector>(self) {
        let (channels, outputs) = (self.w.channels, self.w.outputs);
        let (o_step, c_step) = if self.flip { (9, outputs * 9) } else { (channels * 9, 9) };
        let point_len = tile::packed_len(self.w.level, outputs, channels);
        let panels = self.panels.as_mut_ptr();
        let mut at = 0;
        for block in tile::blocks(self.w.level, outputs) {
            for c in 0..channels {
                for q in 0..block.vectors {
                    let first = block.start + q * V::LANES;
                    let lanes = (outputs - first).min(V::LANES);
                    let mut g = [[0.0f32; 16]; 9];
                    for o in 0..lanes {
                        let own = &self.weight[(first + o) * o_step + c * c_step..][..9];
                        for t in 0..9 {
                            g[t][o] = own[if self.flip { 8 - t } else { t }];
                        }
                    }
                    // SAFETY: rows of 16 floats hold a vector; the panels of all points hold a vector at `at`.
                    unsafe {
                        let (g, row) = (g.as_ptr().cast::<f32>(), 3 * 16);
                        let mask = V::first(V::LANES);
                        let c = [
                            kernel(column::<V, 3, true>(g, row, mask)),
                            kernel(column::<V, 3, true>(g.add(16), row, mask)),
                            kernel(column::<V, 3, true>(g.add(32), row, mask)),
                        ];
                        unroll!(y in 0 1 2 3 4 5 => {
                            put_row::<V, true>(kernel([c[0][y], c[1][y], c[2][y]]), panels.add(y * 6 * point_len + at), point_len, mask);
                        });
                    }
                    at += V::LANES;
                }
            }
        }
    }
}

/// `taps += G^T product G` of every kernel.
struct Untransform<'a, 'b> {
    product: &'a [f32],
    taps: &'a mut [&'b mut [f32]],
}

impl Kernel for Untransform<'_, '_> {
    type Output = ();
    const NAME: &'static str = "winograd weight gradients";

    fn cost(&self) -> Cost {
        Cost { flops: 0, floats: self.product.len() + 2 * self.taps.len() * self.taps[0].len() }
    }

    #[inline(always)]
    fn run<V: Vector>(self) {
        let len = self.taps[0].len();
        for (at, lanes) in vectors::<V>(len) {
            let mask = V::first(lanes);
            // SAFETY: the callers checked that every point and tap has `len` floats.
            unsafe {
                let (p, step) = (self.product.as_ptr().add(at), 6 * len);
                let c = [
                    taps(column::<V, 6, false>(p, step, mask)),
                    taps(column::<V, 6, false>(p.add(len), step, mask)),
                    taps(column::<V, 6, false>(p.add(2 * len), step, mask)),
                    taps(column::<V, 6, false>(p.add(3 * len), step, mask)),
                    taps(column::<V, 6, false>(p.add(4 * len), step, mask)),
                    taps(column::<V, 6, false>(p.add(5 * len), step, mask)),
                ];
                unroll!(y in 0 1 2 => {
                    let found = taps([c[0][y], c[1][y], c[2][y], c[3][y], c[4][y], c[5][y]]);
                    unroll!(i in 0 1 2 => {
                        let to = self.taps[y * 3 + i].as_mut_ptr().add(at);
                        V::load_masked(to, mask).add(found[i]).store_masked(to, mask);
                    });
                });
            }
        }
    }
}
