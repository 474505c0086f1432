//! How many augmented images a second the loader makes, against how long a consumer that does nothing waits for them:
//! `cargo run --release -p kd-data --example throughput -- [SOURCE] [THREADS] [AUGMENTATION ..]`
//! (default: 50,000 random images of CIFAR's size, 1 thread, `pad-crop:4 flip`). Images in files are decoded anew in each epoch.
#![allow(clippy::print_stdout, reason = "an example")]

use std::sync::Arc;
use std::time::Instant;

use kd_core::{BatchSource, Rng};
use kd_data::{Dataset, Info, Loader, LoaderOptions, Normalise, Pipeline};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let data = match arguments.next().as_deref() {
        None | Some("random") => random_images(50_000)?,
        Some(spec) => kd_data::open(spec)?.train()?.clone(),
    };
    let threads = arguments.next().map_or(Ok(1), |n| n.parse())?;
    let mut augment: Vec<String> = arguments.collect();
    if augment.is_empty() {
        augment = vec!["pad-crop:4".to_string(), "flip".to_string()];
    }
    let options = LoaderOptions { threads, cache_bytes: 0, augment: vec![Pipeline::parse(&augment)?], ..LoaderOptions::default() };
    let mut loader = Loader::train(&data, &options)?;
    for epoch in 0..3 {
        let start = Instant::now();
        loader.start(epoch, 0)?;
        let mut images = 0;
        while let Some(batch) = loader.next_batch()? {
            images += batch.len();
        }
        println!("epoch {epoch}: {:.0} images/s with {threads} thread(s)", images as f64 / start.elapsed().as_secs_f64());
    }
    Ok(())
}

fn random_images(n: usize) -> kd_data::Result<Dataset> {
    let info = Info {
        name: "random".to_string(),
        shape: [3, 32, 32],
        class_names: vec!["only".to_string()],
        normalise: Normalise::new(&[0.5; 3], &[0.25; 3]),
        groups: None,
    };
    let rng = Rng::new(0);
    let pixels = (0..n as u64 * 3072 / 8).flat_map(|i| rng.bits(i).to_le_bytes()).collect();
    Dataset::new(Arc::new(info), pixels, vec![0; n])
}
