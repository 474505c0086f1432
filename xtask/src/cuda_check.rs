//! `cargo xtask cuda-check`: compiles the `cuda` feature on a machine without a GPU and without a CUDA installation.
//!
//! - `types` checks the types of every `cfg(feature = "cuda")` line. A stand-in for nvcc makes empty kernels; nothing is
//!   downloaded. About a minute from nothing, seconds afterwards. It has a target folder of its own, since a real build must
//!   never meet empty kernels.
//! - `real` compiles the kernels and links the program. The toolkit comes from PyPI's wheels (1.2 GB below the target folder);
//!   pip, gcc and some five CPU minutes are needed.
//! - `env` prints the exports that `real` uses, for a shell of one's own.
//!
//! A program built by `real` needs CUDA's libraries at run time: `LD_LIBRARY_PATH="$CUDA_HOME/lib" PROGRAM`, or any folder that holds
//! `libcublas.so.13` and the others. Unix only.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::workspace::{Workspace, cargo, status};

/// A toolkit newer than the driver cannot load its kernels, cudarc knows versions up to 13.4, and the wheels before 13.0 hold no
/// nvcc: the oldest that works runs in most places.
const TOOLKIT: &str = "13.0.2";

/// A100; code for it runs on later generations too.
const COMPUTE_CAP: &str = "80";

/// Compiles the `cuda` feature without a GPU
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How much of it
    #[arg(value_enum, default_value_t = Mode::Types)]
    mode: Mode,
    /// A cargo command in place of `check` (types) or `build` (real) of the whole workspace
    #[arg(last = true)]
    cargo: Vec<String>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Mode {
    /// The types alone: nothing is downloaded
    Types,
    /// Kernels and a linked program: the toolkit is downloaded (1.2 GB)
    Real,
    /// The exports that `real` uses, for a shell of your own
    Env,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let workspace = Workspace::load()?;
    match args.mode {
        Mode::Types => {
            let command = args.cargo.first().map_or("check", String::as_str);
            if !["check", "clippy", "doc"].contains(&command) {
                bail!("`types` has no kernels to link, so cargo can only check, clippy or doc, not `{command}`");
            }
            let bin = stand_in(&workspace.target.join("cuda-stand-in"))?;
            // Nothing but build scripts and macros is compiled: not worth optimising, as the workspace does for its tests.
            let options = ["--config", "profile.dev.package.\"*\".opt-level=0"];
            let mut cargo = cargo_command(&options, &args.cargo, "check", &bin)?;
            cargo.env("NVCC", bin.join("nvcc")).env("CARGO_TARGET_DIR", workspace.target.join("cuda-types"));
            status(&mut cargo)
        }
        Mode::Real => {
            let home = toolkit(&workspace.target)?;
            status(cargo_command(&[], &args.cargo, "build", &home.join("bin"))?.env("CUDA_HOME", home))
        }
        Mode::Env => {
            let home = toolkit(&workspace.target)?;
            let home = home.display();
            println!("export CUDA_HOME='{home}' CUDA_COMPUTE_CAP='{}' PATH='{home}/bin':\"$PATH\"", compute_cap());
            Ok(())
        }
    }
}

/// `cargo OPTIONS ARGS`, or `cargo OPTIONS DEFAULT` of the whole workspace, with nvcc's folder in front of the path.
fn cargo_command(options: &[&str], args: &[String], default: &str, bin: &Path) -> Result<Command> {
    let mut command = cargo();
    command.args(options);
    if args.is_empty() {
        command.args([default, "--workspace", "--features", "cuda"]);
    } else {
        command.args(args);
    }
    let rest = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths(std::iter::once(bin.to_path_buf()).chain(env::split_paths(&rest)))?;
    command.env("PATH", path).env("CUDA_COMPUTE_CAP", compute_cap());
    Ok(command)
}

/// The generation of GPUs to compile for.
fn compute_cap() -> String {
    env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| COMPUTE_CAP.to_string())
}

/// A folder with a stand-in for nvcc.
fn stand_in(bin: &Path) -> Result<PathBuf> {
    fs::create_dir_all(bin)?;
    let nvcc = bin.join("nvcc");
    fs::write(&nvcc, include_str!("nvcc-stand-in.sh")).with_context(|| format!("writing {}", nvcc.display()))?;
    fs::set_permissions(&nvcc, fs::Permissions::from_mode(0o755))?;
    Ok(bin.to_path_buf())
}

