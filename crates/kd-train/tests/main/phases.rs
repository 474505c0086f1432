//! Initial phases: their order, what they train, what they leave as it is.

use std::sync::Arc;

use kd_core::Model;
use kd_train::{Event, Objective, Outcome, Result, Sink, fingerprint, train};

use crate::support::{Recipe, Warm};

/// The student and the adapter at the beginning of each epoch, and the steps in between.
struct Watch {
    student: Arc<dyn Model>,
    adapter: Arc<dyn Model>,
    seen: Vec<(Option<String>, usize, [String; 4])>,
    steps: Vec<(Option<String>, f64, Vec<String>)>,
}

impl Watch {
    fn look(&self) -> [String; 4] {
        let params = self.student.params().unwrap();
        let print = |prefix: &str| {
            let tensors = params.state_dict().unwrap().into_iter().filter(|(name, _)| name.starts_with(prefix));
            format!(
                "{:?}",
                tensors
                    .map(|(_, t)| t.flatten_all().unwrap().to_dtype(candle_core::DType::F64).unwrap().to_vec1::<f64>())
                    .collect::<Vec<_>>()
            )
        };
        [print("conv"), print("bn"), print("fc"), fingerprint(self.adapter.as_ref()).unwrap()]
    }
}

impl Sink for Watch {
    fn event(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::EpochStarted { epoch, phase, .. } => self.seen.push((phase.clone(), *epoch, self.look())),
            Event::Step(s) => self.steps.push((s.phase.clone(), s.lr, s.terms.iter().map(|t| t.0.clone()).collect())),
            _ => {}
        }
        Ok(())
    }
}

/// A method whose adapter is known from outside before it is prepared.
struct Known(Warm, Arc<std::sync::Mutex<Option<Arc<dyn Model>>>>);

impl kd_core::Method for Known {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn needs(&self) -> kd_core::Needs {
        self.0.needs()
    }

    fn prepare(&mut self, setup: &kd_core::Setup<'_>) -> kd_core::Result<()> {
        self.0.prepare(setup)?;
        *self.1.lock().unwrap() = self.0.networks().pop();
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        self.0.networks()
    }

    fn phases(&self) -> Vec<kd_core::Phase> {
        self.0.phases()
    }

    fn idle(&self, epoch: usize) -> Vec<usize> {
        self.0.idle(epoch)
    }

    fn loss(&mut self, step: &kd_core::StepView<'_>) -> kd_core::Result<kd_core::LossTerms> {
        self.0.loss(step)
    }

    fn phase_loss(&mut self, phase: usize, step: &kd_core::StepView<'_>) -> kd_core::Result<kd_core::LossTerms> {
        self.0.phase_loss(phase, step)
    }
}

/// Watches once the adapter is there.
struct Late(Option<Watch>, Arc<dyn Model>, Arc<std::sync::Mutex<Option<Arc<dyn Model>>>>);

impl Sink for Late {
    fn event(&mut self, event: &Event) -> Result<()> {
        if self.0.is_none() {
            let adapter = self.2.lock().unwrap().clone().expect("methods are prepared before the first event");
            self.0 = Some(Watch { student: self.1.clone(), adapter, seen: vec![], steps: vec![] });
        }
        self.0.as_mut().unwrap().event(event)
    }
}

#[test]
fn phases_come_first_and_train_what_they_say() {
    let mut recipe = Recipe { methods: vec!["ce", "warm"], ..Recipe::default() };
    recipe.optim.weight_decay = 0.01;
    let mut job = recipe.job(None);
    let adapter = Arc::new(std::sync::Mutex::new(None));
    job.objectives[1] = Objective::new(Box::new(Known(Warm::default(), adapter.clone())), 1.0);
    let mut late = Late(None, job.student.clone(), adapter);
    let Outcome::Finished(result) = train(job, &mut [&mut late], &false.into()).unwrap() else { panic!("not finished") };
    assert_eq!((result.epochs, result.steps, result.history.len()), (3, recipe.steps(), 3));

    let watch = late.0.unwrap();
    let at: Vec<(Option<&str>, usize)> = watch.seen.iter().map(|(phase, epoch, _)| (phase.as_deref(), *epoch)).collect();
    assert_eq!(at, [(Some("adapter"), 0), (Some("adapter"), 1), (Some("body"), 0), (None, 0), (None, 1), (None, 2)]);
    let end = (None, 3, watch.look());
    let looks: Vec<_> = watch.seen.iter().chain([&end]).map(|s| &s.2).collect();
    // What moves from epoch to epoch: conv, bn, fc, adapter.
    let moves = |i: usize| std::array::from_fn(|part| looks[i][part] != looks[i + 1][part]);
    for (epoch, expected) in [
        (0, [false, false, false, true]),
        (1, [false, false, false, true]),
        (2, [true, true, false, false]),
        (3, [true, true, true, false]),
        (5, [true, true, true, false]),
    ] {
        assert_eq!(moves(epoch), expected, "epoch {epoch}");
    }
    for (phase, lr, terms) in &watch.steps {
        let expected: (f64, &[&str]) = match phase.as_deref() {
            Some("adapter") => (0.5, &["warm.own"]),
            Some(_) => (recipe.optim.lr, &["warm.body"]),
            None => (*lr, &["ce.ce", "warm.size"]),
        };
        assert_eq!((*lr, terms.iter().map(String::as_str).collect::<Vec<_>>().as_slice()), expected);
    }
    // The main training's schedule begins at its own first epoch.
    assert_eq!(watch.steps.iter().find(|s| s.0.is_none()).unwrap().1, recipe.optim.lr);
}
