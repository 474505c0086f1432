//! Students that learn side by side end as if each had been alone.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use candle_core::{DType, Tensor};
use kd_core::{Cut, LossTerms, Method, Mode, Model, Needs, Schedule, StepView};
use kd_train::{Error, Event, Objective, OptimConfig, Outcome, Result, RunOptions, RunPlace, Shared, Sink, Student, train_all};

use crate::support::{Counted, Recipe, place, remains};

/// Recipes that differ in everything that a student has for itself.
fn recipes() -> Vec<Recipe> {
    let base = Recipe::default();
    vec![
        Recipe { methods: vec!["ce"], ..base.clone() },
        Recipe { methods: vec!["ce", "kd"], schedule: Schedule { epochs: 5, ..base.schedule.clone() }, ..base.clone() },
        Recipe { methods: vec!["ce", "kd", "everything"], optim: OptimConfig { lr: 0.01, ..base.optim.clone() }, ..base.clone() },
        Recipe {
            methods: vec!["nd", "ce"],
            options: RunOptions { checkpoint_steps: 3, eval_every: 2, ..RunOptions::default() },
            ..base.clone()
        },
        Recipe { methods: vec!["ce", "warm", "kd"], ..base.clone() },
        Recipe { methods: vec!["kd"], own_model: true, ..base },
    ]
}

/// The jobs of `recipes` with what they share taken from one that has a teacher.
fn together(recipes: &[Recipe], places: Vec<Option<RunPlace>>) -> (Shared, Vec<Student>) {
    let job = Recipe { methods: vec!["kd"], ..recipes[0].clone() }.job(None);
    let shared = Shared { teachers: job.teachers, data: job.data, seed: job.seed };
    let student = |(recipe, place): (&Recipe, Option<RunPlace>)| {
        let job = recipe.job(place);
        Student {
            model: job.student,
            objectives: job.objectives,
            optim: job.optim,
            schedule: job.schedule,
            options: job.options,
            place: job.place,
        }
    };
    (shared, recipes.iter().zip(places).map(student).collect())
}

/// Sets the flag after so many events of a step, whoever's.
struct StopAfter<'a> {
    left: &'a AtomicUsize,
    stop: &'a AtomicBool,
}

