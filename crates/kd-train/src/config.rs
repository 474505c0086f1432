//! The configuration of a run.
//!
//! TOML; every section is optional but `[student]`. Unknown keys, wrong types and values out of range are refused with file, line and what
//! would be right. `--set a.b=c` overrides single values (`loss.0.weight=0.5` reaches into lists). [`Config::to_toml`] writes the
//! resolved configuration, every default included, and reading that back gives the same configuration.
//!
//! ```toml
//! seed = 1
//! [data]
//! source = "cifar100:DIR"
//! [teacher]                # or [[teacher]] for several: losses then see the mean of their logits, by each one's `weight`
//! model = "resnet56"
//! weights = "resnet56.pth" # or a section [teacher.train] with its own optim, schedule and loss
//! cache = "logits"         # keeps them for later runs over the same data with the same seed
//! [student]
//! model = "resnet20"
//! [[loss]]
//! method = "kd"
//! weight = 0.9
//! teacher = "resnet56"     # one of several, by name; what needs more than logits must say which
//! temperature = 4.0        # the method's own parameters stand beside
//! [optim]
//! lr = 0.05
//! [schedule]
//! epochs = 240
//! [run]
//! checkpoint_every = 1
//! ```
//!
//! A list `[[run]]` describes several runs side by side: [`Runs`].

mod runs;
mod tree;

use std::fmt;
use std::path::Path;

use kd_core::{MethodEntry, Schedule};
use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

pub use self::runs::Runs;
use self::tree::Node;
pub use self::tree::did_you_mean;
use crate::files::{Disk, Files};
use crate::job::mean_will_do;
use crate::{Error, OptimConfig, Result};

/// Everything a run is made from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The run's name: its directory is `runs/<name>`. Default: teacher, student and methods.
    #[serde(default)]
    pub name: String,
    /// Everything random follows from it.
    #[serde(default = "one")]
    pub seed: u64,
    /// `cpu`, `cuda:N` or `metal`.
    #[serde(default = "cpu")]
    pub device: String,
    /// Threads of computation; 0: all cores.
    #[serde(default)]
    pub threads: usize,
    /// How exactly activations are computed.
    #[serde(default)]
    pub precision: Precision,
    /// Also trains the student alone (`ce`), to compare with.
    #[serde(default)]
    pub baseline: bool,
    /// Images and labels.
    #[serde(default)]
    pub data: DataConfig,
    /// None, one (`[teacher]`) or several (`[[teacher]]`).
    #[serde(default, skip_serializing_if = "Vec::is_empty", serialize_with = "one_or_many")]
    pub teacher: Vec<TeacherConfig>,
    /// The network to train.
    pub student: StudentConfig,
    /// The objective, a weighted sum. Default: `ce`; with a teacher 0.1 `ce` + 0.9 `kd` at temperature 4, as the CIFAR-100 tables have it.
    #[serde(default)]
    pub loss: Vec<LossConfig>,
    /// The optimiser.
    #[serde(default)]
    pub optim: OptimConfig,
    /// Epochs and learning rate.
    #[serde(default)]
    pub schedule: Schedule,
    /// Checkpoints, evaluations, checks.
    #[serde(default)]
    pub run: RunOptions,
}

fn one() -> u64 {
    1
}

fn cpu() -> String {
    "cpu".to_string()
}

fn one_or_many<S: Serializer>(teachers: &[TeacherConfig], s: S) -> Result<S::Ok, S::Error> {
    match teachers {
        [teacher] => teacher.serialize(s),
        _ => teachers.serialize(s),
    }
}

/// How exactly activations are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// f32, in the order of the reference.
    Strict,
    /// f32, in any order.
    #[default]
    Fast,
    /// As `fast`, with a teacher in bf16.
    Bf16Teacher,
}

/// Images and labels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// The data set and its place: `digits`, `cifar100:DIR`, ...
    pub source: String,
    /// Samples of a step.
    pub batch_size: usize,
    /// Augmentations in order; absent: what the data set's registry entry says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub augment: Option<Vec<String>>,
    /// The same for the second view, of methods that want one (mlld); absent: `augment`, then `randaugment:2`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub augment_strong: Option<Vec<String>>,
    /// Samples to train on, a class-balanced subset; 0: all.
    pub train_limit: usize,
    /// Share of the training labels replaced by random ones.
    pub label_noise: f64,
    /// Share of the training set held out to choose the best student by.
    pub validation: f64,
    /// Which mean and deviation the images are normalised with.
    pub normalise: Normalisation,
    /// Images of no class that join the training set for the losses that need no labels: `folder:PATH`, `stl10:DIR`, any data set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unlabelled: Option<String>,
    /// A group for each class: a file with one a line, or `last-word` of the classes' names; absent: the data set's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class_groups: Option<String>,
}

