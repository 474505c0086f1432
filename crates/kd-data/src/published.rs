//! What the readers of published image sets share: a listing in which their files are looked up, and their small tables.

use std::collections::BTreeMap;
use std::path::Path;

use crate::root::{Entry, Root};
use crate::{Error, Result};

/// A root with the files below it.
pub(crate) struct Listing {
    pub(crate) root: Root,
    files: BTreeMap<String, u64>,
    base: String,
}

impl Listing {
    /// Opens `path`, below which the set's folder is the outermost one that holds the file `landmark`; `expected` says so in the error.
    pub(crate) fn open(path: &str, landmark: &str, expected: &str) -> Result<Self> {
        let root = Root::open(Path::new(path))?;
        let files: BTreeMap<String, u64> = root.list()?.into_iter().map(|e| (e.name, e.bytes)).collect();
        let bases = files.keys().filter_map(|name| name.strip_suffix(landmark)).filter(|base| base.is_empty() || base.ends_with('/'));
        let base = bases.min_by_key(|base| base.len()).map(str::to_string);
        let base = base.ok_or_else(|| Error::not_found(path, format!("expected {landmark} in this folder or below it: {expected}")))?;
        Ok(Self { root, files, base })
    }

    /// The file `name` of the set.
    pub(crate) fn entry(&self, name: &str) -> Result<Entry> {
        let name = format!("{}{name}", self.base);
        match self.files.get(&name) {
            Some(&bytes) => Ok(Entry { name, bytes }),
            None => Err(Error::not_found(self.root.path(&name), "the set names this file, but it is not there")),
        }
    }

    /// Every file, named from the set's folder on.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.files.keys().filter_map(|name| name.strip_prefix(&self.base)).filter(|name| !name.ends_with('/'))
    }

    /// The lines of the text file `name` that are not blank, as `line` reads them; `None` is an error that says what was `expected`.
    pub(crate) fn lines<T>(&self, name: &str, expected: &str, line: impl Fn(&str) -> Option<T>) -> Result<Vec<T>> {
        let entry = self.entry(name)?;
        let path = self.root.path(&entry.name);
        let text = String::from_utf8(self.root.read(&entry.name)?).map_err(|e| Error::corrupt(&path, format!("not UTF-8 text: {e}")))?;
        let lines = text.lines().enumerate().filter(|(_, text)| !text.trim().is_empty());
        let read = |(n, text): (usize, &str)| {
            line(text.trim()).ok_or_else(|| Error::corrupt(&path, format!("line {}: expected {expected}", n + 1)))
        };
        lines.map(read).collect()
    }

    /// An error about the file `name`.
    pub(crate) fn corrupt(&self, name: &str, why: String) -> Error {
        Error::corrupt(&self.root.path(&format!("{}{name}", self.base)), why)
    }
}
