//! Several teachers.

use std::sync::{Arc, Mutex};

use candle_core::{DType, Tensor};
use kd_core::{Cut, LossTerms, Method, Mode, Model, Needs, Setup, StepView};
use kd_train::{Error, Job, Objective, Outcome, Teacher, train};

use crate::support::{Recipe, method, oracle, place};

/// What a method saw of the teachers: their logits in the first step, the networks, the class means.
#[derive(Default)]
struct Seen {
    logits: Option<Tensor>,
    images: Option<Tensor>,
    networks: Vec<usize>,
    means: Option<Vec<usize>>,
}

struct Spy {
    needs: Needs,
    seen: Arc<Mutex<Seen>>,
}

impl Method for Spy {
    fn name(&self) -> &'static str {
        "spy"
    }

    fn needs(&self) -> Needs {
        self.needs.clone()
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> kd_core::Result<()> {
        let mut seen = self.seen.lock().unwrap();
        seen.networks = setup.models.teachers.iter().map(|t| t.spec().embedding).collect();
        seen.means = setup.class_means.map(|m| m.dims().to_vec());
        Ok(())
    }

    fn loss(&mut self, step: &StepView<'_>) -> kd_core::Result<LossTerms> {
        let teacher = step.teacher()?;
        assert_eq!((step.teachers.len(), teacher.iter().count()), (1, self.needs.teacher.len()));
        let mut seen = self.seen.lock().unwrap();
        if seen.logits.is_none() {
            (seen.logits, seen.images) = (Some(teacher.logits()?.clone()), Some(step.batch.images[0].clone()));
        }
        Ok(LossTerms::one("gap", (step.student()?.logits()? - teacher.logits()?)?.sqr()?.mean_all()?))
    }
}

/// Teachers a and b of widths 6 and 5 with these weights, and a spy that learns from one of them.
fn job(weights: [f64; 2], needs: Needs, teacher: Option<&str>) -> (Job, Arc<Mutex<Seen>>) {
    let mut job = Recipe { methods: vec!["kd"], ..Recipe::default() }.job(None);
    let named = |(name, width, weight)| Teacher { weight, ..Teacher::new(name, Arc::new(oracle(width, DType::F32))) };
    job.teachers = [("a", 6, weights[0]), ("b", 5, weights[1])].map(named).into();
    // The oracles agree but for their scale; b shouts.
    let shout = |name: &str| (name == "fc.bias").then(|| Tensor::new(&[1f32, -7.0, -22.0], &candle_core::Device::Cpu).unwrap());
    job.teachers[1].model.params().unwrap().assign(shout).unwrap();
    let seen = Arc::<Mutex<Seen>>::default();
    let spy = Box::new(Spy { needs, seen: seen.clone() });
    job.objectives = vec![Objective { teacher: teacher.map(str::to_string), ..Objective::new(spy, 1.0) }];
    (job, seen)
}

fn logits(teacher: &Arc<dyn Model>, images: &Tensor) -> Vec<Vec<f32>> {
    let out = teacher.run(images, Cut::Input, &[Cut::Logits], Mode::Eval).unwrap();
    out.logits().unwrap().to_vec2::<f32>().unwrap()
}

#[test]
fn a_loss_sees_the_weighted_mean_or_the_one_that_it_names() {
    for (weights, teacher, shares) in [
        ([1.0, 3.0], None, [0.25, 0.75]),
        ([1.0, 3.0], Some("a"), [1.0, 0.0]),
        ([0.0, 3.0], None, [0.0, 1.0]),
        ([2.0, 0.0], Some("b"), [0.0, 1.0]),
    ] {
        let (job, seen) = job(weights, Needs::logits(), teacher);
        let models: Vec<Arc<dyn Model>> = job.teachers.iter().map(|t| t.model.clone()).collect();
        train(job, &mut [], &false.into()).unwrap();
        let seen = seen.lock().unwrap();
        let images = seen.images.as_ref().unwrap();
        let (a, b) = (logits(&models[0], images), logits(&models[1], images));
        assert!(a != b);
        for ((row, a), b) in seen.logits.as_ref().unwrap().to_vec2::<f32>().unwrap().iter().zip(&a).zip(&b) {
            for ((v, a), b) in row.iter().zip(a).zip(b) {
                let expected = shares[0] * f64::from(*a) + shares[1] * f64::from(*b);
                assert!((f64::from(*v) - expected).abs() < 1e-4 * (1.0 + expected.abs()), "{v} instead of {expected}");
            }
        }
        let networks = match teacher {
            Some("a") => vec![6],
            Some(_) => vec![5],
            None => vec![6, 5],
        };
        assert_eq!(seen.networks, networks);
    }
}

