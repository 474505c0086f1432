//! `ctkd`: curriculum temperature, learnt against the student.
//!
//! Li et al., "Curriculum Temperature for Knowledge Distillation", AAAI 2023, arXiv 2211.16231.
//!
//! ```text
//! tau   = tau_init + tau_range sigmoid(theta)
//! value = base at temperature tau;  of kd: tau^2 mean_b KL(softmax(v/tau) || softmax(z/tau)), tau^2 differentiated too
//! theta stands behind a gradient reversal: its gradient is -lambda times the value's
//! lambda = (1 - cos(pi min(e, lambda_epochs) / lambda_epochs)) / 2 in epoch e = 1, 2, ..
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `z` | student logits | `[B,K]` |
//! | `v` | teacher logits, detached | `[B,K]` |
//! | `theta` | a parameter, at first 1 (tau = 15.62); with `granularity = "instance"` one for each sample | `[1]`, `[B]` |
//! | `y` | labels, for the bases dkd and nkd | `[B]` integers, or `[B,K]` probabilities |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `base` | `"kd"` | `"kd"`, `"dkd"`, `"nkd"` | the loss whose temperature is learnt |
//! | `alpha`, `beta` | 1, 8 | >= 0 | weights of dkd's terms |
//! | `gamma` | 1.5 | >= 0 | weight of nkd's non-target part, the only softened one |
//! | `tau_init`, `tau_range` | 1, 20 | > 0, >= 0 | |
//! | `lambda_epochs` | 10 | >= 0 | epochs until lambda is 1; 5 on ImageNet; 0: from the start |
//! | `granularity` | `"global"` | `"global"`, `"instance"` | one temperature, or one for each sample |
//!
//! Terms: the base's. Recipe: `ce` of weight 0.1 beside this of weight 0.9 on CIFAR-100, 1 and 1 on ImageNet (batch 256, 120 epochs). With a
//! feature method (pkt, sp, vid, crd, srrl) the paper adds this as the KD term beside it. `theta` is trained by the student's optimiser, weight
//! decay included, which draws tau towards `tau_init + tau_range / 2`.
//!
//! The MLP of the instance form is not in the authors' repository; here both sides' logits, detached, go through a layer of width K, ReLU and a
//! layer of width 1 whose bias starts at 1. Its snippet adds 1e-7 to the teacher's probabilities, this does not (2e-5 of the value, up to 3e-3 of
//! theta's gradient). The gradient of theta is a small difference of large numbers: in f32 it has three digits at tau = 15. Cost O(BK).

use std::sync::Arc;

use candle_core::{Tensor, Var};
use kd_core::{
    Cut, Error, LossTerms, Method, MethodEntry, Mode, Model, Needs, ParamDoc, ParityInputs, ParityOutput, Result, Setup, StepView,
};
use kd_nn::{GraphBuilder, Init, Network};
use serde::{Deserialize, Serialize};

use crate::inputs;
use crate::labels::{self, Labels};
use crate::registry::{parity_labels, parity_without, parse};
use crate::rows::{self, Base};

/// How many temperatures there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Granularity {
    /// One.
    Global,
    /// One for each sample.
    Instance,
}

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// The loss whose temperature is learnt.
    pub base: Base,
    /// Weight of dkd's target part, at least 0.
    pub alpha: f64,
    /// Weight of dkd's other classes, at least 0.
    pub beta: f64,
    /// Weight of nkd's non-target part, at least 0.
    pub gamma: f64,
    /// Least temperature, above 0.
    pub tau_init: f64,
    /// Temperatures go up to `tau_init + tau_range`; at least 0.
    pub tau_range: f64,
    /// Epochs until the reversal is at full strength.
    pub lambda_epochs: usize,
    /// How many temperatures there are.
    pub granularity: Granularity,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            base: Base::Kd,
            alpha: 1.0,
            beta: 8.0,
            gamma: 1.5,
            tau_init: 1.0,
            tau_range: 20.0,
            lambda_epochs: 10,
            granularity: Granularity::Global,
        }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        self.config().validate()?;
        inputs::positive("tau_init", self.tau_init)?;
        inputs::not_negative("tau_range", self.tau_range)
    }

    fn config(&self) -> rows::Config {
        rows::Config { base: self.base, alpha: self.alpha, beta: self.beta, gamma: self.gamma, keep_target: false }
    }

    /// Strength of the reversal in `epoch`, counted from 0.
    pub fn lambda(&self, epoch: usize) -> f64 {
        let share = if self.lambda_epochs == 0 { 1.0 } else { ((epoch + 1) as f64 / self.lambda_epochs as f64).min(1.0) };
        (1.0 - (std::f64::consts::PI * share).cos()) / 2.0
    }
}

