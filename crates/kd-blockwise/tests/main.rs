//! Tests of kd-blockwise: fixtures, the invariants of Block-KD, its options, refusals.

mod main {
    mod golden;
    mod invariants;
    mod options;
    mod refusals;
    mod support;
}
