//! From names and configs to built objects: networks, weights, methods, data.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use kd_core::{BatchSource, MethodEntry, MethodNotes, Model, Needs};
use kd_data::{Loader, LoaderOptions, Normalise, Options, Pipeline, Splits, Unlabelled};
use kd_losses::simkd::Deployed;
use kd_nn::{Network, Precision};
use kd_train::config::{self, Config, DataConfig, TeacherConfig};
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

/// How exactly the fused executor computes, on the command line.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum Exactness {
    /// Direct sums.
    Strict,
    /// Winograd's algorithm where it applies.
    Fast,
}

impl Exactness {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Strict => "strict",
            Self::Fast => "fast",
        }
    }
}

impl From<Exactness> for Precision {
    fn from(e: Exactness) -> Self {
        match e {
            Exactness::Strict => Self::Strict,
            Exactness::Fast => Self::Fast,
        }
    }
}

/// Every method that a config can name.
pub fn methods() -> &'static [MethodEntry] {
    static ALL: LazyLock<Vec<MethodEntry>> =
        LazyLock::new(|| kd_losses::registry().iter().chain(kd_blockwise::registry()).copied().collect());
    &ALL
}

/// Cost class and checks of every method, by name.
pub fn method_notes() -> BTreeMap<&'static str, MethodNotes> {
    kd_losses::NOTES.iter().chain(kd_blockwise::NOTES).map(|n| (n.name, *n)).collect()
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
/// `bf16-teacher`, with the reason.
pub fn precision(config: &Config) -> Result<Precision> {
    match config.precision {
        config::Precision::Strict => Ok(Precision::Strict),
        config::Precision::Fast => Ok(Precision::Fast),
        config::Precision::Bf16Teacher => bail!(
            "precision = \"bf16-teacher\": {}; use \"fast\" or \"strict\"",
            match kd_nn::missing_for_bf16().as_slice() {
                [] => "there are no kernels for this CPU's bf16 tiles yet".to_string(),
                missing => format!("it takes AMX, and this CPU has no {}", missing.join(" and no ")),
            }
        ),
    }
}

/// The network `name`, its parameters still empty.
pub fn network(name: &str, classes: Option<usize>, input: [usize; 3], dtype: DType, device: &Device) -> Result<Network> {
    let entry = kd_models::find(name)?;
    let config = kd_models::Config::new(classes.unwrap_or(entry.classes), input);
    Ok(Network::new(entry.build(&config)?, dtype, device)?)
}

/// The key of a config that an error of its data is about.
pub fn key_at_fault(error: &anyhow::Error, data: &DataConfig) -> Option<String> {
    use kd_data::Error as E;
    let e = error.chain().find_map(|cause| cause.downcast_ref::<E>())?;
    let augmentation = |spec: &str| {
        let list = data.augment.as_deref().unwrap_or_default();
        let i = list.iter().position(|s| s == spec || s.split(':').next() == Some(spec));
        i.map_or("data.augment".to_string(), |i| format!("data.augment.{i}"))
    };
    let of_source = |text: &str| match &data.unlabelled {
        Some(spec) if spec.contains(text) && !data.source.contains(text) => "data.unlabelled".to_string(),
        _ => "data.source".to_string(),
    };
    Some(match e {
        E::Option { key: "mean" | "std", .. } => "data.normalise".to_string(),
        E::Option {
            key: key @ ("batch_size" | "augment" | "train_limit" | "validation" | "label_noise" | "unlabelled" | "class_groups"),
            ..
        } => {
            format!("data.{key}")
        }
        E::Unknown { kind: "augmentation", name, .. } => augmentation(name),
        E::Unknown { kind: "data source", name, .. } => of_source(name),
        E::Spec { spec, .. } if data.augment.iter().flatten().any(|s| s == spec) => augmentation(spec),
        E::Spec { spec, .. } => of_source(spec),
        E::NotFound { path, .. } => of_source(&path.display().to_string()),
        E::NoSplit { .. } => "data.source".to_string(),
        _ => return None,
    })
}