/// Which mean and deviation images are normalised with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Normalisation {
    /// Those that the data set states.
    #[default]
    Published,
    /// Those of all its training images, as evaluation shows them.
    Computed,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            source: "digits".to_string(),
            batch_size: 64,
            augment: None,
            augment_strong: None,
            train_limit: 0,
            label_noise: 0.0,
            validation: 0.0,
            normalise: Normalisation::default(),
            unlabelled: None,
            class_groups: None,
        }
    }
}

/// A network to learn from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TeacherConfig {
    /// What messages call it; default: its model.
    #[serde(default)]
    pub name: String,
    /// Its name in the model registry.
    pub model: String,
    /// Its weights; absent when it is trained first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<String>,
    /// Its share in the mean of several teachers' logits; all shares are divided by their sum.
    #[serde(default = "unit")]
    pub weight: f64,
    /// Keeps its logits for later runs over the same data with the same seed: `logits` (f32, the same bits) or `logits-f16` (rounded).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheKind>,
    /// Where; default: `cache-<name>` in the run directory. Runs that are to share a cache name it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_dir: Option<String>,
    /// How to train it first; absent when it has weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train: Option<TrainConfig>,
    /// How its mean embedding of each class is made, for the losses that need it.
    #[serde(default)]
    pub class_means: ClassMeansConfig,
}

/// How class means are made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClassMeansConfig {
    /// A file that holds them (`kd-cli class-means`, or KD++'s JSON); absent: they are computed over the training set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Over one augmented epoch, as KD++'s released script, instead of the images as they are.
    pub augment: bool,
    /// Rounds every number of an embedding, and every mean, to so many decimals (4 in KD++'s released script).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub round_decimals: Option<u32>,
}

/// More decimals than an f64 keeps apart; a slip of the finger asks for more.
const MOST_DECIMALS: u32 = 12;

fn unit() -> f64 {
    1.0
}

/// What of a teacher is kept on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CacheKind {
    /// Its logits in f32.
    Logits,
    /// Its logits in f16.
    LogitsF16,
}

/// A training of its own.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Samples to train on, 0: all; default: as many as the student (`data.train_limit`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_limit: Option<usize>,
    /// The optimiser.
    pub optim: OptimConfig,
    /// Epochs and learning rate.
    pub schedule: Schedule,
    /// The objective; default `ce`.
    pub loss: Vec<LossConfig>,
}

/// The network to train.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StudentConfig {
    /// Its name in the model registry.
    pub model: String,
    /// Weights to start from; absent: the paper's initialisation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<String>,
    /// Begins the classifier anew, whatever the weights hold for it: a network that was trained on other classes.
    #[serde(default)]
    pub new_head: bool,
}

impl StudentConfig {
    /// `model`, begun anew.
    pub fn new(model: &str) -> Self {
        Self { model: model.to_string(), weights: None, new_head: false }
    }
}

/// Checkpoints, evaluations, checks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunOptions {
    /// Epochs between checkpoints; 0: only at the end and when stopped.
    pub checkpoint_every: usize,
    /// Steps between checkpoints within an epoch; 0: none.
    pub checkpoint_steps: usize,
    /// Epochs between evaluations; 0: only at the end.
    pub eval_every: usize,
    /// Trains although a teacher knows hardly more than chance.
    pub allow_bad_teacher: bool,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self { checkpoint_every: 1, checkpoint_steps: 0, eval_every: 1, allow_bad_teacher: false }
    }
}

/// One `[[loss]]`.
#[derive(Clone, Debug, PartialEq)]
pub struct LossConfig {
    /// Its name in the method registry.
    pub method: String,
    /// Its factor in the sum.
    pub weight: f64,
    /// Which of several teachers it learns from, by name; absent: the only one, or the weighted mean of the logits of all.
    pub teacher: Option<String>,
    /// Epochs over which the factor grows to `weight`; 0: none. A method with a parameter of this name has it for itself.
    pub warmup_epochs: usize,
    /// What the first epoch counts as in the warm-up: 1, or 0 for a first epoch without this loss.
    pub warmup_first_epoch: usize,
    /// The method's own parameters.
    pub params: Map<String, Value>,
}

impl LossConfig {
    /// `method` with weight 1, no warm-up and its own defaults.
    pub fn new(method: &str) -> Self {
        Self { method: method.to_string(), weight: 1.0, teacher: None, warmup_epochs: 0, warmup_first_epoch: 1, params: Map::new() }
    }

