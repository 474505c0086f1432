//! `nst`: neuron selectivity transfer, the channels' activation patterns as samples of one distribution.
//!
//! Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017, arXiv 1707.01219.
//!
//! ```text
//! f^_c  = the map of channel c, flattened and divided by max(its length, 1e-12);   k(a, b) = (a . b)^2
//! value = sum_i [ mean k(T^, T^) + mean k(S^, S^) - 2 mean k(S^, T^) ],   means over samples and pairs of channels
//! ```
//!
//! The squared maximum mean discrepancy with the polynomial kernel of degree 2; 0 or more.
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `S_i`, `T_i` | outputs of stage i; the one with more rows is average-pooled to the other's grid | `[B,C,H,W]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `stages` | null | ascending | null: from stage 1 on, until one network has no more |
//!
//! Terms: `stage.<i>`. Weight in the published CIFAR-100 tables: 50, beside `ce` 1, for every pair. No adapter, no state.
//!
//! Cost `O(B C^2 H W)` or, on grids with fewer positions than channels, `O(B C (H W)^2)`: with kdsvd the dearest of the losses without
//! adapters. Memory `B C^2` (or `B (H W)^2`) by batched matrix products; the released code's broadcast holds `B C_s C_t H W` numbers, a
//! gigabyte at 256 channels, 8x8 and a batch of 64. Where positions are fewer, sums over pairs of channels are taken as sums over pairs of
//! positions: `sum_cd (f_c . g_d)^2 = sum_xy (sum_c f_cx f_cy)(sum_d g_dx g_dy)`. The teacher's own term is a constant, yet part of the
//! value. A channel without activation stays zero.

use candle_core::Tensor;
use kd_core::{LossTerms, MethodEntry, ParityInputs, ParityOutput, Result};
use kd_nn::ops;
use serde::{Deserialize, Serialize};

use crate::features::{Choice, Plain, StagePair, Stages, stages_doc};
use crate::registry::parse;

/// Parameters; see the [module](self).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// The stages to compare; none: from stage 1 on.
    pub stages: Option<Vec<usize>>,
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        self.choice().validate()
    }

    fn choice(&self) -> Choice {
        Choice::outputs(&self.stages, Stages::Bodies)
    }
}

/// Neuron selectivity transfer over `pairs`; the teacher's maps are detached.
///
/// # Errors
/// Maps that are not `[B,C,H,W]`, differ in their batch, or in width but not in height; parameters out of range.
pub fn nst(pairs: &[StagePair<'_>], params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let mut terms = LossTerms::new();
    for pair in pairs {
        let (s, t) = pair.matched()?;
        let unit = |f: &Tensor| ops::l2_normalize(&f.flatten_from(2)?.contiguous()?, 2, 1e-12);
        terms = terms.with(&pair.name(), discrepancy(&unit(&s)?, &unit(&t)?)?, 1.0);
    }
    Ok(terms)
}

/// Of rows of length 1, `[B,C,N]`.
fn discrepancy(s: &Tensor, t: &Tensor) -> Result<Tensor> {
    let (b, cs, n) = s.dims3()?;
    let ct = t.dim(1)?;
    if n <= cs.max(ct) {
        let second = |f: &Tensor, c: usize| f.t()?.matmul(f)? / c as f64;
        return Ok(((second(s, cs)? - second(t, ct)?)?.sqr()?.sum_all()? / b as f64)?);
    }
    let mean = |f: &Tensor, g: &Tensor| f.matmul(&g.t()?)?.sqr()?.mean_all();
    Ok(((mean(t, t)? + mean(s, s)?)? - (mean(s, t)? * 2.0)?)?)
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let params: Params = inputs.params()?;
    Ok(nst(&params.choice().parity(inputs)?, &params)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "nst",
    about: "neuron selectivity transfer: maximum mean discrepancy of the channels' maps",
    source: "Huang and Wang 2017, arXiv 1707.01219",
    year: 2017,
    parameters: &[stages_doc("what is compared; null: from stage 1 on")],
    build: |params| {
        let params = parse(params, Params::validate)?;
        Ok(Box::new(Plain::new("nst", params.choice(), move |pairs: &[StagePair<'_>]| nst(pairs, &params))))
    },
    parity,
    raw_terms: true,
};
