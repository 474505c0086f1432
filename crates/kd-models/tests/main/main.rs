//! The zoo against its fixtures and tables.

#![allow(clippy::print_stdout, reason = "how many fixtures were checked")]

mod golden;
mod support;
mod zoo;
