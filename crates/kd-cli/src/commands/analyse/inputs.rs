//! What every analysis takes: a data set and networks, named one by one or found in a run directory.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use kd_core::Model;
use kd_data::{Dataset, Loader, LoaderOptions, Normalise, Pipeline, Splits};
use kd_train::analysis::{Seen, Side, sweep};
use kd_train::{Config, Runs};

use crate::{assemble, output};

/// Which samples, and where they are computed.
#[derive(clap::Args)]
pub(super) struct DataArgs {
    /// Takes data, student and teacher from a run directory (`kd-cli distill`); an option given beside it takes precedence.
    #[arg(long, value_name = "DIR")]
    pub(super) run: Option<PathBuf>,
    /// The data set (`kd-cli list datasets`).
    #[arg(long, required_unless_present = "run")]
    data: Option<String>,
    /// Which samples.
    #[arg(long, value_enum, default_value = "test")]
    pub(super) split: Split,
    /// Uses a class-balanced subset of this size; 0: all.
    #[arg(long, default_value_t = 0)]
    limit: usize,
    /// Samples of a batch.
    #[arg(long, default_value_t = 100)]
    pub(super) batch_size: usize,
    /// Threads; 0: all cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// `cpu`, `cuda:N` or `metal`.
    #[arg(long, default_value = "cpu")]
    device: String,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Split {
    Test,
    Train,
}

/// The network, or the student of two.
#[derive(clap::Args)]
pub(super) struct NetworkArgs {
    /// The network, the student where there are two (`kd-cli list models`); default: what the weights' metadata says.
    #[arg(long)]
    model: Option<String>,
    /// Its weight file.
    #[arg(long, required_unless_present = "run")]
    weights: Option<PathBuf>,
    /// Mean of each channel, in units of the largest pixel value; default: what the weights' metadata says, else the data set's.
    #[arg(long, value_delimiter = ',', requires = "std")]
    mean: Option<Vec<f64>>,
    /// Standard deviation of each channel.
    #[arg(long, value_delimiter = ',', requires = "mean")]
    std: Option<Vec<f64>>,
}

/// The teacher of two networks.
#[derive(clap::Args)]
pub(super) struct TeacherArgs {
    /// The teacher; default: what its weights' metadata says.
    #[arg(long)]
    teacher_model: Option<String>,
    /// Its weight file.
    #[arg(long)]
    teacher_weights: Option<PathBuf>,
    /// Mean of each channel for the teacher.
    #[arg(long, value_delimiter = ',', requires = "teacher_std")]
    teacher_mean: Option<Vec<f64>>,
    /// Standard deviation of each channel for the teacher.
    #[arg(long, value_delimiter = ',', requires = "teacher_mean")]
    teacher_std: Option<Vec<f64>>,
}

/// Label noise on the training set.
#[derive(Clone, Copy, Default)]
pub(super) struct Noise {
    pub(super) share: Option<f64>,
    pub(super) seed: Option<u64>,
}

/// A run that has ended.
struct Run {
    dir: PathBuf,
    config: Config,
}

/// Opened data.
pub(super) struct Inputs {
    run: Option<Run>,
    /// The data set's name.
    pub(super) source: String,
    pub(super) splits: Splits,
    /// The samples to look at.
    pub(super) data: Dataset,
    /// Share of replaced labels and the seed.
    pub(super) noise: (f64, u64),
    augment: Vec<Pipeline>,
    split: Split,
    batch_size: usize,
    threads: usize,
    device: Device,
}

/// A network with its weights.
pub(super) struct Loaded {
    /// `network`, `student`, `teacher`.
    pub(super) title: String,
    /// Its name in the registry.
    pub(super) model: String,
    pub(super) weights: PathBuf,
    pub(super) network: kd_nn::Network,
    normalise: Normalise,
    augment: Vec<Pipeline>,
}

impl DataArgs {
    pub(super) fn open(&self, noise: Noise) -> Result<Inputs> {
        let device = assemble::device(&self.device)?;
        let run = self.run.as_deref().map(Run::open).transpose()?;
        let mut data = run.as_ref().map(|r| r.config.data.clone()).unwrap_or_default();
        if let Some(source) = &self.data {
            data.source.clone_from(source);
        }
        if let Some(share) = noise.share {
            anyhow::ensure!(self.split == Split::Train, "--label-noise replaces training labels; it needs --split train");
            data.label_noise = share;
        }
        let (train_limit, own_seed) = run.as_ref().map_or((0, 1), |r| (r.config.data.train_limit, r.config.seed));
        let seed = noise.seed.unwrap_or(own_seed);
        let plain = kd_train::config::DataConfig { source: data.source.clone(), ..Default::default() };
        // A test set alone will do where nothing is asked of the training set.
        let splits = if data == plain { kd_data::open(&data.source)? } else { assemble::splits(&data, train_limit, seed)? };
        let set = if self.split == Split::Test { splits.test()? } else { splits.train()? };
        let set = set.balanced(self.limit);
        let names = run.as_ref().map(|_| assemble::augmentation(&data)).unwrap_or_default();
        let augment = vec![Pipeline::parse(&names)?];
        Ok(Inputs {
            run,
            source: data.source,
            data: set,
            noise: (data.label_noise, seed),
            augment,
            splits,
            split: self.split,
            batch_size: self.batch_size,
            threads: self.threads,
            device,
        })
    }
}

impl Inputs {
    /// The number of classes.
    pub(super) fn classes(&self) -> usize {
        self.data.classes()
    }

