//! The directory of a run.
//!
//! | file | holds |
//! |---|---|
//! | `config.toml` | the resolved configuration |
//! | `run.json` | version, machine, command, fingerprints of data and networks, the result once there is one |
//! | `metrics.jsonl` | one line per step, evaluation and warning, each once however often the run was resumed |
//! | `checkpoints/last/`, `checkpoints/best/` | generations of everything a resume needs, and of the best student |
//! | `student.safetensors` | the exported student under its PyTorch names |
//! | `lock` | locked by the process at work, and naming it |
//!
//! Opening a directory tells a finished run from one to go on with from one to begin.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Tensor;
use kd_core::StateDict;
use serde::{Deserialize, Serialize};

use crate::checkpoint::Generations;
use crate::events::{Event, JsonLines, Sink};
use crate::files::{Disk, Files, create_durable, remove_scratch, write_durable};
use crate::parts::{StringMap, sha256, to_safetensors};
use crate::state::{Best, EpochRecord, RunResult, RunState};
use crate::{Error, Result};

/// Where a run goes, and what is written down about it.
#[derive(Clone)]
pub struct RunPlace {
    /// The run directory; made when there is none.
    pub dir: PathBuf,
    /// The resolved configuration, [`Config::to_toml`](crate::Config::to_toml). A resume must bring the same.
    pub config: String,
    /// The command line.
    pub command: Vec<String>,
    /// Metadata of the exported weights: model, classes, normalisation.
    pub metadata: StringMap,
    /// The disk.
    pub files: Arc<dyn Files>,
}

impl RunPlace {
    /// In `dir` on the real disk.
    pub fn new(dir: impl Into<PathBuf>, config: impl Into<String>) -> Self {
        Self { dir: dir.into(), config: config.into(), command: vec![], metadata: StringMap::new(), files: Arc::new(Disk) }
    }
}

/// `run.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct RunRecord {
    /// The version that began the run.
    kd: String,
    machine: Machine,
    command: Vec<String>,
    fingerprints: StringMap,
    result: Option<RunResult>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Machine {
    os: String,
    arch: String,
    cores: usize,
}

impl Machine {
    fn present() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { os: std::env::consts::OS.to_string(), arch: std::env::consts::ARCH.to_string(), cores }
    }
}

/// State and tensors.
pub(crate) type Checkpoint = (RunState, StateDict);

/// What a run directory turned out to be.
pub(crate) enum Opened {
    /// The run ended some time ago.
    Finished(Box<RunResult>),
    /// There is something to do.
    Ready(Box<RunDir>, Option<Box<Checkpoint>>),
}

/// An open, locked run directory.
pub(crate) struct RunDir {
    place: RunPlace,
    record: RunRecord,
    metrics: JsonLines,
    last: Generations,
    best: Generations,
    /// Generations of `last` to keep, oldest first, each with the generation of `best` that it names.
    kept: Vec<(u64, Option<u64>)>,
    /// The next free generation number, for both.
    next: u64,
    /// Damage found while opening.
    pub(crate) warnings: Vec<String>,
    _lock: File,
}

