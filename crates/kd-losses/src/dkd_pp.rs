//! `dkd_pp`: DKD++, the released recipe in one piece: cross-entropy, warmed-up DKD, norm and direction.
//!
//! Wang et al., "Improving Knowledge Distillation via Regularizing Feature Norm and Direction", ECCV 2024, arXiv 2305.17007.
//!
//! ```text
//! value = ce_weight ce + w (alpha tckd + beta nckd) + nd_weight nd,   w = min(1, epoch / warmup_epochs)
//! ```
//!
//! The terms are those of [`ce`](mod@crate::ce), [`dkd`](mod@crate::dkd) and [`nd`](mod@crate::nd); with `warmup_nd` the warm-up multiplies
//! nd too. Epochs count from 0, as in the authors' repository.
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
//! | `temperature` | 4 | > 0 | T of dkd; 1 on ImageNet |
//! | `ce_weight` | 1 | >= 0 | |
//! | `alpha`, `beta`, `nd_weight` | 2.5, 4, 3.5 | >= 0 | per pair; the defaults are res56-res20's |
//! | `warmup_epochs` | 20 | >= 0 | 5 on ImageNet; 0: none |
//! | `warmup_nd` | false | | true in the ImageNet and ViT releases |
//! | `adapter`, `eps`, `bn_eps`, `dropout` | | | as in [`nd`](mod@crate::nd) |
//!
//! Terms: `ce`, `tckd`, `nckd`, `nd`. The authors' weights, alpha / beta / nd:
//!
//! | CIFAR-100, T 4 | alpha / beta / nd | ImageNet, T 1 | alpha / beta / nd |
//! |---|---|---|---|
//! | res56-res20 | 2.5 / 4.0 / 3.5 | R34-R18 | 0.8 / 0.5 / 1.0 |
//! | res32x4-res8x4 | 2.0 / 8.0 / 0.5 | R50-R18 | 0.6 / 0.5 / 2.0 |
//! | wrn40_2-wrn40_1 | 1.0 / 6.0 / 1.0 | R101-R18 | 0.8 / 0.5 / 1.0 (the README's example: nd 2.0) |
//! | res50-mobileV2 | 0.5 / 8.0 / 1.0 | R152-R18 | 1.0 / 1.0 / 1.0 |
//! | res32x4-shuffleV1 | 0.5 / 8.0 / 4.0 | R50-MobileNet | 0.8 / 1.0 / 1.0 |
//! | res32x4-shuffleV2 | 0.5 / 6.0 / 0.5 | ViT-S - R18, ViT-B - R18 | 1.0 / 1.0 / 2.0, 1.4 / 0.5 / 2.0 |

use candle_core::Tensor;
use kd_core::schedule::warmup_factor;
use kd_core::{LossTerms, MethodEntry, ParamDoc, Result};
use serde::{Deserialize, Serialize};

use crate::adapter::Adapter;
use crate::class_means::ClassMeans;
use crate::nd::{ADAPTER, BN_EPS, DROPOUT, EPS};
use crate::plus_plus::{self, CE_WEIGHT, PlusPlus, Recipe, TEMPERATURE, WARMUP_EPOCHS};
use crate::registry::parse;
use crate::{Side, ce, dkd, inputs, nd};

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// T of dkd, above 0.
    pub temperature: f64,
    /// Weight of the cross-entropy, at least 0.
    pub ce_weight: f64,
    /// Weight of dkd's target part, at least 0.
    pub alpha: f64,
    /// Weight of dkd's other classes, at least 0.
    pub beta: f64,
    /// Weight of nd, at least 0.
    pub nd_weight: f64,
    /// Epochs over which dkd's weight rises from 0; 0 for none.
    pub warmup_epochs: usize,
    /// Whether nd's weight rises with it.
    pub warmup_nd: bool,
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
        Self {
            temperature: 4.0,
            ce_weight: 1.0,
            alpha: 2.5,
            beta: 4.0,
            nd_weight: 3.5,
            warmup_epochs: 20,
            warmup_nd: false,
            adapter,
            eps,
            bn_eps,
            dropout,
        }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        self.dkd().validate()?;
        inputs::not_negative("ce_weight", self.ce_weight)?;
        inputs::not_negative("nd_weight", self.nd_weight)?;
        self.nd().validate()
    }

    fn dkd(&self) -> dkd::Params {
        dkd::Params { temperature: self.temperature, alpha: self.alpha, beta: self.beta }
    }
}

/// DKD++ in epoch `epoch`, counted from 0; the student's embedding is adapted already, the teacher is detached, `labels` are class indices
/// `[B]` or class probabilities `[B,K]`.
///
/// # Errors
/// Those of [`ce`](crate::ce()), [`dkd`](crate::dkd()) and [`nd`](crate::nd()).
pub fn dkd_pp(
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
    let warm_nd = if params.warmup_nd { warm } else { 1.0 };
    let mut terms = ce(student.logits, labels)?.scaled(params.ce_weight);
    terms.extend(dkd(student.logits, teacher.logits, labels, &params.dkd())?.scaled(warm));
    terms.extend(nd(student.embedding, teacher.embedding, means, labels, &params.nd())?.scaled(warm_nd * params.nd_weight));
    Ok(terms)
}

impl Recipe for Params {
    const NAME: &'static str = ENTRY.name;

    fn nd(&self) -> nd::Params {
        nd::Params { adapter: self.adapter, eps: self.eps, bn_eps: self.bn_eps, dropout: self.dropout }
    }

    fn terms(&self, student: Side<'_>, teacher: Side<'_>, means: &ClassMeans, labels: &Tensor, epoch: usize) -> Result<LossTerms> {
        dkd_pp(student, teacher, means, labels, epoch, self)
    }
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "dkd_pp",
    about: "DKD++: cross-entropy, warmed-up dkd, nd",
    source: "Wang et al., ECCV 2024, arXiv 2305.17007",
    year: 2023,
    parameters: &[
        TEMPERATURE,
        CE_WEIGHT,
        ParamDoc { name: "alpha", default: "2.5", range: ">= 0", about: "weight of dkd's target class" },
        ParamDoc { name: "beta", default: "4.0", range: ">= 0", about: "weight of dkd's other classes" },
        ParamDoc { name: "nd_weight", default: "3.5", range: ">= 0", about: "weight of nd" },
        WARMUP_EPOCHS,
        ParamDoc { name: "warmup_nd", default: "false", range: "true | false", about: "warm up nd too" },
        ADAPTER,
        EPS,
        BN_EPS,
        DROPOUT,
    ],
    build: |params| Ok(Box::new(PlusPlus::new(parse(params, Params::validate)?))),
    parity: plus_plus::parity::<Params>,
    raw_terms: false,
};
