//! Block-wise logit distillation (Block-KD) with stepping-stone networks for candle.
//!
//! A *stone* runs the student's first blocks, a small trainable connector, and the teacher's remaining blocks with its classifier; what the
//! student's features are worth is read off the logits that come out. The manual page is [`mod@block_kd`]: formula, parameters, and which of
//! them are the paper's.
//!
//! - [`BlockKd`] is the method for a training loop, [`registry`] its line for configs;
//! - [`SteppingStones`] builds and runs the stones of any two [`Model`](kd_core::Model)s, for a loop of one's own (`examples/own_model.rs`);
//! - [`block_kd`](fn@block_kd) is the loss, a pure function of logits:
//!
//! ```
//! use std::collections::BTreeMap;
//!
//! use candle_core::{Device, Tensor};
//! use kd_blockwise::{Params, block_kd};
//!
//! let logits = |x: [f64; 2]| Tensor::new(&[x], &Device::Cpu);
//! let (student, teacher) = (logits([0.0, 0.0])?, logits([3f64.ln(), 0.0])?);
//! let stones = BTreeMap::from([(1, logits([0.0, 0.0])?), (2, teacher.clone())]);
//! let labels = Tensor::new(&[0i64], &Device::Cpu)?;
//!
//! let params = Params { gamma: 0.0, temperature: 1.0, ..Params::default() };
//! let value = block_kd(&student, &teacher, &labels, &stones, 2, &params)?.total()?.to_scalar::<f64>()?;
//! // Cross-entropy and divergence of the student, half of them for stone 1, which equals it; stone 2 is the teacher.
//! let (ce, kl) = (2f64.ln(), 0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln());
//! assert!((value - (1.5 * (ce + kl) + (4.0f64 / 3.0).ln())).abs() < 1e-12);
//! # Ok::<(), kd_core::Error>(())
//! ```
//!
//! Invariant: of teacher and student it uses only what [`Model`](kd_core::Model) offers; the teacher is never written.

pub mod block_kd;
mod connector;
mod distance;
mod split;
mod stones;

pub use block_kd::{Active, BlockKd, Connector, ConnectorBn, ConnectorRelu, Params, Stones, TailBn, block_kd};
pub use distance::Distance;
pub use stones::SteppingStones;

/// The methods of this crate.
pub fn registry() -> &'static [kd_core::MethodEntry] {
    static METHODS: &[kd_core::MethodEntry] = &[block_kd::ENTRY];
    METHODS
}

/// Cost class and checks of every method here.
pub const NOTES: &[kd_core::MethodNotes] =
    &[kd_core::MethodNotes { name: "block_kd", cost: kd_core::Cost::MorePasses, checks: &[kd_core::Check::Fixtures] }];

/// The example of the README is a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
