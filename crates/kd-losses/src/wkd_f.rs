//! `wkd_f`: Wasserstein distance between Gaussians that stand for the features of a stage.
//!
//! Lv, Yang and Li, "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation", NeurIPS 2024, arXiv 2412.08139.
//! The form for features, WKD-F; the one for logits is [`wkd_l`](mod@crate::wkd_l).
//!
//! ```text
//! x         = relu(bn(projector(S)))                      to the teacher's channels and grid
//! mu, sigma = mean and sqrt(unbiased variance + eps) of each channel over each of grid x grid regions
//! mean      = sum_c,regions (mu_x - mu_T)^2 / (B grid^2),   deviation = sum_c,regions (sigma_x - sigma_T)^2 / (B grid^2)
//! value     = d (mean_weight mean + deviation),   d = 1 for full_epochs epochs, then falling to 0 as half a cosine
//! ```
//!
//! The squared 2-Wasserstein distance between Gaussians with diagonal covariances.
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `S` | the student's map of stage `hint_stage` | `[B,C_s,H,W]` |
//! | `T` | the teacher's of the same number, or its last; detached | `[B,C_t,H',W']` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `hint_stage` | null | a stage | null: the last of either side |
//! | `projector` | `"conv1x1"` | `"conv1x1"`, `"bottleneck"` | fitnet's regressor for these grids; 1x1 to 256, 3x3, 1x1 on equal grids |
//! | `grid` | 1 | >= 1 | regions of at least two cells along each axis (adaptive pooling's bins) |
//! | `mean_weight` | 4 | >= 0 | |
//! | `eps` | 1e-5 | > 0 | |
//! | `full_epochs` | 150 | >= 0 | epochs of full weight |
//! | `bn_eps`, `bn_momentum` | 1e-5, 0.1 | > 0, 0..=1 | of the projector's batch norm |
//!
//! Terms: `mean`, `deviation`. State: the projector's running statistics. Use with `ce` of weight 1.
//!
//! | pair | weight | mean_weight | projector | grid | full_epochs |
//! |---|---|---|---|---|---|
//! | CIFAR-100 res32x4-res8x4 | 0.006 | 4 | conv1x1 | 1 | 150 |
//! | ImageNet R34-R18 | 0.02 | 2 | bottleneck | 4 | 0 |
//!
//! Checked: formula and values read in copies of the released code (hainn2803/WKD, CdkeyTJ/DeepLearningImprove), value and gradient against
//! an independent f64 implementation; the paper's text was not compared. The release's bottleneck for a teacher's grid of twice the
//! student's cannot run and is refused here.

use std::sync::Arc;

use candle_core::Tensor;
use kd_core::{
    Cut, Error, LossTerms, Method, MethodEntry, Mode, Model, ModelSpec, Needs, ParamDoc, ParityInputs, ParityOutput, Result, Setup,
    StateDict, StepView,
};
use kd_nn::{Conv, Graph, GraphBuilder, Network};
use serde::{Deserialize, Serialize};

use crate::fitnet::Regressor;
use crate::layers::Norm;
use crate::registry::parse;
use crate::wkd_l::decay;
use crate::{features, inputs, named_graph};

