//! What can be wrong with data, where, and what would be right.

use std::path::{Path, PathBuf};

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between a data set's name and a batch.
#[derive(thiserror::Error, Debug)]
#[non_exhaustive]
pub enum Error {
    /// A name that no registry entry has.
    #[error("unknown {kind} `{name}`{}; known: {known}", hint(.nearest))]
    Unknown {
        /// `data source`, `augmentation`.
        kind: &'static str,
        /// What was asked for.
        name: String,
        /// The known name that looks most like it.
        nearest: Option<&'static str>,
        /// Every known name.
        known: String,
    },
    /// A known name with an argument that does not fit it.
    #[error("`{spec}`: {expected}")]
    Spec {
        /// The whole text.
        spec: String,
        /// What would be right.
        expected: String,
    },
    /// A file or folder that is not there.
    #[error("{}: {expected}", path.display())]
    NotFound {
        /// Where it was looked for.
        path: PathBuf,
        /// What should be there.
        expected: String,
    },
    /// A file that could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file that does not hold what its format says.
    #[error("{}: {why}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong, where, and what would be right.
        why: String,
    },
    /// A split (training, test) that the source does not have.
    #[error("{source_name} has no {split} set here: {why}")]
    NoSplit {
        /// The data source.
        source_name: String,
        /// `training`, `validation` or `test`.
        split: &'static str,
        /// What is missing.
        why: String,
    },
    /// An option out of its range.
    #[error("{key} = {value}: must be {allowed}")]
    Option {
        /// The option.
        key: &'static str,
        /// Its value.
        value: String,
        /// What would be right.
        allowed: String,
    },
    /// The loader was used in a way that it refuses, or its thread died.
    #[error("{0}")]
    Loader(String),
    /// An error of candle.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn corrupt(path: &Path, why: impl Into<String>) -> Self {
        Self::Corrupt { path: path.to_path_buf(), why: why.into() }
    }

    pub(crate) fn not_found(path: impl Into<PathBuf>, expected: impl Into<String>) -> Self {
        Self::NotFound { path: path.into(), expected: expected.into() }
    }

    pub(crate) fn spec(spec: impl Into<String>, expected: impl Into<String>) -> Self {
        Self::Spec { spec: spec.into(), expected: expected.into() }
    }

    pub(crate) fn option(key: &'static str, value: impl ToString, allowed: impl Into<String>) -> Self {
        Self::Option { key, value: value.to_string(), allowed: allowed.into() }
    }

    pub(crate) fn unknown(kind: &'static str, name: &str, known: &[&'static str]) -> Self {
        let nearest = known.iter().map(|k| (strsim::jaro_winkler(name, k), *k)).filter(|(score, _)| *score > 0.7);
        let nearest = nearest.max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, k)| k);
        Self::Unknown { kind, name: name.to_string(), nearest, known: known.join(", ") }
    }
}

fn hint(nearest: &Option<&'static str>) -> String {
    nearest.map(|n| format!(", did you mean `{n}`?")).unwrap_or_default()
}

impl From<Error> for kd_core::Error {
    fn from(e: Error) -> Self {
        match e {
            Error::Candle(e) => Self::Candle(e),
            e => Self::Other(Box::new(e)),
        }
    }
}
