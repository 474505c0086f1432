//! `cargo xtask reproduce`: the papers' tables, run by `kd-cli` and set beside the published numbers.
//!
//! A table is a file of `configs/papers` ([`table`]): pairs of networks, methods with their losses, and what was published. Its cells
//! are run for several seeds. Rows that share a teacher pass (same teacher, data, augmentation, seed, batch size, views) become one
//! `kd-cli distill` process with a `[[run]]` for each ([`plan`], [`execute`]); this program loads no tensor.
//!
//! | budget | what |
//! |---|---|
//! | `full` | the paper's schedule |
//! | `short` | a stated part of it: epochs, milestones and the epochs that losses count in shrink alike ([`budget`]) |
//! | `smoke` | two steps of every row on a few made-up images; needs no data and no weights |
//!
//! What is finished is never run again (`--resume`), what was interrupted goes on, what cannot run says why and what would help.
//! After every process the report is written anew ([`report`]): Markdown, CSV, JSON and a plot.

mod budget;
mod emit;
mod estimate;
mod execute;
mod kd_cli;
mod one_of_each;
mod plan;
mod plot;
mod report;
mod results;
mod stats;
mod table;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use self::budget::Budget;
use self::kd_cli::KdCli;
use self::plan::Settings;
use self::table::Table;

/// Runs a table of configs/papers and sets it beside the published numbers
///
/// `cargo xtask reproduce list` shows the tables.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  cargo xtask reproduce list\n  cargo xtask reproduce seeds-digits\n  cargo xtask reproduce kdpp-cifar100 --rows 'resnet56-resnet20.*' --data cifar100:cifar-100-binary --teacher-weights resnet56=cifar100_resnet56.pth --budget short"
)]
pub(crate) struct Args {
    /// The table, a file of configs/papers without its ending; `list`; or `one-of-each`, the smallest row of every method and model family
    table: String,
    /// Rows to run, PAIR.METHOD with * and ?, several divided by commas; a bare method or pair will do
    #[arg(long, default_value = "*")]
    rows: String,
    /// Seeds of each row, 1, 2, ..; default: what the table says
    #[arg(long)]
    seeds: Option<u64>,
    /// How much of the paper's schedule; default: what the table says
    #[arg(long, value_enum)]
    budget: Option<Budget>,
    /// Epochs in place of the budget's; milestones and warm-ups are scaled
    #[arg(long)]
    epochs: Option<usize>,
    /// Training images in place of the budget's, a class-balanced subset; 0: all
    #[arg(long)]
    train_limit: Option<usize>,
    /// Epochs between evaluations; the best epoch is the best evaluated one
    #[arg(long)]
    eval_every: Option<usize>,
    /// The data set and its place, as kd-cli takes it: cifar100:DIR
    #[arg(long)]
    data: Option<String>,
    /// A teacher's weights. May be repeated
    #[arg(long, value_name = "TEACHER=FILE")]
    teacher_weights: Vec<String>,
    /// Trains the teachers that have no weights, by the table's recipe
    #[arg(long)]
    train_teachers: bool,
    /// Goes on in an output directory that holds runs already
    #[arg(long)]
    resume: bool,
    /// Runs nothing: the report of what is there
    #[arg(long)]
    report: bool,
    /// Measures steps on made-up images and prints time and memory of each row, nothing else
    #[arg(long)]
    estimate: bool,
    /// Writes the configs and prints a script that runs them elsewhere; `--resume --report` collects the results
    #[arg(long, value_enum)]
    emit: Option<emit::Kind>,
    /// One process for each row, though rows could share a teacher pass
    #[arg(long)]
    apart: bool,
    /// Output directory; default: runs/reproduce/TABLE-BUDGET
    #[arg(long)]
    out: Option<PathBuf>,
    /// The kd-cli to use; default: the release build of this checkout
    #[arg(long, value_name = "FILE")]
    kd_cli: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if args.table == "list" {
        return list(args);
    }
    let own = args.table == "one-of-each";
    // A name that is no table is said before anything is built.
    let mut table = if own { None } else { Some(Table::load(&args.table)?) };
    let kd_cli = KdCli::open(args.kd_cli.as_deref())?;
    let (table, rows) = match table.take() {
        Some(table) => {
            let rows = table.rows(&args.rows)?;
            (table, rows)
        }
        None => one_of_each::table(&kd_cli.registry)?,
    };
    let settings = settings(args, &table)?;
    if own && (settings.budget != Budget::Smoke || args.rows != "*") {
        bail!("one-of-each is for --budget smoke, and all of its rows");
    }
    let plan = plan::Plan::new(&table, rows, &settings, &kd_cli.registry)?;
    if args.estimate {
        return estimate::run(&table, &plan, &settings, &kd_cli);
    }
    let used = settings.out.join("report.json").exists();
    if used && !args.resume {
        bail!("{} holds runs already; --resume goes on with them, --out DIR goes elsewhere", settings.out.display());
    }
    if let Some(kind) = args.emit {
        return emit::run(&plan, &settings, &kd_cli, kind);
    }
    let failures = if args.report { Default::default() } else { execute::run(&table, &plan, &settings, &kd_cli)? };
    let report = report::Report::new(&table, &plan, &settings, &failures)?;
    report.write(&settings.out)?;
    print!("{}", report.markdown());
    println!("written to {}: report.md, report.csv, report.json, report.svg", settings.out.display());
    if failures.interrupted {
        bail!("interrupted; --resume goes on");
    }
    if !failures.rows.is_empty() {
        bail!("{} runs failed; the report says why", failures.rows.len());
    }
    Ok(())
}

