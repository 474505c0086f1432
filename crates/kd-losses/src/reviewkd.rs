//! `reviewkd`: knowledge review, each level of the student fused with all deeper ones before it meets the teacher's.
//!
//! Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv 2104.09044.
//!
//! ```text
//! levels j = 0: the embedding as [B,D,1,1]; then the stages, deep to shallow
//! x_j   = BN1(conv1x1(S_j))                                     to mid channels
//! j > 0:  u = nearest(r_{j-1} -> grid of S_j),  [a, b] = sigmoid(conv1x1(concat(x_j, u))),  x_j <- x_j a + u b
//! r_j   = nearest(x_j -> the teacher's grid),  out_j = BN2(conv3x3(r_j))        to the teacher's channels
//! HCL_j = sum_l w_l mean (pool_l(out_j) - pool_l(T_j))^2 / sum_l w_l,  l = the full map (w 1), then 4x4, 2x2, 1x1 below its height (w halved)
//! value = sum_j HCL_j
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `S_j` | student: embedding `[B,D_s]`, stages or pre-activations `[B,C,H,W]` | |
//! | `T_j` | teacher: embedding `[B,D_t]`, pre-activations `[B,C,H,W]`, detached | |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `stages` | null | ascending | of the student; null: all but the stem that have a partner, aligned at the last |
//! | `shapes`, `out_shapes` | null | heights, embedding (1) first, deep to shallow | the grids of student and teacher, which null takes from the networks |
//! | `mid_channel` | null | 1..=512 | null: width of the student's embedding, at most 512 |
//! | `student_preact` | false | | whether the student's side is its pre-activations too (ImageNet) |
//! | `bn_eps`, `bn_momentum` | 1e-5, 0.1 | > 0, 0..=1 | of the fusion's batch norms |
//!
//! Terms: `level.<j>`. The loop's `warmup_epochs` is the release's warm-up: 20 on CIFAR-100, 1 on ImageNet. The authors' weights, beside `ce` 1:
//!
//! | CIFAR-100 | weight | ImageNet | weight |
//! |---|---|---|---|
//! | wrn_40_2 - wrn_16_2, wrn_40_1, ShuffleV1 | 5 | R34-R18 | 1 |
//! | resnet32x4 - resnet8x4, ShuffleV1 | 5 | R50-MobileNet | 8 |
//! | resnet32x4 - ShuffleV2 | 8 | | |
//! | resnet56 - resnet20 | 0.6 | | |
//! | resnet110 - resnet32 | 1 | | |
//!
//! Convolutions have no bias but the attention's, which PyTorch's default draws; the others are Kaiming-uniform with slope 1. All of it is
//! trained with the student. State: the batch norms' running statistics. Cost: 1x1 and 3x3 convolutions at the teacher's width on full
//! grids, the most activation memory of the methods with adapters, `O(B (mid + C_t) H W)` a level.
//!
//! The batch norms at the embedding see one value a sample: a batch of one is refused, and with two they saturate. mdistiller reads
//! its limit of 512 for the middle width nowhere; it is fixed.

use std::sync::Arc;

use candle_core::Tensor;
use kd_core::{Cut, Error, LossTerms, Method, MethodEntry, Model, Needs, ParamDoc, ParityInputs, ParityOutput, Result, Setup, StepView};
use kd_nn::{Conv, GraphBuilder, Init, Network, Op, ops};
use serde::{Deserialize, Serialize};

use crate::features::{self, BN_EPS, BN_MOMENTUM, Choice, Match, Stages, batch_statistics, stages_doc};
use crate::inputs;
use crate::layers::{Layers, Norm};
use crate::registry::parse;

