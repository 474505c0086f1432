//! Maintenance commands of the workspace: `cargo xtask --help`. One file per command; the style rules that no linter
//! knows are tests (`cargo test -p xtask`, module `tidy`).
#![allow(clippy::print_stdout, reason = "a command-line tool")]

mod bench;
#[cfg(unix)]
mod cuda_check;
mod release_check;
mod reproduce;
#[cfg(test)]
mod tidy;
mod workspace;

use anyhow::Result;
use clap::Parser;

#[derive(Parser)]
#[command(bin_name = "cargo xtask", about = "Maintenance commands of the kd workspace")]
enum Task {
    Bench(bench::Args),
    ReleaseCheck(release_check::Args),
    Reproduce(reproduce::Args),
    #[cfg(unix)]
    CudaCheck(cuda_check::Args),
}

fn main() -> Result<()> {
    match Task::parse() {
        Task::Bench(args) => bench::run(&args),
        Task::ReleaseCheck(args) => release_check::run(&args),
        Task::Reproduce(args) => reproduce::run(&args),
        #[cfg(unix)]
        Task::CudaCheck(args) => cuda_check::run(&args),
    }
}
