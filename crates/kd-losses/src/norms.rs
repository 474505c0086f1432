//! Lengths of rows, with the rules of the papers' losses for features of no length.

use candle_core::Tensor;
use kd_core::Result;

/// Length of each row of `[B,D]` as `[B,1]`; one at or below `eps` is the constant `eps`.
///
/// Both sides of a comparison must come from here: the same order of summation, so that equal rows have equal lengths.
pub(crate) fn row_norm(x: &Tensor, eps: f64) -> Result<Tensor> {
    let squares = x.contiguous()?.sqr()?.sum_keepdim(1)?;
    let longer = squares.detach().sqrt()?.gt(eps)?;
    // The square root of 0 has no finite gradient, and one that is masked afterwards would still be 0 * infinity.
    let safe = longer.where_cond(&squares, &squares.ones_like()?)?;
    Ok(longer.where_cond(&safe.sqrt()?, &(squares.zeros_like()? + eps)?)?)
}

/// Each row divided by its length; 0 without a gradient where that is at or below `eps`.
pub(crate) fn unit(x: &Tensor, eps: f64) -> Result<Tensor> {
    let norm = row_norm(x, eps)?;
    let longer = norm.detach().gt(eps)?.to_dtype(x.dtype())?;
    Ok(x.broadcast_mul(&longer)?.broadcast_div(&norm)?)
}

/// Length of each row of `[B,D]` as `[B,1]`; one of no length is 0 without a gradient.
pub(crate) fn length(x: &Tensor) -> Result<Tensor> {
    let squares = x.contiguous()?.sqr()?.sum_keepdim(1)?;
    let longer = squares.detach().gt(0.0)?;
    let safe = longer.where_cond(&squares, &squares.ones_like()?)?;
    Ok((safe.sqrt()? * longer.to_dtype(x.dtype())?)?)
}