/// The widest middle.
const WIDEST: usize = 512;

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
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
    /// Epsilon of the fusion's batch norms, above 0.
    pub bn_eps: f64,
    /// Share of a batch in their running statistics, in 0..=1.
    pub bn_momentum: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { stages: None, shapes: None, out_shapes: None, mid_channel: None, student_preact: false, bn_eps: 1e-5, bn_momentum: 0.1 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        if let Some(mid) = self.mid_channel.filter(|mid| !(1..=WIDEST).contains(mid)) {
            return Err(Error::param("mid_channel", mid, format!("in 1..={WIDEST}")));
        }
        for (key, list) in [("shapes", &self.shapes), ("out_shapes", &self.out_shapes)] {
            if let Some(list) = list.as_ref().filter(|list| list.len() < 2 || list[0] != 1 || list.contains(&0)) {
                return Err(Error::param(
                    key,
                    format!("{list:?}"),
                    "heights of the levels: 1 for the embedding, then the stages, deep to shallow",
                ));
            }
        }
        self.norm().validate()?;
        self.choice().validate()
    }

    fn norm(&self) -> Norm {
        Norm { eps: self.bn_eps, momentum: self.bn_momentum }
    }

    fn choice(&self) -> Choice {
        Choice { stages: self.stages.clone(), default: Stages::FromTheEnd, preact: [self.student_preact, true] }
    }

    /// Refuses heights that are not those of the levels.
    fn check_shapes(&self, grids: &[Grids]) -> Result<()> {
        for (key, given, side) in [("shapes", &self.shapes, 0), ("out_shapes", &self.out_shapes, 1)] {
            let own: Vec<usize> = grids.iter().map(|g| g.0[side][0]).collect();
            if let Some(given) = given.as_ref().filter(|given| **given != own) {
                let who = ["student", "teacher"][side];
                return Err(Error::param(key, format!("{given:?}"), format!("{own:?}, the heights of the {who}'s levels")));
            }
        }
        Ok(())
    }
}

/// Height and width of a level, of the student and of the teacher.
#[derive(Clone, Copy, Debug)]
struct Grids([[usize; 2]; 2]);

/// The layers of the fusion, by level.
trait Fusion {
    /// `BN1(conv1x1)` of the student's level.
    fn narrow(&self, level: usize) -> Result<Tensor>;
    /// `sigmoid(conv1x1)` to two maps.
    fn attention(&self, level: usize, both: &Tensor) -> Result<Tensor>;
    /// `BN2(conv3x3)` to the teacher's width.
    fn widen(&self, level: usize, fused: &Tensor) -> Result<Tensor>;
}

/// `out_j` of every level.
fn review(fusion: &dyn Fusion, grids: &[Grids]) -> Result<Vec<Tensor>> {
    let mut outs = vec![];
    let mut deeper: Option<Tensor> = None;
    for (j, Grids([own, out])) in grids.iter().enumerate() {
        let mut x = fusion.narrow(j)?;
        if let Some(deeper) = deeper {
            let u = resized(&deeper, *own)?;
            let gates = fusion.attention(j, &Tensor::cat(&[&x, &u], 1)?)?;
            let [a, b] = [0, 1].map(|i| gates.narrow(1, i, 1));
            x = (x.broadcast_mul(&a?)? + u.broadcast_mul(&b?)?)?;
        }
        let fused = resized(&x, *out)?;
        outs.push(fusion.widen(j, &fused)?);
        deeper = Some(fused);
    }
    Ok(outs)
}

fn resized(x: &Tensor, to: [usize; 2]) -> Result<Tensor> {
    if x.dims()[2..] == to { Ok(x.clone()) } else { Ok(ops::interpolate_nearest(x, to)?) }
}

/// Hierarchical context loss of the fused levels and the teacher's, deep to shallow, `[B,C,H,W]` each; the teacher's are detached.
///
/// # Errors
/// Another number of levels, maps that are not `[B,C,H,W]` or differ in shape.
pub fn reviewkd(levels: &[Tensor], teacher: &[Tensor]) -> Result<LossTerms> {
    if levels.len() != teacher.len() {
        return Err(Error::shape("teacher's levels", format!("[{}], as the student's", levels.len()), &[teacher.len()]));
    }
    let mut terms = LossTerms::new();
    for (j, (out, t)) in levels.iter().zip(teacher).enumerate() {
        let [_, _, h, _] = features::map(&format!("level {j}"), out)?;
        if out.dims() != t.dims() {
            return Err(Error::shape(format!("teacher's level {j}"), format!("{:?}, as the student's", out.dims()), t.dims()));
        }
        // Pooling is linear: the pooled difference is the difference of the pooled.
        let gap = (out - inputs::constant(t, out)?)?;
        let mut loss = gap.sqr()?.mean_all()?;
        let (mut weight, mut total) = (1.0, 1.0);
        for l in [4, 2, 1] {
            if l < h {
                weight /= 2.0;
                total += weight;
                loss = (loss + (ops::adaptive_avg_pool2d(&gap, [l, l])?.sqr()?.mean_all()? * weight)?)?;
            }
        }
        terms = terms.with(&format!("level.{j}"), (loss / total)?, 1.0);
    }
    Ok(terms)
}

