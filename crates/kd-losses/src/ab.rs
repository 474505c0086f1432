//! `ab`: activation boundaries, which of the teacher's neurons are on.
//!
//! Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons", AAAI 2019, arXiv 1811.03233.
//!
//! ```text
//! s     = P^s_i where channels and heights agree, BN(conv(P^s_i)) elsewhere
//! l     = (s + m)^2 where P^t_i <= 0 and s > -m,   (s - m)^2 where P^t_i > 0 and s <= m,   0 elsewhere
//! value = scale sum_i 2^(i-n) (1/B) sum l          over n stages
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `P^s_i`, `P^t_i` | pre-activations of stage i; of the teacher's only the sign counts | `[B,C,H,W]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `stages` | null | ascending | null: from stage 1 on, until one network has no more |
//! | `margin` | 1 | > 0 | m |
//! | `scale` | 0.003 | > 0 | |
//! | `init_epochs` | 30 | >= 0 | the initial phase that trains the student's stages with this loss alone; 0: none, it stands beside the others |
//! | `bn_eps`, `bn_momentum` | 1e-5, 0.1 | > 0, 0..=1 | of the connectors' batch norms |
//!
//! Terms: `stage.<i>`, weighted `scale` times 1/4, 1/2, 1 for three stages. The published CIFAR-100 numbers train 30 epochs with this loss
//! alone, at the student's learning rate, all but the classifier; then they go on with `ce`, so give the main training a loss of its own (an
//! outer weight has no effect on the phase). The connectors are [`fitnet`](mod@crate::fitnet)'s regressors without the ReLU, trained with the
//! student in the phase and idle after it. State: their running statistics. Cost small adapters, memory `O(B C_t H W)` a connector.

use std::sync::Arc;

use candle_core::Tensor;
use kd_core::{
    Cut, Error, LossTerms, Method, MethodEntry, Model, Needs, ParamDoc, ParityInputs, ParityOutput, Phase, Result, Setup, StepView,
};
use kd_nn::{GraphBuilder, Network};
use serde::{Deserialize, Serialize};

use crate::features::{self, BN_EPS, BN_MOMENTUM, Choice, Match, StagePair, Stages, batch_statistics, stages_doc};
use crate::fitnet::Regressor;
use crate::inputs;
use crate::layers::{Layers, Norm};
use crate::registry::parse;

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// The stages to compare; none: from stage 1 on.
    pub stages: Option<Vec<usize>>,
    /// How far from the boundary the student is to be, above 0.
    pub margin: f64,
    /// Factor of the sum, above 0.
    pub scale: f64,
    /// Epochs of the initial phase; 0: none.
    pub init_epochs: usize,
    /// Epsilon of the connectors' batch norms, above 0.
    pub bn_eps: f64,
    /// Share of a batch in their running statistics, in 0..=1.
    pub bn_momentum: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { stages: None, margin: 1.0, scale: 0.003, init_epochs: 30, bn_eps: 1e-5, bn_momentum: 0.1 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        inputs::positive("margin", self.margin)?;
        inputs::positive("scale", self.scale)?;
        self.norm().validate()?;
        self.choice().validate()
    }

    fn norm(&self) -> Norm {
        Norm { eps: self.bn_eps, momentum: self.bn_momentum }
    }

    fn choice(&self) -> Choice {
        Choice::preacts(&self.stages, Stages::Bodies)
    }
}

/// Activation boundaries over `pairs`: the student's maps behind their connectors, the teacher's pre-activations (detached).
///
/// # Errors
/// Maps that are not `[B,C,H,W]` or differ in shape; parameters out of range.
pub fn ab(pairs: &[StagePair<'_>], params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let (m, mut terms) = (params.margin, LossTerms::new());
    for (j, pair) in pairs.iter().enumerate() {
        let teacher = pair.teacher()?;
        let s = pair.student;
        if teacher.dims() != s.dims() {
            let expected = format!("{:?}, as the student's behind its connector", s.dims());
            return Err(Error::shape(format!("teacher.{}", pair.name()), expected, teacher.dims()));
        }
        let on = teacher.gt(0.0)?;
        let wrong_on = (on.eq(0u8)? * s.detach().gt(-m)?)?.to_dtype(s.dtype())?;
        let wrong_off = (on * s.detach().le(m)?)?.to_dtype(s.dtype())?;
        let value = (((s + m)?.sqr()? * wrong_on)? + ((s - m)?.sqr()? * wrong_off)?)?.sum_all()?;
        let weight = params.scale * 0.5f64.powi((pairs.len() - 1 - j) as i32);
        terms = terms.with(&pair.name(), (value / s.dim(0)? as f64)?, weight);
    }
    Ok(terms)
}

struct Ab {
    params: Params,
    stages: Vec<(Match, Option<Arc<Network>>)>,
    unused: Vec<String>,
}

impl Ab {
    fn wanted(&self) -> Needs {
        if self.stages.is_empty() { self.params.choice().before() } else { features::needs(self.stages.iter().map(|(m, _)| m)) }
    }

    fn own(&self, step: &StepView<'_>) -> Result<LossTerms> {
        features::prepared(&self.stages, ENTRY.name)?;
        let (student, teacher) = (step.student()?, step.teacher()?);
        let connect = |(found, network): &(Match, Option<Arc<Network>>)| {
            let x = student.get(found.student)?;
            network.as_ref().map_or_else(|| Ok(x.clone()), |n| features::run(n, x, Cut::Input, Cut::Stage(0), step))
        };
        let connected = self.stages.iter().map(connect).collect::<Result<Vec<_>>>()?;
        let pair = |((found, _), student)| -> Result<StagePair<'_>> {
            let found: &Match = found;
            Ok(StagePair { index: found.index, student, teacher: teacher.get(found.teacher)? })
        };
        let stages = self.stages.iter().map(|(found, network)| (found, network));
        ab(&stages.zip(&connected).map(pair).collect::<Result<Vec<_>>>()?, &self.params)
    }
}

