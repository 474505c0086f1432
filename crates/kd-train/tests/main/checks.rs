//! What is refused before hours are spent, and what stops a run later.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use kd_core::{Cut, LossTerms, Method, Mode, Model, Needs, StepView};
use kd_nn::Network;
use kd_train::{Error, Event, Job, Objective, Outcome, RunOptions, Split, Subject, class_means, evaluate, fingerprint, train};

use crate::support::{CLASSES, Memory, Recipe, oracle, place, tiny_net};

fn refusal(job: Job) -> Error {
    train(job, &mut [], &Default::default()).expect_err("must be refused")
}

/// A loss on the embedding alone: the classifier is never reached.
struct Embedded {
    cut: Cut,
    unused: Vec<String>,
    views: usize,
}

impl Default for Embedded {
    fn default() -> Self {
        Self { cut: Cut::Embedding, unused: vec![], views: 1 }
    }
}

impl Method for Embedded {
    fn name(&self) -> &'static str {
        "embedded"
    }

    fn needs(&self) -> Needs {
        Needs { student: vec![self.cut], views: self.views, ..Needs::default() }
    }

    fn unused(&self) -> Vec<String> {
        self.unused.clone()
    }

    fn loss(&mut self, step: &StepView<'_>) -> kd_core::Result<LossTerms> {
        Ok(LossTerms::one("size", step.student()?.get(self.cut)?.sqr()?.mean_all()?))
    }
}

fn embedded(method: Embedded) -> Job {
    let mut job = Recipe::default().job(None);
    job.objectives = vec![Objective::new(Box::new(method), 1.0)];
    job
}

#[test]
fn parameters_that_no_loss_reaches_stop_the_run_after_its_first_step() {
    let error = refusal(embedded(Embedded::default()));
    assert!(
        matches!(&error, Error::Unreached { network, unreached: 2, total: 5, first } if network == "student" && first == "fc.weight, fc.bias"),
        "{error}"
    );
    assert!(error.is_usage());

    // Declared, it is fine; so it is while the loss that reaches them is still silent.
    let mut job = embedded(Embedded { unused: vec!["fc.".to_string()], ..Embedded::default() });
    let before = job.student.params().unwrap().get("fc.weight").unwrap().unwrap().to_vec2::<f32>().unwrap();
    job.optim.weight_decay = 0.1;
    let student = job.student.clone();
    train(job, &mut [], &Default::default()).unwrap();
    assert_eq!(student.params().unwrap().get("fc.weight").unwrap().unwrap().to_vec2::<f32>().unwrap(), before);

    let mut job = embedded(Embedded::default());
    let ce = (kd_losses::find("ce").unwrap().build)(&serde_json::json!({})).unwrap();
    job.objectives.push(Objective { warmup_epochs: 2, warmup_first_epoch: 0, ..Objective::new(ce, 1.0) });
    train(job, &mut [], &Default::default()).unwrap();
}

#[test]
fn a_silent_loss_leaves_its_own_network_unreached() {
    let mut job = Recipe { methods: vec!["ce", "everything"], ..Recipe::default() }.job(None);
    job.objectives[1].weight = 0.0;
    train(job, &mut [], &Default::default()).unwrap();
}

/// A loss whose network rests in the first epoch.
struct Late(Arc<Network>);

impl Method for Late {
    fn name(&self) -> &'static str {
        "late"
    }

    fn needs(&self) -> Needs {
        Needs { student: vec![Cut::Embedding, Cut::Logits], ..Needs::default() }
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        vec![self.0.clone()]
    }

    fn idle(&self, epoch: usize) -> Vec<usize> {
        if epoch == 0 { vec![0] } else { vec![] }
    }

    fn loss(&mut self, step: &StepView<'_>) -> kd_core::Result<LossTerms> {
        let student = step.student()?;
        let rows = match step.progress.epoch {
            0 => student.logits()?.clone(),
            _ => {
                let images = &step.batch.images[0];
                let own = self.0.run(images, Cut::Input, &[Cut::Logits], Mode::Train(step.rng))?;
                (student.logits()? + own.logits()?)?
            }
        };
        Ok(LossTerms::one("size", rows.sqr()?.mean_all()?))
    }
}

#[test]
fn a_network_that_is_idle_stays_as_it_is() {
    for (epochs, moves) in [(1, false), (2, true)] {
        let network = Arc::new(tiny_net(2, DType::F32));
        let before = fingerprint(network.as_ref()).unwrap();
        let mut job = Recipe::default().job(None);
        job.schedule.epochs = epochs;
        job.objectives = vec![Objective::new(Box::new(Late(network.clone())), 1.0)];
        train(job, &mut [], &Default::default()).unwrap();
        assert_eq!(fingerprint(network.as_ref()).unwrap() != before, moves, "after {epochs} epochs");
    }
}

