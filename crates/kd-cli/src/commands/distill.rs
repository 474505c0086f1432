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
use kd_train::config::{CacheKind, DataConfig, TeacherConfig, TrainConfig};
use kd_train::{Config, LogitCache, Objective, Outcome, RunPlace, RunResult, Runs, Shared, Sink, Student, Teacher};

use crate::commands::bench::profile::Report;
use crate::commands::init::QUICKSTART;
use crate::terminal::Board;
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
    /// Prints where the time went, by layer, pass and kernel, after each network's training (to standard error).
    #[arg(long)]
    pub(crate) profile: bool,
    /// The final table as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

impl RunArgs {
    /// The runs and the run directory of `distill`.
    fn open(&self) -> Result<(Runs, PathBuf)> {
        self.place(|set| match &self.config {
            Some(path) => Ok(Runs::load(path, set, assemble::methods())?),
            None => Ok(Runs::parse(QUICKSTART, "the quickstart", set, assemble::methods())?),
        })
    }

    /// The config and the run directory of `train`, for `model` on `data` where they are given.
    pub(crate) fn open_for(&self, model: Option<&str>, data: Option<&str>) -> Result<(Config, PathBuf)> {
        let (mut runs, dir) = self.place(|set| {
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
            let config = crate::commands::train::on_labels(&config);
            Ok(Runs { name: config.name.clone(), side_by_side: false, configs: vec![config] })
        })?;
        match (runs.configs.pop(), runs.side_by_side) {
            (Some(config), false) => Ok((config, dir)),
            _ => bail!("{} holds several runs; `kd-cli distill --resume` goes on with them", dir.display()),
        }
    }

    /// `error` behind the place in the config that it is about: what is wrong with the data shows only once the data is there.
    pub(crate) fn located(&self, error: anyhow::Error, model: Option<&str>, source_is_config_s: bool, data: &DataConfig) -> anyhow::Error {
        let key = assemble::key_at_fault(&error, data).filter(|key| source_is_config_s || key != "data.source");
        let Some(key) = key.filter(|_| !error.is::<RunFailed>() && !error.is::<Interrupted>()) else { return error };
        let path = self.resume.as_ref().map(|dir| dir.join("config.toml")).or(self.config.clone());
        let (text, file) = match (path, model) {
            (Some(path), _) => (std::fs::read_to_string(&path).unwrap_or_default(), path.display().to_string()),
            (None, Some(_)) => (String::new(), "--model".to_string()),
            (None, None) => (QUICKSTART.to_string(), "the quickstart".to_string()),
        };
        match Config::place(&text, &file, &self.set, &key) {
            Ok(at) => error.context(at),
            Err(_) => error,
        }
    }

