//! Every registered method on handwritten digits, with small networks of the zoo: it learns, and a run that was stopped in the middle ends
//! with the same bits. A new method is picked up from the registry.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device};
use kd_core::{BatchSource, Method, MethodEntry, Mode, Model, Rng, Schedule, ScheduleKind};
use kd_data::{Loader, LoaderOptions};
use kd_nn::Network;
use kd_train::{Data, Event, Job, Objective, OptimConfig, Outcome, Result, RunOptions, RunPlace, Sink, Teacher, train};
use serde_json::{Value, json};

use crate::support::{place, remains};

const SAMPLES: u32 = 48;
const BATCH: usize = 16;
const EPOCHS: usize = 4;
const CLASSES: usize = 10;

/// Parameters for a run of a few steps: what a paper spreads over epochs begins at once, and memories are no larger than the data.
fn params(entry: &MethodEntry) -> Value {
    let has = |name: &str| entry.parameters.iter().any(|p| p.name == name);
    let mut params = json!({});
    for (name, value) in [("warmup_epochs", json!(0)), ("init_epochs", json!(1)), ("negatives", json!(16))] {
        if has(name) {
            params[name] = value;
        }
    }
    if entry.name == "ofa" {
        // Its defaults are those of networks with four stages.
        params = json!({"stages": [1, 2, 3], "eps": [1.0, 1.0, 1.0, 1.0], "final_stage": 3});
    }
    params
}

fn build(entry: &MethodEntry) -> Box<dyn Method> {
    (entry.build)(&params(entry)).unwrap_or_else(|e| panic!("{}: {e}", entry.name))
}

fn network(name: &str, seed: u64) -> Network {
    let graph = kd_models::build(name, &kd_models::Config::new(CLASSES, [1, 8, 8])).unwrap();
    let network = Network::new(graph, DType::F32, &Device::Cpu).unwrap();
    network.init(Rng::new(seed)).unwrap();
    network
}

/// A network that nobody trained, but whose batch norms have seen digits: its maps differ from image to image.
fn teacher(name: &str) -> Arc<dyn Model> {
    let network = network(name, 7);
    let mut loader = loader(Loader::eval, 1);
    loader.start(0, 0).unwrap();
    while let Some(batch) = loader.next_batch().unwrap() {
        network.run(&batch.images[0], kd_core::Cut::Input, &[kd_core::Cut::Logits], Mode::Train(Rng::new(1))).unwrap();
    }
    Arc::new(network.frozen())
}

type Make = fn(&kd_data::Dataset, &LoaderOptions) -> kd_data::Result<Loader>;

fn loader(make: Make, views: usize) -> Box<dyn BatchSource> {
    let digits = kd_data::open("digits").unwrap();
    let data = digits.train().unwrap().subset(&(0..SAMPLES).collect::<Vec<_>>());
    Box::new(make(&data, &LoaderOptions { batch_size: BATCH, seed: 3, views, ..LoaderOptions::default() }).unwrap())
}

fn job(entry: &MethodEntry, teacher: &Arc<dyn Model>, place: Option<RunPlace>) -> Job {
    let method = build(entry);
    let views = std::iter::once(method.needs().views).chain(method.phases().iter().map(|p| p.needs.views)).max().unwrap_or(1);
    let mut objectives = vec![Objective::new(method, 1.0)];
    if entry.name != "ce" {
        let ce = kd_losses::find("ce").unwrap();
        objectives.insert(0, Objective::new((ce.build)(&json!({})).unwrap(), 1.0));
    }
    Job {
        student: Arc::new(network("resnet8", 1)),
        teachers: vec![Teacher::new("teacher", Arc::clone(teacher))],
        objectives,
        data: Data {
            classes: CLASSES,
            batch_size: BATCH,
            train: loader(Loader::train, views),
            plain: Some(loader(Loader::eval, 1)),
            validation: None,
            test: None,
            fingerprint: "digits".to_string(),
            class_means: None,
            class_groups: Some(vec![0, 0, 0, 1, 1, 1, 1, 2, 2, 2]),
        },
        optim: OptimConfig { lr: 0.05, clip_grad_norm: 1.0, ..OptimConfig::default() },
        schedule: Schedule { epochs: EPOCHS, kind: ScheduleKind::Constant, ..Schedule::default() },
        options: RunOptions { eval_every: 0, allow_bad_teacher: true, ..RunOptions::default() },
        seed: 5,
        place,
    }
}

