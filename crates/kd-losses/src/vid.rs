//! `vid`: variational information distillation, the teacher's maps under a Gaussian that the student predicts.
//!
//! Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019, arXiv 1904.05835.
//!
//! ```text
//! mu    = conv1x1(ReLU(conv1x1(ReLU(conv1x1(S_i)))))
//! var_c = softplus(a_c) + eps
//! value = sum_i mean over all elements of 1/2 ((T_i - mu)^2 / var + log var)
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `S_i`, `T_i` | outputs of stage i; the one with more rows is average-pooled to the other's grid | `[B,C,H,W]` |
//! | `a` | one number a channel of the teacher, trained with the student | `[C_t]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `stages` | null | ascending | null: from stage 1 on, until one network has no more |
//! | `eps` | 1e-5 | > 0 | least variance |
//! | `init_pred_var` | 5 | > eps | the variance that `a` begins at |
//!
//! Terms: `stage.<i>`; they may be negative (the constant of the density is left out). Weight in the published CIFAR-100 tables: 1, beside
//! `ce` 1, for every pair. The regressors have no bias, PyTorch's initialisation, and are trained with the student, as is `a` (mdistiller
//! leaves it at its start, which its authors did not intend). No other state. Cost: three 1x1 convolutions at the teacher's width a stage;
//! memory their activations, `O(B C_t H W)`.

use std::sync::Arc;

use candle_core::{Tensor, Var};
use kd_core::{Cut, Error, LossTerms, Method, MethodEntry, Model, Needs, ParamDoc, ParityInputs, ParityOutput, Result, Setup, StepView};
use kd_nn::{Conv, GraphBuilder, Network, ops};
use serde::{Deserialize, Serialize};

use crate::features::{self, Choice, Match, Stages, stages_doc};
use crate::inputs;
use crate::layers::{Layers, Norm};
use crate::registry::parse;

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// The stages to compare; none: from stage 1 on.
    pub stages: Option<Vec<usize>>,
    /// Least variance, above 0.
    pub eps: f64,
    /// The variance at the start, above `eps`.
    pub init_pred_var: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { stages: None, eps: 1e-5, init_pred_var: 5.0 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::positive("eps", self.eps)?;
        inputs::positive("init_pred_var", self.init_pred_var)?;
        if self.init_pred_var <= self.eps {
            return Err(Error::param("init_pred_var", self.init_pred_var, format!("above eps = {}", self.eps)));
        }
        self.choice().validate()
    }

    fn choice(&self) -> Choice {
        Choice::outputs(&self.stages, Stages::Bodies)
    }

    /// The number whose softplus is the variance at the start.
    fn initial(&self) -> f64 {
        let x = self.init_pred_var - self.eps;
        x + (-(-x).exp()).ln_1p()
    }
}

/// One stage's prediction of the teacher's map.
#[derive(Clone, Copy, Debug)]
pub struct Prediction<'a> {
    /// The student's stage: it names the term.
    pub index: usize,
    /// The regressed mean, `[B,C_t,H,W]`.
    pub mean: &'a Tensor,
    /// The number behind each channel's variance, `[C_t]`.
    pub log_scale: &'a Tensor,
    /// The teacher's map on the same grid, `[B,C_t,H,W]`; it is detached.
    pub teacher: &'a Tensor,
}

