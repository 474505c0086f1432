//! Runs what is not finished: teachers first, then one process for each group of rows.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use super::kd_cli::{Ended, KdCli};
use super::plan::{Group, Plan, RowConfig, Settings};
use super::report::Report;
use super::results::{self, Outcome};
use super::table::{Row, Table};

/// What did not end well.
#[derive(Default)]
pub(super) struct Failures {
    /// The error of a row in a seed.
    pub(super) rows: BTreeMap<(String, u64), String>,
    /// A signal ended a process; everything up to there is saved.
    pub(super) interrupted: bool,
}

/// The exit code of a `kd-cli` that a signal ended after its checkpoint.
const INTERRUPTED: i32 = 130;
/// That of one which refused before it began.
const REFUSED: i32 = 2;

pub(super) fn run(table: &Table, plan: &Plan, settings: &Settings, kd_cli: &KdCli) -> Result<Failures> {
    let mut failures = Failures::default();
    // First of all: a place that cannot be written shows before hours have passed.
    Report::new(table, plan, settings, &failures)?.write(&settings.out)?;
    let mut without_teacher = BTreeMap::new();
    for (name, config) in &plan.teachers {
        let place = settings.out.join("teachers").join(name);
        if Outcome::read(&place).is_some() {
            continue;
        }
        say(&format!("teacher {name}"));
        let ended = launch(kd_cli, "train", config, &place, &place)?;
        if ended.code == Some(INTERRUPTED) {
            failures.interrupted = true;
            return Ok(failures);
        }
        if ended.code != Some(0) {
            without_teacher.insert(name.clone(), format!("its teacher {name} could not be trained: {}", ended.message));
        }
    }
    for seed in 1..=settings.seeds {
        for group in unfinished(plan, settings, seed) {
            let teacher = group.rows.first().and_then(|(row, _)| row.teacher.as_ref());
            if let Some(reason) = teacher.and_then(|t| without_teacher.get(t)) {
                failures.rows.extend(group.rows.iter().map(|(row, _)| ((row.id.clone(), seed), reason.clone())));
                continue;
            }
            run_group(group, settings, kd_cli, &mut failures)?;
            Report::new(table, plan, settings, &failures)?.write(&settings.out)?;
            if failures.interrupted {
                return Ok(failures);
            }
        }
    }
    Ok(failures)
}

/// The seed's rows that are not finished, those begun together still together.
pub(super) fn unfinished<'a>(plan: &'a Plan, settings: &Settings, seed: u64) -> Vec<Group<'a>> {
    let mut begun: BTreeMap<PathBuf, Vec<(&Row, &RowConfig)>> = BTreeMap::new();
    let mut fresh = vec![];
    for planned in &plan.rows {
        let Ok(config) = &planned.config else { continue };
        match results::find(&settings.out, seed, &planned.row, config) {
            Some(place) if Outcome::read(&place.run).is_some() => {}
            Some(place) => begun.entry(place.group).or_default().push((&planned.row, config)),
            None => fresh.push((&planned.row, config)),
        }
    }
    let of = |rows: Vec<(&'a Row, &'a RowConfig)>| Group { seed, shared: rows[0].1.shared.clone(), rows };
    let mut groups: Vec<Group> = vec![];
    for (folder, rows) in begun {
        // A process that began goes on as it was; one that never did may be divided anew.
        if started(&folder) { groups.push(of(rows)) } else { fresh.extend(rows) }
    }
    groups.extend(Group::all(fresh, seed, settings.apart));
    groups
}

/// Whether `kd-cli` has written anything into a process's folder.
pub(super) fn started(folder: &Path) -> bool {
    let inside = |p: &Path| p.join("config.toml").is_file();
    inside(folder) || fs::read_dir(folder).is_ok_and(|mut entries| entries.any(|e| e.is_ok_and(|e| inside(&e.path()))))
}

