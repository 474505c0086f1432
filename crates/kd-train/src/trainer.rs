//! The loop: one for teachers, baselines and every method, for one student or several side by side.
//!
//! ```text
//! for each epoch, the initial phases' first
//!   for each batch
//!     teachers' outputs     once, the cuts that some student's methods need, eval mode, outside any graph
//!     for each student that stands here
//!       outputs             one per view, train mode
//!       loss                sum over methods of weight * warm-up * the method's terms
//!       backward, norm, clip, learning rate, optimiser
//!   for each student: evaluate, keep the best, checkpoint
//! for each student at its end: export
//! ```
//! Nothing in it knows a method, a network or a data set. Random numbers are functions of (seed, purpose, step), so a run that goes on
//! from a checkpoint makes the same steps as one that never stopped, and a student makes the same steps whoever learns beside it.
//!
//! Students may stand at different places, because they were stopped there: the group goes on from the earliest one, and the others
//! join when it comes to where they are.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::Tensor;
use kd_core::{Batch, Cut, Mode, Model, Outputs};

use crate::cache::Store;
use crate::evaluate::{class_means_unless, evaluate_unless, on_device_of};
use crate::events::{Event, Sink, Split};
use crate::job::{Job, Outcome, Shared, Student, fingerprints};
use crate::learner::{Learner, Lesson};
use crate::parts::{self, StringMap, fingerprint};
use crate::run_dir::{self, Opened, RunDir};
use crate::stage::Wants;
use crate::{Error, Evaluation, Result, checks};

/// Trains to the end of the schedule, from wherever the run directory stands: nowhere, in the middle, or already there.
///
/// Once `stop` is set the run saves a checkpoint within one step and returns.
///
/// # Errors
/// Whatever [`Error`] lists. The last checkpoint is intact after any of them.
pub fn train(job: Job, sinks: &mut [&mut dyn Sink], stop: &AtomicBool) -> Result<Outcome> {
    let (shared, student) = job.split();
    let mut outcomes = train_all(shared, vec![(student, &mut All(sinks))], stop)?;
    outcomes.pop().expect("invariant: one outcome for each student")
}

/// Trains several students side by side: every batch is loaded, augmented and passed through the teachers once, for all of them.
///
/// Each student ends with the bits that [`train`] alone would have given it, each has its own run directory, checkpoints and sink, and may
/// be resumed from wherever it stands. The outcomes come in the order of the students: one that fails (a loss that is not finite, say) is
/// stopped alone, and the others go on.
///
/// # Errors
/// What concerns all of them: a job that is refused before the first step, data or a teacher that fail.
pub fn train_all(shared: Shared, students: Vec<(Student, &mut dyn Sink)>, stop: &AtomicBool) -> Result<Vec<Result<Outcome>>> {
    let vacant: Vec<_> = students.iter().map(|(student, _)| student.place.as_ref().and_then(run_dir::vacancy)).collect();
    let outcomes = take_to_the_end(shared, students, stop);
    // What was refused, or came to a file of its data that cannot be used, must not stand in the way of the next try.
    let unusable = |e: &Error| e.is_usage() || matches!(e, Error::Core(kd_core::Error::Other(_)));
    let refused = |i: usize| match &outcomes {
        Ok(each) => each[i].as_ref().is_err_and(unusable),
        Err(e) => unusable(e),
    };
    vacant.iter().enumerate().filter(|(i, _)| refused(*i)).filter_map(|(_, vacancy)| vacancy.as_ref()).for_each(run_dir::withdraw);
    outcomes
}

fn take_to_the_end(shared: Shared, students: Vec<(Student, &mut dyn Sink)>, stop: &AtomicBool) -> Result<Vec<Result<Outcome>>> {
    students.iter().try_for_each(|(student, _)| checks::student(&shared, student))?;
    checks::unlabelled(&shared, students.iter().map(|(student, _)| student))?;
    let prints = match students.iter().any(|(s, _)| s.place.is_some()) {
        true => fingerprints(&shared, &students.iter().map(|(s, _)| s).collect::<Vec<_>>())?,
        false => vec![Default::default(); students.len()],
    };
    let mut course = Course::new(shared, stop);
    let mut seats = vec![];
    for ((mut student, sink), prints) in students.into_iter().zip(prints) {
        let (dir, checkpoint) = match student.place.take() {
            None => (None, None),
            Some(place) => match RunDir::open(place.clone(), prints)? {
                Opened::Finished(result) => {
                    let weights = run_dir::exported(&place)?;
                    // A method may export another network than the student; then the student stays as it is.
                    let _ = parts::assign(student.model.as_ref(), "the exported student", |name| weights.get(name).cloned());
                    seats.push(Seat::Done(Ok(Outcome::Finished(result))));
                    continue;
                }
                Opened::Ready(dir, checkpoint) => (Some(*dir), checkpoint.map(|c| *c)),
            },
        };
        seats.push(match Learner::prepare(&mut course, student, dir, checkpoint, sink)? {
            Some(learner) => Seat::Learning(Box::new(learner)),
            None => Seat::Done(Ok(Outcome::Interrupted { epoch: 0, step: 0 })),
        });
    }
    if let Some((epochs, views)) = seats.iter().filter_map(Seat::learner).map(Learner::extent).reduce(|a, b| (a.0.max(b.0), a.1.max(b.1))) {
        course.open_caches(epochs, views)?;
    }
    let mut group = Group { course, seats };
    group.run()?;
    let outcome = |seat| match seat {
        Seat::Done(outcome) => outcome,
        Seat::Learning(_) => unreachable!("invariant: the loop ends when nobody is left"),
    };
    Ok(group.seats.into_iter().map(outcome).collect())
}

