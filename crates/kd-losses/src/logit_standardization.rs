//! `logit_standardization`: any loss of logits on logits of mean 0 and deviation 1.
//!
//! Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv 2403.01427.
//!
//! ```text
//! z~ = (z - mean_k z) / (std_k z + eps),   std with 1 / (K - ddof)
//! value = base(z~, v~) at temperature T
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `z` | student logits | `[B,K]` |
//! | `v` | teacher logits, detached | `[B,K]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `base` | `"kd"` | a method of logits of both sides | its name, or a table with `method` and its own parameters |
//! | `temperature` | 2 | > 0 | the base's `temperature` (`mlld`: its first), unless its table has one |
//! | `ddof` | 1 | 0, 1 | 1: the released code; 0: the paper's formula, a factor sqrt((K-1)/K) |
//! | `eps` | 1e-7 | > 0 | added to the deviation |
//!
//! ```toml
//! [[loss]]
//! method = "logit_standardization"
//! base = { method = "dkd", alpha = 9.0, beta = 72.0 }
//! ```
//!
//! Terms and further needs: the base's. Of [`mlld`](mod@crate::mlld) the KL part alone is standardised, in [`ctkd`](mod@crate::ctkd) before the
//! division by the learnt temperature; both as released. `ce` beside it sees the raw logits. The authors' settings (T, weight):
//!
//! | base | weight of `ce` | most pairs | exceptions |
//! |---|---|---|---|
//! | `kd` | 0.1 | 2, 9 | vgg13-vgg8 3, 9; res110-res20 4, 12; res32x4-wrn16_2, res32x4-wrn40_2, vgg13-mobileV2, wrn40_2-mobileV2 3, 9; res50-mobileV2 3, 1 |
//! | `dkd` (alpha and beta times the weight) | 1 | 2, 9 to 18 | res56-res20 3, 18 |
//! | `mlld` | 0.1 | 2, 9 | vgg13-vgg8, vgg13-mobileV2, res32x4-shuffleV2 2, 6 |
//!
//! The published accuracies are of the best epoch (one log: best 76.66, last 76.28). In the authors' fork of CTKD the flag is inverted: its
//! command line with `--logit_stand` trains without standardisation. A row of equal logits has z~ = 0 and a gradient of 1/eps, as in the
//! release; with two classes z~ is +-1/sqrt(2) and the gradient vanishes. Shift and scale drop out, so the cost and the numbers are the base's.

use std::sync::Arc;

