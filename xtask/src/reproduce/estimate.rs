//! Time and memory of each row, from a few steps on made-up images before anything runs.
//!
//! Each row runs alone, in a process of its own with the table's batch size, image size, classes and teacher. The time is the median of the
//! later steps, times the steps of the budget; evaluations come on top. Rows that share a teacher pass are cheaper together than this says.

use std::fs;

use anyhow::{Result, bail};
use serde_json::{Map, Value, json};

use super::kd_cli::KdCli;
use super::plan::{Group, Plan, RowConfig, Settings};
use super::table::{Row, Table};

/// Classes, side and training images of the data sets that tables name.
const DATA: [(&str, u64, u64, u64); 4] =
    [("cifar100", 100, 32, 50_000), ("digits", 10, 8, 1297), ("tiny-imagenet", 200, 64, 100_000), ("imagefolder", 1000, 224, 1_281_167)];
/// The first steps make buffers and plans.
const COLD: usize = 3;

pub(super) fn run(table: &Table, plan: &Plan, settings: &Settings, kd_cli: &KdCli) -> Result<()> {
    let Some(&(_, classes, side, images)) = DATA.iter().find(|d| d.0 == table.data) else {
        bail!("{}: no size is known for the data `{}`", table.name, table.data);
    };
    let images = if plan.train_limit > 0 { plan.train_limit } else { images };
    let base = settings.out.join("estimate");
    fs::create_dir_all(&base)?;
    println!("{:<44} {:>9} {:>9} {:>9} {:>9} {:>9}", "row", "ms/step", "images/s", "MiB", "steps", "h/seed");
    let mut total = 0.0;
    for planned in &plan.rows {
        let config = match &planned.config {
            Ok(config) => config,
            Err(reason) => {
                println!("{:<44} {reason}", planned.row.id);
                continue;
            }
        };
        let batch = config.shared["config"]["data"]["batch_size"].as_u64().unwrap_or(64);
        let short = if side > 64 { 5 } else { 12 };
        let source = format!("noise:{classes}x{side}x{}", (short * batch).max(classes));
        match measure(&planned.row, config, &source, batch, &base, kd_cli)? {
            Err(message) => println!("{:<44} {message}", planned.row.id),
            Ok((seconds, memory)) => {
                let steps = config.epochs * images.div_ceil(batch);
                let hours = seconds * steps as f64 / 3600.0;
                total += hours;
                println!(
                    "{:<44} {:>9.1} {:>9.0} {:>9} {:>9} {:>9.2}",
                    planned.row.id,
                    seconds * 1e3,
                    batch as f64 / seconds,
                    memory.map_or("?".to_string(), |m| m.to_string()),
                    steps,
                    hours
                );
            }
        }
    }
    println!(
        "{total:.2} h a seed, {:.2} h for {} seeds if every row ran alone; evaluations not counted. A shared teacher pass is paid once.",
        total * settings.seeds as f64,
        settings.seeds
    );
    Ok(())
}

/// Seconds of a step and MiB of a process that runs the row alone, or why not.
fn measure(
    row: &Row,
    config: &RowConfig,
    source: &str,
    batch: u64,
    base: &std::path::Path,
    kd_cli: &KdCli,
) -> Result<Result<(f64, Option<u64>), String>> {
    let mut config = config.clone();
    let once = |own: &mut Map<String, Value>| {
        own.insert("schedule".to_string(), json!({"epochs": 1, "kind": "constant"}));
        own.insert("run".to_string(), json!({"eval_every": 0, "checkpoint_every": 0, "allow_bad_teacher": true}));
    };
    once(&mut config.variant);
    let shared = &mut config.shared["config"];
    shared["data"] = json!({"source": source, "batch_size": batch});
    if let Some(teacher) = shared.get_mut("teacher")
        && !teacher["weights"].as_str().is_some_and(|w| std::path::Path::new(w).is_file())
    {
        // Untrained weights take as long.
        let place = base.join("teachers").join(teacher["name"].as_str().unwrap_or("teacher"));
        let weights = place.join("student.safetensors");
        if !weights.is_file() {
            let [_, classes, rest] = source.splitn(3, [':', 'x']).collect::<Vec<_>>()[..] else { bail!("invariant: noise:KxSIZExN") };
            let side = rest.split('x').next().unwrap_or_default();
            let mut own = json!({"data": {"source": format!("noise:{classes}x{side}x{classes}"), "batch_size": 10}, "student": {"model": teacher["model"]}, "optim": {"lr": 1e-6}});
            own.as_object_mut().into_iter().for_each(once);
            fs::create_dir_all(&place)?;
            fs::write(place.join("plan.toml"), toml::to_string(&own)?)?;
            let ended = kd_cli.run(&["train", "--quiet", "--config", &text(&place.join("plan.toml")), "--out", &text(&place)])?;
            if ended.code != Some(0) {
                return Ok(Err(ended.message));
            }
        }
        teacher["weights"] = text(&weights).into();
    }
    let group = Group { seed: 1, shared: config.shared.clone(), rows: vec![(row, &config)] };
    let place = base.join(&row.id);
    let _ = fs::remove_dir_all(&place);
    let file = base.join("plan.toml");
    fs::write(&file, toml::to_string(&group.config())?)?;
    let (ended, memory) = kd_cli.measured(&["distill", "--quiet", "--config", &text(&file), "--out", &text(&place)])?;
    if ended.code != Some(0) {
        return Ok(Err(ended.message));
    }
    let metrics = fs::read_to_string(place.join("metrics.jsonl"))?;
    Ok(later_median(&metrics).map(|s| (s, memory)).ok_or_else(|| "no steps were made".to_string()))
}

fn text(path: &std::path::Path) -> String {
    path.display().to_string()
}

/// The median time of the steps after the first few.
fn later_median(metrics: &str) -> Option<f64> {
    let step = |line: &str| {
        let event: Value = serde_json::from_str(line).ok()?;
        if event["event"] == "step" { event["seconds"].as_f64() } else { None }
    };
    let mut seconds: Vec<f64> = metrics.lines().filter_map(step).collect();
    let mut later = seconds.split_off(COLD.min(seconds.len().saturating_sub(1)));
    later.sort_by(f64::total_cmp);
    later.get(later.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cold_steps_do_not_count() {
        let line = |s: f64| format!("{{\"event\":\"step\",\"seconds\":{s}}}\n");
        let metrics: String = [9.0, 8.0, 7.0, 0.2, 0.1, 0.3].map(line).concat() + "{\"event\":\"evaluated\",\"seconds\":5}\n";
        assert_eq!(later_median(&metrics), Some(0.2));
        assert_eq!(later_median(&line(4.0)), Some(4.0));
        assert_eq!(later_median(""), None);
    }
}
