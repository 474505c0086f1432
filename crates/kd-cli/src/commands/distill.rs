//! `kd-cli distill`: a student from a teacher.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device};
use kd_core::{Model, Rng};
use kd_data::Splits;
use kd_nn::Network;
use kd_train::config::{TeacherConfig, TrainConfig};
use kd_train::{Config, Job, LossConfig, Outcome, RunPlace, RunResult, Teacher};

use crate::commands::init::QUICKSTART;
use crate::terminal::Progress;
use crate::{Interrupted, RunFailed, assemble, output};

/// Trains a student from a teacher and compares it with the teacher and, where asked, with the student alone.
///
/// Without --config the quickstart runs: a ResNet-20 teacher and a ResNet-8 student on handwritten digits, in about a minute.
/// The run goes to runs/NAME; a run that was interrupted, or killed, goes on with --resume.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  kd-cli distill\n  kd-cli distill --config r56-r20.toml --set optim.lr=0.1 --set schedule.epochs=60\n  kd-cli distill --set loss.1.method=dkd --set loss.1.beta=2\n  kd-cli distill --resume runs/r56-r20"
)]
pub struct Distill {
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// What `distill` and `train` share.
#[derive(clap::Args)]
pub struct RunArgs {
    /// The config file (`kd-cli init` writes one).
    #[arg(long, conflicts_with = "resume")]
    pub(crate) config: Option<PathBuf>,
    /// Overrides one value of the config: --set optim.lr=0.1. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE", conflicts_with = "resume")]
    pub(crate) set: Vec<String>,
    /// The run directory; default: runs/NAME, numbered when it is taken.
    #[arg(long, conflicts_with = "resume")]
    pub(crate) out: Option<PathBuf>,
    /// Goes on with the run in this directory.
    #[arg(long, value_name = "RUN_DIR")]
    pub(crate) resume: Option<PathBuf>,
    /// No progress; errors and the final table only.
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// The final table as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

impl RunArgs {
    /// The config and the run directory of `distill`.
    fn open(&self) -> Result<(Config, PathBuf)> {
        self.place(|set| match &self.config {
            Some(path) => Ok(Config::load(path, set, assemble::methods())?),
            None => Ok(Config::parse(QUICKSTART, "the quickstart", set, assemble::methods())?),
        })
    }

    /// The config and the run directory of `train`, for `model` on `data` where they are given.
    pub(crate) fn open_for(&self, model: Option<&str>, data: Option<&str>) -> Result<(Config, PathBuf)> {
        self.place(|set| {
            let methods = assemble::methods();
            let mut set = set.to_vec();
            set.extend(data.map(|d| format!("data.source={d:?}")));
            let config = match (&self.config, model) {
                (Some(path), model) => {
                    set.extend(model.map(|m| format!("student.model={m:?}")));
                    Config::load(path, &set, methods)?
                }
                (None, Some(model)) => Config::parse(&format!("[student]\nmodel = {model:?}\n"), "--model", &set, methods)?,
                (None, None) => bail!("either --config or --model says what to train"),
            };
            Ok(crate::commands::train::on_labels(&config))
        })
    }

