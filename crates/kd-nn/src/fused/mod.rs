//! The fused executor: a piece of a graph as one plan of CPU kernels, seen by candle as one node.

use candle_core::Tensor;
use kd_core::{Error, Mode, Params, Result};

use crate::graph::{Graph, NodeId};
use crate::network::Precision;

/// Buffers and compiled plans of one network.
#[derive(Default)]
pub struct State {}

/// One run of a piece.
pub struct Job<'a> {
    /// The network's layers.
    pub graph: &'a Graph,
    /// Its parameters.
    pub params: &'a Params,
    /// The tensor at `from`, any strides.
    pub x: &'a Tensor,
    /// Where it is fed in.
    pub from: NodeId,
    /// The nodes to compute, in order.
    pub piece: &'a [NodeId],
    /// The nodes whose outputs are wanted, ascending, without repetition.
    pub wanted: &'a [NodeId],
    /// Train, batch statistics, or eval.
    pub mode: Mode,
    /// Whether parameter gradients are wanted.
    pub tracked: bool,
}

/// Whether every node of the piece has a fused kernel.
pub fn supports(_graph: &Graph, _piece: &[NodeId]) -> bool {
    false
}

/// Runs a piece; the outputs in the order of `job.wanted`.
pub fn run(_state: &State, _job: &Job<'_>, _precision: Precision) -> Result<Vec<Tensor>> {
    Err(Error::refused("the fused executor supports no layer yet"))
}
