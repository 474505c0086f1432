//! A teacher's logits on the disk, so that a later run over the same batches need not ask the teacher again.
//!
//! | file in the cache's directory | holds |
//! |---|---|
//! | `cache.json` | what the logits depend on: weights, data, augmentation, seed, batch size, precision; anything else is refused |
//! | `<epoch>-<view>.logits` | SHA-256 (hex), the samples' indices (u32), their logits row by row (f32 or f16), little-endian |
//!
//! Augmented images differ from epoch to epoch, so a cache holds every (epoch, view, sample) by itself: `epochs * views * samples * (4 +
//! classes * 4)` bytes, half of the latter in f16. An epoch's file appears once all of its batches were seen by one process; whoever finds it
//! reads the logits there. In f32 a run ends with the same bits with and without a cache. In f16 logits are rounded, whether they come from
//! the disk or from the teacher: runs with such a cache end alike, but not as those without one.

use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use kd_core::Batch;

use crate::files::{Disk, Files, create_durable, write_durable};
use crate::parts::{StringMap, sha256};
use crate::{Error, Result};

/// Where a teacher's logits are kept.
#[derive(Clone)]
pub struct LogitCache {
    /// Its directory; made when there is none. Runs of the same batches and teacher may share it, also at the same time.
    pub dir: PathBuf,
    /// f16 instead of f32: half the size, and logits rounded to 11 bits.
    pub half: bool,
    /// What the logits depend on besides the teacher's weights, the data, the seed and the batch size: augmentation, precision.
    pub inputs: StringMap,
    /// The disk.
    pub files: Arc<dyn Files>,
}

impl LogitCache {
    /// In `dir` on the real disk, in f32.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), half: false, inputs: StringMap::new(), files: Arc::new(Disk) }
    }

    /// Bytes of a whole cache.
    pub fn bytes(&self, epochs: usize, views: usize, samples: usize, classes: usize) -> u64 {
        (epochs * views) as u64 * (DIGEST + samples * (4 + classes * self.dtype().size_in_bytes())) as u64
    }

    fn dtype(&self) -> DType {
        if self.half { DType::F16 } else { DType::F32 }
    }
}

/// Hex digits of a SHA-256.
const DIGEST: usize = 64;

/// An open cache.
pub(crate) struct Store {
    cache: LogitCache,
    samples: usize,
    batch_size: usize,
    classes: usize,
    /// The present epoch, by view.
    views: Vec<Option<Epoch>>,
}

struct Epoch {
    number: usize,
    indices: Vec<u32>,
    /// Bytes of the logits.
    rows: Vec<u8>,
    /// Samples that are there.
    known: usize,
    /// Whether they come from the disk.
    read: bool,
}

