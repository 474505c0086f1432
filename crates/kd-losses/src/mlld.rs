//! `mlld`: multi-level logit distillation, samples, batches and classes at several temperatures.
//!
//! Jin et al., "Multi-Level Logit Distillation", CVPR 2023.
//!
//! ```text
//! P = softmax(z/T) [B,K],  Q = softmax(v/T)
//! KL_T = T^2 mean_b KL(q_b || p_b),  BC_T = |Q Q^t - P P^t|^2 / B,  CC_T = |Q^t Q - P^t P|^2 / K       (Frobenius)
//!
//! variant = "released", on a weak view w and a strong view s of every sample:
//!   instance = f sum_T KL_T(w) + sum_{T among the first strong_count} KL_T(s) + sum_{the other T} KL_T(w)
//!   batch    = f sum_T BC_T(w),   class = g sum_T CC_T(w)
//!   f = share of samples whose teacher's confidence (at T = 1) is at most its median,
//!   g = share of classes whose sum of the teacher's probabilities over the batch is at most its median; constants
//! variant = "paper", on one view:
//!   instance = sum_T KL_T,  batch = sum_T BC_T,  class = sum_T CC_T
//!
//! value = instance_weight instance + batch_weight batch + class_weight class
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `z` | student logits, of one view or two | `[B,K]` |
//! | `v` | teacher logits, likewise, detached | `[B,K]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `variant` | `"released"` | `"released"`, `"paper"` | |
//! | `temperatures` | [4, 3, 5, 2, 6] | > 0 | on ImageNet the first is 1 |
//! | `strong_count` | 3 | 0.. as many as temperatures | how many of them the strong view takes |
//! | `instance_weight`, `batch_weight`, `class_weight` | 1 | >= 0 | |
//!
//! Terms: `instance`, `batch`, `class` (the shares included). Recipe: `ce` of weight 0.1 on both views, this of weight 0.9; ImageNet 0.5 and 0.5.
//!
//! ```toml
//! [data]
//! augment_strong = ["pad-crop:4", "flip", "randaugment:2", "cutout:16"]   # the second view
//! [[loss]]
//! method = "ce"
//! weight = 0.1
//! [[loss]]
//! method = "ce"
//! view = 1
//! weight = 0.1
//! [[loss]]
//! method = "mlld"
//! weight = 0.9
//! ```
//!
//! The authors' schedule: lr 0.025 for resnet, wrn and vgg students (240 epochs), 0.01 for MobileNetV2 (480), ShuffleV1 (480 from wrn40_2, 960
//! from res32x4) and ShuffleV2 (960), divided by 10 after 150, 180 and 210.
//!
//! The release multiplies losses that are scalars already by masks meant for single samples and classes and takes the mean: the shares `f` and
//! `g`, about one half each. Its last two temperatures of the strong view use the weak one again; its batch and class parts of the strong view
//! are computed and dropped. A saturated teacher ties at the median, which makes `f` jump; it is computed in f64 here.
//!
//! Cost: two passes through both networks (`released`); per temperature O(B^2 K) and O(B K^2), at K = 1000 and five temperatures 5 million
//! multiply-adds a sample and side. Memory B^2 + K^2. No state.

use candle_core::{DType, Tensor};
use kd_core::{Error, LossTerms, Method, MethodEntry, Needs, Outputs, ParamDoc, ParityInputs, ParityOutput, Result, StepView};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::logit_standardization::{self, standardized};
use crate::registry::parse;
use crate::{inputs, kd, softmax};

