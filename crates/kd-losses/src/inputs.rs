//! Checks of the tensors a loss is given: shape, finiteness, agreement of the two sides. Each names the tensor and what would be right.

use candle_core::{DType, Tensor};
use kd_core::{Error, Result, Setup};

/// Refuses NaN and infinity, naming the tensor, the value and its place.
pub(crate) fn finite(what: &str, x: &Tensor) -> Result<()> {
    // x - x is 0 for every finite x and NaN otherwise: one number comes back from the device instead of the tensor.
    let x = x.detach();
    let sum = x.sub(&x)?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
    if sum == 0.0 { Ok(()) } else { kd_core::registry::check_finite(what, &x) }
}

/// `[rows, columns]` of a finite matrix with at least one row.
fn matrix(what: &str, x: &Tensor, expected: &str, least_columns: usize) -> Result<(usize, usize)> {
    match *x.dims() {
        [rows, columns] if rows >= 1 && columns >= least_columns => {
            finite(what, x)?;
            Ok((rows, columns))
        }
        _ => Err(Error::shape(what, expected, x.dims())),
    }
}

/// Batch and classes of logits.
pub(crate) fn logits(what: &str, x: &Tensor) -> Result<(usize, usize)> {
    matrix(what, x, "[B,K] with B >= 1 and K >= 2", 2)
}

/// Batch and width of an embedding.
pub(crate) fn embedding(what: &str, x: &Tensor) -> Result<(usize, usize)> {
    matrix(what, x, "[B,D] with B >= 1 and D >= 1", 1)
}

/// Batch and classes of the student's logits, and the teacher's logits outside any graph, in the student's type.
pub(crate) fn both_logits(student: &Tensor, teacher: &Tensor) -> Result<(usize, usize, Tensor)> {
    let (b, k) = logits("student.logits", student)?;
    logits("teacher.logits", teacher)?;
    if student.dims() != teacher.dims() {
        return Err(Error::shape("teacher.logits", format!("{:?}, as the student's", student.dims()), teacher.dims()));
    }
    Ok((b, k, constant(teacher, student)?))
}

/// Batch and width of both embeddings, and the teacher's outside any graph, in the student's type.
pub(crate) fn both_embeddings(student: &Tensor, teacher: &Tensor) -> Result<(usize, usize, Tensor)> {
    let (b, d) = embedding("student.embedding", student)?;
    embedding("teacher.embedding", teacher)?;
    if student.dims() != teacher.dims() {
        let expected = format!("{:?}, as the student's (an adapter makes the widths agree)", student.dims());
        return Err(Error::shape("teacher.embedding", expected, teacher.dims()));
    }
    Ok((b, d, constant(teacher, student)?))
}

/// The batch of two embeddings of any widths, and the teacher's outside any graph, in the student's type.
pub(crate) fn one_batch(student: &Tensor, teacher: &Tensor) -> Result<(usize, Tensor)> {
    let (b, _) = embedding("student.embedding", student)?;
    let (rows, width) = embedding("teacher.embedding", teacher)?;
    if rows != b {
        return Err(Error::shape("teacher.embedding", format!("[{b}, {width}], as many rows as the student's"), teacher.dims()));
    }
    Ok((b, constant(teacher, student)?))
}

/// Refuses batches in which a sample has no other to be compared with.
pub(crate) fn pairs(method: &str, setup: &Setup<'_>) -> Result<()> {
    if setup.batch_size >= 2 {
        return Ok(());
    }
    Err(Error::refused(format!(
        "{method} compares the samples of a batch with each other: batch_size must be at least 2, is {}",
        setup.batch_size
    )))
}

/// `x` outside any graph, in the type of `like`.
pub(crate) fn constant(x: &Tensor, like: &Tensor) -> Result<Tensor> {
    Ok(x.detach().to_dtype(like.dtype())?)
}

/// Refuses a parameter that is not a finite number above 0.
pub(crate) fn positive(key: &str, value: f64) -> Result<()> {
    if value > 0.0 && value.is_finite() { Ok(()) } else { Err(Error::param(key, value, "a finite number above 0")) }
}

/// Refuses a parameter that is not a finite number of at least 0.
pub(crate) fn not_negative(key: &str, value: f64) -> Result<()> {
    if value >= 0.0 && value.is_finite() { Ok(()) } else { Err(Error::param(key, value, "a finite number of at least 0")) }
}

/// Refuses a parameter outside `[0, 1]`.
pub(crate) fn share(key: &str, value: f64) -> Result<()> {
    if (0.0..=1.0).contains(&value) { Ok(()) } else { Err(Error::param(key, value, "in 0..=1")) }
}

/// Refuses 0.
pub(crate) fn at_least_one(key: &str, value: usize) -> Result<()> {
    if value >= 1 { Ok(()) } else { Err(Error::param(key, value, "at least 1")) }
}