    /// As [`LossConfig::new`], with every default written out, as a config that was read has it.
    pub fn resolved(method: &str, methods: &[MethodEntry]) -> Self {
        let mut loss = Self::new(method);
        methods.iter().filter(|entry| entry.name == method).for_each(|entry| loss.fill_defaults(entry));
        loss
    }

    fn fill_defaults(&mut self, entry: &MethodEntry) {
        for parameter in entry.parameters.iter().filter(|p| !p.default.is_empty()) {
            // TOML has no null: a parameter that is off by default stays absent.
            if let Ok(value) = serde_json::from_str::<Value>(parameter.default)
                && !value.is_null()
            {
                self.params.entry(parameter.name).or_insert(value);
            }
        }
    }
}

/// More threads than any machine has cores; a slip of the finger asks for more.
const MOST_THREADS: usize = 1024;

const WARMUP_EPOCHS: &str = "warmup_epochs";

const LOSS_KEYS: [&str; 5] = ["method", "weight", "teacher", WARMUP_EPOCHS, "warmup_first_epoch"];

// By hand: a method's own `warmup_epochs` stands in the place of the common one.
impl Serialize for LossConfig {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut map = s.serialize_map(None)?;
        map.serialize_entry("method", &self.method)?;
        map.serialize_entry("weight", &self.weight)?;
        if let Some(teacher) = &self.teacher {
            map.serialize_entry("teacher", teacher)?;
        }
        if !self.params.contains_key(WARMUP_EPOCHS) {
            map.serialize_entry(WARMUP_EPOCHS, &self.warmup_epochs)?;
        }
        map.serialize_entry("warmup_first_epoch", &self.warmup_first_epoch)?;
        self.params.iter().try_for_each(|(key, value)| map.serialize_entry(key, value))?;
        map.end()
    }
}

// By hand: serde's flatten would forget where the values were written.
impl<'de> Deserialize<'de> for LossConfig {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = LossConfig;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a section with a `method`")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<LossConfig, A::Error> {
                let mut loss = LossConfig::new("");
                while let Some(key) = map.next_key::<String>()? {
                    match key.as_str() {
                        "method" => loss.method = map.next_value()?,
                        "weight" => loss.weight = map.next_value()?,
                        "teacher" => loss.teacher = map.next_value()?,
                        // Whose it is shows once the method is known.
                        WARMUP_EPOCHS => {
                            loss.warmup_epochs = map.next_value()?;
                            loss.params.insert(key, loss.warmup_epochs.into());
                        }
                        "warmup_first_epoch" => loss.warmup_first_epoch = map.next_value()?,
                        _ => {
                            loss.params.insert(key, map.next_value()?);
                        }
                    }
                }
                if loss.method.is_empty() {
                    return Err(serde::de::Error::missing_field("method"));
                }
                Ok(loss)
            }
        }
        d.deserialize_map(Entries)
    }
}

impl Config {
    /// Reads a file. See [`Config::parse`].
    pub fn load(path: &Path, overrides: &[String], methods: &[MethodEntry]) -> Result<Self> {
        Self::parse(&read(path)?, &path.display().to_string(), overrides, methods)
    }

    /// Reads `text`, applies the overrides, fills in every default and checks every value. `file` is what messages call it;
    /// `methods` is every registered method.
    ///
    /// # Errors
    /// [`Error::Config`], with the line or override at fault.
    pub fn parse(text: &str, file: &str, overrides: &[String], methods: &[MethodEntry]) -> Result<Self> {
        let mut tree = written(text, file, overrides)?;
        if tree.take_list("run").is_some() {
            return Err(tree.error("run", "this file describes several runs, where one is asked for", None));
        }
        Self::from_tree(&tree, methods)
    }

    fn from_tree(tree: &Node, methods: &[MethodEntry]) -> Result<Self> {
        let mut config: Self = tree.deserialize()?;
        config.fill_defaults();
        Check { tree, methods }.config(&mut config)?;
        Ok(config)
    }

    /// Where the value at the dotted `key` of `text` was written: `file:line`, or the override. Of a key that is absent, where its section
    /// is; for messages about what shows only once the data is there.
    ///
    /// # Errors
    /// As [`Config::parse`], for what is no TOML.
    pub fn place(text: &str, file: &str, overrides: &[String], key: &str) -> Result<String> {
        Ok(written(text, file, overrides)?.place(key).to_string())
    }

    /// The resolved configuration as a file.
    pub fn to_toml(&self) -> Result<String> {
        toml_of(self)
    }

