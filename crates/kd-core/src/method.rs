//! A distillation method, what it needs, sees and returns.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use serde::Serialize;

use crate::{Batch, Cut, Error, Model, Outputs, Result, Rng};

/// Named tensors: everything of a method that a resume needs.
pub type StateDict = BTreeMap<String, Tensor>;

/// What a method wants computed. Cost follows from it: a method that asks for logits alone never materialises a stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Needs {
    /// Cuts of the student.
    pub student: Vec<Cut>,
    /// Cuts of every teacher; empty for a teacher-free method.
    pub teacher: Vec<Cut>,
    /// Labels.
    pub labels: bool,
    /// Sample indices (memory banks).
    pub indices: bool,
    /// Augmented views of each sample; 1 for most.
    pub views: usize,
    /// The teacher as a network (its classifier, its later blocks).
    pub teacher_model: bool,
    /// The student as a network (its classifier).
    pub student_model: bool,
    /// Mean teacher embedding of each class over the training set.
    pub class_means: bool,
    /// A group for each class.
    pub class_groups: bool,
}

impl Default for Needs {
    fn default() -> Self {
        Self {
            student: vec![Cut::Logits],
            teacher: vec![],
            labels: false,
            indices: false,
            views: 1,
            teacher_model: false,
            student_model: false,
            class_means: false,
            class_groups: false,
        }
    }
}

impl Needs {
    /// Student logits and labels.
    pub fn supervised() -> Self {
        Self { labels: true, ..Self::default() }
    }

    /// Logits of both sides.
    pub fn logits() -> Self {
        Self { teacher: vec![Cut::Logits], ..Self::default() }
    }

    /// What serves both.
    #[must_use]
    pub fn merge(mut self, other: &Self) -> Self {
        let add = |into: &mut Vec<Cut>, from: &[Cut]| {
            into.extend(from);
            into.sort_unstable();
            into.dedup();
        };
        add(&mut self.student, &other.student);
        add(&mut self.teacher, &other.teacher);
        self.labels |= other.labels;
        self.indices |= other.indices;
        self.views = self.views.max(other.views);
        self.teacher_model |= other.teacher_model;
        self.student_model |= other.student_model;
        self.class_means |= other.class_means;
        self.class_groups |= other.class_groups;
        self
    }
}

/// The teacher and student as networks.
#[derive(Clone, Copy)]
pub struct Models<'a> {
    /// The network in training.
    pub student: &'a dyn Model,
    /// The frozen ones.
    pub teachers: &'a [Arc<dyn Model>],
}

/// Where a run stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct Progress {
    /// The present epoch, from 0.
    pub epoch: usize,
    /// Epochs in all.
    pub epochs: usize,
    /// Global step, from 0.
    pub step: usize,
    /// Steps in an epoch.
    pub steps_per_epoch: usize,
}

/// What a method learns once, before the first step.
pub struct Setup<'a> {
    /// Both sides; their [`Model::spec`]s hold the shapes.
    pub models: Models<'a>,
    /// Classes of the data.
    pub classes: usize,
    /// Samples of the training set.
    pub train_samples: usize,
    /// The class of each of them, where the source of the batches tells.
    pub train_labels: Option<&'a [u32]>,
    /// Samples of a full batch.
    pub batch_size: usize,
    /// `[K,D_t]`, when [`Needs::class_means`] asked for it.
    pub class_means: Option<&'a Tensor>,
    /// Group of each class, when [`Needs::class_groups`] asked for it.
    pub class_groups: Option<&'a [i64]>,
    /// Type of activations and parameters.
    pub dtype: DType,
    /// Where they are.
    pub device: &'a Device,
    /// For the initialisation of what the method trains.
    pub rng: Rng,
}

impl Setup<'_> {
    /// The first teacher.
    pub fn teacher(&self, method: &str) -> Result<&dyn Model> {
        self.models.teachers.first().map(|t| t.as_ref()).ok_or_else(|| Error::missing(method, "a teacher"))
    }
}

