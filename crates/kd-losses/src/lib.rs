//! Knowledge-distillation losses and methods for candle: pure functions, trainable methods, PyTorch-checked values and gradients.
//!
//! One file per method. Its module is the manual page (formula, shapes, parameters with the papers' settings, quirks of released code);
//! it holds a `Params` type, a pure function of candle tensors, the [`Method`](kd_core::Method) that a training loop drives, and a line
//! of the [`registry`](registry()).
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//!
//! let student = Var::new(&[[2f32, 1.0, 0.0], [0.0, 1.0, 0.0]], &Device::Cpu)?;
//! let teacher = Tensor::new(&[[4f32, 0.0, 0.0], [0.0, 0.0, 3.0]], &Device::Cpu)?;
//! let labels = Tensor::new(&[0i64, 2], &Device::Cpu)?;
//!
//! let mut terms = kd_losses::ce(&student, &labels)?;
//! terms.extend(kd_losses::nkd(&student, &teacher, &labels, &Default::default())?);
//! let gradients = terms.total()?.backward()?;
//! assert_eq!(gradients.get(&student).unwrap().dims(), [2, 3]);
//! # Ok::<(), kd_core::Error>(())
//! ```
//!
//! Conventions: `B` samples, `K` classes, `D` the embedding's width (the classifier's input). Labels are class indices `[B]` or, as with
//! PyTorch's cross-entropy, class probabilities `[B,K]`. The teacher's tensors are detached. Terms hold their weight, and the loss is
//! their weighted sum. Every loss is finite and its gradient right for logits of any size, in f32 and f64, on any device.
//!
//! Invariant: pure functions of tensors; no I/O, no loop.

mod adapter;
mod class_means;
mod features;
mod heads;
mod inputs;
mod labels;
mod layers;
mod named_graph;
mod norms;
mod notes;
mod plus_plus;
mod registry;
mod rows;
mod softmax;

pub mod ab;
pub mod anisotropic_label_smoothing;
pub mod at;
pub mod catkd;
pub mod cc;
pub mod ce;
pub mod crd;
pub mod crld;
pub mod ctkd;
pub mod dist;
pub mod dist_pp;
pub mod dkd;
pub mod dkd_pp;
pub mod fcfd;
pub mod fitnet;
pub mod fnkd;
pub mod fsp;
pub mod ft;
pub mod he;
pub mod kd;
pub mod kd_pp;
pub mod kdsvd;
pub mod label_smoothing;
pub mod logit_standardization;
pub mod mgd;
pub mod mlld;
pub mod nd;
pub mod nd_cosine;
pub mod nd_infonce;
pub mod nkd;
pub mod norm_match;
pub mod nst;
pub mod ofa;
pub mod ofd;
pub mod pkt;
pub mod reviewkd;
pub mod reviewkd_pp;
pub mod rkd;
pub mod rld;
pub mod sdd;
pub mod sifn;
pub mod simkd;
pub mod sp;
pub mod srrl;
pub mod tf_nkd;
pub mod uskd;
pub mod vid;
pub mod wkd_f;
pub mod wkd_l;
pub mod wsld;
pub mod wttm;

pub use ab::ab;
pub use adapter::Adapter;
pub use anisotropic_label_smoothing::anisotropic_label_smoothing;
pub use at::at;
pub use catkd::catkd;
pub use cc::cc;
pub use ce::ce;
pub use class_means::ClassMeans;
pub use crd::crd;
pub use crld::crld;
pub use ctkd::ctkd;
pub use dist::dist;
pub use dist_pp::dist_pp;
pub use dkd::dkd;
pub use dkd_pp::dkd_pp;
pub use fcfd::fcfd;
pub use features::StagePair;
pub use fitnet::fitnet;
pub use fnkd::{Side, fnkd, fnkd_released};
pub use fsp::fsp;
pub use ft::ft;
pub use he::he;
pub use kd::kd;
pub use kd_pp::kd_pp;
pub use kdsvd::kdsvd;
pub use label_smoothing::label_smoothing;
pub use logit_standardization::logit_standardization;
pub use mgd::mgd;
pub use mlld::mlld;
pub use nd::nd;
pub use nd_cosine::nd_cosine;
pub use nd_infonce::nd_infonce;
pub use nkd::nkd;
pub use norm_match::norm_match;
pub use notes::NOTES;
pub use nst::nst;
pub use ofa::ofa;
pub use ofd::ofd;
pub use pkt::pkt;
pub use registry::{find, registry};
pub use reviewkd::reviewkd;
pub use rkd::rkd;
pub use rld::rld;
pub use rows::Base;
pub use sdd::sdd;
pub use sifn::sifn;
pub use simkd::simkd;
pub use sp::sp;
pub use srrl::srrl;
pub use tf_nkd::tf_nkd;
pub use uskd::uskd;
pub use vid::vid;
pub use wkd_f::wkd_f;
pub use wkd_l::wkd_l;
pub use wsld::wsld;
pub use wttm::wttm;
