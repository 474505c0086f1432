//! What cannot work is refused, with the reason.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use kd_blockwise::{BlockKd, Params, block_kd};
use kd_core::registry::evaluate;
use kd_core::{Method, Mode, Model, Outputs, Rng};
use serde_json::{Value, json};

use super::support::*;

/// The message of a config that is refused before there are networks.
fn built(params: Value) -> String {
    let what = params.to_string();
    (kd_blockwise::registry()[0].build)(&params).err().unwrap_or_else(|| panic!("{what} was taken")).to_string()
}

/// The message of a config that does not fit the networks.
fn prepared(bench: &Bench, params: Value) -> String {
    let what = params.to_string();
    bench.prepare(params).err().unwrap_or_else(|| panic!("{what} was taken")).to_string()
}

fn says(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
}

#[test]
fn parameters_out_of_range() {
    for (key, bad) in [("alpha", -1.0), ("beta", -0.1), ("gamma", -2.0), ("dkd_alpha", -1.0), ("dkd_beta", -1.0)] {
        says(&built(json!({ key: bad })), &[key, &bad.to_string(), "at least 0"]);
    }
    says(&built(json!({"stone_decay": 0.5})), &["stone_decay = 0.5", "at least 1"]);
    for t in [0.0, -1.0] {
        says(&built(json!({"temperature": t})), &["temperature", "above 0"]);
    }
    says(&built(json!({"tempreature": 1.0})), &["tempreature"]);
    says(&built(json!({"connector": "never"})), &["never", "auto_identity"]);
    says(&built(json!({"tail_bn": "batch"})), &["batch", "train"]);
}

#[test]
fn stones_that_there_cannot_be() {
    for bad in [json!([0]), json!([1, 1]), json!([2, 1, 2])] {
        says(&built(json!({"stones": bad})), &["stones", "different numbers within 1..=n"]);
    }
    says(&built(json!({"stones": [1, 4], "blocks": 3})), &["[1, 4]", "within 1..=3"]);
    says(&built(json!({"stones": []})), &["gamma = 1", "0 where there are no stones"]);
    says(&built(json!({"stones": "none"})), &["\"all\" or a list"]);
    let bench = Bench::small(DType::F32);
    says(&prepared(&bench, json!({"stones": [2, 4]})), &["stones = 4", "within 1..=3"]);
    assert!(bench.prepare(json!({"stones": [], "gamma": 0.0})).is_ok());
}

#[test]
fn schedules_and_distances_of_stones_that_are_not_there() {
    says(&built(json!({"stone_schedule": [{"from": 3, "stones": [1]}, {"from": 3, "stones": [2]}]})), &["stone_schedule", "ascending"]);
    says(&built(json!({"stones": [3], "stone_schedule": [{"from": 0, "stones": [2]}]})), &["stone_schedule", "stones that there are"]);
    says(&built(json!({"stone_schedule": [{"from": 0, "stones": [0]}]})), &["stone_schedule"]);
    says(&built(json!({"stones": [3], "stone_distance": {"1": "dkd"}})), &["stone_distance = 1"]);
    says(&built(json!({"stone_distance": {"1": "dkdd"}})), &["did you mean `dkd`"]);
    says(&built(json!({"distance": "ce"})), &["distance", "compares logits"]);
    says(&built(json!({"distance": "nkd", "detach_ensemble": false})), &["detach_ensemble = false", "`kd` and `dkd`"]);
    let bench = Bench::small(DType::F32);
    says(&prepared(&bench, json!({"stone_schedule": [{"from": 0, "stones": [4]}]})), &["stone_schedule", "= 4", "[1, 2, 3]"]);
    says(&prepared(&bench, json!({"stone_distance": {"5": "dkd"}})), &["stone_distance", "= 5", "[1, 2, 3]"]);
}

#[test]
fn splits_that_cannot_be() {
    for bad in [json!([2, 1]), json!([1, 1]), json!([0, 1])] {
        says(&built(json!({"student_blocks": bad})), &["student_blocks", "ascending"]);
    }
    says(&built(json!({"student_blocks": [1, 2], "teacher_blocks": [1, 2, 3]})), &["teacher_blocks", "2 of them"]);
    says(&built(json!({"blocks": 3, "student_blocks": [1, 2]})), &["student_blocks", "3 of them"]);
    let bench = Bench::small(DType::F32);
    says(&prepared(&bench, json!({"blocks": 4})), &["blocks = 4", "at most 3", "student", "teacher"]);
    says(&prepared(&bench, json!({"teacher_blocks": [2, 5]})), &["teacher_blocks", "1..=3"]);
}

