//! Every file call of a run.
//!
//! A run touches the disk only through the [`Files`] trait, so that a test can fail or kill the n-th call for every n, and a file
//! only ever appears whole: [`write_durable`] writes beside the target, syncs, renames, syncs the folder.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// The file calls of a run, one method each. The defaults make them; a test counts them and fails some.
pub trait Files: Send + Sync {
    /// Creates a folder and its parents; an existing one is fine.
    fn create_dirs(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir_all(dir)
    }

    /// Creates a file that must not exist, for writing.
    fn create_new(&self, path: &Path) -> io::Result<File> {
        OpenOptions::new().write(true).create_new(true).open(path)
    }

    /// Opens a file for appending, and creates it when there is none.
    fn open_append(&self, path: &Path) -> io::Result<File> {
        OpenOptions::new().append(true).create(true).open(path)
    }

    /// Writes all of `bytes`.
    fn write(&self, file: &mut File, _path: &Path, bytes: &[u8]) -> io::Result<()> {
        file.write_all(bytes)
    }

    /// Cuts a file to `len` bytes.
    fn truncate(&self, file: &File, len: u64) -> io::Result<()> {
        file.set_len(len)
    }

    /// Waits until a file's content is on the disk.
    fn sync(&self, file: &File, _path: &Path) -> io::Result<()> {
        file.sync_all()
    }

    /// Waits until a folder's entries are on the disk. Where folders cannot be opened, the file system orders renames itself.
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        if cfg!(unix) { File::open(dir)?.sync_all() } else { Ok(()) }
    }

    /// Gives a file another name, replacing what stood there.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    /// Whether there is a folder of this name.
    fn is_dir(&self, dir: &Path) -> bool {
        dir.is_dir()
    }

    /// Removes an empty folder.
    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        fs::remove_dir(dir)
    }

    /// The whole content of a file.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        fs::read(path)
    }

    /// The names in a folder, sorted; none when there is no such folder.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            entries => entries?,
        };
        let mut names = entries.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect::<io::Result<Vec<_>>>()?;
        names.sort_unstable();
        Ok(names)
    }

    /// Takes the kernel's lock on a file, `false` when another process holds it. It is free again when that process ends, however it ends.
    fn try_lock(&self, file: &File) -> io::Result<bool> {
        match file.try_lock() {
            Ok(()) => Ok(true),
            Err(fs::TryLockError::WouldBlock) => Ok(false),
            Err(fs::TryLockError::Error(e)) => Err(e),
        }
    }

    /// Bytes free for this user where `dir` lies; `None` where the system does not say.
    fn free_space(&self, dir: &Path) -> io::Result<Option<u64>> {
        free_space(dir)
    }
}

/// The real file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct Disk;

impl Files for Disk {}

#[cfg(unix)]
fn free_space(dir: &Path) -> io::Result<Option<u64>> {
    let stat = rustix::fs::statvfs(dir)?;
    Ok(Some(stat.f_bavail.saturating_mul(stat.f_frsize)))
}

#[cfg(not(unix))]
fn free_space(_dir: &Path) -> io::Result<Option<u64>> {
    Ok(None)
}

/// Puts `bytes` at `path`, all or nothing: after a crash at any moment the old content stands there, or the new.
///
/// # Errors
/// Names the file; what stood there is unchanged unless the last step alone failed (the folder's sync), and no scratch file is left.
pub fn write_durable(files: &dyn Files, path: &Path, bytes: &[u8]) -> Result<()> {
    let scratch = scratch_name(path);
    let written = || -> io::Result<()> {
        let mut file = files.create_new(&scratch)?;
        files.write(&mut file, &scratch, bytes)?;
        files.sync(&file, &scratch)?;
        drop(file);
        files.rename(&scratch, path)
    };
    if let Err(source) = written() {
        // Whatever is left of the scratch file is of no use; that it cannot be removed changes nothing for the caller.
        let _ = files.remove(&scratch);
        return Err(Error::io("writing", path, source));
    }
    files.sync_dir(parent(path)).map_err(|e| Error::io("syncing the folder of", path, e))
}

/// Makes a folder that is still there after a power cut.
pub(crate) fn create_durable(files: &dyn Files, dir: &Path) -> Result<()> {
    files.create_dirs(dir).map_err(|e| Error::io("creating", dir, e))?;
    files.sync_dir(parent(dir)).map_err(|e| Error::io("syncing the folder of", dir, e))
}

/// Removes what killed writes left in `dir`. Only the holder of the run's lock may call it.
pub(crate) fn remove_scratch(files: &dyn Files, dir: &Path) -> Result<()> {
    for name in files.list(dir).map_err(|e| Error::io("listing", dir, e))? {
        if name.starts_with('.') && name.ends_with(".tmp") {
            let path = dir.join(name);
            files.remove(&path).map_err(|e| Error::io("removing", &path, e))?;
        }
    }
    Ok(())
}

/// A hidden name beside the target, unique among processes.
fn scratch_name(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}