impl RunDir {
    /// Opens `place` for a run with these inputs.
    ///
    /// # Errors
    /// Another process at work there, another run's directory, no checkpoint that can be read.
    pub(crate) fn open(place: RunPlace, mut fingerprints: StringMap) -> Result<Opened> {
        // The file itself may be edited between two sessions; `run.json` remembers what the run began with.
        fingerprints.insert("configuration".to_string(), sha256(place.config.as_bytes()));
        let files = Arc::clone(&place.files);
        let files = files.as_ref();
        create_durable(files, &place.dir)?;
        let lock = lock(files, &place.dir)?;
        remove_scratch(files, &place.dir)?;

        let config = place.dir.join("config.toml");
        match read(files, &config)? {
            None => write_durable(files, &config, place.config.as_bytes())?,
            Some(recorded) => same_config(&place.dir, &String::from_utf8_lossy(&recorded), &place.config)?,
        }
        let path = place.dir.join("run.json");
        let record = match read(files, &path)? {
            Some(bytes) => {
                let record: RunRecord = serde_json::from_slice(&bytes).map_err(|e| Error::damaged(&path, e))?;
                same_fingerprints(&place.dir, &record.fingerprints, &fingerprints)?;
                record
            }
            None => {
                let kd = env!("CARGO_PKG_VERSION").to_string();
                let record = RunRecord { kd, machine: Machine::present(), command: place.command.clone(), fingerprints, result: None };
                write_record(files, &path, &record)?;
                record
            }
        };
        if let Some(result) = record.result {
            return Ok(Opened::Finished(Box::new(result)));
        }

        let checkpoints = place.dir.join("checkpoints");
        create_durable(files, &checkpoints)?;
        let (last, best) = (Generations::new(checkpoints.join("last")), Generations::new(checkpoints.join("best")));
        last.open(files)?;
        best.open(files)?;
        let next = 1 + last.committed(files)?.into_iter().chain(best.committed(files)?).max().unwrap_or(0);
        let mut warnings = vec![];
        let mut found = None;
        let mut damage = None;
        for n in last.committed(files)? {
            // A checkpoint counts only with the best student that it names.
            let whole = last.load::<RunState>(files, n).and_then(|(state, tensors)| {
                state.best.as_ref().map_or(Ok(()), |b| best.load::<EpochRecord>(files, b.generation).map(|_| ()))?;
                Ok((state, tensors))
            });
            match whole {
                Ok(checkpoint) => {
                    found = Some((n, checkpoint));
                    break;
                }
                Err(e) => {
                    warnings.push(format!("checkpoint {n} is damaged ({e}); going on from the one before"));
                    damage = Some(e);
                }
            }
        }
        if let (None, Some(damage)) = (&found, damage) {
            return Err(damage);
        }
        let metrics_len = found.as_ref().map_or(0, |(_, (state, _))| state.metrics_len);
        let metrics = JsonLines::open(Arc::clone(&place.files), &place.dir.join("metrics.jsonl"), metrics_len)?;
        let kept = found.iter().map(|(n, (state, _))| (*n, state.best.as_ref().map(|b| b.generation))).collect();
        let dir = Self { place, record, metrics, last, best, kept, next, warnings, _lock: lock };
        Ok(Opened::Ready(Box::new(dir), found.map(|(_, checkpoint)| Box::new(checkpoint))))
    }

    /// Saves everything a resume needs; the two newest checkpoints stay.
    pub(crate) fn save_last(&mut self, state: &mut RunState, tensors: &StateDict) -> Result<PathBuf> {
        state.metrics_len = self.metrics.sync()?;
        let n = self.take_number();
        let files = Arc::clone(&self.place.files);
        self.last.save(files.as_ref(), n, state, tensors)?;
        self.kept.push((n, state.best.as_ref().map(|b| b.generation)));
        self.kept.drain(..self.kept.len().saturating_sub(2));
        self.last.prune(files.as_ref(), &self.kept.iter().map(|k| k.0).collect::<Vec<_>>());
        self.best.prune(files.as_ref(), &self.kept.iter().filter_map(|k| k.1).collect::<Vec<_>>());
        Ok(self.last.path(n))
    }

    /// Saves the best student so far. It counts from the next checkpoint on.
    pub(crate) fn save_best(&mut self, record: EpochRecord, tensors: &StateDict) -> Result<Best> {
        let generation = self.take_number();
        self.best.save(self.place.files.as_ref(), generation, &record, tensors)?;
        Ok(Best { generation, record })
    }

    /// The tensors of the best student.
    pub(crate) fn load_best(&self, best: &Best) -> Result<StateDict> {
        Ok(self.best.load::<EpochRecord>(self.place.files.as_ref(), best.generation)?.1)
    }

    /// Writes the exported student, then the result: after that the run is finished.
    pub(crate) fn finish(&mut self, student: &[(String, Tensor)], result: &RunResult) -> Result<()> {
        let files = self.place.files.as_ref();
        let weights = to_safetensors(student.iter().map(|(k, v)| (k.as_str(), v)), &self.place.metadata)?;
        write_durable(files, &self.place.dir.join("student.safetensors"), &weights)?;
        self.metrics.sync()?;
        self.record.result = Some(result.clone());
        write_record(files, &self.place.dir.join("run.json"), &self.record)
    }

    /// Refuses to begin when fewer than `needed` bytes are free.
    pub(crate) fn require_space(&self, needed: u64) -> Result<()> {
        let dir = &self.place.dir;
        match self.place.files.free_space(dir).map_err(|e| Error::io("asking for the free space of", dir, e))? {
            Some(free) if free < needed => Err(Error::Space { dir: dir.clone(), needed, free }),
            _ => Ok(()),
        }
    }

    fn take_number(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }
}

impl Sink for RunDir {
    fn event(&mut self, event: &Event) -> Result<()> {
        self.metrics.event(event)
    }
}

/// A place in which nobody has begun a run.
pub(crate) struct Vacancy {
    place: RunPlace,
    /// Whether the folder was there already.
    had_folder: bool,
}

