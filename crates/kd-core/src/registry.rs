//! What a method says about itself, and the driver that evaluates one on named tensors.
//!
//! A crate of methods exports a slice of [`MethodEntry`]; listings, configs, the `loss` command and the golden tests iterate over it.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use serde::Serialize;
use serde_json::Value;

use crate::{Error, LossTerms, Method, Result, StateDict};

/// One parameter of a method, as the listings show it.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ParamDoc {
    /// Its key in a config.
    pub name: &'static str,
    /// Its default, as JSON; empty for a parameter that must be given.
    pub default: &'static str,
    /// The values it may take.
    pub range: &'static str,
    /// What it does.
    pub about: &'static str,
}

/// A method's line in the registry.
#[derive(Clone, Copy)]
pub struct MethodEntry {
    /// Its name in a config.
    pub name: &'static str,
    /// One sentence.
    pub about: &'static str,
    /// Paper, venue, equation.
    pub source: &'static str,
    /// Year of publication.
    pub year: u16,
    /// Its parameters with defaults.
    pub parameters: &'static [ParamDoc],
    /// Makes it from its parameters (a JSON object; unknown keys are refused).
    pub build: fn(&Value) -> Result<Box<dyn Method>>,
    /// Its mathematics on named tensors: the parity function.
    pub parity: fn(&ParityInputs) -> Result<ParityOutput>,
    /// Whether fixtures and the `loss` command store terms unweighted.
    pub raw_terms: bool,
}

/// What a method costs beside the two networks' own passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cost {
    /// A few operations on `[B,K]` or `[B,D]`.
    Negligible,
    /// Products of a batch with itself or of classes with classes, `O(B^2 D)` or `O(B K^2)`.
    Pairs,
    /// `O(B^3 D)`: angles over triples of samples.
    Triples,
    /// Small layers behind the student.
    SmallAdapters,
    /// Layers at the teacher's width on full maps.
    WideAdapters,
    /// Products of channels with channels, or singular vectors, of every map.
    ChannelGrams,
    /// Scores against a memory of the whole training set, which it holds.
    MemoryBank,
    /// Further views of every sample through both networks.
    MoreViews,
    /// Parts of the networks run again.
    MorePasses,
}

impl Cost {
    /// In words.
    pub fn about(self) -> &'static str {
        match self {
            Self::Negligible => "negligible",
            Self::Pairs => "pairs of samples or classes",
            Self::Triples => "triples of samples",
            Self::SmallAdapters => "small adapters",
            Self::WideAdapters => "adapters at the teacher's width",
            Self::ChannelGrams => "channel products or SVD",
            Self::MemoryBank => "memory bank",
            Self::MoreViews => "two views through both networks",
            Self::MorePasses => "parts of the networks again",
        }
    }
}

/// How a method's mathematics was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// Value, terms, gradients and state against PyTorch in double precision.
    Fixtures,
    /// The PyTorch implementation behind the fixtures agrees with the authors' or the benchmark's released code.
    Released,
    /// Written after reading the released code, which was not run.
    Read,
    /// Value and gradients against an independent double-precision implementation in this repository.
    Independent,
}

impl Check {
    /// In words.
    pub fn about(self) -> &'static str {
        match self {
            Self::Fixtures => "PyTorch fixtures",
            Self::Released => "released code run",
            Self::Read => "released code read",
            Self::Independent => "independent f64 test",
        }
    }
}

/// What stands beside a [`MethodEntry`] in the documentation.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct MethodNotes {
    /// The method's name.
    pub name: &'static str,
    /// Its cost class.
    pub cost: Cost,
    /// How it was checked.
    pub checks: &'static [Check],
}

/// Named tensors and parameters of a parity call. Every float tensor that is differentiated is a `Var` inside.
pub struct ParityInputs {
    /// By fixture name.
    pub tensors: BTreeMap<String, Tensor>,
    /// The parameters, fixture-only ones included.
    pub params: Value,
    /// f32 or f64.
    pub dtype: DType,
}

impl ParityInputs {
    /// The tensor `name`.
    ///
    /// # Errors
    /// When the file does not hold it.
    pub fn get(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| Error::missing("this method", name))
    }

    /// The tensor `name`, if the file holds it.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// The parameters as a method's own type.
    pub fn params<P: serde::de::DeserializeOwned>(&self) -> Result<P> {
        Ok(serde_json::from_value(self.params.clone())?)
    }
}

/// What a parity function returns.
#[derive(Default)]
pub struct ParityOutput {
    /// The terms; empty for an optimiser.
    pub terms: LossTerms,
    /// The state after the call.
    pub state: StateDict,
}

impl From<LossTerms> for ParityOutput {
    fn from(terms: LossTerms) -> Self {
        Self { terms, state: StateDict::new() }
    }
}

/// Evaluates a method on named tensors.
///
/// Float inputs are converted to `dtype`. Returns `value`, `term.<name>`, `grad.<input>` for every float input except `teacher.*`, `targets`,
/// `class_means`, `state_in.*` and `mask` (zeros where the loss does not depend on it), and `state.<name>`.
///
/// # Errors
/// Inputs that are not finite, and whatever the method refuses.
pub fn evaluate(entry: &MethodEntry, tensors: &BTreeMap<String, Tensor>, params: &Value, dtype: DType) -> Result<BTreeMap<String, Tensor>> {
    let mut leaves = Vec::new();
    let mut inputs = BTreeMap::new();
    for (name, tensor) in tensors {
        let tensor = tensor.to_device(&Device::Cpu)?;
        if !tensor.dtype().is_float() {
            if ["student.", "teacher.", "stone.", "param."].iter().any(|p| name.starts_with(p)) {
                return Err(Error::refused(format!("`{name}` holds {} numbers, must be f32 or f64", tensor.dtype().as_str())));
            }
            inputs.insert(name.clone(), tensor);
            continue;
        }
        check_finite(name, &tensor)?;
        let tensor = tensor.to_dtype(dtype)?;
        if constant(name) {
            inputs.insert(name.clone(), tensor);
        } else {
            let var = Var::from_tensor(&tensor)?;
            inputs.insert(name.clone(), var.as_tensor().clone());
            leaves.push((name.clone(), var));
        }
    }
    let out = (entry.parity)(&ParityInputs { tensors: inputs, params: params.clone(), dtype })?;
    let mut found = BTreeMap::new();
    if !out.terms.terms.is_empty() {
        let total = out.terms.total()?;
        let grads = total.backward()?;
        for (name, var) in leaves {
            let grad = match grads.get(&var) {
                Some(g) => g.contiguous()?,
                None => var.zeros_like()?,
            };
            found.insert(format!("grad.{name}"), grad);
        }
        for term in &out.terms.terms {
            let weight = if entry.raw_terms { 1.0 } else { term.weight };
            found.insert(format!("term.{}", term.name), (term.raw.detach() * weight)?);
        }
        found.insert("value".to_string(), total.detach());
    }
    for (name, tensor) in out.state {
        found.insert(format!("state.{name}"), tensor.detach().contiguous()?);
    }
    Ok(found)
}

/// Inputs that no gradient is asked for.
fn constant(name: &str) -> bool {
    name.starts_with("teacher.") || name.starts_with("state_in.") || matches!(name, "targets" | "class_means" | "mask")
}

/// Refuses NaN and infinity.
pub fn check_finite(what: &str, tensor: &Tensor) -> Result<()> {
    let values = tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    match values.iter().position(|v| !v.is_finite()) {
        Some(index) => Err(Error::NonFinite { what: what.to_string(), value: values[index], index }),
        None => Ok(()),
    }
}
