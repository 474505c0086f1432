//! The `kd-cli` binary: `kd-cli --help`.

use std::process::ExitCode;

// candle frees and allocates big tensors every step; the system's allocator gives their pages back each time, which costs
// more than the arithmetic on them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    kd_cli::main(std::env::args_os())
}