#[test]
fn a_teacher_near_chance_is_refused_unless_allowed() {
    let recipe = Recipe { methods: vec!["kd"], ..Recipe::default() };
    let bad = || {
        let network = tiny_net(6, DType::F32).frozen();
        // Always the last class: exactly chance.
        network
            .parameters()
            .assign(|name| (name == "fc.weight").then(|| Tensor::zeros((CLASSES, 6), DType::F32, &Device::Cpu).unwrap()))
            .unwrap();
        Arc::new(network)
    };
    let mut job = recipe.job(None);
    job.teachers[0].model = bad();
    let error = refusal(job);
    assert!(matches!(&error, Error::BadTeacher { name, .. } if name == "oracle"), "{error}");
    assert!(error.to_string().contains("allow_bad_teacher"), "{error}");

    let allowed = Recipe { options: RunOptions { allow_bad_teacher: true, ..RunOptions::default() }, ..recipe.clone() };
    let mut job = allowed.job(None);
    job.teachers[0].model = bad();
    train(job, &mut [], &Default::default()).unwrap();

    let (outcome, events) = recipe.run(None, None).unwrap();
    let Outcome::Finished(result) = outcome else { panic!("not finished") };
    assert_eq!(result.teachers.len(), 1);
    assert!(result.teachers[0].top1 > 80.0, "{result:?}");
    let told = |e: &Event| matches!(e, Event::Evaluated { subject: Subject::Teacher(name), split: Split::Test, .. } if name == "oracle");
    assert_eq!(events.iter().filter(|e| told(e)).count(), 1);
}

#[test]
fn a_loss_that_is_not_finite_stops_with_term_and_step_and_keeps_the_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = Recipe { own_model: true, ..Recipe::default() };
    recipe.train.poison = Some((1, 2));
    let job = |recipe: &Recipe| {
        let mut job = recipe.job(Some(place(dir.path())));
        job.objectives = vec![Objective::new(Box::new(Embedded { cut: Cut::Logits, ..Embedded::default() }), 1.0)];
        job
    };
    let error = refusal(job(&recipe));
    let Error::NonFinite { what, epoch: 1, step: 6, samples, .. } = &error else { panic!("{error}") };
    assert_eq!(what, "loss term embedded.size");
    assert_eq!(samples.split(' ').count(), 5);
    assert!(!error.is_usage());

    // The checkpoint of the first epoch is there, and without the poison the run ends as if nothing had happened.
    recipe.train.poison = None;
    let Outcome::Finished(result) = train(job(&recipe), &mut [], &Default::default()).unwrap() else { panic!("not finished") };
    let mut whole = job(&recipe);
    whole.place = None;
    let Outcome::Finished(expected) = train(whole, &mut [], &Default::default()).unwrap() else { panic!("not finished") };
    assert_eq!(result.fingerprint, expected.fingerprint);
    assert_eq!(result.history, expected.history);
}

#[test]
fn a_method_that_finds_nan_itself_is_reported_alike() {
    let mut recipe = Recipe { own_model: true, ..Recipe::default() };
    recipe.train.poison = Some((0, 1));
    let error = recipe.run(None, None).unwrap_err();
    assert!(
        matches!(&error, Error::NonFinite { what, epoch: 0, step: 1, .. } if what.ends_with("ce") || what.contains("ce.ce")),
        "{error}"
    );
}

#[test]
fn jobs_that_cannot_work_are_refused_with_the_reason() {
    let recipe = Recipe { methods: vec!["kd"], ..Recipe::default() };
    let mut cases: Vec<(&str, Job)> = vec![];
    let mut case = |message, change: &dyn Fn(&mut Job)| {
        let mut job = recipe.job(None);
        change(&mut job);
        cases.push((message, job));
    };
    case("method kd needs a teacher", &|job| job.teachers.clear());
    case("student tiny has 3 outputs, the data 4 classes", &|job| job.data.classes = 4);
    case("a run without a loss", &|job| job.objectives.clear());
    case("optim.lr", &|job| job.optim.lr = -1.0);
    case("schedule.epochs", &|job| job.schedule.epochs = 0);
    case("must be finite", &|job| job.objectives[0].weight = f64::NAN);
    case("the training set is empty", &|job| job.data.train = Box::new(Memory::new(0, 4, false, DType::F32)));
    let with = |cut, views| {
        move |job: &mut Job| job.objectives = vec![Objective::new(Box::new(Embedded { cut, views, ..Embedded::default() }), 1.0)]
    };
    case("needs stage.7 of the student", &with(Cut::Stage(7), 1));
    case("needs preact.0 of the student", &with(Cut::Preact(0), 1));
    case("needs logits_dist of the student", &with(Cut::LogitsDist, 1));
    case("needs 2 augmented views", &with(Cut::Embedding, 2));
    case("no parameters to train", &|job| job.student = Arc::new(oracle(4, DType::F32)));
    case("needs class means", &|job| {
        job.objectives = vec![Objective::new(crate::support::method("nd"), 1.0)];
        job.data.plain = None;
    });
    for (message, job) in cases {
        let error = refusal(job);
        assert!(error.to_string().contains(message), "{error} instead of {message}");
        assert!(error.is_usage(), "{error}");
    }
}

