//! `ofd`: overhaul of feature distillation, pre-activations above a margin.
//!
//! Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019, arXiv 1904.01866.
//!
//! ```text
//! s     = BN(conv(P^s_i)),   t = P^t_i average-pooled to the grid of s,   t' = max(t, m)
//! m_c   = mean of the negative part of N(mu_c, sigma_c^2) = mu - sigma phi(mu/sigma) / Phi(-mu/sigma);  -3 sigma where Phi(-mu/sigma) <= 0.001
//! value = sum_i 2^-(n-i) (1/B) sum over C, H, W of (s - t')^2 where s > t' or t' > 0
//! ```
//!
//! A teacher's negative value asks only that the student stay below the margin.
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `P^s_i`, `P^t_i` | pre-activations of the i-th of n stages; the networks are aligned at their last stages | `[B,C,H,W]` |
//! | `sigma`, `mu` | scale (its magnitude) and shift of the teacher's batch norm before that ReLU | `[C_t]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `stages` | null | ascending | of the student; null: all but the stem that have a partner |
//! | `kernel_size` | 1 | odd | of the connectors |
//! | `teacher_mode` | `"eval"` | `"eval"`, `"batch_statistics"` | how the teacher's maps are computed |
//! | `bn_eps`, `bn_momentum` | 1e-5, 0.1 | > 0, 0..=1 | of the connectors' batch norms |
//!
//! Terms: `stage.<i>`, weighted 1/4, 1/2, 1 for three stages. Weight: 1e-3 on CIFAR-100, 1e-4 for ImageNet R50-MobileNet, beside `ce` 1: the
//! terms are sums over a map. A connector is a convolution without bias, drawn from N(0, 2 / (k^2 C_t)), and a batch norm; both are trained
//! with the student. State: the batch norms' running statistics. Cost: a convolution at the teacher's width on the full grid of every stage;
//! memory `O(B C_t H W)` a stage.
//!
//! The released codes leave the teacher in training mode (its batch norms see the batch): `teacher_mode = "batch_statistics"` does that, at
//! the price of a second pass of the teacher, and leaves its running statistics alone. Where the teacher has more stages than the student,
//! mdistiller pairs the margins of the first stages with the maps of the last; here both are the last. A scale of 0 has the margin
//! `min(mu, 0)`. Pooling of grids that differ is mdistiller's addition. A student needs pre-activations, a teacher the batch norms before
//! them as well (plain ShuffleNets have none).

use std::sync::Arc;

use candle_core::{DType, Tensor};
use kd_core::{
    Cut, Error, LossTerms, Method, MethodEntry, Mode, Model, Needs, ParamDoc, ParityInputs, ParityOutput, Result, Setup, StepView,
};
use kd_nn::{Conv, GraphBuilder, Init, Network, ops};
use serde::{Deserialize, Serialize};

use crate::features::{self, BN_EPS, BN_MOMENTUM, Choice, Match, StagePair, Stages, batch_statistics, stages_doc};
use crate::layers::{Layers, Norm};
use crate::registry::parse;

/// How the teacher's maps are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TeacherMode {
    /// With its running statistics.
    Eval,
    /// With the statistics of the batch.
    BatchStatistics,
}

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// The student's stages to compare; none: all but the stem that have a partner.
    pub stages: Option<Vec<usize>>,
    /// Kernel of the connectors, odd.
    pub kernel_size: usize,
    /// How the teacher's maps are computed.
    pub teacher_mode: TeacherMode,
    /// Epsilon of the connectors' batch norms, above 0.
    pub bn_eps: f64,
    /// Share of a batch in their running statistics, in 0..=1.
    pub bn_momentum: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { stages: None, kernel_size: 1, teacher_mode: TeacherMode::Eval, bn_eps: 1e-5, bn_momentum: 0.1 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        if self.kernel_size.is_multiple_of(2) {
            return Err(Error::param("kernel_size", self.kernel_size, "odd"));
        }
        self.norm().validate()?;
        self.choice().validate()
    }

    fn norm(&self) -> Norm {
        Norm { eps: self.bn_eps, momentum: self.bn_momentum }
    }

    fn choice(&self) -> Choice {
        Choice::preacts(&self.stages, Stages::FromTheEnd)
    }
}