    /// The name of a class.
    pub(super) fn class(&self, class: usize) -> &str {
        self.data.info().class_names.get(class).map_or("(no class)", String::as_str)
    }

    /// `cifar100:DIR, test, 10,000 samples`.
    pub(super) fn about(&self) -> String {
        format!("{}, {}, {} samples", self.source, self.split(), output::thousands(self.data.len() as u64))
    }

    /// All samples become one batch.
    pub(super) fn one_batch(&mut self) {
        self.batch_size = self.data.len();
    }

    /// `test` or `train`, for JSON.
    pub(super) fn split(&self) -> &'static str {
        if self.split == Split::Test { "test" } else { "train" }
    }

    /// The one network, or the student of two.
    pub(super) fn network(&self, args: &NetworkArgs, title: &str) -> Result<Loaded> {
        let (model, weights) = match (&args.weights, &self.run) {
            (Some(path), _) => (args.model.clone(), path.clone()),
            (None, Some(run)) => (args.model.clone(), run.weights("student")?.1),
            (None, None) => bail!("--weights: which weights?"),
        };
        self.load(title, model, &weights, args.mean.as_ref().zip(args.std.as_ref()))
    }

    /// The part of the run that `part` names: `student`, `teacher`, `baseline`.
    pub(super) fn part(&self, part: &str, args: &NetworkArgs) -> Result<Loaded> {
        let run = self.run.as_ref().context("--of names a network of a run directory; it needs --run")?;
        anyhow::ensure!(args.weights.is_none(), "--of names a network of the run, --weights a file: one of the two");
        let (model, weights) = run.weights(part)?;
        self.load(part, args.model.clone().or(model), &weights, args.mean.as_ref().zip(args.std.as_ref()))
    }

    /// The teacher; `None` when neither the arguments nor the run have one.
    pub(super) fn teacher(&self, args: &TeacherArgs) -> Result<Option<Loaded>> {
        let (model, weights) = match (&args.teacher_weights, &self.run) {
            (Some(path), _) => (args.teacher_model.clone(), path.clone()),
            (None, Some(run)) if run.has_teacher() => {
                let (model, path) = run.weights("teacher")?;
                (args.teacher_model.clone().or(model), path)
            }
            _ if args.teacher_model.is_some() => bail!("--teacher-model without --teacher-weights: the weights are missing"),
            _ => return Ok(None),
        };
        self.load("teacher", model, &weights, args.teacher_mean.as_ref().zip(args.teacher_std.as_ref())).map(Some)
    }

    /// The teacher, which must be there.
    pub(super) fn need_teacher(&self, args: &TeacherArgs) -> Result<Loaded> {
        self.teacher(args)?.context("--teacher-weights: this analysis compares a student with its teacher; which weights has the teacher?")
    }

    /// Both networks of a pair: teacher and student.
    pub(super) fn pair(&self, student: &NetworkArgs, teacher: &TeacherArgs) -> Result<[Loaded; 2]> {
        let teacher = self.need_teacher(teacher)?;
        let student = self.network(student, "student")?;
        let outputs = |n: &Loaded| n.network.spec().classes;
        if outputs(&teacher) != outputs(&student) {
            bail!(
                "the teacher ({}) has {} outputs, the student ({}) {}: their logits cannot be compared",
                teacher.model,
                outputs(&teacher),
                student.model,
                outputs(&student)
            );
        }
        Ok([teacher, student])
    }

    fn load(&self, title: &str, model: Option<String>, weights: &Path, normalise: Option<(&Vec<f64>, &Vec<f64>)>) -> Result<Loaded> {
        let file = kd_weights::read(weights)?;
        let model = model
            .or_else(|| file.metadata.get("model").cloned())
            .with_context(|| format!("{title}: {} does not say which network it belongs to; name it", weights.display()))?;
        let normalise = match normalise {
            Some((mean, std)) => Normalise::new(mean, std),
            None => assemble::normalisation(&file.metadata)?.unwrap_or_else(|| self.data.info().normalise.clone()),
        };
        // A network of this toolkit is shown images as it was in training.
        let augment = match assemble::list(&file.metadata, "augment")? {
            Some(specs) => vec![Pipeline::parse(&specs)?],
            None => self.augment.clone(),
        };
        let input = Loader::eval(&self.data, &self.options(&normalise, &augment))?.shape();
        let network = assemble::network_from(&model, None, &file, input, DType::F32, &self.device)
            .with_context(|| format!("{title}, weights {}", weights.display()))?
            .frozen();
        let (outputs, classes) = (network.spec().classes, self.classes());
        if outputs < classes {
            bail!("{title}: {model} has {outputs} outputs, {} has {classes} classes: every class needs an output", self.source);
        }
        if outputs > classes {
            output::message(&format!("warning: {model} has {outputs} outputs, {} only {classes} classes", self.source));
        }
        Ok(Loaded { title: title.to_string(), model, weights: weights.to_path_buf(), network, normalise, augment })
    }

