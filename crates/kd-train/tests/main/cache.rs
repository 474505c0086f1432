//! Caches of a teacher's logits.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use candle_core::DType;
use kd_train::files::Files;
use kd_train::{Error, Event, Job, LogitCache, Outcome, Result, Sink, StepReport, train};

use crate::support::{Counted, Memory, Recipe, oracle};

const EPOCHS: usize = 3;

fn job(cache: Option<LogitCache>) -> (Job, Arc<AtomicUsize>) {
    let mut job = Recipe { methods: vec!["ce", "kd"], ..Recipe::default() }.job(None);
    let passes = Counted::wrap(&mut job.teachers[0]);
    job.teachers[0].cache = cache;
    (job, passes)
}

/// Keeps the reports, and stops after a number of steps.
#[derive(Default)]
struct Steps(Vec<StepReport>, Option<(usize, Arc<AtomicBool>)>);

impl Sink for Steps {
    fn event(&mut self, event: &Event) -> Result<()> {
        if let Event::Step(report) = event {
            self.0.push(StepReport { seconds: 0.0, waiting: 0.0, parts: Default::default(), ..report.clone() });
        }
        if let Some((steps, stop)) = &self.1 {
            stop.store(self.0.len() >= *steps, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// The student's bits, every step, and the passes through the teacher during the steps.
fn run(cache: Option<LogitCache>) -> (String, Vec<StepReport>, usize) {
    let (job, passes) = job(cache);
    let mut steps = Steps::default();
    let Outcome::Finished(result) = train(job, &mut [&mut steps], &false.into()).unwrap() else { panic!("not finished") };
    // Two batches of the test set were for the teacher's evaluation.
    (result.fingerprint, steps.0, passes.load(Ordering::Relaxed) - 2)
}

fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_run_with_a_cache_has_the_same_bits_and_the_next_one_asks_no_teacher() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| LogitCache::new(dir.path().join(name));
    let (bits, steps, passes) = run(None);
    assert_eq!(passes, steps.len());
    for expected in [steps.len(), 0, 0] {
        let again = run(Some(at("f32")));
        assert_eq!((&again.0, again.2), (&bits, expected));
        assert!(again.1 == steps);
    }
    assert_eq!(files(&dir.path().join("f32")), ["000000-0.logits", "000001-0.logits", "000002-0.logits", "cache.json"]);
    let size = |name: &str| std::fs::metadata(dir.path().join(name).join("000001-0.logits")).unwrap().len();
    assert_eq!(at("f32").bytes(EPOCHS, 1, 18, 3), 3 * size("f32"));

    // In f16 all runs are alike, and near.
    let half = || LogitCache { half: true, ..at("f16") };
    let (bits16, steps16, passes) = run(Some(half()));
    assert_eq!(passes, steps.len());
    assert!(bits16 != bits);
    assert!(steps.iter().zip(&steps16).all(|(a, b)| (a.loss - b.loss).abs() < 1e-2 * a.loss.abs()), "{steps16:?}");
    assert_eq!(run(Some(half())), (bits16, steps16, 0));
    assert_eq!(half().bytes(EPOCHS, 1, 18, 3), 3 * size("f16"));
    assert!(size("f16") < size("f32"));
}

#[test]
fn only_whole_epochs_are_kept_and_others_asked_for_again() {
    let dir = tempfile::tempdir().unwrap();
    let cache = || LogitCache::new(dir.path());
    let (job, _) = job(Some(cache()));
    let stop = Arc::new(AtomicBool::new(false));
    train(job, &mut [&mut Steps(vec![], Some((6, stop.clone())))], &stop).unwrap();
    assert_eq!(files(dir.path()), ["000000-0.logits", "cache.json"]);
    let (bits, steps, passes) = run(Some(cache()));
    assert_eq!((bits, passes), (run(None).0, steps.len() - steps.len() / EPOCHS));
}

#[test]
fn a_stale_or_damaged_cache_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let with = |augmentation: &str| LogitCache {
        inputs: [("augmentation".to_string(), augmentation.to_string())].into(),
        ..LogitCache::new(dir.path())
    };
    let refusal = |change: &dyn Fn(&mut Job)| {
        let (mut job, _) = job(Some(with("flip")));
        change(&mut job);
        train(job, &mut [], &false.into()).expect_err("must be refused")
    };
    run(Some(with("flip")));
    type Change<'a> = (&'a str, &'a dyn Fn(&mut Job));
    let changes: [Change; 6] = [
        ("teacher", &|job| job.teachers[0].model = Arc::new(oracle(7, DType::F32))),
        ("data", &|job| job.data.fingerprint = "other".to_string()),
        ("seed", &|job| job.seed = 2),
        ("augmentation", &|job| job.teachers[0].cache = Some(with("crop"))),
        ("type", &|job| job.teachers[0].cache.as_mut().unwrap().half = true),
        ("batch size", &|job| {
            job.data.batch_size = 6;
            job.data.train = Box::new(Memory::new(18, 6, false, DType::F32));
        }),
    ];
    for (expected, change) in changes {
        let error = refusal(change);
        assert!(matches!(&error, Error::Stale { what, .. } if what == expected), "{expected}: {error}");
        assert!(error.is_usage());
    }
    let path = dir.path().join("000001-0.logits");
    let whole = std::fs::read(&path).unwrap();
    for at in [0, 64, 100, whole.len() - 1] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let error = refusal(&|_| {});
        assert!(matches!(&error, Error::Damaged { path: p, .. } if *p == path), "byte {at}: {error}");
    }
    std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    assert!(matches!(refusal(&|_| {}), Error::Damaged { .. }));

    struct Full;
    impl Files for Full {
        fn free_space(&self, _: &Path) -> io::Result<Option<u64>> {
            Ok(Some(100))
        }
    }
    let other = tempfile::tempdir().unwrap();
    let full = || LogitCache { files: Arc::new(Full), ..LogitCache::new(other.path()) };
    let error = refusal(&|job| job.teachers[0].cache = Some(full()));
    assert!(matches!(&error, Error::Space { needed, .. } if *needed == full().bytes(EPOCHS, 1, 18, 3)), "{error}");
}