    /// The config that is resumed, or the one that `read` gives with its directory.
    fn place(&self, read: impl FnOnce(&[String]) -> Result<Config>) -> Result<(Config, PathBuf)> {
        if let Some(dir) = &self.resume {
            let path = dir.join("config.toml");
            if !path.exists() {
                bail!("--resume {}: there is no config.toml, so no run to go on with", dir.display());
            }
            return Ok((Config::load(&path, &[], assemble::methods())?, dir.clone()));
        }
        let mut config = read(&self.set)?;
        // What the run directory keeps has every default written out.
        config.data.augment = Some(assemble::augmentation(&config.data));
        let dir = match &self.out {
            Some(dir) if dir.join("config.toml").exists() => {
                bail!("{} holds a run already; --resume {} goes on with it", dir.display(), dir.display())
            }
            Some(dir) => dir.clone(),
            None => vacant(&Path::new("runs").join(&config.name)),
        };
        Ok((config, dir))
    }
}

/// `wanted`, or the first of `wanted-2`, `wanted-3`, ... that holds no run.
fn vacant(wanted: &Path) -> PathBuf {
    let taken = |p: &Path| p.join("config.toml").exists();
    if !taken(wanted) {
        return wanted.to_path_buf();
    }
    let numbered = |n: usize| PathBuf::from(format!("{}-{n}", wanted.display()));
    (2..).map(numbered).find(|p| !taken(p)).unwrap_or_else(|| wanted.to_path_buf())
}

/// One line of the final table.
#[derive(serde::Serialize)]
struct Row {
    network: String,
    model: String,
    parameters: usize,
    macs: u64,
    top1: f64,
    best_top1: Option<f64>,
    images: usize,
}

/// Runs the command.
pub fn run(args: &Distill) -> Result<()> {
    let (config, dir) = args.run.open()?;
    if config.teacher.is_empty() && config.baseline {
        bail!("baseline = true compares with the student alone, but without a [teacher] that is all this run trains");
    }
    let stop = crate::commands::train::stop_flag()?;
    assemble::in_pool(config.threads, || distill(&config, &dir, &args.run, &stop))?
}

fn distill(config: &Config, dir: &Path, args: &RunArgs, stop: &AtomicBool) -> Result<()> {
    let session = Session { config, args, stop, device: assemble::device(&config.device)?, precision: assemble::precision(config)? };
    let splits = assemble::splits(&config.data, config.data.train_limit, config.seed)?;
    splits.notes.iter().for_each(|note| output::message(&format!("note: {note}")));
    // Every name is looked up before the first network trains.
    session.check(&splits)?;
    let several = config.baseline || config.teacher.iter().any(|t| t.train.is_some());
    // Held to the end: two processes that train the parts of one run would mix them up.
    let _lock = if several { Some(session.claim(dir)?) } else { None };
    let part = |name: &str| if several { dir.join(name) } else { dir.to_path_buf() };
    let mut rows = vec![];

    let mut teachers = vec![];
    for (i, teacher) in config.teacher.iter().enumerate() {
        let place = part(&if config.teacher.len() > 1 { format!("teacher-{}", i + 1) } else { "teacher".to_string() });
        let (network, result) = session.teacher(teacher, &splits, &place)?;
        teachers.push((teacher, network, result));
    }
    let alone = if config.baseline {
        let baseline = Config { teacher: vec![], loss: vec![LossConfig::new("ce")], baseline: false, ..config.clone() };
        Some(session.student("baseline", &baseline, &splits, &[], &part("baseline"))?)
    } else {
        None
    };
    let built: Vec<Teacher> =
        teachers.iter().map(|(t, network, _)| Teacher { name: t.name.clone(), model: Arc::clone(network) as Arc<dyn Model> }).collect();
    let student_config = if several { Config { baseline: false, ..config.clone() } } else { config.clone() };
    let (student, result) = session.student("student", &student_config, &splits, &built, &part("student"))?;

    for (i, (teacher, network, own)) in teachers.iter().enumerate() {
        let label = if teachers.len() > 1 { format!("teacher {}", teacher.name) } else { "teacher".to_string() };
        let images = own.as_ref().map_or(0, |(_, n)| *n);
        if let Some(evaluation) = own.as_ref().and_then(|(r, _)| r.test).or(result.teachers.get(i).copied()) {
            rows.push(row(&label, network, evaluation.top1, own.as_ref().and_then(|(r, _)| r.best.map(|b| b.evaluation.top1)), images)?);
        }
    }
    let trained_on = splits.train()?.len();
    let of =
        |r: &RunResult| (r.test.or(r.history.last().map(|h| h.evaluation)).map_or(f64::NAN, |e| e.top1), r.best.map(|b| b.evaluation.top1));
    if let Some((network, r)) = &alone {
        let (top1, best) = of(r);
        rows.push(row("student alone", network, top1, best, trained_on)?);
    }
    let (top1, best) = of(&result);
    rows.push(row(if built.is_empty() { "student" } else { "student distilled" }, &student, top1, best, trained_on)?);
    session.table(&rows, alone.as_ref().map(|(_, r)| of(r).0), top1, splits.test().map_or(0, kd_data::Dataset::len), dir)
}

fn row(label: &str, network: &Network, top1: f64, best: Option<f64>, images: usize) -> Result<Row> {
    let graph = network.graph();
    Ok(Row {
        network: label.to_string(),
        model: graph.spec().name.clone(),
        parameters: graph.param_count(),
        macs: graph.macs(&graph.spec().input)?,
        top1,
        best_top1: best,
        images,
    })
}

/// How a teacher's training ended, and the number of images it saw.
type Trained = (RunResult, usize);

/// What all runs of one command share.
pub(crate) struct Session<'a> {
    pub(crate) config: &'a Config,
    pub(crate) args: &'a RunArgs,
    pub(crate) stop: &'a AtomicBool,
    pub(crate) device: Device,
    pub(crate) precision: kd_nn::Precision,
}

impl Session<'_> {
    /// Refuses, before anything is written, what would fail later: unknown models, files that are not there, class counts that differ.
    fn check(&self, splits: &Splits) -> Result<()> {
        splits.train()?;
        kd_models::find(&self.config.student.model)?;
        if self.config.teacher.len() > 1 || self.config.teacher.iter().any(|t| t.weight != 1.0) {
            bail!("several teachers, or one with a weight other than 1: no method here combines teachers yet");
        }
        for teacher in &self.config.teacher {
            kd_models::find(&teacher.model)?;
            if let Some(path) = &teacher.weights
                && !Path::new(path).is_file()
            {
                bail!("teacher {}: there is no weight file {path}", teacher.name);
            }
        }
        if let Some(path) = &self.config.student.weights
            && !Path::new(path).is_file()
        {
            bail!("student: there is no weight file {path}");
        }
        Ok(())
    }

