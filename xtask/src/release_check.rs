//! `cargo xtask release-check`: every publishable crate packages, with all that its page in a registry shows.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::workspace::{LICENCES, Workspace, cargo, output, status};

/// crates.io refuses larger archives.
const LARGEST: u64 = 10 << 20;

/// Packages every publishable crate and checks what is in the archives
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Also build each crate from its own archive (minutes: the dependencies are built anew)
    #[arg(long)]
    verify: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let workspace = Workspace::load()?;
    let mut gaps = Vec::new();
    for package in workspace.published() {
        gaps.extend(package.gaps());
        let list = output(cargo().args(["package", "--list", "--allow-dirty", "--package", package.name()]))?;
        let files: Vec<&str> = list.lines().collect();
        let missing = ["Cargo.toml", "README.md"].iter().chain(&LICENCES).filter(|f| !files.contains(f));
        gaps.extend(missing.map(|f| format!("no {f} in the archive")));
        if !gaps.is_empty() {
            bail!("{}: {}", package.name(), gaps.join(", "));
        }
        println!("{}: {} files", package.name(), files.len());
    }

    // All at once: cargo then takes the crates that depend on one another from the archives, not from a registry.
    let mut package = cargo();
    package.args(["package", "--quiet", "--workspace", "--allow-dirty"]);
    for member in &workspace.packages {
        if !workspace.published().any(|p| p.name() == member.name()) {
            package.args(["--exclude", member.name()]);
        }
    }
    let mut target = workspace.target.clone();
    if args.verify {
        // Otherwise every archive is built in a target folder of its own.
        target.push("release-check");
        package.env("CARGO_TARGET_DIR", &target);
    } else {
        package.arg("--no-verify");
    }
    status(&mut package)?;

    for package in workspace.published() {
        let archive = target.join("package").join(format!("{}-{}.crate", package.name(), package.text("version")));
        let size = fs::metadata(&archive).with_context(|| format!("looking for {}", archive.display()))?.len();
        if size > LARGEST {
            bail!("{}: {size} bytes, a registry takes {LARGEST}", archive.display());
        }
        println!("{} {}: {} kB{}", package.name(), package.text("version"), size.div_ceil(1000), if args.verify { ", builds" } else { "" });
    }
    println!("release-check: {} crates package", workspace.published().count());
    Ok(())
}
