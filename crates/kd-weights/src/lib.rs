//! Weight files: reading them whatever wrote them, and loading them into a network, strictly.
//!
//! | format | told by | written by |
//! |---|---|---|
//! | safetensors | a JSON header after 8 bytes of length | this toolkit, Hugging Face |
//! | PyTorch zip | `PK\3\4`; an entry `NAME/data.pkl` | `torch.save` since 1.6 |
//! | PyTorch legacy | a pickle, of the number 0x1950a86a20f9469cfc6c | `torch.save` before |
//! | MXNet | the number 0x112 and eight zero bytes | `mx.nd.save`, Gluon checkpoints |
//!
//! The content decides, never the name. [`read`] gives the tensors of the state dict; [`load_into`] fits them to a network or says, in one
//! error, every key that is missing, unexpected or of another shape:
//!
//! ```
//! use candle_core::{DType, Device};
//! use kd_models::{Config, network};
//! use kd_weights::{LoadOptions, WeightFile, load_into};
//!
//! let network = network("resnet8", &Config::new(10, [3, 32, 32]), DType::F32, &Device::Cpu)?;
//! let tensors = network.parameters().state_dict()?;
//! let mut file = WeightFile { path: "resnet8.pth".into(), tensors, metadata: Default::default() };
//! assert_eq!(load_into(&network, &file, &LoadOptions::default())?.loaded, 56);
//!
//! file.tensors.retain(|(name, _)| name != "fc.bias");
//! let error = load_into(&network, &file, &LoadOptions::default()).unwrap_err();
//! assert!(error.to_string().contains("missing: fc.bias"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Files from strangers
//!
//! A PyTorch file is a *pickle*, a program for a machine that can call any Python function. Here nothing is ever called: the few functions
//! that build tensors and ordered dictionaries are recognised by name, anything else (an optimiser, a NumPy scalar beside the state dict)
//! becomes an opaque value, and is an error where a tensor should be. Sizes are checked before memory is asked for:
//!
//! | limit | |
//! |---|---|
//! | pickle | 64 MiB, 1,000,000 opcodes, 64 levels |
//! | tensors | 100,000; names of 10,000 bytes |
//! | a tensor | no larger than its storage; a storage exactly as large in the file as declared |
//! | safetensors header | 32 MiB |
//! | compressed entries, overlapping entries, keys that occur twice | refused |
//!
//! A new format is a file with a `read` function and a line of `FORMATS` in `detect.rs`; another way of naming a network's parameters is a line
//! of `DIALECTS` in `mapping.rs`.

mod detect;
mod element;
mod error;
mod load;
mod mapping;
mod mxnet;
mod safetensors;
mod source;
mod torch;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::Tensor;

pub use error::{Error, Mismatch, Result};
pub use load::{LoadOptions, Report, classes, load_into};

use source::Source;

/// The most tensors of a file.
const MAX_TENSORS: usize = 100_000;
/// The longest name of a tensor, in bytes.
const MAX_NAME: usize = 10_000;
/// What data-parallel training and compilation put before every key, in either order.
const WRAPPERS: [&str; 3] = ["module.", "_orig_mod.", "module."];

/// The tensors of a weight file, on the CPU.
#[derive(Clone, Debug)]
pub struct WeightFile {
    /// The file, for messages.
    pub path: PathBuf,
    /// The state dict in the file's order, without the `module.` that data-parallel training puts before every key. Types are the file's;
    /// those that candle lacks are widened (bool to u8, i8 to i16, u16 to u32).
    pub tensors: Vec<(String, Tensor)>,
    /// What a safetensors file says beside the tensors; empty for other formats.
    pub metadata: BTreeMap<String, String>,
}

/// What a format's reader finds.
struct Content {
    tensors: Vec<(String, Tensor)>,
    metadata: BTreeMap<String, String>,
}

/// Reads the state dict of a weight file of any known format.
///
/// # Errors
/// A file that cannot be read, is of no known format, is damaged or hostile, or holds no tensor.
pub fn read(path: &Path) -> Result<WeightFile> {
    let source = Source::open(path)?;
    let format = detect::format(&source)?;
    let Content { mut tensors, metadata } = (format.read)(&source)?;
    if tensors.is_empty() {
        return Err(source.corrupt("holds no tensor"));
    }
    for prefix in WRAPPERS {
        if tensors.iter().all(|(name, _)| name.starts_with(prefix)) {
            tensors.iter_mut().for_each(|(name, _)| name.replace_range(..prefix.len(), ""));
        }
    }
    let mut seen = BTreeSet::new();
    for (name, _) in &tensors {
        if name.len() > MAX_NAME {
            return Err(source.corrupt(format!("a tensor's name has {} bytes, more than {MAX_NAME}", name.len())));
        }
        if !seen.insert(name) {
            return Err(source.corrupt(format!("the key `{name}` occurs twice")));
        }
    }
    Ok(WeightFile { path: path.to_path_buf(), tensors, metadata })
}

/// The example of the README is a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