impl Sink for StopAfter<'_> {
    fn event(&mut self, event: &Event) -> Result<()> {
        if matches!(event, Event::Step(_)) && self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.stop.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

fn run(shared: Shared, students: Vec<Student>, steps: usize) -> Result<Vec<Result<Outcome>>> {
    let (left, stop) = (AtomicUsize::new(steps), AtomicBool::new(false));
    let mut sinks: Vec<StopAfter> = students.iter().map(|_| StopAfter { left: &left, stop: &stop }).collect();
    train_all(shared, students.into_iter().zip(sinks.iter_mut().map(|s| s as &mut dyn Sink)).collect(), &stop)
}

/// The recipe by itself, but with the teacher that the others have: it is part of the fingerprints and of the metrics.
fn alone(recipe: &Recipe, dir: &std::path::Path, steps: usize) {
    let (shared, students) = together(std::slice::from_ref(recipe), vec![Some(place(dir))]);
    run(shared, students, steps).unwrap();
}

#[test]
fn each_student_gets_the_bits_that_it_would_have_got_alone() {
    let recipes = recipes();
    let dir = tempfile::tempdir().unwrap();
    let at = |kind: &str, i: usize| dir.path().join(format!("{kind}{i}"));
    for (i, recipe) in recipes.iter().enumerate() {
        alone(recipe, &at("alone", i), 0);
    }
    let places = (0..recipes.len()).map(|i| Some(place(&at("together", i)))).collect();
    let (shared, students) = together(&recipes, places);
    for outcome in run(shared, students, 0).unwrap() {
        assert!(matches!(outcome, Ok(Outcome::Finished(_))), "{outcome:?}");
    }
    for i in 0..recipes.len() {
        assert!(remains(&at("alone", i)) == remains(&at("together", i)), "student {i}");
    }
}

#[test]
fn a_group_stopped_anywhere_goes_on_to_the_same_bits() {
    let recipes = recipes();
    let dir = tempfile::tempdir().unwrap();
    let whole: Vec<_> = recipes
        .iter()
        .enumerate()
        .map(|(i, recipe)| {
            let at = dir.path().join(format!("alone{i}"));
            alone(recipe, &at, 0);
            remains(&at)
        })
        .collect();
    for steps in [1, 7, 20, 25, 27, 44, 70] {
        let at = |i: usize| dir.path().join(format!("{steps}-{i}"));
        let again = || together(&recipes, (0..recipes.len()).map(|i| Some(place(&at(i)))).collect());
        let (shared, students) = again();
        let stopped = run(shared, students, steps).unwrap();
        assert!(stopped.iter().any(|o| matches!(o, Ok(Outcome::Interrupted { .. }))), "{stopped:?}");
        let (shared, students) = again();
        run(shared, students, 0).unwrap();
        for (i, whole) in whole.iter().enumerate() {
            assert!(remains(&at(i)) == *whole, "student {i} stopped after {steps} steps");
        }
    }
}

#[test]
fn students_at_unequal_places_join_when_it_comes_to_them() {
    let recipes = recipes();
    let dir = tempfile::tempdir().unwrap();
    let at = |kind: &str, i: usize| dir.path().join(format!("{kind}{i}"));
    for (i, recipe) in recipes.iter().enumerate() {
        alone(recipe, &at("whole", i), 0);
        // Nowhere yet, in the middle of an epoch, at the end of one, finished.
        if i > 0 {
            alone(recipe, &at("apart", i), [3, 8, 0, 11, 2][i - 1]);
        }
    }
    let places = (0..recipes.len()).map(|i| Some(place(&at("apart", i)))).collect();
    let (shared, students) = together(&recipes, places);
    run(shared, students, 0).unwrap();
    for i in 0..recipes.len() {
        assert!(remains(&at("whole", i)) == remains(&at("apart", i)), "student {i}");
    }
}

/// A loss that stops being a number.
struct Bursts;

impl Method for Bursts {
    fn name(&self) -> &'static str {
        "bursts"
    }

    fn needs(&self) -> Needs {
        Needs::supervised()
    }

    fn loss(&mut self, step: &StepView<'_>) -> kd_core::Result<LossTerms> {
        let factor = if step.progress.step == 5 { f64::NAN } else { 1.0 };
        Ok(LossTerms::one("size", (step.student()?.logits()?.sqr()?.mean_all()? * factor)?))
    }
}

#[test]
fn a_student_that_fails_is_stopped_alone() {
    let recipes = recipes();
    let recipes = &recipes[..3];
    let dir = tempfile::tempdir().unwrap();
    let at = |kind: &str, i: usize| dir.path().join(format!("{kind}{i}"));
    for (i, recipe) in recipes.iter().enumerate() {
        alone(recipe, &at("alone", i), 0);
    }
    let (shared, mut students) = together(recipes, (0..3).map(|i| Some(place(&at("together", i)))).collect());
    students[1].objectives = vec![Objective::new(Box::new(Bursts), 1.0)];
    let outcomes = run(shared, students, 0).unwrap();
    assert!(matches!(&outcomes[1], Err(Error::NonFinite { what, step: 5, .. }) if what == "loss term bursts.size"), "{:?}", outcomes[1]);
    for i in [0, 2] {
        assert!(remains(&at("alone", i)) == remains(&at("together", i)), "student {i}");
    }
}

