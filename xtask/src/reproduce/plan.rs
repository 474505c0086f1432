//! From rows to run configs, and which of them one process can share.
//!
//! A row's config has two parts. *Shared* is what all runs of a process have in common: data, augmentation, seed, batch size, the teacher
//! and its weights. The *variant* is the rest: student, losses, optimiser, schedule, run options; one `[[run]]` of a shared config.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::budget::{self, Budget};
use super::kd_cli::Registry;
use super::table::{Row, Table, merge};

/// What the command line asks for.
pub(super) struct Settings {
    pub(super) budget: Budget,
    pub(super) seeds: u64,
    pub(super) epochs: Option<usize>,
    pub(super) train_limit: Option<usize>,
    pub(super) eval_every: Option<usize>,
    pub(super) data: Option<String>,
    pub(super) weights: BTreeMap<String, PathBuf>,
    pub(super) train_teachers: bool,
    pub(super) apart: bool,
    pub(super) out: PathBuf,
}

/// Classes, and images of a batch and of the training set, of the budget `smoke`: one step an epoch.
const SMOKE_IMAGES: u64 = 10;
/// Two epochs, so that what happens between epochs happens.
const SMOKE_EPOCHS: u64 = 2;

/// A table's rows, ready to run or not.
pub(super) struct Plan {
    pub(super) rows: Vec<Planned>,
    /// Teachers that the runnable rows need and nobody gave weights for: their training, a whole config.
    pub(super) teachers: BTreeMap<String, Value>,
    /// Training images of the budget; 0: all.
    pub(super) train_limit: u64,
    /// What `kd-cli` opens.
    pub(super) source: String,
}

/// A row with its config.
pub(super) struct Planned {
    pub(super) row: Row,
    /// Its config, or why there is none.
    pub(super) config: Result<RowConfig, String>,
}

/// A runnable row's config.
#[derive(Clone)]
pub(super) struct RowConfig {
    /// What it shares with others, without the seed.
    pub(super) shared: Value,
    /// What is its own.
    pub(super) variant: Map<String, Value>,
    /// Epochs of the paper, and of this budget.
    pub(super) paper_epochs: u64,
    pub(super) epochs: u64,
}

impl Plan {
    pub(super) fn new(table: &Table, rows: Vec<Row>, settings: &Settings, registry: &Registry) -> Result<Self> {
        let mut teachers = BTreeMap::new();
        let mut planned = Vec::new();
        for row in rows {
            let config = match (registry.missing(&row), source(table, settings, registry, &row)) {
                (Some(reason), _) => Err(reason),
                (None, Err(reason)) => Err(reason),
                (None, Ok(source)) => row_config(table, &row, &source, settings, registry, &mut teachers),
            };
            planned.push(Planned { row, config });
        }
        Ok(Self {
            train_limit: limit(table, settings),
            rows: planned,
            teachers,
            source: settings.data.clone().unwrap_or_else(|| table.data.clone()),
        })
    }
}

/// What `kd-cli` is to open, or how to get it.
fn source(table: &Table, settings: &Settings, registry: &Registry, row: &Row) -> Result<String, String> {
    if settings.budget == Budget::Smoke {
        let networks = row.teacher_model.iter().chain([&row.student]);
        let side = if networks.map(|n| registry.side(n)).max() > Some(64) { 64 } else { 32 };
        return Ok(format!("noise:{SMOKE_IMAGES}x{side}x{SMOKE_IMAGES}"));
    }
    match &settings.data {
        Some(data) => Ok(in_full(data)),
        None if registry.needs_place(&table.data) => Err(format!("data missing: {}", how_to_get(&table.data))),
        None => Ok(table.data.clone()),
    }
}

/// `NAME:PATH` with an absolute path, where there is such a path.
fn in_full(spec: &str) -> String {
    match spec.split_once(':') {
        Some((name, path)) if std::path::Path::new(path).exists() => {
            std::path::absolute(path).map_or_else(|_| spec.to_string(), |p| format!("{name}:{}", p.display()))
        }
        _ => spec.to_string(),
    }
}

fn how_to_get(source: &str) -> String {
    match source {
        "cifar100" => {
            "curl -LO https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz && tar xzf cifar-100-binary.tar.gz, then --data cifar100:cifar-100-binary"
                .to_string()
        }
        "tiny-imagenet" => {
            "curl -LO http://cs231n.stanford.edu/tiny-imagenet-200.zip && unzip tiny-imagenet-200.zip, then --data tiny-imagenet:tiny-imagenet-200".to_string()
        }
        "imagefolder" => {
            "ImageNet's ILSVRC2012 is given to registered users of https://image-net.org; with its images in DIR/train/CLASS and DIR/val/CLASS, --data imagefolder:DIR"
                .to_string()
        }
        other => format!("--data {other}:DIR (kd-cli list datasets)"),
    }
}

