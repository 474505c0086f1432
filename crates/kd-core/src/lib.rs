//! The contract between the crates of **kd**, a knowledge-distillation toolkit on candle.
//!
//! | module | holds |
//! |---|---|
//! | [`cut`] | [`Cut`]: a named place where one tensor crosses a network |
//! | [`model`] | [`Model`]: a network that runs from one cut to others; its [`ModelSpec`] and [`Outputs`] |
//! | [`params`] | [`Params`]: flat values, gradients and running statistics under PyTorch names |
//! | [`method`] | [`Method`]: a distillation method; its [`Needs`], the [`StepView`] it sees, the [`LossTerms`] it returns |
//! | [`registry`] | [`MethodEntry`]: what a method says about itself; the parity driver |
//! | [`batch`], [`schedule`], [`metrics`], [`rng`] | small types of the training loop |
//!
//! Invariant: no file system, no threads, no kernels. Everything here is a type, a trait, or pure arithmetic.

pub mod batch;
pub mod cut;
pub mod error;
pub mod method;
pub mod metrics;
pub mod model;
pub mod params;
pub mod registry;
pub mod rng;
pub mod schedule;

pub use batch::{Batch, BatchSource, UNLABELLED};
pub use cut::Cut;
pub use error::{Error, Result};
pub use method::{LossTerms, Method, Models, Needs, Phase, Progress, Setup, StateDict, StepView, Tag, Term};
pub use model::{Classifier, FeatureSpec, Mode, Model, ModelSpec, Outputs, Trainable};
pub use params::{Flat, ParamEntry, Params, ParamsBuilder};
pub use registry::{Check, Cost, MethodEntry, MethodNotes, ParamDoc, ParityInputs, ParityOutput};
pub use rng::Rng;
pub use schedule::{Schedule, ScheduleKind, ScheduleUnit};

/// The example of the README is a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
