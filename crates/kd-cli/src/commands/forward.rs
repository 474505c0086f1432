//! `kd-cli forward`: one network on given images, for comparing with other frameworks.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor, Var};
use kd_core::{Cut, Mode, Model, Rng};
use kd_nn::{Executor, Network, ops};

use crate::{assemble, output};

/// Runs a network on the images of a file and writes everything it computes.
///
/// The input file holds `images` `[B,C,H,W]` and, for losses and gradients, `labels` `[B]`. The output holds `logits`, `embedding`, `stage.<i>`,
/// `preact.<i>`; with labels `loss` (mean cross-entropy), `grad.<key>` and `grad.images`; in train mode `running.<key>`. Dropout is off.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  kd-cli forward resnet20 --weights resnet20.pth --inputs in.safetensors --mode train --dtype f64 --output out.safetensors"
)]
pub struct Forward {
    /// The network (`kd-cli list models`).
    model: String,
    /// A weight file, or `splitmix64` for the weights that follow from the parameters' names.
    #[arg(long)]
    weights: String,
    /// A safetensors file with the inputs.
    #[arg(long)]
    inputs: PathBuf,
    /// Outputs of the classifier.
    #[arg(long)]
    classes: Option<usize>,
    /// Batch norm with running (eval) or batch statistics (train).
    #[arg(long, value_enum, default_value = "eval")]
    mode: RunMode,
    /// Which executor computes.
    #[arg(long, value_enum, default_value = "auto")]
    executor: Backend,
    /// How exactly the fused executor computes.
    #[arg(long, value_enum, default_value = "strict")]
    precision: assemble::Exactness,
    /// The type to compute in.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: assemble::Float,
    /// The safetensors file to write.
    #[arg(long)]
    output: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum RunMode {
    Eval,
    Train,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Backend {
    Auto,
    Reference,
    Fused,
}

/// Runs the command.
pub fn run(args: &Forward) -> Result<()> {
    let (inputs, metadata) = output::read_tensors(&args.inputs)?;
    let dtype = DType::from(args.dtype);
    let images = inputs.get("images").with_context(|| format!("{} holds no tensor `images`", args.inputs.display()))?;
    let [_, channels, height, width] = images.dims() else {
        bail!("`images` must be [batch, channels, height, width], got {:?}", images.dims());
    };
    let images = Var::from_tensor(&images.to_dtype(dtype)?)?;
    let named_classes = metadata.get("num_classes").and_then(|v| v.parse().ok());
    let shape = [*channels, *height, *width];
    let network = quiet(&args.model, args.classes.or(named_classes), shape, dtype)?
        .with_executor(match args.executor {
            Backend::Auto => Executor::Auto,
            Backend::Reference => Executor::Reference,
            Backend::Fused => Executor::Fused,
        })
        .with_precision(args.precision.into());
    if args.weights == "splitmix64" {
        kd_models::recipe::load(network.parameters())?;
    } else {
        let file = kd_weights::read(Path::new(&args.weights))?;
        kd_weights::load_into(&network, &file, &kd_weights::LoadOptions::default())?;
    }

    // Block cuts only repeat what stages show.
    let cuts: Vec<Cut> = network.graph().cuts().iter().map(|c| c.0).filter(|c| !matches!(c, Cut::Block(_))).collect();
    let labels = inputs.get("labels");
    let train = args.mode == RunMode::Train;
    // The stream serves dropout alone, of which there is none.
    let mode = if train { Mode::Train(Rng::new(0)) } else { Mode::Eval };
    let outputs = match labels {
        Some(_) => network.run_tracked(&images, Cut::Input, &cuts, mode)?,
        None => network.run(&images, Cut::Input, &cuts, mode)?,
    };
    let mut found: BTreeMap<String, Tensor> = outputs.iter().map(|(cut, t)| (cut.to_string(), t.detach())).collect();
    if let Some(labels) = labels {
        if labels.dtype().is_float() || labels.dims() != [images.dims()[0]] {
            bail!(
                "`labels` must be {} whole numbers, one an image; got {} of shape {:?}",
                images.dims()[0],
                labels.dtype().as_str(),
                labels.dims()
            );
        }
        let labels = labels.to_dtype(DType::I64)?;
        gradients(&network, &images, &outputs, &labels, &mut found)?;
    }
    if train {
        let params = network.parameters();
        for (i, entry) in params.stat_entries().iter().enumerate() {
            found.insert(format!("running.{}", entry.name), params.stat(i)?);
        }
    }
    output::write_tensors(&args.output, &found)
}

/// The network without its dropout: frameworks draw other numbers.
fn quiet(model: &str, classes: Option<usize>, input: [usize; 3], dtype: DType) -> Result<Network> {
    let entry = kd_models::find(model)?;
    let graph = entry.build(&kd_models::Config::new(classes.unwrap_or(entry.classes), input))?;
    Ok(Network::new(graph.without_dropout(), dtype, &Device::Cpu)?)
}

fn gradients(
    network: &Network,
    images: &Var,
    outputs: &kd_core::Outputs,
    labels: &Tensor,
    found: &mut BTreeMap<String, Tensor>,
) -> Result<()> {
    let classes = network.spec().classes as i64;
    if let Some((i, label)) = labels.to_vec1::<i64>()?.into_iter().enumerate().find(|(_, l)| !(0..classes).contains(l)) {
        bail!("label {label} at position {i}: the network has classes 0..={}", classes - 1);
    }
    let ce = |logits: &Tensor| ops::cross_entropy(logits, &ops::Targets::Labels(labels), &ops::CrossEntropy::default());
    let loss = match outputs.get(Cut::LogitsDist) {
        Ok(second) => ((ce(outputs.logits()?)? + ce(second)?)? * 0.5)?,
        Err(_) => ce(outputs.logits()?)?,
    };
    let grads = kd_nn::backward(&loss, &[network as &dyn Model])?;
    found.insert("loss".to_string(), loss.detach());
    let own = grads.networks.first().and_then(Option::as_ref).context("a network of a graph has flat gradients")?;
    let params = network.parameters();
    for (i, entry) in params.entries().iter().enumerate() {
        found.insert(format!("grad.{}", entry.name), params.grad_of(&own.flat, i)?);
    }
    let pixels = match grads.store.get(images) {
        Some(g) => g.contiguous()?,
        None => images.zeros_like()?,
    };
    found.insert("grad.images".to_string(), pixels);
    Ok(())
}
