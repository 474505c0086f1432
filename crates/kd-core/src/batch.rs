//! What the loader hands to a step.

use candle_core::Tensor;

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