    fn options(&self, normalise: &Normalise, augment: &[Pipeline]) -> LoaderOptions {
        LoaderOptions {
            batch_size: self.batch_size,
            normalise: Some(normalise.clone()),
            augment: augment.to_vec(),
            ..LoaderOptions::default()
        }
    }

    /// `set` as `network` wants to see it.
    pub(super) fn loader(&self, set: &Dataset, network: &Loaded) -> Result<Loader> {
        Ok(Loader::eval(set, &self.options(&network.normalise, &network.augment))?)
    }

    /// Runs `job` on the threads that were asked for.
    pub(super) fn in_pool<R: Send>(&self, job: impl FnOnce() -> Result<R> + Send) -> Result<R> {
        assemble::in_pool(self.threads, job)?
    }

    /// Mean embedding of each class over the training set.
    pub(super) fn class_means(&self, network: &Loaded) -> Result<candle_core::Tensor> {
        let train = self.splits.train()?;
        let bar = progress(&format!("class means of the {}", network.title), train.len());
        let means = kd_train::class_means(&network.network, &mut self.loader(train, network)?, train.classes())?;
        bar.finish_and_clear();
        Ok(means)
    }

    /// Hands what the networks compute at their cuts to `each`, batch by batch, with progress on a terminal.
    pub(super) fn sweep(
        &self,
        networks: &[(&Loaded, &[kd_core::Cut])],
        mut each: impl FnMut(&Seen<'_>) -> kd_train::Result<()>,
    ) -> Result<()> {
        let mut loaders = networks.iter().map(|(n, _)| self.loader(&self.data, n)).collect::<Result<Vec<_>>>()?;
        let bar = progress("images", self.data.len());
        let mut sides: Vec<Side<'_>> =
            networks.iter().zip(&mut loaders).map(|((n, cuts), source)| Side { name: &n.title, model: &n.network, source, cuts }).collect();
        sweep(&mut sides, |seen| {
            bar.set_position((seen.first + seen.labels.len()) as u64);
            each(seen)
        })?;
        bar.finish_and_clear();
        Ok(())
    }
}

impl Loaded {
    /// `resnet56 (resnet56.pth)`.
    pub(super) fn about(&self) -> String {
        format!("{} ({})", self.model, self.weights.display())
    }

    /// For JSON.
    pub(super) fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "model": self.model, "weights": self.weights.display().to_string(), "width": self.network.spec().embedding,
            "mean": self.normalise.mean, "std": self.normalise.std,
        })
    }
}

impl Run {
    fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("config.toml");
        if !path.is_file() {
            bail!("--run {}: there is no config.toml, so no run", dir.display());
        }
        let mut runs = Runs::load(&path, &[], assemble::methods())?;
        if runs.side_by_side {
            let names: Vec<String> = runs.configs.iter().map(|c| c.name.clone()).collect();
            runs.configs.retain(|c| c.name == "student");
            if runs.configs.is_empty() {
                bail!("--run {}: it holds several runs; name the directory of one: {}", dir.display(), names.join(", "));
            }
        }
        let config = runs.configs.pop().with_context(|| format!("{}: it describes no run", path.display()))?;
        Ok(Self { dir: dir.to_path_buf(), config })
    }

    fn has_teacher(&self) -> bool {
        !self.config.teacher.is_empty()
    }

    /// Name and weights of a network of the run.
    fn weights(&self, part: &str) -> Result<(Option<String>, PathBuf)> {
        let file = "student.safetensors";
        let mut places = vec![self.dir.join(part).join(file)];
        let mut model = Some(self.config.student.model.clone());
        match part {
            "student" => places.push(self.dir.join(file)),
            "teacher" => {
                let teacher = self.config.teacher.first().context("this run has no teacher")?;
                model = Some(teacher.model.clone());
                if let Some(path) = &teacher.weights {
                    return Ok((model, PathBuf::from(path)));
                }
                places.push(self.dir.join("teacher-1").join(file));
                // The directory of the student alone, within that of the whole run.
                places.push(self.dir.join("..").join("teacher").join(file));
            }
            _ => {}
        }
        match places.iter().find(|p| p.is_file()) {
            Some(path) => Ok((model, path.clone())),
            None => bail!(
                "--run {}: there is no {}; a run exports its networks when it ends (kd-cli distill --resume goes on with it)",
                self.dir.display(),
                places[0].display()
            ),
        }
    }
}

/// A bar on a terminal, nothing elsewhere.
fn progress(what: &str, total: usize) -> ProgressBar {
    let target = if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr_with_hz(8) } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(total as u64), target);
    if let Ok(style) = ProgressStyle::with_template("{msg} {bar:30} {pos}/{len} {eta}") {
        bar.set_style(style);
    }
    bar.set_message(what.to_string());
    bar
}
