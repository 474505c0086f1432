//! The stages of a run: the initial phases of its methods in order, then the main training.
//!
//! A stage has its own loss, cuts, trained parts, learning rate and optimiser, which starts afresh. Epochs count on through all of them, so that
//! a phase shares the batches with whatever the neighbours do at that time.

use std::sync::Arc;

use kd_core::{Cut, Model, Needs, Phase, Trainable};

use crate::Result;
use crate::job::{Objective, Shared, Student};
use crate::optim::{Optimiser, Part, Target};

/// What a stage wants computed.
#[derive(Clone, Debug)]
pub(crate) struct Wants {
    /// The union over the methods that take part.
    pub(crate) needs: Needs,
    /// Cuts of each teacher.
    pub(crate) teachers: Vec<Vec<Cut>>,
    /// Whether some method sees the mean of several teachers' logits.
    pub(crate) mean: bool,
}

/// An initial phase, and whose.
pub(crate) struct Lead {
    pub(crate) objective: usize,
    /// Its index among the method's own.
    pub(crate) index: usize,
    pub(crate) phase: Phase,
}

/// A part of a run, with what it trains.
pub(crate) struct Stage {
    /// The initial phase, by its index among all; `None`: the main training.
    pub(crate) lead: Option<usize>,
    /// Its first epoch, of the whole run.
    pub(crate) first: usize,
    pub(crate) wants: Wants,
    pub(crate) parts: Vec<Part>,
    pub(crate) optimiser: Optimiser,
    /// Whether it is known that the losses reach every parameter.
    pub(crate) reached: bool,
}

impl Lead {
    /// Those of all methods, in order.
    pub(crate) fn all(own: &Student) -> Vec<Self> {
        let of = |(objective, o): (usize, &Objective)| {
            let all = o.method.phases().into_iter().enumerate();
            all.map(move |(index, phase)| Self { objective, index, phase })
        };
        own.objectives.iter().enumerate().flat_map(of).filter(|lead| lead.phase.epochs > 0).collect()
    }
}

impl Stage {
    /// The one that epoch `epoch` of the whole run belongs to, with its optimiser as it begins.
    pub(crate) fn at(
        epoch: usize,
        own: &Student,
        labels: &[String],
        leads: &[Lead],
        sees: &[Option<usize>],
        shared: &Shared,
    ) -> Result<Self> {
        let (mut first, mut lead) = (0, None);
        for (i, l) in leads.iter().enumerate() {
            if epoch < first + l.phase.epochs {
                lead = Some(i);
                break;
            }
            first += l.phase.epochs;
        }
        let wants = Wants::new(own, lead.map(|i| &leads[i]), sees, shared);
        let phase = lead.map(|i| &leads[i]);
        let unused = match phase {
            Some(l) => l.phase.unused.clone(),
            None => own.objectives.iter().flat_map(|o| o.method.unused()).collect(),
        };
        let mut parts = vec![];
        // Nothing of it left to train: not even a decay moves it.
        if !unused.iter().any(String::is_empty) {
            parts.extend(parts_of("student".to_string(), &own.model, unused));
        }
        for (i, (objective, label)) in own.objectives.iter().zip(labels).enumerate() {
            if phase.is_some_and(|l| l.objective != i) {
                continue;
            }
            for (n, network) in objective.method.networks().iter().enumerate() {
                if phase.is_none_or(|l| !l.phase.idle.contains(&n)) {
                    parts.extend(parts_of(format!("{label}.network.{n}"), network, vec![]));
                }
            }
            let vars = objective.method.vars().into_iter();
            parts.extend(vars.map(|(name, var)| Part { name: format!("{label}.var.{name}"), target: Target::Var(var), unused: vec![] }));
        }
        Ok(Self { lead, first, wants, optimiser: Optimiser::new(&own.optim, parts.clone())?, parts, reached: false })
    }
}

impl Wants {
    /// Of an initial phase, or of all methods in the main training.
    fn new(own: &Student, lead: Option<&Lead>, sees: &[Option<usize>], shared: &Shared) -> Self {
        let all: Vec<(usize, Needs)> = match lead {
            Some(lead) => vec![(lead.objective, lead.phase.needs.clone())],
            None => own.objectives.iter().enumerate().map(|(i, o)| (i, o.method.needs())).collect(),
        };
        let mut teachers = vec![vec![]; shared.teachers.len()];
        for (i, needs) in &all {
            for (t, cuts) in teachers.iter_mut().enumerate() {
                if sees[*i].map_or(shared.teachers[t].weight > 0.0, |seen| seen == t) {
                    cuts.extend(&needs.teacher);
                }
            }
        }
        teachers.iter_mut().for_each(|cuts: &mut Vec<Cut>| {
            cuts.sort_unstable();
            cuts.dedup();
        });
        let mean = teachers.len() > 1 && all.iter().any(|(i, needs)| sees[*i].is_none() && !needs.teacher.is_empty());
        let nothing = Needs { student: vec![], ..Needs::default() };
        Self { needs: all.iter().fold(nothing, |sum, (_, needs)| sum.merge(needs)), teachers, mean }
    }
}

/// What of a network is trained.
pub(crate) fn parts_of(name: String, network: &Arc<dyn Model>, unused: Vec<String>) -> Vec<Part> {
    match network.trainable() {
        Trainable::Frozen => vec![],
        Trainable::Flat => vec![Part { name, target: Target::Network(Arc::clone(network)), unused }],
        Trainable::Vars(vars) => {
            let part = |(i, var)| Part { name: format!("{name}.var.{i}"), target: Target::Var(var), unused: vec![] };
            vars.into_iter().enumerate().map(part).collect()
        }
    }
}
