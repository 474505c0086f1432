//! What a run is made of, and how it comes back.

use std::sync::Arc;

use candle_core::Tensor;
use kd_core::schedule::warmup_factor;
use kd_core::{BatchSource, Cut, Method, Model, Needs, Schedule};

use crate::cache::LogitCache;
use crate::config::{RunOptions, did_you_mean};
use crate::optim::OptimConfig;
use crate::parts::{StringMap, fingerprint};
use crate::run_dir::RunPlace;
use crate::state::RunResult;
use crate::{Error, Result};

/// Everything a run of one student needs, built: a [`Student`] and its [`Shared`] part in one.
pub struct Job {
    /// The network to train.
    pub student: Arc<dyn Model>,
    /// The networks to learn from.
    pub teachers: Vec<Teacher>,
    /// The losses; their weighted sum is minimised.
    pub objectives: Vec<Objective>,
    /// Images and labels.
    pub data: Data,
    /// The optimiser.
    pub optim: OptimConfig,
    /// Epochs and learning rate.
    pub schedule: Schedule,
    /// Checkpoints, evaluations, checks.
    pub options: RunOptions,
    /// Everything random follows from it.
    pub seed: u64,
    /// The run directory; `None` writes nothing.
    pub place: Option<RunPlace>,
}

impl Job {
    /// What several students could share, and what is this student's own.
    pub(crate) fn split(self) -> (Shared, Student) {
        let Self { student, teachers, objectives, data, optim, schedule, options, seed, place } = self;
        (Shared { teachers, data, seed }, Student { model: student, objectives, optim, schedule, options, place })
    }
}

/// What students that learn side by side have in common: they see the same batches in the same order, and the same teachers' outputs.
pub struct Shared {
    /// The networks to learn from.
    pub teachers: Vec<Teacher>,
    /// Images and labels.
    pub data: Data,
    /// Everything random follows from it.
    pub seed: u64,
}

/// What each of several students has for itself. The fields are those of [`Job`].
pub struct Student {
    /// The network to train.
    pub model: Arc<dyn Model>,
    /// The losses; their weighted sum is minimised.
    pub objectives: Vec<Objective>,
    /// The optimiser.
    pub optim: OptimConfig,
    /// Epochs and learning rate.
    pub schedule: Schedule,
    /// Checkpoints, evaluations, checks.
    pub options: RunOptions,
    /// The run directory; `None` writes nothing.
    pub place: Option<RunPlace>,
}

impl Student {
    /// Epochs of the initial phases.
    pub fn phase_epochs(&self) -> usize {
        self.objectives.iter().flat_map(|o| o.method.phases()).map(|p| p.epochs).sum()
    }
}

/// A frozen network, and what messages call it.
#[derive(Clone)]
pub struct Teacher {
    /// What messages call it.
    pub name: String,
    /// The network.
    pub model: Arc<dyn Model>,
    /// Its share in the mean of several teachers' logits, which is divided by the sum of all shares; 0 leaves it out of the mean.
    pub weight: f64,
    /// Where its logits are kept for later runs.
    pub cache: Option<LogitCache>,
}

impl Teacher {
    /// With weight 1 and no cache.
    pub fn new(name: impl Into<String>, model: Arc<dyn Model>) -> Self {
        Self { name: name.into(), model, weight: 1.0, cache: None }
    }
}

/// A method's part in the loss: `weight * min(1, (epoch + first) / warmup_epochs)` of its terms.
pub struct Objective {
    /// The method.
    pub method: Box<dyn Method>,
    /// Which of several teachers it learns from, by name. `None`: the only one, or the weighted mean of the logits of all.
    pub teacher: Option<String>,
    /// Its factor.
    pub weight: f64,
    /// Epochs over which the factor grows; 0: none.
    pub warmup_epochs: usize,
    /// What the first epoch counts as in the warm-up.
    pub warmup_first_epoch: usize,
}

impl Objective {
    /// `method` with a weight and no warm-up.
    pub fn new(method: Box<dyn Method>, weight: f64) -> Self {
        Self { method, teacher: None, weight, warmup_epochs: 0, warmup_first_epoch: 1 }
    }

