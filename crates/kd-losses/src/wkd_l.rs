//! `wkd_l`: Wasserstein distance between the predictions, moving probability between classes by how alike they are.
//!
//! Lv, Yang and Li, "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation", NeurIPS 2024, arXiv 2412.08139.
//! The form for logits, WKD-L; the one for features is [`wkd_f`](mod@crate::wkd_f).
//!
//! ```text
//! target      = -mean_b v_y log p_y                                   v, p = softmax of teacher and student at temperature 1
//! wasserstein = mean_b sum_ij f_ij c_ij                               f transports p' to v', softmaxes at T over the classes but y
//! c_ij        = 1 - exp(-sharpen (1 - cos(w_i, w_j))) + 1e-8          w: the teacher's classifier rows or mean embeddings
//! sinkhorn:     u = 1/(K-1);  repeat:  v = v' / (M^T u + 1e-8),  u = p' / (M v + 1e-8);   f = u_i M_ij v_j,   M = exp(-c / reg)
//! value       = target + gamma d wasserstein,   d = 1 for full_epochs epochs, then falling to 0 as half a cosine
//! ```
//!
//! The gradient runs through all iterations, as released.
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `z_s`, `z_t` | logits of student and teacher (detached) | `[B,K]` |
//! | `y` | labels; of soft targets (mixup) the heaviest class | `[B]` integers, or `[B,K]` probabilities |
//! | `c` | cost between classes, from the teacher once | `[K,K]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `gamma` | 800 | >= 0 | weight of `wasserstein` |
//! | `temperature` | 8 | > 0 | T; no factor T^2 |
//! | `cost` | `"classifier"` | `"classifier"`, `"class_means"` | what two classes are compared by |
//! | `sharpen` | 1 | >= 0 | 0: the cosine distance as it is |
//! | `reg` | 0.05 | > 0 | regularisation; small ones are exact and slow |
//! | `iterations` | 10 | >= 1 | |
//! | `full_epochs` | 150 | >= 0 | epochs of full weight |
//!
//! Terms: `target`, `wasserstein`. Use with `ce` of weight 1. Cost O(iterations B K^2) in products with one `[K,K]` matrix, as the label's
//! row and column are masked by zeros instead of being cut out for every sample (the release copies the matrix `B` times); memory
//! K^2 + O(iterations B K).
//!
//! | pair, CIFAR-100 | gamma | T |
//! |---|---|---|
//! | res32x4-res8x4 | 800 | 8 |
//! | wrn40_2-shuffleV1 | 200 | 6 |
//!
//! The published numbers take the cost from the kernel alignment (CKA) of the classes' training features, which needs all of them and is
//! not built; `"classifier"` is the release's alternative (`fc`), `"class_means"` uses the mean embeddings that kd computes. Checked:
//! formula and values read in copies of the released code (hainn2803/WKD, Changhy26/WKL), value and gradient against an independent f64
//! implementation; the paper's text was not compared.

use candle_core::Tensor;
use kd_core::{Error, LossTerms, Method, MethodEntry, Needs, ParamDoc, ParityInputs, ParityOutput, Progress, Result, Setup, StepView};
use serde::{Deserialize, Serialize};

use crate::labels::{self, Labels};
use crate::norms::unit;
use crate::registry::{parity_labels, parse};
use crate::{inputs, softmax, srrl};

/// What two classes are compared by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClassCost {
    /// Rows of the teacher's classifier.
    Classifier,
    /// Mean embeddings of the teacher.
    ClassMeans,
}

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Weight of `wasserstein`, at least 0.
    pub gamma: f64,
    /// T, above 0.
    pub temperature: f64,
    /// What two classes are compared by.
    pub cost: ClassCost,
    /// Sharpening of the cosine distance, at least 0; 0 for none.
    pub sharpen: f64,
    /// Regularisation of the transport, above 0.
    pub reg: f64,
    /// Iterations of Sinkhorn's algorithm, at least 1.
    pub iterations: usize,
    /// Epochs in which `wasserstein` has its full weight.
    pub full_epochs: usize,
}

