//! Small networks, data and methods for runs of a few milliseconds.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use candle_core::{DType, Device, Tensor, Var};
use kd_core::{
    Batch, BatchSource, Classifier, Cut, LossTerms, Method, Mode, Model, ModelSpec, Needs, Outputs, Params, Phase, Rng, Schedule,
    ScheduleKind, Setup, StateDict, StepView, Trainable,
};
use kd_nn::{Conv, GraphBuilder, Network};
use kd_train::{Data, Event, Job, Objective, OptimConfig, Outcome, Result, RunOptions, RunPlace, Sink, Teacher, train};

pub(crate) const CLASSES: usize = 3;

/// conv, batch norm, ReLU, mean, linear on 1x4x4 images.
pub(crate) fn tiny_net(width: usize, dtype: DType) -> Network {
    let mut b = GraphBuilder::new("tiny", &[1, 4, 4]);
    b.conv("conv", Conv::new(width, 3).pad(1));
    b.batch_norm("bn");
    b.relu();
    b.stage(0, "relu", Some("bn"));
    b.global_avg_pool();
    b.cut(Cut::Embedding);
    b.linear("fc", CLASSES);
    b.cut(Cut::Logits);
    let network = Network::new(b.finish().unwrap(), dtype, &Device::Cpu).unwrap();
    network.init(Rng::new(11)).unwrap();
    network
}

/// A frozen network that beats chance on [`Memory`]: it reads the class off the image's mean.
pub(crate) fn oracle(width: usize, dtype: DType) -> Network {
    let network = tiny_net(width, dtype).frozen();
    let fill = |name: &str, shape: &[usize]| {
        let mut v = vec![0.0; shape.iter().product()];
        match name {
            // Every channel sums the middle pixel; the bias keeps the ReLU open.
            "conv.weight" => (0..width).for_each(|c| v[c * 9 + 4] = 1.0 + c as f64 / 8.0),
            "bn.weight" | "bn.running_var" => v.fill(1.0),
            "bn.bias" => v.fill(4.0),
            // score of class k: 2 k m - k^2 for the mean m, largest where k is nearest to m.
            "fc.weight" => (0..CLASSES).for_each(|k| v[k * width] = 2.0 * k as f64),
            "fc.bias" => (0..CLASSES).for_each(|k| v[k] = -((k * k) as f64) - 8.0 * k as f64),
            _ => {}
        }
        Tensor::from_vec(v, shape, &Device::Cpu).unwrap()
    };
    let shapes: std::collections::BTreeMap<_, _> = network.parameters().keys().into_iter().collect();
    network.parameters().assign(|name| shapes.get(name).filter(|s| !s.is_empty()).map(|s| fill(name, s))).unwrap();
    network
}

/// Samples in memory, shuffled by epoch unless `plain`: class `k` has images of mean about `k`.
#[derive(Clone)]
pub(crate) struct Memory {
    pub(crate) samples: usize,
    pub(crate) batch: usize,
    pub(crate) plain: bool,
    pub(crate) dtype: DType,
    /// The (epoch, batch) whose images are NaN.
    pub(crate) poison: Option<(usize, usize)>,
    /// Added to every label.
    pub(crate) shift: i64,
    epoch: usize,
    at: usize,
}

impl Memory {
    pub(crate) fn new(samples: usize, batch: usize, plain: bool, dtype: DType) -> Self {
        Self { samples, batch, plain, dtype, poison: None, shift: 0, epoch: 0, at: 0 }
    }
}

impl BatchSource for Memory {
    fn samples(&self) -> usize {
        self.samples
    }

    fn batches(&self) -> usize {
        self.samples.div_ceil(self.batch)
    }

    fn start(&mut self, epoch: usize, first: usize) -> kd_core::Result<()> {
        (self.epoch, self.at) = (epoch, first);
        Ok(())
    }

    fn next_batch(&mut self) -> kd_core::Result<Option<Batch>> {
        let order = match self.plain {
            true => (0..self.samples as u32).collect(),
            false => Rng::new(5).named("order").fork(self.epoch as u64).permutation(self.samples),
        };
        let Some(chosen) = order.chunks(self.batch).nth(self.at) else { return Ok(None) };
        let class = |i: u32| i as usize % CLASSES;
        let noise = Rng::new(6).named("pixels");
        let pixel = |i: u32, p: u64| class(i) as f64 + 0.3 * noise.fork(u64::from(i)).normal(p);
        let mut pixels: Vec<f64> = chosen.iter().flat_map(|&i| (0..16).map(move |p| pixel(i, p))).collect();
        if self.poison == Some((self.epoch, self.at)) {
            pixels.fill(f64::NAN);
        }
        self.at += 1;
        let n = chosen.len();
        let labels: Vec<i64> = chosen.iter().map(|&i| class(i) as i64 + self.shift).collect();
        Ok(Some(Batch {
            images: vec![Tensor::from_vec(pixels, (n, 1, 4, 4), &Device::Cpu)?.to_dtype(self.dtype)?],
            labels: Tensor::from_vec(labels, n, &Device::Cpu)?,
            targets: None,
            indices: Tensor::from_vec(chosen.to_vec(), n, &Device::Cpu)?,
        }))
    }
}

