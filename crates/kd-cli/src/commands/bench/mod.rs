//! `kd-cli bench`: how fast things are on this machine.

mod conv;
mod loader;
mod machine;
mod model;
pub mod profile;
mod step;

use anyhow::Result;

/// Measures the speed of training steps, networks, the loader, convolutions and the machine. Nothing is read, nothing is written.
#[derive(clap::Args)]
pub struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Whole distillation steps on random images, through the loop that trains.
    Step(step::Step),
    /// Inference of networks: latency of one image, images per second of a batch.
    Model(model::Model),
    /// Augmented images per second and core.
    Loader(loader::Loader),
    /// One convolution alone: forward, gradient of the input, gradient of the weight.
    Conv(conv::Conv),
    /// The machine's limits: multiply-adds, memory.
    Machine(machine::Machine),
}

/// Runs the command.
pub fn run(args: &Bench) -> Result<()> {
    match &args.what {
        What::Step(args) => step::run(args),
        What::Model(args) => model::run(args),
        What::Loader(args) => loader::run(args),
        What::Conv(args) => conv::run(args),
        What::Machine(args) => machine::run(args),
    }
}

/// The middle of some values; NaN of none.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n => (values[(n - 1) / 2] + values[n / 2]) / 2.0,
    }
}

/// The most memory that this process has had, in bytes, where the system tells (Linux).
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// The processor's name, where the system tells (Linux).
fn cpu() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    Some(info.lines().find_map(|l| l.strip_prefix("model name"))?.trim_start_matches([' ', '\t', ':']).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(vec![]).is_nan());
    }
}
