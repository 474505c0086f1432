//! Weights in and out.
//!
//! [`read`] takes safetensors, PyTorch files (`torch.save`, zip and legacy) and MXNet `.params`, told apart by content ([`formats`]).
//! [`load_into`] puts them into a network, strictly: every tensor of the network once, nothing left over, every number finite, or one error
//! that lists what does not fit and leaves the network as it was. Names of other projects are brought to the zoo's by [`dialects`].
//! [`to_safetensors`] writes, with [`ModelInfo`] beside the tensors.
//!
//! ```
//! use candle_core::{DType, Device};
//! use kd_models::{Config, network};
//! use kd_weights::{LoadOptions, ModelInfo, WeightFile, load_into, to_safetensors};
//!
//! let student = network("resnet8", &Config::new(10, [1, 8, 8]), DType::F32, &Device::Cpu)?;
//! let info = ModelInfo { model: Some("resnet8".into()), classes: Some(10), ..ModelInfo::default() };
//! let bytes = to_safetensors(&student.parameters().state_dict()?, &info.to_metadata())?;
//!
//! let file = WeightFile::parse(&bytes)?;
//! assert_eq!(ModelInfo::from_metadata(&file.metadata).model.as_deref(), Some("resnet8"));
//! let report = load_into(&student, &file, &LoadOptions::default())?;
//! assert_eq!(report.loaded, file.tensors.len());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Files from strangers
//!
//! No byte of a file is ever executed. A `.pth` file holds a pickle, which is a program; it runs on a machine of our own that knows tensors,
//! containers and plain numbers, and refuses every other class by name. What a file may cost is bounded by its size: the limits stand in
//! [`limits`], and a file beyond them, damaged, or contradicting itself is an error.

mod error;
mod format;
mod keys;
pub mod limits;
mod load;
mod write;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;

pub use error::{Error, Result};
pub use format::{Format, formats};
pub use keys::{Dialect, dialects};
pub use load::{LoadOptions, Misshaped, Report, classes, load_into};
pub use write::{ModelInfo, to_safetensors};

/// What a weight file holds.
#[derive(Clone, Debug)]
pub struct WeightFile {
    /// Which of [`formats`] it was.
    pub format: &'static str,
    /// Its tensors by their names in the file, on the CPU. f16, bf16, f32, f64 and u8 as they are, other integers as i64.
    pub tensors: BTreeMap<String, Tensor>,
    /// Text beside them: a safetensors file's metadata, the plain numbers and strings of a PyTorch checkpoint (`epoch`, `best_acc`).
    pub metadata: BTreeMap<String, String>,
}

impl WeightFile {
    /// Reads a file's content.
    ///
    /// # Errors
    /// A content of no known format, or one that is damaged or hostile.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let format = formats().iter().find(|f| (f.matches)(bytes)).ok_or_else(|| Error::unknown(bytes))?;
        let contents = (format.read)(bytes).map_err(|why| Error::Damaged { format: format.name, why })?;
        Ok(Self { format: format.name, tensors: contents.tensors, metadata: contents.metadata })
    }
}

/// Reads the file at `path`.
///
/// # Errors
/// As [`WeightFile::parse`], and a file that cannot be read; the message names it.
pub fn read(path: impl AsRef<Path>) -> Result<WeightFile> {
    let path = path.as_ref();
    let bytes = std::fs::read(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
    WeightFile::parse(&bytes).map_err(|e| Error::File { path: path.to_path_buf(), source: Box::new(e) })
}
