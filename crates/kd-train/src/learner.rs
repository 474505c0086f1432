//! One student of a group: what it trains, where it stands, and its run directory.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use kd_core::{Batch, Cut, LossTerms, Mode, Model, Models, Outputs, Progress, Rng, Setup, StateDict, StepView, Tag};

use crate::evaluate::evaluate_unless;
use crate::events::{Event, Sink, Split, StepParts, StepReport, Subject};
use crate::job::{Objective, Outcome, Student, labels};
use crate::optim::{Part, SplitGradient, Target, clip_scale, grad_norm};
use crate::parts::{self, fingerprint, home, tensors};
use crate::run_dir::{Checkpoint, RunDir};
use crate::stage::{Lead, Stage, Wants, parts_of};
use crate::state::{Best, EpochRecord, Exported, RunResult, RunState};
use crate::trainer::Course;
use crate::{Error, Evaluation, Result, checks};

/// The teachers' outputs on a batch, `[teacher][view]`, outside any graph.
pub(crate) type Lesson = Vec<Vec<Outputs>>;

/// What the losses that need labels see of a step in which some images have none.
struct Labelled {
    batch: Batch,
    student: Vec<Outputs>,
    teachers: Vec<Vec<Outputs>>,
}

impl Labelled {
    /// `None` where all images have labels.
    fn of(batch: &Batch, student: &[Outputs], teachers: &[Vec<Outputs>]) -> Result<Option<Self>> {
        let Some(rows) = batch.labelled()? else { return Ok(None) };
        let of = |outputs: &[Outputs]| outputs.iter().map(|o| o.rows(&rows)).collect::<kd_core::Result<Vec<_>>>();
        Ok(Some(Self {
            batch: batch.rows(&rows)?,
            student: of(student)?,
            teachers: teachers.iter().map(|t| of(t)).collect::<kd_core::Result<_>>()?,
        }))
    }
}

