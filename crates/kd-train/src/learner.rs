//! One student of a group: what it trains, where it stands, and its run directory.

use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use kd_core::{Batch, Cut, LossTerms, Mode, Model, Models, Needs, Outputs, Progress, Rng, Setup, StateDict, StepView, Trainable};

use crate::evaluate::evaluate_unless;
use crate::events::{Event, Sink, Split, StepReport, Subject};
use crate::job::{Objective, Outcome, Student, labels};
use crate::optim::{Optimiser, Part, Target, clip_scale, grad_norm};
use crate::parts::{self, fingerprint, home, tensors};
use crate::run_dir::{Checkpoint, RunDir};
use crate::state::{Best, EpochRecord, Exported, RunResult, RunState};
use crate::trainer::Course;
use crate::{Error, Evaluation, Result, checks};

/// The teachers' outputs on a batch, `[teacher][view]`, outside any graph.
pub(crate) type Lesson = Vec<Vec<Outputs>>;

/// A student at work.
pub(crate) struct Learner<'s> {
    own: Student,
    /// The union over all methods.
    needs: Needs,
    /// What each method is called in reports and checkpoints.
    labels: Vec<String>,
    parts: Vec<Part>,
    optimiser: Optimiser,
    state: RunState,
    class_means: Option<Tensor>,
    /// The best student, when there is no directory to keep it in.
    best: Option<StateDict>,
    /// Where the newest checkpoint stands.
    saved: Option<(usize, usize)>,
    /// The epoch whose beginning was told last.
    told: Option<usize>,
    /// Whether it is known that the losses reach every parameter.
    reached: bool,
    dtype: DType,
    device: Device,
    dir: Option<RunDir>,
    sink: &'s mut dyn Sink,
}

impl<'s> Learner<'s> {
    /// Everything up to the first step; `None` when stopped before it.
    pub(crate) fn prepare(
        course: &mut Course<'_>,
        mut own: Student,
        dir: Option<RunDir>,
        checkpoint: Option<Checkpoint>,
        sink: &'s mut dyn Sink,
    ) -> Result<Option<Self>> {
        let (state, mut tensors) = checkpoint.map_or((None, StateDict::new()), |(state, tensors)| (Some(state), tensors));
        let none = || Error::Refused("the student has no parameters to train".to_string());
        let (dtype, device) = home(own.model.as_ref()).ok_or_else(none)?;
        let class_means = match (needs_of(&own.objectives).class_means, tensors.remove("class_means")) {
            (false, _) => None,
            (true, Some(means)) => Some(means),
            (true, None) => match course.class_means()? {
                Some(means) => Some(means),
                None => return Ok(None),
            },
        };
        let class_means = class_means.map(|means| means.to_device(&device)?.to_dtype(dtype)).transpose()?;
        let (shared, models) = (&course.shared, &course.models);
        let setup = |i: usize| Setup {
            models: Models { student: own.model.as_ref(), teachers: models },
            classes: shared.data.classes,
            train_samples: shared.data.train.samples(),
            batch_size: shared.data.batch_size,
            class_means: class_means.as_ref(),
            class_groups: shared.data.class_groups.as_deref(),
            dtype,
            device: &device,
            rng: Rng::new(shared.seed).named("method").fork(i as u64),
        };
        own.objectives.iter_mut().enumerate().try_for_each(|(i, o)| o.method.prepare(&setup(i))).map_err(Error::Setup)?;
        checks::needs(shared, &own)?; // once more: cuts that follow from the shapes of both sides have joined

        let unused = own.objectives.iter().flat_map(|o| o.method.unused()).collect();
        let mut trained = parts_of("student".to_string(), &own.model, unused);
        if trained.is_empty() {
            return Err(none());
        }
        let labels = labels(&own.objectives);
        for (objective, label) in own.objectives.iter().zip(&labels) {
            for (i, network) in objective.method.networks().iter().enumerate() {
                trained.extend(parts_of(format!("{label}.network.{i}"), network, vec![]));
            }
            let vars = objective.method.vars().into_iter();
            trained.extend(vars.map(|(name, var)| Part { name: format!("{label}.var.{name}"), target: Target::Var(var), unused: vec![] }));
        }
        let mut learner = Self {
            needs: needs_of(&own.objectives),
            labels,
            optimiser: Optimiser::new(&own.optim, trained.clone())?,
            state: state.clone().unwrap_or_default(),
            saved: state.as_ref().map(|s| (s.epoch, s.batch)),
            class_means,
            best: None,
            told: None,
            reached: false,
            parts: trained,
            own,
            dtype,
            device,
            dir,
            sink,
        };
        learner.emit(&Event::Started {
            epochs: learner.own.schedule.epochs,
            steps_per_epoch: course.batches(),
            samples: course.shared.data.train.samples(),
            epoch: learner.state.epoch,
            step: learner.state.step,
        })?;
        let warnings = learner.dir.as_mut().map(|d| std::mem::take(&mut d.warnings)).unwrap_or_default();
        warnings.into_iter().try_for_each(|message| learner.emit(&Event::Warning { message }))?;
        match state {
            Some(_) => learner.load(&tensors)?,
            None if !learner.meet_teachers(course)? => return Ok(None),
            None => {}
        }
        if let Some(dir) = &learner.dir {
            let steps = learner.own.schedule.epochs * course.batches();
            let student = learner.student_tensors()?;
            dir.require_space(course.reserve(checks::bytes_needed(learner.tensors()?.values(), student.values(), steps)))?;
        }
        Ok(Some(learner))
    }

