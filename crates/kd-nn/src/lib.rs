//! Networks as graphs with named cuts, and the two executors that run them.
//!
//! A network is data: a [`Graph`] of layers, written down with a [`GraphBuilder`], with named places ([`kd_core::Cut`]) to take tensors
//! out of or feed them in. A [`Network`] adds flat parameters and runs any piece of the graph, from one cut to others:
//!
//! - the **reference** executor composes candle operations ([`ops`]); any device, f32 and f64;
//! - the **fused** executor (CPU, f32) compiles the piece into a plan of fused kernels that candle sees as one node.
//!
//! What the fused executor lacks runs on the reference executor, silently and rightly. [`backward`] differentiates a loss over
//! networks run by either.

mod backward;
mod builder;
pub mod fused;
mod graph;
mod init;
mod kernels;
pub mod measure;
mod network;
pub mod ops;
pub mod profile;
pub mod reference;

pub use backward::{Gradients, NetworkGradients, backward};
pub use builder::{Conv, GraphBuilder};
pub use graph::{BatchNorm, Conv2d, ConvTranspose2d, Graph, Node, NodeId, Op, Pool};
pub use init::Init;
pub use kernels::{Level, missing_for_bf16};
pub use network::{Executor, Network, Precision};

/// The example of the README is a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
