//! Elementwise functions and normalisations along one axis.

use candle_core::{Result, Tensor};

/// `max(x, 0)`, gradient 0 at 0 (candle's own has 1 there). NaN passes through.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    let zeros = x.zeros_like()?;
    x.le(&zeros)?.where_cond(&zeros, x)
}

/// `min(max(x, 0), 6)`, gradient 0 at 0 and at 6. NaN passes through.
pub fn relu6(x: &Tensor) -> Result<Tensor> {
    let six = (x.zeros_like()? + 6.0)?;
    x.ge(&six)?.where_cond(&six, &relu(x)?)
}

/// `x` where it is above 0, `slope x` elsewhere, gradient `slope` at 0. NaN passes through.
pub fn leaky_relu(x: &Tensor, slope: f64) -> Result<Tensor> {
    x.le(&x.zeros_like()?)?.where_cond(&(x * slope)?, x)
}

/// `x Phi(x)` with the exact error function (the gradient of candle's own carries seven digits only).
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    x * (((x * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)? * 0.5)?
}

/// `x sigmoid(x)`.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    x * sigmoid(x)?
}

/// `1/(1+exp(-x))`, through tanh: neither side overflows.
pub fn sigmoid(x: &Tensor) -> Result<Tensor> {
    ((x * 0.5)?.tanh()? + 1.0)? * 0.5
}

/// `min(max(x + 3, 0), 6) / 6`, gradient 0 at -3 and 3.
pub fn hardsigmoid(x: &Tensor) -> Result<Tensor> {
    relu6(&(x + 3.0)?)? / 6.0
}

/// `x min(max(x + 3, 0), 6) / 6`, gradient 0 at -3 and 1 at 3.
pub fn hardswish(x: &Tensor) -> Result<Tensor> {
    x * hardsigmoid(x)?
}

/// Softmax along `dim`; entries of minus infinity give 0 and gradient 0.
pub fn softmax(x: &Tensor, dim: usize) -> Result<Tensor> {
    let e = x.broadcast_sub(&x.max_keepdim(dim)?.detach())?.exp()?;
    e.broadcast_div(&e.sum_keepdim(dim)?)
}

/// Logarithm of the softmax along `dim`.
pub fn log_softmax(x: &Tensor, dim: usize) -> Result<Tensor> {
    let shifted = x.broadcast_sub(&x.max_keepdim(dim)?.detach())?;
    shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(dim)?.log()?)
}

/// `x / max(|x|, eps)` with the L2 norm along `dim`; below eps the norm is a constant.
pub fn l2_normalize(x: &Tensor, dim: usize, eps: f64) -> Result<Tensor> {
    let square = x.sqr()?.sum_keepdim(dim)?;
    let floor = (square.zeros_like()? + eps * eps)?;
    // The branch below eps never sees the square root's infinite slope at 0.
    let norm = square.ge(&floor)?.where_cond(&square, &floor)?.sqrt()?;
    x.broadcast_div(&norm)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn what_is_not_a_number_does_not_become_one() {
        let x = Tensor::new(&[f32::NAN, -1.0, 7.0], &Device::Cpu).unwrap();
        for y in [relu(&x), relu6(&x), hardswish(&x), gelu(&x), silu(&x), leaky_relu(&x, 0.1)] {
            let y = y.unwrap().to_vec1::<f32>().unwrap();
            assert!(y[0].is_nan() && !y[1].is_nan() && !y[2].is_nan());
        }
    }
}