    /// The present epoch and the next batch in it.
    pub(crate) fn position(&self) -> (usize, usize) {
        (self.state.epoch, self.state.batch)
    }

    /// What its methods want computed.
    pub(crate) fn needs(&self) -> &Needs {
        &self.needs
    }

    /// One step on a batch for which the group waited, and whose lesson it has after `common` seconds.
    pub(crate) fn learn(&mut self, course: &Course<'_>, batch: &Batch, lesson: &Lesson, waiting: f64, common: f64) -> Result<()> {
        if self.told.replace(self.state.epoch) != Some(self.state.epoch) {
            self.emit(&Event::EpochStarted { epoch: self.state.epoch, lr: self.lr(course) })?;
        }
        let begun = Instant::now();
        let mut report = self.step(course, batch, lesson)?;
        // As if it had been alone: what it shares counts for each.
        report.seconds = common + begun.elapsed().as_secs_f64();
        report.waiting = waiting;
        self.state.batch += 1;
        self.state.step += 1;
        self.state.seconds += report.seconds;
        self.state.waiting += waiting;
        self.state.images += report.images;
        self.emit(&Event::Step(report))?;
        let every = self.own.options.checkpoint_steps;
        if every > 0 && self.state.step.is_multiple_of(every) && self.state.batch < course.batches() {
            self.checkpoint()?;
        }
        Ok(())
    }

    /// What follows on an epoch's last batch; the outcome when that was the last epoch, or when stopped.
    pub(crate) fn end_epoch(&mut self, course: &mut Course<'_>) -> Result<Option<Outcome>> {
        if !self.evaluate_epoch(course)? {
            return self.interrupt().map(Some);
        }
        (self.state.epoch, self.state.batch) = (self.state.epoch + 1, 0);
        let every = self.own.options.checkpoint_every;
        if self.state.epoch == self.own.schedule.epochs || (every > 0 && self.state.epoch.is_multiple_of(every)) {
            self.checkpoint()?;
        }
        self.finish_if_done(course)
    }

    /// Saves a checkpoint before leaving.
    pub(crate) fn interrupt(&mut self) -> Result<Outcome> {
        self.checkpoint()?;
        Ok(Outcome::Interrupted { epoch: self.state.epoch, step: self.state.step })
    }

