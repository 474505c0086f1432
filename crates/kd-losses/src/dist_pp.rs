//! `dist_pp`: DIST++, the released recipe in one piece: cross-entropy, warmed-up DIST, norm and direction.
//!
//! Wang et al., "Improving Knowledge Distillation via Regularizing Feature Norm and Direction", ECCV 2024, arXiv 2305.17007.
//!
//! ```text
//! value = ce_weight ce + w dist_weight (inter + intra) + nd_weight nd,   w = min(1, epoch / warmup_epochs)
//! ```
//!
//! The terms are those of [`ce`](mod@crate::ce), [`dist`](mod@crate::dist) with beta = gamma = 1 and [`nd`](mod@crate::nd). Epochs count from
//! 0, as in the authors' repository.
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `z`, `v` | logits of student and teacher | `[B,K]` |
//! | `f_s`, `f_t` | embeddings of student (behind the adapter, if there is one) and teacher | `[B,D]` |
//! | `c` | class means of the teacher's embedding ([`ClassMeans`]) | `[K,D]` |
//! | `y` | labels | `[B]` integers, or `[B,K]` probabilities |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `temperature` | 4 | > 0 | T of dist |
//! | `ce_weight` | 1 | >= 0 | |
//! | `dist_weight`, `nd_weight` | 2, 1 | >= 0 | per pair; the defaults are res56-res20's |
//! | `warmup_epochs` | 20 | >= 0 | 0: none |
//! | `adapter`, `eps`, `bn_eps`, `dropout` | | | as in [`nd`](mod@crate::nd) |
//!
//! Terms: `ce`, `inter`, `intra`, `nd`. The authors' weights on CIFAR-100, dist / nd:
//!
//! | pair | dist / nd |
//! |---|---|
//! | res56-res20 | 2.0 / 1.0 |
//! | res32x4-res8x4 | 1.5 / 4.0 |
//! | wrn40_2-wrn40_1 | 2.5 / 3.0 |
//! | res50-mobileV2 | 7.0 / 1.0 |
//! | res32x4-shuffleV1 | 2.5 / 3.0 |
//! | res32x4-shuffleV2 | 3.0 / 4.0 |
//!
//! Cost and state: those of its parts, the adapter where the widths differ.

use candle_core::Tensor;
use kd_core::schedule::warmup_factor;
use kd_core::{LossTerms, MethodEntry, ParamDoc, Result};
use serde::{Deserialize, Serialize};

use crate::adapter::Adapter;
use crate::class_means::ClassMeans;
use crate::nd::{ADAPTER, BN_EPS, DROPOUT, EPS};
use crate::plus_plus::{self, CE_WEIGHT, PlusPlus, Recipe, TEMPERATURE, WARMUP_EPOCHS};
use crate::registry::parse;
use crate::{Side, ce, dist, inputs, nd};

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// T of dist, above 0.
    pub temperature: f64,
    /// Weight of the cross-entropy, at least 0.
    pub ce_weight: f64,
    /// Weight of dist, at least 0.
    pub dist_weight: f64,
    /// Weight of nd, at least 0.
    pub nd_weight: f64,
    /// Epochs over which dist's weight rises from 0; 0 for none.
    pub warmup_epochs: usize,
    /// Which adapter stands behind the student's embedding.
    pub adapter: Adapter,
    /// Length at or below which a feature counts as a constant of this length, above 0.
    pub eps: f64,
    /// Epsilon of the adapter's batch norm, above 0.
    pub bn_eps: f64,
    /// Dropout of the adapter, at least 0 and less than 1.
    pub dropout: f64,
}

impl Default for Params {
    fn default() -> Self {
        let nd::Params { adapter, eps, bn_eps, dropout } = nd::Params::default();
        Self { temperature: 4.0, ce_weight: 1.0, dist_weight: 2.0, nd_weight: 1.0, warmup_epochs: 20, adapter, eps, bn_eps, dropout }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        self.dist().validate()?;
        inputs::not_negative("ce_weight", self.ce_weight)?;
        inputs::not_negative("dist_weight", self.dist_weight)?;
        inputs::not_negative("nd_weight", self.nd_weight)?;
        self.nd().validate()
    }

    fn dist(&self) -> dist::Params {
        dist::Params { temperature: self.temperature, ..dist::Params::default() }
    }
}

/// DIST++ in epoch `epoch`, counted from 0; the student's embedding is adapted already, the teacher is detached, `labels` are class indices
/// `[B]` or class probabilities `[B,K]`.
///
/// # Errors
/// Those of [`ce`](crate::ce()), [`dist`](crate::dist()) and [`nd`](crate::nd()).
pub fn dist_pp(
    student: Side<'_>,
    teacher: Side<'_>,
    means: &ClassMeans,
    labels: &Tensor,
    epoch: usize,
    params: &Params,
) -> Result<LossTerms> {
    params.validate()?;
    means.check_classes(inputs::logits("student.logits", student.logits)?.1)?;
    let warm = warmup_factor(epoch, params.warmup_epochs, 0);
    let mut terms = ce(student.logits, labels)?.scaled(params.ce_weight);
    terms.extend(dist(student.logits, teacher.logits, &params.dist())?.scaled(warm * params.dist_weight));
    terms.extend(nd(student.embedding, teacher.embedding, means, labels, &params.nd())?.scaled(params.nd_weight));
    Ok(terms)
}

impl Recipe for Params {
    const NAME: &'static str = ENTRY.name;

    fn nd(&self) -> nd::Params {
        nd::Params { adapter: self.adapter, eps: self.eps, bn_eps: self.bn_eps, dropout: self.dropout }
    }

    fn terms(&self, student: Side<'_>, teacher: Side<'_>, means: &ClassMeans, labels: &Tensor, epoch: usize) -> Result<LossTerms> {
        dist_pp(student, teacher, means, labels, epoch, self)
    }
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "dist_pp",
    about: "DIST++: cross-entropy, warmed-up dist, nd",
    source: "Wang et al., ECCV 2024, arXiv 2305.17007",
    year: 2023,
    parameters: &[
        TEMPERATURE,
        CE_WEIGHT,
        ParamDoc { name: "dist_weight", default: "2.0", range: ">= 0", about: "weight of dist" },
        ParamDoc { name: "nd_weight", default: "1.0", range: ">= 0", about: "weight of nd" },
        WARMUP_EPOCHS,
        ADAPTER,
        EPS,
        BN_EPS,
        DROPOUT,
    ],
    build: |params| Ok(Box::new(PlusPlus::new(parse(params, Params::validate)?))),
    parity: plus_plus::parity::<Params>,
    raw_terms: false,
};
