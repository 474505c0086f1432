//! The same runs as a script, for another machine or a cluster.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;

use super::kd_cli::KdCli;
use super::plan::{Plan, Settings};
use super::{execute, results};

/// Of what kind.
#[derive(Clone, Copy, clap::ValueEnum)]
pub(super) enum Kind {
    /// One process after the other
    Shell,
    /// An array job, one process each
    Slurm,
}

/// Writes the configs below the output directory and prints the script.
pub(super) fn run(plan: &Plan, settings: &Settings, kd_cli: &KdCli, kind: Kind) -> Result<()> {
    let program = shell(&kd_cli.path.display().to_string());
    let command = |name: &str, config: &str, run: &str| {
        let (config, run) = (shell(config), shell(run));
        format!(
            "if [ -e {run}/config.toml ]; then {program} {name} --resume {run}; else {program} {name} --config {config} --out {run}; fi"
        )
    };
    let mut teachers = vec![];
    for (name, config) in &plan.teachers {
        let folder = settings.out.join("teachers").join(name);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("plan.toml"), toml::to_string(config)?)?;
        teachers.push(command("train", &folder.join("plan.toml").display().to_string(), &folder.display().to_string()));
    }
    let mut runs = vec![];
    for seed in 1..=settings.seeds {
        for group in execute::unfinished(plan, settings, seed) {
            let begun = group.rows.iter().find_map(|(row, config)| results::find(&settings.out, seed, row, config));
            let same = |folder: &PathBuf| results::json(&folder.join("group.json")) == Some(group.record());
            let folder = begun.map(|place| place.group).filter(|f| execute::started(f) || same(f));
            let folder = folder.unwrap_or_else(|| results::next_group(&settings.out, seed));
            fs::create_dir_all(&folder)?;
            if !folder.join("group.json").exists() {
                fs::write(folder.join("group.json"), serde_json::to_string_pretty(&group.record())?)?;
                fs::write(folder.join("plan.toml"), toml::to_string(&group.config())?)?;
            }
            let alone = group.rows.len() == 1 && !folder.join("config.toml").exists();
            let run = if alone { folder.join(&group.rows[0].0.id) } else { folder.clone() };
            runs.push(command("distill", &folder.join("plan.toml").display().to_string(), &run.display().to_string()));
        }
    }
    println!("#!/usr/bin/env bash");
    if matches!(kind, Kind::Slurm) {
        if !teachers.is_empty() {
            println!("# first, once:");
            teachers.iter().for_each(|line| println!("#   {line}"));
        }
        println!("#SBATCH --array=0-{}", runs.len().saturating_sub(1));
        println!("#SBATCH --output={}/slurm-%a.log", settings.out.display());
        println!("set -euo pipefail\ncase $SLURM_ARRAY_TASK_ID in");
        runs.iter().enumerate().for_each(|(i, line)| println!("{i}) {line} ;;"));
        println!("esac");
    } else {
        println!("set -euo pipefail");
        teachers.iter().chain(&runs).for_each(|line| println!("{line}"));
    }
    println!("# the report: the same `cargo xtask reproduce` with --resume --report in place of --emit");
    Ok(())
}

/// A word of a shell.
fn shell(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-=+:".contains(c);
    if word.chars().all(plain) { word.to_string() } else { format!("'{}'", word.replace('\'', "'\\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_paths_are_one_word() {
        assert_eq!(shell("/a/b-c_1.toml"), "/a/b-c_1.toml");
        assert_eq!(shell("/a b/it's"), r"'/a b/it'\''s'");
    }
}
