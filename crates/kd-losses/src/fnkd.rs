//! `fnkd`: feature-normalised knowledge distillation; with an earlier copy of the student as teacher, self-KD-fn.
//!
//! Xu et al., "Feature Normalized Knowledge Distillation for Image Classification", ECCV 2020, equations 10 and 11.
//!
//! ```text
//! form = "paper":     value = lambda^2 mean_b H(softmax(tau v/|f_t|), softmax(tau z/|f_s|))
//!
//! form = "released":  g = min(|f|, tau) f / sqrt(|f|^2 + eps)
//!                     value = lambda^2 mean_b H(softmax(W_t g_t + b_t), softmax(W_s g_s + b_s))
//! ```
//!
//! The length of a sample's embedding takes the place of the common temperature: a long, sure feature is softened more.
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `z`, `v` | logits of student and teacher (paper form) | `[B,K]` |
//! | `f_s`, `f_t` | embeddings, of different widths if need be | `[B,D_s]`, `[B,D_t]` |
//! | `W`, `b` | each network's own classifier (released form); the student's is trained through both its uses | `[K,D]`, `[K]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `form` | `"paper"` | `"paper"`, `"released"` | |
//! | `tau` | 2 | > 0 | length that features are brought to; the authors' script: 2 |
//! | `lambda` | 3 | >= 0 | the loss is weighted by its square; the script: 3 |
//! | `detach_norm` | false | | whether the student's length is a constant for the gradient (paper form) |
//! | `eps` | 1e-12 | > 0 | paper: a feature of at most this length is a constant of this length; released: see the formula (the script: 1e-10) |
//!
//! Term: `soft`. Use with `ce` of weight 1; no labels of its own.
//!
//! Choosing both: to compare with KD at temperature T keep `lambda ~ T` and `tau ~ mean|f_t| / T`, the mean taken over the training set.
//!
//! Equation 11 lets the gradient run through the student's length, the paper's analysis (equations 12, 13) treats it as a constant: that is
//! `detach_norm`. The paper form scales a classifier's bias with the rest of the logits. In the released form it stays as it is, a feature
//! shorter than `tau` is not lengthened, and of one longer than `tau` only the direction receives a gradient. The teacher that was released
//! with the code was trained on CIFAR-100's 20 coarse classes; whether the published CIFAR-100 tables are of these is unknown.

use candle_core::Tensor;
use kd_core::{Cut, Error, LossTerms, Method, MethodEntry, Mode, Needs, ParamDoc, ParityInputs, ParityOutput, Result, StepView};
use serde::{Deserialize, Serialize};

use crate::inputs;
use crate::norms::row_norm;
use crate::registry::parse;
use crate::softmax::Softmax;

/// Which definition is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// Logits divided by the feature's length.
    Paper,
    /// Features clipped in length before the classifier.
    Released,
}

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Which definition is followed.
    pub form: Form,
    /// Length that features are brought to, above 0.
    pub tau: f64,
    /// Its square weighs the loss; at least 0.
    pub lambda: f64,
    /// Whether the student's length is a constant for the gradient (paper form).
    pub detach_norm: bool,
    /// Guard of the length, above 0.
    pub eps: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { form: Form::Paper, tau: 2.0, lambda: 3.0, detach_norm: false, eps: 1e-12 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::positive("tau", self.tau)?;
        inputs::not_negative("lambda", self.lambda)?;
        inputs::positive("eps", self.eps)
    }
}

/// One network's logits `[B,K]` and embedding `[B,D]`.
#[derive(Clone, Copy, Debug)]
pub struct Side<'a> {
    /// `[B,K]`.
    pub logits: &'a Tensor,
    /// `[B,D]`.
    pub embedding: &'a Tensor,
}

/// The paper's form; the teacher is detached. `form` is not looked at.
///
/// # Errors
/// Tensors that are not finite or have no row, logits of different shape, embeddings of another batch, parameters out of range.
pub fn fnkd(student: Side<'_>, teacher: Side<'_>, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (b, _, v) = inputs::both_logits(student.logits, teacher.logits)?;
    for (what, f) in [("student.embedding", student.embedding), ("teacher.embedding", teacher.embedding)] {
        if inputs::embedding(what, f)?.0 != b {
            return Err(Error::shape(what, format!("[{b}, D], a row for each row of the logits"), f.dims()));
        }
    }
    let f_t = inputs::constant(teacher.embedding, student.embedding)?;
    let f_s = if params.detach_norm { student.embedding.detach() } else { student.embedding.clone() };
    let scaled = |z: &Tensor, f: &Tensor| -> Result<Tensor> { Ok((z.broadcast_div(&row_norm(f, params.eps)?)? * params.tau)?) };
    soft(&scaled(student.logits, &f_s)?, &scaled(&v, &f_t)?, params)
}

