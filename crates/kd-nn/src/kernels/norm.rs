//! Passes over images of `[pixel][channel]` with one number per channel: batch norm and what is fused with it.
//!
//! ```text
//! moments      mean and variance of every channel over the batch
//! lens         f(scale y + shift), the normalised and activated tensor, seen through the raw one: never stored if it need not be
//! gradient     dy = k0 dm + k1 (y - mean) + k2, dm the gradient behind the activation's mask
//!              k0 = g inv   k1 = -g inv^3 S2 / n   k2 = -g inv S1 / n   S1 = sum dm   S2 = sum dm (y - mean)
//! ```
//!
//! `inv = 1 / sqrt(var + eps)`, `g` the scale, `n` the values per channel; `d scale = inv S2`, `d shift = S1`.

#![allow(unsafe_code, reason = "vectors are loaded from and stored to slices whose lengths are checked before")]

use super::clock::Cost;
use super::sweep::Padded;
use super::tile::Activation;
use super::vector::{Kernel, Lane, Level, Vector};

/// How a stored tensor is read: normalised and activated.
#[derive(Clone, Copy)]
pub(crate) struct Lens<'a> {
    pub scale: &'a [f32],
    pub shift: &'a [f32],
    pub activation: Activation,
}

impl Lens<'_> {
    fn check(&self, channels: usize) {
        assert!(self.scale.len() == channels && self.shift.len() == channels, "a lens has one number per channel");
    }
}

#[inline(always)]
pub(crate) fn activate<V: Vector>(v: V, activation: Activation) -> V {
    match activation {
        Activation::None => v,
        Activation::Relu => v.relu(),
        Activation::Relu6 => v.relu().min(V::splat(6.0)),
    }
}

/// `d` where the activation of `v` (before or after it) has slope 1, else 0.
#[inline(always)]
pub(crate) fn masked<V: Vector>(d: V, v: V, activation: Activation) -> V {
    match activation {
        Activation::None => d,
        Activation::Relu => d.where_positive(v),
        Activation::Relu6 => d.where_positive(v).where_positive(V::splat(6.0).sub(v)),
    }
}

/// Moments of every channel, summed around a shift near the mean so that nothing cancels.
///
/// The shift is the mean of the lane's first image: were it far from the mean of all, that image alone would make the variance large.
pub(crate) struct Moments {
    shift: Vec<f32>,
    sum: Vec<f64>,
    square: Vec<f64>,
    count: usize,
}

impl Moments {
    pub(crate) fn new(channels: usize) -> Self {
        Self { shift: vec![0.0; channels], sum: vec![0.0; channels], square: vec![0.0; channels], count: 0 }
    }

    /// Adds an image.
    pub(crate) fn add(&mut self, level: Level, image: &[f32]) {
        let channels = self.shift.len();
        let pixels = image.len() / channels;
        if self.count == 0 {
            let (mut sum, mut square) = (vec![0.0; channels], vec![0.0; channels]);
            level.run(Sums { image, shift: &self.shift, sum: &mut sum, square: &mut square });
            self.shift.iter_mut().zip(&sum).for_each(|(s, v)| *s = (v / pixels as f64) as f32);
        }
        level.run(Sums { image, shift: &self.shift, sum: &mut self.sum, square: &mut self.square });
        self.count += pixels;
    }

    /// Values per channel over all lanes.
    pub(crate) fn count(lanes: &[Self]) -> usize {
        lanes.iter().map(|l| l.count).sum()
    }

    /// Mean and biased variance of each channel over all lanes, merged in their order (Chan, Golub and LeVeque 1979).
    pub(crate) fn merge(lanes: &[Self]) -> Vec<(f64, f64)> {
        (0..lanes.first().map_or(0, |l| l.shift.len()))
            .map(|c| {
                let (mut n, mut mean, mut m2) = (0.0, 0.0, 0.0);
                for lane in lanes {
                    let k = lane.count as f64;
                    let offset = lane.sum[c] / k;
                    let delta = f64::from(lane.shift[c]) + offset - mean;
                    m2 += (lane.square[c] - lane.sum[c] * offset).max(0.0) + delta * delta * n * k / (n + k);
                    mean += delta * k / (n + k);
                    n += k;
                }
                (mean, m2 / n)
            })
            .collect()
    }
}

