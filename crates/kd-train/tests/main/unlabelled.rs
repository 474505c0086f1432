//! Images without labels: who sees them, and what a run with them is.

use candle_core::{DType, Tensor};
use kd_core::{Batch, BatchSource, Cut, Mode, Model, Rng, UNLABELLED};
use kd_train::{Event, Job, train};

use crate::support::{Memory, Recipe, place, tiny_net};

/// A source that knows the labels of the samples below `known` only.
struct Partly {
    source: Memory,
    known: u32,
}

impl BatchSource for Partly {
    fn samples(&self) -> usize {
        self.source.samples()
    }

    fn batches(&self) -> usize {
        self.source.batches()
    }

    fn unlabelled(&self) -> usize {
        self.source.samples - self.known as usize
    }

    fn start(&mut self, epoch: usize, first: usize) -> kd_core::Result<()> {
        self.source.start(epoch, first)
    }

    fn next_batch(&mut self) -> kd_core::Result<Option<Batch>> {
        let Some(batch) = self.source.next_batch()? else { return Ok(None) };
        let indices = batch.indices.to_vec1::<u32>()?;
        let labels = batch.labels.to_vec1::<i64>()?.into_iter().zip(indices).map(|(l, i)| if i < self.known { l } else { UNLABELLED });
        let labels = Tensor::from_vec(labels.collect::<Vec<_>>(), batch.len(), batch.labels.device())?;
        Ok(Some(Batch { labels, ..batch }))
    }
}

fn job(recipe: &Recipe, known: u32) -> Job {
    let mut job = recipe.job(None);
    job.data.train = Box::new(Partly { source: recipe.train.clone(), known });
    job
}

fn events(job: Job) -> Vec<Event> {
    let mut log = Log(vec![]);
    train(job, &mut [&mut log], &Default::default()).unwrap();
    log.0
}

struct Log(Vec<Event>);

impl kd_train::Sink for Log {
    fn event(&mut self, event: &Event) -> kd_train::Result<()> {
        self.0.push(event.clone());
        Ok(())
    }
}

fn terms(events: &[Event]) -> Vec<Vec<(String, f64)>> {
    events.iter().filter_map(|e| if let Event::Step(s) = e { Some(s.terms.clone()) } else { None }).collect()
}

#[test]
fn losses_of_labels_see_the_labelled_and_the_others_all() {
    let recipe = Recipe { methods: vec!["ce", "kd", "nkd"], train: Memory::new(18, 9, false, DType::F64), ..Recipe::default() };
    let found = terms(&events(job(&recipe, 8)));
    let known = terms(&events(job(&recipe, 18)));
    // The first batch, by hand.
    let mut source = Partly { source: recipe.train.clone(), known: 8 };
    source.start(0, 0).unwrap();
    let batch = source.next_batch().unwrap().unwrap();
    let rows = batch.labelled().unwrap().unwrap();
    assert!((2..9).contains(&rows.elem_count()));
    let own = batch.rows(&rows).unwrap();
    assert!(own.labelled().unwrap().is_none());
    let student = tiny_net(4, DType::F64);
    let out = student.run(&batch.images[0], Cut::Input, &[Cut::Logits], Mode::Train(Rng::new(0))).unwrap().rows(&rows).unwrap();
    let ce = kd_losses::ce(out.logits().unwrap(), &own.labels).unwrap().total().unwrap().to_scalar::<f64>().unwrap();
    assert_eq!(found[0][0].0, "ce.ce");
    assert!((found[0][0].1 - ce).abs() < 1e-12, "{} and {ce}", found[0][0].1);
    // KD sees what it always sees.
    let kd = |terms: &[(String, f64)]| terms.iter().find(|(name, _)| name == "kd.kd").unwrap().1;
    assert_eq!(kd(&found[0]), kd(&known[0]));
    assert_ne!(found[0][0].1, known[0][0].1);
    // A batch without any label leaves them out.
    let none = terms(&events(job(&recipe, 0)));
    assert!(none.iter().all(|step| step.iter().all(|(name, _)| name == "kd.kd")));
}

#[test]
fn a_run_with_them_goes_on_to_the_same_bits() {
    let recipe = Recipe { methods: vec!["ce", "kd"], train: Memory::new(18, 6, false, DType::F32), ..Recipe::default() };
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, stop_after: Option<usize>| {
        let mut job = job(&recipe, 9);
        job.place = Some(place(&dir.path().join(name)));
        let stop = std::sync::atomic::AtomicBool::new(false);
        let mut steps = 0;
        struct Stop<'a>(&'a std::sync::atomic::AtomicBool, &'a mut usize, Option<usize>);
        impl kd_train::Sink for Stop<'_> {
            fn event(&mut self, event: &Event) -> kd_train::Result<()> {
                *self.1 += usize::from(matches!(event, Event::Step(_)));
                if self.2 == Some(*self.1) {
                    self.0.store(true, std::sync::atomic::Ordering::Relaxed);
                }
                Ok(())
            }
        }
        train(job, &mut [&mut Stop(&stop, &mut steps, stop_after)], &stop).unwrap();
    };
    run("whole", None);
    for stop in [1, 3, 5] {
        run("parts", Some(stop));
        run("parts", None);
        let bits = |name: &str| std::fs::read(dir.path().join(name).join("student.safetensors")).unwrap();
        assert!(bits("whole") == bits("parts"), "stopped after {stop}");
        std::fs::remove_dir_all(dir.path().join("parts")).unwrap();
    }
}

#[test]
fn without_a_loss_for_them_they_are_refused() {
    let recipe = Recipe { methods: vec!["ce", "nkd"], ..Recipe::default() };
    let error = train(job(&recipe, 9), &mut [], &Default::default()).unwrap_err();
    assert!(error.to_string().contains("need labels") && error.is_usage(), "{error}");
}
