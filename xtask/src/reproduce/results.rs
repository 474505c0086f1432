//! What runs left on the disk.
//!
//! ```text
//! OUT/teachers/NAME/            a teacher trained here
//! OUT/seed-1/g01/group.json     what the runs of this process were to be, to know them again by
//!               /plan.toml      its config
//!               /PAIR.METHOD/   a run directory of kd-cli
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use super::plan::RowConfig;
use super::table::Row;

/// Where a row of a seed is, or would go on.
pub(super) struct Place {
    /// The process's folder.
    pub(super) group: PathBuf,
    /// The run directory.
    pub(super) run: PathBuf,
}

/// Folders of a seed's processes, in order.
pub(super) fn groups(out: &Path, seed: u64) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(out.join(format!("seed-{seed}"))) else { return vec![] };
    let mut all: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).filter(|p| p.join("group.json").is_file()).collect();
    all.sort();
    all
}

/// A folder for the seed's next process.
pub(super) fn next_group(out: &Path, seed: u64) -> PathBuf {
    let seed = out.join(format!("seed-{seed}"));
    let free = (1..).map(|n| seed.join(format!("g{n:02}"))).find(|p| !p.exists());
    free.unwrap_or_else(|| seed.join("g"))
}

/// Where a row was run, or begun, with exactly this config; a finished one comes first.
pub(super) fn find(out: &Path, seed: u64, row: &Row, config: &RowConfig) -> Option<Place> {
    let mut begun = None;
    for group in groups(out, seed) {
        let Some(record) = json(&group.join("group.json")) else { continue };
        let same = record["shared"] == config.shared && record["rows"].get(&row.id).and_then(Value::as_object) == Some(&config.variant);
        if !same {
            continue;
        }
        let run = group.join(&row.id);
        let finished = Outcome::read(&run).is_some();
        let place = Place { group, run };
        if finished {
            return Some(place);
        }
        begun.get_or_insert(place);
    }
    begun
}

/// A file of JSON, if it is there and is JSON.
pub(super) fn json(path: &Path) -> Option<Value> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// A finished run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Outcome {
    pub(super) last: f64,
    pub(super) best: f64,
    /// Epochs trained when it was best.
    pub(super) best_epochs: u64,
    pub(super) epochs: u64,
    pub(super) steps: u64,
    /// Evaluations of the student.
    pub(super) evaluations: usize,
    /// Accuracy of the teacher, measured before the first step.
    pub(super) teacher: Option<f64>,
    pub(super) seconds: f64,
    pub(super) images_per_second: f64,
}

impl Outcome {
    /// Reads `run.json` of a run directory; `None` unless the run is finished.
    pub(super) fn read(run: &Path) -> Option<Self> {
        Self::of(&json(&run.join("run.json"))?)
    }

    fn of(record: &Value) -> Option<Self> {
        let result = record.get("result").filter(|r| !r.is_null())?;
        let top1 = |e: &Value| Some((e["evaluation"]["top1"].as_f64()?, e["epochs"].as_u64()?));
        let history: Vec<(f64, u64)> = result["history"].as_array()?.iter().filter_map(top1).collect();
        let &(last, _) = history.last()?;
        // The first of the best, as a reader of the history would find it.
        let (best, best_epochs) = history.iter().copied().fold((f64::NEG_INFINITY, 0), |b, e| if e.0 > b.0 { e } else { b });
        Some(Self {
            last,
            best,
            best_epochs,
            epochs: result["epochs"].as_u64()?,
            steps: result["steps"].as_u64()?,
            evaluations: history.len(),
            teacher: result["teachers"][0]["top1"].as_f64(),
            seconds: result["seconds"].as_f64()?,
            images_per_second: result["images_per_second"].as_f64()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn last_and_best_are_read_off_the_history() {
        let at = |epochs: u64, top1: f64| json!({"epochs": epochs, "split": "test", "evaluation": {"top1": top1}});
        let mut record = json!({"result": {
            "epochs": 3, "steps": 30, "history": [at(1, 50.0), at(2, 62.5), at(3, 61.0)], "teachers": [{"top1": 72.6}],
            "seconds": 9.0, "images_per_second": 100.0,
        }});
        let outcome = Outcome::of(&record).unwrap();
        assert_eq!((outcome.last, outcome.best, outcome.best_epochs, outcome.teacher), (61.0, 62.5, 2, Some(72.6)));
        record["result"] = Value::Null;
        assert_eq!(Outcome::of(&record), None);
    }
}
