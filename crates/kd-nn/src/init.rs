//! Initial values of parameters, as PyTorch and the papers' code draw them.

use kd_core::Rng;

/// How a parameter begins. Fans count as in PyTorch: `fan_in = shape[1..].product()`, `fan_out = shape[0] * kernel elements`
/// (groups not divided out).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// One value everywhere.
    Const(f64),
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform in plus-minus this bound.
    Uniform(f64),
    /// PyTorch's default for conv and linear weights: uniform in `+-1/sqrt(fan_in)`.
    Default,
    /// Normal with variance `2/fan_out` (He et al. 2015, as mdistiller's networks).
    HeFanOut,
    /// Normal with variance `2/fan_in`.
    HeFanIn,
}

impl Init {
    /// PyTorch's default for the bias of a layer with `fan_in` inputs per output.
    pub fn default_bias(fan_in: usize) -> Self {
        Self::Uniform(1.0 / (fan_in.max(1) as f64).sqrt())
    }

    /// The values of a parameter of `shape`. Element i depends on the stream and i alone.
    pub fn values(self, shape: &[usize], rng: Rng) -> Vec<f64> {
        let n: usize = shape.iter().product();
        let fan_in: usize = shape.iter().skip(1).product::<usize>().max(1);
        let fan_out: usize = shape.first().copied().unwrap_or(1) * shape.iter().skip(2).product::<usize>();
        let uniform = |bound: f64| (0..n as u64).map(|i| (2.0 * rng.uniform(i) - 1.0) * bound).collect();
        let normal = |std: f64| (0..n as u64).map(|i| rng.normal(i) * std).collect();
        match self {
            Self::Const(c) => vec![c; n],
            Self::Normal(std) => normal(std),
            Self::Uniform(bound) => uniform(bound),
            Self::Default => uniform(1.0 / (fan_in as f64).sqrt()),
            Self::HeFanOut => normal((2.0 / fan_out.max(1) as f64).sqrt()),
            Self::HeFanIn => normal((2.0 / fan_in as f64).sqrt()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_are_the_stated_ones() {
        let std = |v: &[f64]| (v.iter().map(|x| x * x).sum::<f64>() / v.len() as f64).sqrt();
        let shape = [64, 32, 3, 3];
        assert!((std(&Init::HeFanOut.values(&shape, Rng::new(1))) / (2.0f64 / 576.0).sqrt() - 1.0).abs() < 0.03);
        assert!((std(&Init::HeFanIn.values(&shape, Rng::new(1))) / (2.0f64 / 288.0).sqrt() - 1.0).abs() < 0.03);
        let d = Init::Default.values(&shape, Rng::new(1));
        assert!(d.iter().all(|v| v.abs() <= 1.0 / 288f64.sqrt()));
        assert!((std(&d) * 3f64.sqrt() * 288f64.sqrt() - 1.0).abs() < 0.03);
    }
}
