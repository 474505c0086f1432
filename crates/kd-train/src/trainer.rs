//! The loop: one for teachers, baselines and every method.
//!
//! ```text
//! for each epoch
//!   for each batch
//!     teachers' outputs     the cuts that a method needs, eval mode, outside any graph
//!     student's outputs     one per view, train mode
//!     loss                  sum over methods of weight * warm-up * the method's terms
//!     backward, norm, clip, learning rate, optimiser
//!   evaluate, keep the best, checkpoint
//! export
//! ```
//! Nothing in it knows a method, a network or a data set. Random numbers are functions of (seed, purpose, step), so a run that goes on
//! from a checkpoint makes the same steps as one that never stopped.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use kd_core::{Batch, Cut, LossTerms, Mode, Model, Models, Needs, Outputs, Progress, Rng, Setup, StateDict, StepView, Trainable};

use crate::evaluate::{class_means_unless, evaluate_unless, on_device_of};
use crate::events::{Event, Sink, Split, StepReport, Subject};
use crate::job::{Job, Objective, Outcome, fingerprints, labels};
use crate::optim::{Optimiser, Part, Target, clip_scale, grad_norm};
use crate::parts::{self, fingerprint, home, tensors};
use crate::run_dir::{self, Checkpoint, Opened, RunDir};
use crate::state::{Best, EpochRecord, Exported, RunResult, RunState};
use crate::{Error, Evaluation, Result, checks};

/// Trains to the end of the schedule, from wherever the run directory stands: nowhere, in the middle, or already there.
///
/// Once `stop` is set the run saves a checkpoint within one step and returns.
///
/// # Errors
/// Whatever [`Error`] lists. The last checkpoint is intact after any of them.
pub fn train(mut job: Job, sinks: &mut [&mut dyn Sink], stop: &AtomicBool) -> Result<Outcome> {
    checks::job(&job)?;
    let (dir, checkpoint) = match job.place.take() {
        None => (None, None),
        Some(place) => match RunDir::open(place.clone(), fingerprints(&job)?)? {
            Opened::Finished(result) => {
                let weights = run_dir::exported(&place)?;
                // A method may export another network than the student; then the student stays as it is.
                let _ = parts::assign(job.student.as_ref(), "the exported student", |name| weights.get(name).cloned());
                return Ok(Outcome::Finished(result));
            }
            Opened::Ready(dir, checkpoint) => (Some(*dir), checkpoint.map(|c| *c)),
        },
    };
    let Some(mut run) = Run::prepare(job, dir, checkpoint, sinks, stop)? else {
        return Ok(Outcome::Interrupted { epoch: 0, step: 0 });
    };
    while run.state.epoch < run.job.schedule.epochs {
        if !run.train_epoch()? || !run.evaluate_epoch()? {
            return run.interrupt();
        }
        (run.state.epoch, run.state.batch) = (run.state.epoch + 1, 0);
        let every = run.job.options.checkpoint_every;
        if run.state.epoch == run.job.schedule.epochs || (every > 0 && run.state.epoch.is_multiple_of(every)) {
            run.checkpoint()?;
        }
    }
    run.finish()
}

struct Run<'a, 's> {
    job: Job,
    teachers: Vec<Arc<dyn Model>>,
    /// The union over all methods.
    needs: Needs,
    /// What each method is called in reports and checkpoints.
    labels: Vec<String>,
    parts: Vec<Part>,
    optimiser: Optimiser,
    state: RunState,
    /// The best student, when there is no directory to keep it in.
    best: Option<StateDict>,
    /// Where the newest checkpoint stands.
    saved: Option<(usize, usize)>,
    /// Whether it is known that the losses reach every parameter.
    reached: bool,
    dtype: DType,
    device: Device,
    dir: Option<RunDir>,
    sinks: &'a mut [&'s mut dyn Sink],
    stop: &'a AtomicBool,
}

