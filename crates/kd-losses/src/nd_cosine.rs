//! `nd_cosine`: direction alone, an ablation of KD++.
//!
//! Wang et al., "Improving Knowledge Distillation via Regularizing Feature Norm and Direction", ECCV 2024, arXiv 2305.17007.
//!
//! ```text
//! value = mean_b [ 1 - cos(f_s, c_y) ]
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `f_s` | student embedding (behind the adapter, if there is one) | `[B,D]` |
//! | `c` | class means of the teacher's embedding ([`ClassMeans`]) | `[K,D]` |
//! | `y` | labels; of soft targets the means are mixed | `[B]` integers, or `[B,K]` probabilities |
//!
//! Parameters: those of [`nd`](mod@crate::nd). Term: `direction`. A feature of no length counts 1 without a gradient. The teacher gives the
//! class means once and is not run in training.

use std::sync::Arc;

use candle_core::Tensor;
use kd_core::{Cut, LossTerms, Method, MethodEntry, Model, Needs, ParityInputs, ParityOutput, Result, Setup, StepView};

use crate::class_means::ClassMeans;
use crate::labels::{self, Labels};
use crate::nd::{ADAPTER, BN_EPS, DROPOUT, EPS, Prepared};
use crate::norms::unit;
use crate::registry::{parity_labels, parse};
use crate::{adapter, inputs};

pub use crate::nd::Params;

/// One minus the cosine between `student` `[B,D]` (adapted already) and its class mean; `labels` are class indices `[B]` or class
/// probabilities `[B,K]`. Of the parameters it uses `eps`.
///
/// # Errors
/// An embedding that is not finite, has no row or another width than the class means; labels outside the classes; parameters out of range.
pub fn nd_cosine(student: &Tensor, means: &ClassMeans, labels: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (_, d) = inputs::embedding("student.embedding", student)?;
    means.check_width(d)?;
    let directions = means.of(&Labels::new(labels, means.classes(), student)?)?;
    let cosine = (unit(student, params.eps)? * directions)?.sum(1)?;
    Ok(LossTerms::one("direction", (1.0 - cosine)?.mean_all()?))
}

struct NdCosine {
    params: Params,
    prepared: Prepared,
}

impl Method for NdCosine {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { student: vec![Cut::Embedding], class_means: true, ..Needs::supervised() }
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        self.prepared = Prepared::new(setup, self.params.adapter_config(), ENTRY.name)?;
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        adapter::networks(self.prepared.adapter.as_ref())
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let student = adapter::apply(self.prepared.adapter.as_ref(), step)?;
        nd_cosine(&student, self.prepared.means(ENTRY.name)?, labels::of(step.batch), &self.params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let params: Params = inputs.params()?;
    let means = ClassMeans::new(inputs.get("class_means")?)?;
    let student = params.adapter_config().parity(inputs, means.dims().1)?;
    Ok(nd_cosine(&student, &means, parity_labels(inputs)?, &params)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "nd_cosine",
    about: "cosine to the class mean of the teacher's embedding (ablation of KD++)",
    source: "Wang et al., ECCV 2024, arXiv 2305.17007",
    year: 2023,
    parameters: &[ADAPTER, EPS, BN_EPS, DROPOUT],
    build: |params| Ok(Box::new(NdCosine { params: parse(params, Params::validate)?, prepared: Prepared::default() })),
    parity,
    raw_terms: false,
};
