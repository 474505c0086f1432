//! Named places in a network.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// Where a tensor can be taken out of, or fed into, a network.
///
/// Cuts lie in graph order. `Block(1..=n)` is the split that Block-KD uses (the stem with block 1, what stands between the
/// last stage and the pooling with block n); `Stage` and `Preact` are the feature points of the papers, numbered from 0 (the stem).
/// A cut that not every path crosses (a pre-activation beside a shortcut, say) can be taken out but not fed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Cut {
    /// The images, `[B,C,H,W]`.
    Input,
    /// Output of the i-th block, counted from 1.
    Block(usize),
    /// Output of the i-th stage, 0 being the stem.
    Stage(usize),
    /// The tensor before the last ReLU of the i-th stage.
    Preact(usize),
    /// Input of the classifier, `[B,D]`.
    Embedding,
    /// Output of the classifier, `[B,K]`.
    Logits,
    /// Output of the distillation head of a distilled transformer, `[B,K]`.
    LogitsDist,
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Input => f.write_str("images"),
            Self::Block(i) => write!(f, "block.{i}"),
            Self::Stage(i) => write!(f, "stage.{i}"),
            Self::Preact(i) => write!(f, "preact.{i}"),
            Self::Embedding => f.write_str("embedding"),
            Self::Logits => f.write_str("logits"),
            Self::LogitsDist => f.write_str("logits_dist"),
        }
    }
}

impl FromStr for Cut {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let bad = || Error::param("cut", s, "images, block.N, stage.N, preact.N, embedding, logits or logits_dist");
        if let Some((kind, index)) = s.split_once('.') {
            let i = index.parse().map_err(|_| bad())?;
            return match kind {
                "block" => Ok(Self::Block(i)),
                "stage" => Ok(Self::Stage(i)),
                "preact" => Ok(Self::Preact(i)),
                _ => Err(bad()),
            };
        }
        match s {
            "images" => Ok(Self::Input),
            "embedding" => Ok(Self::Embedding),
            "logits" => Ok(Self::Logits),
            "logits_dist" => Ok(Self::LogitsDist),
            _ => Err(bad()),
        }
    }
}

impl serde::Serialize for Cut {
    fn serialize<S: serde::Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for cut in [Cut::Input, Cut::Block(2), Cut::Stage(0), Cut::Preact(3), Cut::Embedding, Cut::Logits, Cut::LogitsDist] {
            assert_eq!(cut.to_string().parse::<Cut>().unwrap(), cut);
        }
        assert!("stage.x".parse::<Cut>().is_err());
        assert!("stages".parse::<Cut>().is_err());
    }
}
