//! Tests of the loop, its files and its configuration.

#![allow(clippy::print_stdout)] // how many fixtures were checked

#[path = "main/cache.rs"]
mod cache;
#[path = "main/checks.rs"]
mod checks;
#[path = "main/config.rs"]
mod config;
#[path = "main/faults.rs"]
mod faults;
#[path = "main/fixtures.rs"]
mod fixtures;
#[path = "main/methods.rs"]
mod methods;
#[path = "main/optim.rs"]
mod optim;
#[path = "main/phases.rs"]
mod phases;
#[path = "main/resume.rs"]
mod resume;
#[path = "main/support.rs"]
mod support;
#[path = "main/teachers.rs"]
mod teachers;
#[path = "main/together.rs"]
mod together;
#[path = "main/trajectory.rs"]
mod trajectory;
#[path = "main/unlabelled.rs"]
mod unlabelled;
#[path = "main/withdrawn.rs"]
mod withdrawn;
