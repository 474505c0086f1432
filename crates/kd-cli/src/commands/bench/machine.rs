//! `kd-cli bench machine`.

use anyhow::Result;
use serde_json::json;

use super::cpu;
use crate::{assemble, output};

#[derive(clap::Args)]
pub(super) struct Machine {
    /// Threads; 0: all cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Machine) -> Result<()> {
    let m = assemble::in_pool(args.threads, kd_nn::measure::Machine::measure)?;
    if args.json {
        return output::json(&json!({
            "cpu": cpu(), "level": m.level.name(), "threads": m.threads, "fma_gflop_s": m.flops / 1e9, "read_gb_s": m.read / 1e9,
            "copy_gb_s": m.copy / 1e9,
        }));
    }
    output::line(&format!("processor      {}", cpu().unwrap_or_else(|| "unknown".to_string())))?;
    output::line(&format!("kernels        {}, {} threads", m.level.name(), m.threads))?;
    output::line(&format!("multiply-adds  {:.0} GFLOP/s (f32, all in registers)", m.flops / 1e9))?;
    output::line(&format!("memory         {:.1} GB/s read, {:.1} GB/s copied (each byte counted once)", m.read / 1e9, m.copy / 1e9))
}