/// The connector of two shapes `[C,H,W]`; none where the map goes as it is.
fn connector(from: &[usize], to: &[usize]) -> Result<Option<Regressor>> {
    if from[0] == to[0] && from[1] == to[1] { Ok(None) } else { Regressor::between([from[1], from[2]], [to[1], to[2]]).map(Some) }
}

impl Method for Ab {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        features::main_needs(self.wanted(), self.params.init_epochs, self.stages.is_empty())
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        let build = |found: Match| {
            let named = |e| Error::refused(format!("{}, stage {}: {e}", ENTRY.name, found.index));
            let Some(regressor) = connector(&found.from, &found.to).map_err(named)? else { return Ok((found, None)) };
            batch_statistics(setup, ENTRY.name, found.to[1] * found.to[2])?;
            let mut b = GraphBuilder::new(format!("ab.connector.{}", found.index), &found.from);
            regressor.layers(&mut b, found.to[0], self.params.norm());
            b.stage(0, "connector", None);
            Ok((found, Some(features::network(setup, b)?)))
        };
        let stages: Vec<_> = self.params.choice().matches(setup, ENTRY.name)?.into_iter().map(build).collect::<Result<_>>()?;
        self.unused = features::unreached(setup.models.student, stages.iter().map(|(m, _)| m.student))?;
        self.stages = stages;
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        features::models(self.stages.iter().filter_map(|(_, network)| network.as_ref()))
    }

    fn phases(&self) -> Vec<Phase> {
        features::initial("activation boundaries", self.params.init_epochs, self.wanted(), &self.unused)
    }

    /// The connectors after their phase.
    fn idle(&self, _epoch: usize) -> Vec<usize> {
        if self.params.init_epochs > 0 { (0..self.networks().len()).collect() } else { vec![] }
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
    let layers = Layers::trained(inputs, params.norm());
    let pairs = params.choice().parity(inputs)?;
    let connect = |pair: &StagePair<'_>| {
        features::map(&format!("student.{}", pair.name()), pair.student)?;
        features::map(&format!("teacher.{}", pair.name()), pair.teacher)?;
        match connector(&pair.student.dims()[1..], &pair.teacher.dims()[1..])? {
            None => Ok(pair.student.clone()),
            Some(regressor) => regressor.parity(&layers, &format!("connector.{}", pair.index), pair.student),
        }
    };
    let connected = pairs.iter().map(connect).collect::<Result<Vec<Tensor>>>()?;
    let pairs: Vec<_> = pairs.iter().zip(&connected).map(|(p, student)| StagePair { student, ..*p }).collect();
    Ok(ParityOutput { terms: ab(&pairs, &params)?, state: layers.into_state() })
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "ab",
    about: "activation boundaries: which of the teacher's neurons are on, in an initial phase",
    source: "Heo et al., AAAI 2019, arXiv 1811.03233",
    year: 2019,
    parameters: &[
        stages_doc("what is compared; null: from stage 1 on"),
        ParamDoc { name: "margin", default: "1.0", range: "> 0", about: "how far from the boundary the student is to be" },
        ParamDoc { name: "scale", default: "0.003", range: "> 0", about: "factor of the sum" },
        features::INIT_EPOCHS,
        BN_EPS,
        BN_MOMENTUM,
    ],
    build: |params| Ok(Box::new(Ab { params: parse(params, Params::validate)?, stages: vec![], unused: vec![] })),
    parity,
    raw_terms: true,
};