impl Store {
    /// Opens a cache for logits that depend on `prints` and on the cache's own inputs.
    ///
    /// # Errors
    /// Logits of something else; too little space for what `epochs` and `views` still lack.
    pub(crate) fn open(cache: LogitCache, mut prints: StringMap, size: [usize; 3], epochs: usize, views: usize) -> Result<Self> {
        let [samples, batch_size, classes] = size;
        prints.extend(cache.inputs.clone());
        for (key, value) in [("samples", samples), ("batch size", batch_size), ("classes", classes)] {
            prints.insert(key.to_string(), value.to_string());
        }
        prints.insert("type".to_string(), cache.dtype().as_str().to_string());
        let files = cache.files.as_ref();
        create_durable(files, &cache.dir)?;
        let path = cache.dir.join("cache.json");
        match files.read(&path) {
            Ok(bytes) => {
                let recorded: StringMap = serde_json::from_slice(&bytes).map_err(|e| Error::damaged(&path, e))?;
                for key in recorded.keys().chain(prints.keys()) {
                    let [old, new] = [&recorded, &prints].map(|all| all.get(key).map_or("nothing", String::as_str).to_string());
                    if old != new {
                        return Err(Error::Stale { dir: cache.dir.clone(), what: key.clone(), recorded: old, present: new });
                    }
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                write_durable(files, &path, serde_json::to_string_pretty(&prints).map_err(kd_core::Error::from)?.as_bytes())?;
            }
            Err(e) => return Err(Error::io("reading", &path, e)),
        }
        let names = files.list(&cache.dir).map_err(|e| Error::io("listing", &cache.dir, e))?;
        let there = names.iter().filter(|n| n.ends_with(".logits")).count();
        let needed = cache.bytes((epochs * views).saturating_sub(there), 1, samples, classes);
        let free = files.free_space(&cache.dir).map_err(|e| Error::io("asking for the free space of", &cache.dir, e))?;
        if let Some(free) = free.filter(|&free| free < needed) {
            return Err(Error::Space { dir: cache.dir, needed, free });
        }
        Ok(Self { cache, samples, batch_size, classes, views: vec![] })
    }

    /// The logits of batch number `at` of an epoch, if they are on the disk.
    pub(crate) fn find(&mut self, epoch: usize, view: usize, at: usize, batch: &Batch) -> Result<Option<Tensor>> {
        let (path, first, n) = (self.path(epoch, view), at * self.batch_size, batch.len());
        let (dtype, classes) = (self.cache.dtype(), self.classes);
        let row = classes * dtype.size_in_bytes();
        let epoch = self.epoch(epoch, view)?;
        if !epoch.read {
            return Ok(None);
        }
        let indices = batch.indices.to_dtype(DType::U32)?.to_vec1::<u32>()?;
        if epoch.indices.get(first..first + n) != Some(&indices[..]) {
            return Err(Error::damaged(path, format!("batch {at} has other samples than the present one")));
        }
        let bytes = &epoch.rows[first * row..(first + n) * row];
        Ok(Some(Tensor::from_raw_buffer(bytes, dtype, &[n, classes], &Device::Cpu)?.to_dtype(DType::F32)?))
    }

    /// Keeps the logits of batch number `at` of an epoch, which goes to the disk when it is complete; returns them as a later run reads them.
    pub(crate) fn keep(&mut self, epoch: usize, view: usize, at: usize, batch: &Batch, logits: &Tensor) -> Result<Tensor> {
        if logits.dtype() != DType::F32 || logits.dims() != [batch.len(), self.classes] {
            let (found, expected) =
                (format!("{:?} {:?}", logits.dtype(), logits.dims()), format!("F32 [{}, {}]", batch.len(), self.classes));
            return Err(Error::Refused(format!("a cache of logits holds {expected} for this batch, the teacher gives {found}")));
        }
        let (path, first, n) = (self.path(epoch, view), at * self.batch_size, batch.len());
        let (dtype, samples, files) = (self.cache.dtype(), self.samples, Arc::clone(&self.cache.files));
        let rounded = logits.to_dtype(dtype)?;
        let row = self.classes * dtype.size_in_bytes();
        let epoch = self.epoch(epoch, view)?;
        if !epoch.read && first + n <= samples {
            let mut bytes = Vec::with_capacity(n * row);
            rounded.to_device(&Device::Cpu)?.write_bytes(&mut bytes)?;
            epoch.rows[first * row..(first + n) * row].copy_from_slice(&bytes);
            epoch.indices[first..first + n].copy_from_slice(&batch.indices.to_dtype(DType::U32)?.to_vec1::<u32>()?);
            epoch.known += n;
            if epoch.known == samples {
                let mut data: Vec<u8> = epoch.indices.iter().flat_map(|i| i.to_le_bytes()).collect();
                data.extend_from_slice(&epoch.rows);
                let mut file = sha256(&data).into_bytes();
                file.append(&mut data);
                write_durable(files.as_ref(), &path, &file)?;
            }
        }
        Ok(rounded.to_dtype(DType::F32)?)
    }

    /// The epoch as it is on the disk, or empty.
    fn epoch(&mut self, number: usize, view: usize) -> Result<&mut Epoch> {
        if self.views.len() <= view {
            self.views.resize_with(view + 1, || None);
        }
        let present = self.views[view].as_ref().is_some_and(|e| e.number == number);
        if !present {
            self.views[view] = Some(self.load(number, view)?);
        }
        Ok(self.views[view].as_mut().expect("invariant: just loaded"))
    }

    fn load(&self, number: usize, view: usize) -> Result<Epoch> {
        let len = self.samples * self.classes * self.cache.dtype().size_in_bytes();
        let path = self.path(number, view);
        let file = match self.cache.files.read(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Epoch { number, indices: vec![0; self.samples], rows: vec![0; len], known: 0, read: false });
            }
            Err(e) => return Err(Error::io("reading", &path, e)),
        };
        let whole = file.split_at_checked(DIGEST).filter(|(digest, data)| sha256(data).as_bytes() == *digest);
        let Some((indices, rows)) =
            whole.and_then(|(_, data)| data.split_at_checked(4 * self.samples)).filter(|(_, rows)| rows.len() == len)
        else {
            return Err(Error::damaged(path, "its checksum or length does not fit; remove it, and the teacher is asked again"));
        };
        let indices = indices.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        Ok(Epoch { number, indices, rows: rows.to_vec(), known: self.samples, read: true })
    }

    fn path(&self, epoch: usize, view: usize) -> PathBuf {
        self.cache.dir.join(format!("{epoch:06}-{view}.logits"))
    }
}
