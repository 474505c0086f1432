//! Several runs in one file.

use std::path::Path;

use kd_core::{MethodEntry, Schedule};
use serde::Serialize;

use super::{Config, DataConfig, LossConfig, Precision, RunOptions, StudentConfig, TeacherConfig, one_or_many, read, written};
use crate::{OptimConfig, Result};

/// Keys of a `[[run]]`.
const OWN: [&str; 6] = ["name", "student", "loss", "optim", "schedule", "run"];

/// Names that a run directory has use for itself.
const TAKEN: [&str; 6] = ["teacher", "checkpoints", "config.toml", "run.json", "metrics.jsonl", "lock"];

/// The name of the student alone.
const BASELINE: &str = "baseline";

/// What a config file describes: one run, or several that learn side by side from the same teachers, on the same data in the same order.
///
/// The file of several has a `[[run]]` for each, with a `name` and any of `student`, `loss`, `optim`, `schedule` and `run`. Everything else,
/// and what a run leaves out, stands above as in the file of one run; only its section `[run]` is called `[options]`, because the list has
/// taken the name. Sections are merged key by key, a list replaces the whole list.
///
/// ```toml
/// [student]
/// model = "resnet20"
/// [options]
/// checkpoint_every = 10
/// [[run]]
/// name = "alone"
/// loss = [{ method = "ce" }]
/// [[run]]
/// name = "kd-at-half-the-rate"
/// optim = { lr = 0.025 }
/// ```
/// `baseline = true` is one more run, of the first one's student alone (`ce`).
#[derive(Clone, Debug, PartialEq)]
pub struct Runs {
    /// The directory of all of them is `runs/<name>`.
    pub name: String,
    /// Whether there is a directory in it for each, by its name; else there is one run, and the directory is its own.
    pub side_by_side: bool,
    /// Each of them as the config of one run. All have the same data, seed, teachers, precision and device.
    pub configs: Vec<Config>,
}

impl Runs {
    /// Reads a file; otherwise as [`Runs::parse`].
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn load(path: &Path, overrides: &[String], methods: &[MethodEntry]) -> Result<Self> {
        Self::parse(&read(path)?, &path.display().to_string(), overrides, methods)
    }

    /// Reads `text` as [`Config::parse`] does.
    ///
    /// # Errors
    /// As [`Config::parse`]; two runs of one name; a run with something that all must share.
    pub fn parse(text: &str, file: &str, overrides: &[String], methods: &[MethodEntry]) -> Result<Self> {
        let mut tree = written(text, file, overrides)?;
        let Some(items) = tree.take_list("run") else {
            let config = Config::from_tree(&tree, methods)?;
            if !config.baseline {
                return Ok(Self { name: config.name.clone(), side_by_side: false, configs: vec![config] });
            }
            let student = Config { name: "student".to_string(), baseline: false, ..config.clone() };
            return Ok(Self { name: config.name, side_by_side: true, configs: vec![alone(&student, methods), student] });
        };
        tree.rename("options", "run")?;
        if items.is_empty() {
            return Err(tree.error("run", "`run` is empty, must have at least one run", None));
        }
        let mut configs: Vec<Config> = vec![];
        for (i, mut own) in items.into_iter().enumerate() {
            own.rename("options", "run")?;
            if let Some(key) = own.keys().find(|key| !OWN.contains(key)) {
                let hint = Some(format!("runs side by side share their data, seed, teachers and precision; a run has {}", OWN.join(", ")));
                return Err(own.error(key, format!("`run.{i}.{key}` cannot differ from run to run"), hint));
            }
            let Some(name) = own.text("name") else {
                return Err(own.error("name", format!("`run.{i}` has no `name`, which must be given"), None));
            };
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_+.=".contains(c);
            let taken = TAKEN.contains(&name) || ["teacher-", "cache-"].iter().any(|own| name.starts_with(own));
            if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) || taken {
                let message = format!("`run.{i}.name` is {name:?}, must be a folder's name of letters, digits and -_+.=");
                return Err(own.error("name", message, taken.then(|| format!("the run directory has its own {name}"))));
            }
            let mut merged = tree.clone();
            merged.overlay(own);
            let config = Config::from_tree(&merged, methods)?;
            if i == 0 && config.baseline {
                configs.push(alone(&config, methods));
            }
            if configs.iter().any(|c| c.name == config.name) {
                let message = format!("`run.{i}.name` is {}, must be another name than any other run's", config.name);
                return Err(merged.error("name", message, None));
            }
            configs.push(Config { baseline: false, ..config });
        }
        let name = tree.text("name").map(str::to_string).unwrap_or_else(|| {
            let teachers = configs[0].teacher.iter().map(|t| t.model.as_str());
            teachers.chain(["runs"]).collect::<Vec<_>>().join("-")
        });
        Ok(Self { name, side_by_side: true, configs })
    }

    /// The resolved configuration as a file; reading it gives the same runs.
    pub fn to_toml(&self) -> Result<String> {
        #[derive(Serialize)]
        struct Whole<'a> {
            name: &'a str,
            seed: u64,
            device: &'a str,
            threads: usize,
            precision: Precision,
            data: &'a DataConfig,
            #[serde(skip_serializing_if = "<[_]>::is_empty", serialize_with = "one_or_many")]
            teacher: &'a [TeacherConfig],
            run: Vec<Own<'a>>,
        }
        #[derive(Serialize)]
        struct Own<'a> {
            name: &'a str,
            student: &'a StudentConfig,
            loss: &'a [LossConfig],
            optim: &'a OptimConfig,
            schedule: &'a Schedule,
            run: &'a RunOptions,
        }
        let first = &self.configs[0];
        if !self.side_by_side {
            return first.to_toml();
        }
        let whole = Whole {
            name: &self.name,
            seed: first.seed,
            device: &first.device,
            threads: first.threads,
            precision: first.precision,
            data: &first.data,
            teacher: &first.teacher,
            run: self
                .configs
                .iter()
                .map(|Config { name, student, loss, optim, schedule, run, .. }| Own { name, student, loss, optim, schedule, run })
                .collect(),
        };
        super::toml_of(&whole)
    }
}

/// The same student on labels only. The teachers stay: what runs side by side has the same ones.
fn alone(config: &Config, methods: &[MethodEntry]) -> Config {
    Config { name: BASELINE.to_string(), loss: vec![LossConfig::resolved("ce", methods)], baseline: false, ..config.clone() }
}
