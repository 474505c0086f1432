//! Batch norm and layer norm.

use candle_core::{Result, Tensor};

/// Per-channel moments of a batch, in the graph of the input.
pub struct BatchMoments {
    /// Mean, `[1,C,1,..]`.
    pub mean: Tensor,
    /// Biased variance, `[1,C,1,..]`.
    pub var: Tensor,
    /// Values per channel.
    pub count: usize,
}

/// Mean and biased variance of each channel of `[B,C,..]`, in two passes: a large mean costs no digits.
pub fn batch_moments(x: &Tensor) -> Result<BatchMoments> {
    let axes: Vec<usize> = (0..x.rank()).filter(|&d| d != 1).collect();
    let count: usize = axes.iter().map(|&d| x.dims()[d]).product();
    let scale = 1.0 / count as f64;
    let mean = (x.sum_keepdim(axes.as_slice())? * scale)?;
    let var = (x.broadcast_sub(&mean)?.sqr()?.sum_keepdim(axes.as_slice())? * scale)?;
    Ok(BatchMoments { mean, var, count })
}

/// `(x - mean) / sqrt(var + eps) * weight + bias` with per-channel `mean` and `var`.
pub fn batch_norm(x: &Tensor, mean: &Tensor, var: &Tensor, affine: Option<(&Tensor, &Tensor)>, eps: f64) -> Result<Tensor> {
    let mut shape = vec![1; x.rank()];
    shape[1] = x.dims()[1];
    let inv = (var.reshape(shape.as_slice())? + eps)?.sqrt()?.recip()?;
    let y = x.broadcast_sub(&mean.reshape(shape.as_slice())?)?.broadcast_mul(&inv)?;
    match affine {
        Some((w, b)) => y.broadcast_mul(&w.reshape(shape.as_slice())?)?.broadcast_add(&b.reshape(shape.as_slice())?),
        None => Ok(y),
    }
}

/// Normalises over the trailing axes that `normalized` names, with the biased variance.
pub fn layer_norm(x: &Tensor, normalized: &[usize], affine: Option<(&Tensor, &Tensor)>, eps: f64) -> Result<Tensor> {
    let dims = x.dims().to_vec();
    let width: usize = normalized.iter().product();
    let flat = x.reshape((x.elem_count() / width, width))?;
    let centred = flat.broadcast_sub(&flat.mean_keepdim(1)?)?;
    let var = centred.sqr()?.mean_keepdim(1)?;
    let y = centred.broadcast_div(&(var + eps)?.sqrt()?)?;
    let y = match affine {
        Some((w, b)) => y.broadcast_mul(&w.flatten_all()?)?.broadcast_add(&b.flatten_all()?)?,
        None => y,
    };
    y.reshape(dims)
}
