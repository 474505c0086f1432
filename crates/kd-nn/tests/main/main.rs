//! Tests of kd-nn in one binary.

#![allow(clippy::print_stdout)] // a test that skips says so

mod fused;
mod golden_fused;
mod golden_ops;
mod graph;
mod support;