impl Default for Params {
    fn default() -> Self {
        Self { gamma: 800.0, temperature: 8.0, cost: ClassCost::Classifier, sharpen: 1.0, reg: 0.05, iterations: 10, full_epochs: 150 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::not_negative("gamma", self.gamma)?;
        inputs::positive("temperature", self.temperature)?;
        inputs::not_negative("sharpen", self.sharpen)?;
        inputs::positive("reg", self.reg)?;
        if self.iterations == 0 { Err(Error::param("iterations", 0, "at least 1")) } else { Ok(()) }
    }

    /// The cost between classes `[K,K]` from one vector for each, `[K,D]`.
    ///
    /// # Errors
    /// Vectors that are not finite; fewer than two.
    pub fn class_cost(&self, vectors: &Tensor) -> Result<Tensor> {
        let (k, _) = inputs::embedding("the classes' vectors", vectors)?;
        if k < 2 {
            return Err(Error::shape("the classes' vectors", "[K,D] with K >= 2", vectors.dims()));
        }
        let w = unit(&vectors.detach(), 1e-12)?;
        let distance = (1.0 - w.matmul(&w.t()?)?)?;
        let distance = if self.sharpen == 0.0 { distance } else { (1.0 - (distance * -self.sharpen)?.exp()?)? };
        Ok((kd_nn::ops::relu(&distance)? + 1e-8)?)
    }
}

/// 1 for `full_epochs` epochs, then half a cosine that reaches 0 in the last one.
pub(crate) fn decay(progress: Progress, full_epochs: usize) -> f64 {
    let epoch = progress.epoch + 1;
    if epoch <= full_epochs || progress.epochs <= full_epochs {
        return 1.0;
    }
    let share = (epoch - full_epochs) as f64 / (progress.epochs - full_epochs) as f64;
    0.5 * (1.0 + (share * std::f64::consts::PI).cos())
}

/// WKD-L of `student` `[B,K]` by `teacher` `[B,K]`, which is detached, with the class costs `cost` `[K,K]` of [`Params::class_cost`];
/// `labels` are class indices `[B]` or class probabilities `[B,K]`.
///
/// # Errors
/// Logits that are not finite, differ in shape, have no row or fewer than two classes; costs of another shape; labels outside the classes;
/// parameters out of range.
pub fn wkd_l(student: &Tensor, teacher: &Tensor, cost: &Tensor, labels: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (_, k, teacher) = inputs::both_logits(student, teacher)?;
    if cost.dims() != [k, k] {
        return Err(Error::shape("the classes' cost", format!("[{k}, {k}]"), cost.dims()));
    }
    let cost = inputs::constant(cost, student)?;
    let y = Labels::new(labels, k, student)?.one_hot()?;
    let confidence = labels::at(&softmax::log_softmax(&teacher)?, &y)?.exp()?;
    let target = (confidence * labels::at(&softmax::log_softmax(student)?, &y)?)?.mean_all()?.neg()?;

    let others = (1.0 - y)?;
    let t = params.temperature;
    let (p, q) = (softmax::softmax_over(&(student / t)?, &others)?, softmax::softmax_over(&(teacher / t)?, &others)?);
    let kernel = (&cost * (-1.0 / params.reg))?.exp()?;
    let transposed = kernel.t()?.contiguous()?;
    // The label's class holds no probability on either side: its scalings stay 0, and nothing is moved to or from it.
    let mut u = (&others / (k as f64 - 1.0))?;
    let mut v = others;
    for _ in 0..params.iterations {
        v = (&q / (u.matmul(&kernel)? + 1e-8)?)?;
        u = (&p / (v.matmul(&transposed)? + 1e-8)?)?;
    }
    let moved = v.matmul(&(kernel * cost)?.t()?.contiguous()?)?;
    let wasserstein = (u * moved)?.sum(1)?.mean_all()?;
    Ok(LossTerms::one("target", target).with("wasserstein", wasserstein, params.gamma))
}

struct WkdL {
    params: Params,
    cost: Option<Tensor>,
}

impl Method for WkdL {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        let means = self.params.cost == ClassCost::ClassMeans;
        Needs { labels: true, teacher_model: !means, class_means: means, ..Needs::logits() }
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        let vectors = match self.params.cost {
            ClassCost::Classifier => srrl::classifier(setup.teacher(ENTRY.name)?, setup)?.weight,
            ClassCost::ClassMeans => setup.class_means.ok_or_else(|| Error::missing(ENTRY.name, "class means"))?.clone(),
        };
        if vectors.dim(0)? != setup.classes {
            return Err(Error::shape("wkd_l: the classes' vectors", format!("[{}, D]", setup.classes), vectors.dims()));
        }
        self.cost = Some(self.params.class_cost(&vectors)?);
        Ok(())
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let cost = self.cost.as_ref().ok_or_else(|| Error::missing(ENTRY.name, "the classes' cost (`prepare` computes it)"))?;
        let params = Params { gamma: self.params.gamma * decay(step.progress, self.params.full_epochs), ..self.params.clone() };
        wkd_l(step.student()?.logits()?, step.teacher()?.logits()?, cost, labels::of(step.batch), &params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let params: Params = inputs.params()?;
    params.validate()?;
    let vectors = match params.cost {
        ClassCost::Classifier => inputs.get("teacher.fc.weight")?,
        ClassCost::ClassMeans => inputs.get("class_means")?,
    };
    let cost = params.class_cost(vectors)?;
    Ok(wkd_l(inputs.get("student.logits")?, inputs.get("teacher.logits")?, &cost, parity_labels(inputs)?, &params)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "wkd_l",
    about: "Wasserstein distance between the predictions over classes that the teacher holds for alike or not",
    source: "Lv, Yang and Li, NeurIPS 2024, arXiv 2412.08139",
    year: 2024,
    parameters: &[
        ParamDoc { name: "gamma", default: "800.0", range: ">= 0", about: "weight of the Wasserstein distance" },
        ParamDoc { name: "temperature", default: "8.0", range: "> 0", about: "T of the other classes" },
        ParamDoc {
            name: "cost",
            default: "\"classifier\"",
            range: "\"classifier\" | \"class_means\"",
            about: "what classes are compared by",
        },
        ParamDoc { name: "sharpen", default: "1.0", range: ">= 0", about: "sharpening of the cosine distance" },
        ParamDoc { name: "reg", default: "0.05", range: "> 0", about: "regularisation of the transport" },
        ParamDoc { name: "iterations", default: "10", range: ">= 1", about: "of Sinkhorn's algorithm" },
        ParamDoc { name: "full_epochs", default: "150", range: ">= 0", about: "epochs of full weight" },
    ],
    build: |params| Ok(Box::new(WkdL { params: parse(params, Params::validate)?, cost: None })),
    parity,
    raw_terms: true,
};