/// Whether a run failed at a file of its data that cannot be used.
pub fn is_unusable_data(error: &kd_train::Error) -> bool {
    let (kd_train::Error::Core(kd_core::Error::Other(e)) | kd_train::Error::Setup(kd_core::Error::Other(e))) = error else { return false };
    matches!(e.downcast_ref(), Some(kd_data::Error::Corrupt { .. } | kd_data::Error::NotFound { .. } | kd_data::Error::Io { .. }))
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

/// As [`network_from`], frozen, for files that hold what a method ships instead of the student alone.
pub fn deployed_from(
    name: &str,
    classes: Option<usize>,
    mut file: WeightFile,
    input: [usize; 3],
    dtype: DType,
    device: &Device,
) -> Result<Arc<dyn Model>> {
    let (extra, own) = file.tensors.into_iter().partition(|(key, _)| key.starts_with(Deployed::PREFIX));
    file.tensors = own;
    let network: Arc<dyn Model> = Arc::new(network_from(name, classes, &file, input, dtype, device)?.frozen());
    let extra: Vec<(String, Tensor)> = extra;
    if extra.is_empty() { Ok(network) } else { Ok(Arc::new(Deployed::restore(network, &extra.into_iter().collect())?)) }
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

/// A list of texts in the metadata of weights.
pub fn list(metadata: &BTreeMap<String, String>, key: &str) -> Result<Option<Vec<String>>> {
    let Some(text) = metadata.get(key) else { return Ok(None) };
    let read = serde_json::from_str(text);
    Ok(Some(read.with_context(|| format!("metadata `{key}` of the weights: expected a list of texts, got {text}"))?))
}

/// What is written beside exported weights: enough to run them.
pub fn metadata(model: &str, input: [usize; 3], splits: &Splits, data: &DataConfig) -> Result<StringMap> {
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
        ("augment".to_string(), json(&augmentation(data))?),
    ]))
}

/// The samples that a run sees.
pub fn splits(data: &DataConfig, train_limit: usize, seed: u64) -> Result<Splits> {
    let mut splits = kd_data::open(&data.source)?;
    if data.normalise == config::Normalisation::Computed {
        // Of all training images: a teacher and a student that see different parts of them must still see the same numbers.
        let options = LoaderOptions { augment: vec![pipeline(data)?], ..LoaderOptions::default() };
        let measured = Loader::eval(splits.train()?, &options)?.mean_std()?;
        splits = splits.with_normalise(measured).context("data.normalise = \"computed\"")?;
    }
    match data.class_groups.as_deref() {
        None => {}
        Some("last-word") => {
            let groups = kd_data::groups::by_last_word(&splits.info.class_names);
            splits = splits.with_groups(groups)?;
        }
        Some(path) => {
            let groups = kd_data::groups::read(Path::new(path), &splits.info.class_names)?;
            splits = splits.with_groups(groups)?;
        }
    }
    let options = Options { train_limit, validation: data.validation, label_noise: data.label_noise };
    Ok(splits.select(&options, seed)?)
}

/// Makes every path of a config absolute: the run directory's copy then means the same wherever a resume starts.
pub fn absolute_paths(config: &mut Config) -> Result<()> {
    let data = &mut config.data;
    data.source = kd_data::absolute(&data.source);
    data.unlabelled = data.unlabelled.as_deref().map(kd_data::absolute);
    let groups = data.class_groups.iter_mut().filter(|g| *g != "last-word");
    let teachers = config.teacher.iter_mut().flat_map(|t| t.weights.iter_mut().chain(&mut t.class_means.file).chain(&mut t.cache_dir));
    for path in groups.chain(teachers).chain(&mut config.student.weights) {
        let whole = std::path::absolute(&*path).with_context(|| format!("the path {path:?}"))?;
        *path = whole.display().to_string();
    }
    Ok(())
}