/// Training images of the budget; 0: all, or what the table's own config says.
fn limit(table: &Table, settings: &Settings) -> u64 {
    match (settings.train_limit, settings.budget) {
        (Some(limit), _) => limit as u64,
        (None, Budget::Short) => table.short.train_limit as u64,
        _ => table.config.get("data").and_then(|d| d.get("train_limit")).and_then(Value::as_u64).unwrap_or(0),
    }
}

/// Epochs of the budget for a schedule of `paper` epochs.
fn epochs(table: &Table, settings: &Settings, paper: u64) -> u64 {
    match (settings.epochs, settings.budget) {
        (Some(epochs), _) => epochs as u64,
        (None, Budget::Full) => paper,
        (None, Budget::Short) => table.short.epochs.map_or(budget::scale(paper, 10, 1), |e| e as u64),
        (None, Budget::Smoke) => SMOKE_EPOCHS,
    }
}

fn row_config(
    table: &Table,
    row: &Row,
    source: &str,
    settings: &Settings,
    registry: &Registry,
    teachers: &mut BTreeMap<String, Value>,
) -> Result<RowConfig, String> {
    let mut shared = shared(table, &row.config, source, settings);
    if let Some(name) = &row.teacher {
        let file = match settings.weights.get(name) {
            Some(file) => file.clone(),
            None => {
                let teacher = &table.teacher[name];
                if !teacher.own && !settings.train_teachers {
                    let get = teacher.get.as_ref().map_or(String::new(), |get| format!("{get}, or "));
                    return Err(format!(
                        "teacher missing: {get}--teacher-weights {name}=FILE, or --train-teachers to train {} first",
                        table.model_of(name)
                    ));
                }
                if !teachers.contains_key(name) {
                    teachers.insert(name.clone(), teacher_config(table, name, source, settings));
                }
                settings.out.join("teachers").join(name).join("student.safetensors")
            }
        };
        shared.insert("teacher".to_string(), json!({"name": name, "model": table.model_of(name), "weights": file}));
    }
    // Other views are another teacher pass.
    let views = registry.views(&row.losses);
    let mut variant = own_sections(&row.config, settings);
    let schedule = variant.get("schedule").and_then(Value::as_object).cloned().unwrap_or_default();
    let paper_epochs = budget::epochs(&schedule);
    let epochs = epochs(table, settings, paper_epochs);
    variant.insert("schedule".to_string(), Value::Object(scaled(schedule, epochs)));
    variant.insert("student".to_string(), student(&row.config, &row.student));
    let mut losses = row.losses.clone();
    losses.iter_mut().for_each(|l| budget::loss(l, paper_epochs, epochs, registry));
    variant.insert("loss".to_string(), json!(losses));
    Ok(RowConfig { shared: json!({"config": shared, "views": views}), variant, paper_epochs, epochs })
}

/// The training of a teacher: the table's config, changed as its entry says, on `ce`.
fn teacher_config(table: &Table, name: &str, source: &str, settings: &Settings) -> Value {
    let mut config = table.config.clone();
    merge(&mut config, &table.teacher[name].train);
    let mut whole = shared(table, &config, source, settings);
    // A teacher has seen everything, whatever its students see; but a short budget's part is a part for it too.
    let own = config.get("data").and_then(|d| d.get("train_limit")).and_then(Value::as_u64);
    if let (Some(limit), Some(data)) = (own, whole.get_mut("data").and_then(Value::as_object_mut))
        && settings.budget != Budget::Smoke
    {
        data.insert("train_limit".to_string(), limit.into());
    }
    let mut sections = own_sections(&config, settings);
    let schedule = sections.get("schedule").and_then(Value::as_object).cloned().unwrap_or_default();
    let paper = budget::epochs(&schedule);
    let epochs = if settings.budget == Budget::Full { paper } else { epochs(table, settings, paper) };
    sections.insert("schedule".to_string(), Value::Object(scaled(schedule, epochs)));
    whole.append(&mut sections);
    whole.insert("student".to_string(), json!({"model": table.model_of(name)}));
    whole.insert("loss".to_string(), json!([{"method": "ce"}]));
    whole.insert("name".to_string(), format!("teacher-{name}").into());
    Value::Object(whole)
}

