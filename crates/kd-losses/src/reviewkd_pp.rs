//! `reviewkd_pp`: ReviewKD++, the released recipe in one piece: cross-entropy, warmed-up knowledge review, norm and direction.
//!
//! Wang et al., "Improving Knowledge Distillation via Regularizing Feature Norm and Direction", ECCV 2024, arXiv 2305.17007.
//!
//! ```text
//! value = ce_weight ce + w review_weight sum_j HCL_j + nd_weight nd,   w = min(1, epoch / warmup_epochs)
//! ```
//!
//! The terms are those of [`ce`](mod@crate::ce), [`reviewkd`](mod@crate::reviewkd) and [`nd`](mod@crate::nd). Epochs count from 0, as in the
//! authors' repository, whose first epoch therefore reviews nothing.
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `z` | logits of the student | `[B,K]` |
//! | `f_s`, `f_t` | embeddings of student (behind the adapter, if there is one) and teacher | `[B,D]` |
//! | stages | as in [`reviewkd`](mod@crate::reviewkd) | `[B,C,H,W]` |
//! | `c` | class means of the teacher's embedding ([`ClassMeans`]) | `[K,D]` |
//! | `y` | labels | `[B]` integers, or `[B,K]` probabilities |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `ce_weight` | 1 | >= 0 | |
//! | `review_weight`, `nd_weight` | 1.2, 1 | >= 0 | per pair; the defaults are res56-res20's |
//! | `warmup_epochs` | 20 | >= 0 | 5 on ImageNet; 0: none |
//! | `stages`, `shapes`, `out_shapes`, `mid_channel`, `student_preact` | | | as in [`reviewkd`](mod@crate::reviewkd) |
//! | `bn_momentum` | 0.1 | 0..=1 | of the fusion's batch norms |
//! | `adapter`, `eps`, `bn_eps`, `dropout` | | | as in [`nd`](mod@crate::nd); `bn_eps` is the fusion's too |
//!
//! Terms: `ce`, `level.<j>`, `nd`. Cost, memory and state are [`reviewkd`](mod@crate::reviewkd)'s. The authors' weights, review / nd:
//!
//! | CIFAR-100 | review / nd | ImageNet | review / nd |
//! |---|---|---|---|
//! | res56-res20 | 1.2 / 1.0 | R34-R18 | 1.0 / 3.0 |
//! | res32x4-res8x4 | 8.0 / 1.0 | R50-R18 | 3.0 / 2.0 |
//! | wrn40_2-wrn40_1 | 5.0 / 4.0 | R101-R18 | 3.0 / 1.0 |
//! | res50-mobileV2 | 6.0 / 2.0 | R152-R18 | 3.0 / 1.0 |
//! | res32x4-shuffleV1 | 7.0 / 1.0 | R50-MobileNet | 8.0 / 4.0 |
//! | res32x4-shuffleV2 | 8.0 / 1.5 | | |

use std::sync::Arc;

use kd_core::schedule::warmup_factor;
use kd_core::{Error, LossTerms, Method, MethodEntry, Model, Needs, ParamDoc, ParityInputs, ParityOutput, Result, Setup, StepView};
use serde::{Deserialize, Serialize};

use crate::adapter::{self, Adapter};
use crate::class_means::ClassMeans;
use crate::features::BN_MOMENTUM;
use crate::nd::{ADAPTER, BN_EPS, DROPOUT, EPS, Prepared};
use crate::plus_plus::{self, CE_WEIGHT, WARMUP_EPOCHS, parity_epoch};
use crate::registry::{parity_labels, parse};
use crate::reviewkd::{self, MID_CHANNEL, OUT_SHAPES, Reviewed, SHAPES, STAGES, STUDENT_PREACT};
use crate::{ce, inputs, labels, nd};

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Weight of the cross-entropy, at least 0.
    pub ce_weight: f64,
    /// Weight of the review, at least 0.
    pub review_weight: f64,
    /// Weight of nd, at least 0.
    pub nd_weight: f64,
    /// Epochs over which the review's weight rises from 0; 0 for none.
    pub warmup_epochs: usize,
    /// The student's stages to compare; none: all but the stem that have a partner.
    pub stages: Option<Vec<usize>>,
    /// Heights of the student's levels, the embedding's 1 first; none: the networks'.
    pub shapes: Option<Vec<usize>>,
    /// Heights of the teacher's levels, likewise.
    pub out_shapes: Option<Vec<usize>>,
    /// Channels of the fusion, in 1..=512; none: the student's embedding's, at most 512.
    pub mid_channel: Option<usize>,
    /// Whether the student's side is its pre-activations.
    pub student_preact: bool,
    /// Share of a batch in the running statistics of the fusion's batch norms, in 0..=1.
    pub bn_momentum: f64,
    /// Which adapter stands behind the student's embedding.
    pub adapter: Adapter,
    /// Length at or below which a feature counts as a constant of this length, above 0.
    pub eps: f64,
    /// Epsilon of all batch norms, above 0.
    pub bn_eps: f64,
    /// Dropout of the adapter, at least 0 and less than 1.
    pub dropout: f64,
}

