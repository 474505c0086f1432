//! A folder, or a zip file in its place: the names below it and their bytes.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use zip::ZipArchive;

use crate::{Error, Result};

/// Names below one root; more is taken for a mistake (all of ImageNet-1k has 1.4 million).
const MAX_NAMES: usize = 2_000_000;
/// Folders within folders; more is taken for a loop of links.
const MAX_DEPTH: usize = 12;
/// Bytes of one file.
const MAX_BYTES: u64 = 512 << 20;

/// A name below a root.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) bytes: u64,
}

/// Where files are read from, by names relative to it whose parts are joined by `/`.
#[derive(Debug)]
pub(crate) struct Root {
    path: PathBuf,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Folder,
    Zip(Mutex<ZipArchive<Shared>>),
    /// The files of a container that was read before, by name.
    #[cfg(feature = "hub")]
    Memory(std::collections::BTreeMap<String, Vec<u8>>),
}

impl Root {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let kind = match path.is_dir() {
            true => Kind::Folder,
            false if path.is_file() => {
                let file = File::open(path).map_err(Error::io(path))?;
                let shared = Shared { file: Arc::new(Mutex::new(file)), at: 0 };
                let archive = ZipArchive::new(shared).map_err(|e| Error::corrupt(path, format!("expected a folder or a zip file: {e}")))?;
                Kind::Zip(Mutex::new(archive))
            }
            false => return Err(Error::not_found(path, "expected a folder or a zip file")),
        };
        Ok(Self { path: path.to_path_buf(), kind })
    }

    /// Of files that are in memory; `path` stands for their place in messages.
    #[cfg(feature = "hub")]
    pub(crate) fn memory(path: impl Into<PathBuf>, files: std::collections::BTreeMap<String, Vec<u8>>) -> Self {
        Self { path: path.into(), kind: Kind::Memory(files) }
    }

    /// Every file and, with a `/` at its end, every folder, in byte order of the names. Hidden ones (a part that begins with a dot) and what
    /// macOS adds to archives are left out.
    pub(crate) fn list(&self) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        match &self.kind {
            Kind::Folder => self.walk(&self.path, "", 0, &mut entries)?,
            #[cfg(feature = "hub")]
            Kind::Memory(files) => entries.extend(files.iter().map(|(name, data)| Entry { name: name.clone(), bytes: data.len() as u64 })),
            Kind::Zip(zip) => {
                let archive = archive(zip);
                self.check_count(archive.len())?;
                let broken = |e| Error::corrupt(&self.path, format!("its directory is damaged: {e}"));
                for i in 0..archive.len() {
                    let entry = archive.by_index_data(i).map_err(broken)?;
                    entries.push(Entry { name: entry.name().map_err(broken)?.into_owned(), bytes: entry.size() });
                }
            }
        }
        entries.retain(|e| !e.name.split('/').any(|part| part.starts_with('.') || part == "__MACOSX"));
        entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn check_count(&self, count: usize) -> Result<()> {
        match count > MAX_NAMES {
            true => Err(Error::corrupt(&self.path, format!("more than {MAX_NAMES} files"))),
            false => Ok(()),
        }
    }

    fn walk(&self, folder: &Path, prefix: &str, depth: usize, entries: &mut Vec<Entry>) -> Result<()> {
        if depth > MAX_DEPTH {
            return Err(Error::corrupt(folder, format!("folders more than {MAX_DEPTH} deep: a link to a folder above?")));
        }
        for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
            let entry = entry.map_err(Error::io(folder))?;
            let path = entry.path();
            let name = entry.file_name();
            let name = name.to_str().ok_or_else(|| Error::corrupt(&path, "a name that is not UTF-8"))?;
            if name.starts_with('.') {
                continue;
            }
            // Of what a link points to, as a data set is often a folder of links.
            let about = std::fs::metadata(&path).map_err(Error::io(&path))?;
            if about.is_dir() {
                let name = format!("{prefix}{name}/");
                self.walk(&path, &name, depth + 1, entries)?;
                entries.push(Entry { name, bytes: 0 });
            } else {
                entries.push(Entry { name: format!("{prefix}{name}"), bytes: about.len() });
            }
            self.check_count(entries.len())?;
        }
        Ok(())
    }

    /// The bytes of the file `name`.
    pub(crate) fn read(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.path(name);
        let mut bytes = Vec::new();
        match &self.kind {
            Kind::Folder => File::open(&path).map_err(Error::io(&path))?.take(MAX_BYTES + 1).read_to_end(&mut bytes),
            #[cfg(feature = "hub")]
            Kind::Memory(files) => return files.get(name).cloned().ok_or_else(|| Error::not_found(path, "there is no such file")),
            Kind::Zip(zip) => {
                // A clone shares the directory and the file: the lock is held for single reads alone, so threads inflate side by side.
                let mut archive = archive(zip);
                let file = archive.by_name(name).map_err(|e| Error::corrupt(&path, e.to_string()))?;
                file.take(MAX_BYTES + 1).read_to_end(&mut bytes)
            }
        }
        .map_err(Error::io(&path))?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(Error::corrupt(&path, format!("more than {MAX_BYTES} bytes")));
        }
        Ok(bytes)
    }

    /// The place of `name`, for messages.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

fn archive(zip: &Mutex<ZipArchive<Shared>>) -> ZipArchive<Shared> {
    zip.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// A file that several readers use, each with a position of its own.
#[derive(Clone, Debug)]
struct Shared {
    file: Arc<Mutex<File>>,
    at: u64,
}

impl Read for Shared {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(self.at))?;
        let n = file.read(buffer)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Seek for Shared {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        let target = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => {
                let end = self.file.lock().unwrap_or_else(PoisonError::into_inner).metadata()?.len();
                end.checked_add_signed(by)
            }
        };
        self.at = target.ok_or(std::io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}