/// An embedding as a map of one position.
fn as_map(x: &Tensor) -> Result<Tensor> {
    let (b, d) = inputs::embedding("embedding", x)?;
    Ok(x.reshape((b, d, 1, 1))?)
}

/// One level's layers: the narrowing and the widening (its cut [`Cut::Stage`] 0 lies between), the attention.
struct Level {
    main: Arc<Network>,
    attention: Option<Arc<Network>>,
    grids: Grids,
}

/// What the method builds for two networks; `reviewkd_pp` has one too.
pub(crate) struct Reviewed {
    levels: Vec<Level>,
    /// Shallow to deep.
    matches: Vec<Match>,
}

impl Reviewed {
    pub(crate) fn needs(&self) -> Needs {
        let mut needs = features::needs(&self.matches);
        needs.student.push(Cut::Embedding);
        needs.teacher.push(Cut::Embedding);
        needs
    }

    pub(crate) fn new(setup: &Setup<'_>, params: &Params, method: &str) -> Result<Self> {
        let matches = params.choice().matches(setup, method)?;
        batch_statistics(setup, method, 1)?;
        let (width, to) = (setup.models.student.spec().embedding, setup.teacher(method)?.spec().embedding);
        let mid = params.mid_channel.unwrap_or(width.min(WIDEST));
        let shapes = std::iter::once(([width, 1, 1], [to, 1, 1])).chain(matches.iter().rev().map(|m| (m.from, m.to)));
        let build = |(j, (from, to)): (usize, ([usize; 3], [usize; 3]))| {
            // Kaiming-uniform with slope 1.
            let init = |fan_in: usize| Init::Uniform((3.0 / fan_in as f64).sqrt());
            let norm = params.norm();
            let mut b = GraphBuilder::new(format!("{method}.abf.{j}"), &from);
            b.conv("conv1", Conv::new(mid, 1).init(init(from[0])));
            b.batch_norm_as("bn1", true, norm.eps, norm.momentum);
            b.stage(0, "bn1", None);
            b.conv("conv2", Conv::new(to[0], 3).pad(1).init(init(9 * mid)));
            b.batch_norm_as("bn2", true, norm.eps, norm.momentum);
            b.stage(1, "bn2", None);
            let main = features::network(setup, b)?;
            let attention = if j > 0 {
                let mut b = GraphBuilder::new(format!("{method}.abf.{j}"), &[2 * mid, from[1], from[2]]);
                b.conv("att", Conv::new(2, 1).bias());
                b.layer(Op::Sigmoid);
                b.stage(0, "att", None);
                Some(features::network(setup, b)?)
            } else {
                None
            };
            Ok(Level { main, attention, grids: Grids([[from[1], from[2]], [to[1], to[2]]]) })
        };
        let levels = shapes.enumerate().map(build).collect::<Result<Vec<_>>>()?;
        params.check_shapes(&levels.iter().map(|l| l.grids).collect::<Vec<_>>()).map_err(|e| Error::refused(format!("{method}: {e}")))?;
        Ok(Self { levels, matches })
    }

    pub(crate) fn networks(&self) -> Vec<Arc<dyn Model>> {
        features::models(self.levels.iter().flat_map(|l| std::iter::once(&l.main).chain(&l.attention)))
    }

    pub(crate) fn loss(&self, step: &StepView<'_>) -> Result<LossTerms> {
        let (student, teacher) = (step.student()?, step.teacher()?);
        let mut own = vec![as_map(student.embedding()?)?];
        let mut theirs = vec![as_map(teacher.embedding()?)?];
        for m in self.matches.iter().rev() {
            own.push(student.get(m.student)?.clone());
            theirs.push(teacher.get(m.teacher)?.clone());
        }
        let grids: Vec<Grids> = self.levels.iter().map(|l| l.grids).collect();
        reviewkd(&review(&Running { levels: &self.levels, own: &own, step }, &grids)?, &theirs)
    }
}

/// The networks of a step.
struct Running<'a> {
    levels: &'a [Level],
    own: &'a [Tensor],
    step: &'a StepView<'a>,
}

impl Fusion for Running<'_> {
    fn narrow(&self, level: usize) -> Result<Tensor> {
        features::run(&self.levels[level].main, &self.own[level], Cut::Input, Cut::Stage(0), self.step)
    }

    fn attention(&self, level: usize, both: &Tensor) -> Result<Tensor> {
        let network = self.levels[level].attention.as_ref().ok_or_else(|| Error::missing("the fusion", "an attention"))?;
        features::run(network, both, Cut::Input, Cut::Stage(0), self.step)
    }

    fn widen(&self, level: usize, fused: &Tensor) -> Result<Tensor> {
        features::run(&self.levels[level].main, fused, Cut::Stage(0), Cut::Stage(1), self.step)
    }
}

