//! `kd-cli class-means`: what KD++ and FNKD read off a teacher.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::DType;
use kd_core::{BatchSource, Cut, Mode, Model};
use kd_data::{Loader, LoaderOptions, Pipeline};

use crate::{assemble, output};

/// Computes the mean teacher embedding of each class over the training set (KD++), and prints the teacher's mean feature norm with
/// FNKD's rule of thumb for a temperature T: lambda = T, tau = mean norm / T.
///
/// A run's `[teacher.class_means]` takes the file as it is, or makes the same means itself. KD++'s released script augments and rounds:
/// `--augment --round-decimals 4`.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  kd-cli class-means --model resnet56 --weights resnet56.pth --data cifar100:DIR --output means.safetensors\n  kd-cli class-means --weights teacher.safetensors --data digits --augment --round-decimals 4 --output means.json"
)]
pub struct ClassMeans {
    /// The teacher (`kd-cli list models`); default: what the weights' metadata says.
    #[arg(long)]
    model: Option<String>,
    /// Its weights.
    #[arg(long)]
    weights: PathBuf,
    /// The data set; its training split is used.
    #[arg(long)]
    data: String,
    /// Augments the images once, as the data set is customarily augmented in training; default: as they are.
    #[arg(long)]
    augment: bool,
    /// Rounds every number of an embedding, and every mean, to so many decimals.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=12))]
    round_decimals: Option<u32>,
    /// What the augmentation follows from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Uses a class-balanced subset of this size; 0: all.
    #[arg(long, default_value_t = 0)]
    train_limit: usize,
    /// The temperature that FNKD is compared at.
    #[arg(long, default_value_t = 4.0)]
    temperature: f64,
    /// Threads; 0: all cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Writes the means to this file: as {"CLASS NUMBER": [..], ..} where it ends in .json (KD++'s form), else as tensor `class_means`
    /// [classes, width] of a safetensors file.
    #[arg(long)]
    output: Option<PathBuf>,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &ClassMeans) -> Result<()> {
    anyhow::ensure!(args.temperature > 0.0 && args.temperature.is_finite(), "--temperature {}: must be more than 0", args.temperature);
    let file = kd_weights::read(&args.weights)?;
    let name = args.model.clone().or_else(|| file.metadata.get("model").cloned());
    let name = name.context("--model: the weights do not say which network they belong to")?;
    let options = kd_data::Options { train_limit: args.train_limit, ..Default::default() };
    let splits = kd_data::open(&args.data)?.select(&options, args.seed)?;
    let train = splits.train()?;
    let augment = if args.augment { vec![Pipeline::parse(assemble::customary(&args.data))?] } else { vec![] };
    let normalise = assemble::normalisation(&file.metadata)?;
    let options = LoaderOptions { batch_size: 100, seed: args.seed, normalise, augment, ..LoaderOptions::default() };
    let mut loader = if args.augment { Loader::augmented(train, &options)? } else { Loader::eval(train, &options)? };
    let network = assemble::network_from(&name, None, &file, loader.shape(), DType::F32, &candle_core::Device::Cpu)?.frozen();
    let (means, norm) = assemble::in_pool(args.threads, || -> Result<_> {
        let means = kd_train::class_means_rounded(&network, &mut loader, train.classes(), args.round_decimals)?;
        Ok((means, mean_norm(&network, &mut loader)?))
    })??;
    let norms: Vec<f64> = means.sqr()?.sum(1)?.sqrt()?.to_vec1()?;
    let mean_of_means = norms.iter().sum::<f64>() / norms.len() as f64;
    match &args.output {
        Some(path) if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("json")) => {
            let rows = means.to_vec2::<f64>()?;
            let by_class: serde_json::Map<_, _> =
                rows.into_iter().enumerate().map(|(class, row)| (class.to_string(), row.into())).collect();
            output::write_file(path, serde_json::to_string(&by_class)?.as_bytes())?;
        }
        Some(path) => output::write_tensors(path, &BTreeMap::from([("class_means".to_string(), means)]))?,
        None => {}
    }
    let tau = norm / args.temperature;
    if args.json {
        return output::json(&serde_json::json!({
            "model": name, "classes": norms.len(), "width": network.spec().embedding, "images": train.len(),
            "class_mean_norms": norms, "mean_class_mean_norm": mean_of_means, "mean_feature_norm": norm,
            "fnkd": {"temperature": args.temperature, "tau": tau, "lambda": args.temperature},
        }));
    }
    output::line(&format!("class means          {} of width {}, over {} images", norms.len(), network.spec().embedding, train.len()))?;
    output::line(&format!("their mean norm      {mean_of_means:.4}"))?;
    output::line(&format!("mean feature norm    {norm:.4}"))?;
    output::line(&format!("FNKD at temperature  {}: tau = {tau:.4}, lambda = {}", args.temperature, args.temperature))
}

/// Mean L2 norm of the embedding.
fn mean_norm(network: &kd_nn::Network, loader: &mut Loader) -> Result<f64> {
    let (mut sum, mut n) = (0.0, 0usize);
    loader.start(0, 0)?;
    while let Some(batch) = loader.next_batch()? {
        let out = network.run(&batch.images[0], Cut::Input, &[Cut::Embedding], Mode::Eval)?;
        let norms: Vec<f64> = out.embedding()?.to_dtype(DType::F64)?.sqr()?.sum(1)?.sqrt()?.to_vec1()?;
        sum += norms.iter().sum::<f64>();
        n += norms.len();
    }
    Ok(sum / n.max(1) as f64)
}
