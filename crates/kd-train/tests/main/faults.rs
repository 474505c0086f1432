//! File calls that fail, processes that die between two of them, files that rot.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use kd_train::files::{Disk, Files};
use kd_train::{Error, Event, RunOptions, RunPlace};

use crate::support::{Recipe, place, remains};

/// What happens at the n-th call.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// It fails, once: a full disk that is emptied again.
    Once,
    /// The process dies before it: no call succeeds from there on.
    Death,
    /// The process dies in the middle of it: half of what was to be written is there.
    TornDeath,
    /// The machine loses power: as death, and what was written but not synced is half lost.
    PowerCut,
}

/// The disk, with a fault at call number `at`.
struct Faulty {
    fault: Fault,
    at: usize,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    calls: usize,
    /// Files written but not synced, with the length that was.
    unsynced: BTreeMap<PathBuf, u64>,
}

impl Faulty {
    fn new(fault: Fault, at: usize) -> Self {
        Self { fault, at, seen: Mutex::default() }
    }

    /// Counts a call; the error that it must fail with.
    fn call(&self) -> io::Result<()> {
        let mut seen = self.seen.lock().unwrap();
        seen.calls += 1;
        let n = seen.calls;
        if n == self.at && self.fault == Fault::PowerCut {
            for (path, synced) in std::mem::take(&mut seen.unsynced) {
                let file = File::options().write(true).open(&path)?;
                file.set_len((synced + file.metadata()?.len()) / 2)?;
            }
        }
        let fails = if self.fault == Fault::Once { n == self.at } else { n >= self.at };
        if fails { Err(io::Error::other(format!("fault {:?} at call {n}", self.fault))) } else { Ok(()) }
    }

    fn calls(&self) -> usize {
        self.seen.lock().unwrap().calls
    }
}

impl Files for Faulty {
    fn create_dirs(&self, dir: &Path) -> io::Result<()> {
        self.call()?;
        Disk.create_dirs(dir)
    }

    fn create_new(&self, path: &Path) -> io::Result<File> {
        self.call()?;
        Disk.create_new(path)
    }

    fn open_append(&self, path: &Path) -> io::Result<File> {
        self.call()?;
        Disk.open_append(path)
    }

    fn write(&self, file: &mut File, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let verdict = self.call();
        if verdict.is_err() && self.fault == Fault::TornDeath && self.calls() == self.at {
            Disk.write(file, path, &bytes[..bytes.len() / 2])?;
        }
        verdict?;
        let len = file.metadata()?.len();
        self.seen.lock().unwrap().unsynced.entry(path.to_path_buf()).or_insert(len);
        Disk.write(file, path, bytes)
    }

    fn truncate(&self, file: &File, len: u64) -> io::Result<()> {
        self.call()?;
        Disk.truncate(file, len)
    }

    fn sync(&self, _file: &File, path: &Path) -> io::Result<()> {
        self.call()?;
        self.seen.lock().unwrap().unsynced.remove(path);
        // The disk's own sync would take most of the test's time and show nothing.
        Ok(())
    }

    fn sync_dir(&self, _dir: &Path) -> io::Result<()> {
        self.call()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.call()?;
        let unsynced = &mut self.seen.lock().unwrap().unsynced;
        if let Some(len) = unsynced.remove(from) {
            unsynced.insert(to.to_path_buf(), len);
        }
        Disk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.call()?;
        self.seen.lock().unwrap().unsynced.remove(path);
        Disk.remove(path)
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.call()?;
        Disk.read(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.call()?;
        Disk.list(dir)
    }

    fn try_lock(&self, file: &File) -> io::Result<bool> {
        self.call()?;
        Disk.try_lock(file)
    }

    fn free_space(&self, dir: &Path) -> io::Result<Option<u64>> {
        self.call()?;
        Disk.free_space(dir)
    }
}

fn recipe() -> Recipe {
    let options = RunOptions { checkpoint_steps: 2, ..RunOptions::default() };
    let mut recipe = Recipe { methods: vec!["ce", "everything"], validation: true, options, ..Recipe::default() };
    recipe.schedule.epochs = 2;
    recipe
}

fn with(dir: &Path, files: Arc<dyn Files>) -> RunPlace {
    RunPlace { files, ..place(dir) }
}

/// Every file below `dir` that no run should leave.
fn leftovers(dir: &Path) -> Vec<PathBuf> {
    let mut found = vec![];
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(leftovers(&path));
        } else if path.to_string_lossy().ends_with(".tmp") {
            found.push(path);
        }
    }
    found
}

