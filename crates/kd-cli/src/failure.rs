//! How errors end the program.

use std::process::ExitCode;

use crate::output;

/// A run that had begun and could not go on: exit code 1.
#[derive(Debug)]
pub struct RunFailed;

/// A run stopped by a signal after its checkpoint: exit code 130.
#[derive(Debug)]
pub struct Interrupted;

/// What a command returns instead of success.
pub type Failure = anyhow::Error;

impl std::fmt::Display for RunFailed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the run failed")
    }
}

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for RunFailed {}
impl std::error::Error for Interrupted {}

/// Prints `error` and its causes on one line of standard error, and returns the exit code.
pub(crate) fn report(error: &Failure) -> ExitCode {
    if closed_pipe(error) {
        return ExitCode::SUCCESS;
    }
    // A cause that its parent already quotes is not said twice.
    let mut text = String::new();
    for cause in error.chain().filter(|c| !c.is::<RunFailed>() && !c.is::<Interrupted>()).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = if text.is_empty() { cause } else { format!("{text}: {cause}") };
        }
    }
    output::message(&format!("error: {text}"));
    if error.downcast_ref::<Interrupted>().is_some() {
        ExitCode::from(130)
    } else if error.downcast_ref::<RunFailed>().is_some() {
        ExitCode::from(1)
    } else {
        ExitCode::from(2)
    }
}

/// Whoever read our output has left (`kd-cli list | head -1`).
fn closed_pipe(error: &Failure) -> bool {
    error.chain().any(|c| c.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe))
}