    /// The runs that are resumed, or those that `read` gives with their directory.
    fn place(&self, read: impl FnOnce(&[String]) -> Result<Runs>) -> Result<(Runs, PathBuf)> {
        if let Some(dir) = &self.resume {
            let path = dir.join("config.toml");
            if !path.exists() {
                bail!("--resume {}: there is no config.toml, so no run to go on with", dir.display());
            }
            return Ok((Runs::load(&path, &[], assemble::methods())?, dir.clone()));
        }
        let mut runs = read(&self.set)?;
        // What the run directory keeps has every default written out.
        for config in &mut runs.configs {
            config.data.augment = Some(assemble::augmentation(&config.data));
            assemble::absolute_paths(config)?;
        }
        let dir = match &self.out {
            Some(dir) if dir.join("config.toml").exists() => {
                bail!("{} holds a run already; --resume {} goes on with it", dir.display(), dir.display())
            }
            Some(dir) => dir.clone(),
            None => vacant(&Path::new("runs").join(&runs.name)),
        };
        Ok((runs, dir))
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
    /// NaN (null) for a run that failed.
    top1: f64,
    best_top1: Option<f64>,
    images: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// Runs the command.
pub fn run(args: &Distill) -> Result<()> {
    let (runs, dir) = args.run.open()?;
    if runs.side_by_side && runs.configs.len() == 2 && runs.configs[0].teacher.is_empty() && runs.configs[0].name == "baseline" {
        bail!("baseline = true compares with the student alone, but without a [teacher] that is all this run trains");
    }
    let stop = crate::commands::train::stop_flag()?;
    let (vacant, had_folder) = (!dir.join("config.toml").exists(), dir.is_dir());
    let done = assemble::in_pool(runs.configs[0].threads, || distill(&runs, &dir, &args.run, &stop))?;
    if vacant && done.as_ref().is_err_and(|e| !e.is::<RunFailed>() && !e.is::<Interrupted>()) {
        unclaim(&dir, had_folder);
    }
    done.map_err(|e| args.run.located(e, None, true, &runs.configs[0].data))
}

/// Takes back what [`Session::claim`] made in a vacant place, unless a network was trained there since.
fn unclaim(dir: &Path, had_folder: bool) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    if entries.flatten().all(|e| e.file_name() == "config.toml" || e.file_name() == "lock") {
        for name in ["config.toml", "lock"] {
            let _ = std::fs::remove_file(dir.join(name));
        }
        if !had_folder {
            let _ = std::fs::remove_dir(dir);
        }
    }
}

fn distill(runs: &Runs, dir: &Path, args: &RunArgs, stop: &AtomicBool) -> Result<()> {
    let config = &runs.configs[0];
    let session = Session { config, args, stop, device: assemble::device(&config.device)?, precision: assemble::precision(config)? };
    assemble::pipeline(&config.data)?;
    let splits = assemble::splits(&config.data, config.data.train_limit, config.seed)?;
    splits.notes.iter().for_each(|note| output::message(&format!("note: {note}")));
    // Every name is looked up before the first network trains.
    session.check(runs, &splits)?;
    // One of several runs, gone on with alone: the teachers that were trained for it lie beside it.
    let one_of_several = args.resume.is_some() && dir.join("run.json").exists();
    let several = !one_of_several && (runs.side_by_side || config.teacher.iter().any(|t| t.train.is_some()));
    // Held to the end: two processes that train the parts of one run would mix them up.
    let _lock = if several { Some(session.claim(runs, dir)?) } else { None };
    let home = if one_of_several { dir.join("..") } else { dir.to_path_buf() };

    let mut teachers = vec![];
    for (i, teacher) in config.teacher.iter().enumerate() {
        let place = home.join(if config.teacher.len() > 1 { format!("teacher-{}", i + 1) } else { "teacher".to_string() });
        let (network, result) = match &teacher.train {
            Some(_) if one_of_several => {
                let weights = place.join("student.safetensors").display().to_string();
                let trained = TeacherConfig { weights: Some(weights), train: None, ..teacher.clone() };
                session.teacher(&trained, &splits, &place)?
            }
            _ => session.teacher(teacher, &splits, &place)?,
        };
        teachers.push((teacher, network, result));
    }
    let built: Vec<Teacher> = teachers
        .iter()
        .map(|(t, network, _)| Teacher {
            weight: t.weight,
            cache: t.cache.map(|kind| session.cache(t, kind, &home)),
            ..Teacher::new(t.name.as_str(), Arc::clone(network) as Arc<dyn Model>)
        })
        .collect();
    let place = |config: &Config| match (several, runs.side_by_side) {
        (false, _) => dir.to_path_buf(),
        (true, false) => dir.join("student"),
        (true, true) => dir.join(&config.name),
    };
    let title = |name| if runs.side_by_side { name } else { "student" };
    let students = runs.configs.iter().map(|c| (title(c.name.as_str()), c, place(c))).collect();
    let learned = session.students(students, &splits, &built)?;

    let mut rows = vec![];
    let finished = || learned.iter().filter_map(|l| l.result.as_ref().ok());
    for (i, (teacher, network, own)) in teachers.iter().enumerate() {
        let label = if teachers.len() > 1 { format!("teacher {}", teacher.name) } else { "teacher".to_string() };
        let images = own.as_ref().map_or(0, |(_, n)| *n);
        if let Some(evaluation) = own.as_ref().and_then(|(r, _)| r.test).or(finished().find_map(|r| r.teachers.get(i).copied())) {
            rows.push(row(&label, network, evaluation.top1, own.as_ref().and_then(|(r, _)| r.best.map(|b| b.evaluation.top1)), images)?);
        }
    }
    let trained_on = splits.train()?.len();
    let pair = runs.side_by_side && runs.configs.iter().map(|c| c.name.as_str()).eq(["baseline", "student"]);
    let first = rows.len();
    for (config, Learned { network, result }) in runs.configs.iter().zip(&learned) {
        let label = match config.name.as_str() {
            "baseline" if runs.side_by_side => "student alone",
            name if runs.side_by_side && !pair => name,
            _ if built.is_empty() => "student",
            _ => "student distilled",
        };
        let (top1, best) = result.as_ref().map_or((f64::NAN, None), |r| {
            (r.test.or(r.history.last().map(|h| h.evaluation)).map_or(f64::NAN, |e| e.top1), r.best.map(|b| b.evaluation.top1))
        });
        let error = result.as_ref().err().map(ToString::to_string);
        rows.push(Row { error, ..row(label, network, top1, best, trained_on)? });
    }
    session.table(&rows, first, splits.test().map_or(0, kd_data::Dataset::len), dir)?;
    let failed: Vec<String> = rows.iter().filter_map(|r| Some(format!("{}: {}", r.network, r.error.as_ref()?))).collect();
    if failed.is_empty() {
        return Ok(());
    }
    let summary = format!("{} of {} runs failed; {}", failed.len(), learned.len(), failed.join("; "));
    Err(anyhow::Error::new(RunFailed).context(summary))
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
        error: None,
    })
}

