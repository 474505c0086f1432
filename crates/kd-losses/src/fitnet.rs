//! `fitnet`: hints, the student's middle stage predicts the teacher's through a regressor.
//!
//! Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550.
//!
//! ```text
//! r     = ReLU(BN(conv(S_h)))
//! value = mean over all elements of (r - T_h)^2
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `S_h`, `T_h` | outputs of the hint stage | `[B,C_s,H_s,W_s]`, `[B,C_t,H_t,W_t]` |
//!
//! | grids | layer of the regressor, with bias |
//! |---|---|
//! | `H_s = 2 H_t` | 3x3 convolution, stride 2, padding 1 |
//! | `2 H_s = H_t` | 4x4 transposed convolution, stride 2, padding 1 |
//! | `H_s >= H_t` | convolution without padding that leaves the teacher's grid: 1x1 when they agree |
//! | otherwise | refused |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `hint_stage` | 2 | a stage of both networks | |
//! | `use_relu` | true | | whether the regressor ends with a ReLU |
//! | `bn_eps`, `bn_momentum` | 1e-5, 0.1 | > 0, 0..=1 | of the regressor's batch norm |
//!
//! Term: `hint`. Weight in the published CIFAR-100 tables: 100, beside `ce` 1, for every pair. The regressor is trained with the student and
//! thrown away; initialised as PyTorch does. State: its batch norm's running statistics. Cost: one convolution; memory `O(B C_t H_t W_t)`.
//!
//! The paper first trains the guided layers on the hint alone, then the whole student with KD; the published numbers come from one phase in
//! which the hint stands beside the cross-entropy, as here. With the ReLU a teacher's negative value cannot be reached: where stages are
//! signed (Wide ResNet, MobileNetV2) a part of the loss stays. A bias right before a batch norm has no gradient but rounding. One sample is
//! enough for the batch norm while the grid has more than one position.

use std::sync::Arc;

use candle_core::Tensor;
use kd_core::{Cut, Error, LossTerms, Method, MethodEntry, Model, Needs, ParamDoc, ParityInputs, ParityOutput, Result, Setup, StepView};
use kd_nn::{Conv, GraphBuilder, Network, ops};
use serde::{Deserialize, Serialize};

use crate::features::{self, BN_EPS, BN_MOMENTUM, Choice, Match, StagePair, Stages, batch_statistics};
use crate::layers::{Layers, Norm};
use crate::registry::parse;

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// The stage to compare.
    pub hint_stage: usize,
    /// Whether the regressor ends with a ReLU.
    pub use_relu: bool,
    /// Epsilon of the regressor's batch norm, above 0.
    pub bn_eps: f64,
    /// Share of a batch in its running statistics, in 0..=1.
    pub bn_momentum: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { hint_stage: 2, use_relu: true, bn_eps: 1e-5, bn_momentum: 0.1 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        self.norm().validate()
    }

    fn norm(&self) -> Norm {
        Norm { eps: self.bn_eps, momentum: self.bn_momentum }
    }

    fn choice(&self) -> Choice {
        Choice::outputs(&Some(vec![self.hint_stage]), Stages::Bodies)
    }
}

/// Hint loss of the regressed student's map and the teacher's, which is detached.
///
/// # Errors
/// Maps that are not `[B,C,H,W]` or differ in shape.
pub fn fitnet(regressed: &Tensor, teacher: &Tensor) -> Result<LossTerms> {
    features::map("regressed map", regressed)?;
    if regressed.dims() != teacher.dims() {
        return Err(Error::shape("regressed map", format!("{:?}, as the teacher's", teacher.dims()), regressed.dims()));
    }
    let gap = (regressed - crate::inputs::constant(teacher, regressed)?)?;
    Ok(LossTerms::one("hint", gap.sqr()?.mean_all()?))
}

/// The layer that brings one grid to another: fitnet's and ab's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Regressor {
    Halve,
    Double,
    Valid([usize; 2]),
}