    /// Writes the whole config into the directory of a run of several networks, so that it can be resumed as a whole.
    fn claim(&self, dir: &Path) -> Result<File> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let path = dir.join("lock");
        let lock = File::options().create(true).append(true).open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        if lock.try_lock().is_err() {
            bail!("{} is in use by another process; wait for it to end, or choose another directory with --out", dir.display());
        }
        let (path, text) = (dir.join("config.toml"), self.config.to_toml()?);
        match std::fs::read_to_string(&path) {
            Ok(recorded) if recorded == text => {}
            Ok(_) => bail!("{} holds a run with another configuration; choose another directory with --out", dir.display()),
            Err(_) => output::write_file(&path, text.as_bytes())?,
        }
        Ok(lock)
    }

    /// A teacher with weights, or one that is trained first.
    fn teacher(&self, teacher: &TeacherConfig, splits: &Splits, place: &Path) -> Result<(Arc<Network>, Option<Trained>)> {
        let shape = assemble::input(self.config, splits)?;
        let classes = splits.info.class_names.len();
        if let Some(path) = &teacher.weights {
            let file = kd_weights::read(Path::new(path))?;
            let network = assemble::network_from(&teacher.model, None, &file, shape, DType::F32, &self.device)
                .with_context(|| format!("teacher {}, weights {path}", teacher.name))?;
            let outputs = network.spec().classes;
            if outputs < classes {
                bail!("teacher {}: it has {outputs} classes, {} has {classes}", teacher.name, self.config.data.source);
            }
            return Ok((Arc::new(network.with_precision(self.precision).frozen()), None));
        }
        let TrainConfig { train_limit, optim, schedule, loss } = teacher.train.clone().unwrap_or_default();
        let config = Config {
            name: teacher.name.clone(),
            teacher: vec![],
            student: kd_train::config::StudentConfig { model: teacher.model.clone(), weights: None },
            loss,
            optim,
            schedule,
            baseline: false,
            data: kd_train::config::DataConfig {
                train_limit: train_limit.unwrap_or(self.config.data.train_limit),
                ..self.config.data.clone()
            },
            ..self.config.clone()
        };
        let own = assemble::splits(&config.data, config.data.train_limit, config.seed)?;
        let (network, result) = self.student("teacher", &config, &own, &[], place)?;
        network.set_trainable(false);
        Ok((network, Some((result, own.train()?.len()))))
    }

    /// Trains `config.student` in `place`: the one way that teachers, baselines and students take.
    pub(crate) fn student(
        &self,
        title: &str,
        config: &Config,
        splits: &Splits,
        teachers: &[Teacher],
        place: &Path,
    ) -> Result<(Arc<Network>, RunResult)> {
        let shape = assemble::input(config, splits)?;
        let classes = splits.info.class_names.len();
        let model = &config.student.model;
        let network = match &config.student.weights {
            Some(path) => {
                let file = kd_weights::read(Path::new(path))?;
                assemble::network_from(model, Some(classes), &file, shape, DType::F32, &self.device)
                    .with_context(|| format!("student, weights {path}"))?
            }
            None => {
                let network = assemble::network(model, Some(classes), shape, DType::F32, &self.device)?;
                // Keyed by the seed and each parameter's name: a baseline and a distilled student begin alike.
                network.init(Rng::new(config.seed).named("init"))?;
                network
            }
        };
        let network = Arc::new(network.with_precision(self.precision));
        let objectives = assemble::objectives(&config.loss)?;
        let views = objectives.iter().map(|o| o.method.needs().views).max().unwrap_or(1);
        let job = Job {
            student: Arc::clone(&network) as Arc<dyn Model>,
            teachers: teachers.iter().map(|t| Teacher { name: t.name.clone(), model: Arc::clone(&t.model) }).collect(),
            objectives,
            data: assemble::data(config, splits, views, &self.device)?,
            optim: config.optim.clone(),
            schedule: config.schedule.clone(),
            options: config.run.clone(),
            seed: config.seed,
            place: Some(RunPlace {
                command: std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect(),
                metadata: assemble::metadata(model, shape, splits)?,
                ..RunPlace::new(place, config.to_toml()?)
            }),
        };
        let mut progress = Progress::new(title, self.args.quiet);
        match kd_train::train(job, &mut [&mut progress], self.stop) {
            Ok(Outcome::Finished(result)) => Ok((network, *result)),
            Ok(Outcome::Interrupted { epoch, step }) => {
                let at = format!("{title} stopped in epoch {}, after step {step}; everything up to there is saved", epoch + 1);
                Err(anyhow::Error::new(Interrupted).context(at))
            }
            Err(e) if e.is_usage() => Err(e.into()),
            Err(e) => Err(anyhow::Error::new(RunFailed).context(e.to_string())),
        }
    }

    fn table(&self, rows: &[Row], alone: Option<f64>, distilled: f64, test: usize, dir: &Path) -> Result<()> {
        if self.args.json {
            return output::json(&serde_json::json!({"run": dir.display().to_string(), "rows": rows}));
        }
        let cells: Vec<Vec<String>> = rows
            .iter()
            .map(|r| {
                vec![
                    r.network.clone(),
                    r.model.clone(),
                    output::thousands(r.parameters as u64),
                    format!("{:.2} M", r.macs as f64 / 1e6),
                    if r.images > 0 { output::thousands(r.images as u64) } else { "-".to_string() },
                    format!("{:.2} %", r.top1),
                    r.best_top1.map_or("-".to_string(), |b| format!("{b:.2} %")),
                ]
            })
            .collect();
        output::table(
            &["network", "model", "parameters", "MACs", "trained on", "top-1", "best epoch"],
            &[false, false, true, true, true, true, true],
            &cells,
        )?;
        if let Some(alone) = alone {
            output::line("")?;
            output::line(&verdict(alone, distilled, test))?;
        }
        output::line(&format!("run directory: {}", dir.display()))
    }
}

/// What one run can say about the gain: a difference within the sampling error of the test set is no evidence.
fn verdict(alone: f64, distilled: f64, test: usize) -> String {
    let (p, q) = (alone / 100.0, distilled / 100.0);
    let error = 100.0 * ((p * (1.0 - p) + q * (1.0 - q)) / test.max(1) as f64).sqrt();
    let gain = distilled - alone;
    let weight = if gain.abs() > 2.0 * error { "more than" } else { "within" };
    format!(
        "distillation: {gain:+.2} points over the student alone, {weight} twice the sampling error of {test} test images ({error:.2}); one seed of many"
    )
}
