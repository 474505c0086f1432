//! Whole training runs against PyTorch, step by step, through the loop itself.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use candle_core::{DType, Device, Tensor};
use kd_core::{Batch, BatchSource, Cut, Mode, Model, Schedule};
use kd_models::recipe;
use kd_nn::Precision;
use kd_train::{Data, Event, Job, Objective, OptimConfig, Result, RunOptions, Sink, StepReport, Teacher, train};
use serde_json::Value;

use crate::fixtures::{self, Fixture, relative, values};

/// Batches in the order that the fixture says.
struct Ordered {
    images: Tensor,
    labels: Tensor,
    order: Vec<Vec<i64>>,
    batch: usize,
    epoch: usize,
    at: usize,
}

impl BatchSource for Ordered {
    fn samples(&self) -> usize {
        self.order[0].len()
    }

    fn batches(&self) -> usize {
        self.samples().div_ceil(self.batch)
    }

    fn start(&mut self, epoch: usize, first: usize) -> kd_core::Result<()> {
        (self.epoch, self.at) = (epoch, first * self.batch);
        Ok(())
    }

    fn next_batch(&mut self) -> kd_core::Result<Option<Batch>> {
        let order = &self.order[self.epoch];
        let chosen: Vec<u32> = order[self.at..(self.at + self.batch).min(order.len())].iter().map(|&i| i as u32).collect();
        self.at += chosen.len();
        if chosen.is_empty() {
            return Ok(None);
        }
        let indices = Tensor::from_vec(chosen.clone(), chosen.len(), &Device::Cpu)?;
        let (images, labels) = (self.images.index_select(&indices, 0)?, self.labels.index_select(&indices, 0)?);
        Ok(Some(Batch { images: vec![images], labels, targets: None, indices }))
    }
}

#[derive(Default)]
struct Steps(Vec<StepReport>);

impl Sink for Steps {
    fn event(&mut self, event: &Event) -> Result<()> {
        if let Event::Step(report) = event {
            self.0.push(report.clone());
        }
        Ok(())
    }
}

/// The worst error of each quantity.
#[derive(Debug, Default)]
struct Errors {
    lr: f64,
    loss: f64,
    term: f64,
    grad_norm: f64,
    param: f64,
    running: f64,
    eval_logits: f64,
}

fn worst(into: &mut f64, error: f64) {
    // A NaN must not pass for small.
    *into = if error.is_nan() { f64::INFINITY } else { into.max(error) };
}

fn count(config: &Value, path: &str) -> usize {
    config.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("no {path}")) as usize
}

fn network(config: &Value, role: &str, dtype: DType) -> kd_nn::Network {
    let input = [3, count(config, "/data/height"), count(config, "/data/width")];
    let name = config[role]["model"].as_str().unwrap();
    let network = kd_models::network(name, &kd_models::Config::new(count(config, "/data/classes"), input), dtype, &Device::Cpu).unwrap();
    recipe::load(network.parameters()).unwrap();
    // Faster algorithms round differently: more ReLU inputs near 0 would change sides than the fixtures allow for.
    network.with_precision(Precision::Strict)
}

/// Compares a tensor with the fixture's, which may hold a sample and statistics of it.
fn stored(fixture: &Fixture, name: &str, found: &[f64]) -> f64 {
    if let Some(expected) = fixture.find(name) {
        return relative(found, &values(expected));
    }
    let (sample, stats) = (fixture.values(&format!("{name}#sample")), fixture.values(&format!("{name}#stats")));
    let n = found.len();
    let at: Vec<f64> = (0..sample.len()).map(|i| found[i * n / sample.len()]).collect();
    let mean = found.iter().sum::<f64>() / n as f64;
    let std = (found.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64).sqrt();
    let l2 = found.iter().map(|v| v * v).sum::<f64>().sqrt();
    let unit = stats[2] / (n as f64).sqrt();
    let errors = [relative(&at, &sample), (mean - stats[0]).abs() / unit, (std - stats[1]).abs() / unit, (l2 / stats[2] - 1.0).abs()];
    errors.into_iter().fold(0.0, f64::max)
}