/// The layers in front of the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Projector {
    /// One convolution, 1x1 on equal grids.
    #[serde(rename = "conv1x1")]
    Conv,
    /// 1x1, 3x3 and 1x1, 256 channels in between.
    Bottleneck,
}

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// The stage compared; the last of either side by default.
    pub hint_stage: Option<usize>,
    /// The layers in front of the comparison.
    pub projector: Projector,
    /// Regions along each axis, at least 1.
    pub grid: usize,
    /// Weight of `mean`, at least 0.
    pub mean_weight: f64,
    /// Added to the variances, above 0.
    pub eps: f64,
    /// Epochs of full weight.
    pub full_epochs: usize,
    /// Epsilon of the projector's batch norm, above 0.
    pub bn_eps: f64,
    /// The batch's share of the projector's running statistics, in 0..=1.
    pub bn_momentum: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            hint_stage: None,
            projector: Projector::Conv,
            grid: 1,
            mean_weight: 4.0,
            eps: 1e-5,
            full_epochs: 150,
            bn_eps: 1e-5,
            bn_momentum: 0.1,
        }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        if self.grid == 0 {
            return Err(Error::param("grid", 0, "at least 1"));
        }
        inputs::not_negative("mean_weight", self.mean_weight)?;
        inputs::positive("eps", self.eps)?;
        inputs::positive("bn_eps", self.bn_eps)?;
        inputs::share("bn_momentum", self.bn_momentum)
    }

    /// The projector from maps `[C,H,W]` of the student to those of the teacher.
    fn graph(&self, from: [usize; 3], to: [usize; 3]) -> Result<Graph> {
        let mut b = GraphBuilder::new("wkd_f.projector", &from);
        match self.projector {
            Projector::Conv => {
                let norm = Norm { eps: self.bn_eps, momentum: self.bn_momentum };
                Regressor::between([from[1], from[2]], [to[1], to[2]])?.layers(&mut b, to[0], norm);
            }
            Projector::Bottleneck if from[1..] == to[1..] => {
                b.conv("conv1", Conv::new(256, 1).bias());
                b.conv("conv2", Conv::new(256, 3).pad(1).bias());
                b.conv("conv3", Conv::new(to[0], 1).bias());
                b.batch_norm_as("bn", true, self.bn_eps, self.bn_momentum);
            }
            Projector::Bottleneck => {
                let allowed = format!("\"conv1x1\": the grids {:?} and {:?} differ", &from[1..], &to[1..]);
                return Err(Error::param("wkd_f: projector", "\"bottleneck\"", allowed));
            }
        }
        b.relu();
        b.stage(0, "bn", Some("bn"));
        b.finish()
    }
}

/// WKD-F of the projected map `x` against the teacher's, which is detached, both `[B,C,H,W]`.
///
/// # Errors
/// Maps that are not finite or differ in shape; a grid with regions of less than two cells; parameters out of range.
pub fn wkd_f(x: &Tensor, teacher: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let [b, _, h, w] = features::map("the projected map", x)?;
    inputs::finite("the projected map", x)?;
    inputs::finite("the teacher's map", teacher)?;
    if x.dims() != teacher.dims() {
        return Err(Error::shape("the teacher's map", format!("{:?}, as the projected one", x.dims()), teacher.dims()));
    }
    let teacher = inputs::constant(teacher, x)?;
    let grid = params.grid;
    let bins = |n: usize| (0..grid).map(move |i| (i * n / grid, ((i + 1) * n).div_ceil(grid)));
    let (mut mean, mut deviation) = (vec![], vec![]);
    for (top, bottom) in bins(h) {
        for (left, right) in bins(w) {
            let cells = (bottom - top) * (right - left);
            if cells < 2 {
                let allowed = format!("so small that every region of a {h}x{w} map has at least two cells");
                return Err(Error::param("wkd_f: grid", grid, allowed));
            }
            let moments = |map: &Tensor| -> Result<(Tensor, Tensor)> {
                let region = map.narrow(2, top, bottom - top)?.narrow(3, left, right - left)?.flatten_from(2)?;
                let mu = region.mean_keepdim(2)?;
                let variance = (region.broadcast_sub(&mu)?.sqr()?.sum(2)? / (cells as f64 - 1.0))?;
                Ok((mu.squeeze(2)?, (variance + params.eps)?.sqrt()?))
            };
            let ((mu_x, sigma_x), (mu_t, sigma_t)) = (moments(x)?, moments(&teacher)?);
            mean.push((mu_x - mu_t)?.sqr()?.sum_all()?);
            deviation.push((sigma_x - sigma_t)?.sqr()?.sum_all()?);
        }
    }
    let scale = 1.0 / (b * grid * grid) as f64;
    let total = |parts: Vec<Tensor>| -> Result<Tensor> { Ok((Tensor::stack(&parts, 0)?.sum_all()? * scale)?) };
    Ok(LossTerms::new().with("mean", total(mean)?, params.mean_weight).with("deviation", total(deviation)?, 1.0))
}

struct WkdF {
    params: Params,
    prepared: Option<(Arc<Network>, [Cut; 2])>,
}

