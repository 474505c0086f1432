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

/// `-sum_k q_k log p_k` of each row, `[B]`, for constant `q`.
pub(crate) fn cross_entropy(q: &Tensor, log_p: &Tensor) -> Result<Tensor> {
    Ok((q * log_p)?.sum(1)?.neg()?)
}

/// A softmax over some classes of each row.
pub(crate) struct Softmax {
    /// Logits, in the graph.
    z: Tensor,
    /// `[B,K]`, 0 at classes left out; detached.
    log_p: Tensor,
    /// `[B,K]`, 0 at classes left out; detached.
    p: Tensor,
}

impl Softmax {
    /// Over all classes.
    pub(crate) fn new(z: &Tensor) -> Result<Self> {
        let log_p = log_softmax(&z.detach())?;
        Ok(Self { z: z.clone(), p: log_p.exp()?, log_p })
    }

    /// Over the classes whose `keep` `[B,K]` is 1, at least one in every row; those whose `keep` is 0 take no part.
    pub(crate) fn over(z: &Tensor, keep: &Tensor) -> Result<Self> {
        let (log_p, _) = log_softmax_over(&z.detach(), keep)?;
        Ok(Self { z: z.clone(), p: (log_p.exp()? * keep)?, log_p })
    }

    /// `KL(teacher || self)` of each row, `[B]`; a teacher in a graph (behind a learnt temperature) has its gradient too.
    pub(crate) fn kl(&self, teacher: &Self) -> Result<Tensor> {
        // Element by element as p - q + q d with d = log q - log p: the same sum as that of q d, but an error common to a row's logarithms
        // drops out, and where p and q are close no digit is lost. At T = 20 in f32, q d alone is off by 1e-4.
        let (p, q) = (&self.p, &teacher.p);
        let d = (&teacher.log_p - &self.log_p)?;
        let tanh = (&d * 0.5)?.tanh()?;
        let close = (q * (&d - ((&tanh * 2.0)? / (tanh + 1.0)?)?)?)?; // exp(-d) - 1 = -2 tanh(d/2) / (1 + tanh(d/2))
        let apart = ((p - q)? + (q * &d)?)?;
        teacher.weighing(self.sloped(&d.abs()?.lt(1.0)?.where_cond(&close, &apart)?, q)?, &d)
    }

    /// `H(q, self)` of each row, `[B]`, for a distribution `q` over the same classes.
    pub(crate) fn cross_entropy(&self, q: &Tensor) -> Result<Tensor> {
        self.sloped(&(q * &self.log_p)?.neg()?, q)
    }

    /// `H(teacher, self)` of each row, `[B]`; a teacher in a graph has its gradient too.
    pub(crate) fn cross_entropy_with(&self, teacher: &Self) -> Result<Tensor> {
        teacher.weighing(self.cross_entropy(&teacher.p)?, &self.log_p.neg()?)
    }

    /// `rows`, the expectation of `measure` under this distribution, with the gradient through the distribution if it is in a graph.
    fn weighing(&self, rows: Tensor, measure: &Tensor) -> Result<Tensor> {
        if !self.z.track_op() {
            return Ok(rows);
        }
        let mean = (&self.p * measure)?.sum_keepdim(1)?;
        let slope = (&self.p * measure.broadcast_sub(&mean)?)?;
        Ok((rows + with_slope(&slope.zeros_like()?, &self.z, &slope)?)?)
    }

    /// The probabilities `[B,K]`, detached.
    pub(crate) fn p(&self) -> &Tensor {
        &self.p
    }

    /// The sum of `elements` over each row, with the gradient that both measures have: `p - q`.
    fn sloped(&self, elements: &Tensor, q: &Tensor) -> Result<Tensor> {
        with_slope(elements, &self.z, &(&self.p - q)?)
    }
}

/// The sum of each row of `value`, whose gradient with respect to `x` is `slope`: in closed form it is exactly 0 where the two sides agree,
/// while a chain of operations leaves rounding errors there.
pub(crate) fn with_slope(value: &Tensor, x: &Tensor, slope: &Tensor) -> Result<Tensor> {
    let nothing = (x - x.detach())?;
    Ok((value.detach() + (nothing * slope.detach())?)?.sum(1)?)
}

/// `[log p_y / (1 - p_y), 0]` of each row, `[B,2]`, for the class that the one-hot rows `y` `[B,K]` mark: logits of that class against all
/// the others together.
pub(crate) fn one_against_others(z: &Tensor, y: &Tensor) -> Result<Tensor> {
    let (_, log_sum) = log_softmax_over(z, &(1.0 - y)?)?;
    let log_odds = ((z * y)?.sum_keepdim(1)? - log_sum)?;
    Ok(Tensor::cat(&[&log_odds, &log_odds.zeros_like()?], 1)?)
}

/// The softmax of each row over the classes kept, 0 at the others, in the graph of `z`.
pub(crate) fn softmax_over(z: &Tensor, keep: &Tensor) -> Result<Tensor> {
    Ok((log_softmax_over(z, keep)?.0.exp()? * keep)?)
}

/// `log softmax` of each row over the classes kept, 0 at the others, and the logarithm of the sum over them `[B,1]`.
fn log_softmax_over(z: &Tensor, keep: &Tensor) -> Result<(Tensor, Tensor)> {
    // z keep + 0 where kept, far below every logit where not: exact, and no infinity that 0 could meet.
    let max = ((z.detach() * keep)? + ((keep - 1.0)? * 1e30)?)?.max_keepdim(1)?;
    let shifted = (z.broadcast_sub(&max)? * keep)?;
    let log_sum = (shifted.exp()? * keep)?.sum_keepdim(1)?.log()?;
    let log_p = (shifted.broadcast_sub(&log_sum)? * keep)?;
    Ok((log_p, (log_sum + max)?))
}
