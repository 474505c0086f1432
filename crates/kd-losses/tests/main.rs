//! Tests of kd-losses: fixtures, properties, errors.

mod main {
    mod golden;
}