/// The margins of channels whose pre-activations have the given scale and shift, `[C]` each.
///
/// # Errors
/// Tensors of unequal length.
pub fn margins(scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
    let host = |t: &Tensor| t.to_dtype(DType::F64)?.to_vec1::<f64>();
    let (sigma, mu) = (host(scale)?, host(shift)?);
    if sigma.len() != mu.len() {
        return Err(Error::shape("shift of the teacher's batch norm", format!("{:?}, as its scale", scale.dims()), shift.dims()));
    }
    let values: Vec<f64> = sigma.iter().zip(&mu).map(|(s, &mu)| margin(s.abs(), mu)).collect();
    Ok(Tensor::from_vec(values, scale.dims(), scale.device())?.to_dtype(scale.dtype())?)
}

fn margin(sigma: f64, mu: f64) -> f64 {
    if sigma == 0.0 {
        return mu.min(0.0);
    }
    let z = mu / sigma;
    let below = 0.5 * candle_core::cpu::erf::erfc_f64(z / std::f64::consts::SQRT_2);
    if below <= 0.001 {
        return -3.0 * sigma;
    }
    let density = (-z * z / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    mu - sigma * density / below
}

/// Overhaul's distance over `pairs`: the student's maps behind their connectors, the teacher's pre-activations (detached), and the margins of
/// each, `[C_t]`.
///
/// # Errors
/// Maps that are not `[B,C,H,W]` or differ in batch or channels; margins of another number or width.
pub fn ofd(pairs: &[StagePair<'_>], margins: &[Tensor]) -> Result<LossTerms> {
    if pairs.len() != margins.len() {
        return Err(Error::shape("margins", format!("one for each of {} stages", pairs.len()), &[margins.len()]));
    }
    let mut terms = LossTerms::new();
    for (j, (pair, margin)) in pairs.iter().zip(margins).enumerate() {
        let mut t = pair.teacher()?;
        let [b, c, h, w] = features::map(&pair.name(), pair.student)?;
        if t.dim(1)? != c || margin.dims() != [c] {
            return Err(Error::shape(format!("teacher.{}", pair.name()), format!("[B,{c},H,W] with margins [{c}]"), t.dims()));
        }
        if t.dim(2)? != h || t.dim(3)? != w {
            t = ops::adaptive_avg_pool2d(&t, [h, w])?;
        }
        let t = t.broadcast_maximum(&margin.detach().to_dtype(t.dtype())?.reshape((1, c, 1, 1))?)?;
        let below = (pair.student.detach().le(&t)? * t.le(0.0)?)?;
        let counts = below.eq(0u8)?.to_dtype(t.dtype())?;
        let value = ((pair.student - t)?.sqr()? * counts)?.sum_all()?;
        terms = terms.with(&pair.name(), (value / b as f64)?, 0.5f64.powi((pairs.len() - 1 - j) as i32));
    }
    Ok(terms)
}

struct Connector {
    found: Match,
    network: Arc<Network>,
    margin: Tensor,
}

struct Ofd {
    params: Params,
    stages: Vec<Connector>,
}

impl Ofd {
    fn own_pass(&self) -> bool {
        self.params.teacher_mode == TeacherMode::BatchStatistics
    }
}

impl Method for Ofd {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        let needs = match self.stages.as_slice() {
            [] => self.params.choice().before(),
            stages => features::needs(stages.iter().map(|s| &s.found)),
        };
        // With the statistics of the batch the teacher runs here, and the loop need not run it.
        if self.own_pass() { Needs { teacher: vec![], teacher_model: true, ..needs } } else { needs }
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        let (k, norm) = (self.params.kernel_size, self.params.norm());
        let teacher = setup.teacher(ENTRY.name)?;
        let build = |found: Match| {
            let missing = |what: &str| {
                let (who, stage) = (&teacher.spec().name, found.teacher);
                Error::refused(format!("{}: the margins come from the batch norm before {stage} of `{who}`, {what}", ENTRY.name))
            };
            let name = found.teacher_norm.as_deref().ok_or_else(|| missing("which it has not"))?;
            let params = teacher.params().ok_or_else(|| missing("but its parameters have no names"))?;
            let get = |part: &str| params.get(&format!("{name}.{part}")).unwrap_or_else(|| Err(missing("which has no scale and shift")));
            let margin = margins(&get("weight")?, &get("bias")?)?.to_device(setup.device)?.to_dtype(setup.dtype)?;
            batch_statistics(setup, ENTRY.name, found.from[1] * found.from[2])?;
            let mut b = GraphBuilder::new(format!("ofd.connector.{}", found.index), &found.from);
            b.conv("conv", Conv::new(found.to[0], k).pad(k / 2).init(Init::HeFanOut));
            b.batch_norm_as("bn", true, norm.eps, norm.momentum);
            b.stage(0, "bn", None);
            Ok(Connector { network: features::network(setup, b)?, found, margin })
        };
        self.stages = self.params.choice().matches(setup, ENTRY.name)?.into_iter().map(build).collect::<Result<_>>()?;
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        features::models(self.stages.iter().map(|s| &s.network))
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        features::prepared(&self.stages, ENTRY.name)?;
        let student = step.student()?;
        let own = if self.own_pass() {
            let teacher = step.models.teachers.first().ok_or_else(|| Error::missing(ENTRY.name, "a teacher"))?;
            let images = step.batch.images.first().ok_or_else(|| Error::missing(ENTRY.name, "images"))?;
            let cuts: Vec<Cut> = self.stages.iter().map(|s| s.found.teacher).collect();
            Some(teacher.run(images, Cut::Input, &cuts, Mode::BatchStats)?.detach())
        } else {
            None
        };
        let teacher = own.as_ref().map_or_else(|| step.teacher(), Ok)?;
        let connect = |s: &Connector| features::run(&s.network, student.get(s.found.student)?, Cut::Input, Cut::Stage(0), step);
        let connected = self.stages.iter().map(connect).collect::<Result<Vec<_>>>()?;
        let pair = |(s, student)| Ok(StagePair { index: Connector::index(s), student, teacher: teacher.get(s.found.teacher)? });
        let pairs = self.stages.iter().zip(&connected).map(pair).collect::<Result<Vec<_>>>()?;
        let margins: Vec<Tensor> = self.stages.iter().map(|s| s.margin.clone()).collect();
        ofd(&pairs, &margins)
    }
}

impl Connector {
    fn index(&self) -> usize {
        self.found.index
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let params: Params = inputs.params()?;
    params.validate()?;
    let layers = Layers::trained(inputs, params.norm());
    let pairs = params.choice().parity(inputs)?;
    let connect = |pair: &StagePair<'_>| {
        let prefix = format!("connector.{}", pair.index);
        let x = layers.conv(&format!("{prefix}.conv"), pair.student, 1, params.kernel_size / 2)?;
        layers.batch_norm(&format!("{prefix}.bn"), &x)
    };
    let connected = pairs.iter().map(connect).collect::<Result<Vec<_>>>()?;
    let margin = |pair: &StagePair<'_>| {
        let get = |part: &str| inputs.get(&format!("teacher.bn.{}.{part}", pair.index));
        margins(get("weight")?, get("bias")?)
    };
    let margins = pairs.iter().map(margin).collect::<Result<Vec<_>>>()?;
    let pairs: Vec<_> = pairs.iter().zip(&connected).map(|(p, student)| StagePair { student, ..*p }).collect();
    Ok(ParityOutput { terms: ofd(&pairs, &margins)?, state: layers.into_state() })
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "ofd",
    about: "overhaul of feature distillation: pre-activations above a margin",
    source: "Heo et al., ICCV 2019, arXiv 1904.01866",
    year: 2019,
    parameters: &[
        stages_doc("the student's; null: all but the stem that have a partner"),
        ParamDoc { name: "kernel_size", default: "1", range: "odd", about: "of the connectors" },
        ParamDoc {
            name: "teacher_mode",
            default: "\"eval\"",
            range: "\"eval\" | \"batch_statistics\"",
            about: "how the teacher's maps are computed",
        },
        BN_EPS,
        BN_MOMENTUM,
    ],
    build: |params| Ok(Box::new(Ofd { params: parse(params, Params::validate)?, stages: vec![] })),
    parity,
    raw_terms: true,
};