use candle_core::{Tensor, Var};
use kd_core::{
    Cut, Error, LossTerms, Method, MethodEntry, Model, Needs, Outputs, ParamDoc, ParityInputs, ParityOutput, Result, Setup, StateDict,
    StepView,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::norms::length;
use crate::{inputs, mlld, registry};

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// The loss on standardised logits: a method's name, or a table with `method` and its parameters.
    pub base: Value,
    /// The base's temperature, above 0.
    pub temperature: f64,
    /// Subtracted from the number of classes in the deviation, 0 or 1.
    pub ddof: usize,
    /// Added to the deviation, above 0.
    pub eps: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { base: Value::from("kd"), temperature: 2.0, ddof: 1, eps: 1e-7 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range. The base is checked when it is built.
    pub fn validate(&self) -> Result<()> {
        inputs::positive("temperature", self.temperature)?;
        inputs::positive("eps", self.eps)?;
        if self.ddof <= 1 { Ok(()) } else { Err(Error::param("ddof", self.ddof, "0 or 1")) }
    }

    /// The base's line of the registry and its parameters.
    fn base(&self) -> Result<(&'static MethodEntry, Value)> {
        let wrong = || Error::param("base", &self.base, "a method's name, or a table with `method` and its parameters");
        let (name, mut params) = match &self.base {
            Value::String(name) => (name.clone(), Map::new()),
            Value::Object(table) => {
                let mut table = table.clone();
                let name = table.remove("method").ok_or_else(wrong)?;
                (name.as_str().ok_or_else(wrong)?.to_string(), table)
            }
            _ => return Err(wrong()),
        };
        let entry = registry::find(&name).map_err(|e| Error::refused(format!("base: {e}")))?;
        if let Some(key) = params.keys().find(|key| entry.parameters.iter().all(|p| p.name != *key)) {
            let known: Vec<String> = entry.parameters.iter().map(|p| format!("`{}`", p.name)).collect();
            return Err(Error::refused(format!("base: `{key}` is no parameter of {name}, which has {}", known.join(", "))));
        }
        if entry.parameters.iter().any(|p| p.name == "temperature") {
            params.entry("temperature").or_insert(self.temperature.into());
        } else if entry.name == mlld::ENTRY.name && !params.contains_key("temperatures") {
            let mut temperatures = mlld::Params::default().temperatures;
            temperatures[0] = self.temperature;
            params.insert("temperatures".to_string(), temperatures.into());
        }
        Ok((entry, Value::Object(params)))
    }
}

/// Every row of `z` `[B,K]` with mean 0 and deviation 1 (before `eps`).
///
/// # Errors
/// Logits that are not finite, have no row or fewer than two classes.
pub fn standardized(z: &Tensor, params: &Params) -> Result<Tensor> {
    let (_, k) = inputs::logits("logits", z)?;
    let centred = z.broadcast_sub(&z.mean_keepdim(1)?)?;
    let std = (length(&centred)? / ((k - params.ddof) as f64).sqrt())?;
    Ok(centred.broadcast_div(&(std + params.eps)?)?)
}

/// `loss` on the standardised logits of `student` and `teacher` `[B,K]`, the latter detached.
///
/// # Errors
/// Those of [`standardized`] and of `loss`; parameters out of range.
pub fn logit_standardization(
    student: &Tensor,
    teacher: &Tensor,
    params: &Params,
    loss: impl FnOnce(&Tensor, &Tensor) -> Result<LossTerms>,
) -> Result<LossTerms> {
    params.validate()?;
    loss(&standardized(student, params)?, &standardized(&teacher.detach(), params)?)
}

struct LogitStandardization {
    params: Params,
    base: Box<dyn Method>,
}

fn build(params: &Value) -> Result<Box<dyn Method>> {
    let params: Params = registry::parse(params, Params::validate)?;
    let (entry, own) = params.base()?;
    let in_base = |e: Error| match e {
        Error::Json(e) => Error::refused(format!("base {}: {e}", entry.name)),
        e => e,
    };
    if entry.name == mlld::ENTRY.name {
        return mlld::build(&own, Some(params)).map_err(in_base);
    }
    // Its own name first: a base that is this method would be built for ever.
    let base = if entry.name == ENTRY.name { None } else { Some((entry.build)(&own).map_err(in_base)?) };
    let of_logits =
        |n: &Needs| n.teacher == [Cut::Logits] && n.student == [Cut::Logits] && !(n.student_model || n.teacher_model || n.class_means);
    match base.filter(|base| of_logits(&base.needs())) {
        Some(base) => Ok(Box::new(LogitStandardization { params, base })),
        None => {
            Err(Error::param("base", entry.name, "a method that looks at the logits of both sides and at nothing else of the networks"))
        }
    }
}

impl LogitStandardization {
    fn standardized(&self, outputs: &[Outputs]) -> Result<Vec<Outputs>> {
        let one = |o: &Outputs| -> Result<Outputs> { Ok(Outputs::new([(Cut::Logits, standardized(o.logits()?, &self.params)?)])) };
        outputs.iter().map(one).collect()
    }
}

impl Method for LogitStandardization {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        self.base.needs()
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        self.base.prepare(setup)
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        self.base.networks()
    }

    fn vars(&self) -> Vec<(String, Var)> {
        self.base.vars()
    }

    fn idle(&self, epoch: usize) -> Vec<usize> {
        self.base.idle(epoch)
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let student = self.standardized(step.student)?;
        let teachers = step.teachers.iter().map(|views| self.standardized(views)).collect::<Result<Vec<_>>>()?;
        self.base.loss(&StepView { student: &student, teachers: &teachers, ..*step })
    }

    fn state(&self) -> Result<StateDict> {
        self.base.state()
    }

    fn load_state(&mut self, state: &StateDict) -> Result<()> {
        self.base.load_state(state)
    }
}

/// Parameters of a base that a parity call writes beside the wrapper's own, whichever the base is.
const FLAT: [&str; 3] = ["alpha", "beta", "gamma"];

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let mut params = inputs.params.clone();
    if let Some(table) = params.as_object_mut()
        && let Some(Value::String(name)) = table.get("base").cloned()
    {
        let entry = registry::find(&name)?;
        let mut base = Map::from_iter([("method".to_string(), Value::from(name))]);
        for key in FLAT {
            if let Some(value) = table.remove(key)
                && entry.parameters.iter().any(|p| p.name == key)
            {
                base.insert(key.to_string(), value);
            }
        }
        table.insert("base".to_string(), Value::Object(base));
    }
    let params: Params = registry::parse(&params, Params::validate)?;
    let (entry, own) = params.base()?;
    if entry.name == mlld::ENTRY.name {
        return mlld::parity_of(inputs, &own, Some(&params));
    }
    let mut tensors = inputs.tensors.clone();
    for (name, tensor) in &mut tensors {
        if matches!(name.as_str(), "student.logits" | "teacher.logits") {
            *tensor = standardized(tensor, &params)?;
        }
    }
    (entry.parity)(&ParityInputs { tensors, params: own, dtype: inputs.dtype })
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "logit_standardization",
    about: "wrapper: any loss of logits on logits of mean 0 and deviation 1",
    source: "Sun et al., CVPR 2024, arXiv 2403.01427",
    year: 2024,
    parameters: &[
        ParamDoc {
            name: "base",
            default: "\"kd\"",
            range: "a method's name, or { method = NAME, its parameters }",
            about: "the loss on standardised logits",
        },
        ParamDoc { name: "temperature", default: "2.0", range: "> 0", about: "the base's temperature" },
        ParamDoc { name: "ddof", default: "1", range: "0 | 1", about: "1: sample deviation (released), 0: the population's (paper)" },
        ParamDoc { name: "eps", default: "1e-7", range: "> 0", about: "added to the deviation" },
    ],
    build,
    parity,
    raw_terms: true,
};