/// A student at work.
pub(crate) struct Learner<'s> {
    own: Student,
    /// What each method is called in reports and checkpoints.
    labels: Vec<String>,
    /// The teacher that each method sees; `None` where there is none, or the mean of several.
    sees: Vec<Option<usize>>,
    leads: Vec<Lead>,
    stage: Stage,
    state: RunState,
    /// By teacher.
    class_means: BTreeMap<usize, Tensor>,
    /// The best student, when there is no directory to keep it in.
    best: Option<StateDict>,
    /// Where the newest checkpoint stands.
    saved: Option<(usize, usize)>,
    /// The epoch whose beginning was told last.
    told: Option<usize>,
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
        let sees = own.objectives.iter().map(|o| o.sees(&course.shared.teachers)).collect::<Result<Vec<_>>>()?;
        let mut class_means = BTreeMap::new();
        for (objective, seen) in own.objectives.iter().zip(&sees) {
            if let Some(t) = *seen
                && objective.all_needs().iter().any(|n| n.class_means)
                && !class_means.contains_key(&t)
            {
                let Some(means) = tensors.remove(&means_key(t)).map_or_else(|| course.class_means(t), |m| Ok(Some(m)))? else {
                    return Ok(None);
                };
                class_means.insert(t, means.to_device(&device)?.to_dtype(dtype)?);
            }
        }
        let (shared, models) = (&course.shared, &course.models);
        let setup = |i: usize| Setup {
            models: Models { student: own.model.as_ref(), teachers: seen_of(sees[i], models) },
            classes: shared.data.classes,
            train_samples: shared.data.train.records(),
            train_labels: shared.data.train.labels(),
            batch_size: shared.data.batch_size,
            class_means: sees[i].and_then(|t| class_means.get(&t)),
            class_groups: shared.data.class_groups.as_deref(),
            dtype,
            device: &device,
            rng: Rng::new(shared.seed).named("method").fork(i as u64),
        };
        own.objectives.iter_mut().enumerate().try_for_each(|(i, o)| o.method.prepare(&setup(i))).map_err(Error::Setup)?;
        checks::needs(shared, &own)?; // once more: cuts that follow from the shapes of both sides have joined
        if parts_of("student".to_string(), &own.model, vec![]).is_empty() {
            return Err(none());
        }
        let leads = Lead::all(&own);
        let labels = labels(&own.objectives);
        let at = state.as_ref().map_or(0, |s| s.epoch);
        let mut learner = Self {
            stage: Stage::at(at, &own, &labels, &leads, &sees, shared)?,
            labels,
            sees,
            leads,
            state: state.clone().unwrap_or_default(),
            saved: state.as_ref().map(|s| (s.epoch, s.batch)),
            class_means,
            best: None,
            told: None,
            own,
            dtype,
            device,
            dir,
            sink,
        };
        learner.emit(&Event::Started {
            epochs: learner.own.schedule.epochs,
            phases: learner.leads.iter().map(|l| (l.phase.name.clone(), l.phase.epochs)).collect(),
            steps_per_epoch: course.batches(),
            samples: course.shared.data.train.samples(),
            epoch: learner.epoch(),
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
            let steps = learner.epochs() * course.batches();
            let student = learner.student_tensors()?;
            dir.require_space(course.reserve(checks::bytes_needed(learner.tensors()?.values(), student.values(), steps)))?;
        }
        Ok(Some(learner))
    }

    /// The present epoch and the next batch in it.
    pub(crate) fn position(&self) -> (usize, usize) {
        (self.state.epoch, self.state.batch)
    }

    /// What its methods want computed now.
    pub(crate) fn wants(&self) -> &Wants {
        &self.stage.wants
    }

    /// Epochs of the whole run, and views of each sample that it wants at some time.
    pub(crate) fn extent(&self) -> (usize, usize) {
        (self.epochs(), self.own.objectives.iter().map(Objective::views).fold(1, usize::max))
    }

    /// Epochs of the whole run.
    fn epochs(&self) -> usize {
        self.leads.iter().map(|l| l.phase.epochs).sum::<usize>() + self.own.schedule.epochs
    }

    /// The present epoch of the present stage.
    fn epoch(&self) -> usize {
        self.state.epoch - self.stage.first
    }

    /// The initial phase that it is in.
    fn lead(&self) -> Option<&Lead> {
        self.stage.lead.map(|i| &self.leads[i])
    }

    /// One step on a batch for which the group waited, and whose lesson it has after `common` seconds.
    pub(crate) fn learn(&mut self, course: &Course<'_>, batch: &Batch, lesson: &Lesson, waiting: f64, common: f64) -> Result<()> {
        if self.told.replace(self.state.epoch) != Some(self.state.epoch) {
            self.emit(&Event::EpochStarted { epoch: self.epoch(), phase: self.phase(), lr: self.lr(course) })?;
        }
        let begun = Instant::now();
        let mut report = self.step(course, batch, lesson)?;
        // As if it had been alone: what it shares counts for each.
        report.seconds = common + begun.elapsed().as_secs_f64();
        report.waiting = waiting;
        report.parts.teacher += common - waiting;
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
        if self.lead().is_some_and(|lead| self.epoch() == lead.phase.epochs) {
            self.stage = Stage::at(self.state.epoch, &self.own, &self.labels, &self.leads, &self.sees, &course.shared)?;
        }
        let every = self.own.options.checkpoint_every;
        if self.state.epoch == self.epochs() || (every > 0 && self.state.epoch.is_multiple_of(every)) {
            self.checkpoint()?;
        }
        self.finish_if_done(course)
    }

    /// Saves a checkpoint before leaving.
    pub(crate) fn interrupt(&mut self) -> Result<Outcome> {
        self.checkpoint()?;
        Ok(Outcome::Interrupted { epoch: self.epoch(), step: self.state.step })
    }

    /// After the last epoch, exports the student and writes the result.
    pub(crate) fn finish_if_done(&mut self, course: &mut Course<'_>) -> Result<Option<Outcome>> {
        if self.state.epoch < self.epochs() {
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
            let epochs = best.map_or(self.epoch(), |b| b.record.epochs);
            self.emit(&Event::Evaluated { subject: Subject::Student, split: Split::Test, epochs, evaluation, best: false })?;
            test = Some(evaluation);
        }
        let deployed = self.deployed()?;
        let state = &self.state;
        let result = RunResult {
            epochs: self.epoch(),
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
        let mut clock = Instant::now();
        let mut lap = || std::mem::replace(&mut clock, Instant::now()).elapsed().as_secs_f64();
        let batch = self.on_device(batch)?;
        let teachers = self.heard(course, lesson)?;
        let mut parts = StepParts { teacher: lap(), ..StepParts::default() };
        let student = self.outputs(course, &batch)?;
        parts.student = lap();
        let terms = self.loss_terms(course, &batch, &student, &teachers)?;
        let loss = terms.total()?;
        let (loss_value, values) = self.read(&terms, &loss, &batch)?;
        parts.loss = lap();

        let lr = self.lr(course);
        let norm = if self.stage.optimiser.splits() {
            self.update_split(&terms, &batch, lr, || parts.backward = lap())?
        } else {
            self.update(&loss, &batch, lr, || parts.backward = lap())?
        };
        parts.update = lap();
        Ok(StepReport {
            epoch: self.epoch(),
            phase: self.phase(),
            step: self.state.step,
            lr,
            loss: loss_value,
            terms: values,
            grad_norm: norm,
            images: batch.len(),
            seconds: 0.0,
            waiting: 0.0,
            parts,
        })
    }

    /// What the methods hear of the teachers, by view: each teacher's cuts that they asked for, as the views and cuts that others wanted are
    /// none of their business, and behind them the mean of the logits, where some method sees that.
    fn heard(&self, course: &Course<'_>, lesson: &Lesson) -> Result<Lesson> {
        let here = |t: &Tensor| t.to_device(&self.device)?.to_dtype(self.dtype);
        let mut all = vec![];
        for (said, cuts) in lesson.iter().zip(&self.stage.wants.teachers) {
            let outputs = |said: &Outputs| {
                let wanted = said.iter().filter(|(cut, _)| cuts.contains(cut));
                Ok(Outputs::new(wanted.map(|(cut, t)| Ok((cut, here(t)?))).collect::<Result<Vec<_>>>()?))
            };
            let views = if cuts.is_empty() { 0 } else { self.stage.wants.needs.views };
            all.push(said.iter().take(views).map(outputs).collect::<Result<Vec<_>>>()?);
        }
        if self.stage.wants.mean {
            let total: f64 = course.shared.teachers.iter().map(|t| t.weight).sum();
            let shares: Vec<_> = all.iter().zip(&course.shared.teachers).filter(|(_, t)| t.weight > 0.0).collect();
            let views = shares.iter().map(|(said, _)| said.len()).min().unwrap_or(0);
            let mut mean = vec![];
            for view in 0..views {
                let mut sum: Option<Tensor> = None;
                for (said, teacher) in &shares {
                    let part = (said[view].logits()? * (teacher.weight / total))?;
                    sum = Some(sum.map_or_else(|| Ok(part.clone()), |sum| sum + &part)?);
                }
                mean.push(Outputs::new(sum.map(|t| (Cut::Logits, t))));
            }
            all.push(mean);
        }
        Ok(all)
    }

    /// One for each view; without a pass where no cut is wanted.
    fn outputs(&self, course: &Course<'_>, batch: &Batch) -> Result<Vec<Outputs>> {
        let rng = Rng::new(course.shared.seed).named("student").fork(self.state.step as u64);
        let cuts = &self.stage.wants.needs.student;
        let run = |(view, images): (usize, &Tensor)| match cuts.is_empty() {
            true => Ok(Outputs::default()),
            false => Ok(self.own.model.run(images, Cut::Input, cuts, Mode::Train(rng.fork(view as u64)))?),
        };
        batch.images.iter().enumerate().map(run).collect()
    }

    /// The terms of every method with weight and warm-up in them, named `<method>.<term>`; of an initial phase, those of its method alone.
    fn loss_terms(&mut self, course: &Course<'_>, batch: &Batch, student: &[Outputs], teachers: &[Vec<Outputs>]) -> Result<LossTerms> {
        let progress = self.progress(course);
        let rng = Rng::new(course.shared.seed).named("loss").fork(self.state.step as u64);
        let lead = self.lead().map(|l| (l.objective, l.index));
        let lead_needs_labels = self.lead().is_some_and(|l| l.phase.needs.labels);
        let labelled = match course.shared.data.train.unlabelled() {
            0 => None,
            _ => Labelled::of(batch, student, teachers)?,
        };
        let mut all = LossTerms::new();
        for (i, (objective, label)) in self.own.objectives.iter_mut().zip(&self.labels).enumerate() {
            let several = course.models.len() > 1;
            let needs_labels = if lead.is_some() { lead_needs_labels } else { objective.method.needs().labels };
            let (batch, student, teachers) = match labelled.as_ref().filter(|_| needs_labels) {
                Some(part) if part.batch.is_empty() => continue,
                Some(part) => (&part.batch, part.student.as_slice(), part.teachers.as_slice()),
                None => (batch, student, teachers),
            };
            let view = StepView {
                student,
                teachers: match self.sees[i] {
                    Some(t) => std::slice::from_ref(&teachers[t]),
                    None if several => &teachers[course.models.len()..], // the mean
                    None => &[],
                },
                models: Models { student: self.own.model.as_ref(), teachers: seen_of(self.sees[i], &course.models) },
                batch,
                progress,
                rng: rng.fork(i as u64),
            };
            let terms = match lead {
                None => objective.method.loss(&view).map(|terms| terms.scaled(objective.factor(progress.epoch))),
                Some((whose, phase)) if whose == i => objective.method.phase_loss(phase, &view),
                Some(_) => continue,
            };
            let terms = terms.map_err(|e| match e {
                kd_core::Error::NonFinite { what, value, .. } => non_finite(&self.state, format!("{what} of {label}"), value, batch),
                e => e.into(),
            })?;
            all.extend(terms.prefixed(label));
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

    /// Backward, norm, clipping and the optimiser's step on the whole loss; the gradient's norm.
    fn update(&mut self, loss: &Tensor, batch: &Batch, lr: f64, differentiated: impl FnOnce()) -> Result<f64> {
        let networks: Vec<&dyn Model> = self.stage.parts.iter().filter_map(|p| p.network()).collect();
        let mut grads = kd_nn::backward(loss, &networks)?;
        self.check_reached(&[&grads])?;
        let idle = self.idle();
        let mut flat = grads.networks.drain(..);
        let gradient = |part: &Part| match &part.target {
            Target::Network(_) => Ok(flat.next().flatten().map(|n| n.flat).filter(|_| !idle.contains(&part.name))),
            // A phase leaves alone what it has no use for.
            Target::Var(var) if self.lead().is_some() => Ok(grads.store.get(var).cloned()),
            // As in a flat gradient, a loss that is silent for now leaves zero.
            Target::Var(var) => grads.store.get(var).map_or_else(|| var.zeros_like(), |g| Ok(g.clone())).map(Some),
        };
        let grads: Vec<Option<Tensor>> = self.stage.parts.iter().map(gradient).collect::<candle_core::Result<_>>()?;
        differentiated();
        let norm = self.norm(&grads, batch)?;
        self.stage.optimiser.step(&grads, lr, clip_scale(norm, self.own.optim.clip_grad_norm))?;
        Ok(norm)
    }

    /// The same with one backward pass for the terms of either tag; the norm is that of the sum.
    fn update_split(&mut self, terms: &LossTerms, batch: &Batch, lr: f64, differentiated: impl FnOnce()) -> Result<f64> {
        let networks: Vec<&dyn Model> = self.stage.parts.iter().filter_map(|p| p.network()).collect();
        let backward = |tag| terms.total_of(tag)?.map(|loss| kd_nn::backward(&loss, &networks)).transpose();
        let mut passes = [backward(Tag::Task)?, backward(Tag::Distill)?];
        self.check_reached(&passes.iter().flatten().collect::<Vec<_>>())?;
        let idle = self.idle();
        let mut split: Vec<[Option<SplitGradient>; 2]> = self.stage.parts.iter().map(|_| [None, None]).collect();
        for (which, pass) in passes.iter_mut().enumerate() {
            let Some(pass) = pass else { continue };
            let mut networks = pass.networks.drain(..);
            for (part, split) in self.stage.parts.iter().zip(&mut split) {
                split[which] = match &part.target {
                    Target::Network(_) => {
                        let found = networks.next().flatten().filter(|_| !idle.contains(&part.name));
                        found.map(|n| SplitGradient { flat: n.flat, reached: n.reached })
                    }
                    Target::Var(var) => pass.store.get(var).map(|g| SplitGradient { flat: g.clone(), reached: vec![true] }),
                };
            }
        }
        let sum = |[task, distill]: &[Option<SplitGradient>; 2]| match (task, distill) {
            (Some(a), Some(b)) => (&a.flat + &b.flat).map(Some),
            (one, other) => Ok(one.as_ref().or(other.as_ref()).map(|g| g.flat.clone())),
        };
        differentiated();
        let norm = self.norm(&split.iter().map(sum).collect::<candle_core::Result<Vec<_>>>()?, batch)?;
        self.stage.optimiser.step_split(&split, lr, clip_scale(norm, self.own.optim.clip_grad_norm))?;
        Ok(norm)
    }

    /// The l2 norm over all gradients, which must be finite.
    fn norm(&self, grads: &[Option<Tensor>], batch: &Batch) -> Result<f64> {
        let norm = grad_norm(grads)?;
        if norm.is_finite() { Ok(norm) } else { Err(non_finite(&self.state, "the gradient's norm".to_string(), norm, batch)) }
    }

    /// Once in a stage, in the first step in which no loss is silent.
    fn check_reached(&mut self, passes: &[&kd_nn::Gradients]) -> Result<()> {
        let (main, epoch) = (self.lead().is_none(), self.epoch());
        if self.stage.reached || (main && self.own.objectives.iter().any(|o| o.weight != 0.0 && o.factor(epoch) == 0.0)) {
            return Ok(());
        }
        let silent = self.own.objectives.iter().zip(&self.labels).filter(|(o, _)| main && o.weight == 0.0);
        let silent: Vec<String> = silent.map(|(_, label)| format!("{label}.")).collect();
        let idle = self.idle();
        let idle_var = |part: &Part| !main && matches!(part.target, Target::Var(_));
        let exempt = |part: &Part| idle_var(part) || silent.iter().any(|prefix| part.name.starts_with(prefix)) || idle.contains(&part.name);
        checks::reached(&self.stage.parts, passes, exempt)?;
        self.stage.reached = true;
        Ok(())
    }

    /// Names of the methods' networks that take no part in this epoch of the main training: they stay as they are.
    fn idle(&self) -> Vec<String> {
        if self.lead().is_some() {
            return vec![]; // a phase trains no part that is idle
        }
        let names = |(o, label): (&Objective, &String)| {
            o.method.idle(self.epoch()).into_iter().map(|i| format!("{label}.network.{i}")).collect::<Vec<_>>()
        };
        self.own.objectives.iter().zip(&self.labels).flat_map(names).collect()
    }

    fn phase(&self) -> Option<String> {
        self.lead().map(|l| l.phase.name.clone())
    }

    /// Evaluates the student when it is due after the present epoch; `false` when stopped.
    fn evaluate_epoch(&mut self, course: &mut Course<'_>) -> Result<bool> {
        if self.lead().is_some() {
            return Ok(true);
        }
        let epochs = self.epoch() + 1;
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
        let base = self.own.optim.lr;
        match self.lead() {
            Some(lead) => lead.phase.lr.unwrap_or(base),
            None => self.own.schedule.lr(base, self.epoch(), self.progress(course).step, course.batches()),
        }
    }

    /// Where the present stage stands.
    fn progress(&self, course: &Course<'_>) -> Progress {
        let epochs = self.lead().map_or(self.own.schedule.epochs, |l| l.phase.epochs);
        let steps_per_epoch = course.batches();
        Progress { epoch: self.epoch(), epochs, step: self.state.step - self.stage.first * steps_per_epoch, steps_per_epoch }
    }

    /// The batch as the student takes it, with no more views than the methods want.
    fn on_device(&self, batch: &Batch) -> Result<Batch> {
        if batch.images.len() < self.stage.wants.needs.views {
            let (have, want) = (batch.images.len(), self.stage.wants.needs.views);
            return Err(Error::Refused(format!("a method needs {want} augmented views of each sample, the training set gives {have}")));
        }
        let images = batch.images.iter().take(self.stage.wants.needs.views);
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
        add("optim".to_string(), &mut self.stage.optimiser.state()?.into_iter());
        for (objective, label) in self.own.objectives.iter().zip(&self.labels) {
            for (i, network) in objective.method.networks().iter().enumerate() {
                add(format!("{label}.network.{i}"), &mut tensors(network.as_ref())?.into_iter());
            }
            add(format!("{label}.var"), &mut objective.method.vars().into_iter().map(|(name, var)| (name, var.as_detached_tensor())));
            add(format!("{label}.state"), &mut objective.method.state()?.into_iter());
        }
        all.extend(self.class_means.iter().map(|(&t, means)| (means_key(t), means.clone())));
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
        self.stage.optimiser.load_state(&below("optim"))?;
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

/// The teachers as a method sees them: the one that it learns from, or all.
fn seen_of(seen: Option<usize>, models: &[Arc<dyn Model>]) -> &[Arc<dyn Model>] {
    seen.map_or(models, |t| std::slice::from_ref(&models[t]))
}

/// Under which a checkpoint keeps a teacher's class means.
fn means_key(teacher: usize) -> String {
    if teacher == 0 { "class_means".to_string() } else { format!("class_means.{teacher}") }
}

fn non_finite(state: &RunState, what: String, value: f64, batch: &Batch) -> Error {
    let samples = batch.indices.to_dtype(DType::I64).and_then(|t| t.to_vec1::<i64>());
    let samples = samples.map_or("unknown".to_string(), |s| s.iter().map(i64::to_string).collect::<Vec<_>>().join(" "));
    Error::NonFinite { what, value, epoch: state.epoch, step: state.step, samples }
}