/// Variational information distillation over `stages`.
///
/// # Errors
/// Maps that are not `[B,C,H,W]` or differ in shape, a `log_scale` of another width; parameters out of range.
pub fn vid(stages: &[Prediction<'_>], params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let mut terms = LossTerms::new();
    for stage in stages {
        let name = format!("stage.{}", stage.index);
        let [_, c, _, _] = features::map(&format!("regressed {name}"), stage.mean)?;
        if stage.mean.dims() != stage.teacher.dims() {
            return Err(Error::shape(
                format!("teacher.{name}"),
                format!("{:?}, as the regressed map", stage.mean.dims()),
                stage.teacher.dims(),
            ));
        }
        if stage.log_scale.dims() != [c] {
            return Err(Error::shape(format!("log_scale.{}", stage.index), format!("[{c}]"), stage.log_scale.dims()));
        }
        let teacher = inputs::constant(stage.teacher, stage.mean)?;
        let var = (softplus(stage.log_scale)? + params.eps)?.reshape((1, c, 1, 1))?;
        let square = (teacher - stage.mean)?.sqr()?.broadcast_div(&var)?;
        let value = ((square.mean_all()? + var.log()?.mean_all()?)? * 0.5)?;
        terms = terms.with(&name, value, 1.0);
    }
    Ok(terms)
}

/// `log(1 + e^x)` without overflow: the larger exponent, a constant, is taken out.
fn softplus(x: &Tensor) -> Result<Tensor> {
    let m = ops::relu(&x.detach())?;
    Ok((((x - &m)?.exp()? + m.neg()?.exp()?)?.log()? + m)?)
}

struct Regressor {
    found: Match,
    network: Arc<Network>,
    log_scale: Var,
}

struct Vid {
    params: Params,
    stages: Vec<Regressor>,
}

impl Method for Vid {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        if self.stages.is_empty() {
            return self.params.choice().before();
        }
        features::needs(self.stages.iter().map(|s| &s.found))
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        let build = |found: Match| {
            let width = found.to[0];
            let grid = if found.from[1] > found.to[1] { found.to } else { found.from };
            let mut b = GraphBuilder::new(format!("vid.regressor.{}", found.index), &[found.from[0], grid[1], grid[2]]);
            for i in 1..=3 {
                b.conv(&format!("conv{i}"), Conv::new(width, 1));
                if i < 3 {
                    b.relu();
                }
            }
            b.stage(0, "conv3", None);
            let start = Tensor::full(self.params.initial(), width, setup.device)?.to_dtype(setup.dtype)?;
            Ok(Regressor { found, network: features::network(setup, b)?, log_scale: Var::from_tensor(&start)? })
        };
        self.stages = self.params.choice().matches(setup, ENTRY.name)?.into_iter().map(build).collect::<Result<_>>()?;
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        features::models(self.stages.iter().map(|s| &s.network))
    }

    fn vars(&self) -> Vec<(String, Var)> {
        self.stages.iter().map(|s| (format!("log_scale.{}", s.found.index), s.log_scale.clone())).collect()
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        features::prepared(&self.stages, ENTRY.name)?;
        let (student, teacher) = (step.student()?, step.teacher()?);
        let mut means = vec![];
        for stage in &self.stages {
            let (s, t) = features::matched(student.get(stage.found.student)?, teacher.get(stage.found.teacher)?)?;
            means.push((features::run(&stage.network, &s, Cut::Input, Cut::Stage(0), step)?, t));
        }
        let predictions: Vec<Prediction<'_>> = self
            .stages
            .iter()
            .zip(&means)
            .map(|(s, (mean, teacher))| Prediction { index: s.found.index, mean, log_scale: s.log_scale.as_tensor(), teacher })
            .collect();
        vid(&predictions, &self.params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let params: Params = inputs.params()?;
    let layers = Layers::trained(inputs, Norm::default());
    let mut terms = LossTerms::new();
    for pair in params.choice().parity(inputs)? {
        let (s, t) = pair.matched()?;
        let conv = |i: usize, x: &Tensor| layers.conv(&format!("regressor.{}.conv{i}", pair.index), x, 1, 0);
        let mean = conv(3, &ops::relu(&conv(2, &ops::relu(&conv(1, &s)?)?)?)?)?;
        let log_scale = layers.tensor(&format!("log_scale.{}", pair.index), &[t.dim(1)?])?;
        terms.extend(vid(&[Prediction { index: pair.index, mean: &mean, log_scale, teacher: &t }], &params)?);
    }
    Ok(terms.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "vid",
    about: "variational information distillation: the teacher's maps under a predicted Gaussian",
    source: "Ahn et al., CVPR 2019, arXiv 1904.05835",
    year: 2019,
    parameters: &[
        stages_doc("what is compared; null: from stage 1 on"),
        ParamDoc { name: "eps", default: "1e-5", range: "> 0", about: "least variance" },
        ParamDoc { name: "init_pred_var", default: "5.0", range: "> eps", about: "variance at the start" },
    ],
    build: |params| Ok(Box::new(Vid { params: parse(params, Params::validate)?, stages: vec![] })),
    parity,
    raw_terms: true,
};
