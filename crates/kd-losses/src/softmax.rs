//! Softmax pieces that stay exact and finite for logits of any size, with gradients that candle computes right.
//!
//! Every logarithm here is of a number of at least 1, every exponential of a number of at most 0, and row maxima enter as constants, so
//! nothing overflows, nothing divides by zero, and no gradient runs through a comparison.

use candle_core::Tensor;
use kd_core::Result;

/// `log softmax` of each row of `[B,K]`.
pub(crate) fn log_softmax(z: &Tensor) -> Result<Tensor> {
    let shifted = z.broadcast_sub(&z.detach().max_keepdim(1)?)?;
    Ok(shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(1)?.log()?)?)
}

/// `log softmax` of each row over the classes kept (`keep` 1 or 0, `[B,K]`), 0 at the others, and the logarithm of the sum over them `[B,1]`.
///
/// At least one class of every row must be kept.
pub(crate) fn log_softmax_over(z: &Tensor, keep: &Tensor) -> Result<(Tensor, Tensor)> {
    // z keep + 0 where kept, far below every logit where not: exact, and no infinity that 0 could meet.
    let max = ((z.detach() * keep)? + ((keep - 1.0)? * 1e30)?)?.max_keepdim(1)?;
    let shifted = (z.broadcast_sub(&max)? * keep)?;
    let log_sum = (shifted.exp()? * keep)?.sum_keepdim(1)?.log()?;
    let log_p = (shifted.broadcast_sub(&log_sum)? * keep)?;
    Ok((log_p, (log_sum + max)?))
}

/// `log(1 / (1 + exp(-x)))`.
pub(crate) fn log_sigmoid(x: &Tensor) -> Result<Tensor> {
    // min(x, 0) as x - relu(x): candle differentiates relu and abs at 0 as if from above, so that the halves of the slope agree there.
    let log1p = (x.abs()?.neg()?.exp()? + 1.0)?.log()?;
    Ok(((x - x.relu()?)? - log1p)?)
}

/// `-sum_k q_k log p_k` of each row, `[B]`.
pub(crate) fn cross_entropy(q: &Tensor, log_p: &Tensor) -> Result<Tensor> {
    Ok((q * log_p)?.sum(1)?.neg()?)
}

/// `sum_k q_k (log q_k - log p_k)` of each row, `[B]`.
pub(crate) fn kl(log_q: &Tensor, log_p: &Tensor) -> Result<Tensor> {
    // Element by element: the difference of two cross-entropies loses three digits in f32 at high temperature.
    Ok((log_q.exp()? * (log_q - log_p)?)?.sum(1)?)
}
