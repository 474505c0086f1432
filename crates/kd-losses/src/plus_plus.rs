//! What KD++'s recipes share: a warmed-up logit loss beside cross-entropy and nd.

use std::sync::Arc;

use candle_core::Tensor;
use kd_core::{Cut, Error, LossTerms, Method, Model, Needs, ParamDoc, ParityInputs, ParityOutput, Result, Setup, StepView};
use serde::de::DeserializeOwned;

use crate::class_means::ClassMeans;
use crate::nd::Prepared;
use crate::registry::parity_labels;
use crate::{Side, adapter, labels, nd};

/// The parameters of one recipe, and its loss.
pub(crate) trait Recipe: DeserializeOwned + Send {
    /// The method's name.
    const NAME: &'static str;

    /// Those of its nd.
    fn nd(&self) -> nd::Params;

    /// The loss in an epoch, counted from 0; the student's embedding is adapted already.
    fn terms(&self, student: Side<'_>, teacher: Side<'_>, means: &ClassMeans, labels: &Tensor, epoch: usize) -> Result<LossTerms>;
}

/// A recipe as a method.
pub(crate) struct PlusPlus<R> {
    recipe: R,
    prepared: Prepared,
}

impl<R> PlusPlus<R> {
    pub(crate) fn new(recipe: R) -> Self {
        Self { recipe, prepared: Prepared::default() }
    }
}

impl<R: Recipe> Method for PlusPlus<R> {
    fn name(&self) -> &'static str {
        R::NAME
    }

    fn needs(&self) -> Needs {
        needs()
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        self.prepared = Prepared::new(setup, self.recipe.nd().adapter_config(), R::NAME)?;
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        adapter::networks(self.prepared.adapter.as_ref())
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let adapted = adapter::apply(self.prepared.adapter.as_ref(), step)?;
        let (student, teacher) = (step.student()?, step.teacher()?);
        let student = Side { logits: student.logits()?, embedding: &adapted };
        let teacher = Side { logits: teacher.logits()?, embedding: teacher.embedding()? };
        self.recipe.terms(student, teacher, self.prepared.means(R::NAME)?, labels::of(step.batch), step.progress.epoch)
    }
}

/// Logits and embeddings of both sides, labels, class means.
pub(crate) fn needs() -> Needs {
    let cuts = vec![Cut::Embedding, Cut::Logits];
    Needs { student: cuts.clone(), teacher: cuts, class_means: true, ..Needs::supervised() }
}

/// A recipe's parity function.
pub(crate) fn parity<R: Recipe>(inputs: &ParityInputs) -> Result<ParityOutput> {
    let (epoch, inputs) = parity_epoch(inputs)?;
    let recipe: R = inputs.params()?;
    let means = ClassMeans::new(inputs.get("class_means")?)?;
    let adapted = recipe.nd().adapter_config().parity(&inputs, means.dims().1)?;
    let student = Side { logits: inputs.get("student.logits")?, embedding: &adapted };
    let teacher = Side { logits: inputs.get("teacher.logits")?, embedding: inputs.get("teacher.embedding")? };
    Ok(recipe.terms(student, teacher, &means, parity_labels(&inputs)?, epoch)?.into())
}

/// Takes the fixture-only `epoch` out of a parity call's parameters.
pub(crate) fn parity_epoch(inputs: &ParityInputs) -> Result<(usize, ParityInputs)> {
    let mut params = inputs.params.clone();
    let epoch = params.as_object_mut().and_then(|p| p.remove("epoch")).ok_or_else(|| Error::missing("the warm-up", "epoch"))?;
    let number = epoch.as_u64().ok_or_else(|| Error::param("epoch", &epoch, "a whole number of at least 0"))?;
    Ok((number as usize, ParityInputs { tensors: inputs.tensors.clone(), params, dtype: inputs.dtype }))
}

pub(crate) const CE_WEIGHT: ParamDoc = ParamDoc { name: "ce_weight", default: "1.0", range: ">= 0", about: "weight of the cross-entropy" };
pub(crate) const TEMPERATURE: ParamDoc = ParamDoc { name: "temperature", default: "4.0", range: "> 0", about: "T" };
pub(crate) const WARMUP_EPOCHS: ParamDoc =
    ParamDoc { name: "warmup_epochs", default: "20", range: ">= 0", about: "linear warm-up of the distillation, epochs counted from 0" };
