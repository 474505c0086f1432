//! A run that was stopped ends as one that was not.

use kd_core::Schedule;
use kd_train::{Error, Event, OptimConfig, OptimKind, Outcome, RunOptions};

use crate::support::{Recipe, place, remains};

/// Recipes that between them own everything a checkpoint holds.
fn recipes() -> Vec<Recipe> {
    let base = Recipe::default();
    let adamw = OptimConfig { kind: OptimKind::Adamw, ..base.optim.clone() };
    let dot = OptimConfig { kind: OptimKind::Dot, nesterov: false, ..base.optim.clone() };
    vec![
        Recipe { validation: true, ..base.clone() },
        Recipe { methods: vec!["ce", "kd", "everything"], optim: adamw, ..base.clone() },
        Recipe {
            methods: vec!["ce", "nd"],
            options: RunOptions { checkpoint_steps: 3, eval_every: 2, ..RunOptions::default() },
            ..base.clone()
        },
        Recipe { methods: vec!["ce", "warm"], validation: true, ..base.clone() },
        Recipe { methods: vec!["ce", "kd", "everything"], optim: dot, ..base.clone() },
        Recipe { own_model: true, validation: true, options: RunOptions { checkpoint_every: 0, ..RunOptions::default() }, ..base },
    ]
}

#[test]
fn stopped_after_any_step_a_run_ends_with_the_same_bits() {
    for recipe in recipes() {
        let whole = tempfile::tempdir().unwrap();
        recipe.finish(Some(place(whole.path())));
        let expected = remains(whole.path());
        for stop in 0..=recipe.steps() {
            let dir = tempfile::tempdir().unwrap();
            let (outcome, _) = recipe.run(Some(place(dir.path())), Some(stop)).unwrap();
            assert!(matches!(outcome, Outcome::Interrupted { step, .. } if step == stop), "{outcome:?} after step {stop}");
            let events = recipe.finish(Some(place(dir.path())));
            assert!(matches!(events[0], Event::Started { step, .. } if step == stop));
            assert!(remains(dir.path()) == expected, "{:?} stopped after step {stop}", recipe.methods);
        }
    }
}

#[test]
fn stopped_after_every_step_too() {
    let recipe = &recipes()[1];
    let (whole, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    recipe.finish(Some(place(whole.path())));
    let mut calls = 0;
    while let (Outcome::Interrupted { .. }, _) = recipe.run(Some(place(dir.path())), Some(1)).unwrap() {
        calls += 1;
    }
    assert_eq!(calls, recipe.steps());
    assert!(remains(dir.path()) == remains(whole.path()));
}

#[test]
fn equal_runs_have_equal_bits() {
    let recipe = &recipes()[1];
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    dirs.iter().for_each(|dir| drop(recipe.finish(Some(place(dir.path())))));
    assert!(remains(dirs[0].path()) == remains(dirs[1].path()));
}

#[test]
fn a_finished_run_returns_its_result_and_weights_at_once() {
    let recipe = &recipes()[0];
    let dir = tempfile::tempdir().unwrap();
    let (first, _) = recipe.run(Some(place(dir.path())), None).unwrap();
    let before = remains(dir.path());
    let job = recipe.job(Some(place(dir.path())));
    let student = job.student.clone();
    let again = kd_train::train(job, &mut [], &Default::default()).unwrap();
    assert_eq!(first, again);
    let Outcome::Finished(result) = again else { panic!("not finished") };
    assert_eq!(kd_train::fingerprint(student.as_ref()).unwrap(), result.fingerprint);
    assert_eq!(kd_train::run_dir::result(dir.path()).unwrap(), Some(*result));
    assert!(remains(dir.path()) == before);
}

#[test]
fn each_step_is_in_the_metrics_once() {
    let recipe = &recipes()[2];
    let dir = tempfile::tempdir().unwrap();
    recipe.run(Some(place(dir.path())), Some(7)).unwrap();
    recipe.finish(Some(place(dir.path())));
    let text = std::fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines[0]["event"], "started");
    let steps: Vec<_> = lines.iter().filter(|l| l["event"] == "step").collect();
    assert_eq!(steps.len(), recipe.steps());
    for (s, line) in steps.iter().enumerate() {
        assert_eq!(line["step"], s);
        let terms = line["terms"].as_object().unwrap();
        let sum: f64 = terms.values().map(|v| v.as_f64().unwrap()).sum();
        assert_eq!(terms.keys().collect::<Vec<_>>(), ["ce.ce", "nd.nd"]);
        assert!((sum - line["loss"].as_f64().unwrap()).abs() < 1e-6);
    }
    let evaluated =
        |subject: &str| lines.iter().filter(|l| l["event"] == "evaluated" && l["subject"].to_string().contains(subject)).count();
    assert_eq!((evaluated("oracle"), evaluated("student")), (1, 2));
}

#[test]
fn the_best_on_the_validation_split_is_exported() {
    // A learning rate that grows out of hand: the first student is the best.
    let recipe = Recipe {
        validation: true,
        optim: OptimConfig { lr: 0.05, ..OptimConfig::default() },
        schedule: Schedule { epochs: 6, milestones: vec![3], gamma: 400.0, ..Schedule::default() },
        ..Recipe::default()
    };
    for kept_in_memory in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let (outcome, _) = recipe.run((!kept_in_memory).then(|| place(dir.path())), None).unwrap();
        let Outcome::Finished(result) = outcome else { panic!("not finished") };
        let best = result.best.unwrap();
        let last = result.history.last().unwrap();
        assert!(best.epochs < 6 && best.evaluation.top1 > last.evaluation.top1, "{result:?}");
        assert_eq!(result.exported, kd_train::Exported::Best);
        let shortened = Recipe { schedule: Schedule { epochs: best.epochs, ..recipe.schedule.clone() }, ..recipe.clone() };
        let (Outcome::Finished(alone), _) = shortened.run(None, None).unwrap() else { panic!("not finished") };
        assert_eq!(alone.fingerprint, result.fingerprint);
        assert_eq!(alone.test, result.test);
    }
}

#[test]
fn another_run_is_not_continued() {
    let recipe = Recipe { methods: vec!["kd"], ..Recipe::default() };
    let dir = tempfile::tempdir().unwrap();
    recipe.run(Some(place(dir.path())), Some(2)).unwrap();
    let mut other = place(dir.path());
    other.config = "seed = 2\n".to_string();
    let error = recipe.run(Some(other), None).unwrap_err();
    assert!(matches!(&error, Error::Mismatch { what, .. } if what == "configuration"), "{error}");
    assert!(error.to_string().contains("`seed = 1`") && error.to_string().contains("`seed = 2`"), "{error}");

    let mut job = recipe.job(Some(place(dir.path())));
    job.data.fingerprint = "other images".to_string();
    let error = kd_train::train(job, &mut [], &Default::default()).unwrap_err();
    assert!(matches!(&error, Error::Mismatch { what, .. } if what == "data"), "{error}");

    let mut job = recipe.job(Some(place(dir.path())));
    job.teachers[0].model = std::sync::Arc::new(crate::support::oracle(5, recipe.train.dtype));
    let error = kd_train::train(job, &mut [], &Default::default()).unwrap_err();
    assert!(matches!(&error, Error::Mismatch { what, .. } if what == "teacher oracle"), "{error}");
    assert!(error.is_usage());
}