/// How a teacher's training ended, and the number of images it saw.
type Trained = (RunResult, usize);

/// A student after its run.
struct Learned {
    network: Arc<Network>,
    result: kd_train::Result<RunResult>,
}

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
    fn check(&self, runs: &Runs, splits: &Splits) -> Result<()> {
        splits.train()?;
        if self.config.data.unlabelled.is_some() {
            // Before a teacher is trained for nothing.
            assemble::data(self.config, splits, 1, &Device::Cpu)?;
            let losses: Vec<_> = runs.configs.iter().flat_map(|c| &c.loss).cloned().collect();
            if assemble::objectives(&losses)?.iter().all(|o| o.method.needs().labels) {
                bail!("data.unlabelled: all losses need labels; add one that learns from the teacher alone (kd, say), or leave it out");
            }
        }
        for teacher in &self.config.teacher {
            kd_models::find(&teacher.model)?;
            if let Some(path) = &teacher.weights
                && !Path::new(path).is_file()
            {
                bail!("teacher {}: there is no weight file {path}", teacher.name);
            }
        }
        for config in &runs.configs {
            kd_models::find(&config.student.model)?;
            if let Some(path) = &config.student.weights
                && !Path::new(path).is_file()
            {
                bail!("student: there is no weight file {path}");
            }
        }
        Ok(())
    }

    /// Writes the whole config into the directory of a run of several networks, so that it can be resumed as a whole.
    fn claim(&self, runs: &Runs, dir: &Path) -> Result<File> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let path = dir.join("lock");
        let lock = File::options().create(true).append(true).open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        if lock.try_lock().is_err() {
            bail!("{} is in use by another process; wait for it to end, or choose another directory with --out", dir.display());
        }
        let (path, text) = (dir.join("config.toml"), runs.to_toml()?);
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
            if let Some(own) = assemble::normalisation(&file.metadata)?
                && own != splits.info.normalise
            {
                let told = format!(
                    "mean {:?} std {:?}, this run uses mean {:?} std {:?}",
                    own.mean, own.std, splits.info.normalise.mean, splits.info.normalise.std
                );
                output::message(&format!("note: teacher {} was trained with {told}", teacher.name));
            }
            return Ok((Arc::new(network.with_precision(self.precision).frozen()), None));
        }
        let TrainConfig { train_limit, optim, schedule, loss } = teacher.train.clone().unwrap_or_default();
        let config = Config {
            name: teacher.name.clone(),
            teacher: vec![],
            student: kd_train::config::StudentConfig::new(&teacher.model),
            loss,
            optim,
            schedule,
            baseline: false,
            data: kd_train::config::DataConfig {
                train_limit: train_limit.unwrap_or(self.config.data.train_limit),
                unlabelled: None,
                ..self.config.data.clone()
            },
            ..self.config.clone()
        };
        // As text: the key at fault would not be the student's.
        let own = assemble::splits(&config.data, config.data.train_limit, config.seed)
            .map_err(|e| anyhow::anyhow!("teacher {}, its training: {e:#}", teacher.name))?;
        let (network, result) = self.student("teacher", &config, &own, &[], place)?;
        network.set_trainable(false);
        Ok((network, Some((result, own.train()?.len()))))
    }

    /// Where a teacher's logits are kept.
    fn cache(&self, teacher: &TeacherConfig, kind: CacheKind, home: &Path) -> LogitCache {
        let dir = teacher.cache_dir.as_ref().map_or_else(|| home.join(format!("cache-{}", teacher.name)), PathBuf::from);
        let augment = assemble::augmentation(&self.config.data).join(" ");
        // Instruction sets round differently.
        let precision = format!("{:?} on {:?}, {}", self.precision, kd_nn::Level::current(), self.config.device);
        let inputs = [("augmentation", augment), ("precision", precision)].map(|(key, value)| (key.to_string(), value));
        LogitCache { half: kind == CacheKind::LogitsF16, inputs: inputs.into(), ..LogitCache::new(dir) }
    }

    /// Trains `config.student` in `place`.
    pub(crate) fn student(
        &self,
        title: &str,
        config: &Config,
        splits: &Splits,
        teachers: &[Teacher],
        place: &Path,
    ) -> Result<(Arc<Network>, RunResult)> {
        let mut learned = self.students(vec![(title, config, place.to_path_buf())], splits, teachers)?;
        let Learned { network, result } = learned.pop().context("invariant: one student, one result")?;
        Ok((network, result?))
    }

    /// Trains the students of several configs side by side, each under its title in its place: the one way that teachers, baselines and
    /// students take. One alone that fails is an error; of several, the others are of use.
    fn students(&self, runs: Vec<(&str, &Config, PathBuf)>, splits: &Splits, teachers: &[Teacher]) -> Result<Vec<Learned>> {
        let shared = runs.first().context("invariant: at least one run")?.1;
        let shape = assemble::input(shared, splits)?;
        let mut board = Board::new(runs.iter().map(|r| r.0), self.args.quiet);
        let (mut networks, mut students, mut views, mut means) = (vec![], vec![], 1, false);
        for ((_, config, place), progress) in runs.iter().zip(board.each()) {
            let network = Arc::new(self.network(config, splits, shape)?.with_precision(self.precision));
            let objectives = assemble::objectives(&config.loss)?;
            views = objectives.iter().map(Objective::views).fold(views, usize::max);
            means |= objectives.iter().any(|o| o.method.needs().class_means);
            let student = Student {
                model: Arc::clone(&network) as Arc<dyn Model>,
                objectives,
                optim: config.optim.clone(),
                schedule: config.schedule.clone(),
                options: config.run.clone(),
                place: Some(RunPlace {
                    command: std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect(),
                    metadata: assemble::metadata(&config.student.model, shape, splits, &config.data)?,
                    ..RunPlace::new(place, config.to_toml()?)
                }),
            };
            networks.push(network);
            students.push((student, progress as &mut dyn Sink));
        }
        let teachers: Vec<Teacher> = teachers.to_vec();
        let mut data = assemble::data(shared, splits, views, &self.device)?;
        let epochs = runs.iter().zip(&students).map(|(r, (s, _))| r.1.schedule.epochs + s.phase_epochs()).max().unwrap_or(0);
        for Teacher { name, cache, .. } in &teachers {
            if let Some(cache) = cache.as_ref().filter(|_| !self.args.quiet) {
                let mib = cache.bytes(epochs, views, data.train.samples(), data.classes) as f64 / (1 << 20) as f64;
                output::message(&format!("note: the logits of teacher {name} take {mib:.1} MiB in {}", cache.dir.display()));
            }
        }
        if means && let (Some(config), Some(teacher)) = (shared.teacher.first(), teachers.first()) {
            data.class_means = assemble::class_means(config, teacher.model.as_ref(), shared, splits, &self.device)?;
        }
        let failed = |e: kd_train::Error| match e.is_usage() || assemble::is_unusable_data(&e) {
            true => e.into(),
            false => anyhow::Error::new(RunFailed).context(e.to_string()),
        };
        let machine = self.args.profile.then(kd_nn::measure::Machine::measure);
        if machine.is_some() {
            kd_nn::profile::start();
        }
        let outcomes = kd_train::train_all(Shared { teachers, data, seed: shared.seed }, students, self.stop);
        if let Some(machine) = machine {
            let steps = board.each().map(|p| p.steps()).max().unwrap_or(0);
            let titles = runs.iter().map(|r| r.0).collect::<Vec<_>>().join(", ");
            let report = Report::new(machine, kd_nn::profile::stop(), steps);
            output::message(&format!("{titles}: {steps} steps, evaluations included\n{}", report.text()));
        }
        let outcomes = outcomes.map_err(failed)?;
        let several = runs.len() > 1;
        let mut learned = vec![];
        for (((title, ..), network), outcome) in runs.iter().zip(networks).zip(outcomes) {
            let result = match outcome {
                Ok(Outcome::Finished(result)) => Ok(*result),
                Ok(Outcome::Interrupted { epoch, step }) => {
                    let at = format!("{title} stopped in epoch {}, after step {step}; everything up to there is saved", epoch + 1);
                    return Err(anyhow::Error::new(Interrupted).context(at));
                }
                Err(e) if several => Err(e),
                Err(e) => return Err(failed(e)),
            };
            learned.push(Learned { network, result });
        }
        Ok(learned)
    }

    /// The network of a config as it starts.
    fn network(&self, config: &Config, splits: &Splits, shape: [usize; 3]) -> Result<Network> {
        let classes = splits.info.class_names.len();
        let model = &config.student.model;
        if let Some(path) = &config.student.weights {
            let file = kd_weights::read(Path::new(path))?;
            let network = assemble::network(model, Some(classes), shape, DType::F32, &self.device)?;
            network.init(Rng::new(config.seed).named("init"))?;
            let options = kd_weights::LoadOptions { new_head: config.student.new_head, ..Default::default() };
            let outputs = kd_weights::classes(&file, network.graph());
            let hint = match outputs {
                Some(n) if n != classes => {
                    format!(" ({n} outputs, the data has {classes} classes: student.new_head = true begins the classifier anew)")
                }
                _ => String::new(),
            };
            kd_weights::load_into(&network, &file, &options).with_context(|| format!("student, weights {path}{hint}"))?;
            return Ok(network);
        }
        let network = assemble::network(model, Some(classes), shape, DType::F32, &self.device)?;
        // Keyed by the seed and each parameter's name: a baseline and a distilled student begin alike.
        network.init(Rng::new(config.seed).named("init"))?;
        Ok(network)
    }

    /// The networks, the students from row `first` on.
    fn table(&self, rows: &[Row], first: usize, test: usize, dir: &Path) -> Result<()> {
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
                    if r.error.is_some() { "failed".to_string() } else { format!("{:.2} %", r.top1) },
                    r.best_top1.map_or("-".to_string(), |b| format!("{b:.2} %")),
                ]
            })
            .collect();
        output::table(
            &["network", "model", "parameters", "MACs", "trained on", "top-1", "best epoch"],
            &[false, false, true, true, true, true, true],
            &cells,
        )?;
        if let Some(alone) = rows.iter().find(|r| r.network == "student alone" && r.error.is_none()) {
            output::line("")?;
            for row in rows[first..].iter().filter(|r| r.network != alone.network && r.error.is_none()) {
                let name = if row.network == "student distilled" { "distillation" } else { row.network.as_str() };
                output::line(&format!("{name}: {}", verdict(alone.top1, row.top1, test)))?;
            }
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
        "{gain:+.2} points over the student alone, {weight} twice the sampling error of {test} test images ({error:.2}); one seed of many"
    )
}