/// Which form is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// Two views, and the shares of the code.
    Released,
    /// One view.
    Paper,
}

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Which form is computed.
    pub variant: Variant,
    /// The temperatures, above 0.
    pub temperatures: Vec<f64>,
    /// How many of them, from the first, the strong view takes.
    pub strong_count: usize,
    /// Weight of `instance`, at least 0.
    pub instance_weight: f64,
    /// Weight of `batch`, at least 0.
    pub batch_weight: f64,
    /// Weight of `class`, at least 0.
    pub class_weight: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            variant: Variant::Released,
            temperatures: vec![4.0, 3.0, 5.0, 2.0, 6.0],
            strong_count: 3,
            instance_weight: 1.0,
            batch_weight: 1.0,
            class_weight: 1.0,
        }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        if self.temperatures.is_empty() {
            return Err(Error::param("temperatures", "[]", "a list of at least one number"));
        }
        self.temperatures.iter().try_for_each(|&t| inputs::positive("temperatures", t))?;
        if self.strong_count > self.temperatures.len() {
            return Err(Error::param("strong_count", self.strong_count, format!("at most {}, the temperatures", self.temperatures.len())));
        }
        inputs::not_negative("instance_weight", self.instance_weight)?;
        inputs::not_negative("batch_weight", self.batch_weight)?;
        inputs::not_negative("class_weight", self.class_weight)
    }
}

/// Student's and teacher's logits `[B,K]` of one view.
pub type View<'a> = [&'a Tensor; 2];

/// MLLD on the weak view and, for the released form, the strong one; the teacher's logits are detached.
///
/// # Errors
/// Logits that are not finite, differ in shape, have no row or fewer than two classes; a released form without a strong view; parameters out
/// of range.
pub fn mlld(weak: View<'_>, strong: Option<View<'_>>, params: &Params) -> Result<LossTerms> {
    with(weak, strong, params, None)
}

fn with(
    weak: View<'_>,
    strong: Option<View<'_>>,
    params: &Params,
    standardize: Option<&logit_standardization::Params>,
) -> Result<LossTerms> {
    params.validate()?;
    let (b, k, teacher) = inputs::both_logits(weak[0], weak[1])?;
    let weak = [weak[0], &teacher];
    // Logit standardisation reaches the divergences alone.
    let of_kl = |[z, v]: View<'_>| -> Result<[Tensor; 2]> {
        match standardize {
            Some(p) => Ok([standardized(z, p)?, standardized(v, p)?]),
            None => Ok([z.clone(), v.clone()]),
        }
    };
    let kl =
        |[z, v]: &[Tensor; 2], t: f64| -> Result<Tensor> { Ok((kd::rows(&(z / t)?, &(v / t)?, kd::Form::Kl)?.mean_all()? * (t * t))?) };
    let sum = |temperatures: &[f64], one: &dyn Fn(f64) -> Result<Tensor>| -> Result<Tensor> {
        temperatures.iter().try_fold(Tensor::zeros((), weak[0].dtype(), weak[0].device())?, |sum, &t| Ok((sum + one(t)?)?))
    };
    let all = params.temperatures.as_slice();
    let weak_kl = of_kl(weak)?;
    let mut instance = sum(all, &|t| kl(&weak_kl, t))?;
    let relations = |t: f64| -> Result<[Tensor; 2]> {
        let p = |x: &Tensor| -> Result<Tensor> { softmax::log_softmax(&(x / t)?)?.exp().map_err(Into::into) };
        Ok([p(weak[0])?, p(weak[1])?])
    };
    let off = |a: Tensor, b: Tensor, n: usize| -> Result<Tensor> { Ok(((a - b)?.sqr()?.sum_all()? / n as f64)?) };
    let mut batch = sum(all, &|t| {
        let [p, q] = relations(t)?;
        off(p.matmul(&p.t()?)?, q.matmul(&q.t()?)?, b)
    })?;
    let mut class = sum(all, &|t| {
        let [p, q] = relations(t)?;
        off(p.t()?.contiguous()?.matmul(&p)?, q.t()?.contiguous()?.matmul(&q)?, k)
    })?;
    if params.variant == Variant::Released {
        let strong = strong.ok_or_else(|| Error::missing("mlld's released form", "a second, strong view"))?;
        let (rows, classes, teacher) = inputs::both_logits(strong[0], strong[1])?;
        if [rows, classes] != [b, k] {
            return Err(Error::shape("the strong view's logits", format!("[{b}, {k}], as the weak view's"), &[rows, classes]));
        }
        let strong_kl = of_kl([strong[0], &teacher])?;
        let (first, others) = all.split_at(params.strong_count);
        let (f, g) = shares(weak[1])?;
        instance = (((instance * f)? + sum(first, &|t| kl(&strong_kl, t))?)? + sum(others, &|t| kl(&weak_kl, t))?)?;
        (batch, class) = ((batch * f)?, (class * g)?);
    }
    Ok(LossTerms::new().with("instance", instance, params.instance_weight).with("batch", batch, params.batch_weight).with(
        "class",
        class,
        params.class_weight,
    ))
}

