//! The training loop of the kd knowledge-distillation toolkit: optimisers, durable checkpoints, exact resume, run directories, events.
//!
//! [`train`] runs a [`Job`], whether it trains a teacher, a baseline or a student with any method: the loop knows only the traits of
//! [`kd_core`]. It tells what happens through [`Event`]s, prints nothing, and keeps everything in a [run directory](run_dir) that may be
//! killed at any moment and goes on, on the CPU bit for bit.
//!
//! Invariant: every byte that a run writes goes through [`Files`](files::Files); nothing here builds a model, a method or a data set.

mod checkpoint;
pub mod config;
pub mod evaluate;
pub mod events;
pub mod files;
pub mod optim;
pub mod run_dir;
pub mod trainer;

mod checks;
mod error;
mod parts;
mod state;

pub use config::{Config, LossConfig, RunOptions};
pub use error::{Error, Result};
pub use evaluate::{Evaluation, class_means, evaluate};
pub use events::{Event, Sink, Split, StepReport, Subject};
pub use optim::{OptimConfig, OptimKind};
pub use parts::{StringMap, fingerprint, tensors};
pub use run_dir::RunPlace;
pub use state::{EpochRecord, Exported, RunResult};
pub use trainer::{Data, Job, Objective, Outcome, Teacher, train};