#[test]
fn each_batch_passes_through_the_teacher_once() {
    let recipe = Recipe { methods: vec!["kd"], ..Recipe::default() };
    let passes = |n: usize| {
        let (mut shared, students) = together(&vec![recipe.clone(); n], vec![None; n]);
        let count = Counted::wrap(&mut shared.teachers[0]);
        run(shared, students, 0).unwrap();
        count.load(Ordering::Relaxed)
    };
    // Each step, and the evaluation before the first.
    assert_eq!(passes(1), recipe.steps() + 2);
    assert_eq!(passes(4), passes(1));
    // Nobody listens: only the evaluation.
    let (mut shared, students) = together(&[Recipe::default()], vec![None]);
    let count = Counted::wrap(&mut shared.teachers[0]);
    run(shared, students, 0).unwrap();
    assert_eq!(count.load(Ordering::Relaxed), 2);
}

#[test]
fn one_that_cannot_work_is_refused_before_anybody_begins() {
    let dir = tempfile::tempdir().unwrap();
    let recipes = &recipes()[..2];
    let (shared, mut students) = together(recipes, (0..2).map(|i| Some(place(&dir.path().join(i.to_string())))).collect());
    students[1].optim.lr = -1.0;
    assert!(run(shared, students, 0).unwrap_err().to_string().contains("optim.lr"));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);

    let (shared, students) = together(recipes, vec![Some(place(dir.path())), Some(place(dir.path()))]);
    let error = run(shared, students, 0).unwrap_err();
    assert!(matches!(error, Error::Locked { .. }), "{error}");
}

/// What the teacher says does not depend on who else asks: the bits of its logits are the same with every set of cuts.
#[test]
fn more_cuts_do_not_change_a_teachers_bits() {
    let images = |n: usize, [c, h, w]: [usize; 3]| {
        let rng = kd_core::Rng::new(3).named("images");
        let pixels: Vec<f32> = (0..n * c * h * w).map(|i| rng.normal(i as u64) as f32).collect();
        Tensor::from_vec(pixels, (n, c, h, w), &candle_core::Device::Cpu).unwrap()
    };
    for name in ["resnet20", "wrn_16_2", "vgg8", "fnkd_resnet20_v2", "imagenet_mobilenet_v2", "imagenet_shufflenet_v2_x1_0"] {
        let entry = kd_models::find(name).unwrap();
        let shape = [3, 32, 32];
        let graph = entry.build(&kd_models::Config::new(7, shape)).unwrap();
        for precision in [kd_nn::Precision::Fast, kd_nn::Precision::Strict] {
            let network = kd_nn::Network::new(graph.clone(), DType::F32, &candle_core::Device::Cpu).unwrap();
            network.init(kd_core::Rng::new(1)).unwrap();
            let network = network.with_precision(precision).frozen();
            let spec = network.spec().clone();
            let stages = (0..spec.stages.len()).map(Cut::Stage);
            let preacts = (0..spec.stages.len()).filter(|&i| spec.stages[i].has_preact).map(Cut::Preact);
            let blocks = (1..=spec.blocks.len()).map(Cut::Block);
            let all: Vec<Cut> = stages.chain(preacts).chain(blocks).chain([Cut::Embedding, Cut::Logits]).collect();
            let x = images(11, shape);
            let bits = |wanted: &[Cut], of: Cut| {
                let outputs = network.run(&x, Cut::Input, wanted, Mode::Eval).unwrap();
                let values = outputs.get(of).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                values.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let outputs = network.run(&x, Cut::Input, &all, Mode::Eval).unwrap();
            let whole = |of| outputs.get(of).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let whole = |of| whole(of).into_iter().map(f32::to_bits).collect::<Vec<_>>();
            for &cut in &all {
                let together = whole(cut);
                assert!(bits(&[cut], cut) == together, "{name} {precision:?}: {cut} alone");
                assert!(bits(&[cut, Cut::Logits], cut) == together, "{name} {precision:?}: {cut} with the logits");
                assert!(bits(&[cut, Cut::Logits], Cut::Logits) == whole(Cut::Logits), "{name} {precision:?}: logits with {cut}");
            }
        }
    }
}
