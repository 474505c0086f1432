//! `kd-cli eval`: accuracy of weights on a data set.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device};
use kd_data::{Loader, LoaderOptions, Normalise, Pipeline};

use crate::{assemble, output};

/// Counts what a network gets right on the test set of a data set.
///
/// Normalisation comes from --mean and --std, else from the weights' own metadata, else from the data set; it is printed.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  kd-cli eval --model resnet56 --weights resnet56.pth --data cifar100:DIR\n  kd-cli eval --model resnet20 --weights runs/r/student.safetensors --data digits --json"
)]
pub struct Eval {
    /// The network (`kd-cli list models`); default: what the weights' metadata says.
    #[arg(long)]
    model: Option<String>,
    /// The weight file.
    #[arg(long)]
    weights: PathBuf,
    /// The data set (`kd-cli list datasets`).
    #[arg(long)]
    data: String,
    /// Which samples.
    #[arg(long, value_enum, default_value = "test")]
    split: Split,
    /// Mean of each channel, in units of the largest pixel value.
    #[arg(long, value_delimiter = ',', requires = "std")]
    mean: Option<Vec<f64>>,
    /// Standard deviation of each channel.
    #[arg(long, value_delimiter = ',', requires = "mean")]
    std: Option<Vec<f64>>,
    /// How images are brought to one size (`resize:256 center-crop:224`); default: as the weights' metadata says.
    #[arg(long, num_args = 1.., value_name = "TRANSFORM")]
    resize: Option<Vec<String>>,
    /// Outputs of the classifier; default: as the weights have.
    #[arg(long)]
    classes: Option<usize>,
    /// Samples of a batch.
    #[arg(long, default_value_t = 100)]
    batch_size: usize,
    /// Threads; 0: all cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// `cpu`, `cuda:N` or `metal`.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Split {
    Test,
    Train,
}

/// Runs the command.
pub fn run(args: &Eval) -> Result<()> {
    let device = assemble::device(&args.device)?;
    let file = kd_weights::read(&args.weights)?;
    let splits = kd_data::open(&args.data)?;
    let data = if args.split == Split::Test { splits.test()? } else { splits.train()? };
    let name = args
        .model
        .clone()
        .or_else(|| file.metadata.get("model").cloned())
        .context("--model: the weights do not say which network they belong to")?;
    let [channels, ..] = data.info().shape;
    let (normalise, from) = match (&args.mean, &args.std) {
        (Some(mean), Some(std)) => (Normalise::new(mean, std), "the command line"),
        _ => match assemble::normalisation(&file.metadata)? {
            Some(n) => (n, "the weights"),
            None => (data.info().normalise.clone(), "the data set"),
        },
    };
    normalise.check(channels)?;
    // A student of this toolkit is shown images as it was in training.
    let augment = match (&args.resize, assemble::list(&file.metadata, "augment")?) {
        (Some(specs), _) => vec![Pipeline::parse(specs)?],
        (None, Some(specs)) => vec![Pipeline::parse(&specs)?],
        (None, None) => vec![],
    };
    let options = LoaderOptions {
        batch_size: args.batch_size,
        normalise: Some(normalise.clone()),
        augment,
        device: Device::Cpu,
        ..LoaderOptions::default()
    };
    let mut loader = Loader::eval(data, &options)?;
    if let Some(names) = assemble::list(&file.metadata, "class_names")?
        && names != data.info().class_names
    {
        let differ = names.iter().zip(&data.info().class_names).position(|(a, b)| a != b).unwrap_or(names.len().min(data.classes()));
        output::message(&format!("warning: the classes of the weights are not called as those of {}, from class {differ} on", args.data));
    }
    let network = assemble::deployed_from(&name, args.classes, file, loader.shape(), DType::F32, &device)?;
    let outputs = network.spec().classes;
    if outputs < data.classes() {
        bail!("{name} has {outputs} outputs, {} has {} classes: every class needs an output", args.data, data.classes());
    }
    if outputs > data.classes() {
        output::message(&format!("warning: {name} has {outputs} outputs, {} only {} classes", args.data, data.classes()));
    }
    let evaluation = assemble::in_pool(args.threads, || kd_train::evaluate(network.as_ref(), &mut loader))??;
    if args.json {
        return output::json(&serde_json::json!({
            "model": name, "weights": args.weights.display().to_string(), "data": args.data, "top1": evaluation.top1, "top5": evaluation.top5,
            "correct": evaluation.correct, "correct5": evaluation.correct5, "total": evaluation.total, "loss": evaluation.loss,
            "ece": evaluation.ece, "mean": normalise.mean, "std": normalise.std,
        }));
    }
    output::line(&format!("normalisation  mean {:?} std {:?} (from {from})", normalise.mean, normalise.std))?;
    output::line(&format!("top1           {:.2} %", evaluation.top1))?;
    output::line(&format!("top5           {:.2} %", evaluation.top5))?;
    output::line(&format!("correct        {}", evaluation.correct))?;
    output::line(&format!("total          {}", evaluation.total))?;
    output::line(&format!("cross-entropy  {:.5}", evaluation.loss))?;
    output::line(&format!("calibration    {:.4} (expected calibration error)", evaluation.ece))
}