/// Several sinks as one.
struct All<'a, 's>(&'a mut [&'s mut dyn Sink]);

impl Sink for All<'_, '_> {
    fn event(&mut self, event: &Event) -> Result<()> {
        self.0.iter_mut().try_for_each(|sink| sink.event(event))
    }
}

/// What all students have in common.
pub(crate) struct Course<'a> {
    pub(crate) shared: Shared,
    /// The teachers, as methods see them.
    pub(crate) models: Vec<Arc<dyn Model>>,
    pub(crate) stop: &'a AtomicBool,
    /// The teachers' class means, once somebody has asked.
    means: Vec<Option<Tensor>>,
    /// How good the teachers are, likewise.
    verdicts: Option<(Split, Vec<Evaluation>)>,
    /// The teachers' logits on the disk, where somebody keeps them.
    stores: Vec<Option<Store>>,
    /// Bytes that the students so far will need on the disk.
    reserved: u64,
}

impl<'a> Course<'a> {
    fn new(shared: Shared, stop: &'a AtomicBool) -> Self {
        let models: Vec<_> = shared.teachers.iter().map(|t| Arc::clone(&t.model)).collect();
        let mut means = vec![None; models.len()];
        means.iter_mut().take(1).for_each(|first| first.clone_from(&shared.data.class_means));
        Self { shared, models, stop, means, verdicts: None, stores: vec![], reserved: 0 }
    }

    /// Batches of an epoch.
    pub(crate) fn batches(&self) -> usize {
        self.shared.data.train.batches()
    }

    pub(crate) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// A teacher's mean embedding of each class, computed once; `None` when stopped.
    pub(crate) fn class_means(&mut self, teacher: usize) -> Result<Option<Tensor>> {
        let data = &mut self.shared.data;
        if self.means[teacher].is_none() {
            let Some(plain) = &mut data.plain else {
                return Err(Error::Refused("class means need an unaugmented training set".to_string()));
            };
            let model = self.models[teacher].as_ref();
            self.means[teacher] = class_means_unless(model, plain.as_mut(), data.classes, self.stop).map_err(Error::early)?;
        }
        Ok(self.means[teacher].clone())
    }

    /// How good the teachers are and on which samples, computed once; nothing without samples, `None` when stopped.
    pub(crate) fn teacher_evaluations(&mut self) -> Result<Option<(Split, Vec<Evaluation>)>> {
        if self.verdicts.is_none() {
            let data = &mut self.shared.data;
            let sources = [(Split::Test, &mut data.test), (Split::Validation, &mut data.validation), (Split::Train, &mut data.plain)];
            let Some((split, source)) = sources.into_iter().find_map(|(split, source)| Some((split, source.as_mut()?))) else {
                return Ok(Some((Split::Test, vec![])));
            };
            let mut evaluations = vec![];
            for model in &self.models {
                match evaluate_unless(model.as_ref(), source.as_mut(), self.stop).map_err(Error::early)? {
                    Some(evaluation) => evaluations.push(evaluation),
                    None => return Ok(None),
                }
            }
            self.verdicts = Some((split, evaluations));
        }
        Ok(self.verdicts.clone())
    }

    /// The bytes that one more student needs, and all before it.
    pub(crate) fn reserve(&mut self, bytes: u64) -> u64 {
        self.reserved += bytes;
        self.reserved
    }

    /// Opens the teachers' caches for so many epochs and views.
    fn open_caches(&mut self, epochs: usize, views: usize) -> Result<()> {
        let data = &self.shared.data;
        let size = [data.train.samples(), data.batch_size, data.classes];
        for teacher in &self.shared.teachers {
            let store = match &teacher.cache {
                None => None,
                Some(cache) => {
                    let mut prints = StringMap::from([("data".to_string(), data.fingerprint.clone())]);
                    prints.insert("teacher".to_string(), fingerprint(teacher.model.as_ref())?);
                    prints.insert("seed".to_string(), self.shared.seed.to_string());
                    Some(Store::open(cache.clone(), prints, size, epochs, views)?)
                }
            };
            self.stores.push(store);
        }
        Ok(())
    }