/// The toolkit's folder; installs it first where it is not.
fn toolkit(target: &Path) -> Result<PathBuf> {
    let version = env::var("CUDA_KIT_VERSION").unwrap_or_else(|_| TOOLKIT.to_string());
    let kit = target.join(format!("cuda-kit-{version}"));
    let major = version.split('.').next().unwrap_or("");
    let home = kit.join("nvidia").join(format!("cu{major}"));
    let ready = kit.join("ready");
    if !ready.exists() {
        // What an interrupted installation left behind, if anything.
        let _ = fs::remove_dir_all(&kit);
        install(&kit, &home, &version)?;
        fs::write(&ready, "")?;
    }
    Ok(home)
}

fn install(kit: &Path, home: &Path, version: &str) -> Result<()> {
    let wheels = format!("cuda-toolkit[nvcc,crt,nvvm,cccl,cudart,cublas,curand,nvrtc]=={version}");
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--root-user-action=ignore", "--no-cache-dir"]);
    status(pip.arg("--target").arg(kit).arg(wheels))?;
    if !home.join("bin/nvcc").exists() {
        bail!("the wheels of cuda-toolkit {version} brought no nvcc; those of {TOOLKIT} do");
    }

    // The wheels hold libNAME.so.VERSION alone; the linker asks for libNAME.so, and some build scripts for lib64.
    let lib = home.join("lib");
    for entry in fs::read_dir(&lib)? {
        let file = entry?.file_name().into_string().unwrap_or_default();
        match file.split_once(".so.") {
            Some((name, rest)) if !rest.contains(".so") && !name.ends_with(".alt") && !name.ends_with("-builtins") => {
                let link = lib.join(format!("{name}.so"));
                if !link.exists() {
                    symlink(&file, link)?;
                }
            }
            _ => {}
        }
    }
    if !home.join("lib64").exists() {
        symlink("lib", home.join("lib64"))?;
    }
    driver_stub(kit, home)
}

/// The driver's library comes with the driver, not with the toolkit. For linking, a stub with every `cu*` name of `cuda.h` does;
/// it must never come near `LD_LIBRARY_PATH`.
fn driver_stub(kit: &Path, home: &Path) -> Result<()> {
    let header = home.join("include/cuda.h");
    let text = fs::read_to_string(&header).with_context(|| format!("reading {}", header.display()))?;
    let is_function = |word: &&str| word.strip_prefix("cu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_uppercase()));
    let names: BTreeSet<&str> = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(is_function).collect();
    let source = kit.join("stub.c");
    fs::write(&source, names.iter().map(|name| format!("void {name}(void) {{}}\n")).collect::<String>())?;
    let stubs = home.join("lib/stubs");
    fs::create_dir_all(&stubs)?;
    let mut gcc = Command::new("gcc");
    gcc.args(["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o"]).arg(stubs.join("libcuda.so"));
    status(gcc.arg(source))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::output;

    #[test]
    fn the_stand_in_answers_as_the_build_scripts_read_it() {
        let dir = env::temp_dir().join(format!("kd-xtask-nvcc-{}", std::process::id()));
        let nvcc = stand_in(&dir.join("bin")).unwrap().join("nvcc");
        let run = |args: &[&str]| output(Command::new(&nvcc).args(args).current_dir(&dir)).unwrap();
        // cudarc takes the word behind ", release " in the fourth line.
        let version = run(&["--version"]);
        assert!(version.lines().nth(3).unwrap().contains(", release 13.0, "), "{version}");
        run(&["-c", "-o", "a.o", "-O3", "x/a.cu"]);
        run(&["--lib", "-o", "libmoe.a", "a.o"]);
        run(&["--ptx", "--output-directory", ".", "-std=c++17", "x/unary.cu"]);
        assert_eq!(fs::read(dir.join("libmoe.a")).unwrap(), b"!<arch>\n");
        assert!(dir.join("a.o").exists() && dir.join("unary.ptx").exists());
        fs::remove_dir_all(dir).unwrap();
    }
}
