//! `kd-cli info`: a model from the registry, a weight file, or a data set.

use std::path::Path;

use anyhow::Result;
use candle_core::{DType, Device};
use kd_core::{Cut, Model};
use kd_data::{Dataset, Loader, LoaderOptions, Pipeline};

use crate::{assemble, output};

/// Prints a model's stages, parameters and cost, the tensors of a weight file, or the sets and classes of a data set.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  kd-cli info resnet20\n  kd-cli info resnet20 --classes 10 --input 1,8,8\n  kd-cli info resnet56.pth\n  kd-cli info imagefolder:DIR --measure"
)]
pub struct Info {
    /// A model of the registry, a weight file, or a data set (`kd-cli list datasets`).
    what: String,
    /// Of a data set: measures mean and deviation of the training images (what `data.normalise = "computed"` uses).
    #[arg(long)]
    measure: bool,
    /// Outputs of the classifier.
    #[arg(long)]
    classes: Option<usize>,
    /// Channels, height, width of the input.
    #[arg(long, value_delimiter = ',', num_args = 1)]
    input: Option<Vec<usize>>,
    /// As one JSON object.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Info) -> Result<()> {
    let path = Path::new(&args.what);
    let known = kd_models::registry().iter().any(|m| m.name == args.what);
    let source = args.what.split(':').next().unwrap_or_default();
    let is_data = !known && kd_data::SOURCES.iter().any(|s| s.name == source);
    match (known, is_data) {
        (_, true) => data(args),
        (false, _) if path.exists() => file(path, args.json),
        _ => model(args),
    }
}

fn data(args: &Info) -> Result<()> {
    let splits = kd_data::open(&args.what)?;
    let info = &splits.info;
    let measured = if args.measure {
        let augment = vec![Pipeline::parse(assemble::customary(&args.what))?];
        Some(Loader::eval(splits.train()?, &LoaderOptions { augment, ..LoaderOptions::default() })?.mean_std()?)
    } else {
        None
    };
    let sets = [("train", splits.train.as_ref().ok()), ("validation", splits.validation.as_ref()), ("test", splits.test.as_ref().ok())];
    let sets: Vec<(&str, &Dataset)> = sets.into_iter().filter_map(|(name, set)| Some((name, set?))).collect();
    let sizes = |set: &Dataset| set.by_class().iter().map(Vec::len).collect::<Vec<_>>();
    if args.json {
        let sets: serde_json::Map<_, _> =
            sets.iter().map(|(name, set)| (name.to_string(), serde_json::json!({"images": set.len(), "by_class": sizes(set)}))).collect();
        return output::json(&serde_json::json!({
            "data": args.what, "shape": info.shape, "class_names": info.class_names, "groups": info.groups, "sets": sets,
            "normalise": info.normalise, "measured": measured, "notes": splits.notes,
        }));
    }
    let [channels, height, width] = info.shape;
    output::line(&format!("{}: {} classes, images of {channels} x {height} x {width}", args.what, info.class_names.len()))?;
    for (name, set) in &sets {
        let counts = sizes(set);
        let (least, most) = (counts.iter().min().unwrap_or(&0), counts.iter().max().unwrap_or(&0));
        output::line(&format!("{name:<12} {} images, {least} to {most} a class", output::thousands(set.len() as u64)))?;
    }
    output::line(&format!("normalise    mean {:?} std {:?}", info.normalise.mean, info.normalise.std))?;
    if let Some(n) = &measured {
        output::line(&format!("measured     mean {:?} std {:?}", n.mean, n.std))?;
    }
    splits.notes.iter().try_for_each(|note| output::line(&format!("note         {note}")))
}

fn model(args: &Info) -> Result<()> {
    let input = match args.input.as_deref() {
        None => None,
        Some(&[c, h, w]) => Some([c, h, w]),
        Some(other) => anyhow::bail!("--input takes three numbers: channels,height,width, got {}", other.len()),
    };
    let entry = kd_models::find(&args.what)?;
    let input = input.unwrap_or(entry.input);
    let network = assemble::network(&args.what, args.classes, input, DType::F32, &Device::Cpu)?;
    let spec = network.spec();
    let graph = network.graph();
    let macs = graph.macs(&input)?;
    let executors = stage_executors(&network)?;
    if args.json {
        return output::json(&serde_json::json!({
            "spec": spec, "parameters": graph.param_count(), "macs": macs, "layers": graph.nodes().len() - 1, "executors": executors,
            "about": entry.about,
        }));
    }
    output::line(&format!("{}: {}", spec.name, entry.about))?;
    output::line(&format!("input        {} x {} x {}", input[0], input[1], input[2]))?;
    output::line(&format!("classes      {}", spec.classes))?;
    output::line(&format!("embedding    {}", spec.embedding))?;
    output::line(&format!("parameters   {}", output::thousands(graph.param_count() as u64)))?;
    output::line(&format!("MACs         {} per image", output::thousands(macs)))?;
    output::line("")?;
    let rows: Vec<Vec<String>> = spec
        .stages
        .iter()
        .enumerate()
        .zip(&executors)
        .map(|((i, s), executor)| {
            let twin = if s.has_preact { "yes" } else { "" };
            vec![i.to_string(), s.name.clone(), format!("{} x {} x {}", s.channels, s.size[0], s.size[1]), twin.into(), executor.clone()]
        })
        .collect();
    output::table(&["stage", "module", "shape", "pre-activation", "executor (CPU, f32)"], &[true, false, false, false, false], &rows)
}

/// Which executor gets from the images to each stage.
fn stage_executors(network: &kd_nn::Network) -> Result<Vec<String>> {
    (0..network.spec().stages.len()).map(|i| Ok(network.executor_of(Cut::Input, &[Cut::Stage(i)])?.to_string())).collect()
}

fn file(path: &Path, json: bool) -> Result<()> {
    let file = kd_weights::read(path)?;
    let scalars: u64 = file.tensors.iter().map(|(_, t)| t.elem_count() as u64).sum();
    if json {
        let tensors: Vec<_> = file
            .tensors
            .iter()
            .map(|(name, t)| serde_json::json!({"name": name, "shape": t.dims(), "dtype": t.dtype().as_str()}))
            .collect();
        return output::json(&serde_json::json!({"tensors": tensors, "metadata": file.metadata, "scalars": scalars}));
    }
    output::line(&format!("{}: {} tensors, {} numbers", path.display(), file.tensors.len(), output::thousands(scalars)))?;
    for (key, value) in &file.metadata {
        output::line(&format!("{key} = {value}"))?;
    }
    let rows: Vec<_> =
        file.tensors.iter().map(|(n, t)| vec![n.clone(), format!("{:?}", t.dims()), t.dtype().as_str().to_string()]).collect();
    output::table(&["tensor", "shape", "type"], &[false; 3], &rows)
}
