//! What the tests on networks share.

use candle_core::{Device, Tensor};
use kd_core::Rng;

/// Normal numbers that follow from `seed`.
pub(crate) fn normal(seed: u64, shape: &[usize]) -> Tensor {
    let n = shape.iter().product::<usize>() as u64;
    Tensor::from_vec((0..n).map(|i| Rng::new(seed).normal(i)).collect::<Vec<f64>>(), shape, &Device::Cpu).unwrap()
}

/// The number in a scalar.
pub(crate) fn scalar(t: &Tensor) -> f64 {
    t.to_scalar::<f64>().unwrap()
}
