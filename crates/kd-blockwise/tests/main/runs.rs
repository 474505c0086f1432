//! Block-KD in a configuration, and in the loop that configurations run in.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device, Tensor};
use kd_blockwise::registry;
use kd_core::{Batch, BatchSource, Rng, Schedule};
use kd_train::{Config, Data, Event, Job, Objective, OptimConfig, Outcome, RunOptions, RunPlace, Sink, Teacher, train};
use serde_json::{Value, json};

use super::support::*;

#[test]
fn a_configuration_says_all_of_it() {
    let text = r#"
[data]
source = "digits"
[teacher]
model = "resnet20"
weights = "resnet20.safetensors"
[student]
model = "resnet8"
[[loss]]
method = "block_kd"
gamma = 0.5
stones = [2, 3]
distance = { method = "nkd", temperature = 1.0 }
stone_distance = { 3 = "dkd" }
stone_schedule = [{ from = 0, stones = [3] }, { from = 80, stones = [2, 3] }]
student_blocks = [1, 2, 3]
connector = "auto_identity"
"#;
    let config = Config::parse(text, "run.toml", &["loss.0.stone_warmup=5".to_string()], registry()).unwrap();
    let params = &config.loss[0].params;
    assert_eq!((&params["stones"], &params["stone_warmup"], &params["tail_bn"]), (&json!([2, 3]), &json!(5), &json!("eval")));
    let written = config.to_toml().unwrap();
    assert_eq!(Config::parse(&written, "config.toml", &[], registry()).unwrap(), config, "{written}");
    let method = (registry()[0].build)(&Value::Object(params.clone())).unwrap();
    assert_eq!(method.name(), "block_kd");

    for (from, to, words) in [
        ("stones = [2, 3]", "stones = [2, 2]", ["stones", "different numbers"]),
        ("gamma = 0.5", "gama = 0.5", ["gama", "gamma"]),
        ("stone_distance = { 3 = \"dkd\" }", "stone_distance = { 3 = \"fitnet2\" }", ["distance", "fitnet2"]),
        ("{ from = 0, stones = [3] }", "{ from = 0, stones = [1] }", ["stone_schedule", "stones that there are"]),
    ] {
        let message = Config::parse(&text.replace(from, to), "run.toml", &[], registry()).unwrap_err().to_string();
        assert!(words.iter().all(|w| message.contains(w)) && message.contains("run.toml"), "{to}: {message}");
    }
}

/// Random images in memory, in another order every epoch.
struct Memory {
    epoch: usize,
    at: usize,
}

const SAMPLES: usize = 12;

impl BatchSource for Memory {
    fn samples(&self) -> usize {
        SAMPLES
    }

    fn batches(&self) -> usize {
        SAMPLES / B
    }

    fn start(&mut self, epoch: usize, first: usize) -> kd_core::Result<()> {
        (self.epoch, self.at) = (epoch, first);
        Ok(())
    }

    fn next_batch(&mut self) -> kd_core::Result<Option<Batch>> {
        let order = Rng::new(5).fork(self.epoch as u64).permutation(SAMPLES);
        let Some(chosen) = order.chunks(B).nth(self.at) else { return Ok(None) };
        self.at += 1;
        let indices = Tensor::new(chosen, &Device::Cpu)?;
        let images = normal(6, &[SAMPLES, 2, 8, 8], DType::F32).index_select(&indices, 0)?;
        let labels: Vec<i64> = chosen.iter().map(|&i| i64::from(i) % K as i64).collect();
        Ok(Some(Batch { images: vec![images], labels: Tensor::new(labels, &Device::Cpu)?, targets: None, indices }))
    }
}

/// Keeps the terms of every step, and stops the run after a number of steps.
struct Log<'a> {
    stop: &'a AtomicBool,
    stop_after: usize,
    steps: Vec<Vec<(String, f64)>>,
}

impl Sink for Log<'_> {
    fn event(&mut self, event: &Event) -> kd_train::Result<()> {
        if let Event::Step(report) = event {
            self.steps.push(report.terms.clone());
            if self.steps.len() == self.stop_after {
                self.stop.store(true, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}

/// Runs in `dir` until `stop_after` steps were made; whether it reached the end, and the terms of the steps.
fn run(dir: &Path, params: &Value, stop_after: usize) -> (bool, Vec<Vec<(String, f64)>>) {
    let source = || Box::new(Memory { epoch: 0, at: 0 });
    let job = Job {
        student: Arc::new(small("student", &[3, 4, 6], DType::F32, 1)),
        teachers: vec![Teacher::new("teacher", Arc::new(small("teacher", &[4, 6, 8], DType::F32, 2).frozen()))],
        objectives: vec![Objective::new((registry()[0].build)(params).unwrap(), 1.0)],
        data: Data {
            classes: K,
            batch_size: B,
            train: source(),
            plain: None,
            validation: None,
            test: Some(source()),
            fingerprint: "memory".to_string(),
            class_means: None,
            class_groups: None,
        },
        optim: OptimConfig::default(),
        schedule: Schedule { epochs: 3, ..Schedule::default() },
        options: RunOptions { allow_bad_teacher: true, ..RunOptions::default() },
        seed: 1,
        place: Some(RunPlace::new(dir, params.to_string())),
    };
    let stop = AtomicBool::new(false);
    let mut log = Log { stop: &stop, stop_after, steps: vec![] };
    let outcome = train(job, &mut [&mut log], &stop).unwrap();
    (matches!(outcome, Outcome::Finished(_)), log.steps)
}

/// The tensors of a finished run: student, optimiser, connectors.
fn last_checkpoint(dir: &Path) -> Vec<u8> {
    let files = std::fs::read_dir(dir.join("checkpoints/last")).unwrap().map(|e| e.unwrap().path());
    std::fs::read(files.filter(|p| p.extension().is_some_and(|e| e == "safetensors")).max().unwrap()).unwrap()
}

#[test]
fn a_run_with_a_schedule_goes_on_exactly_where_it_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let params = json!({"stone_schedule": [{"from": 0, "stones": [3]}, {"from": 1, "stones": [1, 2]}]});
    let (whole, pieces) = (dir.path().join("whole"), dir.path().join("pieces"));
    let (finished, terms) = run(&whole, &params, usize::MAX);
    assert!(finished);
    let stones = |terms: &[(String, f64)]| terms.iter().filter(|(name, _)| name.contains("stone.")).count();
    assert_eq!(terms.iter().map(|t| stones(t)).collect::<Vec<_>>(), [3, 3, 3, 6, 6, 6, 6, 6, 6]);

    let mut stopped = vec![];
    for stop_after in [2, 3, usize::MAX] {
        let (finished, terms) = run(&pieces, &params, stop_after);
        assert_eq!(finished, stop_after == usize::MAX);
        stopped.extend(terms);
    }
    assert_eq!(stopped, terms);
    assert!(last_checkpoint(&whole) == last_checkpoint(&pieces), "student, optimiser or connectors differ");
    let shipped = |dir: &Path| std::fs::read(dir.join("student.safetensors")).unwrap();
    assert!(shipped(&whole) == shipped(&pieces));
    let header = safetensors::SafeTensors::deserialize(&shipped(&whole)).unwrap().names().join(" ");
    assert!(header.contains("block1.conv.weight") && !header.contains("connector"), "{header}");
    let checkpoint = last_checkpoint(&whole);
    let names = safetensors::SafeTensors::deserialize(&checkpoint).unwrap().names().join(" ");
    assert_eq!(names.matches("bn.running_mean").count(), 3 + 3, "three of the student, three of connectors: {names}");
}
