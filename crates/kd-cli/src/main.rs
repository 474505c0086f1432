//! The `kd-cli` binary.
fn main() {}