    /// After the last epoch, exports the student and writes the result.
    pub(crate) fn finish_if_done(&mut self, course: &mut Course<'_>) -> Result<Option<Outcome>> {
        if self.state.epoch < self.own.schedule.epochs {
            return Ok(None);
        }
        let best = self.state.best.filter(|_| course.shared.data.validation.is_some());
        if let Some(best) = &best {
            let student = match (&self.dir, self.best.take()) {
                (Some(dir), _) => dir.load_best(best)?,
                (None, kept) => kept.unwrap_or_default(),
            };
            parts::assign(self.own.model.as_ref(), "the best checkpoint", |name| student.get(name).cloned())?;
        }
        let mut test = self.state.history.last().filter(|r| r.split == Split::Test).map(|r| r.evaluation);
        if test.is_none() && course.shared.data.test.is_some() {
            let Some(evaluation) = self.evaluate(course, Split::Test)? else { return self.interrupt().map(Some) };
            let epochs = best.map_or(self.state.epoch, |b| b.record.epochs);
            self.emit(&Event::Evaluated { subject: Subject::Student, split: Split::Test, epochs, evaluation, best: false })?;
            test = Some(evaluation);
        }
        let deployed = self.deployed()?;
        let state = &self.state;
        let result = RunResult {
            epochs: state.epoch,
            steps: state.step,
            history: state.history.clone(),
            best: state.best.map(|b| b.record),
            exported: if best.is_some() { Exported::Best } else { Exported::Last },
            test,
            teachers: state.teachers.clone(),
            fingerprint: fingerprint(deployed.as_ref())?,
            seconds: state.seconds,
            images_per_second: state.images as f64 / state.seconds,
            waiting_share: state.waiting / state.seconds,
        };
        if let Some(dir) = &mut self.dir {
            dir.finish(&tensors(deployed.as_ref())?, &result)?;
        }
        self.emit(&Event::Finished(Box::new(result.clone())))?;
        Ok(Some(Outcome::Finished(Box::new(result))))
    }

    /// Outputs, loss, gradients, update.
    fn step(&mut self, course: &Course<'_>, batch: &Batch, lesson: &Lesson) -> Result<StepReport> {
        let batch = self.on_device(batch)?;
        let teachers = self.own_part(lesson)?;
        let student = self.outputs(course, &batch)?;
        let terms = self.loss_terms(course, &batch, &student, &teachers)?;
        let loss = terms.total()?;
        let (loss_value, values) = self.read(&terms, &loss, &batch)?;

        let networks: Vec<&dyn Model> = self.parts.iter().filter_map(|p| p.network()).collect();
        let mut grads = kd_nn::backward(&loss, &networks)?;
        self.check_reached(&grads)?;
        let idle = self.idle();
        let mut flat = grads.networks.drain(..);
        let gradient = |part: &Part| match &part.target {
            Target::Network(_) => Ok(flat.next().flatten().map(|n| n.flat).filter(|_| !idle.contains(&part.name))),
            // As in a flat gradient, a loss that is silent for now leaves zero.
            Target::Var(var) => grads.store.get(var).map_or_else(|| var.zeros_like(), |g| Ok(g.clone())).map(Some),
        };
        let grads: Vec<Option<Tensor>> = self.parts.iter().map(gradient).collect::<candle_core::Result<_>>()?;
        let norm = grad_norm(&grads)?;
        if !norm.is_finite() {
            return Err(non_finite(&self.state, "the gradient's norm".to_string(), norm, &batch));
        }
        let lr = self.lr(course);
        self.optimiser.step(&grads, lr, clip_scale(norm, self.own.optim.clip_grad_norm))?;
        Ok(StepReport {
            epoch: self.state.epoch,
            step: self.state.step,
            lr,
            loss: loss_value,
            terms: values,
            grad_norm: norm,
            images: batch.len(),
            seconds: 0.0,
            waiting: 0.0,
        })
    }

    /// Of what the teachers said, what this student's methods asked for: the views and cuts that others wanted are none of its business.
    fn own_part(&self, lesson: &Lesson) -> Result<Vec<Vec<Outputs>>> {
        let here = |t: &Tensor| t.to_device(&self.device)?.to_dtype(self.dtype);
        let outputs = |said: &Outputs| {
            let wanted = said.iter().filter(|(cut, _)| self.needs.teacher.contains(cut));
            Ok(Outputs::new(wanted.map(|(cut, t)| Ok((cut, here(t)?))).collect::<Result<Vec<_>>>()?))
        };
        let views = if self.needs.teacher.is_empty() { 0 } else { self.needs.views };
        lesson.iter().map(|said| said.iter().take(views).map(outputs).collect()).collect()
    }

