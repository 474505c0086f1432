//! The training loop of the kd knowledge-distillation toolkit: optimisers, durable checkpoints, exact resume, run directories, events.
//!
//! [`train`] runs a [`Job`], whether it trains a teacher, a baseline or a student with any method: the loop knows only the traits of
//! [`kd_core`]. [`train_all`] runs several students side by side, on one pass over the data and one through the teachers. It tells what happens through [`Event`]s, prints nothing, and keeps everything in a [run directory](run_dir) that may be
//! killed at any moment and goes on, on the CPU bit for bit.
//!
//! ```
//! use std::sync::Arc;
//! use candle_core::{DType, Device, Tensor};
//! use kd_core::{Batch, BatchSource, Cut, Model, Rng, Schedule};
//! use kd_nn::{GraphBuilder, Network};
//! use kd_train::{Data, Job, Objective, OptimConfig, Outcome, RunOptions, train};
//!
//! // Any source of batches will do; kd-data has loaders. Here class k is a vector with its k-th entry large.
//! struct Toy(usize);
//! impl BatchSource for Toy {
//!     fn samples(&self) -> usize { 30 }
//!     fn batches(&self) -> usize { 3 }
//!     fn start(&mut self, _epoch: usize, first: usize) -> kd_core::Result<()> { self.0 = first; Ok(()) }
//!     fn next_batch(&mut self) -> kd_core::Result<Option<Batch>> {
//!         if self.0 == 3 { return Ok(None) }
//!         let noise = Rng::new(self.0 as u64);
//!         self.0 += 1;
//!         let labels: Vec<i64> = (0..10).map(|i| i % 4).collect();
//!         let pixel = |i: u64, p: u64| noise.normal(4 * i + p) as f32 + if i % 4 == p { 4.0 } else { 0.0 };
//!         let images: Vec<f32> = (0..10).flat_map(|i| (0..4).map(move |p| pixel(i, p))).collect();
//!         Ok(Some(Batch {
//!             images: vec![Tensor::from_vec(images, (10, 4), &Device::Cpu)?],
//!             labels: Tensor::new(labels, &Device::Cpu)?,
//!             targets: None,
//!             indices: Tensor::arange(0u32, 10, &Device::Cpu)?,
//!         }))
//!     }
//! }
//!
//! let mut graph = GraphBuilder::new("toy", &[4]);
//! graph.cut(Cut::Embedding);
//! graph.linear("fc", 4);
//! graph.cut(Cut::Logits);
//! let student = Network::new(graph.finish()?, DType::F32, &Device::Cpu)?;
//! student.init(Rng::new(1))?;
//! let ce = (kd_losses::find("ce")?.build)(&serde_json::json!({}))?;
//! let job = Job {
//!     student: Arc::new(student),
//!     teachers: vec![],
//!     objectives: vec![Objective::new(ce, 1.0)],
//!     data: Data {
//!         classes: 4,
//!         batch_size: 10,
//!         train: Box::new(Toy(0)),
//!         plain: None,
//!         validation: None,
//!         test: Some(Box::new(Toy(0))),
//!         fingerprint: "toy".to_string(),
//!         class_means: None,
//!         class_groups: None,
//!     },
//!     optim: OptimConfig::default(),
//!     schedule: Schedule { epochs: 20, ..Schedule::default() },
//!     options: RunOptions::default(),
//!     seed: 1,
//!     place: None, // Some(RunPlace::new("runs/toy", config)) checkpoints, resumes and exports
//! };
//! let Outcome::Finished(result) = train(job, &mut [], &false.into())? else { unreachable!("nobody stops it") };
//! assert!(result.test.unwrap().top1 > 90.0);
//! # Ok::<(), kd_train::Error>(())
//! ```
//!
//! Invariant: every byte that a run writes goes through [`Files`](files::Files); nothing here builds a model, a method or a data set.

pub mod analysis;
mod cache;
mod checkpoint;
pub mod config;
pub mod dot;
pub mod evaluate;
pub mod events;
pub mod files;
pub mod optim;
pub mod run_dir;
pub mod trainer;

mod checks;
mod error;
mod job;
mod learner;
mod parts;
mod stage;
mod state;

pub use cache::LogitCache;
pub use config::{Config, LossConfig, RunOptions, Runs};
pub use error::{Error, Result};
pub use evaluate::{Evaluation, class_means, class_means_rounded, evaluate};
pub use events::{Event, Sink, Split, StepParts, StepReport, Subject};
pub use job::{Data, Job, Objective, Outcome, Shared, Student, Teacher};
pub use optim::{OptimConfig, OptimKind};
pub use parts::{StringMap, fingerprint, tensors};
pub use run_dir::RunPlace;
pub use state::{EpochRecord, Exported, RunResult};
pub use trainer::{train, train_all};