#[test]
fn evaluation_counts_and_refuses_foreign_labels() {
    let teacher = oracle(4, DType::F64);
    let mut source = Memory::new(17, 5, true, DType::F64);
    let e = evaluate(&teacher, &mut source).unwrap();
    assert_eq!((e.total, e.correct5), (17, 17));
    assert!(e.correct > 14 && e.top1 == 100.0 * e.correct as f64 / 17.0, "{e:?}");
    // Batch sizes change nothing, and f32 next to nothing.
    let other = evaluate(&teacher, &mut Memory::new(17, 3, true, DType::F64)).unwrap();
    assert!((other.loss - e.loss).abs() < 1e-12 && other.correct == e.correct);
    let single = evaluate(&oracle(4, DType::F32), &mut Memory::new(17, 5, true, DType::F32)).unwrap();
    assert!((single.loss - e.loss).abs() < 1e-5 && (single.ece - e.ece).abs() < 1e-5);

    source.shift = 1;
    let error = evaluate(&teacher, &mut source).unwrap_err();
    assert!(error.to_string().contains("label 3"), "{error}");
    assert!(evaluate(&teacher, &mut Memory::new(0, 5, true, DType::F64)).is_err());
}

#[test]
fn class_means_are_the_mean_embeddings() {
    let teacher = oracle(4, DType::F64);
    let means = class_means(&teacher, &mut Memory::new(17, 5, true, DType::F64), CLASSES).unwrap();
    assert_eq!(means.dims(), [CLASSES, 4]);
    // Channel c of the oracle sees (1 + c/8) times a pixel of mean k, plus 4; without padding's share.
    let rows = means.to_vec2::<f64>().unwrap();
    for (k, row) in rows.iter().enumerate() {
        for (c, v) in row.iter().enumerate() {
            let expected = 4.0 + k as f64 * (1.0 + c as f64 / 8.0);
            assert!((v - expected).abs() < 0.2, "class {k}, channel {c}: {v} instead of {expected}");
        }
    }
    let other = class_means(&teacher, &mut Memory::new(17, 4, true, DType::F64), CLASSES).unwrap();
    assert!((other - &means).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap() < 1e-12);

    let error = class_means(&teacher, &mut Memory::new(2, 5, true, DType::F64), CLASSES).unwrap_err();
    assert!(error.to_string().contains("class 2 has no training sample"), "{error}");
    let dead = oracle(4, DType::F64);
    dead.parameters().assign(|name| (name == "bn.bias").then(|| Tensor::full(-100.0, 4, &Device::Cpu).unwrap())).unwrap();
    let error = class_means(&dead, &mut Memory::new(9, 5, true, DType::F64), CLASSES).unwrap_err();
    assert!(error.to_string().contains("class 0 is zero"), "{error}");
}

#[test]
fn clipping_moves_the_student_less() {
    let distance = |clip: f64| {
        let mut recipe = Recipe::default();
        recipe.optim.clip_grad_norm = clip;
        recipe.optim.weight_decay = 0.0;
        recipe.optim.momentum = 0.0;
        recipe.optim.nesterov = false;
        recipe.schedule.epochs = 1;
        let job = recipe.job(None);
        let values = || job.student.params().unwrap().values().snapshot().unwrap();
        let (before, student) = (values(), job.student.clone());
        train(job, &mut [], &Default::default()).unwrap();
        let after = student.params().unwrap().values().snapshot().unwrap();
        (after - before).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt()
    };
    // Four steps of a gradient of norm 0.01 at the learning rate 0.02.
    let bound = 4.0 * 0.01 * 0.02;
    assert!(distance(0.01) <= bound * 1.001 && distance(0.01) > bound * 0.5, "{} of {bound}", distance(0.01));
    assert!(distance(0.0) > 2.0 * bound);
}

#[test]
fn fingerprints_tell_weights_apart() {
    let a = fingerprint(&tiny_net(4, DType::F32)).unwrap();
    assert_eq!(a, fingerprint(&tiny_net(4, DType::F32)).unwrap());
    let other = tiny_net(4, DType::F32);
    other.parameters().stats().write::<f32, _>(|s| s[0] += 1e-6).unwrap();
    assert_ne!(a, fingerprint(&other).unwrap());
}
