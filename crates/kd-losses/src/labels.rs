//! Class labels in PyTorch's convention: class indices `[B]` (integers), or class probabilities `[B,K]` (mixup, cutmix).

use candle_core::{DType, Tensor};
use kd_core::{Batch, Error, Result};

/// Checked labels of a batch.
pub(crate) struct Labels {
    /// The label of each row; for probabilities the largest, of equal ones the lowest.
    pub(crate) ids: Vec<i64>,
    /// Probabilities `[B,K]`: one-hot for class indices.
    pub(crate) q: Tensor,
    soft: Option<[Vec<(i64, f64)>; 2]>,
    classes: usize,
}

/// One of the classes a sample belongs to, over the batch.
pub(crate) struct Pick {
    /// `[B,K]`, 1 at the class.
    pub(crate) one_hot: Tensor,
    /// `[B]`, the sample's share of it.
    pub(crate) share: Tensor,
}

/// What a batch is labelled with: its soft targets if it has them, its labels otherwise.
pub(crate) fn of(batch: &Batch) -> &Tensor {
    batch.targets.as_ref().unwrap_or(&batch.labels)
}

impl Labels {
    /// Checks the labels of `like.dim(0)` rows and `classes` classes; the tensors made from them have the type and device of `like`.
    pub(crate) fn new(labels: &Tensor, classes: usize, like: &Tensor) -> Result<Self> {
        let rows = like.dim(0)?;
        if labels.rank() == 2 && labels.dtype().is_float() {
            return Self::soft(labels, rows, classes, like);
        }
        if labels.dims() != [rows] || labels.dtype().is_float() {
            let expected = format!("[{rows}] class indices (integers) or [{rows}, {classes}] class probabilities");
            return Err(Error::shape("labels", expected, labels.dims()));
        }
        let ids = labels.to_dtype(DType::I64)?.to_vec1::<i64>()?;
        if let Some(position) = ids.iter().position(|&y| y < 0 || y >= classes as i64) {
            return Err(Error::Label { label: ids[position], position, classes });
        }
        let q = one_hot(&ids, classes, like)?;
        Ok(Self { ids, q, soft: None, classes })
    }

    fn soft(targets: &Tensor, rows: usize, classes: usize, like: &Tensor) -> Result<Self> {
        if targets.dims() != [rows, classes] {
            return Err(Error::shape("targets", format!("[{rows}, {classes}]"), targets.dims()));
        }
        let host = targets.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        let (mut first, mut second) = (Vec::with_capacity(rows), Vec::with_capacity(rows));
        for (position, row) in host.iter().enumerate() {
            let sum: f64 = row.iter().sum();
            if !(row.iter().all(|&q| q >= 0.0) && (sum - 1.0).abs() <= 1e-4) {
                return Err(Error::refused(format!("targets, row {position}: must be at least 0 and sum to 1 within 1e-4, sum {sum}")));
            }
            let mut order: Vec<usize> = (0..classes).collect();
            order.sort_by(|&i, &j| row[j].total_cmp(&row[i])); // stable: ties to the lower class
            first.push((order[0] as i64, row[order[0]]));
            second.push((order[1] as i64, row[order[1]]));
        }
        let ids = first.iter().map(|p| p.0).collect();
        let q = targets.detach().to_dtype(like.dtype())?;
        Ok(Self { ids, q, soft: Some([first, second]), classes })
    }

    /// Whether class probabilities were given.
    pub(crate) fn is_soft(&self) -> bool {
        self.soft.is_some()
    }

    /// `[B,K]`, 1 at each row's label.
    pub(crate) fn one_hot(&self) -> Result<Tensor> {
        if self.is_soft() { one_hot(&self.ids, self.classes, &self.q) } else { Ok(self.q.clone()) }
    }

    /// The classes each sample belongs to: its label; of probabilities the two largest, of equal ones the lower class first.
    pub(crate) fn picks(&self) -> Result<Vec<Pick>> {
        let Some(soft) = &self.soft else {
            let share = Tensor::ones(self.ids.len(), self.q.dtype(), self.q.device())?;
            return Ok(vec![Pick { one_hot: self.q.clone(), share }]);
        };
        soft.iter()
            .map(|picks| {
                let (ids, shares): (Vec<i64>, Vec<f64>) = picks.iter().copied().unzip();
                let share = Tensor::new(shares, self.q.device())?.to_dtype(self.q.dtype())?;
                Ok(Pick { one_hot: one_hot(&ids, self.classes, &self.q)?, share })
            })
            .collect()
    }
}

/// `[B,K]` in the type and on the device of `like`.
fn one_hot(ids: &[i64], classes: usize, like: &Tensor) -> Result<Tensor> {
    let device = like.device();
    let ids = Tensor::new(ids, device)?.unsqueeze(1)?;
    Ok(ids.broadcast_eq(&Tensor::arange(0i64, classes as i64, device)?.unsqueeze(0)?)?.to_dtype(like.dtype())?)
}

/// The entry of each row that the one-hot rows `[B,K]` mark, `[B]`. A masked sum rather than a gather: its backward needs no scatter.
pub(crate) fn at(x: &Tensor, one_hot: &Tensor) -> Result<Tensor> {
    Ok((x * one_hot)?.sum(1)?)
}