impl Method for WkdF {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    /// The last stages are known once both networks are: after [`Method::prepare`].
    fn needs(&self) -> Needs {
        let guess = Cut::Stage(self.params.hint_stage.unwrap_or(0));
        let [student, teacher] = self.prepared.as_ref().map_or([guess; 2], |p| p.1);
        Needs { student: vec![student], teacher: vec![teacher], ..Needs::default() }
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        let (s, t) = (setup.models.student.spec(), setup.teacher(ENTRY.name)?.spec());
        let stage = |spec: &ModelSpec| {
            let i = self.params.hint_stage.unwrap_or(spec.stages.len().saturating_sub(1));
            let found = spec.stages.get(i).ok_or_else(|| Error::refused(format!("wkd_f: {} has no stage {i}", spec.name)))?;
            Ok::<_, Error>((i, [found.channels, found.size[0], found.size[1]]))
        };
        let ((own, from), (other, to)) = (stage(s)?, stage(t)?);
        features::batch_statistics(setup, ENTRY.name, to[1] * to[2])?;
        if to[1] / self.params.grid * (to[2] / self.params.grid) < 2 {
            let allowed = format!("so small that every region of a {}x{} map has at least two cells", to[1], to[2]);
            return Err(Error::param("wkd_f: grid", self.params.grid, allowed));
        }
        let network = Network::new(self.params.graph(from, to)?, setup.dtype, setup.device)?;
        network.init(setup.rng.named("projector"))?;
        self.prepared = Some((Arc::new(network), [Cut::Stage(own), Cut::Stage(other)]));
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        self.prepared.iter().map(|(network, _)| Arc::clone(network) as Arc<dyn Model>).collect()
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let (network, cuts) = self.prepared.as_ref().ok_or_else(|| Error::missing(ENTRY.name, "its projector (`prepare` builds it)"))?;
        let mode = Mode::Train(step.rng.named("projector"));
        let x = network.run(step.student()?.get(cuts[0])?, Cut::Input, &[Cut::Stage(0)], mode)?;
        let terms = wkd_f(x.stage(0)?, step.teacher()?.get(cuts[1])?, &self.params)?;
        Ok(terms.scaled(decay(step.progress, self.params.full_epochs)))
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let params: Params = inputs.params()?;
    params.validate()?;
    let stage = params.hint_stage.map_or("last".to_string(), |i| i.to_string());
    let (student, teacher) = (inputs.get(&format!("student.stage.{stage}"))?, inputs.get(&format!("teacher.stage.{stage}"))?);
    inputs::finite("the student's map", student)?;
    let [_, cs, hs, ws] = features::map("the student's map", student)?;
    let [_, ct, ht, wt] = features::map("the teacher's map", teacher)?;
    let mut state = StateDict::new();
    let graph = params.graph([cs, hs, ws], [ct, ht, wt])?;
    let x = named_graph::run(&graph, "projector", inputs, student, Cut::Stage(0), &mut state)?;
    Ok(ParityOutput { terms: wkd_f(&x, teacher, &params)?, state })
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "wkd_f",
    about: "Wasserstein distance between Gaussians of a stage's channels: means and deviations over regions",
    source: "Lv, Yang and Li, NeurIPS 2024, arXiv 2412.08139",
    year: 2024,
    parameters: &[
        ParamDoc { name: "hint_stage", default: "null", range: "a stage, or null", about: "the stage compared; null: the last" },
        ParamDoc { name: "projector", default: "\"conv1x1\"", range: "\"conv1x1\" | \"bottleneck\"", about: "layers behind the student" },
        ParamDoc { name: "grid", default: "1", range: ">= 1", about: "regions along each axis" },
        ParamDoc { name: "mean_weight", default: "4.0", range: ">= 0", about: "weight of the means' distance" },
        ParamDoc { name: "eps", default: "1e-5", range: "> 0", about: "added to the variances" },
        ParamDoc { name: "full_epochs", default: "150", range: ">= 0", about: "epochs of full weight" },
        ParamDoc { name: "bn_eps", default: "1e-5", range: "> 0", about: "epsilon of the projector's batch norm" },
        ParamDoc { name: "bn_momentum", default: "0.1", range: "0..=1", about: "the batch's share of its running statistics" },
    ],
    build: |params| Ok(Box::new(WkdF { params: parse(params, Params::validate)?, prepared: None })),
    parity,
    raw_terms: true,
};
