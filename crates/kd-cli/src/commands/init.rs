//! `kd-cli init`: the quickstart's config as a file.

use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::output;

/// The config that `kd-cli distill` uses when it is given none.
pub const QUICKSTART: &str = include_str!("../../quickstart.toml");

/// Writes the quickstart's config, commented, to a file to edit.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  kd-cli init my-run.toml && kd-cli distill --config my-run.toml")]
pub struct Init {
    /// The file to write.
    #[arg(default_value = "kd.toml")]
    path: PathBuf,
    /// Overwrites a file that is there.
    #[arg(long)]
    force: bool,
}

/// Runs the command.
pub fn run(args: &Init) -> Result<()> {
    if args.path.exists() && !args.force {
        bail!("{} exists; --force overwrites it", args.path.display());
    }
    // The run is called after its config, so that runs of different configs keep apart.
    let stem = args.path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let named = QUICKSTART.replace(
        "name = \"quickstart\"             # the run directory is runs/quickstart",
        &format!("name = {stem:?} # the run directory is runs/{stem}"),
    );
    output::write_file(&args.path, named.as_bytes())?;
    output::message(&format!("wrote {}; run it with: kd-cli distill --config {}", args.path.display(), args.path.display()));
    Ok(())
}
