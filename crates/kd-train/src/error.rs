//! What can go wrong in a run: what, where, and what would be right.

use std::io;
use std::path::{Path, PathBuf};

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of a run or its configuration.
#[derive(thiserror::Error, Debug)]
#[non_exhaustive]
pub enum Error {
    /// A configuration that says something it cannot mean.
    #[error("{at}: {message}{}", hint.as_ref().map(|h| format!("\nhint: {h}")).unwrap_or_default())]
    Config {
        /// `file:line`, or the override.
        at: String,
        /// What is wrong.
        message: String,
        /// What would be right.
        hint: Option<String>,
    },
    /// Something that cannot work, found before the first step.
    #[error("{0}")]
    Refused(String),
    /// What a method or model refused before the first step.
    #[error(transparent)]
    Setup(kd_core::Error),
    /// A file call that failed.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Another process is at work in the run directory.
    #[error("{}: in use by {holder}\nhint: wait for it to end, or choose another directory", dir.display())]
    Locked {
        /// The run directory.
        dir: PathBuf,
        /// The process, in words.
        holder: String,
    },
    /// A run directory that belongs to another run.
    #[error("{}: cannot be resumed, its {what} is not the present one (recorded {recorded}, now {present})\nhint: resume with what it began with, or choose another directory", dir.display())]
    Mismatch {
        /// The run directory.
        dir: PathBuf,
        /// The input that differs.
        what: String,
        /// What the run began with.
        recorded: String,
        /// What it was given now.
        present: String,
    },
    /// A cache of a teacher's logits that were made from something else.
    #[error("{}: a stale cache, its {what} is not the present one (recorded {recorded}, now {present})\nhint: remove it, or choose another directory", dir.display())]
    Stale {
        /// The cache's directory.
        dir: PathBuf,
        /// The input that differs.
        what: String,
        /// What the logits were made from.
        recorded: String,
        /// What they would be made from now.
        present: String,
    },
    /// A file of a run that does not hold what was written.
    #[error("{}: {why}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Too little space for the files of the run.
    #[error("{}: {free} bytes free, the run needs about {needed}", dir.display())]
    Space {
        /// The run directory.
        dir: PathBuf,
        /// An upper estimate.
        needed: u64,
        /// What is left.
        free: u64,
    },
    /// NaN or infinity in a step.
    #[error("epoch {epoch}, step {step}: {what} is {value}; training samples of the batch: {samples}{}", hint(*value))]
    NonFinite {
        /// The loss term or the gradient.
        what: String,
        /// Its value.
        value: f64,
        /// The epoch, from 0.
        epoch: usize,
        /// The global step, from 0.
        step: usize,
        /// The batch.
        samples: String,
    },
    /// Parameters that no loss trains.
    #[error(
        "{unreached} of {total} parameter tensors of {network} are reached by no loss: {first}\nhint: add a loss that uses them (ce, say)"
    )]
    Unreached {
        /// `student`, or a method's network or variable.
        network: String,
        /// How many.
        unreached: usize,
        /// Of how many.
        total: usize,
        /// The names of the first ones.
        first: String,
    },
    /// A teacher that knows hardly more than chance.
    #[error(
        "teacher {name}: top-1 {top1:.2}% on the {split}, with {classes} classes hardly more than chance\nhint: check weights, normalisation and the order of the classes; allow_bad_teacher = true trains all the same"
    )]
    BadTeacher {
        /// The teacher.
        name: String,
        /// Its accuracy in percent.
        top1: f64,
        /// Where it was measured.
        split: String,
        /// Classes of the data.
        classes: usize,
    },
    /// A failing model, method or data set in the middle of a run.
    #[error(transparent)]
    Core(#[from] kd_core::Error),
    /// A candle error outside of models and methods.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>, source: io::Error) -> Self {
        Self::Io { action, path: path.as_ref().to_path_buf(), source }
    }

    pub(crate) fn damaged(path: impl AsRef<Path>, why: impl ToString) -> Self {
        Self::Damaged { path: path.as_ref().to_path_buf(), why: why.to_string() }
    }

    /// The same, met before the first step.
    pub(crate) fn early(self) -> Self {
        match self {
            Self::Core(e) => Self::Setup(e),
            e => e,
        }
    }

    /// Whether the input of the run is at fault, not its course: the usage errors of a command line.
    pub fn is_usage(&self) -> bool {
        !matches!(self, Self::Core(_) | Self::Candle(_) | Self::NonFinite { .. } | Self::Io { .. })
            || matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

fn hint(value: f64) -> &'static str {
    if value.is_nan() {
        "\nhint: the last checkpoint is intact; try a smaller learning rate, a warm-up or clip_grad_norm"
    } else {
        "\nhint: the last checkpoint is intact; the loss grows without bound, try a smaller learning rate or clip_grad_norm"
    }
}
