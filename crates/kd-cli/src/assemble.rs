//! From names and configs to built objects: networks, weights, methods, data.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device};
use kd_core::{BatchSource, MethodEntry, Needs};
use kd_data::{Loader, LoaderOptions, Normalise, Options, Pipeline, Splits};
use kd_nn::{Network, Precision};
use kd_train::config::{self, Config, DataConfig};
use kd_train::{LossConfig, Objective, StringMap};
use kd_weights::WeightFile;
use serde::Serialize;

/// A float type on the command line.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum Float {
    /// Single precision.
    F32,
    /// Double precision.
    F64,
}

impl From<Float> for DType {
    fn from(f: Float) -> Self {
        match f {
            Float::F32 => Self::F32,
            Float::F64 => Self::F64,
        }
    }
}

/// Every method that a config can name.
pub fn methods() -> &'static [MethodEntry] {
    static ALL: LazyLock<Vec<MethodEntry>> =
        LazyLock::new(|| kd_losses::registry().iter().chain(kd_blockwise::registry()).copied().collect());
    &ALL
}

/// The method called `name`.
pub fn method(name: &str) -> Result<&'static MethodEntry> {
    let hint = || config::did_you_mean(name, methods().iter().map(|m| m.name));
    methods().iter().find(|m| m.name == name).with_context(|| format!("`{name}` is no known method; {}", hint()))
}

/// What a method needs with its default parameters; nothing when it cannot be built without being given some.
pub fn default_needs(entry: &MethodEntry) -> Option<Needs> {
    (entry.build)(&serde_json::json!({})).ok().map(|m| m.needs())
}

/// The losses of a config, built.
pub fn objectives(losses: &[LossConfig]) -> Result<Vec<Objective>> {
    losses
        .iter()
        .map(|l| {
            let method = (method(&l.method)?.build)(&serde_json::Value::Object(l.params.clone()))?;
            let LossConfig { ref teacher, weight, warmup_epochs, warmup_first_epoch, .. } = *l;
            Ok(Objective { method, teacher: teacher.clone(), weight, warmup_epochs, warmup_first_epoch })
        })
        .collect()
}

/// `cpu`, `cuda:N` or `metal`.
pub fn device(name: &str) -> Result<Device> {
    let (kind, index) = name.split_once(':').unwrap_or((name, "0"));
    let index: usize = index.parse().with_context(|| format!("device `{name}`: expected a number after the colon"))?;
    match kind {
        "cpu" if index == 0 => Ok(Device::Cpu),
        "cuda" if cfg!(feature = "cuda") => Ok(Device::new_cuda(index)?),
        "metal" if cfg!(feature = "metal") => Ok(Device::new_metal(index)?),
        "cuda" | "metal" => bail!("device `{name}`: this binary was built without the feature `{kind}`"),
        _ => bail!("device `{name}`: expected cpu, cuda:N or metal"),
    }
}