impl Default for Params {
    fn default() -> Self {
        let nd::Params { adapter, eps, bn_eps, dropout } = nd::Params::default();
        let reviewkd::Params { stages, shapes, out_shapes, mid_channel, student_preact, bn_momentum, .. } = reviewkd::Params::default();
        Self {
            ce_weight: 1.0,
            review_weight: 1.2,
            nd_weight: 1.0,
            warmup_epochs: 20,
            stages,
            shapes,
            out_shapes,
            mid_channel,
            student_preact,
            bn_momentum,
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
        inputs::not_negative("ce_weight", self.ce_weight)?;
        inputs::not_negative("review_weight", self.review_weight)?;
        inputs::not_negative("nd_weight", self.nd_weight)?;
        self.review().validate()?;
        self.nd().validate()
    }

    fn review(&self) -> reviewkd::Params {
        reviewkd::Params {
            stages: self.stages.clone(),
            shapes: self.shapes.clone(),
            out_shapes: self.out_shapes.clone(),
            mid_channel: self.mid_channel,
            student_preact: self.student_preact,
            bn_eps: self.bn_eps,
            bn_momentum: self.bn_momentum,
        }
    }

    fn nd(&self) -> nd::Params {
        nd::Params { adapter: self.adapter, eps: self.eps, bn_eps: self.bn_eps, dropout: self.dropout }
    }

    fn warm(&self, epoch: usize) -> f64 {
        warmup_factor(epoch, self.warmup_epochs, 0)
    }

    /// The three parts with their weights in `epoch`.
    fn sum(&self, epoch: usize, ce: LossTerms, review: LossTerms, nd: LossTerms) -> LossTerms {
        let mut terms = ce.scaled(self.ce_weight);
        terms.extend(review.scaled(self.warm(epoch) * self.review_weight));
        terms.extend(nd.scaled(self.nd_weight));
        terms
    }
}

struct ReviewKdPp {
    params: Params,
    nd: Prepared,
    review: Option<Reviewed>,
}

impl Method for ReviewKdPp {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        let review = self.review.as_ref().map_or_else(|| reviewkd::before(&self.params.review()), Reviewed::needs);
        plus_plus::needs().merge(&review)
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        self.nd = Prepared::new(setup, self.params.nd().adapter_config(), ENTRY.name)?;
        self.review = Some(Reviewed::new(setup, &self.params.review(), ENTRY.name)?);
        Ok(())
    }

    /// The fusion's first, the adapter last.
    fn networks(&self) -> Vec<Arc<dyn Model>> {
        let mut networks = self.review.as_ref().map(Reviewed::networks).unwrap_or_default();
        networks.extend(adapter::networks(self.nd.adapter.as_ref()));
        networks
    }

    /// The fusion while its weight is 0.
    fn idle(&self, epoch: usize) -> Vec<usize> {
        let fusion = self.review.as_ref().map_or(0, |r| r.networks().len());
        if self.params.warm(epoch) == 0.0 { (0..fusion).collect() } else { vec![] }
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let review = self.review.as_ref().ok_or_else(|| Error::missing(ENTRY.name, "its fusion (`prepare` builds it)"))?;
        let adapted = adapter::apply(self.nd.adapter.as_ref(), step)?;
        let (logits, teacher, labels) = (step.student()?.logits()?, step.teacher()?.embedding()?, labels::of(step.batch));
        let means = self.nd.means(ENTRY.name)?;
        means.check_classes(inputs::logits("student.logits", logits)?.1)?;
        let nd = nd(&adapted, teacher, means, labels, &self.params.nd())?;
        Ok(self.params.sum(step.progress.epoch, ce(logits, labels)?, review.loss(step)?, nd))
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let (epoch, inputs) = parity_epoch(inputs)?;
    let params: Params = inputs.params()?;
    params.validate()?;
    let means = ClassMeans::new(inputs.get("class_means")?)?;
    let adapted = params.nd().adapter_config().parity(&inputs, means.dims().1)?;
    let (logits, labels) = (inputs.get("student.logits")?, parity_labels(&inputs)?);
    means.check_classes(inputs::logits("student.logits", logits)?.1)?;
    let nd = nd(&adapted, inputs.get("teacher.embedding")?, &means, labels, &params.nd())?;
    let review = reviewkd::evaluate(&inputs, &params.review())?;
    Ok(ParityOutput { terms: params.sum(epoch, ce(logits, labels)?, review.terms, nd), state: review.state })
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "reviewkd_pp",
    about: "ReviewKD++: cross-entropy, warmed-up knowledge review, nd",
    source: "Wang et al., ECCV 2024, arXiv 2305.17007",
    year: 2023,
    parameters: &[
        CE_WEIGHT,
        ParamDoc { name: "review_weight", default: "1.2", range: ">= 0", about: "weight of the review" },
        ParamDoc { name: "nd_weight", default: "1.0", range: ">= 0", about: "weight of nd" },
        WARMUP_EPOCHS,
        STAGES,
        SHAPES,
        OUT_SHAPES,
        MID_CHANNEL,
        STUDENT_PREACT,
        BN_MOMENTUM,
        ADAPTER,
        EPS,
        BN_EPS,
        DROPOUT,
    ],
    build: |params| Ok(Box::new(ReviewKdPp { params: parse(params, Params::validate)?, nd: Prepared::default(), review: None })),
    parity,
    raw_terms: false,
};
