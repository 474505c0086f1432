//! Moving channels and pixels about.

use candle_core::{Result, Tensor};

/// `[B, g, C/g, ..]` transposed to `[B, C/g, g, ..]`.
pub fn channel_shuffle(x: &Tensor, groups: usize) -> Result<Tensor> {
    let dims = x.dims().to_vec();
    let rest: usize = dims[2..].iter().product();
    x.reshape((dims[0], groups, dims[1] / groups, rest))?.transpose(1, 2)?.contiguous()?.reshape(dims)
}

/// Channels of zeros before and after.
pub fn pad_channels(x: &Tensor, before: usize, after: usize) -> Result<Tensor> {
    x.pad_with_zeros(1, before, after)
}

/// Every `stride`-th row and column of `[B,C,H,W]`.
pub fn subsample(x: &Tensor, stride: usize) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    let pick = |n: usize| Tensor::from_iter((0..n as u32).step_by(stride), x.device());
    x.index_select(&pick(h)?, 2)?.index_select(&pick(w)?, 3)
}
