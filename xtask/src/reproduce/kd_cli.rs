//! The program that does the work, as a child process, and what it says it can do.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Map, Value};

use super::table::Row;
use crate::workspace::{kd_cli, output};

/// A `kd-cli` and its registries.
pub(super) struct KdCli {
    pub(super) path: PathBuf,
    pub(super) registry: Registry,
}

/// How a child process ended.
pub(super) struct Ended {
    pub(super) code: Option<i32>,
    /// Its errors and the lines around them.
    pub(super) message: String,
}

impl KdCli {
    /// The given program, or the checkout's own, built if need be.
    pub(super) fn open(given: Option<&Path>) -> Result<Self> {
        let path = match given {
            Some(path) => std::path::absolute(path)?,
            None => kd_cli()?,
        };
        let text = output(Command::new(&path).args(["list", "--json"]))?;
        Ok(Self { registry: Registry::of(&serde_json::from_str(&text)?)?, path })
    }

    /// Runs it, passing its progress on.
    pub(super) fn run(&self, args: &[&str]) -> Result<Ended> {
        Ok(self.watched(args, |_| ())?.0)
    }

    /// Runs it, with the most memory it had, in MiB, where the system tells.
    pub(super) fn measured(&self, args: &[&str]) -> Result<(Ended, Option<u64>)> {
        self.watched(args, |pid| {
            let peak = || {
                let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
                status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok())
            };
            // The kernel keeps the peak, but only for as long as the process lives; a zombie has none.
            let mut most = None;
            while let Some(kib) = peak() {
                most = Some(kib / 1024);
                std::thread::sleep(Duration::from_millis(20));
            }
            most
        })
    }

    fn watched<T: Send>(&self, args: &[&str], watch: impl FnOnce(u32) -> T + Send) -> Result<(Ended, T)> {
        let mut child = Command::new(&self.path)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", self.path.display()))?;
        let stderr = child.stderr.take().context("invariant: stderr is piped")?;
        let pid = child.id();
        std::thread::scope(|scope| {
            let watch = scope.spawn(move || watch(pid));
            let message = pass_on(stderr);
            // Waited for only now: until then the process, or what is left of it, keeps its number.
            let seen = watch.join();
            let code = child.wait()?.code();
            Ok((Ended { code, message }, seen.map_err(|_| anyhow!("the watching thread panicked"))?))
        })
    }
}

/// Shows a child's messages and returns its error, or else its last word.
fn pass_on(stderr: impl Read) -> String {
    let mut tail: Vec<String> = vec![];
    for line in BufReader::new(stderr).lines() {
        let line = line.unwrap_or_default();
        show(&line);
        if tail.len() == 20 {
            tail.remove(0);
        }
        tail.push(line);
    }
    let errors: Vec<&str> = tail.iter().skip_while(|l| !l.starts_with("error")).map(String::as_str).collect();
    if errors.is_empty() { tail.last().cloned().unwrap_or_default() } else { errors.join(" ") }
}

#[allow(clippy::print_stderr, reason = "progress belongs there")]
fn show(line: &str) {
    eprintln!("{line}");
}

/// What `kd-cli list --json` lists.
#[derive(Default)]
pub(super) struct Registry {
    /// Parameters of each method with their defaults.
    methods: BTreeMap<String, BTreeMap<String, Value>>,
    /// Views that a method with default parameters needs.
    views: BTreeMap<String, u64>,
    /// Side of the input and parameters of each network.
    models: BTreeMap<String, (u64, u64)>,
    /// Sources of data, and whether they take an argument.
    sources: BTreeMap<String, bool>,
}

