//! Tests of kd-losses: fixtures, properties, errors, methods on networks.
#![allow(clippy::print_stdout)] // the fixtures' counts

mod main {
    mod anchors;
    mod errors;
    mod fixtures;
    mod golden;
    mod golden_anchors;
    mod methods;
    mod newer;
    mod newer_loop;
    mod properties;
    mod soft_targets;
    mod stages;
    mod steps;
    mod support;
}
