//! The error of the contract crates: what was wrong, where, and what would be right.

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between models, methods and the loop.
#[derive(thiserror::Error, Debug)]
#[non_exhaustive]
pub enum Error {
    /// A tensor of the wrong shape.
    #[error("{what}: expected shape {expected}, got {got:?}")]
    Shape {
        /// The tensor.
        what: String,
        /// What would be right, in words or numbers.
        expected: String,
        /// What it was.
        got: Vec<usize>,
    },
    /// A tensor that a computation needs and that was not given.
    #[error("{who} needs `{input}`, which was not given")]
    Missing {
        /// The method, model or function.
        who: String,
        /// The tensor or quantity.
        input: String,
    },
    /// A parameter out of its range.
    #[error("{key} = {value}: must be {allowed}")]
    Param {
        /// The parameter.
        key: String,
        /// Its value.
        value: String,
        /// What would be right.
        allowed: String,
    },
    /// NaN or infinity where a number is required.
    #[error("{what} holds a value that is not finite ({value} at flat index {index})")]
    NonFinite {
        /// The tensor.
        what: String,
        /// The first such value.
        value: f64,
        /// Where it stands.
        index: usize,
    },
    /// A class label outside the classes.
    #[error("label {label} at position {position}: must be one of 0..={last}", last = classes.saturating_sub(1))]
    Label {
        /// The label.
        label: i64,
        /// Its row in the batch.
        position: usize,
        /// The number of classes.
        classes: usize,
    },
    /// A combination that cannot work, with the reason.
    #[error("{0}")]
    Refused(String),
    /// An error of candle.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// An error of a crate that implements one of the traits (a data set, a user's model).
    #[error(transparent)]
    Other(#[from] Box<dyn std::error::Error + Send + Sync>),
    /// Parameters that could not be read as a method's parameters.
    #[error("parameters: {0}")]
    Json(#[from] serde_json::Error),
}

impl Error {
    /// A [`Error::Shape`] for `what`.
    pub fn shape(what: impl Into<String>, expected: impl Into<String>, got: &[usize]) -> Self {
        Self::Shape { what: what.into(), expected: expected.into(), got: got.to_vec() }
    }

    /// A [`Error::Param`] for `key`.
    pub fn param(key: impl Into<String>, value: impl ToString, allowed: impl Into<String>) -> Self {
        Self::Param { key: key.into(), value: value.to_string(), allowed: allowed.into() }
    }

    /// A [`Error::Missing`].
    pub fn missing(who: impl Into<String>, input: impl Into<String>) -> Self {
        Self::Missing { who: who.into(), input: input.into() }
    }

    /// A [`Error::Refused`] with its reason.
    pub fn refused(reason: impl Into<String>) -> Self {
        Self::Refused(reason.into())
    }
}
