//! Cross-entropy and Kullback-Leibler divergence, as PyTorch's functions.

use candle_core::{DType, Result, Tensor};

use super::{log_softmax, softmax};

/// How a cross-entropy is reduced over the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// One value per row.
    None,
    /// Their sum.
    Sum,
    /// Their mean over the rows that are not ignored.
    Mean,
}

/// Options of [`cross_entropy`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CrossEntropy {
    /// Over the batch.
    pub reduction: Reduction,
    /// Share `e` of the uniform distribution: the target is `(1-e) q + e/K`.
    pub label_smoothing: f64,
    /// Rows with this label take no part.
    pub ignore_index: Option<i64>,
}

impl Default for CrossEntropy {
    fn default() -> Self {
        Self { reduction: Reduction::Mean, label_smoothing: 0.0, ignore_index: None }
    }
}

/// What a cross-entropy is taken against.
pub enum Targets<'a> {
    /// `[B]` i64.
    Labels(&'a Tensor),
    /// `[B,K]`.
    Soft(&'a Tensor),
}

/// `-sum_k q_k log p_k` of each row of `logits` `[B,K]`.
pub fn cross_entropy(logits: &Tensor, targets: &Targets<'_>, options: &CrossEntropy) -> Result<Tensor> {
    let (b, classes) = logits.dims2()?;
    let lp = log_softmax(logits, 1)?;
    let e = options.label_smoothing;
    let (per_row, kept) = match targets {
        Targets::Soft(q) => ((lp.mul(q)?.sum(1)? * (e - 1.0))?, None),
        Targets::Labels(labels) => {
            let kept: Vec<bool> = labels.to_vec1::<i64>()?.iter().map(|l| Some(*l) != options.ignore_index).collect();
            let safe: Vec<i64> = labels.to_vec1::<i64>()?.iter().zip(&kept).map(|(&l, &k)| if k { l } else { 0 }).collect();
            let index = Tensor::from_vec(safe, (b, 1), logits.device())?;
            ((lp.gather(&index, 1)?.squeeze(1)? * (e - 1.0))?, Some(kept))
        }
    };
    let per_row = if e > 0.0 { (per_row - (lp.sum(1)? * (e / classes as f64))?)? } else { per_row };
    let (per_row, rows) = match kept {
        None => (per_row, b),
        Some(kept) => {
            let rows = kept.iter().filter(|&&k| k).count();
            let mask = Tensor::from_iter(kept.into_iter().map(|k| f64::from(u8::from(k))), logits.device())?.to_dtype(logits.dtype())?;
            (per_row.mul(&mask)?, rows)
        }
    };
    match options.reduction {
        Reduction::None => Ok(per_row),
        Reduction::Sum => per_row.sum_all(),
        Reduction::Mean => per_row.sum_all()? / rows as f64,
    }
}

/// `T^2/B sum_k p_t (log p_t - log p_s)` at temperature `T`; the teacher is a constant.
pub fn kl_div(student: &Tensor, teacher: &Tensor, temperature: f64) -> Result<Tensor> {
    let (b, _) = student.dims2()?;
    let scaled = (teacher.detach() / temperature)?;
    let (p, lp) = (softmax(&scaled, 1)?, log_softmax(&scaled, 1)?);
    let gap = (lp - log_softmax(&(student / temperature)?, 1)?)?;
    // 0 * log 0 = 0
    let positive = p.gt(&p.zeros_like()?)?.to_dtype(DType::U8)?;
    let terms = positive.where_cond(&(&p * gap)?, &p.zeros_like()?)?;
    terms.sum_all()? * (temperature * temperature / b as f64)
}