struct ReviewKd {
    params: Params,
    prepared: Option<Reviewed>,
}

impl Method for ReviewKd {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        self.prepared.as_ref().map_or_else(|| before(&self.params), Reviewed::needs)
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        self.prepared = Some(Reviewed::new(setup, &self.params, ENTRY.name)?);
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        self.prepared.as_ref().map(Reviewed::networks).unwrap_or_default()
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        self.prepared.as_ref().ok_or_else(|| Error::missing(ENTRY.name, "its fusion (`prepare` builds it)"))?.loss(step)
    }
}

/// What is certain before the networks are known.
pub(crate) fn before(params: &Params) -> Needs {
    let mut needs = params.choice().before();
    needs.student.push(Cut::Embedding);
    needs.teacher.push(Cut::Embedding);
    needs
}

/// The layers of a parity call.
struct Named<'a> {
    layers: &'a Layers<'a>,
    own: &'a [Tensor],
}

impl Fusion for Named<'_> {
    fn narrow(&self, level: usize) -> Result<Tensor> {
        let x = self.layers.conv(&format!("abf.{level}.conv1"), &self.own[level], 1, 0)?;
        self.layers.batch_norm(&format!("abf.{level}.bn1"), &x)
    }

    fn attention(&self, level: usize, both: &Tensor) -> Result<Tensor> {
        Ok(ops::sigmoid(&self.layers.conv(&format!("abf.{level}.att"), both, 1, 0)?)?)
    }

    fn widen(&self, level: usize, fused: &Tensor) -> Result<Tensor> {
        let x = self.layers.conv(&format!("abf.{level}.conv2"), fused, 1, 1)?;
        self.layers.batch_norm(&format!("abf.{level}.bn2"), &x)
    }
}

/// The terms of a parity call and the running statistics after it.
pub(crate) fn evaluate(inputs: &ParityInputs, params: &Params) -> Result<ParityOutput> {
    params.validate()?;
    let mut own = vec![as_map(inputs.get("student.embedding")?)?];
    let mut theirs = vec![as_map(inputs.get("teacher.embedding")?)?];
    for pair in params.choice().parity(inputs)?.iter().rev() {
        theirs.push(pair.teacher()?);
        own.push(pair.student.clone());
    }
    let grid = |x: &Tensor| [x.dims()[2], x.dims()[3]];
    let grids: Vec<Grids> = own.iter().zip(&theirs).map(|(s, t)| Grids([grid(s), grid(t)])).collect();
    params.check_shapes(&grids)?;
    let layers = Layers::trained(inputs, params.norm());
    let terms = reviewkd(&review(&Named { layers: &layers, own: &own }, &grids)?, &theirs)?;
    Ok(ParityOutput { terms, state: layers.into_state() })
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    evaluate(inputs, &inputs.params()?)
}

pub(crate) const STAGES: ParamDoc = stages_doc("the student's; null: all but the stem that have a partner");
pub(crate) const SHAPES: ParamDoc = ParamDoc {
    name: "shapes",
    default: "null",
    range: "heights, 1 first, or null",
    about: "grids of the student's levels, which null takes from it",
};
pub(crate) const OUT_SHAPES: ParamDoc =
    ParamDoc { name: "out_shapes", default: "null", range: "heights, 1 first, or null", about: "grids of the teacher's levels, likewise" };
pub(crate) const MID_CHANNEL: ParamDoc = ParamDoc {
    name: "mid_channel",
    default: "null",
    range: "1..=512, or null",
    about: "channels of the fusion; null: the student's embedding's, at most 512",
};
pub(crate) const STUDENT_PREACT: ParamDoc = ParamDoc {
    name: "student_preact",
    default: "false",
    range: "true | false",
    about: "whether the student's side is its pre-activations",
};

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "reviewkd",
    about: "knowledge review: each level fused with all deeper ones",
    source: "Chen et al., CVPR 2021, arXiv 2104.09044",
    year: 2021,
    parameters: &[STAGES, SHAPES, OUT_SHAPES, MID_CHANNEL, STUDENT_PREACT, BN_EPS, BN_MOMENTUM],
    build: |params| Ok(Box::new(ReviewKd { params: parse(params, Params::validate)?, prepared: None })),
    parity,
    raw_terms: true,
};
