//! `kd-cli analyse`: what trained networks show about themselves. One file per analysis; the numbers are kd-train's (`kd_train::analysis`).

mod agreement;
mod cka;
mod decompose;
mod directions;
mod feature_norms;
mod inputs;
mod sheet;

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::output;

/// Looks into a trained network, or a student beside its teacher: the measurements behind the papers' claims.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  kd-cli analyse feature-norms --model resnet56 --weights resnet56.pth --data cifar100:DIR --split train --sheet norms.png
  kd-cli analyse agreement --run runs/quickstart --svg reliability.svg
  kd-cli analyse cka --run runs/quickstart --svg cka.svg")]
pub struct Analyse {
    #[command(subcommand)]
    what: What,
}

// The help of each is that of its arguments.
#[derive(clap::Subcommand)]
enum What {
    FeatureNorms(feature_norms::FeatureNorms),
    Directions(directions::Directions),
    Decompose(decompose::Decompose),
    Agreement(agreement::Agreement),
    Cka(cka::Cka),
}

/// Runs one.
pub fn run(args: &Analyse) -> Result<()> {
    match &args.what {
        What::FeatureNorms(args) => feature_norms::run(args),
        What::Directions(args) => directions::run(args),
        What::Decompose(args) => decompose::run(args),
        What::Agreement(args) => agreement::run(args),
        What::Cka(args) => cka::run(args),
    }
}

/// Where results go.
#[derive(clap::Args)]
struct OutputArgs {
    /// One JSON object with every number, all classes included, in place of the tables.
    #[arg(long)]
    json: bool,
    /// Draws the figure into this file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// Writes a figure where one is wanted.
fn write_svg(path: Option<&PathBuf>, svg: impl FnOnce() -> Result<String>) -> Result<()> {
    match path {
        Some(path) => write(path, svg()?.as_bytes()),
        None => Ok(()),
    }
}

/// Writes a file and says so.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    output::write_file(path, bytes)?;
    output::message(&format!("wrote {}", path.display()));
    Ok(())
}

/// A number with `digits` digits behind the point; a dash for none.
fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or("-".to_string(), |v| format!("{v:.digits$}"))
}

/// Prints the classes in the order of a value: all of them, or the five smallest and the five largest.
fn class_table(header: &[&str], mut rows: Vec<(f64, Vec<String>)>, all: bool) -> Result<()> {
    rows.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (total, shown) = (rows.len(), 5);
    let mut lines: Vec<Vec<String>> = rows.into_iter().map(|r| r.1).collect();
    if !all && total > 4 * shown {
        let mut dots = vec![String::new(); header.len()];
        dots[0] = format!("... {} more (--all-classes)", total - 2 * shown);
        lines.splice(shown..total - shown, [dots]);
    }
    output::line("")?;
    let right: Vec<bool> = (0..header.len()).map(|c| c > 0).collect();
    output::table(header, &right, &lines)
}
