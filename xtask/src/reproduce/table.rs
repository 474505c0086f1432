//! A table as data: `configs/papers/NAME.toml`.
//!
//! ```toml
//! title = "KD++ on CIFAR-100"
//! source = "the authors' README"
//! data = "cifar100"              # the source that --data must give a place for; `digits` needs none
//! reported = "best"              # what the published numbers are: last, best, unknown
//! notes = ["a way in which every row's protocol differs from ours"]
//!
//! [config.schedule]              # sections of the run config that all rows share: data, optim, schedule, run
//! epochs = 240
//! [short]                        # the budget `short`
//! epochs = 24
//! [params]                       # what losses and config may write as "$name"; a pair's own come first
//! beta = 8.0
//!
//! [teacher.resnet56]
//! top1 = 72.34                   # the published teacher's
//! get = "curl .."                # how to get its weights
//!
//! [[pair]]
//! teacher = "resnet56"
//! student = "resnet20"
//! params = { beta = 2.0 }
//!
//! [[method]]
//! name = "dkd"
//! loss = [{ method = "ce" }, { method = "dkd", beta = "$beta", warmup_epochs = 20 }]
//! top1 = [71.97]                 # one for each pair, nan where no source has one
//! also = [{ source = "another README", top1 = [71.90] }]
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::budget::{Budget, Short};
use crate::workspace::root;

/// What a published number is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Reported {
    /// The last epoch's.
    Last,
    /// The best epoch's on the test set.
    Best,
    /// No source says.
    #[default]
    Unknown,
}

/// A file of `configs/papers`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Table {
    #[serde(skip)]
    pub(super) name: String,
    pub(super) title: String,
    pub(super) source: String,
    pub(super) data: String,
    #[serde(default = "Budget::short")]
    pub(super) budget: Budget,
    #[serde(default = "three")]
    pub(super) seeds: u64,
    #[serde(default)]
    pub(super) reported: Reported,
    /// The method that the others are compared with, within a pair and a seed.
    #[serde(default = "kd")]
    pub(super) reference: String,
    #[serde(default)]
    pub(super) notes: Vec<String>,
    #[serde(default)]
    pub(super) config: Map<String, Value>,
    #[serde(default)]
    pub(super) short: Short,
    #[serde(default)]
    params: Map<String, Value>,
    #[serde(default)]
    pub(super) teacher: BTreeMap<String, Teacher>,
    pub(super) pair: Vec<Pair>,
    method: Vec<Method>,
}

fn three() -> u64 {
    3
}

fn kd() -> String {
    "kd".to_string()
}

/// A network that teaches.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Teacher {
    /// Its name in kd's registry; default: the entry's own.
    pub(super) model: Option<String>,
    /// The published teacher's accuracy.
    pub(super) top1: Option<f64>,
    /// How to get its weights.
    pub(super) get: Option<String>,
    /// Trained here before the rows, once for all seeds.
    #[serde(default)]
    pub(super) own: bool,
    /// How its training differs from the rows' config.
    #[serde(default)]
    pub(super) train: Map<String, Value>,
}

/// A teacher and a student.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Pair {
    /// Default: `TEACHER-STUDENT`.
    #[serde(default)]
    pub(super) name: String,
    pub(super) teacher: Option<String>,
    pub(super) student: String,
    #[serde(default)]
    params: Map<String, Value>,
    #[serde(default)]
    config: Map<String, Value>,
    #[serde(default)]
    notes: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Method {
    name: String,
    loss: Vec<Map<String, Value>>,
    #[serde(default)]
    config: Map<String, Value>,
    /// Only these pairs have this row.
    pairs: Option<Vec<String>>,
    #[serde(default)]
    top1: Vec<f64>,
    source: Option<String>,
    reported: Option<Reported>,
    #[serde(default)]
    also: Vec<Also>,
    #[serde(default)]
    notes: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Also {
    source: String,
    top1: Vec<f64>,
}

/// A published number.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Published {
    pub(super) top1: f64,
    pub(super) source: String,
    pub(super) reported: Reported,
}

