//! `kd-cli bench model`.

use std::time::{Duration, Instant};

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use kd_core::{Cut, Mode, Model as _, Rng};
use kd_nn::Network;
use serde::Serialize;

use super::{median, step};
use crate::{assemble, output};

#[derive(clap::Args)]
#[command(after_help = "Example:\n  kd-cli bench model resnet56 resnet20 --batch 64 --threads 1")]
pub(super) struct Model {
    /// The networks (`kd-cli list models`), side by side.
    #[arg(required = true)]
    models: Vec<String>,
    /// Images of a batch for the throughput.
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Threads; 0: all cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Seconds for each network.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Height and width of the images; default: the networks' own.
    #[arg(long)]
    size: Option<usize>,
    /// How exactly convolutions are computed.
    #[arg(long, value_enum, default_value = "fast")]
    precision: assemble::Exactness,
    /// A JSON list.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Row {
    model: String,
    parameters: usize,
    macs: u64,
    /// Milliseconds of one image: the median and the 95th percentile.
    latency_ms: f64,
    latency_p95_ms: f64,
    /// Of a batch.
    img_s: f64,
    gflop_s: f64,
}

/// A network under test and what it has taken so far, for one image and for a batch.
struct Candidate {
    network: Network,
    inputs: [Tensor; 2],
    times: [Vec<f64>; 2],
}

pub(super) fn run(args: &Model) -> Result<()> {
    step::check(args.batch, args.seconds)?;
    let rows = assemble::in_pool(args.threads, || measure(args))??;
    if args.json {
        return output::json(&rows);
    }
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|r| {
            vec![
                r.model.clone(),
                output::thousands(r.parameters as u64),
                format!("{:.2} M", r.macs as f64 / 1e6),
                format!("{:.2} ms", r.latency_ms),
                format!("{:.2} ms", r.latency_p95_ms),
                format!("{:.0}", r.img_s),
                format!("{:.0}", r.gflop_s),
            ]
        })
        .collect();
    output::table(
        &["network", "parameters", "MACs", "one image", "95 % within", &format!("img/s, {}", args.batch), "GFLOP/s"],
        &[false, true, true, true, true, true, true],
        &cells,
    )
}

/// All networks in turn, so that a busy moment of the machine does not fall on one alone.
fn measure(args: &Model) -> Result<Vec<Row>> {
    let mut candidates = args
        .models
        .iter()
        .map(|name| {
            let input = step::input(name, args.size)?;
            let network = assemble::network(name, None, input, DType::F32, &Device::Cpu)?.with_precision(args.precision.into()).frozen();
            network.init(Rng::new(1))?;
            let inputs = [1, args.batch].map(|n| step::images(n, input, 2));
            let [one, batch] = inputs;
            Ok(Candidate { network, inputs: [one?, batch?], times: [vec![], vec![]] })
        })
        .collect::<Result<Vec<_>>>()?;
    let (begun, budget) = (Instant::now(), Duration::from_secs_f64(args.seconds * candidates.len() as f64));
    let mut round = 0;
    while begun.elapsed() < budget || round < 5 {
        for c in &mut candidates {
            // About as many images one by one as together, within limits.
            for (which, times) in [(0, 4), (1, 1)] {
                for _ in 0..times {
                    let one = Instant::now();
                    c.network.run(&c.inputs[which], Cut::Input, &[Cut::Logits], Mode::Eval)?;
                    if round > 1 {
                        c.times[which].push(one.elapsed().as_secs_f64());
                    }
                }
            }
        }
        round += 1;
    }
    let row = |c: Candidate| {
        let graph = c.network.graph();
        let macs = graph.macs(&c.inputs[0].dims()[1..])?;
        let [mut one, batch] = c.times;
        one.sort_by(f64::total_cmp);
        let img_s = args.batch as f64 / median(batch);
        Ok(Row {
            model: c.network.spec().name.clone(),
            parameters: graph.param_count(),
            macs,
            latency_p95_ms: 1e3 * one[(one.len() * 95 / 100).min(one.len() - 1)],
            latency_ms: 1e3 * median(one),
            img_s,
            gflop_s: 2e-9 * macs as f64 * img_s,
        })
    };
    candidates.into_iter().map(row).collect()
}