/// A user's own candle model: one linear layer in two variables.
pub(crate) struct Linear {
    spec: ModelSpec,
    weight: Var,
    bias: Var,
}

impl Linear {
    pub(crate) fn new(dtype: DType) -> Self {
        let spec = ModelSpec {
            name: "linear".to_string(),
            classes: CLASSES,
            embedding: 16,
            input: [1, 4, 4],
            blocks: vec![],
            stages: vec![],
            logits_dist: false,
        };
        let var = |shape: &[usize]| Var::zeros(shape, dtype, &Device::Cpu).unwrap();
        Self { spec, weight: var(&[16, CLASSES]), bias: var(&[CLASSES]) }
    }
}

impl Model for Linear {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn run(&self, x: &Tensor, _from: Cut, _wanted: &[Cut], _mode: Mode) -> kd_core::Result<Outputs> {
        let embedding = x.flatten_from(1)?;
        let logits = embedding.matmul(self.weight.as_tensor())?.broadcast_add(self.bias.as_tensor())?;
        Ok(Outputs::new([(Cut::Embedding, embedding), (Cut::Logits, logits)]))
    }

    fn params(&self) -> Option<&Params> {
        None
    }

    fn trainable(&self) -> Trainable {
        Trainable::Vars(vec![self.weight.clone(), self.bias.clone()])
    }

