//! The workspace as cargo sees it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The root of the checkout.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("invariant: xtask/ stands in the workspace root")
}

/// cargo, at work in the workspace root. By its name, so that rustup keeps the toolchain for the compilers that it starts.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(root());
    command
}

/// What `command` prints.
///
/// # Errors
/// When it cannot be started or fails; the message holds what it wrote to stderr.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} failed:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Runs `command` with this program's output.
pub(crate) fn status(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting {command:?}"))?;
    if !status.success() {
        bail!("{command:?} failed: {status}");
    }
    Ok(())
}

/// The binary that users get, built if need be.
pub(crate) fn kd_cli() -> Result<PathBuf> {
    status(cargo().args(["build", "--release", "--package", "kd-cli"]))?;
    Ok(Workspace::load()?.target.join("release").join(format!("kd-cli{}", std::env::consts::EXE_SUFFIX)))
}

/// The members and where builds go.
pub(crate) struct Workspace {
    /// The members, in cargo's order.
    pub(crate) packages: Vec<Package>,
    /// The target directory.
    pub(crate) target: PathBuf,
}

impl Workspace {
    /// Asks cargo.
    pub(crate) fn load() -> Result<Self> {
        let text = output(cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
        let metadata: Value = serde_json::from_str(&text)?;
        let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
        let target = metadata["target_directory"].as_str().context("cargo metadata names no target directory")?;
        Ok(Self { packages: packages.iter().cloned().map(|manifest| Package { manifest }).collect(), target: target.into() })
    }

    /// The members that are meant for a registry.
    pub(crate) fn published(&self) -> impl Iterator<Item = &Package> {
        self.packages.iter().filter(|p| p.manifest["publish"].is_null())
    }
}

/// One member.
pub(crate) struct Package {
    manifest: Value,
}

impl Package {
    /// A string of the manifest, empty where there is none.
    pub(crate) fn text(&self, key: &str) -> &str {
        self.manifest[key].as_str().unwrap_or("")
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        self.text("name")
    }

    /// Its folder.
    pub(crate) fn dir(&self) -> &Path {
        Path::new(self.text("manifest_path")).parent().unwrap_or(Path::new(""))
    }

    /// What its page in a registry would lack, or a registry would refuse.
    pub(crate) fn gaps(&self) -> Vec<String> {
        let count = |key: &str| self.manifest[key].as_array().map_or(0, Vec::len);
        let mut gaps: Vec<String> =
            ["description", "license", "readme"].iter().filter(|k| self.text(k).is_empty()).map(|k| format!("no {k}")).collect();
        gaps.extend(["keywords", "categories"].iter().filter(|k| !(1..=5).contains(&count(k))).map(|k| format!("not 1 to 5 {k}")));
        gaps.extend(LICENCES.iter().filter(|f| !self.dir().join(f).is_file()).map(|f| format!("no {f} in its folder")));
        gaps
    }
}

/// The licence texts that travel with every package.
pub(crate) const LICENCES: [&str; 2] = ["LICENSE-MIT", "LICENSE-APACHE"];