/// CTKD on `student` `[B,K]` and `teacher` `[B,K]`, which is detached, with `theta` `[1]` or `[B]` behind a gradient reversal of strength
/// `lambda`; `labels` for the bases dkd and nkd.
///
/// # Errors
/// Logits that are not finite, differ in shape, have no row or fewer than two classes; a theta of another shape; missing labels; parameters out
/// of range.
pub fn ctkd(
    student: &Tensor,
    teacher: &Tensor,
    labels: Option<&Tensor>,
    theta: &Tensor,
    lambda: f64,
    params: &Params,
) -> Result<LossTerms> {
    params.validate()?;
    let (b, k, teacher) = inputs::both_logits(student, teacher)?;
    let temperatures = if params.granularity == Granularity::Global { 1 } else { b };
    if theta.dims() != [temperatures] {
        return Err(Error::shape("theta", format!("[{temperatures}]"), theta.dims()));
    }
    let labels = labels.map(|y| Labels::new(y, k, student)).transpose()?;
    // The value is theta's, the gradient -lambda times its own.
    let constant = theta.detach();
    let reversed = (&constant + ((&constant - theta)? * lambda)?)?;
    let tau = ((kd_nn::ops::sigmoid(&reversed)? * params.tau_range)? + params.tau_init)?;
    let column = tau.unsqueeze(1)?;
    let (z, v) = (student.broadcast_div(&column)?, teacher.broadcast_div(&column)?);
    let rows = params.config().rows([student, &teacher], [&z, &v], labels.as_ref())?;
    let squared = tau.sqr()?;
    rows.into_iter().try_fold(LossTerms::new(), |terms, term| {
        let rows = if term.softened { term.rows.broadcast_mul(&squared)? } else { term.rows };
        Ok(terms.with(term.name, rows.mean_all()?, term.weight))
    })
}

/// Where the temperatures come from.
enum Source {
    Theta(Var),
    Mlp(Arc<Network>),
}

struct Ctkd {
    params: Params,
    source: Option<Source>,
}

impl Method for Ctkd {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { labels: self.params.config().labels(), ..Needs::logits() }
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        self.source = Some(match self.params.granularity {
            Granularity::Global => Source::Theta(Var::ones(1, setup.dtype, setup.device)?),
            Granularity::Instance => {
                let mut b = GraphBuilder::new("ctkd.temperature", &[2 * setup.classes]);
                b.linear("hidden", setup.classes);
                b.relu();
                b.linear_with("theta", 1, Init::Default, Some(Init::Const(1.0)));
                b.cut(Cut::Logits);
                let network = Network::new(b.finish()?, setup.dtype, setup.device)?;
                network.init(setup.rng.named("temperature"))?;
                Source::Mlp(Arc::new(network))
            }
        });
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        match &self.source {
            Some(Source::Mlp(network)) => vec![Arc::clone(network) as Arc<dyn Model>],
            _ => vec![],
        }
    }

    fn vars(&self) -> Vec<(String, Var)> {
        match &self.source {
            Some(Source::Theta(theta)) => vec![("theta".to_string(), theta.clone())],
            _ => vec![],
        }
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let (z, v) = (step.student()?.logits()?, step.teacher()?.logits()?);
        let theta = match self.source.as_ref().ok_or_else(|| Error::missing(ENTRY.name, "its temperature (`prepare` makes it)"))? {
            Source::Theta(theta) => theta.as_tensor().clone(),
            Source::Mlp(network) => {
                let logits = Tensor::cat(&[&z.detach(), &inputs::constant(v, z)?], 1)?;
                let out = network.run(&logits, Cut::Input, &[Cut::Logits], Mode::Train(step.rng.named("temperature")))?;
                out.logits()?.squeeze(1)?
            }
        };
        let labels = self.params.config().labels().then(|| labels::of(step.batch));
        ctkd(z, v, labels, &theta, self.params.lambda(step.progress.epoch), &self.params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let (lambda, params) = parity_without(inputs, "lambda");
    let lambda = lambda.ok_or_else(|| Error::missing("the gradient reversal", "lambda"))?;
    let lambda = lambda.as_f64().filter(|l| (0.0..=1.0).contains(l)).ok_or_else(|| Error::param("lambda", &lambda, "in 0..=1"))?;
    let params: Params = parse(&params, Params::validate)?;
    let labels = if params.config().labels() { Some(parity_labels(inputs)?) } else { None };
    Ok(ctkd(inputs.get("student.logits")?, inputs.get("teacher.logits")?, labels, inputs.get("param.theta")?, lambda, &params)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "ctkd",
    about: "curriculum temperature: learnt against the student through a gradient reversal",
    source: "Li et al., AAAI 2023, arXiv 2211.16231",
    year: 2023,
    parameters: &[
        ParamDoc { name: "base", default: "\"kd\"", range: "\"kd\" | \"dkd\" | \"nkd\"", about: "the loss whose temperature is learnt" },
        ParamDoc { name: "alpha", default: "1.0", range: ">= 0", about: "weight of dkd's target class" },
        ParamDoc { name: "beta", default: "8.0", range: ">= 0", about: "weight of dkd's other classes" },
        ParamDoc { name: "gamma", default: "1.5", range: ">= 0", about: "weight of nkd's non-target part" },
        ParamDoc { name: "tau_init", default: "1.0", range: "> 0", about: "least temperature" },
        ParamDoc { name: "tau_range", default: "20.0", range: ">= 0", about: "how much higher it may be" },
        ParamDoc { name: "lambda_epochs", default: "10", range: ">= 0", about: "epochs until the reversal is at full strength" },
        ParamDoc {
            name: "granularity",
            default: "\"global\"",
            range: "\"global\" | \"instance\"",
            about: "one temperature, or one for each sample",
        },
    ],
    build: |params| Ok(Box::new(Ctkd { params: parse(params, Params::validate)?, source: None })),
    parity,
    raw_terms: true,
};