/// A cell of the table: a student trained in one way.
#[derive(Clone, Debug)]
pub(super) struct Row {
    /// `PAIR.METHOD`, also the name of its run directory.
    pub(super) id: String,
    pub(super) pair: String,
    pub(super) method: String,
    pub(super) teacher: Option<String>,
    /// The teacher's name in kd's registry.
    pub(super) teacher_model: Option<String>,
    pub(super) student: String,
    pub(super) losses: Vec<Map<String, Value>>,
    /// Sections of the run config, the table's, the pair's and the method's together.
    pub(super) config: Map<String, Value>,
    pub(super) published: Vec<Published>,
    pub(super) notes: Vec<String>,
    /// A parameter of its losses that no source gives a value for.
    pub(super) unknown: Option<String>,
}

fn folder() -> PathBuf {
    root().join("configs/papers")
}

impl Table {
    /// Every table's name.
    pub(super) fn names() -> Result<Vec<String>> {
        let folder = folder();
        let entries = fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))?;
        let mut names: Vec<String> =
            entries.filter_map(|e| e.ok()?.file_name().into_string().ok()?.strip_suffix(".toml").map(str::to_string)).collect();
        names.sort();
        Ok(names)
    }

    /// Reads the table called `name`.
    pub(super) fn load(name: &str) -> Result<Self> {
        let path = folder().join(format!("{name}.toml"));
        if !path.is_file() {
            bail!("there is no table `{name}`; `cargo xtask reproduce list` shows those of configs/papers");
        }
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        Self::parse(name, &text).with_context(|| format!("{}", path.display()))
    }

    /// Reads a table's text.
    pub(super) fn parse(name: &str, text: &str) -> Result<Self> {
        let mut table: Self = toml::from_str(text)?;
        table.name = name.to_string();
        for pair in &mut table.pair {
            if pair.name.is_empty() {
                pair.name = pair.teacher.iter().chain([&pair.student]).map(String::as_str).collect::<Vec<_>>().join("-");
            }
            if let Some(teacher) = &pair.teacher
                && !table.teacher.contains_key(teacher)
            {
                bail!("pair {}: there is no [teacher.{teacher}]", pair.name);
            }
        }
        let pairs = table.pair.len();
        for method in &table.method {
            let lists = std::iter::once(&method.top1).chain(method.also.iter().map(|a| &a.top1));
            for list in lists.filter(|l| !l.is_empty()) {
                if list.len() != pairs {
                    bail!("method {}: {} numbers for {pairs} pairs; nan where there is none", method.name, list.len());
                }
                if let Some(odd) = list.iter().find(|v| !v.is_nan() && !(1.0..=100.0).contains(*v)) {
                    bail!("method {}: {odd} is no accuracy in percent", method.name);
                }
            }
            if let Some(odd) = method.pairs.iter().flatten().find(|name| table.pair.iter().all(|p| p.name != **name)) {
                bail!("method {}: there is no pair `{odd}`", method.name);
            }
        }
        let mut ids: Vec<String> = table.rows("*")?.into_iter().map(|r| r.id).collect();
        ids.sort();
        if let Some(twice) = ids.windows(2).find(|w| w[0] == w[1]) {
            bail!("the row {} stands there twice", twice[0]);
        }
        Ok(table)
    }

    /// The rows that `globs` name, in the file's order, pair by pair.
    pub(super) fn rows(&self, globs: &str) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for (index, pair) in self.pair.iter().enumerate() {
            for method in &self.method {
                if method.pairs.as_ref().is_some_and(|names| !names.contains(&pair.name)) {
                    continue;
                }
                rows.push(self.row(index, pair, method));
            }
        }
        let wanted: Vec<&str> = globs.split(',').map(str::trim).filter(|g| !g.is_empty()).collect();
        for glob in &wanted {
            if *glob != "*" && !rows.iter().any(|r| r.matches(glob)) {
                let methods: Vec<&str> = self.method.iter().map(|m| m.name.as_str()).collect();
                let pairs: Vec<&str> = self.pair.iter().map(|p| p.name.as_str()).collect();
                bail!("--rows {glob}: no row of this table; pairs: {}; methods: {}", pairs.join(", "), methods.join(", "));
            }
        }
        rows.retain(|r| wanted.iter().any(|glob| r.matches(glob)));
        Ok(rows)
    }

    fn row(&self, index: usize, pair: &Pair, method: &Method) -> Row {
        let mut unknown = None;
        let mut fill = |value: &mut Value| {
            if let Some(name) = value.as_str().and_then(|s| s.strip_prefix('$')) {
                let found = pair.params.get(name).or_else(|| self.params.get(name)).cloned();
                if found.is_none() {
                    unknown = Some(name.to_string());
                }
                *value = found.unwrap_or_default();
            }
        };
        let mut losses = method.loss.clone();
        losses.iter_mut().flat_map(|l| l.values_mut()).for_each(|v| each_leaf(v, &mut fill));
        let mut config = self.config.clone();
        merge(&mut config, &pair.config);
        merge(&mut config, &method.config);
        config.values_mut().for_each(|v| each_leaf(v, &mut fill));
        let number = |list: &[f64], source: &str| {
            list.get(index).copied().filter(|v| !v.is_nan()).map(|top1| Published {
                top1,
                source: source.to_string(),
                reported: method.reported.unwrap_or(self.reported),
            })
        };
        let first = number(&method.top1, method.source.as_deref().unwrap_or(&self.source));
        let published = first.into_iter().chain(method.also.iter().filter_map(|a| number(&a.top1, &a.source))).collect();
        Row {
            id: format!("{}.{}", pair.name, method.name),
            pair: pair.name.clone(),
            method: method.name.clone(),
            teacher: pair.teacher.clone(),
            teacher_model: pair.teacher.as_deref().map(|t| self.model_of(t).to_string()),
            student: pair.student.clone(),
            losses,
            config,
            published,
            notes: pair.notes.iter().chain(&method.notes).cloned().collect(),
            unknown,
        }
    }

    /// The network of the teacher called `name`.
    pub(super) fn model_of<'a>(&'a self, name: &'a str) -> &'a str {
        self.teacher.get(name).and_then(|t| t.model.as_deref()).unwrap_or(name)
    }
}