/// The released form: `classify_*` apply each network's own classifier to features `[B,D]` clipped in length. `form` is not looked at.
///
/// # Errors
/// Embeddings that are not finite or have no row, logits of different shape, parameters out of range.
pub fn fnkd_released(
    student: &Tensor,
    teacher: &Tensor,
    classify_student: impl Fn(&Tensor) -> Result<Tensor>,
    classify_teacher: impl Fn(&Tensor) -> Result<Tensor>,
    params: &Params,
) -> Result<LossTerms> {
    params.validate()?;
    inputs::embedding("student.embedding", student)?;
    inputs::embedding("teacher.embedding", teacher)?;
    let z = classify_student(&clipped(student, params)?)?;
    let v = classify_teacher(&clipped(&teacher.detach(), params)?)?;
    let (_, _, v) = inputs::both_logits(&z, &v)?;
    soft(&z, &v, params)
}

/// `min(|f|, tau) f / sqrt(|f|^2 + eps)`.
fn clipped(f: &Tensor, params: &Params) -> Result<Tensor> {
    let norm = row_norm(f, 0.0)?;
    // A choice rather than a minimum, which would halve the gradient of a length equal to tau.
    let length = norm.detach().le(params.tau)?.where_cond(&norm, &(norm.zeros_like()? + params.tau)?)?;
    Ok(f.broadcast_mul(&(length / (norm.sqr()? + params.eps)?.sqrt()?)?)?)
}

fn soft(z: &Tensor, v: &Tensor, params: &Params) -> Result<LossTerms> {
    let value = Softmax::new(z)?.cross_entropy(Softmax::new(v)?.p())?.mean_all()?;
    Ok(LossTerms::new().with("soft", value, params.lambda * params.lambda))
}

struct Fnkd {
    params: Params,
}

impl Method for Fnkd {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        let released = self.params.form == Form::Released;
        let cuts = if released { vec![Cut::Embedding] } else { vec![Cut::Embedding, Cut::Logits] };
        Needs { student: cuts.clone(), teacher: cuts, student_model: released, teacher_model: released, ..Needs::default() }
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let (student, teacher) = (step.student()?, step.teacher()?);
        match self.params.form {
            Form::Paper => {
                let student = Side { logits: student.logits()?, embedding: student.embedding()? };
                let teacher = Side { logits: teacher.logits()?, embedding: teacher.embedding()? };
                fnkd(student, teacher, &self.params)
            }
            Form::Released => {
                let network = step.models.teachers.first().ok_or_else(|| Error::missing(ENTRY.name, "a teacher"))?;
                let classify = |model: &dyn kd_core::Model, g: &Tensor, mode| -> Result<Tensor> {
                    Ok(model.run(g, Cut::Embedding, &[Cut::Logits], mode)?.logits()?.clone())
                };
                fnkd_released(
                    student.embedding()?,
                    teacher.embedding()?,
                    |g| classify(step.models.student, g, Mode::Train(step.rng.named("classifier"))),
                    |g| classify(network.as_ref(), g, Mode::Eval),
                    &self.params,
                )
            }
        }
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let params: Params = inputs.params()?;
    let (student, teacher) = (inputs.get("student.embedding")?, inputs.get("teacher.embedding")?);
    let terms = match params.form {
        Form::Paper => fnkd(
            Side { logits: inputs.get("student.logits")?, embedding: student },
            Side { logits: inputs.get("teacher.logits")?, embedding: teacher },
            &params,
        ),
        Form::Released => {
            let classify = |side: &str, g: &Tensor| -> Result<Tensor> {
                let weight = inputs.get(&format!("{side}.classifier.weight"))?;
                let logits = g.matmul(&weight.t()?)?;
                match inputs.find(&format!("{side}.classifier.bias")) {
                    Some(bias) => Ok(logits.broadcast_add(bias)?),
                    None => Ok(logits),
                }
            };
            fnkd_released(student, teacher, |g| classify("student", g), |g| classify("teacher", g), &params)
        }
    };
    Ok(terms?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "fnkd",
    about: "feature-normalised distillation: each sample's feature length as its temperature",
    source: "Xu et al., ECCV 2020, eq. 10-11",
    year: 2020,
    parameters: &[
        ParamDoc {
            name: "form",
            default: "\"paper\"",
            range: "\"paper\" | \"released\"",
            about: "normalised logits, or features clipped in length",
        },
        ParamDoc { name: "tau", default: "2.0", range: "> 0", about: "length that features are brought to" },
        ParamDoc { name: "lambda", default: "3.0", range: ">= 0", about: "its square weighs the loss" },
        ParamDoc { name: "detach_norm", default: "false", range: "true | false", about: "no gradient through the student's length" },
        ParamDoc { name: "eps", default: "1e-12", range: "> 0", about: "guard of the length" },
    ],
    build: |params| Ok(Box::new(Fnkd { params: parse(params, Params::validate)? })),
    parity,
    raw_terms: false,
};