impl Registry {
    pub(super) fn of(list: &Value) -> Result<Self> {
        let mut registry = Self::default();
        for entry in list.as_array().context("kd-cli list --json gave no list")? {
            let name = entry["name"].as_str().unwrap_or_default().to_string();
            match entry["kind"].as_str() {
                Some("method") => {
                    let parameter = |p: &Value| {
                        let default = p["default"].as_str().and_then(|d| serde_json::from_str(d).ok()).unwrap_or(Value::Null);
                        Some((p["name"].as_str()?.to_string(), default))
                    };
                    let parameters = entry["parameters"].as_array().into_iter().flatten().filter_map(parameter).collect();
                    registry.views.insert(name.clone(), entry["needs"]["views"].as_u64().unwrap_or(1));
                    registry.methods.insert(name, parameters);
                }
                Some("model") => {
                    let side = entry["needs"]["input"][1].as_u64().unwrap_or(32);
                    registry.models.insert(name, (side, entry["parameters"]["params"].as_u64().unwrap_or(0)));
                }
                Some("dataset") => {
                    registry.sources.insert(name, entry["needs"]["argument"].as_str().is_some_and(|a| !a.is_empty()));
                }
                other => bail!("kd-cli list --json has an entry of kind {other:?}"),
            }
        }
        Ok(registry)
    }

    /// Names and defaults of a method's parameters.
    pub(super) fn defaults(&self, method: &str) -> impl Iterator<Item = (&String, &Value)> {
        self.methods.get(method).into_iter().flatten()
    }

    /// Views of an image that these losses need, wrapped ones included.
    pub(super) fn views(&self, losses: &[Map<String, Value>]) -> u64 {
        losses.iter().map(|l| self.views_of(&Value::Object(l.clone()))).max().unwrap_or(1)
    }

    /// Of a loss, or of one that wraps others by name or as a table.
    fn views_of(&self, loss: &Value) -> u64 {
        match loss {
            Value::String(name) => self.views.get(name).copied().unwrap_or(1),
            Value::Object(keys) => {
                let inner =
                    |(key, value): (&String, &Value)| (key == "method" || key == "base" || key == "distance").then(|| self.views_of(value));
                keys.iter().filter_map(inner).max().unwrap_or(1)
            }
            _ => 1,
        }
    }

    /// Side of the input of a network.
    pub(super) fn side(&self, model: &str) -> u64 {
        self.models.get(model).map_or(32, |m| m.0)
    }

    /// Parameters of a network.
    pub(super) fn parameters(&self, model: &str) -> u64 {
        self.models.get(model).map_or(0, |m| m.1)
    }

    /// Networks with at most so many parameters, small ones first.
    pub(super) fn networks(&self, most: u64) -> Vec<&str> {
        let mut all: Vec<(u64, &str)> = self.models.iter().map(|(name, m)| (m.1, name.as_str())).filter(|(n, _)| *n <= most).collect();
        all.sort_unstable();
        all.into_iter().map(|(_, name)| name).collect()
    }

    /// Every method.
    pub(super) fn method_names(&self) -> impl Iterator<Item = &str> {
        self.methods.keys().map(String::as_str)
    }

    /// Whether a source of data needs a place.
    pub(super) fn needs_place(&self, source: &str) -> bool {
        self.sources.get(source).copied().unwrap_or(true)
    }

    /// Why this kd-cli cannot run a row.
    pub(super) fn missing(&self, row: &Row) -> Option<String> {
        for network in row.teacher_model.iter().chain([&row.student]) {
            if !self.models.contains_key(network) {
                return Some(format!("network missing: kd has no `{network}` (kd-cli list models)"));
            }
        }
        if let Some(name) = &row.unknown {
            return Some(format!("no source gives `{name}` for this pair"));
        }
        for loss in &row.losses {
            let method = loss.get("method").and_then(Value::as_str).unwrap_or_default();
            let Some(parameters) = self.methods.get(method) else {
                return Some(format!("method missing: kd has no `{method}` (kd-cli list methods)"));
            };
            let outer = ["method", "weight", "teacher", "warmup_epochs", "warmup_first_epoch"];
            if let Some(key) = loss.keys().find(|k| !outer.contains(&k.as_str()) && !parameters.contains_key(*k)) {
                return Some(format!("method missing: `{method}` has no parameter `{key}` (kd-cli list methods)"));
            }
        }
        None
    }
}
