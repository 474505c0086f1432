//! What can be wrong with weights.

use std::path::PathBuf;

use crate::Report;

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
    /// A file whose content was refused.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<Error>,
    },
    /// A content of no known format.
    #[error("not a weight file: it begins with {start}; known are {known}")]
    Unknown {
        /// Its first bytes.
        start: String,
        /// The formats.
        known: String,
    },
    /// A content that contradicts its format or a limit.
    #[error("{format}: {why}")]
    Damaged {
        /// The format it begins like.
        format: &'static str,
        /// What is wrong, and where.
        why: String,
    },
    /// Weights that do not fit the network.
    #[error("{0}")]
    Mismatch(Box<Report>),
    /// A prefix that no name begins with.
    #[error("no tensor's name begins with `{prefix}`; the first is `{first}`")]
    Prefix {
        /// What was asked for.
        prefix: String,
        /// A name that is there.
        first: String,
    },
    /// Values that are not finite, and errors of the network.
    #[error(transparent)]
    Core(#[from] kd_core::Error),
    /// An error of candle.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// Metadata that could not be written.
    #[error("metadata: {0}")]
    Json(#[from] serde_json::Error),
}

impl Error {
    pub(crate) fn unknown(bytes: &[u8]) -> Self {
        let start = match bytes {
            [] => "nothing (it is empty)".to_string(),
            _ => bytes.iter().take(8).map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" "),
        };
        Self::Unknown { start, known: crate::formats().iter().map(|f| f.about).collect::<Vec<_>>().join(", ") }
    }
}

impl From<Error> for kd_core::Error {
    fn from(e: Error) -> Self {
        match e {
            Error::Core(e) => e,
            Error::Candle(e) => Self::Candle(e),
            e => Self::Other(Box::new(e)),
        }
    }
}