/// The share of samples of at most median confidence, and of classes of at most median mass.
fn shares(teacher: &Tensor) -> Result<(f64, f64)> {
    let p = softmax::log_softmax(&teacher.detach().to_dtype(DType::F64)?)?.exp()?;
    let confidence = p.max(1)?.to_vec1::<f64>()?;
    let mass = p.sum(0)?.to_vec1::<f64>()?;
    Ok((share(&confidence), share(&mass)))
}

fn share(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    let median = f64::midpoint(sorted[(n - 1) / 2], sorted[n / 2]);
    values.iter().filter(|&&v| v <= median).count() as f64 / n as f64
}

struct Mlld {
    params: Params,
    standardize: Option<logit_standardization::Params>,
}

impl Method for Mlld {
    fn name(&self) -> &'static str {
        if self.standardize.is_some() { logit_standardization::ENTRY.name } else { ENTRY.name }
    }

    fn needs(&self) -> Needs {
        Needs { views: if self.params.variant == Variant::Released { 2 } else { 1 }, ..Needs::logits() }
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        fn view<'a>(student: &'a Outputs, teacher: &'a Outputs) -> Result<View<'a>> {
            Ok([student.logits()?, teacher.logits()?])
        }
        let strong = step.student.get(1).zip(step.teachers.first().and_then(|views| views.get(1)));
        let strong = strong.map(|(s, t)| view(s, t)).transpose()?;
        with(view(step.student()?, step.teacher()?)?, strong, &self.params, self.standardize.as_ref())
    }
}

/// The method, its divergences standardised if a wrapper asks for it.
pub(crate) fn build(params: &Value, standardize: Option<logit_standardization::Params>) -> Result<Box<dyn Method>> {
    Ok(Box::new(Mlld { params: parse(params, Params::validate)?, standardize }))
}

/// The parity function, likewise.
pub(crate) fn parity_of(
    inputs: &ParityInputs,
    params: &Value,
    standardize: Option<&logit_standardization::Params>,
) -> Result<ParityOutput> {
    let params: Params = parse(params, Params::validate)?;
    let weak = [inputs.get("student.logits")?, inputs.get("teacher.logits")?];
    let strong = match params.variant {
        Variant::Released => Some([inputs.get("student.strong.logits")?, inputs.get("teacher.strong.logits")?]),
        Variant::Paper => None,
    };
    Ok(with(weak, strong, &params, standardize)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "mlld",
    about: "multi-level logit distillation: samples, batch and classes at several temperatures, on two views",
    source: "Jin et al., CVPR 2023",
    year: 2023,
    parameters: &[
        ParamDoc {
            name: "variant",
            default: "\"released\"",
            range: "\"released\" | \"paper\"",
            about: "two views and the code's shares, or one view",
        },
        ParamDoc { name: "temperatures", default: "[4.0, 3.0, 5.0, 2.0, 6.0]", range: "> 0", about: "temperatures" },
        ParamDoc { name: "strong_count", default: "3", range: "0.. their number", about: "how many of them the strong view takes" },
        ParamDoc { name: "instance_weight", default: "1.0", range: ">= 0", about: "weight of the samples' divergences" },
        ParamDoc { name: "batch_weight", default: "1.0", range: ">= 0", about: "weight of the batch's relations" },
        ParamDoc { name: "class_weight", default: "1.0", range: ">= 0", about: "weight of the classes' relations" },
    ],
    build: |params| build(params, None),
    parity: |inputs| parity_of(inputs, &inputs.params, None),
    raw_terms: true,
};