    fn classifier(&self) -> kd_core::Result<Classifier> {
        Ok(Classifier { weight: self.weight.t()?.detach(), bias: Some(self.bias.as_detached_tensor()) })
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// A method with everything that a method may own: a network, a variable, a memory, randomness.
#[derive(Default)]
pub(crate) struct Everything {
    adapter: Option<Arc<Network>>,
    scale: Option<Var>,
    bank: Option<Tensor>,
}

impl Method for Everything {
    fn name(&self) -> &'static str {
        "everything"
    }

    fn needs(&self) -> Needs {
        Needs { student: vec![Cut::Embedding, Cut::Logits], teacher: vec![Cut::Embedding], labels: true, ..Needs::default() }
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> kd_core::Result<()> {
        let width = setup.teacher("everything")?.spec().embedding;
        let mut b = GraphBuilder::new("adapter", &[setup.models.student.spec().embedding]);
        b.linear("fc", width);
        b.cut(Cut::Logits);
        let network = Network::new(b.finish()?, setup.dtype, setup.device)?;
        network.init(setup.rng)?;
        self.adapter = Some(Arc::new(network));
        self.scale = Some(Var::ones((), setup.dtype, setup.device)?);
        self.bank = Some(Tensor::zeros(width, setup.dtype, setup.device)?);
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        self.adapter.iter().map(|n| n.clone() as Arc<dyn Model>).collect()
    }

    fn vars(&self) -> Vec<(String, Var)> {
        self.scale.iter().map(|v| ("scale".to_string(), v.clone())).collect()
    }

    fn loss(&mut self, step: &StepView<'_>) -> kd_core::Result<LossTerms> {
        let (adapter, scale, bank) = (self.adapter.as_ref().unwrap(), self.scale.as_ref().unwrap(), self.bank.as_mut().unwrap());
        let adapted = adapter.run(step.student()?.embedding()?, Cut::Input, &[Cut::Logits], Mode::Train(step.rng))?;
        let teacher = step.teacher()?.embedding()?;
        let jitter = 0.01 * step.rng.normal(0);
        let aim = (teacher.broadcast_add(bank)? + jitter)?;
        let gap = adapted.logits()?.broadcast_mul(scale.as_tensor())?.broadcast_sub(&aim)?.sqr()?.mean_all()?;
        *bank = ((&*bank * 0.9)? + (teacher.mean(0)? * 0.1)?)?;
        Ok(LossTerms::one("gap", gap))
    }

    fn state(&self) -> kd_core::Result<StateDict> {
        Ok(self.bank.iter().map(|bank| ("bank".to_string(), bank.clone())).collect())
    }

    fn load_state(&mut self, state: &StateDict) -> kd_core::Result<()> {
        self.bank = state.get("bank").cloned();
        Ok(())
    }
}

/// A method with two initial phases: first its own network learns from the teacher while the student rests, then the student's body from
/// that network.
#[derive(Default)]
pub(crate) struct Warm {
    pub(crate) adapter: Option<Arc<Network>>,
}

impl Method for Warm {
    fn name(&self) -> &'static str {
        "warm"
    }

    fn needs(&self) -> Needs {
        Needs::supervised()
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> kd_core::Result<()> {
        let mut b = GraphBuilder::new("adapter", &[setup.teacher("warm")?.spec().embedding]);
        b.linear("fc", setup.models.student.spec().embedding);
        b.cut(Cut::Logits);
        let network = Network::new(b.finish()?, setup.dtype, setup.device)?;
        network.init(setup.rng)?;
        self.adapter = Some(Arc::new(network));
        Ok(())
    }

    fn networks(&self) -> Vec<Arc<dyn Model>> {
        self.adapter.iter().map(|n| n.clone() as Arc<dyn Model>).collect()
    }

    fn phases(&self) -> Vec<Phase> {
        let embedding = vec![Cut::Embedding];
        let own = Needs { student: vec![], teacher: embedding.clone(), ..Needs::default() };
        let both = Needs { student: embedding.clone(), teacher: embedding, ..Needs::default() };
        vec![
            Phase { name: "adapter".to_string(), epochs: 2, lr: Some(0.5), needs: own, unused: vec![String::new()], idle: vec![] },
            Phase { name: "body".to_string(), epochs: 1, lr: None, needs: both, unused: vec!["fc.".to_string()], idle: vec![0] },
        ]
    }

    fn idle(&self, _epoch: usize) -> Vec<usize> {
        vec![0]
    }

    fn loss(&mut self, step: &StepView<'_>) -> kd_core::Result<LossTerms> {
        assert_eq!(step.progress.step / step.progress.steps_per_epoch, step.progress.epoch);
        Ok(LossTerms::one("size", step.student()?.logits()?.sqr()?.mean_all()?))
    }

    fn phase_loss(&mut self, phase: usize, step: &StepView<'_>) -> kd_core::Result<LossTerms> {
        assert_eq!((step.progress.epochs, step.progress.step / step.progress.steps_per_epoch), ([2, 1][phase], step.progress.epoch));
        let adapter = self.adapter.as_ref().unwrap();
        let noisy = (step.teacher()?.embedding()? * (1.0 + 0.01 * step.rng.normal(0)))?;
        let adapted = adapter.run(&noisy, Cut::Input, &[Cut::Logits], Mode::Train(step.rng))?;
        let gap = match phase {
            0 => (adapted.logits()? - 1.0)?,
            _ => (step.student()?.embedding()? - adapted.logits()?.detach())?,
        };
        Ok(LossTerms::one(["own", "body"][phase], gap.sqr()?.mean_all()?))
    }
}

/// Counts the passes through a frozen network.
pub(crate) struct Counted {
    inner: Arc<dyn Model>,
    passes: Arc<AtomicUsize>,
}

impl Counted {
    /// Puts itself around a teacher.
    pub(crate) fn wrap(teacher: &mut Teacher) -> Arc<AtomicUsize> {
        let passes = Arc::new(AtomicUsize::new(0));
        teacher.model = Arc::new(Self { inner: teacher.model.clone(), passes: passes.clone() });
        passes
    }
}

impl Model for Counted {
    fn spec(&self) -> &ModelSpec {
        self.inner.spec()
    }

    fn run(&self, x: &Tensor, from: Cut, wanted: &[Cut], mode: Mode) -> kd_core::Result<Outputs> {
        self.passes.fetch_add(1, Ordering::Relaxed);
        self.inner.run(x, from, wanted, mode)
    }

    fn params(&self) -> Option<&Params> {
        self.inner.params()
    }

    fn trainable(&self) -> Trainable {
        self.inner.trainable()
    }

    fn classifier(&self) -> kd_core::Result<Classifier> {
        self.inner.classifier()
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// Makes the job of a small run; a fresh one each time, as a restarted process would.
#[derive(Clone)]
pub(crate) struct Recipe {
    pub(crate) methods: Vec<&'static str>,
    pub(crate) validation: bool,
    pub(crate) own_model: bool,
    pub(crate) optim: OptimConfig,
    pub(crate) schedule: Schedule,
    pub(crate) options: RunOptions,
    pub(crate) train: Memory,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            methods: vec!["ce"],
            validation: false,
            own_model: false,
            optim: OptimConfig { lr: 0.02, nesterov: true, clip_grad_norm: 1.0, ..OptimConfig::default() },
            schedule: Schedule { epochs: 3, kind: ScheduleKind::Cosine, ..Schedule::default() },
            options: RunOptions::default(),
            train: Memory::new(18, 5, false, DType::F32),
        }
    }
}

pub(crate) fn method(name: &str) -> Box<dyn Method> {
    match name {
        "everything" => Box::<Everything>::default(),
        "warm" => Box::<Warm>::default(),
        name => (kd_losses::find(name).unwrap().build)(&serde_json::json!({})).unwrap(),
    }
}

impl Recipe {
    pub(crate) fn job(&self, place: Option<RunPlace>) -> Job {
        let dtype = self.train.dtype;
        let needs_teacher = self.methods.iter().any(|m| *m == "warm" || !method(m).needs().teacher.is_empty());
        let teacher = || Teacher::new("oracle", Arc::new(oracle(6, dtype)));
        let student: Arc<dyn Model> = if self.own_model { Arc::new(Linear::new(dtype)) } else { Arc::new(tiny_net(4, dtype)) };
        let plain = |samples| Box::new(Memory::new(samples, 8, true, dtype));
        Job {
            student,
            teachers: if needs_teacher { vec![teacher()] } else { vec![] },
            objectives: self.methods.iter().map(|m| Objective::new(method(m), 1.0)).collect(),
            data: Data {
                classes: CLASSES,
                batch_size: self.train.batch,
                train: Box::new(self.train.clone()),
                plain: Some(plain(self.train.samples)),
                validation: self.validation.then(|| plain(9) as Box<dyn BatchSource>),
                test: Some(plain(13)),
                fingerprint: "memory".to_string(),
                class_means: None,
                class_groups: None,
            },
            optim: self.optim.clone(),
            schedule: self.schedule.clone(),
            options: self.options.clone(),
            seed: 1,
            place,
        }
    }

    pub(crate) fn steps(&self) -> usize {
        let phases = self.methods.iter().flat_map(|m| method(m).phases()).map(|p| p.epochs).sum::<usize>();
        self.train.batches() * (phases + self.schedule.epochs)
    }

    /// Runs to the end, or until `stop_after` steps were made in this call.
    pub(crate) fn run(&self, place: Option<RunPlace>, stop_after: Option<usize>) -> Result<(Outcome, Vec<Event>)> {
        let stop = AtomicBool::new(stop_after == Some(0));
        let mut log = Log { stop: &stop, stop_after, steps: 0, events: vec![] };
        let outcome = train(self.job(place), &mut [&mut log], &stop)?;
        Ok((outcome, log.events))
    }

    pub(crate) fn finish(&self, place: Option<RunPlace>) -> Vec<Event> {
        let (outcome, events) = self.run(place, None).unwrap();
        assert!(matches!(outcome, Outcome::Finished(_)), "{outcome:?}");
        events
    }
}

/// Keeps every event, and sets the stop flag after a number of steps.
struct Log<'a> {
    stop: &'a AtomicBool,
    stop_after: Option<usize>,
    steps: usize,
    events: Vec<Event>,
}

impl Sink for Log<'_> {
    fn event(&mut self, event: &Event) -> Result<()> {
        self.events.push(event.clone());
        self.steps += usize::from(matches!(event, Event::Step(_)));
        if self.stop_after == Some(self.steps) {
            self.stop.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

pub(crate) fn place(dir: &Path) -> RunPlace {
    let mut place = RunPlace::new(dir, "seed = 1\n");
    place.metadata = [("model", "tiny"), ("classes", "3"), ("mean", "0"), ("std", "1")].map(|(k, v)| (k.to_string(), v.to_string())).into();
    place
}

/// Everything of a finished run that must not depend on how often it was stopped.
#[derive(Debug, PartialEq)]
pub(crate) struct Remains {
    student: Vec<u8>,
    /// Tensors of the last checkpoint: student, optimiser, methods.
    last: Vec<u8>,
    best: Option<Vec<u8>>,
    metrics: Vec<serde_json::Value>,
    result: serde_json::Value,
}

pub(crate) fn remains(dir: &Path) -> Remains {
    let newest = |sub: &str| {
        let names = std::fs::read_dir(dir.join("checkpoints").join(sub)).unwrap().map(|e| e.unwrap().path());
        names.filter(|p| p.extension().is_some_and(|e| e == "safetensors")).max()
    };
    let metrics = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let metrics = metrics.lines().map(|line| {
        let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
        let fields = line.as_object_mut().unwrap();
        ["seconds", "waiting"].iter().for_each(|timing| drop(fields.remove(*timing)));
        line
    });
    let metrics = metrics.filter(|line| line["event"] != "warning");
    let run: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join("run.json")).unwrap()).unwrap();
    let mut result = run["result"].clone();
    let fields = result.as_object_mut().expect("a result");
    ["seconds", "images_per_second", "waiting_share"].iter().for_each(|timing| drop(fields.remove(*timing)));
    Remains {
        student: std::fs::read(dir.join("student.safetensors")).unwrap(),
        last: std::fs::read(newest("last").unwrap()).unwrap(),
        best: newest("best").map(|p| std::fs::read(p).unwrap()),
        metrics: metrics.collect(),
        result,
    }
}
