//! `kd-cli bench conv`.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kd_nn::measure::Alone;
use serde_json::json;

use super::median;
use crate::{assemble, output};

#[derive(clap::Args)]
#[command(after_help = "Example:\n  kd-cli bench conv 16,16,3,1,1,32 64,64,3,1,64,16 --batch 64")]
pub(super) struct Conv {
    /// Input channels, output channels, kernel, stride, groups, height (and width) of the input: 16,32,3,2,1,32.
    #[arg(required = true, value_name = "IN,OUT,K,STRIDE,GROUPS,SIZE")]
    shapes: Vec<String>,
    /// Images.
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Threads; 0: all cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Seconds for each direction of each shape.
    #[arg(long, default_value_t = 0.15)]
    seconds: f64,
    /// How exactly convolutions are computed.
    #[arg(long, value_enum, default_value = "fast")]
    precision: assemble::Exactness,
    /// A JSON list.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Conv) -> Result<()> {
    let shapes = args.shapes.iter().map(|s| parse(s)).collect::<Result<Vec<_>>>()?;
    let found = assemble::in_pool(args.threads, || shapes.iter().map(|s| measure(args, s)).collect::<Result<Vec<_>>>())??;
    if args.json {
        let row = |(shape, rates): (&String, &[f64; 3])| json!({"shape": shape, "fwd": rates[0], "bwd_x": rates[1], "bwd_w": rates[2]});
        return output::json(&args.shapes.iter().zip(&found).map(row).collect::<Vec<_>>());
    }
    let row = |(shape, rates): (&String, &[f64; 3])| {
        std::iter::once(shape.clone()).chain(rates.iter().map(|r| format!("{r:.1}"))).collect::<Vec<_>>()
    };
    let rows: Vec<_> = args.shapes.iter().zip(&found).map(row).collect();
    output::line("GFLOP/s, counted as direct convolution")?;
    output::table(&["in,out,k,stride,groups,size", "forward", "input gradient", "weight gradient"], &[false, true, true, true], &rows)
}

fn parse(text: &str) -> Result<[usize; 6]> {
    let numbers: Option<Vec<usize>> = text.split(',').map(|n| n.trim().parse().ok().filter(|n| (1..=4096).contains(n))).collect();
    let shape: [usize; 6] = numbers
        .and_then(|n| n.try_into().ok())
        .with_context(|| format!("`{text}`: expected six numbers of 1 to 4096, IN,OUT,K,STRIDE,GROUPS,SIZE"))?;
    let [ci, co, k, _, groups, _] = shape;
    if ci % groups != 0 || co % groups != 0 || k % 2 == 0 {
        bail!("`{text}`: the kernel must be odd, and the groups must divide both numbers of channels");
    }
    Ok(shape)
}

/// GFLOP/s of the three directions.
fn measure(args: &Conv, &[ci, co, k, stride, groups, size]: &[usize; 6]) -> Result<[f64; 3]> {
    let spec = kd_nn::Conv::new(co, k).stride(stride).pad(k / 2).groups(groups);
    let mut conv = Alone::new([ci, size, size], spec, args.batch, args.precision.into())?;
    let directions: [fn(&mut Alone); 3] = [Alone::forward, Alone::input_grad, Alone::weight_grad];
    Ok(directions.map(|run| conv.flops() / 1e9 / seconds(args.seconds, || run(&mut conv))))
}

/// The median time of `f` over so many seconds.
fn seconds(budget: f64, mut f: impl FnMut()) -> f64 {
    (0..2).for_each(|_| f());
    let (begun, mut times) = (Instant::now(), vec![]);
    while begun.elapsed() < Duration::from_secs_f64(budget) || times.len() < 5 {
        let one = Instant::now();
        f();
        times.push(one.elapsed().as_secs_f64());
    }
    median(times)
}
