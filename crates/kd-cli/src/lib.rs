//! The library half of `kd-cli`: every command as a function, so that maintenance tools can call what users call.
//!
//! Standard output carries data (tables, JSON), standard error progress and messages. Exit codes: 0 done, 1 a run failed,
//! 2 unusable arguments, files or configuration, 130 interrupted (a checkpoint was written where there is a run).

pub mod assemble;
pub mod commands;
mod failure;
pub mod figure;
pub mod output;
pub mod terminal;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

pub use failure::{Failure, Interrupted, RunFailed};

/// Knowledge distillation of image classifiers: teachers in, small students out.
#[derive(Parser)]
#[command(
    name = "kd-cli",
    version,
    after_help = "Examples:\n  kd-cli distill                                   quickstart: teacher, baseline and student on handwritten digits\n  kd-cli init my-run.toml                          write the quickstart's config to edit\n  kd-cli distill --config my-run.toml --set optim.lr=0.02\n  kd-cli distill --resume runs/my-run\n  kd-cli eval --weights runs/my-run/student/student.safetensors --data digits\n  kd-cli list methods"
)]
struct Cli {
    #[command(subcommand)]
    command: commands::Command,
}

/// Runs the command line `args` (the program's name first).
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) => {
            // clap prints help to standard output and mistakes to standard error; a closed pipe is no mistake of ours.
            let _ = e.print();
            return ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(2));
        }
    };
    match commands::run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => failure::report(&e),
    }
}
