//! `kd-cli bench loader`.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use kd_core::{BatchSource, Rng};
use kd_data::{Dataset, Info, LoaderOptions, Normalise, Pipeline};
use serde_json::json;

use super::median;
use crate::output;

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  kd-cli bench loader\n  kd-cli bench loader --data cifar100:DIR --augment pad-crop:4,flip,randaugment:2:9"
)]
pub(super) struct Loader {
    /// A data set (`kd-cli list datasets`); default: 20,000 random images of 3x32x32 in memory.
    #[arg(long)]
    data: Option<String>,
    /// The augmentation.
    #[arg(long, value_delimiter = ',', default_value = "pad-crop:4,flip")]
    augment: Vec<String>,
    /// Images of a batch.
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// The loader's threads; 0: its own choice.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Epochs to time; the first one is not counted.
    #[arg(long, default_value_t = 4)]
    epochs: usize,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Loader) -> Result<()> {
    let splits = args.data.as_deref().map(kd_data::open).transpose()?;
    let random;
    let data = match &splits {
        Some(splits) => splits.train()?,
        None => {
            random = images()?;
            &random
        }
    };
    let options = LoaderOptions {
        batch_size: args.batch,
        threads: args.threads,
        augment: vec![Pipeline::parse(&args.augment)?],
        ..LoaderOptions::default()
    };
    let mut loader = kd_data::Loader::train(data, &options)?;
    let mut rates = vec![];
    for epoch in 0..=args.epochs.max(1) {
        let (begun, mut images) = (Instant::now(), 0);
        loader.start(epoch, 0)?;
        while let Some(batch) = loader.next_batch()? {
            images += batch.len();
        }
        if epoch > 0 {
            rates.push(images as f64 / begun.elapsed().as_secs_f64());
        }
    }
    let rate = median(rates);
    let cores = if args.threads > 0 { args.threads } else { std::thread::available_parallelism().map_or(1, usize::from) };
    let per_core = rate / cores as f64;
    if args.json {
        return output::json(&json!({"img_s": rate, "threads": args.threads, "img_s_core": per_core, "augment": args.augment}));
    }
    output::line(&format!("{rate:.0} img/s, {per_core:.0} a core, augmented by {}", args.augment.join(", ")))
}

/// Noise of CIFAR's size.
fn images() -> Result<Dataset> {
    const N: usize = 20_000;
    let info = Info {
        name: "noise".to_string(),
        shape: [3, 32, 32],
        class_names: (0..100).map(|k| k.to_string()).collect(),
        normalise: Normalise::new(&[0.5; 3], &[0.25; 3]),
        groups: None,
    };
    let rng = Rng::new(1);
    let pixels = (0..N as u64 * 3072 / 4).flat_map(|i| ((rng.uniform(i) * 4_294_967_296.0) as u32).to_le_bytes()).collect();
    Ok(Dataset::new(Arc::new(info), pixels, (0..N as u32).map(|i| i % 100).collect())?)
}
