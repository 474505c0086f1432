//! What can be wrong with weights, in which file, and what would be right.

use std::path::PathBuf;

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between a weight file and a network.
#[derive(thiserror::Error, Debug)]
#[non_exhaustive]
pub enum Error {
    /// A file that could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file of no known format.
    #[error("{}: not a weight file: begins with \"{begins}\"; expected {known}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Its first bytes.
        begins: String,
        /// The formats.
        known: String,
    },
    /// A file that does not hold what its format says, or more than a weight file has.
    #[error("{}: {why}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong, where, and what would be right.
        why: String,
    },
    /// Weights of another network.
    #[error(transparent)]
    Mismatch(Box<Mismatch>),
    /// NaN or infinity among the weights.
    #[error("{}: `{tensor}` holds {value} at flat index {index}; weights must be finite", path.display())]
    NonFinite {
        /// The file.
        path: PathBuf,
        /// The network's name of the tensor.
        tensor: String,
        /// The first such value, in the network's type.
        value: f64,
        /// Where it stands.
        index: usize,
    },
    /// A network that did not take the weights.
    #[error("{}: {source}", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// Why.
        source: kd_core::Error,
    },
}

/// Every key that keeps weights from fitting a network.
#[derive(thiserror::Error, Clone, Debug, PartialEq, Eq)]
#[error(
    "{}: not the weights of {network} (names: {mapping}){}{}{}",
    path.display(),
    list("missing", missing.iter().cloned()),
    list("unexpected", unexpected.iter().cloned()),
    list("of another shape", misshaped.iter().map(|(name, found, wanted)| format!("{name} {found:?} instead of {wanted:?}")))
)]
#[non_exhaustive]
pub struct Mismatch {
    /// The file.
    pub path: PathBuf,
    /// The network's name.
    pub network: String,
    /// How the file's keys were understood.
    pub mapping: &'static str,
    /// Parameters and statistics of the network that the file does not have.
    pub missing: Vec<String>,
    /// The file's own names of tensors that the network does not have.
    pub unexpected: Vec<String>,
    /// The network's name, the file's shape, the network's shape.
    pub misshaped: Vec<(String, Vec<usize>, Vec<usize>)>,
}

/// A kind of difference, on a line of its own; a wrong network has hundreds of keys, so only the first are shown.
fn list(kind: &str, items: impl ExactSizeIterator<Item = String>) -> String {
    const SHOWN: usize = 10;
    let count = items.len();
    if count == 0 {
        return String::new();
    }
    let shown: Vec<String> = items.take(SHOWN).collect();
    let more = if count > SHOWN { format!(" and {} more", count - SHOWN) } else { String::new() };
    format!("\n{kind}: {}{more}", shown.join(", "))
}
