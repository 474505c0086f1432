//! The image files of one set.

use std::path::PathBuf;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::root::{Entry, Root};
use crate::{Image, Result, decode};

/// Images whose heads are read when a set is opened, to see whether all have one size.
const PROBES: usize = 32;

#[derive(Debug)]
pub(crate) struct Files {
    root: Arc<Root>,
    entries: Vec<Entry>,
    size: Option<[usize; 2]>,
}

impl Files {
    /// Reads the heads of some of the files, spread evenly.
    pub(crate) fn new(root: Arc<Root>, entries: Vec<Entry>) -> Result<Self> {
        let mut files = Self { root, entries, size: None };
        let probes = files.entries.iter().step_by(files.entries.len().div_ceil(PROBES).max(1));
        let sizes = probes.map(|e| decode::size(&files.root.path(&e.name), &files.root.read(&e.name)?)).collect::<Result<Vec<_>>>()?;
        files.size = sizes.first().copied().filter(|first| sizes.iter().all(|s| s == first));
        Ok(files)
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The `[H,W]` that all images have, as far as was looked; `None` where they differ.
    pub(crate) fn size(&self) -> Option<[usize; 2]> {
        self.size
    }

    pub(crate) fn path(&self, i: usize) -> PathBuf {
        self.root.path(&self.entries[i].name)
    }

    pub(crate) fn read(&self, i: usize, into: &mut Image) -> Result<()> {
        decode::decode(&self.path(i), &self.root.read(&self.entries[i].name)?, into)
    }

    pub(crate) fn hash(&self, i: usize, hasher: &mut Sha256) {
        let Entry { name, bytes } = &self.entries[i];
        hasher.update((name.len() as u64).to_le_bytes());
        hasher.update(name);
        hasher.update(bytes.to_le_bytes());
    }
}