    fn outputs(&self, course: &Course<'_>, batch: &Batch) -> Result<Vec<Outputs>> {
        let rng = Rng::new(course.shared.seed).named("student").fork(self.state.step as u64);
        let run = |(view, images): (usize, &Tensor)| {
            Ok(self.own.model.run(images, Cut::Input, &self.needs.student, Mode::Train(rng.fork(view as u64)))?)
        };
        batch.images.iter().enumerate().map(run).collect()
    }

    /// The terms of every method with weight and warm-up in them, named `<method>.<term>`.
    fn loss_terms(&mut self, course: &Course<'_>, batch: &Batch, student: &[Outputs], teachers: &[Vec<Outputs>]) -> Result<LossTerms> {
        let progress = self.progress(course);
        let rng = Rng::new(course.shared.seed).named("loss").fork(progress.step as u64);
        let models = Models { student: self.own.model.as_ref(), teachers: &course.models };
        let mut all = LossTerms::new();
        for (i, (objective, label)) in self.own.objectives.iter_mut().zip(&self.labels).enumerate() {
            let view = StepView { student, teachers, models, batch, progress, rng: rng.fork(i as u64) };
            let factor = objective.factor(progress.epoch);
            let terms = objective.method.loss(&view).map_err(|e| match e {
                kd_core::Error::NonFinite { what, value, .. } => non_finite(&self.state, format!("{what} of {label}"), value, batch),
                e => e.into(),
            })?;
            all.extend(terms.scaled(factor).prefixed(label));
        }
        Ok(all)
    }

    /// The values of the total and of every weighted term; all must be finite.
    fn read(&self, terms: &LossTerms, total: &Tensor, batch: &Batch) -> Result<(f64, Vec<(String, f64)>)> {
        let scalar = |t: &Tensor| t.detach().to_dtype(DType::F64)?.to_scalar::<f64>();
        let mut values = Vec::with_capacity(terms.terms.len());
        for term in &terms.terms {
            let value = scalar(&term.raw)? * term.weight;
            if !value.is_finite() {
                return Err(non_finite(&self.state, format!("loss term {}", term.name), value, batch));
            }
            values.push((term.name.clone(), value));
        }
        let total = scalar(total)?;
        if !total.is_finite() {
            return Err(non_finite(&self.state, "the loss".to_string(), total, batch));
        }
        Ok((total, values))
    }

    /// Once, in the first step in which no loss is silent.
    fn check_reached(&mut self, grads: &kd_nn::Gradients) -> Result<()> {
        let epoch = self.state.epoch;
        if self.reached || self.own.objectives.iter().any(|o| o.weight != 0.0 && o.factor(epoch) == 0.0) {
            return Ok(());
        }
        let silent = self.own.objectives.iter().zip(&self.labels).filter(|(o, _)| o.weight == 0.0);
        let silent: Vec<String> = silent.map(|(_, label)| format!("{label}.")).collect();
        let idle = self.idle();
        checks::reached(&self.parts, grads, |part| silent.iter().any(|prefix| part.name.starts_with(prefix)) || idle.contains(&part.name))?;
        self.reached = true;
        Ok(())
    }

    /// Names of the methods' networks that take no part in this epoch: they stay as they are.
    fn idle(&self) -> Vec<String> {
        let names = |(o, label): (&Objective, &String)| {
            o.method.idle(self.state.epoch).into_iter().map(|i| format!("{label}.network.{i}")).collect::<Vec<_>>()
        };
        self.own.objectives.iter().zip(&self.labels).flat_map(names).collect()
    }