/// Pixels summed in f32 before they are added to the f64 sums.
const RUN: usize = 256;

struct Sums<'a> {
    image: &'a [f32],
    shift: &'a [f32],
    sum: &'a mut [f64],
    square: &'a mut [f64],
}

impl Kernel for Sums<'_> {
    type Output = ();
    const NAME: &'static str = "moments";

    fn cost(&self) -> Cost {
        Cost { flops: 4 * self.image.len(), floats: self.image.len() }
    }

    #[inline(always)]
    fn run<V: Vector>(self) {
        let n = self.shift.len();
        for run in self.image.chunks(RUN * n) {
            let pixels = run.len() / n;
            lanes!(V, n, c, lane => {
                // SAFETY: `c` and its lanes are channels of `n`, and there are `pixels` pixels.
                unsafe {
                    let shift = lane.load(self.shift.as_ptr().add(c));
                    let (mut s, mut q) = ([V::splat(0.0); 4], [V::splat(0.0); 4]);
                    let mut x = run.as_ptr().add(c);
                    for _ in 0..pixels / 4 {
                        unroll!(i in 0 1 2 3 => {
                            let v = lane.load(x.add(i * n)).sub(shift);
                            s[i] = s[i].add(v);
                            q[i] = q[i].fma(v, v);
                        });
                        x = x.wrapping_add(4 * n);
                    }
                    for _ in 0..pixels % 4 {
                        let v = lane.load(x).sub(shift);
                        s[0] = s[0].add(v);
                        q[0] = q[0].fma(v, v);
                        x = x.wrapping_add(n);
                    }
                    flush(s[0].add(s[1]).add(s[2].add(s[3])), &mut self.sum[c..]);
                    flush(q[0].add(q[1]).add(q[2].add(q[3])), &mut self.square[c..]);
                }
            });
        }
    }
}

/// Adds the sums of every channel of an image.
pub(crate) fn total(level: Level, image: &[f32], sum: &mut [f64]) {
    let (shift, mut square) = (vec![0.0; sum.len()], vec![0.0; sum.len()]);
    level.run(Sums { image, shift: &shift, sum, square: &mut square });
}

/// Adds the lanes of `v` to as many sums as there are.
#[inline(always)]
fn flush<V: Vector>(v: V, sums: &mut [f64]) {
    let mut lanes = [0.0f32; 16];
    // SAFETY: no vector is longer than 16.
    unsafe { v.store(lanes.as_mut_ptr()) };
    sums.iter_mut().zip(&lanes[..V::LANES]).for_each(|(s, v)| *s += f64::from(*v));
}

/// Copies an image into a padded one, through the lens. The border stays as it is.
pub(crate) fn fill(level: Level, image: &[f32], lens: Option<Lens>, padded: &Padded, whole: &mut [f32]) {
    match lens {
        None => image.chunks_exact(padded.w * padded.c).enumerate().for_each(|(y, row)| padded.row_of(whole, y).copy_from_slice(row)),
        Some(lens) => {
            lens.check(padded.c);
            level.run(Fill { image, lens, padded, whole });
        }
    }
}

struct Fill<'a> {
    image: &'a [f32],
    lens: Lens<'a>,
    padded: &'a Padded,
    whole: &'a mut [f32],
}

impl Kernel for Fill<'_> {
    type Output = ();
    const NAME: &'static str = "normalise and pad";

    fn cost(&self) -> Cost {
        Cost { flops: 3 * self.image.len(), floats: 2 * self.image.len() }
    }

    #[inline(always)]
    fn run<V: Vector>(self) {
        let n = self.padded.c;
        for (y, row) in self.image.chunks_exact(self.padded.w * n).enumerate() {
            let out = self.padded.row_of(self.whole, y).as_mut_ptr();
            lanes!(V, n, c, lane => {
                // SAFETY: `c` and its lanes are channels of `n`; both rows have `w` pixels.
                unsafe {
                    let see = Factors::<V>::of(self.lens, c, lane);
                    let (mut x, mut out) = (row.as_ptr().add(c), out.add(c));
                    for _ in 0..self.padded.w {
                        lane.store(see.see(lane.load(x)), out);
                        (x, out) = (x.wrapping_add(n), out.wrapping_add(n));
                    }
                }
            });
        }
    }
}

