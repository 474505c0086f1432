//! Tests of kd-nn in one binary.

mod fused;
mod golden_fused;
mod golden_ops;
mod graph;
mod support;
