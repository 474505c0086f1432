//! `fsp`: flow of the solution procedure, how one stage's channels go with the next one's.
//!
//! Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning", CVPR 2017.
//!
//! ```text
//! G_ij  = (1/HW) sum over positions of F_i[:,a] F_j[:,b],   i, j neighbouring stages, the larger grid average-pooled to the smaller
//! value = sum over pairs of mean (G_ij(S) - G_ij(T))^2
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `S_i`, `T_i` | outputs of stage i, the stem included; channels must agree, grids may differ | `[B,C,H,W]` |
//! | `G` | | `[B,C_i,C_j]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `stages` | null | ascending, two or more | null: from the stem on, until one network has no more |
//! | `init_epochs` | 30 | >= 0 | the initial phase that trains the student with this loss alone; 0: none, it stands beside the others |
//!
//! Terms: `pair.<i>_<j>`. The published CIFAR-100 numbers train 30 epochs with this loss alone (its weight of 50 is not applied there), at the
//! student's learning rate, then go on with `ce`: give the main training a loss of its own. No adapter, no state. Cost one product of
//! channels with channels a pair, memory `B C_i C_j`.
//!
//! Networks of unequal width are refused (the tables' wrn_40_2 - wrn_40_1 is empty). `G` grows with the square of the features, up to 1e7 on
//! stages without normalisation.

use candle_core::Tensor;
use kd_core::{Error, LossTerms, Method, MethodEntry, Needs, ParityInputs, ParityOutput, Phase, Result, Setup, StepView};
use serde::{Deserialize, Serialize};

use crate::features::{self, Choice, Match, StagePair, Stages, matched, stages_doc};
use crate::registry::parse;

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// The stages to compare, two or more; none: from the stem on.
    pub stages: Option<Vec<usize>>,
    /// Epochs of the initial phase; 0: none.
    pub init_epochs: usize,
}

impl Default for Params {
    fn default() -> Self {
        Self { stages: None, init_epochs: 30 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        if let Some(list) = self.stages.as_ref().filter(|list| list.len() < 2) {
            return Err(Error::param("stages", format!("{list:?}"), "two or more: neighbours are compared"));
        }
        self.choice().validate()
    }

    fn choice(&self) -> Choice {
        Choice::outputs(&self.stages, Stages::WithStem)
    }
}

/// Flow matrices of neighbouring `pairs`, shallow to deep; the teacher's maps are detached.
///
/// # Errors
/// Fewer than two stages, maps that are not `[B,C,H,W]` or differ in batch or channels.
pub fn fsp(pairs: &[StagePair<'_>]) -> Result<LossTerms> {
    if pairs.len() < 2 {
        return Err(Error::refused(format!("fsp: neighbouring stages need two of them, got {}", pairs.len())));
    }
    let mut maps = vec![];
    for pair in pairs {
        let teacher = pair.teacher()?;
        if teacher.dim(1)? != pair.student.dim(1)? {
            let expected = format!("[B,{},H,W]: fsp needs networks of equal width", pair.student.dim(1)?);
            return Err(Error::shape(format!("teacher.{}", pair.name()), expected, teacher.dims()));
        }
        maps.push([pair.student.clone(), teacher]);
    }
    let mut terms = LossTerms::new();
    for (two, ends) in maps.windows(2).zip(pairs.windows(2)) {
        let [s, t] = [0, 1].map(|side| flow(&two[0][side], &two[1][side]));
        let name = format!("pair.{}_{}", ends[0].index, ends[1].index);
        terms = terms.with(&name, (s? - t?)?.sqr()?.mean_all()?, 1.0);
    }
    Ok(terms)
}

fn flow(bottom: &Tensor, top: &Tensor) -> Result<Tensor> {
    let (bottom, top) = matched(bottom, top)?;
    let (bottom, top) = (bottom.flatten_from(2)?, top.flatten_from(2)?);
    let positions = top.dim(2)? as f64;
    Ok((bottom.matmul(&top.t()?)? / positions)?)
}

struct Fsp {
    params: Params,
    matches: Vec<Match>,
    unused: Vec<String>,
}

impl Fsp {
    fn wanted(&self) -> Needs {
        if self.matches.is_empty() { self.params.choice().before() } else { features::needs(&self.matches) }
    }

    fn own(&self, step: &StepView<'_>) -> Result<LossTerms> {
        features::prepared(&self.matches, ENTRY.name)?;
        fsp(&features::pairs(&self.matches, step)?)
    }
}

impl Method for Fsp {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        features::main_needs(self.wanted(), self.params.init_epochs, self.matches.is_empty())
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        let matches = self.params.choice().matches(setup, ENTRY.name)?;
        if matches.len() < 2 {
            return Err(Error::refused("fsp: neighbouring stages need two of them in both networks"));
        }
        if let Some(m) = matches.iter().find(|m| m.from[0] != m.to[0]) {
            return Err(Error::refused(format!(
                "fsp needs networks of equal width: stage {} has {} channels in the student, {} in the teacher",
                m.index, m.from[0], m.to[0]
            )));
        }
        self.unused = features::unreached(setup.models.student, matches.iter().map(|m| m.student))?;
        self.matches = matches;
        Ok(())
    }

    fn phases(&self) -> Vec<Phase> {
        features::initial("flow", self.params.init_epochs, self.wanted(), &self.unused)
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        if self.params.init_epochs > 0 { Ok(LossTerms::new()) } else { self.own(step) }
    }

    fn phase_loss(&mut self, _phase: usize, step: &StepView<'_>) -> Result<LossTerms> {
        self.own(step)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    let params: Params = inputs.params()?;
    params.validate()?;
    Ok(fsp(&params.choice().parity(inputs)?)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "fsp",
    about: "flow of the solution procedure: products of neighbouring stages' channels, in an initial phase",
    source: "Yim et al., CVPR 2017",
    year: 2017,
    parameters: &[stages_doc("what is compared, two or more; null: from the stem on"), features::INIT_EPOCHS],
    build: |params| Ok(Box::new(Fsp { params: parse(params, Params::validate)?, matches: vec![], unused: vec![] })),
    parity,
    raw_terms: true,
};
