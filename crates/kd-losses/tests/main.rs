//! Tests of kd-losses: fixtures, properties, errors, methods on networks.
#![allow(clippy::print_stdout)] // the fixtures' counts

mod main {
    mod errors;
    mod golden;
    mod methods;
    mod properties;
}
