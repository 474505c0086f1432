//! Tests of kd-nn in one binary.

mod golden_ops;
mod graph;
mod support;