/// Runs `job` on `threads` threads (0: all cores).
pub fn in_pool<R: Send>(threads: usize, job: impl FnOnce() -> R + Send) -> Result<R> {
    if threads > 1024 {
        bail!("{threads} threads: expected 0 (all cores) to 1024");
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().context("cannot start the threads")?;
    Ok(pool.install(job))
}

/// How exactly networks of this config compute.
///
/// # Errors
/// `bf16-teacher`, which no kernel serves yet.
pub fn precision(config: &Config) -> Result<Precision> {
    match config.precision {
        config::Precision::Strict => Ok(Precision::Strict),
        config::Precision::Fast => Ok(Precision::Fast),
        config::Precision::Bf16Teacher => bail!("precision = \"bf16-teacher\": there are no bf16 kernels yet; use \"fast\" or \"strict\""),
    }
}

/// The network `name`, its parameters still empty.
pub fn network(name: &str, classes: Option<usize>, input: [usize; 3], dtype: DType, device: &Device) -> Result<Network> {
    let entry = kd_models::find(name)?;
    let config = kd_models::Config::new(classes.unwrap_or(entry.classes), input);
    Ok(Network::new(entry.build(&config)?, dtype, device)?)
}

/// The network `name` with as many outputs as its weights have (or `classes`), and the weights in it.
pub fn network_from(
    name: &str,
    classes: Option<usize>,
    file: &WeightFile,
    input: [usize; 3],
    dtype: DType,
    device: &Device,
) -> Result<Network> {
    let entry = kd_models::find(name)?;
    let classes = match classes {
        Some(n) => n,
        None => kd_weights::classes(file, &entry.build(&kd_models::Config::new(entry.classes, input))?).unwrap_or(entry.classes),
    };
    let network = network(name, Some(classes), input, dtype, device)?;
    kd_weights::load_into(&network, file, &kd_weights::LoadOptions::default())?;
    Ok(network)
}

/// Mean and deviation that a weight file was trained with, when it says so.
pub fn normalisation(metadata: &BTreeMap<String, String>) -> Result<Option<Normalise>> {
    let list = |key: &str| -> Result<Option<Vec<f64>>> {
        let Some(text) = metadata.get(key) else { return Ok(None) };
        let read = serde_json::from_str(text);
        Ok(Some(read.with_context(|| format!("metadata `{key}` of the weights: expected a list of numbers, got {text}"))?))
    };
    Ok(list("mean")?.zip(list("std")?).map(|(mean, std)| Normalise { mean, std }))
}

/// What is written beside exported weights: enough to run them.
pub fn metadata(model: &str, input: [usize; 3], splits: &Splits) -> Result<StringMap> {
    fn json(value: &impl Serialize) -> Result<String> {
        Ok(serde_json::to_string(value)?)
    }
    let info = &splits.info;
    Ok(StringMap::from([
        ("format".to_string(), "pt".to_string()),
        ("model".to_string(), model.to_string()),
        ("num_classes".to_string(), info.class_names.len().to_string()),
        ("input".to_string(), json(&input)?),
        ("mean".to_string(), json(&info.normalise.mean)?),
        ("std".to_string(), json(&info.normalise.std)?),
        ("class_names".to_string(), json(&info.class_names)?),
    ]))
}

/// The samples that a run sees.
pub fn splits(data: &DataConfig, train_limit: usize, seed: u64) -> Result<Splits> {
    let options = Options { train_limit, validation: data.validation, label_noise: data.label_noise };
    Ok(kd_data::open(&data.source)?.select(&options, seed)?)
}

/// The augmentation of a config, or what is customary for its data.
pub fn augmentation(data: &DataConfig) -> Vec<String> {
    let name = data.source.split(':').next().unwrap_or_default();
    let customary = || kd_data::SOURCES.iter().find(|s| s.name == name).map_or(&[][..], |s| s.augment);
    data.augment.clone().unwrap_or_else(|| customary().iter().map(ToString::to_string).collect())
}

/// The augmentation of the second view, and any after it.
fn strong_augmentation(data: &DataConfig) -> Vec<String> {
    let stronger = || augmentation(data).into_iter().chain(["randaugment:2".to_string()]).collect();
    data.augment_strong.clone().unwrap_or_else(stronger)
}

/// How the batches of a run are made: `views` copies of each training image, all tensors on `device`.
fn loading(config: &Config, views: usize, device: &Device) -> Result<LoaderOptions> {
    let parse = |list: Vec<String>| Pipeline::parse(&list.iter().map(String::as_str).collect::<Vec<_>>());
    let mut augment = vec![parse(augmentation(&config.data))?];
    if views > 1 || config.data.augment_strong.is_some() {
        augment.push(parse(strong_augmentation(&config.data))?);
    }
    Ok(LoaderOptions {
        batch_size: config.data.batch_size,
        seed: config.seed,
        views,
        augment,
        device: device.clone(),
        ..LoaderOptions::default()
    })
}

/// Channels, height and width that a network of this run is fed: the images' own, or what the augmentation makes of them.
pub fn input(config: &Config, splits: &Splits) -> Result<[usize; 3]> {
    Ok(Loader::train(splits.train()?, &loading(config, 1, &Device::Cpu)?)?.shape())
}

/// A run's data: loaders over `splits`.
pub fn data(config: &Config, splits: &Splits, views: usize, device: &Device) -> Result<kd_train::Data> {
    let options = loading(config, views, device)?;
    let boxed = |loader: kd_data::Result<Loader>| -> Result<Box<dyn BatchSource>> { Ok(Box::new(loader?)) };
    let train = splits.train()?;
    Ok(kd_train::Data {
        classes: train.classes(),
        batch_size: config.data.batch_size,
        train: boxed(Loader::train(train, &options))?,
        plain: Some(boxed(Loader::eval(train, &options))?),
        validation: splits.validation.as_ref().map(|v| boxed(Loader::eval(v, &options))).transpose()?,
        test: splits.test().ok().map(|t| boxed(Loader::eval(t, &options))).transpose()?,
        fingerprint: splits.fingerprint(),
        class_means: None,
        class_groups: splits.info.groups.clone(),
    })
}
