//! A run that was refused leaves no directory behind; one that was begun keeps what it has.

use std::sync::Arc;

use kd_train::{Error, Job, train};

use crate::support::{Recipe, oracle, place, tiny_net};

fn refused(job: Job) -> Error {
    train(job, &mut [], &Default::default()).unwrap_err()
}

#[test]
fn what_a_refused_run_made_is_taken_back() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let recipe = Recipe { methods: vec!["ce", "kd"], ..Recipe::default() };
    // Found before the first step: a teacher that knows nothing.
    let mut job = recipe.job(Some(place(&run)));
    job.teachers[0].model = Arc::new(tiny_net(6, recipe.train.dtype).frozen());
    job.teachers[0].model.params().unwrap().values().write::<f32, _>(|v| v.fill(0.0)).unwrap();
    assert!(matches!(refused(job), Error::BadTeacher { .. }));
    assert!(!run.exists());
    // What somebody else put there stays.
    std::fs::create_dir(&run).unwrap();
    std::fs::write(run.join("notes.txt"), "mine").unwrap();
    let mut job = recipe.job(Some(place(&run)));
    job.teachers[0].model = Arc::new(tiny_net(6, recipe.train.dtype).frozen());
    job.teachers[0].model.params().unwrap().values().write::<f32, _>(|v| v.fill(0.0)).unwrap();
    refused(job);
    let left: Vec<_> = std::fs::read_dir(&run).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["notes.txt"]);
    // The next try has the place for itself.
    recipe.finish(Some(place(&run)));
}

#[test]
fn what_was_begun_stays() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = Recipe { methods: vec!["ce", "kd"], ..Recipe::default() };
    recipe.run(Some(place(dir.path())), Some(2)).unwrap();
    // A resume with another teacher is refused, and the checkpoint is still there.
    let mut job = recipe.job(Some(place(dir.path())));
    job.teachers[0].model = Arc::new(oracle(5, recipe.train.dtype));
    assert!(matches!(refused(job), Error::Mismatch { .. }));
    recipe.finish(Some(place(dir.path())));
}