/// What a method sees of one step.
pub struct StepView<'a> {
    /// The student's outputs, one per view.
    pub student: &'a [Outputs],
    /// The teachers' outputs, `teachers[t][view]`, outside any graph.
    pub teachers: &'a [Vec<Outputs>],
    /// The networks.
    pub models: Models<'a>,
    /// Images, labels or soft targets, indices.
    pub batch: &'a Batch,
    /// Where the run stands.
    pub progress: Progress,
    /// Randomness of this step for this method.
    pub rng: Rng,
}

impl<'a> StepView<'a> {
    /// The student's outputs on the first view.
    pub fn student(&self) -> Result<&'a Outputs> {
        self.student.first().ok_or_else(|| Error::missing("this method", "the student's outputs"))
    }

    /// The first teacher's outputs on the first view.
    pub fn teacher(&self) -> Result<&'a Outputs> {
        self.teachers.first().and_then(|t| t.first()).ok_or_else(|| Error::missing("this method", "a teacher"))
    }
}

/// Which gradient a term belongs to: DOT steps the two with different momenta. `ce` alone is [`Tag::Task`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Tag {
    /// Learning the labels.
    Task,
    /// Learning from a teacher or a regulariser.
    Distill,
}

/// One scalar term of a loss.
#[derive(Clone, Debug)]
pub struct Term {
    /// Its name within the method.
    pub name: String,
    /// Its unweighted value, a scalar tensor in the graph.
    pub raw: Tensor,
    /// Its factor in the sum.
    pub weight: f64,
    /// Task or distillation.
    pub tag: Tag,
}

/// Named scalar terms; the loss is their weighted sum.
#[derive(Clone, Debug, Default)]
pub struct LossTerms {
    /// In the order of the formula.
    pub terms: Vec<Term>,
}

impl LossTerms {
    /// No term yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// One distillation term of weight 1.
    pub fn one(name: &str, raw: Tensor) -> Self {
        Self::new().with(name, raw, 1.0)
    }

    /// Adds a distillation term.
    #[must_use]
    pub fn with(self, name: &str, raw: Tensor, weight: f64) -> Self {
        self.with_tag(name, raw, weight, Tag::Distill)
    }

    /// Adds a term.
    #[must_use]
    pub fn with_tag(mut self, name: &str, raw: Tensor, weight: f64, tag: Tag) -> Self {
        self.terms.push(Term { name: name.to_string(), raw, weight, tag });
        self
    }

    /// Every weight times `factor`.
    #[must_use]
    pub fn scaled(mut self, factor: f64) -> Self {
        self.terms.iter_mut().for_each(|t| t.weight *= factor);
        self
    }

    /// Every name with `prefix.` in front.
    #[must_use]
    pub fn prefixed(mut self, prefix: &str) -> Self {
        self.terms.iter_mut().for_each(|t| t.name = format!("{prefix}.{}", t.name));
        self
    }

    /// Appends another method's terms.
    pub fn extend(&mut self, other: Self) {
        self.terms.extend(other.terms);
    }

    /// The weighted sum, a scalar in the graph. A term of weight 0 takes no part: its gradient is not computed.
    pub fn total(&self) -> Result<Tensor> {
        self.sum(|_| true)?.ok_or_else(|| Error::refused("a loss without a term"))
    }

    /// The weighted sum of the terms with `tag`; `None` when there is none.
    pub fn total_of(&self, tag: Tag) -> Result<Option<Tensor>> {
        self.sum(|t| t.tag == tag)
    }

    fn sum(&self, keep: impl Fn(&Term) -> bool) -> Result<Option<Tensor>> {
        let mut total: Option<Tensor> = None;
        for term in self.terms.iter().filter(|t| keep(t)) {
            // `affine` with factor 0 cuts candle's graph, so that a silent term costs no backward pass.
            let weighted = if term.weight == 1.0 { term.raw.clone() } else { (&term.raw * term.weight)? };
            total = Some(match total {
                None => weighted,
                Some(sum) => (sum + weighted)?,
            });
        }
        Ok(total)
    }
}

