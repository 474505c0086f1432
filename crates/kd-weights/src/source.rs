//! A file opened for reading, whose size bounds every allocation.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

pub(crate) struct Source {
    path: PathBuf,
    file: File,
    len: u64,
}

impl Source {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let io = |source| Error::Io { path: path.to_path_buf(), source };
        // Before opening: a pipe would wait for a writer.
        let about = std::fs::metadata(path).map_err(io)?;
        if !about.is_file() {
            let found = if about.is_dir() { "a folder" } else { "not a plain file" };
            return Err(io(io::Error::new(io::ErrorKind::InvalidInput, format!("{found}; expected a weight file"))));
        }
        let file = File::open(path).map_err(io)?;
        Ok(Self { path: path.to_path_buf(), file, len: about.len() })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(crate) fn corrupt(&self, why: impl std::fmt::Display) -> Error {
        Error::Corrupt { path: self.path.clone(), why: why.to_string() }
    }

    pub(crate) fn io(&self, source: io::Error) -> Error {
        Error::Io { path: self.path.clone(), source }
    }

    /// The first `len` bytes, or all when there are fewer.
    pub(crate) fn head(&self, len: u64) -> Result<Vec<u8>> {
        self.read_at(0, len.min(self.len), "the beginning")
    }

    /// `len` bytes from `offset` on; `what` they are, for the message.
    pub(crate) fn read_at(&self, offset: u64, len: u64, what: &str) -> Result<Vec<u8>> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(self.corrupt(format!("cut short: {what} takes {len} bytes from byte {offset} on, the file has {}", self.len)));
        }
        // Within the file's own size, so the allocation is one that the file has paid for.
        let mut bytes = vec![0; len as usize];
        let mut file = &self.file;
        file.seek(SeekFrom::Start(offset)).and_then(|_| file.read_exact(&mut bytes)).map_err(|e| self.io(e))?;
        Ok(bytes)
    }
}