fn settings(args: &Args, table: &Table) -> Result<Settings> {
    let budget = args.budget.unwrap_or(table.budget);
    let mut weights = Vec::new();
    for given in &args.teacher_weights {
        let (teacher, file) = given.split_once('=').with_context(|| format!("--teacher-weights {given}: expected TEACHER=FILE"))?;
        let names: Vec<&str> = table.teacher.keys().map(String::as_str).collect();
        if !names.contains(&teacher) {
            bail!("--teacher-weights {given}: this table has no teacher `{teacher}`, it has {}", names.join(", "));
        }
        let path = std::path::absolute(file)?;
        if !path.is_file() {
            bail!("--teacher-weights {given}: there is no such file");
        }
        weights.push((teacher.to_string(), path));
    }
    let seeds = args.seeds.unwrap_or(if budget == Budget::Smoke { 1 } else { table.seeds });
    if seeds == 0 || args.epochs == Some(0) {
        bail!("--seeds and --epochs must be at least 1");
    }
    let out = args.out.clone().unwrap_or_else(|| format!("runs/reproduce/{}-{}", table.name, budget.name()).into());
    Ok(Settings {
        budget,
        seeds,
        epochs: args.epochs,
        train_limit: args.train_limit,
        eval_every: args.eval_every,
        data: args.data.clone(),
        weights: weights.into_iter().collect(),
        train_teachers: args.train_teachers || budget == Budget::Smoke,
        apart: args.apart,
        out: std::path::absolute(out)?,
    })
}

/// Every table with its size and what this kd-cli lacks for it.
fn list(args: &Args) -> Result<()> {
    let kd_cli = KdCli::open(args.kd_cli.as_deref())?;
    let mut lines = vec![["table", "pairs", "rows", "published", "runnable", "about"].map(str::to_string)];
    for name in Table::names()? {
        let table = Table::load(&name)?;
        let rows = table.rows("*")?;
        let published = rows.iter().filter(|r| !r.published.is_empty()).count();
        let runnable = rows.iter().filter(|r| kd_cli.registry.missing(r).is_none()).count();
        let counts = [table.pair.len(), rows.len(), published, runnable].map(|n| n.to_string());
        let [pairs, rows, published, runnable] = counts;
        lines.push([name, pairs, rows, published, runnable, table.title.clone()]);
    }
    let widths: Vec<usize> = (0..6).map(|c| lines.iter().map(|l| l[c].chars().count()).max().unwrap_or(0)).collect();
    for line in &lines {
        let cell = |c: usize| {
            if (1..5).contains(&c) { format!("{:>1$}", line[c], widths[c]) } else { format!("{:<1$}", line[c], widths[c]) }
        };
        println!("{}", (0..6).map(cell).collect::<Vec<_>>().join("  ").trim_end());
    }
    println!("\nrunnable: networks and methods are there; data and weights come with --data and --teacher-weights");
    Ok(())
}