/// `out = f(a + b)`, each seen through its lens; slices of the same pixels.
pub(crate) fn add(
    level: Level,
    channels: usize,
    a: (&[f32], Option<Lens>),
    b: (&[f32], Option<Lens>),
    activation: Activation,
    out: &mut [f32],
) {
    [a.1, b.1].into_iter().flatten().for_each(|l| l.check(channels));
    level.run(Add { channels, a, b, activation, out });
}

struct Add<'a> {
    channels: usize,
    a: (&'a [f32], Option<Lens<'a>>),
    b: (&'a [f32], Option<Lens<'a>>),
    activation: Activation,
    out: &'a mut [f32],
}

impl Kernel for Add<'_> {
    type Output = ();
    const NAME: &'static str = "add";

    fn cost(&self) -> Cost {
        Cost { flops: 6 * self.out.len(), floats: 3 * self.out.len() }
    }

    #[inline(always)]
    fn run<V: Vector>(self) {
        let n = self.channels;
        for ((a, b), out) in self.a.0.chunks(ROW * n).zip(self.b.0.chunks(ROW * n)).zip(self.out.chunks_mut(ROW * n)) {
            let pixels = a.len().min(b.len()).min(out.len()) / n;
            lanes!(V, n, c, lane => {
                // SAFETY: `c` and its lanes are channels of `n`, and every chunk has `pixels` pixels.
                unsafe {
                    let la = self.a.1.map(|l| Factors::<V>::of(l, c, lane));
                    let lb = self.b.1.map(|l| Factors::<V>::of(l, c, lane));
                    let (mut a, mut b, mut out) = (a.as_ptr().add(c), b.as_ptr().add(c), out.as_mut_ptr().add(c));
                    for _ in 0..pixels {
                        let (mut va, mut vb) = (lane.load(a), lane.load(b));
                        if let Some(l) = la {
                            va = l.see(va);
                        }
                        if let Some(l) = lb {
                            vb = l.see(vb);
                        }
                        lane.store(activate(va.add(vb), self.activation), out);
                        (a, b, out) = (a.wrapping_add(n), b.wrapping_add(n), out.wrapping_add(n));
                    }
                }
            });
        }
    }
}

/// Pixels that a pass handles one vector of channels at a time: few enough to stay in the first-level cache.
const ROW: usize = 32;

/// A lens at one vector of channels.
#[derive(Clone, Copy)]
struct Factors<V> {
    scale: V,
    shift: V,
    activation: Activation,
}

impl<V: Vector> Factors<V> {
    /// # Safety
    /// `c` and its lanes must be channels of the lens.
    #[inline(always)]
    unsafe fn of(lens: Lens, c: usize, lane: Lane<V>) -> Self {
        // SAFETY: as the caller says.
        let (scale, shift) = unsafe { (lane.load(lens.scale.as_ptr().add(c)), lane.load(lens.shift.as_ptr().add(c))) };
        Self { scale, shift, activation: lens.activation }
    }

    #[inline(always)]
    fn see(self, v: V) -> V {
        activate(self.shift.fma(v, self.scale), self.activation)
    }

    /// `d` behind the mask of the activation.
    #[inline(always)]
    fn mask(self, d: V, v: V) -> V {
        masked(d, self.shift.fma(v, self.scale), self.activation)
    }
}

/// Adds the sums of `dm` and of `dm (y - mean)` of an image, `dm` being `d` behind the mask of `lens` over `y`.
pub(crate) fn grad_sums(level: Level, d: &[f32], y: &[f32], lens: Lens, mean: &[f32], s1: &mut [f64], s2: &mut [f64]) {
    lens.check(mean.len());
    assert!(s1.len() == mean.len() && s2.len() == mean.len());
    level.run(GradSums { d, y, lens, mean, s1, s2 });
}

struct GradSums<'a> {
    d: &'a [f32],
    y: &'a [f32],
    lens: Lens<'a>,
    mean: &'a [f32],
    s1: &'a mut [f64],
    s2: &'a mut [f64],
}

