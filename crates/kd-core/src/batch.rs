//! What the loader hands to a step.

use candle_core::Tensor;

use crate::Result;

/// One mini-batch. `B` samples, `V` views (differently augmented copies of the same samples, in the same order).
#[derive(Clone, Debug)]
pub struct Batch {
    /// `V` tensors `[B,C,H,W]`, normalised.
    pub images: Vec<Tensor>,
    /// `[B]` i64.
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

    /// Begins epoch `epoch` (from 0) at its batch `first` (0, or where a resumed run stands).
    fn start(&mut self, epoch: usize, first: usize) -> Result<()>;

    /// The next batch, `None` at the end of the epoch.
    fn next_batch(&mut self) -> Result<Option<Batch>>;
}