    fn fill_defaults(&mut self) {
        if self.loss.is_empty() {
            self.loss = vec![LossConfig::new("ce")];
            if !self.teacher.is_empty() {
                self.loss[0].weight = 0.1;
                self.loss.push(LossConfig { weight: 0.9, ..LossConfig::new("kd") });
            }
        }
        for teacher in &mut self.teacher {
            if teacher.name.is_empty() {
                teacher.name.clone_from(&teacher.model);
            }
            if let Some(train) = &mut teacher.train
                && train.loss.is_empty()
            {
                train.loss = vec![LossConfig::new("ce")];
            }
        }
        if self.name.is_empty() {
            let teachers = self.teacher.iter().map(|t| t.model.as_str());
            let methods = self.loss.iter().map(|l| l.method.as_str()).filter(|&m| m != "ce" || self.loss.len() == 1);
            self.name = teachers.chain([self.student.model.as_str()]).chain(methods).collect::<Vec<_>>().join("-");
        }
    }
}

fn read(path: &Path) -> Result<String> {
    let bytes = Disk.read(path).map_err(|e| Error::io("reading", path, e))?;
    String::from_utf8(bytes).map_err(|e| Error::Config { at: path.display().to_string(), message: e.to_string(), hint: None })
}

/// A file as it was meant: with the overrides, and one spelling of the teachers.
fn written(text: &str, file: &str, overrides: &[String]) -> Result<Node> {
    let mut tree = Node::parse(text, file)?;
    overrides.iter().try_for_each(|o| tree.set(o))?;
    tree.make_list("teacher");
    Ok(tree)
}

fn toml_of(value: &impl Serialize) -> Result<String> {
    toml::to_string(value).map_err(|e| Error::Refused(format!("this configuration cannot be written as TOML: {e}")))
}

/// The checks that go beyond types, with the tree to name the place at fault.
struct Check<'a> {
    tree: &'a Node,
    methods: &'a [MethodEntry],
}