impl Kernel for GradSums<'_> {
    type Output = ();
    const NAME: &'static str = "norm gradient sums";

    fn cost(&self) -> Cost {
        Cost { flops: 4 * self.d.len(), floats: 2 * self.d.len() }
    }

    #[inline(always)]
    fn run<V: Vector>(self) {
        let n = self.mean.len();
        for (d, y) in self.d.chunks(RUN * n).zip(self.y.chunks(RUN * n)) {
            let pixels = d.len().min(y.len()) / n;
            lanes!(V, n, c, lane => {
                // SAFETY: `c` and its lanes are channels of `n`, and both chunks have `pixels` pixels.
                unsafe {
                    let (see, mean) = (Factors::<V>::of(self.lens, c, lane), lane.load(self.mean.as_ptr().add(c)));
                    let (mut s, mut q) = ([V::splat(0.0); 2], [V::splat(0.0); 2]);
                    let (mut d, mut y) = (d.as_ptr().add(c), y.as_ptr().add(c));
                    for _ in 0..pixels / 2 {
                        unroll!(i in 0 1 => {
                            let v = lane.load(y.add(i * n));
                            let dm = see.mask(lane.load(d.add(i * n)), v);
                            s[i] = s[i].add(dm);
                            q[i] = q[i].fma(dm, v.sub(mean));
                        });
                        (d, y) = (d.wrapping_add(2 * n), y.wrapping_add(2 * n));
                    }
                    if pixels % 2 == 1 {
                        let v = lane.load(y);
                        let dm = see.mask(lane.load(d), v);
                        s[0] = s[0].add(dm);
                        q[0] = q[0].fma(dm, v.sub(mean));
                    }
                    flush(s[0].add(s[1]), &mut self.s1[c..]);
                    flush(q[0].add(q[1]), &mut self.s2[c..]);
                }
            });
        }
    }
}

/// The gradient of a batch norm's input, as the numbers per channel that give it from `d` and `y`.
#[derive(Clone, Copy)]
pub(crate) struct NormGrad<'a> {
    /// How the output was seen; its activation is the mask.
    pub lens: Lens<'a>,
    pub mean: &'a [f32],
    pub k0: &'a [f32],
    pub k1: &'a [f32],
    pub k2: &'a [f32],
}

/// Copies an image of the gradient `d` into a padded one as the gradient of the batch norm's input `y`. The border stays as it is.
pub(crate) fn fill_grad(level: Level, d: &[f32], y: &[f32], grad: NormGrad, padded: &Padded, whole: &mut [f32]) {
    grad.lens.check(padded.c);
    assert!([grad.mean, grad.k0, grad.k1, grad.k2].iter().all(|k| k.len() == padded.c));
    level.run(FillGrad { d, y, grad, padded, whole });
}

struct FillGrad<'a> {
    d: &'a [f32],
    y: &'a [f32],
    grad: NormGrad<'a>,
    padded: &'a Padded,
    whole: &'a mut [f32],
}