/// The losses of the main training's steps, and the flag that stops a run after a number of steps.
struct Log<'a> {
    stop: &'a AtomicBool,
    stop_after: Option<usize>,
    steps: usize,
    losses: Vec<f64>,
}

impl Sink for Log<'_> {
    fn event(&mut self, event: &Event) -> Result<()> {
        if let Event::Step(step) = event {
            self.steps += 1;
            if step.phase.is_none() {
                self.losses.push(step.loss);
            }
        }
        if self.stop_after == Some(self.steps) {
            self.stop.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

fn run(entry: &MethodEntry, teacher: &Arc<dyn Model>, dir: &Path, stop_after: Option<usize>) -> Result<(Outcome, Vec<f64>)> {
    let stop = AtomicBool::new(false);
    let mut log = Log { stop: &stop, stop_after, steps: 0, losses: vec![] };
    let outcome = train(job(entry, teacher, Some(place(dir))), &mut [&mut log], &stop)?;
    Ok((outcome, log.losses))
}

/// Methods whose value is not meant to fall.
const STEADY: &[&str] = &[
    "sifn", // a constant
    "ctkd", // its temperature works against the student
    "logit_standardization",
];

fn learns_and_resumes(methods: impl Iterator<Item = &'static MethodEntry>) {
    // A teacher wider than the student, so that adapters are built; one as wide for those that refuse the other.
    let teachers = [teacher("resnet8x4"), teacher("resnet14")];
    let steps = SAMPLES as usize / BATCH;
    for entry in methods {
        let name = entry.name;
        let attempt = |teacher| {
            let whole = tempfile::tempdir().unwrap();
            run(entry, teacher, whole.path(), None).map(|found| (teacher, whole, found))
        };
        let (teacher, whole, (outcome, losses)) = attempt(&teachers[0])
            .or_else(|wide| attempt(&teachers[1]).map_err(|e| format!("{name}: {wide}; and with a teacher of the student's width: {e}")))
            .unwrap();
        assert!(matches!(outcome, Outcome::Finished(_)), "{name}: {outcome:?}");
        assert_eq!(losses.len(), EPOCHS * steps, "{name}");
        let mean = |epoch: &[f64]| epoch.iter().sum::<f64>() / epoch.len() as f64;
        let (first, last) = (mean(&losses[..steps]), mean(&losses[losses.len() - steps..]));
        assert!(STEADY.contains(&name) || last < first, "{name}: the loss went from {first} to {last}");

        // In the middle of an epoch; with an initial phase once within it, too.
        let phase: usize = build(entry).phases().iter().map(|p| p.epochs * steps).sum();
        for stop in [phase + steps + 1].into_iter().chain((phase > 0).then_some(1)) {
            let dir = tempfile::tempdir().unwrap();
            let (outcome, _) = run(entry, teacher, dir.path(), Some(stop)).unwrap();
            assert!(matches!(outcome, Outcome::Interrupted { .. }), "{name}: {outcome:?}");
            run(entry, teacher, dir.path(), None).unwrap_or_else(|e| panic!("{name}, resumed after step {stop}: {e}"));
            assert!(remains(dir.path()) == remains(whole.path()), "{name}, resumed after step {stop}, ends differently");
        }
    }
}

/// Two halves, so that they run side by side.
#[test]
fn half_of_the_methods_learn_and_resume() {
    learns_and_resumes(kd_losses::registry().iter().step_by(2));
}

#[test]
fn the_other_half_of_the_methods_learn_and_resume() {
    learns_and_resumes(kd_losses::registry().iter().skip(1).step_by(2));
}