/// The mean embedding of each class of `teacher`, where its config says more than the loop does by itself.
pub fn class_means(
    teacher: &TeacherConfig,
    network: &dyn Model,
    config: &Config,
    splits: &Splits,
    device: &Device,
) -> Result<Option<Tensor>> {
    let how = &teacher.class_means;
    let (width, names) = (network.spec().embedding, &splits.info.class_names);
    if let Some(path) = &how.file {
        return Ok(Some(
            read_class_means(Path::new(path), names, width).with_context(|| format!("class means of teacher {}", teacher.name))?,
        ));
    }
    if !how.augment && how.round_decimals.is_none() {
        return Ok(None);
    }
    let (train, options) = (splits.train()?, loading(config, 1, device)?);
    let mut loader = if how.augment { Loader::augmented(train, &options)? } else { Loader::eval(train, &options)? };
    Ok(Some(kd_train::class_means_rounded(network, &mut loader, train.classes(), how.round_decimals)?))
}

/// Class means from a file: tensor `class_means` of a safetensors file, or JSON with a list for each class by its number or name.
pub fn read_class_means(path: &Path, names: &[String], width: usize) -> Result<Tensor> {
    let shape = (names.len(), width);
    if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("json")) {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let by_class: BTreeMap<String, Vec<f64>> =
            serde_json::from_str(&text).with_context(|| format!("{}: expected {{\"CLASS\": [numbers], ..}}", path.display()))?;
        let mut rows: Vec<f64> = Vec::with_capacity(names.len() * width);
        for (class, name) in names.iter().enumerate() {
            let row = by_class.get(&class.to_string()).or_else(|| by_class.get(name));
            let row = row.with_context(|| format!("{}: no entry for class {class} ({name})", path.display()))?;
            anyhow::ensure!(row.len() == width, "{}: {} numbers for class {class}, the embedding has {width}", path.display(), row.len());
            rows.extend(row);
        }
        anyhow::ensure!(by_class.len() == names.len(), "{}: {} classes, the data has {}", path.display(), by_class.len(), names.len());
        return Ok(Tensor::from_vec(rows, shape, &Device::Cpu)?);
    }
    let (tensors, _) = crate::output::read_tensors(path)?;
    let means = tensors.get("class_means").with_context(|| format!("{}: there is no tensor `class_means`", path.display()))?;
    anyhow::ensure!(
        means.dims() == [shape.0, shape.1] && means.dtype().is_float(),
        "{}: `class_means` has shape {:?}, expected [{}, {}] (classes, width of the embedding)",
        path.display(),
        means.dims(),
        shape.0,
        shape.1
    );
    Ok(means.to_dtype(DType::F64)?)
}

/// The augmentation that is customary for a data source.
pub fn customary(source: &str) -> &'static [&'static str] {
    let name = source.split(':').next().unwrap_or_default();
    kd_data::SOURCES.iter().find(|s| s.name == name).map_or(&[][..], |s| s.augment)
}

/// The augmentation of a config, or what is customary for its data.
pub fn augmentation(data: &DataConfig) -> Vec<String> {
    data.augment.clone().unwrap_or_else(|| customary(&data.source).iter().map(ToString::to_string).collect())
}

/// The augmentation of a config, parsed.
pub fn pipeline(data: &DataConfig) -> Result<Pipeline> {
    Ok(Pipeline::parse(&augmentation(data))?)
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
    let unlabelled = config.data.unlabelled.as_deref().map(Unlabelled::open).transpose().context("data.unlabelled")?;
    let fingerprint = match &unlabelled {
        None => splits.fingerprint(),
        Some(more) => format!("{} {}", splits.fingerprint(), more.fingerprint()),
    };
    let options = LoaderOptions { unlabelled, ..loading(config, views, device)? };
    let boxed = |loader: kd_data::Result<Loader>| -> Result<Box<dyn BatchSource>> { Ok(Box::new(loader?)) };
    let train = splits.train()?;
    Ok(kd_train::Data {
        classes: train.classes(),
        batch_size: config.data.batch_size,
        train: boxed(Loader::train(train, &options))?,
        plain: Some(boxed(Loader::eval(train, &options))?),
        validation: splits.validation.as_ref().map(|v| boxed(Loader::eval(v, &options))).transpose()?,
        test: splits.test().ok().map(|t| boxed(Loader::eval(t, &options))).transpose()?,
        fingerprint,
        class_means: None,
        class_groups: splits.info.groups.clone(),
    })
}