    /// Evaluates the student when it is due after the present epoch; `false` when stopped.
    fn evaluate_epoch(&mut self, course: &mut Course<'_>) -> Result<bool> {
        let epochs = self.state.epoch + 1;
        let every = self.own.options.eval_every;
        if epochs < self.own.schedule.epochs && (every == 0 || !epochs.is_multiple_of(every)) {
            return Ok(true);
        }
        let split = if course.shared.data.validation.is_some() { Split::Validation } else { Split::Test };
        let Some(evaluation) = self.evaluate(course, split)? else { return Ok(!course.stopped()) };
        let record = EpochRecord { epochs, split, evaluation };
        let best = self.state.best.is_none_or(|b| evaluation.top1 > b.record.evaluation.top1);
        if best {
            let student = self.student_tensors()?;
            self.state.best = Some(match &mut self.dir {
                Some(dir) => dir.save_best(record, &student)?,
                None => Best { generation: 0, record },
            });
            self.best = self.dir.is_none().then_some(student);
        }
        self.state.history.push(record);
        self.emit(&Event::Evaluated { subject: Subject::Student, split, epochs, evaluation, best })?;
        Ok(true)
    }

    /// `None` when stopped, or when there is no such split.
    fn evaluate(&self, course: &mut Course<'_>, split: Split) -> Result<Option<Evaluation>> {
        let deployed = self.deployed()?;
        let source = match split {
            Split::Validation => &mut course.shared.data.validation,
            Split::Test => &mut course.shared.data.test,
            Split::Train => &mut course.shared.data.plain,
        };
        source.as_mut().map_or(Ok(None), |source| evaluate_unless(deployed.as_ref(), source.as_mut(), course.stop))
    }

    /// Refuses bad teachers; `false` when stopped.
    fn meet_teachers(&mut self, course: &mut Course<'_>) -> Result<bool> {
        let Some((split, evaluations)) = course.teacher_evaluations()? else { return Ok(false) };
        for (teacher, &evaluation) in course.shared.teachers.iter().zip(&evaluations) {
            let verdict = checks::teacher(teacher, &evaluation, split, course.shared.data.classes);
            let subject = Subject::Teacher(teacher.name.clone());
            self.emit(&Event::Evaluated { subject, split, epochs: 0, evaluation, best: false })?;
            match verdict {
                Err(e) if self.own.options.allow_bad_teacher => self.emit(&Event::Warning { message: e.to_string() })?,
                verdict => verdict?,
            }
        }
        self.state.teachers = evaluations;
        Ok(true)
    }

    /// Saves everything that the next step depends on.
    fn checkpoint(&mut self) -> Result<()> {
        let position = self.position();
        if self.dir.is_none() || self.saved == Some(position) {
            return Ok(());
        }
        let tensors = self.tensors()?;
        if let Some(dir) = &mut self.dir {
            let path = dir.save_last(&mut self.state, &tensors)?;
            self.saved = Some(position);
            self.emit(&Event::Checkpointed { step: self.state.step, path })?;
        }
        Ok(())
    }

    /// The network to ship, as the methods make it of the student.
    fn deployed(&self) -> Result<Arc<dyn Model>> {
        let student = Arc::clone(&self.own.model);
        Ok(self.own.objectives.iter().try_fold(student, |network, o| o.method.deploy(network))?)
    }

    fn lr(&self, course: &Course<'_>) -> f64 {
        self.own.schedule.lr(self.own.optim.lr, self.state.epoch, self.state.step, course.batches())
    }

    fn progress(&self, course: &Course<'_>) -> Progress {
        let (epochs, steps_per_epoch) = (self.own.schedule.epochs, course.batches());
        Progress { epoch: self.state.epoch, epochs, step: self.state.step, steps_per_epoch }
    }

    /// The batch as the student takes it, with no more views than the methods want.
    fn on_device(&self, batch: &Batch) -> Result<Batch> {
        if batch.images.len() < self.needs.views {
            let (have, want) = (batch.images.len(), self.needs.views);
            return Err(Error::Refused(format!("a method needs {want} augmented views of each sample, the training set gives {have}")));
        }
        let images = batch.images.iter().take(self.needs.views);
        Ok(Batch {
            images: images.map(|t| Ok(t.to_device(&self.device)?.to_dtype(self.dtype)?)).collect::<Result<_>>()?,
            labels: batch.labels.to_device(&self.device)?,
            targets: batch.targets.as_ref().map(|t| t.to_device(&self.device)?.to_dtype(self.dtype)).transpose()?,
            indices: batch.indices.to_device(&self.device)?,
        })
    }

