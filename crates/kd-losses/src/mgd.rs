//! `mgd`: masked generative distillation, the teacher's last map out of a masked student's.
//!
//! Yang et al., "Masked Generative Distillation", ECCV 2022, arXiv 2205.01529.
//!
//! ```text
//! a     = conv1x1(S) where the widths differ, S elsewhere
//! g     = conv3x3(ReLU(conv3x3(a M)))
//! value = sum (g - T)^2 / B
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `S`, `T` | outputs of the last stages, on equal grids | `[B,C,H,W]` |
//! | `M` | mask, 0 with probability `mask_ratio` and 1 otherwise, drawn anew each step | `[B,C_t,1,1]` or `[B,1,H,W]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `mask_ratio` | 0.15 | 0..=1 | share of what is hidden |
//! | `mask_shape` | `"channel"` | `"channel"`, `"spatial"` | classification hides channels, dense tasks positions |
//!
//! Term: `mgd`, a sum over the map. Weight in the release: 7e-5, beside `ce` 1 (ImageNet; R50-MobileNet clips the gradient's norm at 5). The
//! layers have biases and PyTorch's initialisation and are trained with the student. No state: the mask comes from the step's random
//! stream. Cost: two 3x3 convolutions at the teacher's width; memory `O(B C_t H W)`.

use std::sync::Arc;

use candle_core::Tensor;
use kd_core::{Cut, Error, LossTerms, Method, MethodEntry, Model, Needs, ParamDoc, ParityInputs, ParityOutput, Result, Setup, StepView};
use kd_nn::{Conv, GraphBuilder, Network, ops};
use serde::{Deserialize, Serialize};

use crate::features::{self, Choice, Match, Stages};
use crate::inputs;
use crate::layers::{Layers, Norm};
use crate::registry::parse;

/// What is hidden together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaskShape {
    /// A channel of a sample.
    Channel,
    /// A position of a sample.
    Spatial,
}

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Share of what is hidden, in 0..=1.
    pub mask_ratio: f64,
    /// What is hidden together.
    pub mask_shape: MaskShape,
}

impl Default for Params {
    fn default() -> Self {
        Self { mask_ratio: 0.15, mask_shape: MaskShape::Channel }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::share("mask_ratio", self.mask_ratio)
    }

    /// The shape of the mask of a map.
    fn mask(&self, [b, c, h, w]: [usize; 4]) -> [usize; 4] {
        match self.mask_shape {
            MaskShape::Channel => [b, c, 1, 1],
            MaskShape::Spatial => [b, 1, h, w],
        }
    }
}

/// Masked generative distillation of the generated map and the teacher's, which is detached.
///
/// # Errors
/// Maps that are not `[B,C,H,W]` or differ in shape.
pub fn mgd(generated: &Tensor, teacher: &Tensor) -> Result<LossTerms> {
    let [b, ..] = features::map("generated map", generated)?;
    if generated.dims() != teacher.dims() {
        return Err(Error::shape("generated map", format!("{:?}, as the teacher's", teacher.dims()), generated.dims()));
    }
    let gap = (generated - inputs::constant(teacher, generated)?)?;
    Ok(LossTerms::one("mgd", (gap.sqr()?.sum_all()? / b as f64)?))
}

struct Mgd {
    params: Params,
    prepared: Option<(Match, Arc<Network>)>,
}

fn choice() -> Choice {
    Choice::outputs(&None, Stages::Last)
}

impl Method for Mgd {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        self.prepared.as_ref().map_or_else(|| choice().before(), |(found, _)| features::needs([found]))
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        let found = choice().matches(setup, ENTRY.name)?.remove(0);
        if found.from[1..] != found.to[1..] {
            let grids = format!("{}x{} and {}x{}", found.from[1], found.from[2], found.to[1], found.to[2]);
            return Err(Error::refused(format!(
                "{}: the last stages of student and teacher must have equal grids, not {grids}",
                ENTRY.name
            )));
        }
        let width = found.to[0];
        let mut b = GraphBuilder::new("mgd", &found.from);
        if found.from[0] != width {
            b.conv("align", Conv::new(width, 1).bias());
        }
        b.stage(0, "align", None);
        b.conv("generation.conv1", Conv::new(width, 3).pad(1).bias());
        b.relu();
        b.conv("generation.conv2", Conv::new(width, 3).pad(1).bias());
        b.stage(1, "generation", None);
        self.prepared = Some((found, features::network(setup, b)?));
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        features::models(self.prepared.iter().map(|(_, network)| network))
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let (found, network) = self.prepared.as_ref().ok_or_else(|| Error::missing(ENTRY.name, "its generator (`prepare` builds it)"))?;
        let (student, teacher) = (step.student()?.get(found.student)?, step.teacher()?.get(found.teacher)?);
        let aligned =
            if found.from[0] == found.to[0] { student.clone() } else { features::run(network, student, Cut::Input, Cut::Stage(0), step)? };
        let shape = self.params.mask(features::map("student's map", &aligned)?);
        let rng = step.rng.named("mask");
        let keep = |i: usize| f64::from(u8::from(rng.uniform(i as u64) >= self.params.mask_ratio));
        let mask: Vec<f64> = (0..shape.iter().product()).map(keep).collect();
        let mask = Tensor::from_vec(mask, &shape, aligned.device())?.to_dtype(aligned.dtype())?;
        let masked = aligned.broadcast_mul(&mask)?;
        mgd(&features::run(network, &masked, Cut::Stage(0), Cut::Stage(1), step)?, teacher)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let params: Params = inputs.params()?;
    params.validate()?;
    let layers = Layers::trained(inputs, Norm::default());
    let student = inputs.get("student.stage.last")?;
    features::map("student.stage.last", student)?;
    let aligned = if layers.has("align") { layers.conv("align", student, 1, 0)? } else { student.clone() };
    let (shape, mask) = (params.mask(features::map("student's map", &aligned)?), inputs.get("mask")?);
    if mask.dims() != shape {
        return Err(Error::shape("mask", format!("{shape:?}"), mask.dims()));
    }
    let hidden = ops::relu(&layers.conv("generation.conv1", &aligned.broadcast_mul(mask)?, 1, 1)?)?;
    Ok(mgd(&layers.conv("generation.conv2", &hidden, 1, 1)?, inputs.get("teacher.stage.last")?)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "mgd",
    about: "masked generative distillation: the teacher's last map out of a masked student's",
    source: "Yang et al., ECCV 2022, arXiv 2205.01529",
    year: 2022,
    parameters: &[
        ParamDoc { name: "mask_ratio", default: "0.15", range: "0..=1", about: "share of what is hidden" },
        ParamDoc { name: "mask_shape", default: "\"channel\"", range: "\"channel\" | \"spatial\"", about: "what is hidden together" },
    ],
    build: |params| Ok(Box::new(Mgd { params: parse(params, Params::validate)?, prepared: None })),
    parity,
    raw_terms: true,
};
