//! The formats, told apart by their first bytes: one file and one line each.

mod bytes;
mod legacy;
mod mxnet;
mod pickle;
mod safetensors;
mod tensor;
mod torch;
mod zip;

use std::collections::BTreeMap;

use candle_core::Tensor;

/// What a reader returns; a refusal is the sentence that says why.
pub(crate) type Read<T> = std::result::Result<T, String>;

/// Tensors and text of a file.
#[derive(Default)]
pub(crate) struct Contents {
    pub(crate) tensors: BTreeMap<String, Tensor>,
    pub(crate) metadata: BTreeMap<String, String>,
}

impl Contents {
    /// Adds a tensor; a name may come once.
    fn insert(&mut self, name: &str, tensor: Tensor) -> Read<()> {
        if name.len() > crate::limits::NAME {
            return Err(format!("a name of {} bytes; at most {} are read", name.len(), crate::limits::NAME));
        }
        if self.tensors.len() == crate::limits::TENSORS {
            return Err(format!("more than {} tensors", crate::limits::TENSORS));
        }
        match self.tensors.insert(name.to_string(), tensor) {
            None => Ok(()),
            Some(_) => Err(format!("`{name}` is there twice")),
        }
    }
}

/// A kind of weight file.
pub struct Format {
    /// Its name.
    pub name: &'static str,
    /// Its name with the file extensions that are usual.
    pub about: &'static str,
    /// Whether a file that begins so is one.
    pub(crate) matches: fn(&[u8]) -> bool,
    pub(crate) read: fn(&[u8]) -> Read<Contents>,
}

/// Every format that is read.
pub fn formats() -> &'static [Format] {
    &[
        Format { name: "PyTorch", about: "PyTorch (.pth, .pt, .bin)", matches: torch::matches, read: torch::read },
        Format { name: "PyTorch, legacy", about: "PyTorch before 1.6 (.pth, .th)", matches: legacy::matches, read: legacy::read },
        Format { name: "MXNet", about: "MXNet (.params)", matches: mxnet::matches, read: mxnet::read },
        Format { name: "safetensors", about: "safetensors (.safetensors)", matches: safetensors::matches, read: safetensors::read },
    ]
}
