//! The zoo against its fixtures and tables.

#![allow(clippy::print_stdout)]

mod golden;
mod support;
mod zoo;