/// A stretch of epochs before the main training in which a method trains something first (AB, FSP, FT). Its loss is
/// [`Method::phase_loss`] alone.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Phase {
    /// Shown in the progress.
    pub name: String,
    /// Its length.
    pub epochs: usize,
    /// Its learning rate; none: the optimiser's own at the start of the schedule. Nothing drops it.
    pub lr: Option<f64>,
    /// What it wants computed; [`Method::needs`] is the main training's.
    pub needs: Needs,
    /// Name prefixes of student parameters that it leaves as they are; an empty prefix names all.
    pub unused: Vec<String>,
    /// Which of [`Method::networks`], by index, it leaves as they are.
    pub idle: Vec<usize>,
}

/// A distillation method: turns the outputs of both sides into loss terms, and owns what it trains beside the student.
pub trait Method: Send {
    /// Its name in the registry.
    fn name(&self) -> &'static str;

    /// What it wants computed. Asked before [`Method::prepare`] and again after it: cuts that follow from the shapes of both sides may join.
    fn needs(&self) -> Needs;

    /// Builds adapters and banks from the shapes of both sides.
    ///
    /// # Errors
    /// Combinations that cannot work, with the reason.
    fn prepare(&mut self, _setup: &Setup<'_>) -> Result<()> {
        Ok(())
    }

    /// Adapters and connectors made of graphs, trained with the student.
    fn networks(&self) -> Vec<Arc<dyn Model>> {
        vec![]
    }

    /// Small learnable tensors (a temperature, a projection).
    fn vars(&self) -> Vec<(String, Var)> {
        vec![]
    }

    /// Initial phases, in order. Asked before [`Method::prepare`] and again after it.
    fn phases(&self) -> Vec<Phase> {
        vec![]
    }

    /// Name prefixes of student parameters that this method never reaches although the student trains.
    fn unused(&self) -> Vec<String> {
        vec![]
    }

    /// Which of [`Method::networks`], by index, take no part in `epoch` (from 0) of the main training: no gradient is expected for them.
    fn idle(&self, _epoch: usize) -> Vec<usize> {
        vec![]
    }

    /// The network to ship; the student itself for most.
    fn deploy(&self, student: Arc<dyn Model>) -> Result<Arc<dyn Model>> {
        Ok(student)
    }

    /// The loss of one step of the main training.
    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms>;

    /// The loss of one step of the initial phase `phase`, an index into [`Method::phases`]; `step.progress` counts the phase's own epochs.
    fn phase_loss(&mut self, phase: usize, _step: &StepView<'_>) -> Result<LossTerms> {
        Err(Error::refused(format!("{} has no initial phase {phase}", self.name())))
    }

    /// What resume needs besides [`Method::networks`] and [`Method::vars`], which the loop saves.
    fn state(&self) -> Result<StateDict> {
        Ok(StateDict::new())
    }

    /// Takes back what [`Method::state`] gave.
    fn load_state(&mut self, _state: &StateDict) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needs_merge_to_what_serves_both() {
        let n = Needs::supervised().merge(&Needs { teacher: vec![Cut::Logits, Cut::Stage(1)], views: 2, ..Needs::default() });
        assert!(n.labels);
        assert_eq!(n.views, 2);
        assert_eq!(n.student, [Cut::Logits]);
        assert_eq!(n.teacher, [Cut::Stage(1), Cut::Logits]);
    }

    #[test]
    fn total_is_the_weighted_sum() {
        let s = |v: f64| Tensor::new(v, &Device::Cpu).unwrap();
        let mut terms = LossTerms::one("a", s(2.0)).with_tag("b", s(3.0), 0.5, Tag::Task);
        terms.extend(LossTerms::one("c", s(1.0)).scaled(4.0));
        assert_eq!(terms.total().unwrap().to_scalar::<f64>().unwrap(), 7.5);
        assert_eq!(terms.total_of(Tag::Task).unwrap().unwrap().to_scalar::<f64>().unwrap(), 1.5);
        assert!(LossTerms::new().total().is_err());
    }
}