    /// What the teachers say to the batch at `position`: of each view the cuts that somebody wants who looks at that view.
    fn lesson(&mut self, (epoch, at): (usize, usize), batch: &Batch, all: &[&Wants]) -> Result<Lesson> {
        let mut lesson = vec![vec![]; self.models.len()];
        for (t, (teacher, outputs)) in self.models.iter().zip(&mut lesson).enumerate() {
            for (view, images) in batch.images.iter().enumerate() {
                let mut cuts: Vec<Cut> = all.iter().filter(|w| w.needs.views > view).flat_map(|w| &w.teachers[t]).copied().collect();
                cuts.sort_unstable();
                cuts.dedup();
                if cuts.is_empty() {
                    break;
                }
                let mut store = self.stores[t].as_mut().filter(|_| cuts.contains(&Cut::Logits));
                if let Some(store) = &mut store
                    && cuts == [Cut::Logits]
                    && let Some(logits) = store.find(epoch, view, at, batch)?
                {
                    outputs.push(Outputs::new([(Cut::Logits, logits)]));
                    continue;
                }
                let mut said = teacher.run(&on_device_of(teacher.as_ref(), images)?, Cut::Input, &cuts, Mode::Eval)?.detach();
                if let Some(store) = store {
                    said.insert(Cut::Logits, store.keep(epoch, view, at, batch, said.logits()?)?);
                }
                outputs.push(said);
            }
        }
        Ok(lesson)
    }
}

/// A student's place in the group.
enum Seat<'a> {
    Learning(Box<Learner<'a>>),
    Done(Result<Outcome>),
}

impl<'a> Seat<'a> {
    fn learner(&self) -> Option<&Learner<'a>> {
        match self {
            Self::Learning(learner) => Some(learner),
            Self::Done(_) => None,
        }
    }
}

struct Group<'a, 's> {
    course: Course<'a>,
    seats: Vec<Seat<'s>>,
}

impl<'s> Group<'_, 's> {
    /// Goes on until nobody is left.
    fn run(&mut self) -> Result<()> {
        let batches = self.course.batches();
        // Who was stopped between the last checkpoint and the end.
        self.visit(|_| true, |learner, course| learner.finish_if_done(course));
        while let Some((epoch, first)) = self.learners().map(Learner::position).min() {
            if first < batches {
                self.course.shared.data.train.start(epoch, first)?;
            }
            for batch in first..batches {
                if self.course.stopped() {
                    break;
                }
                // Those who were furthest behind may have failed.
                if !self.learners().any(|l| l.position() == (epoch, batch)) {
                    break;
                }
                self.step((epoch, batch))?;
            }
            self.visit(|l| l.position() == (epoch, batches), |learner, course| learner.end_epoch(course));
            if self.course.stopped() {
                self.visit(|_| true, |learner, _| learner.interrupt().map(Some));
            }
        }
        Ok(())
    }

    /// One batch for everybody who stands at `position`.
    fn step(&mut self, position: (usize, usize)) -> Result<()> {
        let begun = Instant::now();
        let batch = self.course.shared.data.train.next_batch()?;
        let waiting = begun.elapsed().as_secs_f64();
        let short = || Error::Refused(format!("the training set ended after {} of {} batches", position.1, self.course.batches()));
        let batch = batch.ok_or_else(short)?;
        let learners = self.seats.iter().filter_map(Seat::learner);
        let here: Vec<&Wants> = learners.filter(|l| l.position() == position).map(Learner::wants).collect();
        let lesson = self.course.lesson(position, &batch, &here)?;
        let common = begun.elapsed().as_secs_f64();
        self.visit(|l| l.position() == position, |learner, course| learner.learn(course, &batch, &lesson, waiting, common).map(|()| None));
        Ok(())
    }

    fn learners(&self) -> impl Iterator<Item = &Learner<'s>> {
        self.seats.iter().filter_map(Seat::learner)
    }

    /// Calls `act` for every learner that `whom` chooses; one that returns an outcome, or fails, is done.
    fn visit(
        &mut self,
        whom: impl Fn(&Learner<'s>) -> bool,
        mut act: impl FnMut(&mut Learner<'s>, &mut Course<'_>) -> Result<Option<Outcome>>,
    ) {
        for seat in &mut self.seats {
            if let Seat::Learning(learner) = seat
                && whom(learner)
                && let Some(outcome) = act(learner, &mut self.course).transpose()
            {
                *seat = Seat::Done(outcome);
            }
        }
    }
}
