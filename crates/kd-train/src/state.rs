//! Where a run stands, and how it ended.

use serde::{Deserialize, Serialize};

use crate::Evaluation;
use crate::events::Split;

/// Everything about a run that is not a tensor; part of every checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct RunState {
    /// The present epoch, those of initial phases included.
    pub(crate) epoch: usize,
    /// The next batch in it; all batches done but the evaluation not when it equals their number.
    pub(crate) batch: usize,
    /// Steps made.
    pub(crate) step: usize,
    /// Evaluations of the student so far.
    pub(crate) history: Vec<EpochRecord>,
    /// The best of them.
    pub(crate) best: Option<Best>,
    /// Evaluations of the teachers before the first step.
    pub(crate) teachers: Vec<Evaluation>,
    /// Wall time spent in steps.
    pub(crate) seconds: f64,
    /// Of that, waiting for batches.
    pub(crate) waiting: f64,
    /// Samples seen, repetitions counted.
    pub(crate) images: usize,
    /// Length of `metrics.jsonl` at this point.
    pub(crate) metrics_len: u64,
}

/// The student after some epochs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// Epochs trained.
    pub epochs: usize,
    /// The samples it was evaluated on.
    pub split: Split,
    /// The figures.
    pub evaluation: Evaluation,
}

/// The best student so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Best {
    /// Its generation in `checkpoints/best`.
    pub(crate) generation: u64,
    /// Its figures.
    pub(crate) record: EpochRecord,
}

/// Which student was exported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Exported {
    /// The one after the last epoch.
    Last,
    /// The one that was best on the validation split.
    Best,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunResult {
    /// Epochs trained, initial phases not counted.
    pub epochs: usize,
    /// Steps made, those of initial phases included.
    pub steps: usize,
    /// Every evaluation of the student, in order; the last one is the last student's.
    pub history: Vec<EpochRecord>,
    /// The best of them. Chosen on the test set when there is no validation split: then it flatters, and the last one is what counts.
    pub best: Option<EpochRecord>,
    /// Which student was exported.
    pub exported: Exported,
    /// The exported student on the test set, when there is one.
    pub test: Option<Evaluation>,
    /// The teachers before the first step.
    pub teachers: Vec<Evaluation>,
    /// SHA-256 of the exported weights.
    pub fingerprint: String,
    /// Wall time spent in steps.
    pub seconds: f64,
    /// Training samples a second.
    pub images_per_second: f64,
    /// Share of the wall time spent waiting for batches.
    pub waiting_share: f64,
}
