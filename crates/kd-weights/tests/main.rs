//! Real files of four projects, every way a file can be wrong, and what loading promises.

#![allow(clippy::print_stdout)] // what was checked, what was skipped

#[path = "main/hostile.rs"]
mod hostile;
#[path = "main/loading.rs"]
mod loading;
#[path = "main/properties.rs"]
mod properties;
#[path = "main/reading.rs"]
mod reading;
#[path = "main/real.rs"]
mod real;
#[path = "main/write.rs"]
mod write;
