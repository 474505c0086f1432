//! How much of a paper's schedule: epochs, milestones and the epochs that losses count in shrink alike.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::kd_cli::Registry;

/// How much of the paper's schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Budget {
    /// Two steps on made-up images
    Smoke,
    /// The part that the table states
    Short,
    /// All of it
    Full,
}

impl Budget {
    pub(super) fn short() -> Self {
        Self::Short
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Smoke => "smoke",
            Self::Short => "short",
            Self::Full => "full",
        }
    }
}

/// The budget `short` of a table. Default: a tenth of the epochs, all images.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Short {
    pub(super) epochs: Option<usize>,
    pub(super) train_limit: usize,
}

/// `epochs` of a schedule of `from` in one of `to`: rounded, and at least 1 where there were any.
pub(super) fn scale(epochs: u64, from: u64, to: u64) -> u64 {
    if epochs == 0 || from == 0 { epochs } else { ((epochs * to * 2 + from) / (2 * from)).max(1) }
}

/// Milestones of a schedule of `from` epochs in one of `to`: ascending, those at or beyond the end left out.
pub(super) fn milestones(of: &[u64], from: u64, to: u64) -> Vec<u64> {
    let mut scaled: Vec<u64> = vec![];
    for &milestone in of {
        let least = scaled.last().map_or(1, |last| last + 1);
        scaled.push(scale(milestone, from, to).max(least));
    }
    scaled.retain(|&m| m < to);
    scaled
}

/// A `[schedule]` for `to` epochs.
pub(super) fn schedule(schedule: &mut Map<String, Value>, to: u64) {
    let from = epochs(schedule);
    schedule.insert("epochs".to_string(), to.into());
    // The paper's milestones are also kd's default; absent ones would not be scaled.
    let multistep = schedule.get("kind").is_none_or(|k| k == "multistep");
    let given = schedule.get("milestones").and_then(Value::as_array).cloned();
    if multistep || given.is_some() {
        let of: Vec<u64> = given.map_or_else(|| vec![150, 180, 210], |list| list.iter().filter_map(Value::as_u64).collect());
        schedule.insert("milestones".to_string(), milestones(&of, from, to).into());
    }
    if let Some(warmup) = schedule.get("warmup_epochs").and_then(Value::as_u64) {
        // A warm-up as long as the run would be refused.
        schedule.insert("warmup_epochs".to_string(), scale(warmup, from, to).min(to - 1).into());
    }
}

/// Epochs of a `[schedule]`, kd's default where it does not say.
pub(super) fn epochs(schedule: &Map<String, Value>) -> u64 {
    schedule.get("epochs").and_then(Value::as_u64).unwrap_or(240)
}

/// A loss with everything it counts in epochs scaled, its method's defaults included.
pub(super) fn loss(loss: &mut Map<String, Value>, from: u64, to: u64, registry: &Registry) {
    if from == to {
        return;
    }
    let method = loss.get("method").and_then(Value::as_str).unwrap_or_default().to_string();
    for (name, default) in registry.defaults(&method) {
        if is_epochs(name) && default.as_u64().is_some_and(|n| n > 0) {
            loss.entry(name.clone()).or_insert_with(|| default.clone());
        }
    }
    scale_all(loss, from, to);
}

/// Also inside: wrapped methods and schedules of stones have epochs of their own.
fn scale_all(table: &mut Map<String, Value>, from: u64, to: u64) {
    for (key, value) in table.iter_mut() {
        if is_epochs(key) {
            match value {
                Value::Number(n) => {
                    if let Some(n) = n.as_u64() {
                        *value = scale(n, from, to).into();
                    }
                }
                Value::Array(list) => {
                    let of: Vec<u64> = list.iter().filter_map(Value::as_u64).collect();
                    if of.len() == list.len() {
                        *value = milestones(&of, from, to).into();
                    }
                }
                _ => {}
            }
        } else {
            scale_inside(value, key, from, to);
        }
    }
}

