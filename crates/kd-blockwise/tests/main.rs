//! Tests of kd-blockwise: fixtures, the invariants of Block-KD, its options, refusals.
#![allow(clippy::print_stdout)] // how many fixtures were checked

mod main {
    mod golden;
    mod invariants;
    mod options;
    mod refusals;
    mod runs;
    mod support;
}