fn scaled(mut schedule: Map<String, Value>, epochs: u64) -> Map<String, Value> {
    if budget::epochs(&schedule) != epochs {
        budget::schedule(&mut schedule, epochs);
    } else {
        schedule.insert("epochs".to_string(), epochs.into());
    }
    schedule
}

fn student(config: &Map<String, Value>, model: &str) -> Value {
    let mut student = config.get("student").and_then(Value::as_object).cloned().unwrap_or_default();
    student.insert("model".to_string(), model.into());
    Value::Object(student)
}

const OWN: [&str; 4] = ["optim", "schedule", "run", "student"];

/// The sections of a config that all runs of a process share.
fn shared(table: &Table, config: &Map<String, Value>, source: &str, settings: &Settings) -> Map<String, Value> {
    let mut shared: Map<String, Value> =
        config.iter().filter(|(k, _)| !OWN.contains(&k.as_str())).map(|(k, v)| (k.clone(), v.clone())).collect();
    let mut data = shared.get("data").and_then(Value::as_object).cloned().unwrap_or_default();
    data.insert("source".to_string(), source.into());
    if settings.budget == Budget::Smoke {
        // Augmentations and held-out parts fit real images only.
        ["augment", "validation", "label_noise", "train_limit"].iter().for_each(|key| {
            data.remove(*key);
        });
        data.insert("batch_size".to_string(), SMOKE_IMAGES.into());
    } else {
        data.insert("train_limit".to_string(), limit(table, settings).into());
    }
    shared.insert("data".to_string(), Value::Object(data));
    shared
}

/// The other sections, with the run options of the budget.
fn own_sections(config: &Map<String, Value>, settings: &Settings) -> Map<String, Value> {
    let mut own: Map<String, Value> = OWN.iter().filter_map(|k| config.get_key_value(*k)).map(|(k, v)| (k.clone(), v.clone())).collect();
    let mut run = own.get("run").and_then(Value::as_object).cloned().unwrap_or_default();
    if settings.budget == Budget::Smoke {
        run.insert("eval_every".to_string(), 0.into());
        run.insert("checkpoint_every".to_string(), 0.into());
        run.insert("allow_bad_teacher".to_string(), true.into());
    }
    if let Some(every) = settings.eval_every {
        run.insert("eval_every".to_string(), every.into());
    }
    if !run.is_empty() {
        own.insert("run".to_string(), Value::Object(run));
    }
    own
}

/// Runs of one process: a seed, and rows that share everything but their variants.
pub(super) struct Group<'a> {
    pub(super) seed: u64,
    pub(super) shared: Value,
    pub(super) rows: Vec<(&'a Row, &'a RowConfig)>,
}

impl<'a> Group<'a> {
    /// The rows of `wanted` by what they share, in order.
    pub(super) fn all(wanted: Vec<(&'a Row, &'a RowConfig)>, seed: u64, apart: bool) -> Vec<Self> {
        let mut groups: Vec<Self> = vec![];
        for (row, config) in wanted {
            match groups.iter_mut().find(|g| !apart && g.shared == config.shared) {
                Some(group) => group.rows.push((row, config)),
                None => groups.push(Self { seed, shared: config.shared.clone(), rows: vec![(row, config)] }),
            }
        }
        groups
    }

    /// What is kept beside the runs, to know them again by.
    pub(super) fn record(&self) -> Value {
        let rows: Map<String, Value> = self.rows.iter().map(|(row, c)| (row.id.clone(), Value::Object(c.variant.clone()))).collect();
        json!({"shared": self.shared, "rows": rows})
    }

    /// The config: of a single run, or shared with a `[[run]]` for each row.
    pub(super) fn config(&self) -> Value {
        let mut config = self.shared["config"].as_object().cloned().unwrap_or_default();
        config.insert("seed".to_string(), self.seed.into());
        if let [(row, only)] = self.rows.as_slice() {
            config.insert("name".to_string(), row.id.clone().into());
            config.extend(only.variant.clone());
        } else {
            config.insert("student".to_string(), self.rows[0].1.variant["student"].clone());
            let runs = self.rows.iter().map(|(row, c)| {
                let mut run = c.variant.clone();
                run.insert("name".to_string(), row.id.clone().into());
                Value::Object(run)
            });
            config.insert("run".to_string(), runs.collect());
        }
        Value::Object(config)
    }
}
