//! Which format a file has, by its content.

use crate::source::Source;
use crate::{Content, Error, Result, mxnet, safetensors, torch};

/// A weight format.
pub(crate) struct Format {
    pub(crate) name: &'static str,
    /// Whether a file of this length that begins with these bytes (16 at most) is of this format.
    pub(crate) matches: fn(&[u8], u64) -> bool,
    pub(crate) read: fn(&Source) -> Result<Content>,
}

/// Every format; no file matches two.
static FORMATS: &[Format] = &[
    Format { name: "safetensors", matches: safetensors::matches, read: safetensors::read },
    Format { name: "a PyTorch zip", matches: torch::zip::matches, read: torch::zip::read },
    Format { name: "a PyTorch pickle", matches: torch::legacy::matches, read: torch::legacy::read },
    Format { name: "MXNet .params", matches: mxnet::matches, read: mxnet::read },
];

pub(crate) fn format(source: &Source) -> Result<&'static Format> {
    let head = source.head(16)?;
    FORMATS.iter().find(|f| (f.matches)(&head, source.len())).ok_or_else(|| Error::Format {
        path: source.path().to_path_buf(),
        begins: head.escape_ascii().to_string(),
        known: FORMATS.iter().map(|f| f.name).collect::<Vec<_>>().join(", "),
    })
}