impl<'a, 's> Run<'a, 's> {
    /// Everything up to the first step; `None` when stopped before it.
    fn prepare(
        mut job: Job,
        dir: Option<RunDir>,
        checkpoint: Option<Checkpoint>,
        sinks: &'a mut [&'s mut dyn Sink],
        stop: &'a AtomicBool,
    ) -> Result<Option<Self>> {
        let (state, mut tensors) = checkpoint.map_or((None, StateDict::new()), |(state, tensors)| (Some(state), tensors));
        let needs = needs_of(&job.objectives);
        let none = || Error::Refused("the student has no parameters to train".to_string());
        let (dtype, device) = home(job.student.as_ref()).ok_or_else(none)?;
        let teachers: Vec<_> = job.teachers.iter().map(|t| Arc::clone(&t.model)).collect();
        if needs.class_means {
            let given = tensors.remove("class_means").or(job.data.class_means.take());
            let means = match (given, &mut job.data.plain, teachers.first()) {
                (Some(means), ..) => means,
                (None, Some(plain), Some(teacher)) => {
                    match class_means_unless(teacher.as_ref(), plain.as_mut(), job.data.classes, stop).map_err(Error::early)? {
                        Some(means) => means,
                        None => return Ok(None),
                    }
                }
                _ => return Err(Error::Refused("class means need a teacher and an unaugmented training set".to_string())),
            };
            job.data.class_means = Some(means.to_device(&device)?.to_dtype(dtype)?);
        }
        let setup = |i: usize| Setup {
            models: Models { student: job.student.as_ref(), teachers: &teachers },
            classes: job.data.classes,
            train_samples: job.data.train.samples(),
            batch_size: job.data.batch_size,
            class_means: job.data.class_means.as_ref(),
            class_groups: job.data.class_groups.as_deref(),
            dtype,
            device: &device,
            rng: Rng::new(job.seed).named("method").fork(i as u64),
        };
        job.objectives.iter_mut().enumerate().try_for_each(|(i, o)| o.method.prepare(&setup(i))).map_err(Error::Setup)?;
        checks::needs(&job)?; // once more: cuts that follow from the shapes of both sides have joined
        let needs = needs_of(&job.objectives);

        let unused = job.objectives.iter().flat_map(|o| o.method.unused()).collect();
        let mut trained = parts_of("student".to_string(), &job.student, unused);
        if trained.is_empty() {
            return Err(none());
        }
        let labels = labels(&job.objectives);
        for (objective, label) in job.objectives.iter().zip(&labels) {
            for (i, network) in objective.method.networks().iter().enumerate() {
                trained.extend(parts_of(format!("{label}.network.{i}"), network, vec![]));
            }
            let vars = objective.method.vars().into_iter();
            trained.extend(vars.map(|(name, var)| Part { name: format!("{label}.var.{name}"), target: Target::Var(var), unused: vec![] }));
        }
        let mut run = Self {
            labels,
            optimiser: Optimiser::new(&job.optim, trained.clone())?,
            state: state.clone().unwrap_or_default(),
            saved: state.as_ref().map(|s| (s.epoch, s.batch)),
            best: None,
            reached: false,
            parts: trained,
            job,
            teachers,
            needs,
            dtype,
            device,
            dir,
            sinks,
            stop,
        };
        run.emit(&Event::Started {
            epochs: run.job.schedule.epochs,
            steps_per_epoch: run.job.data.train.batches(),
            samples: run.job.data.train.samples(),
            epoch: run.state.epoch,
            step: run.state.step,
        })?;
        let warnings = run.dir.as_mut().map(|d| std::mem::take(&mut d.warnings)).unwrap_or_default();
        warnings.into_iter().try_for_each(|message| run.emit(&Event::Warning { message }))?;
        match state {
            Some(_) => run.load(&tensors)?,
            None if !run.evaluate_teachers()? => return Ok(None),
            None => {}
        }
        if let Some(dir) = &run.dir {
            let steps = run.job.schedule.epochs * run.job.data.train.batches();
            let student = run.student_tensors()?;
            dir.require_space(checks::bytes_needed(run.tensors()?.values(), student.values(), steps))?;
        }
        Ok(Some(run))
    }

    /// Trains what is left of the present epoch; `false` when stopped.
    fn train_epoch(&mut self) -> Result<bool> {
        let batches = self.job.data.train.batches();
        if self.state.batch < batches {
            self.emit(&Event::EpochStarted { epoch: self.state.epoch, lr: self.lr() })?;
            self.job.data.train.start(self.state.epoch, self.state.batch)?;
        }
        while self.state.batch < batches {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            let begun = Instant::now();
            let batch = self.job.data.train.next_batch()?;
            let waiting = begun.elapsed().as_secs_f64();
            let short = || Error::Refused(format!("the training set ended after {} of {batches} batches", self.state.batch));
            let mut report = self.step(&batch.ok_or_else(short)?)?;
            report.seconds = begun.elapsed().as_secs_f64();
            report.waiting = waiting;
            self.state.batch += 1;
            self.state.step += 1;
            self.state.seconds += report.seconds;
            self.state.waiting += waiting;
            self.state.images += report.images;
            self.emit(&Event::Step(report))?;
            let every = self.job.options.checkpoint_steps;
            if every > 0 && self.state.step.is_multiple_of(every) && self.state.batch < batches {
                self.checkpoint()?;
            }
        }
        Ok(true)
    }

    /// One step: outputs, loss, gradients, update.
    fn step(&mut self, batch: &Batch) -> Result<StepReport> {
        let batch = self.on_device(batch)?;
        let teachers = self.teacher_outputs(&batch)?;
        let student = self.student_outputs(&batch)?;
        let terms = self.loss_terms(&batch, &student, &teachers)?;
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
        let lr = self.lr();
        self.optimiser.step(&grads, lr, clip_scale(norm, self.job.optim.clip_grad_norm))?;
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

    /// `[teacher][view]`, only the cuts that a method needs.
    fn teacher_outputs(&self, batch: &Batch) -> Result<Vec<Vec<Outputs>>> {
        if self.needs.teacher.is_empty() {
            return Ok(self.teachers.iter().map(|_| vec![]).collect());
        }
        let run = |teacher: &Arc<dyn Model>, images: &Tensor| -> Result<Outputs> {
            let outputs = teacher.run(&on_device_of(teacher.as_ref(), images)?, Cut::Input, &self.needs.teacher, Mode::Eval)?;
            let here = outputs.iter().map(|(cut, t)| Ok((cut, t.detach().to_device(&self.device)?.to_dtype(self.dtype)?)));
            Ok(Outputs::new(here.collect::<Result<Vec<_>>>()?))
        };
        self.teachers.iter().map(|teacher| batch.images.iter().map(|images| run(teacher, images)).collect()).collect()
    }

    fn student_outputs(&self, batch: &Batch) -> Result<Vec<Outputs>> {
        let rng = Rng::new(self.job.seed).named("student").fork(self.state.step as u64);
        let run = |(view, images): (usize, &Tensor)| {
            Ok(self.job.student.run(images, Cut::Input, &self.needs.student, Mode::Train(rng.fork(view as u64)))?)
        };
        batch.images.iter().enumerate().map(run).collect()
    }

    /// The terms of every method with weight and warm-up in them, named `<method>.<term>`.
    fn loss_terms(&mut self, batch: &Batch, student: &[Outputs], teachers: &[Vec<Outputs>]) -> Result<LossTerms> {
        let progress = self.progress();
        let rng = Rng::new(self.job.seed).named("loss").fork(progress.step as u64);
        let models = Models { student: self.job.student.as_ref(), teachers: &self.teachers };
        let mut all = LossTerms::new();
        for (i, (objective, label)) in self.job.objectives.iter_mut().zip(&self.labels).enumerate() {
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
        if self.reached || self.job.objectives.iter().any(|o| o.weight != 0.0 && o.factor(epoch) == 0.0) {
            return Ok(());
        }
        let silent = self.job.objectives.iter().zip(&self.labels).filter(|(o, _)| o.weight == 0.0);
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
        self.job.objectives.iter().zip(&self.labels).flat_map(names).collect()
    }

    /// Evaluates the student when it is due after the present epoch; `false` when stopped.
    fn evaluate_epoch(&mut self) -> Result<bool> {
        let epochs = self.state.epoch + 1;
        let every = self.job.options.eval_every;
        if epochs < self.job.schedule.epochs && (every == 0 || !epochs.is_multiple_of(every)) {
            return Ok(true);
        }
        let split = if self.job.data.validation.is_some() { Split::Validation } else { Split::Test };
        let Some(evaluation) = self.evaluate_student(split)? else { return Ok(!self.stop.load(Ordering::Relaxed)) };
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
    fn evaluate_student(&mut self, split: Split) -> Result<Option<Evaluation>> {
        let deployed = self.deployed()?;
        let source = match split {
            Split::Validation => &mut self.job.data.validation,
            Split::Test => &mut self.job.data.test,
            Split::Train => &mut self.job.data.plain,
        };
        source.as_mut().map_or(Ok(None), |source| evaluate_unless(deployed.as_ref(), source.as_mut(), self.stop))
    }

    /// Refuses bad teachers; `false` when stopped.
    fn evaluate_teachers(&mut self) -> Result<bool> {
        let data = &mut self.job.data;
        let sources = [(Split::Test, &mut data.test), (Split::Validation, &mut data.validation), (Split::Train, &mut data.plain)];
        let Some((split, source)) = sources.into_iter().find_map(|(split, source)| Some((split, source.as_mut()?))) else {
            return Ok(true);
        };
        let mut evaluations = vec![];
        for teacher in &self.job.teachers {
            let Some(evaluation) = evaluate_unless(teacher.model.as_ref(), source.as_mut(), self.stop).map_err(Error::early)? else {
                return Ok(false);
            };
            evaluations.push(evaluation);
        }
        for (i, &evaluation) in evaluations.iter().enumerate() {
            let teacher = &self.job.teachers[i];
            let verdict = checks::teacher(teacher, &evaluation, split, self.job.data.classes);
            let subject = Subject::Teacher(teacher.name.clone());
            self.emit(&Event::Evaluated { subject, split, epochs: 0, evaluation, best: false })?;
            match verdict {
                Err(e) if self.job.options.allow_bad_teacher => self.emit(&Event::Warning { message: e.to_string() })?,
                verdict => verdict?,
            }
        }
        self.state.teachers = evaluations;
        Ok(true)
    }

    /// Saves everything that the next step depends on.
    fn checkpoint(&mut self) -> Result<()> {
        let position = (self.state.epoch, self.state.batch);
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

    fn interrupt(mut self) -> Result<Outcome> {
        self.checkpoint()?;
        Ok(Outcome::Interrupted { epoch: self.state.epoch, step: self.state.step })
    }

    /// Exports the student and writes the result.
    fn finish(mut self) -> Result<Outcome> {
        let best = self.state.best.filter(|_| self.job.data.validation.is_some());
        if let Some(best) = &best {
            let student = match (&self.dir, self.best.take()) {
                (Some(dir), _) => dir.load_best(best)?,
                (None, kept) => kept.unwrap_or_default(),
            };
            parts::assign(self.job.student.as_ref(), "the best checkpoint", |name| student.get(name).cloned())?;
        }
        let mut test = self.state.history.last().filter(|r| r.split == Split::Test).map(|r| r.evaluation);
        if test.is_none() && self.job.data.test.is_some() {
            let Some(evaluation) = self.evaluate_student(Split::Test)? else { return self.interrupt() };
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
        Ok(Outcome::Finished(Box::new(result)))
    }

    /// The network to ship, as the methods make it of the student.
    fn deployed(&self) -> Result<Arc<dyn Model>> {
        let student = Arc::clone(&self.job.student);
        Ok(self.job.objectives.iter().try_fold(student, |network, o| o.method.deploy(network))?)
    }

    fn lr(&self) -> f64 {
        self.job.schedule.lr(self.job.optim.lr, self.state.epoch, self.state.step, self.job.data.train.batches())
    }

    fn progress(&self) -> Progress {
        let (epochs, steps_per_epoch) = (self.job.schedule.epochs, self.job.data.train.batches());
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
        self.sinks.iter_mut().try_for_each(|sink| sink.event(event))
    }

    fn student_tensors(&self) -> Result<StateDict> {
        Ok(tensors(self.job.student.as_ref())?.into_iter().collect())
    }

    /// Everything of a checkpoint that is a tensor, by `student/`, `optim/`, `<method>.network.<i>/`, `<method>.var/`, `<method>.state/`.
    fn tensors(&self) -> Result<StateDict> {
        let mut all = StateDict::new();
        let mut add = |prefix: String, tensors: &mut dyn Iterator<Item = (String, Tensor)>| {
            all.extend(tensors.map(|(name, tensor)| (format!("{prefix}/{name}"), tensor)));
        };
        add("student".to_string(), &mut tensors(self.job.student.as_ref())?.into_iter());
        add("optim".to_string(), &mut self.optimiser.state()?.into_iter());
        for (objective, label) in self.job.objectives.iter().zip(&self.labels) {
            for (i, network) in objective.method.networks().iter().enumerate() {
                add(format!("{label}.network.{i}"), &mut tensors(network.as_ref())?.into_iter());
            }
            add(format!("{label}.var"), &mut objective.method.vars().into_iter().map(|(name, var)| (name, var.as_detached_tensor())));
            add(format!("{label}.state"), &mut objective.method.state()?.into_iter());
        }
        all.extend(self.job.data.class_means.iter().map(|means| ("class_means".to_string(), means.clone())));
        Ok(all)
    }

    /// Puts back what [`Run::tensors`] gave.
    fn load(&mut self, all: &StateDict) -> Result<()> {
        const WHO: &str = "the checkpoint";
        let under = |prefix: &str, name: &str| all.get(&format!("{prefix}/{name}")).cloned();
        let below = |prefix: &str| -> StateDict {
            all.iter().filter_map(|(key, t)| Some((key.strip_prefix(prefix)?.strip_prefix('/')?.to_string(), t.clone()))).collect()
        };
        parts::assign(self.job.student.as_ref(), WHO, |name| under("student", name))?;
        self.optimiser.load_state(&below("optim"))?;
        for (objective, label) in self.job.objectives.iter_mut().zip(&self.labels) {
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