impl Kernel for FillGrad<'_> {
    type Output = ();
    const NAME: &'static str = "norm gradient and pad";

    fn cost(&self) -> Cost {
        Cost { flops: 6 * self.d.len(), floats: 3 * self.d.len() }
    }

    #[inline(always)]
    fn run<V: Vector>(self) {
        let (n, g) = (self.padded.c, self.grad);
        let row = self.padded.w * n;
        for (at, (d, y)) in self.d.chunks_exact(row).zip(self.y.chunks_exact(row)).enumerate() {
            let out = self.padded.row_of(self.whole, at).as_mut_ptr();
            lanes!(V, n, c, lane => {
                // SAFETY: `c` and its lanes are channels of `n`; all rows have `w` pixels.
                unsafe {
                    let see = Factors::<V>::of(g.lens, c, lane);
                    let (mean, k0) = (lane.load(g.mean.as_ptr().add(c)), lane.load(g.k0.as_ptr().add(c)));
                    let (k1, k2) = (lane.load(g.k1.as_ptr().add(c)), lane.load(g.k2.as_ptr().add(c)));
                    let (mut d, mut y, mut out) = (d.as_ptr().add(c), y.as_ptr().add(c), out.add(c));
                    for _ in 0..self.padded.w {
                        let v = lane.load(y);
                        let dm = see.mask(lane.load(d), v);
                        lane.store(k2.fma(k1, v.sub(mean)).fma(k0, dm), out);
                        (d, y, out) = (d.wrapping_add(n), y.wrapping_add(n), out.wrapping_add(n));
                    }
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: u64, mean: f64, std: f64) -> Vec<f32> {
        (0..n as u64).map(|i| (kd_core::Rng::new(seed).normal(i) * std + mean) as f32).collect()
    }

    #[test]
    fn moments_survive_a_large_mean_and_a_constant() {
        for level in Level::available() {
            for channels in [1, 5, 16, 33] {
                for (mean, std) in [(0.0, 1.0), (100.0, 0.14), (-3.0, 0.0)] {
                    let images: Vec<_> = (0..6).map(|i| values(300 * channels, i, mean, std)).collect();
                    let mut lanes = [Moments::new(channels), Moments::new(channels)];
                    images.iter().enumerate().for_each(|(i, image)| lanes[i / 4].add(level, image));
                    for (c, (m, v)) in Moments::merge(&lanes).into_iter().enumerate() {
                        let all: Vec<f64> = images.iter().flat_map(|i| i.iter().skip(c).step_by(channels)).map(|v| f64::from(*v)).collect();
                        let exact = all.iter().sum::<f64>() / all.len() as f64;
                        let var = all.iter().map(|x| (x - exact).powi(2)).sum::<f64>() / all.len() as f64;
                        assert!((m - exact).abs() < 1e-6 * exact.abs().max(1.0), "{level:?} mean {m} {exact}");
                        assert!((v - var).abs() <= 1e-5 * var, "{level:?} variance {v} {var}");
                    }
                }
            }
        }
    }

    #[test]
    fn passes_match_their_formulas() {
        for level in Level::available() {
            for (channels, w, h) in [(3, 5, 2), (16, 4, 4), (21, 7, 3)] {
                let n = channels * w * h;
                let (y, d, z) = (values(n, 1, 1.0, 2.0), values(n, 2, 0.0, 1.0), values(n, 3, 0.0, 1.0));
                let per: Vec<_> = (4..10).map(|s| values(channels, s, 0.5, 1.0)).collect();
                for activation in [Activation::None, Activation::Relu, Activation::Relu6] {
                    let lens = Lens { scale: &per[0], shift: &per[1], activation };
                    let seen = |i: usize| per[0][i % channels] * y[i] + per[1][i % channels];
                    let act = |v: f32| match activation {
                        Activation::None => v,
                        Activation::Relu => v.max(0.0),
                        Activation::Relu6 => v.clamp(0.0, 6.0),
                    };
                    let mask = |v: f32| activation == Activation::None || (v > 0.0 && (activation == Activation::Relu || v < 6.0));
                    let close = |a: f32, b: f32| assert!((a - b).abs() < 1e-4 * b.abs().max(1.0), "{level:?} {a} {b}");

                    let padded = Padded { h, w, c: channels, top: 0, left: 0, rows: h, cols: w };
                    let mut out = vec![f32::NAN; n];
                    fill(level, &y, Some(lens), &padded, &mut out);
                    (0..n).for_each(|i| close(out[i], act(seen(i))));

                    add(level, channels, (&y, Some(lens)), (&z, None), activation, &mut out);
                    (0..n).for_each(|i| close(out[i], act(act(seen(i)) + z[i])));

                    let (mut s1, mut s2) = (vec![0.0; channels], vec![0.0; channels]);
                    grad_sums(level, &d, &y, lens, &per[2], &mut s1, &mut s2);
                    let dm = |i: usize| if mask(seen(i)) { d[i] } else { 0.0 };
                    for c in 0..channels {
                        close(s1[c] as f32, (c..n).step_by(channels).map(dm).sum());
                        close(s2[c] as f32, (c..n).step_by(channels).map(|i| dm(i) * (y[i] - per[2][c])).sum());
                    }

                    let grad = NormGrad { lens, mean: &per[2], k0: &per[3], k1: &per[4], k2: &per[5] };
                    fill_grad(level, &d, &y, grad, &padded, &mut out);
                    (0..n).for_each(|i| {
                        let c = i % channels;
                        close(out[i], per[3][c] * dm(i) + per[4][c] * (y[i] - per[2][c]) + per[5][c]);
                    });
                }
            }
        }
    }
}
