//! `kd-cli bench step`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use kd_core::{Batch, BatchSource, Model, Rng, Schedule};
use kd_train::{Data, Event, Job, LossConfig, Objective, OptimConfig, RunOptions, Sink, StepReport, Teacher};
use serde_json::json;

use super::{median, peak_memory, profile};
use crate::{assemble, output};

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  kd-cli bench step --teacher resnet56 --student resnet20\n  kd-cli bench step --teacher resnet34 --student resnet18 --size 224 --batch 16 --profile"
)]
pub(super) struct Step {
    /// The teacher (`kd-cli list models`), with random weights; without one the student trains on labels alone.
    #[arg(long)]
    teacher: Option<String>,
    /// The student.
    #[arg(long)]
    student: String,
    /// Images of a batch.
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Threads; 0: all cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// How long to measure, at least; ten steps are made in any case.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Height and width of the images; default: the student's own.
    #[arg(long)]
    size: Option<usize>,
    /// How exactly convolutions are computed.
    #[arg(long, value_enum, default_value = "fast")]
    precision: assemble::Exactness,
    /// Prints where the time goes by layer, pass and kernel.
    #[arg(long)]
    profile: bool,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// Steps that are made before any is counted.
const WARM_UP: usize = 3;
/// Steps that are counted in any case.
const LEAST: usize = 7;
const CLASSES: usize = 100;

pub(super) fn run(args: &Step) -> Result<()> {
    check(args.batch, args.seconds)?;
    let ((steps, macs), threads, machine, entries) = assemble::in_pool(args.threads, || -> Result<_> {
        let machine = args.profile.then(kd_nn::measure::Machine::measure);
        let steps = measure(args)?;
        let entries = machine.is_some().then(kd_nn::profile::stop);
        Ok((steps, rayon::current_num_threads(), machine, entries))
    })??;
    let ms = |part: &dyn Fn(&StepReport) -> f64| 1e3 * median(steps.iter().map(part).collect());
    let total = ms(&|s| s.seconds - s.waiting);
    let fastest = 1e3 * steps.iter().map(|s| s.seconds - s.waiting).fold(f64::INFINITY, f64::min);
    let parts: [(&str, f64); 5] = [
        ("teacher", ms(&|s| s.parts.teacher)),
        ("student", ms(&|s| s.parts.student)),
        ("loss", ms(&|s| s.parts.loss)),
        ("backward", ms(&|s| s.parts.backward)),
        ("update", ms(&|s| s.parts.update)),
    ];
    let rate = |ms: f64| args.batch as f64 / ms * 1e3;
    let report = machine.zip(entries).map(|(machine, entries)| profile::Report::new(machine, entries, steps.len()));
    if args.json {
        let ms: serde_json::Map<_, _> = parts.iter().map(|(name, ms)| (name.to_string(), json!(ms))).collect();
        return output::json(&json!({
            "teacher": args.teacher, "student": args.student, "batch": args.batch, "threads": threads,
            "level": kd_nn::Level::current().name(), "precision": args.precision.name(), "steps": steps.len(),
            "macs": {"student": macs[0], "teacher": macs.get(1)}, "img_s": rate(total), "img_s_best": rate(fastest), "ms": ms, "peak_memory": peak_memory(),
            "profile": report.map(|r| r.json()),
        }));
    }
    let pair = format!("{}{}", args.teacher.as_ref().map_or(String::new(), |t| format!("{t} -> ")), args.student);
    output::line(&format!(
        "{pair}, batch {}, {threads} threads, {}, {}: {:.1} img/s (median of {} steps; best {:.1})",
        args.batch,
        kd_nn::Level::current().name(),
        args.precision.name(),
        rate(total),
        steps.len(),
        rate(fastest),
    ))?;
    let listed: Vec<String> = parts.iter().map(|(name, ms)| format!("{name} {ms:.2}")).collect();
    output::line(&format!("ms a step: {}; all {total:.2}", listed.join(", ")))?;
    if let Some(bytes) = peak_memory() {
        output::line(&format!("peak memory: {:.0} MB", bytes as f64 / 1e6))?;
    }
    match report {
        Some(report) => output::line(&format!("\n{}", report.text())),
        None => Ok(()),
    }
}

/// Refuses sizes that mean nothing.
pub(super) fn check(batch: usize, seconds: f64) -> Result<()> {
    if !(1..=65536).contains(&batch) {
        bail!("--batch {batch}: expected 1 to 65536");
    }
    if !(0.0..=86400.0).contains(&seconds) {
        bail!("--seconds {seconds}: expected 0 to 86400");
    }
    Ok(())
}

/// Channels, height and width that a network is measured with.
pub(super) fn input(model: &str, size: Option<usize>) -> Result<[usize; 3]> {
    let [c, h, w] = kd_models::find(model)?.input;
    match size {
        Some(n) if !(1..=4096).contains(&n) => bail!("--size {n}: expected 1 to 4096"),
        size => Ok([c, size.unwrap_or(h), size.unwrap_or(w)]),
    }
}

/// Random images `[N,C,H,W]`.
pub(super) fn images(n: usize, [c, h, w]: [usize; 3], seed: u64) -> Result<Tensor> {
    let rng = Rng::new(seed);
    let pixels: Vec<f32> = (0..(n * c * h * w) as u64).map(|i| rng.normal(i) as f32).collect();
    Ok(Tensor::from_vec(pixels, (n, c, h, w), &Device::Cpu)?)
}

/// The steps after the warm-up, and the multiply-adds of student and teacher on one image. A profile goes on when this returns.
fn measure(args: &Step) -> Result<(Vec<StepReport>, Vec<u64>)> {
    let input = input(&args.student, args.size)?;
    let precision = args.precision.into();
    let mut macs = vec![];
    let mut network = |name: &str, seed: u64| -> Result<_> {
        let network = assemble::network(name, Some(CLASSES), input, DType::F32, &Device::Cpu).with_context(|| format!("`{name}`"))?;
        network.init(Rng::new(seed))?;
        macs.push(network.graph().macs(&input)?);
        Ok(network.with_precision(precision))
    };
    let student: Arc<dyn Model> = Arc::new(network(&args.student, 1)?);
    let teacher = args.teacher.as_deref().map(|name| network(name, 2)).transpose()?;
    let teachers = teacher.map(|t| Teacher::new("teacher", Arc::new(t.frozen())));
    let weights: &[(&str, f64)] = if teachers.is_some() { &[("ce", 0.1), ("kd", 0.9)] } else { &[("ce", 1.0)] };
    let objectives = weights
        .iter()
        .map(|(method, weight)| {
            let built = assemble::objectives(&[LossConfig::new(method)])?.remove(0);
            Ok(Objective { weight: *weight, ..built })
        })
        .collect::<Result<_>>()?;
    let batches = (0..4).map(|i| batch(args.batch, input, i)).collect::<Result<Vec<_>>>()?;
    let job = Job {
        student,
        teachers: teachers.into_iter().collect(),
        objectives,
        data: Data {
            classes: CLASSES,
            batch_size: args.batch,
            train: Box::new(Repeated { batches, next: 0 }),
            plain: None,
            validation: None,
            test: None,
            fingerprint: "random images".to_string(),
            class_means: None,
            class_groups: None,
        },
        optim: OptimConfig { lr: 1e-3, ..OptimConfig::default() },
        schedule: Schedule { epochs: 1, ..Schedule::default() },
        options: RunOptions::default(),
        seed: 1,
        place: None,
    };
    let stop = AtomicBool::new(false);
    let mut watch = Watch { budget: Duration::from_secs_f64(args.seconds), profile: args.profile, begun: None, steps: vec![], stop: &stop };
    kd_train::train(job, &mut [&mut watch], &stop)?;
    Ok((watch.steps, macs))
}

fn batch(n: usize, input: [usize; 3], seed: u64) -> Result<Batch> {
    let labels: Vec<i64> = (0..n as u64).map(|i| ((seed + i) % CLASSES as u64) as i64).collect();
    Ok(Batch {
        images: vec![images(n, input, 10 + seed)?],
        labels: Tensor::from_vec(labels, n, &Device::Cpu)?,
        targets: None,
        indices: Tensor::arange(0, n as u32, &Device::Cpu)?,
    })
}

/// The same few batches over and over, made before the clock runs.
struct Repeated {
    batches: Vec<Batch>,
    next: usize,
}

/// Steps of an epoch: more than anybody waits for.
const ENDLESS: usize = 1 << 30;

impl BatchSource for Repeated {
    fn samples(&self) -> usize {
        ENDLESS
    }

    fn batches(&self) -> usize {
        ENDLESS
    }

    fn start(&mut self, _: usize, first: usize) -> kd_core::Result<()> {
        self.next = first;
        Ok(())
    }

    fn next_batch(&mut self) -> kd_core::Result<Option<Batch>> {
        self.next += 1;
        Ok(Some(self.batches[self.next % self.batches.len()].clone()))
    }
}

/// Keeps the reports of the steps and stops the run in time.
struct Watch<'a> {
    budget: Duration,
    profile: bool,
    begun: Option<Instant>,
    steps: Vec<StepReport>,
    stop: &'a AtomicBool,
}

impl Sink for Watch<'_> {
    fn event(&mut self, event: &Event) -> kd_train::Result<()> {
        let Event::Step(report) = event else { return Ok(()) };
        if let Some(begun) = self.begun {
            self.steps.push(report.clone());
            if self.steps.len() >= LEAST && begun.elapsed() >= self.budget {
                self.stop.store(true, Ordering::Relaxed);
            }
        } else if report.step + 1 == WARM_UP {
            self.begun = Some(Instant::now());
            if self.profile {
                kd_nn::profile::start();
            }
        }
        Ok(())
    }
}