#[test]
fn networks_that_cannot_be_joined() {
    let student = || small("student", &[3, 4, 6], DType::F32, 1);
    let mut trainable = Bench::new(student(), small("teacher", &[4, 6, 8], DType::F32, 2));
    trainable.teachers = vec![Arc::new(small("teacher", &[4, 6, 8], DType::F32, 2))];
    says(&prepared(&trainable, json!({})), &["teacher is trainable", "frozen"]);
    trainable.teachers.clear();
    says(&prepared(&trainable, json!({})), &["block_kd needs `a teacher`"]);
    let other_images = Bench::new(student(), zoo("resnet8", 16, DType::F32, 2));
    says(&prepared(&other_images, json!({})), &["[2, 8, 8]", "[2, 16, 16]", "both for the same"]);
    // A map after average pooling: what batch norms say does not reach its spread.
    let pooled = Bench::new(zoo("resnet8", 16, DType::F32, 1), zoo("ShuffleV1", 16, DType::F32, 2));
    says(&prepared(&pooled, json!({"connector_bn": "teacher"})), &["connector_bn", "ShuffleV1", "avg_pool"]);
}

#[test]
fn a_step_without_what_it_needs() {
    let bench = Bench::small(DType::F32);
    let mut unprepared = BlockKd::new(Params::default()).unwrap();
    let (student, teachers) = bench.outputs(&unprepared, Mode::Train(Rng::new(1)));
    let view = |student| kd_core::StepView {
        student,
        teachers: &teachers,
        models: bench.models(),
        batch: &bench.batch,
        progress: Default::default(),
        rng: Rng::new(1),
    };
    says(&unprepared.loss(&view(&student)).unwrap_err().to_string(), &["block_kd", "not prepared"]);
    let mut method = bench.prepared(json!({}));
    says(&method.loss(&view(&student)).unwrap_err().to_string(), &["block.1"]);
    let tokens = normal(1, &[B, 7, 3], DType::F32);
    let tokens = vec![Outputs::new([(kd_core::Cut::Block(1), tokens)])];
    says(
        &method.loss(&view(&tokens)).unwrap_err().to_string(),
        &["the student's block.1", "[batch, channels, height, width]", "[4, 7, 3]"],
    );
}

#[test]
fn logits_that_do_not_fit() {
    let logits = |seed: u64, k: usize| normal(seed, &[B, k], DType::F64);
    let labels = Tensor::new(&[0i64, 3, 4, 3], &Device::Cpu).unwrap();
    let run = |stones: &[(usize, Tensor)]| {
        let stones: BTreeMap<_, _> = stones.iter().cloned().collect();
        block_kd(&logits(1, K), &logits(2, K), &labels, &stones, 2, &Params::default()).unwrap_err().to_string()
    };
    says(&run(&[(1, logits(3, K)), (2, logits(4, K + 1))]), &["stone.2.logits", "[4, 5]", "[4, 6]"]);
    says(&run(&[(3, logits(3, K))]), &["stones = 3", "within 1..=2"]);
    let nan = (logits(3, K) * f64::NAN).unwrap();
    says(&run(&[(1, logits(3, K)), (2, nan)]), &["stone.2.logits", "not finite"]);
}

#[test]
fn named_tensors_that_do_not_fit() {
    let logits = |seed: u64| normal(seed, &[B, K], DType::F64);
    let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
    for (seed, name) in (1..).zip(["student.logits", "teacher.logits", "stone.1.logits"]) {
        tensors.insert(name.to_string(), logits(seed));
    }
    tensors.insert("labels".to_string(), Tensor::new(&[0i64, 3, 4, 3], &Device::Cpu).unwrap());
    let run = |tensors: &BTreeMap<String, Tensor>, params: Value| {
        evaluate(&kd_blockwise::registry()[0], tensors, &params, DType::F64).map(|found| found.len()).map_err(|e| e.to_string())
    };
    assert!(run(&tensors, json!({"blocks": 1})).is_ok());
    says(&run(&tensors, json!({"blocks": 2})).unwrap_err(), &["stone.2.logits", "not given"]);
    says(&run(&tensors, json!({})).unwrap_err(), &["blocks = 0"]);
    says(&run(&tensors, json!({"blocks": 1, "stones": [2]})).unwrap_err(), &["stones", "within 1..=1"]);
    says(&run(&tensors, json!({"blocks": 1, "stones": []})).unwrap_err(), &["gamma = 1"]);
    says(&run(&tensors, json!({"blocks": 1, "stone_decay": 0.0})).unwrap_err(), &["stone_decay = 0"]);
    for (label, word) in [(-1i64, "label -1"), (K as i64, "label 5")] {
        let mut bad = tensors.clone();
        bad.insert("labels".to_string(), Tensor::new(&[0i64, label, 4, 3], &Device::Cpu).unwrap());
        says(&run(&bad, json!({"blocks": 1})).unwrap_err(), &[word, "0..=4"]);
    }
    let mut bad = tensors.clone();
    bad.insert("stone.1.logits".to_string(), (logits(3) / 0.0).unwrap());
    says(&run(&bad, json!({"blocks": 1})).unwrap_err(), &["stone.1.logits", "not finite"]);
    let frozen = small("frozen", &[3], DType::F32, 1).frozen();
    assert!(matches!(frozen.trainable(), kd_core::Trainable::Frozen));
}