fn scale_inside(value: &mut Value, key: &str, from: u64, to: u64) {
    match value {
        Value::Object(inner) => {
            if key == "stone_schedule"
                && let Some(n) = inner.get("from").and_then(Value::as_u64)
            {
                inner.insert("from".to_string(), scale(n, from, to).into());
            }
            scale_all(inner, from, to);
        }
        Value::Array(list) => list.iter_mut().for_each(|v| scale_inside(v, key, from, to)),
        _ => {}
    }
}

/// Whether a parameter counts epochs; `warmup_first_epoch` is a number, not a length.
fn is_epochs(key: &str) -> bool {
    key.ends_with("epochs") || key == "stone_warmup"
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn epochs_are_rounded_and_never_vanish() {
        assert_eq!([scale(150, 240, 24), scale(20, 240, 24), scale(20, 240, 10), scale(0, 240, 10)], [15, 2, 1, 0]);
        assert_eq!([scale(180, 240, 10), scale(30, 30, 30), scale(10, 240, 1)], [8, 30, 1]);
    }

    #[test]
    fn milestones_stay_apart_and_inside() {
        assert_eq!(milestones(&[150, 180, 210], 240, 24), [15, 18, 21]);
        assert_eq!(milestones(&[150, 180, 210], 240, 10), [6, 8, 9]);
        assert_eq!(milestones(&[150, 180, 210], 240, 4), [3]);
        assert_eq!(milestones(&[150, 180, 210], 240, 1), [0; 0]);
        assert_eq!(milestones(&[30, 60, 90], 100, 100), [30, 60, 90]);
    }

    #[test]
    fn schedules_keep_their_shape() {
        let mut plain = object(json!({}));
        schedule(&mut plain, 24);
        assert_eq!(Value::Object(plain), json!({"epochs": 24, "milestones": [15, 18, 21]}));
        let mut cosine = object(json!({"epochs": 300, "kind": "cosine", "warmup_epochs": 20}));
        schedule(&mut cosine, 30);
        assert_eq!(Value::Object(cosine), json!({"epochs": 30, "kind": "cosine", "warmup_epochs": 2}));
        let mut one = object(json!({"epochs": 300, "kind": "cosine", "warmup_epochs": 20}));
        schedule(&mut one, 1);
        assert_eq!(Value::Object(one), json!({"epochs": 1, "kind": "cosine", "warmup_epochs": 0}));
    }

    #[test]
    fn losses_scale_what_they_count_in_epochs() {
        let registry = Registry::of(&json!([
            {"kind": "method", "name": "kd_pp", "parameters": [{"name": "warmup_epochs", "default": "20"}, {"name": "nd_weight", "default": "2.0"}]},
            {"kind": "method", "name": "block_kd", "parameters": [{"name": "stone_warmup", "default": "0"}]},
        ]))
        .unwrap();
        let scaled = |value: Value| {
            let mut l = object(value);
            loss(&mut l, 240, 24, &registry);
            Value::Object(l)
        };
        assert_eq!(scaled(json!({"method": "kd_pp"})), json!({"method": "kd_pp", "warmup_epochs": 2}));
        assert_eq!(
            scaled(json!({"method": "dkd", "warmup_epochs": 20, "warmup_first_epoch": 1, "beta": 8.0})),
            json!({"method": "dkd", "warmup_epochs": 2, "warmup_first_epoch": 1, "beta": 8.0})
        );
        assert_eq!(
            scaled(
                json!({"method": "block_kd", "stone_warmup": 40, "stone_schedule": [{"from": 0, "stones": [3]}, {"from": 80, "stones": [2, 3]}]})
            ),
            json!({"method": "block_kd", "stone_warmup": 4, "stone_schedule": [{"from": 0, "stones": [3]}, {"from": 8, "stones": [2, 3]}]})
        );
        let mut same = object(json!({"method": "kd_pp"}));
        loss(&mut same, 240, 240, &registry);
        assert_eq!(Value::Object(same), json!({"method": "kd_pp"}));
    }
}
