//! `cc`: correlation congruence, products of differing samples.
//!
//! Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019, arXiv 1904.01802.
//!
//! ```text
//! f = W e + b                                                                   of both sides, both trained
//! variant = "released":      D = |f_s - f_t|,  cc = mean_{b < B-1} sum_d D[b,d] D[b+1,d]
//! variant = "gaussian_rbf":  k_ij = e^{-2g} sum_{p <= P} (2g)^p / p! (f_i . f_j)^p,  cc = |k_s - k_t|^2 / B^2
//! value = cc
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `e_s`, `e_t` | embeddings of student and teacher (detached) | `[B,D_s]`, `[B,D_t]` |
//! | `W`, `b` | `embed_s` and `embed_t`, linear layers of the method's own | `[dim,D]`, `[dim]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `variant` | `"released"` | `"released"`, `"gaussian_rbf"` | RepDistiller's code, or the paper's kernel |
//! | `dim` | 128 | >= 1 | width of the heads |
//! | `kernel_gamma` | 0.4 | > 0 | g |
//! | `taylor_order` | 2 | >= 0 | P |
//! | `normalize` | false | | unit `f`, which the expansion of the Gaussian kernel assumes |
//!
//! Term: `cc`. Recipe: `ce` of weight 1 beside this of weight 0.02, for every pair.
//!
//! The released form depends on the order of the batch: only neighbours meet. Since the teacher's head is trained, both heads may shrink to 0
//! together. torchdistill divides the Frobenius norm, not its square, by B^2. Cost: two linear layers and O(B dim) or O(B^2 dim). A batch of one
//! sample has no neighbours: `released` gives 0 without a gradient (the release NaN), and `batch_size = 1` is refused.

use std::sync::Arc;

use candle_core::Tensor;
use kd_core::{Error, LossTerms, Method, MethodEntry, Model, Needs, ParamDoc, ParityInputs, ParityOutput, Result, Setup, StepView};
use serde::{Deserialize, Serialize};

use crate::heads::{self, Heads};
use crate::norms::unit;
use crate::registry::parse;
use crate::{inputs, pkt};

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// Products of neighbouring samples' differences.
    Released,
    /// The expanded Gaussian kernel of all pairs.
    GaussianRbf,
}

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// What is compared.
    pub variant: Variant,
    /// Width of the heads, at least 1.
    pub dim: usize,
    /// Gamma of the kernel, above 0.
    pub kernel_gamma: f64,
    /// Highest power of its expansion.
    pub taylor_order: usize,
    /// Whether the heads' outputs are brought to length 1 first.
    pub normalize: bool,
}

impl Default for Params {
    fn default() -> Self {
        Self { variant: Variant::Released, dim: 128, kernel_gamma: 0.4, taylor_order: 2, normalize: false }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::at_least_one("dim", self.dim)?;
        inputs::positive("kernel_gamma", self.kernel_gamma)
    }
}

/// CC on the heads' outputs `[B,dim]` of `student` and `teacher`; both have gradients. `dim` is not used.
///
/// # Errors
/// Outputs that are not finite, have no row or differ in shape; parameters out of range.
pub fn cc(student: &Tensor, teacher: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (b, d) = inputs::embedding("the student's head", student)?;
    inputs::embedding("the teacher's head", teacher)?;
    if teacher.dims() != [b, d] {
        return Err(Error::shape("the teacher's head", format!("[{b}, {d}], as the student's"), teacher.dims()));
    }
    let value = match params.variant {
        Variant::Released if b == 1 => Tensor::zeros((), student.dtype(), student.device())?,
        Variant::Released => {
            let off = (student - teacher)?;
            let off = (&off * off.detach().sign()?)?;
            let products = (off.narrow(0, 0, b - 1)? * off.narrow(0, 1, b - 1)?)?;
            (products.sum_all()? / (b - 1) as f64)?
        }
        Variant::GaussianRbf => {
            let off = (kernel(student, params)? - kernel(teacher, params)?)?;
            off.sqr()?.mean_all()?
        }
    };
    Ok(LossTerms::one("cc", value))
}

/// `[B,B]`, by Horner's rule.
fn kernel(f: &Tensor, params: &Params) -> Result<Tensor> {
    let f = if params.normalize { unit(f, 1e-12)? } else { f.clone() };
    let scaled = (f.matmul(&f.t()?)? * (2.0 * params.kernel_gamma))?;
    let mut sum = scaled.ones_like()?;
    for p in (1..=params.taylor_order).rev() {
        sum = (((sum * &scaled)? / p as f64)? + 1.0)?;
    }
    Ok((sum * (-2.0 * params.kernel_gamma).exp())?)
}

struct Cc {
    params: Params,
    heads: Option<Heads>,
}

impl Method for Cc {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        pkt::embeddings()
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        inputs::pairs(ENTRY.name, setup)?;
        self.heads = Some(Heads::new(setup, self.params.dim, ENTRY.name)?);
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        self.heads.iter().flat_map(Heads::networks).collect()
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let heads = self.heads.as_ref().ok_or_else(|| Error::missing(ENTRY.name, "its heads (`prepare` builds them)"))?;
        let [student, teacher] = heads.apply(step)?;
        cc(&student, &teacher, &self.params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let [student, teacher] = heads::parity(inputs)?;
    Ok(cc(&student, &teacher, &inputs.params()?)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "cc",
    about: "correlation congruence: products of differing samples",
    source: "Peng et al., ICCV 2019, arXiv 1904.01802; RepDistiller",
    year: 2019,
    parameters: &[
        ParamDoc {
            name: "variant",
            default: "\"released\"",
            range: "\"released\" | \"gaussian_rbf\"",
            about: "neighbours' products, or the paper's kernel",
        },
        ParamDoc { name: "dim", default: "128", range: ">= 1", about: "width of the linear heads" },
        ParamDoc { name: "kernel_gamma", default: "0.4", range: "> 0", about: "gamma of the kernel" },
        ParamDoc { name: "taylor_order", default: "2", range: ">= 0", about: "highest power of the kernel's expansion" },
        ParamDoc { name: "normalize", default: "false", range: "true | false", about: "unit vectors in the kernel" },
    ],
    build: |params| Ok(Box::new(Cc { params: parse(params, Params::validate)?, heads: None })),
    parity,
    raw_terms: true,
};