fn run_group(mut group: Group, settings: &Settings, kd_cli: &KdCli, failures: &mut Failures) -> Result<()> {
    loop {
        let place = group.rows.iter().find_map(|(row, config)| results::find(&settings.out, group.seed, row, config));
        let folder = match place {
            Some(place) if started(&place.group) => place.group,
            // What an earlier attempt left is of no use to anybody.
            _ => results::next_group(&settings.out, group.seed),
        };
        let names: Vec<&str> = group.rows.iter().map(|(row, _)| row.id.as_str()).collect();
        say(&format!("seed {}, {}: {}", group.seed, folder.file_name().unwrap_or_default().display(), names.join(", ")));
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        if !folder.join("group.json").exists() {
            fs::write(folder.join("group.json"), serde_json::to_string_pretty(&group.record())?)?;
        }
        let run = if let [(row, _)] = group.rows.as_slice()
            && !folder.join("config.toml").exists()
        {
            folder.join(&row.id)
        } else {
            folder.clone()
        };
        let ended = launch(kd_cli, "distill", &group.config(), &folder, &run)?;
        if ended.code == Some(INTERRUPTED) {
            failures.interrupted = true;
            return Ok(());
        }
        let refused = ended.code == Some(REFUSED) && !has_trained(&folder);
        if refused && group.rows.len() > 1 {
            let plan = fs::read_to_string(folder.join("plan.toml")).unwrap_or_default();
            fs::remove_dir_all(&folder)?;
            // One bad row must not keep the others from running: leave out the one that the error names, or run all apart.
            let at = row_at_fault(&ended.message, &plan);
            let (mut bad, mut good) = (vec![], vec![]);
            for (i, (row, config)) in group.rows.iter().copied().enumerate() {
                let fault = at == Some(i) || words(&ended.message).any(|w| w == row.id);
                if fault { bad.push((row, config)) } else { good.push((row, config)) }
            }
            if bad.is_empty() {
                say(&format!("{}: apart from now on", ended.message));
                for alone in Group::all(good, group.seed, true) {
                    run_group(alone, settings, kd_cli, failures)?;
                    if failures.interrupted {
                        return Ok(());
                    }
                }
                return Ok(());
            }
            failures.rows.extend(bad.iter().map(|(row, _)| ((row.id.clone(), group.seed), ended.message.clone())));
            group.rows = good;
            if group.rows.is_empty() {
                return Ok(());
            }
            continue;
        }
        for (row, _) in &group.rows {
            if Outcome::read(&folder.join(&row.id)).is_none() {
                failures.rows.insert((row.id.clone(), group.seed), ended.message.clone());
            }
        }
        if refused {
            // Nothing to go on with: the next attempt begins anew.
            fs::remove_dir_all(&folder)?;
        }
        return Ok(());
    }
}

/// Whether any run in a process's folder has a checkpoint or a result.
fn has_trained(folder: &Path) -> bool {
    let some = |p: &Path| fs::read_dir(p.join("checkpoints/last")).is_ok_and(|mut d| d.next().is_some()) || Outcome::read(p).is_some();
    fs::read_dir(folder).is_ok_and(|mut entries| entries.any(|e| e.is_ok_and(|e| some(&e.path()))))
}

fn words(message: &str) -> impl Iterator<Item = &str> {
    message.split(|c: char| c.is_whitespace() || "`'\",:;()".contains(c))
}

/// The `[[run]]` of a plan that an error means by its line (`plan.toml:12`).
fn row_at_fault(message: &str, plan: &str) -> Option<usize> {
    let (_, rest) = message.split_once("plan.toml:")?;
    let line: usize = rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
    plan.lines().take(line).filter(|l| l.trim() == "[[run]]").count().checked_sub(1)
}

/// Begins the run that `config` describes in `run`, or goes on with it.
fn launch(kd_cli: &KdCli, command: &str, config: &Value, folder: &Path, run: &Path) -> Result<Ended> {
    let out = run.display().to_string();
    if run.join("config.toml").is_file() {
        return kd_cli.run(&[command, "--resume", &out]);
    }
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let plan = folder.join("plan.toml");
    fs::write(&plan, toml::to_string(config)?).with_context(|| format!("writing {}", plan.display()))?;
    kd_cli.run(&[command, "--config", &plan.display().to_string(), "--out", &out])
}

#[allow(clippy::print_stderr, reason = "progress belongs there")]
fn say(text: &str) {
    eprintln!("=== {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_a_line_is_an_error_of_its_run() {
        let plan = "seed = 1\n[[run]]\nname = \"a\"\n[run.optim]\nlr = 1\n[[run]]\nname = \"b\"\n[run.optim]\nkind = \"dot\"\n";
        assert_eq!(row_at_fault("error: /x/plan.toml:5: lr", plan), Some(0));
        assert_eq!(row_at_fault("error: /x/plan.toml:9: `optim.kind` is dot", plan), Some(1));
        assert_eq!(row_at_fault("error: /x/plan.toml:1: seed", plan), None);
        assert_eq!(row_at_fault("error: no line", plan), None);
        assert!(words("run `p.kd`: no stages").any(|w| w == "p.kd"));
    }
}