#[test]
fn whatever_file_call_fails_the_run_goes_on_from_a_whole_checkpoint() {
    let recipe = recipe();
    let whole = tempfile::tempdir().unwrap();
    let counter = Arc::new(Faulty::new(Fault::Once, 0));
    recipe.finish(Some(with(whole.path(), counter.clone())));
    let expected = remains(whole.path());
    let calls = counter.calls();
    assert!(calls > 100, "only {calls} calls");
    for fault in [Fault::Once, Fault::Death, Fault::TornDeath, Fault::PowerCut] {
        for n in 1..=calls {
            let dir = tempfile::tempdir().unwrap();
            match recipe.run(Some(with(dir.path(), Arc::new(Faulty::new(fault, n)))), None) {
                // A failing removal of what is no longer needed, or the very last call.
                Ok(_) => assert!(fault == Fault::Once || n > calls - 3, "{fault:?} at call {n} went unnoticed"),
                Err(e) => assert!(e.to_string().contains("fault"), "{fault:?} at call {n}: {e}"),
            }
            let healthy = Arc::new(Faulty::new(Fault::Once, 0));
            let (_, events) = recipe.run(Some(with(dir.path(), healthy)), None).unwrap_or_else(|e| panic!("{fault:?} at call {n}: {e}"));
            assert!(!events.iter().any(|e| matches!(e, Event::Warning { .. })), "{fault:?} at call {n}: {events:?}");
            assert!(remains(dir.path()) == expected, "{fault:?} at call {n}");
            assert_eq!(leftovers(dir.path()), Vec::<PathBuf>::new(), "{fault:?} at call {n}");
        }
    }
    println!("4 faults at each of {calls} file calls");
}

#[test]
fn faults_during_a_resume_are_survived_too() {
    let recipe = recipe();
    let whole = tempfile::tempdir().unwrap();
    recipe.finish(Some(place(whole.path())));
    let expected = remains(whole.path());
    for n in 1.. {
        let dir = tempfile::tempdir().unwrap();
        recipe.run(Some(place(dir.path())), Some(5)).unwrap();
        let ended = recipe.run(Some(with(dir.path(), Arc::new(Faulty::new(Fault::TornDeath, n)))), None).is_ok();
        recipe.finish(Some(place(dir.path())));
        assert!(remains(dir.path()) == expected, "call {n}");
        if ended {
            break;
        }
    }
}

/// Files of the newest checkpoint of an interrupted run.
fn newest(dir: &Path, sub: &str) -> [PathBuf; 2] {
    let dir = dir.join("checkpoints").join(sub);
    let names = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path());
    let json = names.filter(|p| p.extension().is_some_and(|e| e == "json")).max().unwrap();
    [json.with_extension("safetensors"), json]
}

#[test]
fn any_damage_to_the_newest_checkpoint_is_found_and_the_one_before_used() {
    let recipe = recipe();
    let whole = tempfile::tempdir().unwrap();
    recipe.finish(Some(place(whole.path())));
    let expected = remains(whole.path());
    for which in 0..2 {
        for damage in 0..40 {
            let dir = tempfile::tempdir().unwrap();
            recipe.run(Some(place(dir.path())), Some(7)).unwrap();
            let path = &newest(dir.path(), "last")[which];
            let mut bytes = std::fs::read(path).unwrap();
            let at = bytes.len() * damage / 40;
            if damage % 2 == 0 {
                bytes[at] ^= 1 << (damage % 8)
            } else {
                bytes.truncate(at)
            }
            std::fs::write(path, bytes).unwrap();
            let events = recipe.finish(Some(place(dir.path())));
            let warned = events.iter().any(|e| matches!(e, Event::Warning { message } if message.contains("damaged")));
            assert!(warned, "file {which}, damage {damage} went unnoticed");
            assert!(remains(dir.path()) == expected, "file {which}, damage {damage}");
        }
    }
}

#[test]
fn a_damaged_best_student_is_not_exported() {
    let recipe = recipe();
    let dir = tempfile::tempdir().unwrap();
    recipe.run(Some(place(dir.path())), Some(7)).unwrap();
    let [tensors, _] = newest(dir.path(), "best");
    let mut bytes = std::fs::read(&tensors).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&tensors, bytes).unwrap();
    let error = recipe.run(Some(place(dir.path())), None).unwrap_err();
    assert!(matches!(&error, Error::Damaged { path, .. } if *path == tensors), "{error}");
}

#[test]
fn two_runs_do_not_share_a_directory() {
    let recipe = recipe();
    let dir = tempfile::tempdir().unwrap();
    recipe.run(Some(place(dir.path())), Some(1)).unwrap();
    let holder = File::options().append(true).open(dir.path().join("lock")).unwrap();
    holder.lock().unwrap();
    let error = recipe.run(Some(place(dir.path())), None).unwrap_err();
    let process = format!("process {}", std::process::id());
    assert!(matches!(&error, Error::Locked { holder, .. } if *holder == process), "{error}");
    drop(holder);
    recipe.finish(Some(place(dir.path())));
}

/// A disk with hardly any space.
struct Full;

impl Files for Full {
    fn free_space(&self, _: &Path) -> io::Result<Option<u64>> {
        Ok(Some(1000))
    }
}

#[test]
fn a_full_disk_is_noticed_before_the_first_step() {
    let dir = tempfile::tempdir().unwrap();
    let error = recipe().run(Some(with(dir.path(), Arc::new(Full))), None).unwrap_err();
    assert!(matches!(error, Error::Space { free: 1000, .. }), "{error}");
    assert!(Disk.free_space(dir.path()).unwrap().is_none_or(|free| free > 0));
}