impl Row {
    fn matches(&self, glob: &str) -> bool {
        [&self.id, &self.method, &self.pair].iter().any(|name| matches(glob.as_bytes(), name.as_bytes()))
    }
}

/// Whether `glob`, with `*` and `?`, is the whole of `text`.
fn matches(glob: &[u8], text: &[u8]) -> bool {
    match (glob.split_first(), text.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => matches(rest, text) || text.split_first().is_some_and(|(_, t)| matches(glob, t)),
        (Some((b'?', rest)), Some((_, t))) => matches(rest, t),
        (Some((g, rest)), Some((c, t))) => g == c && matches(rest, t),
        _ => false,
    }
}

fn each_leaf(value: &mut Value, change: &mut impl FnMut(&mut Value)) {
    match value {
        Value::Object(inner) => inner.values_mut().for_each(|v| each_leaf(v, change)),
        Value::Array(list) => list.iter_mut().for_each(|v| each_leaf(v, change)),
        leaf => change(leaf),
    }
}

/// Lays `over` on `base`, section by section.
pub(super) fn merge(base: &mut Map<String, Value>, over: &Map<String, Value>) {
    for (key, value) in over {
        match (base.get_mut(key), value) {
            (Some(Value::Object(inner)), Value::Object(more)) => merge(inner, more),
            _ => {
                base.insert(key.clone(), value.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_table_can_be_read() {
        let names = Table::names().unwrap();
        assert!(names.len() >= 20, "{names:?}");
        for name in names {
            let table = Table::load(&name).unwrap_or_else(|e| panic!("{e:#}"));
            let rows = table.rows("*").unwrap();
            assert!(rows.iter().any(|r| r.method == table.reference), "{name}: no row is the reference `{}`", table.reference);
            for row in rows {
                assert!(!row.losses.is_empty() && row.losses.iter().all(|l| l.contains_key("method")), "{name}: {}", row.id);
            }
        }
    }

    const SMALL: &str = r#"
        title = "t"
        source = "s"
        data = "cifar100"
        reported = "best"
        [config.optim]
        lr = 0.05
        momentum = 0.9
        [params]
        beta = 8.0
        [teacher.big]
        top1 = 72.0
        [[pair]]
        teacher = "big"
        student = "small"
        params = { beta = 2.0 }
        [[pair]]
        teacher = "big"
        student = "tiny"
        config = { optim = { lr = 0.01 } }
        [[method]]
        name = "kd"
        loss = [{ method = "kd", weight = 0.9 }]
        top1 = [70.5, nan]
        also = [{ source = "other", top1 = [70.6, 61.0] }]
        [[method]]
        name = "dkd"
        loss = [{ method = "dkd", beta = "$beta" }]
        [[method]]
        name = "odd"
        pairs = ["big-tiny"]
        loss = [{ method = "odd", weight = "$odd" }]
    "#;

    #[test]
    fn cells_are_filled_from_pair_and_table() {
        let table = Table::parse("small", SMALL).unwrap();
        let rows = table.rows("*").unwrap();
        let ids: Vec<&str> = rows.iter().map(|r| r.id.as_str()).collect();
        assert_eq!(ids, ["big-small.kd", "big-small.dkd", "big-tiny.kd", "big-tiny.dkd", "big-tiny.odd"]);
        assert_eq!((&rows[1].losses[0]["beta"], &rows[3].losses[0]["beta"]), (&Value::from(2.0), &Value::from(8.0)));
        assert_eq!((&rows[0].config["optim"]["lr"], &rows[2].config["optim"]["lr"]), (&Value::from(0.05), &Value::from(0.01)));
        assert_eq!(rows[2].config["optim"]["momentum"], Value::from(0.9));
        assert_eq!(rows[4].unknown.as_deref(), Some("odd"));
        let numbers = |r: &Row| r.published.iter().map(|p| (p.top1, p.source.clone())).collect::<Vec<_>>();
        assert_eq!(numbers(&rows[0]), [(70.5, "s".to_string()), (70.6, "other".to_string())]);
        assert_eq!(numbers(&rows[2]), [(61.0, "other".to_string())]);
        assert!(numbers(&rows[1]).is_empty());
    }

    #[test]
    fn globs_pick_rows() {
        let table = Table::parse("small", SMALL).unwrap();
        let ids = |globs: &str| table.rows(globs).unwrap().into_iter().map(|r| r.id).collect::<Vec<_>>();
        assert_eq!(ids("kd"), ["big-small.kd", "big-tiny.kd"]);
        assert_eq!(ids("big-small"), ["big-small.kd", "big-small.dkd"]);
        assert_eq!(ids("*.odd, big-s*.?kd"), ["big-small.dkd", "big-tiny.odd"]);
        assert!(table.rows("nkd").unwrap_err().to_string().contains("methods: kd, dkd, odd"));
    }

    #[test]
    fn mistakes_are_named() {
        let wrong = |from: &str, to: &str| format!("{:#}", Table::parse("small", &SMALL.replace(from, to)).unwrap_err());
        assert!(wrong("[70.5, nan]", "[70.5]").contains("1 numbers for 2 pairs"));
        assert!(wrong("70.5", "0.705").contains("no accuracy in percent"));
        assert!(wrong("[teacher.big]", "[teacher.other]").contains("no [teacher.big]"));
        assert!(wrong("\"big-tiny\"", "\"big-toe\"").contains("no pair `big-toe`"));
        assert!(wrong("name = \"dkd\"", "name = \"kd\"").contains("twice"));
        assert!(wrong("reported", "repotred").contains("repotred"));
    }
}