/// `None` where a run has begun.
pub(crate) fn vacancy(place: &RunPlace) -> Option<Vacancy> {
    let config = place.files.read(&place.dir.join("config.toml"));
    let had_folder = place.files.is_dir(&place.dir);
    config.is_err_and(|e| e.kind() == io::ErrorKind::NotFound).then(|| Vacancy { place: place.clone(), had_folder })
}

/// Takes back what [`RunDir::open`] made in a vacant place, unless something was saved there since. Whatever cannot be removed stays.
pub(crate) fn withdraw(Vacancy { place, had_folder }: &Vacancy) {
    let (files, dir) = (place.files.as_ref(), &place.dir);
    let checkpoints = dir.join("checkpoints");
    let folders = [checkpoints.join("last"), checkpoints.join("best")];
    if !folders.iter().all(|folder| files.list(folder).is_ok_and(|names| names.is_empty())) {
        return;
    }
    // The lock last: as long as it is there, nobody takes half a directory for a run.
    for folder in folders.iter().chain([&checkpoints]) {
        let _ = files.remove_dir(folder);
    }
    for name in ["metrics.jsonl", "run.json", "config.toml", "lock"] {
        let _ = files.remove(&dir.join(name));
    }
    if !had_folder {
        let _ = files.remove_dir(dir);
    }
}

/// How the run in `dir` ended; `None` while it has not.
pub fn result(dir: &Path) -> Result<Option<RunResult>> {
    let path = dir.join("run.json");
    let Some(bytes) = read(&Disk, &path)? else { return Ok(None) };
    let record: RunRecord = serde_json::from_slice(&bytes).map_err(|e| Error::damaged(&path, e))?;
    Ok(record.result)
}

/// The exported student of a finished run.
pub(crate) fn exported(place: &RunPlace) -> Result<StateDict> {
    let path = place.dir.join("student.safetensors");
    let bytes = place.files.read(&path).map_err(|e| Error::io("reading", &path, e))?;
    crate::parts::from_safetensors(&bytes).map_err(|e| Error::damaged(path, e))
}

fn lock(files: &dyn Files, dir: &Path) -> Result<File> {
    let path = dir.join("lock");
    let mut file = files.open_append(&path).map_err(|e| Error::io("opening", &path, e))?;
    if !files.try_lock(&file).map_err(|e| Error::io("locking", &path, e))? {
        let holder = files.read(&path).map(|b| String::from_utf8_lossy(&b).trim().to_string()).unwrap_or_default();
        return Err(Error::Locked {
            dir: dir.to_path_buf(),
            holder: if holder.is_empty() { "another process".to_string() } else { holder },
        });
    }
    files.truncate(&file, 0).map_err(|e| Error::io("emptying", &path, e))?;
    files.write(&mut file, &path, format!("process {}\n", std::process::id()).as_bytes()).map_err(|e| Error::io("writing", &path, e))?;
    Ok(file)
}

/// The content of a file that may not be there.
fn read(files: &dyn Files, path: &Path) -> Result<Option<Vec<u8>>> {
    match files.read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("reading", path, e)),
    }
}

fn write_record(files: &dyn Files, path: &Path, record: &RunRecord) -> Result<()> {
    let mut text = serde_json::to_string_pretty(record).map_err(kd_core::Error::from)?;
    text.push('\n');
    write_durable(files, path, text.as_bytes())
}

fn same_config(dir: &Path, recorded: &str, present: &str) -> Result<()> {
    if recorded == present {
        return Ok(());
    }
    let (mut old, mut new) = (recorded.lines(), present.lines());
    loop {
        let (old, new) = (old.next(), new.next());
        if old != new || old.is_none() {
            let quote = |line: Option<&str>| line.map_or("nothing".to_string(), |l| format!("`{l}`"));
            return Err(mismatch(dir, "configuration", quote(old), quote(new)));
        }
    }
}

fn same_fingerprints(dir: &Path, recorded: &StringMap, present: &StringMap) -> Result<()> {
    for key in recorded.keys().chain(present.keys()) {
        let (old, new) = (recorded.get(key), present.get(key));
        if old != new {
            let quote = |value: Option<&String>| value.map_or("nothing", |v| v.as_str()).to_string();
            return Err(mismatch(dir, key, quote(old), quote(new)));
        }
    }
    Ok(())
}

fn mismatch(dir: &Path, what: &str, recorded: String, present: String) -> Error {
    Error::Mismatch { dir: dir.to_path_buf(), what: what.to_string(), recorded, present }
}