impl Regressor {
    /// For grids of height and width `from` and `to`.
    pub(crate) fn between(from: [usize; 2], to: [usize; 2]) -> Result<Self> {
        let wrong = || {
            let grids = format!("{}x{} of the student and {}x{} of the teacher", from[0], from[1], to[0], to[1]);
            Error::refused(format!(
                "no regressor brings grids together that are {grids}: the student's must not be the smaller, or be half as high"
            ))
        };
        let found = if from[0] == 2 * to[0] {
            Self::Halve
        } else if 2 * from[0] == to[0] {
            Self::Double
        } else if from[0] >= to[0] && from[1] >= to[1] {
            Self::Valid([1 + from[0] - to[0], 1 + from[1] - to[1]])
        } else {
            return Err(wrong());
        };
        let fits = match found {
            Self::Halve => from[1].div_ceil(2) == to[1],
            Self::Double => 2 * from[1] == to[1],
            Self::Valid(_) => true,
        };
        if fits { Ok(found) } else { Err(wrong()) }
    }

    /// `conv` and `bn` behind the cursor, to `out` channels.
    pub(crate) fn layers(self, b: &mut GraphBuilder, out: usize, norm: Norm) {
        match self {
            Self::Halve => b.conv("conv", Conv::new(out, 3).stride(2).pad(1).bias()),
            Self::Double => b.conv_transpose("conv", out, 4, 2, 1),
            Self::Valid([h, w]) => b.conv("conv", Conv::new(out, 1).kernel(h, w).bias()),
        };
        b.batch_norm_as("bn", true, norm.eps, norm.momentum);
    }

    /// The same on the tensors of a parity call.
    pub(crate) fn parity(self, layers: &Layers<'_>, prefix: &str, x: &Tensor) -> Result<Tensor> {
        let conv = format!("{prefix}.conv");
        let x = match self {
            Self::Halve => layers.conv(&conv, x, 2, 1)?,
            Self::Double => layers.conv_transpose(&conv, x, 2, 1)?,
            Self::Valid(_) => layers.conv(&conv, x, 1, 0)?,
        };
        layers.batch_norm(&format!("{prefix}.bn"), &x)
    }
}

struct Fitnet {
    params: Params,
    prepared: Option<(Match, Arc<Network>)>,
}

impl Method for Fitnet {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        self.params.choice().before()
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        let found = self.params.choice().matches(setup, ENTRY.name)?.remove(0);
        let regressor = Regressor::between([found.from[1], found.from[2]], [found.to[1], found.to[2]])
            .map_err(|e| Error::refused(format!("{}, stage {}: {e}", ENTRY.name, found.index)))?;
        batch_statistics(setup, ENTRY.name, found.to[1] * found.to[2])?;
        let mut b = GraphBuilder::new("fitnet.regressor", &found.from);
        regressor.layers(&mut b, found.to[0], self.params.norm());
        if self.params.use_relu {
            b.relu();
        }
        b.stage(0, "regressor", None);
        self.prepared = Some((found, features::network(setup, b)?));
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        features::models(self.prepared.iter().map(|(_, network)| network))
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let (found, network) = self.prepared.as_ref().ok_or_else(|| Error::missing(ENTRY.name, "its regressor (`prepare` builds it)"))?;
        let student = step.student()?.get(found.student)?;
        let regressed = features::run(network, student, Cut::Input, Cut::Stage(0), step)?;
        fitnet(&regressed, step.teacher()?.get(found.teacher)?)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let params: Params = inputs.params()?;
    params.validate()?;
    let pair: StagePair<'_> = params.choice().parity(inputs)?.remove(0);
    let (teacher, layers) = (pair.teacher()?, Layers::trained(inputs, params.norm()));
    let ((_, _, hs, ws), (_, _, ht, wt)) = (pair.student.dims4()?, teacher.dims4()?);
    let mut regressed = Regressor::between([hs, ws], [ht, wt])?.parity(&layers, "regressor", pair.student)?;
    if params.use_relu {
        regressed = ops::relu(&regressed)?;
    }
    Ok(ParityOutput { terms: fitnet(&regressed, &teacher)?, state: layers.into_state() })
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "fitnet",
    about: "hints: a middle stage predicts the teacher's through a regressor",
    source: "Romero et al., ICLR 2015, arXiv 1412.6550",
    year: 2015,
    parameters: &[
        ParamDoc { name: "hint_stage", default: "2", range: "a stage of both networks", about: "what is compared" },
        ParamDoc { name: "use_relu", default: "true", range: "true | false", about: "whether the regressor ends with a ReLU" },
        BN_EPS,
        BN_MOMENTUM,
    ],
    build: |params| Ok(Box::new(Fitnet { params: parse(params, Params::validate)?, prepared: None })),
    parity,
    raw_terms: true,
};