#[test]
fn features_and_class_means_are_those_of_the_named_teacher() {
    let needs = Needs { teacher: vec![Cut::Embedding, Cut::Logits], class_means: true, ..Needs::default() };
    for (name, width) in [("a", 6), ("b", 5)] {
        let (job, seen) = job([1.0, 1.0], needs.clone(), Some(name));
        train(job, &mut [], &false.into()).unwrap();
        assert_eq!(seen.lock().unwrap().means, Some(vec![3, width]));
    }
    let (job, _) = job([1.0, 1.0], needs, None);
    let error = train(job, &mut [], &false.into()).unwrap_err();
    assert!(error.is_usage() && error.to_string().contains("one of a, b"), "{error}");
}

#[test]
fn several_teachers_resume_with_the_class_means_of_each() {
    let make = |place| {
        let (mut job, _) = job([1.0, 2.0], Needs::logits(), None);
        for (name, teacher) in [("nd", "a"), ("nd", "b"), ("ce", "b")] {
            job.objectives.push(Objective { teacher: Some(teacher.to_string()), ..Objective::new(method(name), 1.0) });
        }
        job.place = place;
        job
    };
    let dir = tempfile::tempdir().unwrap();
    let Outcome::Finished(whole) = train(make(None), &mut [], &false.into()).unwrap() else { panic!("not finished") };
    struct Stop<'a>(usize, &'a std::sync::atomic::AtomicBool);
    impl kd_train::Sink for Stop<'_> {
        fn event(&mut self, event: &kd_train::Event) -> kd_train::Result<()> {
            self.0 -= usize::from(matches!(event, kd_train::Event::Step(_)));
            self.1.store(self.0 == 0, std::sync::atomic::Ordering::Relaxed);
            Ok(())
        }
    }
    let stop = std::sync::atomic::AtomicBool::new(false);
    train(make(Some(place(dir.path()))), &mut [&mut Stop(6, &stop)], &stop).unwrap();
    let Outcome::Finished(resumed) = train(make(Some(place(dir.path()))), &mut [], &false.into()).unwrap() else { panic!("not finished") };
    assert_eq!(resumed.fingerprint, whole.fingerprint);
    assert_eq!(resumed.teachers.len(), 2);
}

#[test]
fn teachers_that_cannot_be_combined_are_refused() {
    let refusal = |job: Job| train(job, &mut [], &false.into()).expect_err("must be refused");
    let (named, _) = job([1.0, 1.0], Needs::logits(), Some("zebra"));
    let error = refusal(named);
    assert!(matches!(&error, Error::Refused(m) if m.contains("no teacher zebra") && m.contains("a, b")), "{error}");
    let (silent, _) = job([0.0, 0.0], Needs::logits(), None);
    assert!(refusal(silent).to_string().contains("more than 0"));
    let (mut other, _) = job([1.0, 1.0], Needs::logits(), None);
    other.teachers[1].model = Arc::new(four_classes().frozen());
    let error = refusal(other);
    assert!(error.to_string().contains("teacher b has 4 outputs, the data 3 classes"), "{error}");
}

/// A network of four classes.
fn four_classes() -> kd_nn::Network {
    let mut b = kd_nn::GraphBuilder::new("four", &[1, 4, 4]);
    b.conv("conv", kd_nn::Conv::new(2, 3));
    b.global_avg_pool();
    b.cut(Cut::Embedding);
    b.linear("fc", 4);
    b.cut(Cut::Logits);
    kd_nn::Network::new(b.finish().unwrap(), DType::F32, &candle_core::Device::Cpu).unwrap()
}
