//! Checkpoints that survive being killed at any moment.
//!
//! A folder (`checkpoints/last`, `checkpoints/best`) holds generations, numbered upwards: `<n>.safetensors` with the tensors, then
//! `<n>.json` with the state and the SHA-256 of both. The JSON file is the commit: it appears last and whole, and no file is ever
//! written twice. Older generations are removed only after that. A torn or flipped byte in either file is found when it is read.

use std::path::{Path, PathBuf};

use kd_core::StateDict;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::files::{Files, create_durable, remove_scratch, write_durable};
use crate::parts::{StringMap, from_safetensors, sha256, to_safetensors};
use crate::{Error, Result};

/// The JSON file begins with this; then come the digest of everything after the digest, and the rest.
const HEAD: &str = "{\"sha256\":\"";
const DIGEST: usize = 64;

/// A folder of generations.
pub(crate) struct Generations {
    dir: PathBuf,
}

impl Generations {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The state file of generation `n`.
    pub(crate) fn path(&self, n: u64) -> PathBuf {
        self.dir.join(format!("{n:06}.json"))
    }

    /// Makes the folder and removes what killed saves left: scratch files and tensors without their state.
    pub(crate) fn open(&self, files: &dyn Files) -> Result<()> {
        create_durable(files, &self.dir)?;
        remove_scratch(files, &self.dir)?;
        let committed = self.committed(files)?;
        self.remove_unless(files, |n| committed.contains(&n))
    }

    /// The committed generations, newest first.
    pub(crate) fn committed(&self, files: &dyn Files) -> Result<Vec<u64>> {
        let names = files.list(&self.dir).map_err(|e| Error::io("listing", &self.dir, e))?;
        let mut found: Vec<u64> = names.iter().filter_map(|name| name.strip_suffix(".json")?.parse().ok()).collect();
        found.sort_unstable_by(|a, b| b.cmp(a));
        Ok(found)
    }

    /// Writes generation `n`, which must not exist.
    pub(crate) fn save(&self, files: &dyn Files, n: u64, state: &impl Serialize, tensors: &StateDict) -> Result<()> {
        let data = to_safetensors(tensors.iter().map(|(k, v)| (k.as_str(), v)), &StringMap::new())?;
        let state = serde_json::to_string(state).map_err(kd_core::Error::from)?;
        let rest = format!("\",\"tensors_sha256\":\"{}\",\"state\":{state}}}\n", sha256(&data));
        write_durable(files, &self.tensors(n), &data)?;
        write_durable(files, &self.path(n), format!("{HEAD}{}{rest}", sha256(rest.as_bytes())).as_bytes())
    }

    /// Reads and verifies generation `n`.
    ///
    /// # Errors
    /// [`Error::Damaged`] when either file is not what was written.
    pub(crate) fn load<S: DeserializeOwned>(&self, files: &dyn Files, n: u64) -> Result<(S, StateDict)> {
        #[derive(serde::Deserialize)]
        struct Commit<S> {
            tensors_sha256: String,
            state: S,
        }
        let path = self.path(n);
        let text = read(files, &path)?;
        let verified = text
            .strip_prefix(HEAD.as_bytes())
            .and_then(|t| t.split_at_checked(DIGEST))
            .is_some_and(|(d, rest)| sha256(rest).as_bytes() == d);
        if !verified {
            return Err(Error::damaged(path, "its checksum does not fit"));
        }
        let commit: Commit<S> = serde_json::from_slice(&text).map_err(|e| Error::damaged(&path, e))?;
        let path = self.tensors(n);
        let data = read(files, &path)?;
        if sha256(&data) != commit.tensors_sha256 {
            return Err(Error::damaged(path, "its checksum does not fit"));
        }
        Ok((commit.state, from_safetensors(&data).map_err(|e| Error::damaged(path, e))?))
    }

    /// Removes every generation but those in `keep`. What cannot be removed is tried again next time: the checkpoint itself is safe.
    pub(crate) fn prune(&self, files: &dyn Files, keep: &[u64]) {
        let _ = self.remove_unless(files, |n| keep.contains(&n));
    }

    fn tensors(&self, n: u64) -> PathBuf {
        self.dir.join(format!("{n:06}.safetensors"))
    }

    fn remove_unless(&self, files: &dyn Files, keep: impl Fn(u64) -> bool) -> Result<()> {
        let names = files.list(&self.dir).map_err(|e| Error::io("listing", &self.dir, e))?;
        // In order of the names the state file goes first: a kill in between leaves tensors without state, not state without tensors.
        for name in names {
            let generation = name.split_once('.').and_then(|(n, _)| n.parse::<u64>().ok());
            if generation.is_some_and(|n| !keep(n)) {
                let path = self.dir.join(name);
                files.remove(&path).map_err(|e| Error::io("removing", &path, e))?;
            }
        }
        Ok(())
    }
}

fn read(files: &dyn Files, path: &Path) -> Result<Vec<u8>> {
    files.read(path).map_err(|e| Error::damaged(path, e))
}