fn run(fixture: &Fixture, dtype: DType) -> Errors {
    let config = fixture.json("config");
    let (n, classes) = (count(&config, "/data/samples"), count(&config, "/data/classes"));
    let shape = (n, 3, count(&config, "/data/height"), count(&config, "/data/width"));
    let images = recipe::images(fixture.text("images_key"), &[shape.0, shape.1, shape.2, shape.3]);
    let images = Tensor::from_vec(images, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    assert!(stored(fixture, "images", &values(&images)) < 1e-12, "{}: another recipe for images", fixture.name);
    let labels = Tensor::from_vec(recipe::labels(fixture.text("labels_key"), n, classes), n, &Device::Cpu).unwrap();
    assert_eq!(values(&labels), fixture.values("labels"), "{}: another recipe for labels", fixture.name);
    assert_eq!(config["data"]["drop_last"], false);

    let student = Arc::new(network(&config, "student", dtype));
    let mut teachers = vec![];
    if !config["teacher"].is_null() {
        assert_eq!(config["teacher"]["mode"], "eval");
        let teacher = network(&config, "teacher", dtype).frozen();
        let out = teacher.run(&images, Cut::Input, &[Cut::Logits, Cut::Embedding], Mode::Eval).unwrap();
        let tolerance = if dtype == DType::F64 { 1e-10 } else { 1e-5 };
        assert!(stored(fixture, "teacher.logits", &values(out.logits().unwrap())) < tolerance, "{}: another teacher", fixture.name);
        if fixture.names().any(|name| name.starts_with("teacher.embedding")) {
            assert!(
                stored(fixture, "teacher.embedding", &values(out.embedding().unwrap())) < tolerance,
                "{}: another teacher",
                fixture.name
            );
        }
        teachers.push(Teacher::new("teacher", Arc::new(teacher)));
    }
    let objectives = config["loss"].as_array().unwrap().iter().map(|loss| {
        let method = loss["method"].as_str().unwrap();
        let entry = kd_losses::find(method).unwrap_or_else(|e| panic!("{}: {e}", fixture.name));
        Objective {
            method: (entry.build)(&loss["params"]).unwrap(),
            teacher: None,
            weight: loss["weight"].as_f64().unwrap(),
            warmup_epochs: count(loss, "/warmup_epochs"),
            warmup_first_epoch: count(loss, "/warmup_first_epoch"),
        }
    });
    let optim: OptimConfig = serde_json::from_value(config["optim"].clone()).unwrap();
    let schedule: Schedule = serde_json::from_value(config["schedule"].clone()).unwrap();
    let order = fixture.get("order").to_vec2::<i64>().unwrap();
    assert_eq!(order.len(), schedule.epochs);
    let batch_size = count(&config, "/data/batch_size");
    let job = Job {
        student: student.clone(),
        teachers,
        objectives: objectives.collect(),
        data: Data {
            classes,
            batch_size,
            train: Box::new(Ordered { images: images.clone(), labels, order, batch: batch_size, epoch: 0, at: 0 }),
            plain: None,
            validation: None,
            test: None,
            fingerprint: fixture.name.clone(),
            class_means: fixture.find("class_means").cloned(),
            class_groups: None,
        },
        optim,
        schedule,
        options: RunOptions::default(),
        seed: 1,
        place: None,
    };
    let mut steps = Steps::default();
    train(job, &mut [&mut steps], &AtomicBool::new(false)).unwrap_or_else(|e| panic!("{}: {e}", fixture.name));

    let mut errors = Errors::default();
    let steps = steps.0;
    let (loss, lr, norm) = (fixture.values("loss"), fixture.values("lr"), fixture.values("grad_norm"));
    assert_eq!(steps.len(), loss.len(), "{}: another number of steps", fixture.name);
    let terms: Vec<(&str, Vec<f64>)> =
        fixture.names().filter_map(|name| Some((name.strip_prefix("term.")?, fixture.values(name)))).collect();
    for (s, step) in steps.iter().enumerate() {
        assert_eq!(step.step, s);
        worst(&mut errors.lr, if lr[s] == 0.0 { step.lr.abs() } else { (step.lr / lr[s] - 1.0).abs() });
        worst(&mut errors.loss, (step.loss / loss[s] - 1.0).abs());
        worst(&mut errors.grad_norm, (step.grad_norm / norm[s] - 1.0).abs());
        assert_eq!(step.terms.len(), terms.len(), "{}: other terms", fixture.name);
        for (name, expected) in &terms {
            let found = step.terms.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("{}: no term {name}", fixture.name)).1;
            if expected[s] == 0.0 {
                assert_eq!(found, 0.0, "{}: term {name} takes part in step {s}", fixture.name);
            }
            worst(&mut errors.term, (found - expected[s]).abs() / expected[s].abs().max(loss[s].abs()));
        }
    }
    for (key, tensor) in student.parameters().state_dict().unwrap() {
        let name = format!("final.{key}");
        if key.ends_with("num_batches_tracked") {
            assert_eq!(values(&tensor), fixture.values(&name), "{}: {key}", fixture.name);
            continue;
        }
        let into = if key.contains(".running_") { &mut errors.running } else { &mut errors.param };
        worst(into, stored(fixture, &name, &values(&tensor)));
    }
    let logits = student.run(&images, Cut::Input, &[Cut::Logits], Mode::Eval).unwrap();
    worst(&mut errors.eval_logits, relative(&values(logits.logits().unwrap()), &fixture.values("eval_logits")));
    errors
}

#[test]
fn golden_trajectory_f64() {
    let Some(fixtures) = fixtures::all("trajectory") else { return };
    for fixture in &fixtures {
        let e = run(fixture, DType::F64);
        let worst = [e.loss, e.term, e.grad_norm, e.param, e.running, e.eval_logits].into_iter().fold(0.0, f64::max);
        assert!(e.lr <= 1e-12 && worst <= 1e-8, "{}: {e:?}", fixture.name);
    }
    println!("{} trajectory fixtures checked in f64", fixtures.len());
}

#[test]
fn golden_trajectory_f32() {
    let Some(fixtures) = fixtures::all("trajectory") else { return };
    // A ReLU input within rounding error of 0 may change sides in one run of a set and move it this far.
    let (mut switched, switch) = (vec![], 2e-2);
    for fixture in &fixtures {
        let e = run(fixture, DType::F32);
        let scale = fixture.json("f32_relerr");
        let bound = |key: &str| 20.0 * scale[key].as_f64().unwrap_or_else(|| panic!("no f32_relerr {key}")).max(1e-6);
        let quantities = [
            ("lr", e.lr),
            ("loss", e.loss),
            ("loss", e.term),
            ("grad_norm", e.grad_norm),
            ("param", e.param),
            ("running", e.running),
            ("eval_logits", e.eval_logits),
        ];
        if quantities.iter().any(|&(key, error)| error > bound(key)) {
            assert!(quantities.iter().all(|q| q.1 <= switch), "{}: {e:?}", fixture.name);
            switched.push(format!("{}: {e:?}", fixture.name));
        }
    }
    assert!(switched.len() <= 1, "{switched:#?}");
    println!("{} trajectory fixtures checked in f32, {} with a ReLU switch", fixtures.len(), switched.len());
}
