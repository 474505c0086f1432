//! `at`: attention transfer, where each network looks.
//!
//! Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv 1612.03928.
//!
//! ```text
//! Q(F)     = N(flatten(mean_c F^p)),   N(x) = x / max(|x|, eps) of each sample
//! released = sum_i mean over samples and positions of (Q(S_i) - Q(T_i))^2
//! paper    = sum_i mean_b |Q(S_i)_b - Q(T_i)_b|
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `S_i`, `T_i` | outputs of stage i; the one with more rows is average-pooled to the other's grid, before the power | `[B,C,H,W]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `variant` | `"released"` | `"released"`, `"paper"` | squared differences by elements, or distances by samples |
//! | `p` | 2 | even, 2..=16 | |
//! | `stages` | null | ascending | null: from stage 1 on, until one network has no more |
//! | `eps` | 1e-12 | > 0 | a map at or below this length stays as small as it is |
//!
//! Terms: `stage.<i>`. Weight in the published CIFAR-100 tables: 1000 (`released`), beside `ce` 1, for every pair; ImageNet R34-R18: 1000 on
//! stages 3 and 4. No adapter, no state. Cost `O(B C H W)`, negligible; memory one map of the smaller grid a stage.
//!
//! The paper takes the absolute value before the power, which an even power does not need. A teacher's map of zeros stays zero. Networks of
//! different families compare stages of the same number, whatever their depth, as the released code does.

use candle_core::Tensor;
use kd_core::{Error, LossTerms, MethodEntry, ParamDoc, ParityInputs, ParityOutput, Result};
use kd_nn::ops;
use serde::{Deserialize, Serialize};

use crate::features::{Choice, Plain, StagePair, Stages, stages_doc};
use crate::inputs;
use crate::norms::row_norm;
use crate::registry::parse;

/// Which form of the loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// Mean of squared differences.
    Released,
    /// Mean of the samples' distances.
    Paper,
}

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Which form of the loss.
    pub variant: Variant,
    /// The power, even, in 2..=16.
    pub p: usize,
    /// The stages to compare; none: from stage 1 on.
    pub stages: Option<Vec<usize>>,
    /// The least length that a map is divided by, above 0.
    pub eps: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { variant: Variant::Released, p: 2, stages: None, eps: 1e-12 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        if self.p % 2 == 1 || !(2..=16).contains(&self.p) {
            return Err(Error::param("p", self.p, "even, in 2..=16"));
        }
        inputs::positive("eps", self.eps)?;
        self.choice().validate()
    }

    fn choice(&self) -> Choice {
        Choice::outputs(&self.stages, Stages::Bodies)
    }
}

/// Attention transfer over `pairs`; the teacher's maps are detached.
///
/// # Errors
/// Maps that are not `[B,C,H,W]`, differ in their batch, or in width but not in height; parameters out of range.
pub fn at(pairs: &[StagePair<'_>], params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let mut terms = LossTerms::new();
    for pair in pairs {
        let (s, t) = pair.matched()?;
        let gap = (attention(&s, params)? - attention(&t, params)?)?;
        let value = match params.variant {
            Variant::Released => gap.sqr()?.mean_all()?,
            Variant::Paper => row_norm(&gap, 0.0)?.mean_all()?,
        };
        terms = terms.with(&pair.name(), value, 1.0);
    }
    Ok(terms)
}

/// `Q(F)`, `[B,HW]`.
fn attention(f: &Tensor, params: &Params) -> Result<Tensor> {
    let square = f.flatten_from(2)?.sqr()?;
    let mut power = square.clone();
    for _ in 1..params.p / 2 {
        power = (power * &square)?;
    }
    Ok(ops::l2_normalize(&channel_mean(&power)?, 1, params.eps)?)
}

/// Mean over the channels of `[B,C,N]`, as `[B,N]`: a matrix product, which candle sums faster than an inner axis.
pub(crate) fn channel_mean(x: &Tensor) -> Result<Tensor> {
    let (b, c, n) = x.dims3()?;
    let row = Tensor::full(1.0 / c as f64, (b, 1, c), x.device())?.to_dtype(x.dtype())?;
    Ok(row.matmul(&x.contiguous()?)?.reshape((b, n))?)
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let params: Params = inputs.params()?;
    Ok(at(&params.choice().parity(inputs)?, &params)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "at",
    about: "attention transfer: normalised maps of the channels' mean power",
    source: "Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928",
    year: 2017,
    parameters: &[
        ParamDoc {
            name: "variant",
            default: "\"released\"",
            range: "\"released\" | \"paper\"",
            about: "squared by elements, or distances",
        },
        ParamDoc { name: "p", default: "2", range: "even, 2..=16", about: "the power" },
        stages_doc("what is compared; null: from stage 1 on"),
        ParamDoc { name: "eps", default: "1e-12", range: "> 0", about: "least length that a map is divided by" },
    ],
    build: |params| {
        let params = parse(params, Params::validate)?;
        Ok(Box::new(Plain::new("at", params.choice(), move |pairs: &[StagePair<'_>]| at(pairs, &params))))
    },
    parity,
    raw_terms: true,
};