impl Check<'_> {
    fn config(&self, config: &mut Config) -> Result<()> {
        let data = &config.data;
        self.require("name", !config.name.contains(['/', '\\']) && !config.name.starts_with('.'), &config.name, "a folder's name")?;
        self.require("device", is_device(&config.device), &config.device, "cpu, cuda:N or metal")?;
        self.require("threads", config.threads <= MOST_THREADS, config.threads, &format!("0 (all cores) to {MOST_THREADS}"))?;
        self.require("data.batch_size", data.batch_size >= 1, data.batch_size, "at least 1")?;
        self.require("data.label_noise", (0.0..=1.0).contains(&data.label_noise), data.label_noise, "from 0 to 1")?;
        self.require("data.validation", (0.0..1.0).contains(&data.validation), data.validation, "at least 0 and less than 1")?;
        if config.student.new_head && config.student.weights.is_none() {
            return Err(self.tree.error("student.new_head", "`student.new_head` goes with `student.weights`, which is absent", None));
        }
        for i in 0..config.teacher.len() {
            let names = &config.teacher[..i];
            let teacher = &config.teacher[i];
            let path = format!("teacher.{i}");
            self.require(
                &format!("{path}.name"),
                names.iter().all(|t| t.name != teacher.name),
                &teacher.name,
                "another name than any other teacher's",
            )?;
            self.require(&format!("{path}.weight"), teacher.weight.is_finite() && teacher.weight >= 0.0, teacher.weight, "0 or more")?;
            if teacher.cache_dir.is_some() && teacher.cache.is_none() {
                let message = format!("teacher {} has a `cache_dir` but no `cache`", teacher.name);
                return Err(self.tree.error(&format!("{path}.cache_dir"), message, Some("set cache = \"logits\"".to_string())));
            }
            let means = &teacher.class_means;
            if let Some(decimals) = means.round_decimals {
                let allowed = format!("0 to {MOST_DECIMALS}");
                self.require(&format!("{path}.class_means.round_decimals"), decimals <= MOST_DECIMALS, decimals, &allowed)?;
            }
            if i > 0 && *means != ClassMeansConfig::default() {
                let message =
                    format!("`{path}.class_means` can be set for the first teacher only; the others' are computed over the training set");
                return Err(self.tree.error(&format!("{path}.class_means"), message, None));
            }
            if means.file.is_some() && (means.augment || means.round_decimals.is_some()) {
                let message = "class means are either read from `file` or computed with `augment` and `round_decimals`";
                return Err(self.tree.error(&format!("{path}.class_means"), message, None));
            }
            if teacher.weights.is_some() == teacher.train.is_some() {
                let message = format!("teacher {} must have either `weights` or a section `train`", teacher.name);
                return Err(self.tree.error(&path, message, None));
            }
        }
        if !config.teacher.is_empty() && config.teacher.iter().all(|t| t.weight == 0.0) {
            return Err(self.tree.error("teacher", "every teacher has weight 0, one must have more", None));
        }
        for (i, teacher) in config.teacher.iter_mut().enumerate() {
            if let Some(train) = &mut teacher.train {
                self.training(&format!("teacher.{i}.train."), &train.optim, &train.schedule, &mut train.loss, &[])?;
            }
        }
        self.training("", &config.optim, &config.schedule, &mut config.loss, &config.teacher)
    }

    fn training(
        &self,
        prefix: &str,
        optim: &OptimConfig,
        schedule: &Schedule,
        losses: &mut [LossConfig],
        teachers: &[TeacherConfig],
    ) -> Result<()> {
        optim.validate().and_then(|()| schedule.validate()).map_err(|e| self.locate(prefix, e))?;
        losses.iter_mut().enumerate().try_for_each(|(i, loss)| self.loss(&format!("{prefix}loss.{i}"), loss, teachers))
    }

    fn loss(&self, path: &str, loss: &mut LossConfig, teachers: &[TeacherConfig]) -> Result<()> {
        let own = |key: &str| format!("{path}.{key}");
        let Some(entry) = self.methods.iter().find(|m| m.name == loss.method) else {
            let message = format!("`{}` is no known method", loss.method);
            return Err(self.tree.error(&own("method"), message, Some(did_you_mean(&loss.method, self.methods.iter().map(|m| m.name)))));
        };
        if entry.parameters.iter().any(|p| p.name == WARMUP_EPOCHS) {
            loss.warmup_epochs = 0;
        } else {
            loss.params.remove(WARMUP_EPOCHS);
        }
        let known = |key: &str| entry.parameters.iter().any(|p| p.name == key);
        if let Some(key) = loss.params.keys().find(|key| !known(key)) {
            let names = LOSS_KEYS.iter().copied().chain(entry.parameters.iter().map(|p| p.name));
            return Err(self.tree.error(&own(key), format!("`{key}` is no parameter of {}", entry.name), Some(did_you_mean(key, names))));
        }
        loss.fill_defaults(entry);
        self.require(&own("weight"), loss.weight.is_finite(), loss.weight, "a finite number")?;
        let method = (entry.build)(&Value::Object(loss.params.clone())).map_err(|e| match &e {
            kd_core::Error::Param { key, .. } => self.tree.error(&own(key.rsplit('.').next().unwrap_or(key)), &e, None),
            _ => self.tree.error(path, format!("method {}: {e}", entry.name), None),
        })?;
        if let Some(name) = &loss.teacher
            && !teachers.iter().any(|t| t.name == *name)
        {
            let hint = did_you_mean(name, teachers.iter().map(|t| t.name.as_str()));
            return Err(self.tree.error(&own("teacher"), format!("there is no teacher `{name}`"), (!teachers.is_empty()).then_some(hint)));
        }
        let needs = method.needs();
        if teachers.len() > 1 && loss.teacher.is_none() && !mean_will_do(&needs) {
            let names: Vec<&str> = teachers.iter().map(|t| t.name.as_str()).collect();
            let message = format!("method {} needs more than logits, so one of the {} teachers", entry.name, teachers.len());
            return Err(self.tree.error(
                &own("method"),
                message,
                Some(format!("set `teacher` of this loss to one of {}", names.join(", "))),
            ));
        }
        if teachers.is_empty() && !needs.teacher.is_empty() {
            let hint = Some("add a section [teacher] with `model` and `weights`".to_string());
            return Err(self.tree.error(&own("method"), format!("method {} needs a teacher, and there is none", entry.name), hint));
        }
        Ok(())
    }

    fn require(&self, path: &str, holds: bool, value: impl fmt::Display, allowed: &str) -> Result<()> {
        if holds { Ok(()) } else { Err(self.tree.error(path, format!("`{path}` is {value}, must be {allowed}"), None)) }
    }

    /// A range error of a type that knows its own key, put at the place of that key.
    fn locate(&self, prefix: &str, e: kd_core::Error) -> Error {
        match e {
            kd_core::Error::Param { key, value, allowed } => {
                let path = format!("{prefix}{key}");
                self.tree.error(&path, format!("`{path}` is {value}, must be {allowed}"), None)
            }
            e => Error::Setup(e),
        }
    }
}

fn is_device(name: &str) -> bool {
    matches!(name, "cpu" | "metal" | "cuda") || name.strip_prefix("cuda:").is_some_and(|n| n.parse::<usize>().is_ok())
}