    /// Views of each sample that its method wants, in the main training or an initial phase.
    pub fn views(&self) -> usize {
        self.all_needs().iter().map(|n| n.views).fold(1, usize::max)
    }

    /// The index of the one teacher that it sees; `None` when there is none, or when it sees the mean of several.
    ///
    /// # Errors
    /// A name that no teacher has.
    pub(crate) fn sees(&self, teachers: &[Teacher]) -> Result<Option<usize>> {
        let Some(name) = &self.teacher else { return Ok((teachers.len() == 1).then_some(0)) };
        let found = teachers.iter().position(|t| t.name == *name);
        let unknown = || {
            let known = did_you_mean(name, teachers.iter().map(|t| t.name.as_str()));
            Error::Refused(format!("method {}: there is no teacher {name}; {known}", self.method.name()))
        };
        found.map(Some).ok_or_else(unknown)
    }

    /// What its method wants computed, in the main training and in the initial phases.
    pub(crate) fn all_needs(&self) -> Vec<Needs> {
        std::iter::once(self.method.needs()).chain(self.method.phases().into_iter().map(|p| p.needs)).collect()
    }

    /// Its factor in an epoch.
    pub(crate) fn factor(&self, epoch: usize) -> f64 {
        self.weight * warmup_factor(epoch, self.warmup_epochs, self.warmup_first_epoch)
    }
}

/// The data of a run.
pub struct Data {
    /// Classes.
    pub classes: usize,
    /// Samples of a full batch.
    pub batch_size: usize,
    /// The training set, shuffled and augmented by the source.
    pub train: Box<dyn BatchSource>,
    /// The training set without augmentation, for class means.
    pub plain: Option<Box<dyn BatchSource>>,
    /// Samples held out of the training set: the best student is chosen on them, and exported.
    pub validation: Option<Box<dyn BatchSource>>,
    /// The test set. Without a validation split it is evaluated every epoch, and the last student is exported.
    pub test: Option<Box<dyn BatchSource>>,
    /// Names the data: a resume must bring the same.
    pub fingerprint: String,
    /// `[K,D]` of the first teacher; computed from `plain`, as every other teacher's, when a method needs them and they are not given.
    pub class_means: Option<Tensor>,
    /// A group for each class.
    pub class_groups: Option<Vec<i64>>,
}

/// Whether the mean of several teachers' logits is all that a method with these needs has to see.
pub(crate) fn mean_will_do(needs: &Needs) -> bool {
    !needs.teacher_model && !needs.class_means && needs.teacher.iter().all(|&cut| cut == Cut::Logits)
}

/// How [`train`](crate::train) returned.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// The run is at its end, now or already before; the student holds the exported weights (where those are the student's own).
    Finished(Box<RunResult>),
    /// The stop flag was set; the run directory goes on from here.
    Interrupted {
        /// The present epoch, from 0; of the initial phase, within one.
        epoch: usize,
        /// Steps made.
        step: usize,
    },
}

/// What a resume must find unchanged.
pub(crate) fn fingerprints(shared: &Shared, students: &[&Student]) -> Result<Vec<StringMap>> {
    let mut common = StringMap::from([("data".to_string(), shared.data.fingerprint.clone())]);
    for teacher in &shared.teachers {
        common.insert(format!("teacher {}", teacher.name), fingerprint(teacher.model.as_ref())?);
    }
    let own = |student: &&Student| {
        let start = ("student's start".to_string(), fingerprint(student.model.as_ref())?);
        Ok(common.clone().into_iter().chain([start]).collect())
    };
    students.iter().map(own).collect()
}

/// The methods' names, numbered where one appears again.
pub(crate) fn labels(objectives: &[Objective]) -> Vec<String> {
    let name = |i: usize| objectives[i].method.name();
    let label = |i| match (0..i).filter(|&j| name(j) == name(i)).count() {
        0 => name(i).to_string(),
        earlier => format!("{}-{}", name(i), earlier + 1),
    };
    (0..objectives.len()).map(label).collect()
}
