//! What the loader hands to a step.

use candle_core::{DType, Tensor};

use crate::Result;

/// What stands in [`Batch::labels`] for an image of no known class.
pub const UNLABELLED: i64 = -1;

/// One mini-batch. `B` samples, `V` views (differently augmented copies of the same samples, in the same order).
#[derive(Clone, Debug)]
pub struct Batch {
    /// `V` tensors `[B,C,H,W]`, normalised.
    pub images: Vec<Tensor>,
    /// `[B]` i64, [`UNLABELLED`] where there is none.
    pub labels: Tensor,
    /// `[B,K]` soft targets (mixup, cutmix); `labels` then holds the heavier class of each row.
    pub targets: Option<Tensor>,
    /// `[B]` u32, the samples' indices in the training set.
    pub indices: Tensor,
}

impl Batch {
    /// The number of samples.
    pub fn len(&self) -> usize {
        self.labels.elem_count()
    }

    /// Whether there is no sample.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The positions `[L]` u32 of the samples that have a label; `None` when all have.
    pub fn labelled(&self) -> Result<Option<Tensor>> {
        let labels = self.labels.to_dtype(DType::I64)?.to_vec1::<i64>()?;
        let rows: Vec<u32> = (0u32..).zip(&labels).filter(|(_, label)| **label != UNLABELLED).map(|(row, _)| row).collect();
        Ok(if rows.len() == labels.len() { None } else { Some(Tensor::from_vec(rows.clone(), rows.len(), self.labels.device())?) })
    }

    /// The samples at the positions `rows` `[L]`, in that order.
    pub fn rows(&self, rows: &Tensor) -> Result<Self> {
        Ok(Self {
            images: self.images.iter().map(|t| Ok(t.index_select(rows, 0)?)).collect::<Result<_>>()?,
            labels: self.labels.index_select(rows, 0)?,
            targets: self.targets.as_ref().map(|t| t.index_select(rows, 0)).transpose()?,
            indices: self.indices.index_select(rows, 0)?,
        })
    }
}

/// Where a loop gets its batches from: a loader over a training set, over a test set, or tensors in memory.
pub trait BatchSource: Send {
    /// Samples of one epoch.
    fn samples(&self) -> usize;

    /// The class of each sample by its index, where it is known without reading the images.
    fn labels(&self) -> Option<&[u32]> {
        None
    }

    /// Batches of one epoch; the last one may be shorter than the others.
    fn batches(&self) -> usize;

    /// Samples that [`Batch::indices`] tell apart; those with a label come first.
    fn records(&self) -> usize {
        self.samples()
    }

    /// How many of the records have no label.
    fn unlabelled(&self) -> usize {
        0
    }

    /// Begins epoch `epoch` (from 0) at its batch `first` (0, or where a resumed run stands).
    fn start(&mut self, epoch: usize, first: usize) -> Result<()>;

    /// The next batch, `None` at the end of the epoch.
    fn next_batch(&mut self) -> Result<Option<Batch>>;
}