    /// Tells the file first, then everybody else.
    fn emit(&mut self, event: &Event) -> Result<()> {
        if let Some(dir) = &mut self.dir {
            dir.event(event)?;
        }
        self.sink.event(event)
    }

    fn student_tensors(&self) -> Result<StateDict> {
        Ok(tensors(self.own.model.as_ref())?.into_iter().collect())
    }

    /// Everything of a checkpoint that is a tensor, by `student/`, `optim/`, `<method>.network.<i>/`, `<method>.var/`, `<method>.state/`.
    fn tensors(&self) -> Result<StateDict> {
        let mut all = StateDict::new();
        let mut add = |prefix: String, tensors: &mut dyn Iterator<Item = (String, Tensor)>| {
            all.extend(tensors.map(|(name, tensor)| (format!("{prefix}/{name}"), tensor)));
        };
        add("student".to_string(), &mut tensors(self.own.model.as_ref())?.into_iter());
        add("optim".to_string(), &mut self.optimiser.state()?.into_iter());
        for (objective, label) in self.own.objectives.iter().zip(&self.labels) {
            for (i, network) in objective.method.networks().iter().enumerate() {
                add(format!("{label}.network.{i}"), &mut tensors(network.as_ref())?.into_iter());
            }
            add(format!("{label}.var"), &mut objective.method.vars().into_iter().map(|(name, var)| (name, var.as_detached_tensor())));
            add(format!("{label}.state"), &mut objective.method.state()?.into_iter());
        }
        all.extend(self.class_means.iter().map(|means| ("class_means".to_string(), means.clone())));
        Ok(all)
    }

    /// Puts back what [`Learner::tensors`] gave.
    fn load(&mut self, all: &StateDict) -> Result<()> {
        const WHO: &str = "the checkpoint";
        let under = |prefix: &str, name: &str| all.get(&format!("{prefix}/{name}")).cloned();
        let below = |prefix: &str| -> StateDict {
            all.iter().filter_map(|(key, t)| Some((key.strip_prefix(prefix)?.strip_prefix('/')?.to_string(), t.clone()))).collect()
        };
        parts::assign(self.own.model.as_ref(), WHO, |name| under("student", name))?;
        self.optimiser.load_state(&below("optim"))?;
        for (objective, label) in self.own.objectives.iter_mut().zip(&self.labels) {
            for (i, network) in objective.method.networks().iter().enumerate() {
                parts::assign(network.as_ref(), WHO, |name| under(&format!("{label}.network.{i}"), name))?;
            }
            for (name, var) in objective.method.vars() {
                let value = under(&format!("{label}.var"), &name).ok_or_else(|| kd_core::Error::missing(WHO, name))?;
                var.set(&value.to_device(var.device())?)?;
            }
            let state = below(&format!("{label}.state"));
            let state = state.into_iter().map(|(name, t)| Ok((name, t.to_device(&self.device)?))).collect::<Result<_>>()?;
            objective.method.load_state(&state)?;
        }
        Ok(())
    }
}

/// The union over all methods.
fn needs_of(objectives: &[Objective]) -> Needs {
    objectives.iter().fold(Needs { student: vec![], ..Needs::default() }, |all, o| all.merge(&o.method.needs()))
}

fn non_finite(state: &RunState, what: String, value: f64, batch: &Batch) -> Error {
    let samples = batch.indices.to_dtype(DType::I64).and_then(|t| t.to_vec1::<i64>());
    let samples = samples.map_or("unknown".to_string(), |s| s.iter().map(i64::to_string).collect::<Vec<_>>().join(" "));
    Error::NonFinite { what, value, epoch: state.epoch, step: state.step, samples }
}

/// What of a network is trained.
fn parts_of(name: String, network: &Arc<dyn Model>, unused: Vec<String>) -> Vec<Part> {
    match network.trainable() {
        Trainable::Frozen => vec![],
        Trainable::Flat => vec![Part { name, target: Target::Network(Arc::clone(network)), unused }],
        Trainable::Vars(vars) => {
            let part = |(i, var)| Part { name: format!("{name}.var.{i}"), target: Target::Var(var), unused: vec![] };
            vars.into_iter().enumerate().map(part).collect()
        }
    }
}
