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

use super::conv::Padded;
use super::tile::Activation;
use super::vector::{Kernel, Level, Vector, read, write};

/// How a stored tensor is read: normalised and activated.
#[derive(Clone, Copy)]
pub(crate) struct Lens<'a> {
    pub scale: &'a [f32],
    pub shift: &'a [f32],
    pub activation: Activation,
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

    #[inline(always)]
    fn run<V: Vector>(self) {
        let channels = self.shift.len();
        for run in self.image.chunks(RUN * channels) {
            for c in (0..channels).step_by(V::LANES) {
                let shift = read::<V>(self.shift, c);
                let (mut s, mut q) = ([V::splat(0.0); 2], [V::splat(0.0); 2]);
                for (p, pixel) in run.chunks_exact(channels).enumerate() {
                    let v = read::<V>(pixel, c).sub(shift);
                    s[p % 2] = s[p % 2].add(v);
                    q[p % 2] = q[p % 2].fma(v, v);
                }
                flush(s[0].add(s[1]), &mut self.sum[c..]);
                flush(q[0].add(q[1]), &mut self.square[c..]);
            }
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
    write(v, &mut lanes[..V::LANES], 0);
    sums.iter_mut().zip(&lanes[..V::LANES]).for_each(|(s, v)| *s += f64::from(*v));
}

/// Copies an image into a padded one, through the lens. The border stays as it is.
pub(crate) fn fill(level: Level, image: &[f32], lens: Option<Lens>, padded: &Padded, whole: &mut [f32]) {
    match lens {
        None => image.chunks_exact(padded.w * padded.c).enumerate().for_each(|(y, row)| padded.row_of(whole, y).copy_from_slice(row)),
        Some(lens) => level.run(Fill { image, lens, padded, whole }),
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

    #[inline(always)]
    fn run<V: Vector>(self) {
        let channels = self.padded.c;
        for (y, row) in self.image.chunks_exact(self.padded.w * channels).enumerate() {
            let out = self.padded.row_of(self.whole, y);
            for c in (0..channels).step_by(V::LANES) {
                let (scale, shift) = (read::<V>(self.lens.scale, c), read::<V>(self.lens.shift, c));
                for (pixel, out) in row.chunks_exact(channels).zip(out.chunks_exact_mut(channels)) {
                    write(activate(shift.fma(read(pixel, c), scale), self.lens.activation), out, c);
                }
            }
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

    #[inline(always)]
    fn run<V: Vector>(self) {
        let n = self.channels;
        for ((a, b), out) in self.a.0.chunks(ROW * n).zip(self.b.0.chunks(ROW * n)).zip(self.out.chunks_mut(ROW * n)) {
            for c in (0..n).step_by(V::LANES) {
                let (la, lb) = (Factors::<V>::of(self.a.1, c), Factors::<V>::of(self.b.1, c));
                for ((a, b), out) in a.chunks_exact(n).zip(b.chunks_exact(n)).zip(out.chunks_exact_mut(n)) {
                    write(activate(la.see(read(a, c)).add(lb.see(read(b, c))), self.activation), out, c);
                }
            }
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
    #[inline(always)]
    fn of(lens: Option<Lens>, c: usize) -> Self {
        match lens {
            None => Self { scale: V::splat(1.0), shift: V::splat(0.0), activation: Activation::None },
            Some(l) => Self { scale: read(l.scale, c), shift: read(l.shift, c), activation: l.activation },
        }
    }

    #[inline(always)]
    fn see(self, v: V) -> V {
        activate(self.shift.fma(v, self.scale), self.activation)
    }
}

/// Adds the sums of `dm` and of `dm (y - mean)` of an image, `dm` being `d` behind the mask of `lens` over `y`.
pub(crate) fn grad_sums(level: Level, d: &[f32], y: &[f32], lens: Lens, mean: &[f32], s1: &mut [f64], s2: &mut [f64]) {
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

    #[inline(always)]
    fn run<V: Vector>(self) {
        let n = self.mean.len();
        for (d, y) in self.d.chunks(RUN * n).zip(self.y.chunks(RUN * n)) {
            for c in (0..n).step_by(V::LANES) {
                let (scale, shift, mean) = (read::<V>(self.lens.scale, c), read::<V>(self.lens.shift, c), read::<V>(self.mean, c));
                let (mut s, mut q) = (V::splat(0.0), V::splat(0.0));
                for (d, y) in d.chunks_exact(n).zip(y.chunks_exact(n)) {
                    let y = read::<V>(y, c);
                    let d = masked(read(d, c), shift.fma(y, scale), self.lens.activation);
                    s = s.add(d);
                    q = q.fma(d, y.sub(mean));
                }
                flush(s, &mut self.s1[c..]);
                flush(q, &mut self.s2[c..]);
            }
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

    #[inline(always)]
    fn run<V: Vector>(self) {
        let (n, g) = (self.padded.c, self.grad);
        let row = self.padded.w * n;
        for (at, (d, y)) in self.d.chunks_exact(row).zip(self.y.chunks_exact(row)).enumerate() {
            let out = self.padded.row_of(self.whole, at);
            for c in (0..n).step_by(V::LANES) {
                let (scale, shift, mean) = (read::<V>(g.lens.scale, c), read::<V>(g.lens.shift, c), read::<V>(g.mean, c));
                let (k0, k1, k2) = (read::<V>(g.k0, c), read::<V>(g.k1, c), read::<V>(g.k2, c));
                for ((d, y), out) in d.chunks_exact(n).zip(y.chunks_exact(n)).zip(out.chunks_exact_mut(n)) {
                    let y = read::<V>(y, c);
                    let d = masked(read(d, c), shift.fma(y, scale), g.lens.activation);
                    write(k2.fma(k1, y.sub(mean)).fma(k0, d), out, c);
                }
            }
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
