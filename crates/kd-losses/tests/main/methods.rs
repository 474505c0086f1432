//! Every method driven as a training loop drives it, on small networks: what it needs, builds and returns.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use kd_core::registry::evaluate;
use kd_core::{Batch, Cut, Method, MethodEntry, Mode, Model, Models, Outputs, Progress, Result, Rng, Setup, StepView};
use kd_losses::find;
use kd_nn::{Conv, GraphBuilder, Network};
use serde_json::{Value, json};

use crate::main::fixtures::seeds;
use crate::main::support::{normal, scalar};

const B: usize = 4;
const K: usize = 5;

/// Three stages, the last `width` channels wide.
fn network(width: usize, seed: u64) -> Network {
    let mut b = GraphBuilder::new("small", &[2, 4, 4]);
    for (i, channels) in [3, 6, width].into_iter().enumerate() {
        b.conv(&format!("conv{i}"), Conv::new(channels, 3).pad(1));
        b.relu();
        b.stage(i, &format!("conv{i}"), None);
    }
    b.global_avg_pool();
    b.cut(Cut::Embedding);
    b.linear("fc", K);
    b.cut(Cut::Logits);
    let network = Network::new(b.finish().unwrap(), DType::F64, &Device::Cpu).unwrap();
    network.init(Rng::new(seed)).unwrap();
    network
}

/// Student, teacher and one batch.
struct Bench {
    student: Network,
    teachers: Vec<Arc<dyn Model>>,
    batch: Batch,
    means: Tensor,
    groups: Vec<i64>,
}

impl Bench {
    fn new(student: usize, teacher: usize) -> Self {
        let batch = Batch {
            images: vec![normal(3, &[B, 2, 4, 4])],
            labels: Tensor::new(&[0i64, 3, 4, 3], &Device::Cpu).unwrap(),
            targets: None,
            indices: Tensor::new(&[0u32, 1, 2, 3], &Device::Cpu).unwrap(),
        };
        Self {
            student: network(student, 1),
            teachers: vec![Arc::new(network(teacher, 2).frozen())],
            batch,
            means: normal(4, &[K, teacher]),
            groups: vec![0, 0, 1, 1, 1],
        }
    }

    fn models(&self) -> Models<'_> {
        Models { student: &self.student, teachers: &self.teachers }
    }

    fn prepare(&self, entry: &MethodEntry, params: &Value, batch_size: usize) -> Result<Box<dyn Method>> {
        let mut method = (entry.build)(params)?;
        let needs = method.needs();
        method.prepare(&Setup {
            models: self.models(),
            classes: K,
            train_samples: 100,
            train_labels: None,
            batch_size,
            class_means: needs.class_means.then_some(&self.means),
            class_groups: needs.class_groups.then_some(&self.groups),
            dtype: DType::F64,
            device: &Device::Cpu,
            rng: Rng::new(9),
        })?;
        Ok(method)
    }

    /// One step with exactly the cuts that the method asks for.
    fn loss(&self, method: &mut dyn Method, epoch: usize, rng: Rng) -> Result<kd_core::LossTerms> {
        let needs = method.needs();
        let images = &self.batch.images[0];
        let student = vec![self.student.run(images, Cut::Input, &needs.student, Mode::Train(rng))?];
        let teachers: Vec<Vec<Outputs>> = if needs.teacher.is_empty() {
            vec![]
        } else {
            self.teachers
                .iter()
                .map(|t| Ok(vec![t.run(images, Cut::Input, &needs.teacher, Mode::Eval)?.detach()]))
                .collect::<Result<_>>()?
        };
        let progress = Progress { epoch, epochs: 40, ..Progress::default() };
        method.loss(&StepView { student: &student, teachers: &teachers, models: self.models(), batch: &self.batch, progress, rng })
    }

    /// The same step as a parity call: tensors by fixture name.
    fn inputs(&self, method: &dyn Method) -> BTreeMap<String, Tensor> {
        let images = &self.batch.images[0];
        let cuts = [Cut::Stage(1), Cut::Embedding, Cut::Logits];
        let mut t = BTreeMap::new();
        for (side, model, mode) in
            [("student", &self.student as &dyn Model, Mode::Train(Rng::new(0))), ("teacher", self.teachers[0].as_ref(), Mode::Eval)]
        {
            let out = model.run(images, Cut::Input, &cuts, mode).unwrap();
            t.insert(format!("{side}.logits"), out.logits().unwrap().detach());
            t.insert(format!("{side}.embedding"), out.embedding().unwrap().detach());
            if side == "student" {
                t.insert("student.mid_embedding".into(), out.stage(1).unwrap().detach().mean((2, 3)).unwrap());
            }
            let classifier = model.classifier().unwrap();
            t.insert(format!("{side}.classifier.weight"), classifier.weight);
            t.insert(format!("{side}.classifier.bias"), classifier.bias.unwrap());
        }
        t.insert("labels".into(), self.batch.labels.clone());
        t.extend(self.batch.targets.iter().map(|q| ("targets".to_string(), q.clone())));
        t.insert("class_means".into(), self.means.clone());
        t.insert("class_groups".into(), Tensor::new(self.groups.as_slice(), &Device::Cpu).unwrap());
        for network in method.networks() {
            let prefix = if method.name() == "uskd" { "param" } else { "param.adapter" };
            let params = network.params().unwrap();
            t.extend(params.entries().iter().map(|e| (format!("{prefix}.{}", e.name), params.get(&e.name).unwrap().unwrap())));
        }
        t
    }
}

/// Runs one step both ways and compares value, terms and the gradients of what the method trains.
fn step_equals_parity(bench: &Bench, entry: &MethodEntry, params: &Value, adapted: bool) {
    let what = format!("{} {params}", entry.name);
    let mut method = bench.prepare(entry, params, B).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(method.networks().len(), usize::from(adapted || entry.name == "uskd"), "{what}");
    let mut parity_params = params.clone();
    if entry.name.ends_with("_pp") {
        parity_params["epoch"] = json!(7);
    }
    let expected =
        evaluate(entry, &bench.inputs(method.as_ref()), &parity_params, DType::F64).unwrap_or_else(|e| panic!("{what}, parity: {e}"));
    let terms = bench.loss(method.as_mut(), 7, Rng::new(5)).unwrap_or_else(|e| panic!("{what}: {e}"));
    let close = |name: &str, a: f64| {
        let b = scalar(&expected[name]);
        assert!((a - b).abs() <= 1e-12 * (1.0 + b.abs()), "{what}, {name}: {a} in the loop, {b} on named tensors");
    };
    close("value", scalar(&terms.total().unwrap()));
    for term in &terms.terms {
        close(&format!("term.{}", term.name), scalar(&term.raw) * term.weight);
    }
    assert_eq!(expected.keys().filter(|k| k.starts_with("term.")).count(), terms.terms.len(), "{what}");

    let networks = method.networks();
    let mut models: Vec<&dyn Model> = vec![&bench.student];
    models.extend(networks.iter().map(|n| n.as_ref()));
    let gradients = kd_nn::backward(&terms.total().unwrap(), &models).unwrap();
    for (network, gradient) in networks.iter().zip(&gradients.networks[1..]) {
        let (params, gradient) = (network.params().unwrap(), gradient.as_ref().unwrap());
        assert!(gradient.reached.iter().all(|&r| r), "{what}: a parameter of {} has no gradient", network.spec().name);
        for (i, e) in params.entries().iter().enumerate() {
            let prefix = if entry.name == "uskd" { "param" } else { "param.adapter" };
            let wanted = &expected[&format!("grad.{prefix}.{}", e.name)];
            let off = scalar(&(params.grad_of(&gradient.flat, i).unwrap() - wanted).unwrap().abs().unwrap().sum_all().unwrap());
            assert!(off <= 1e-11, "{what}, {}: gradient off by {off}", e.name);
        }
    }
    let student = gradients.networks[0].as_ref().unwrap();
    assert!(student.reached.iter().any(|&r| r), "{what}: the student is not reached");
}

#[test]
fn every_method_computes_its_parity_function() {
    let bench = Bench::new(6, 6);
    for entry in seeds() {
        step_equals_parity(&bench, entry, &json!({}), false);
    }
    step_equals_parity(&bench, find("fnkd").unwrap(), &json!({"form": "released"}), false);
    step_equals_parity(&bench, find("uskd").unwrap(), &json!({"form": "released", "zipf_slots": "non_target"}), false);
    step_equals_parity(&bench, find("dkd_pp").unwrap(), &json!({"warmup_nd": true}), false);
}

#[test]
fn soft_targets_of_the_batch_are_used() {
    let mut bench = Bench::new(6, 6);
    let hard: Vec<f64> = seeds().map(|e| value(&bench, e)).collect();
    let rows = [[0.7, 0.3, 0.0, 0.0, 0.0], [0.0, 0.4, 0.0, 0.6, 0.0], [0.0, 0.0, 0.0, 0.2, 0.8], [0.0, 0.0, 0.25, 0.75, 0.0]];
    bench.batch.targets = Some(Tensor::new(&rows, &Device::Cpu).unwrap());
    for (entry, hard) in seeds().zip(hard) {
        if entry.name == "anisotropic_label_smoothing" {
            let mut method = bench.prepare(entry, &json!({}), B).unwrap();
            assert!(bench.loss(method.as_mut(), 0, Rng::new(5)).unwrap_err().to_string().contains("mixup"));
            continue;
        }
        step_equals_parity(&bench, entry, &json!({}), false);
        let mixes = !matches!(entry.name, "kd" | "fnkd" | "norm_match" | "sifn" | "dkd" | "nkd");
        assert_eq!(value(&bench, entry) != hard, mixes, "{}", entry.name);
    }
}

fn value(bench: &Bench, entry: &MethodEntry) -> f64 {
    let mut method = bench.prepare(entry, &json!({}), B).unwrap();
    scalar(&bench.loss(method.as_mut(), 7, Rng::new(5)).unwrap().total().unwrap())
}

#[test]
fn differing_widths_get_an_adapter_that_learns() {
    let bench = Bench::new(4, 6);
    for method in ["nd", "nd_cosine", "nd_infonce", "norm_match", "kd_pp", "dkd_pp"] {
        let entry = find(method).unwrap();
        step_equals_parity(&bench, entry, &json!({"dropout": 0.0}), true);
        step_equals_parity(&bench, entry, &json!({"dropout": 0.0, "adapter": "bn_dropout_linear", "bn_eps": 0.01}), true);
        let refused = |params: &Value, batch| bench.prepare(entry, params, batch).err().map(|e| e.to_string()).unwrap();
        let message = refused(&json!({"adapter": "none"}), B);
        assert!(message.contains("4 wide") && message.contains("6"), "{message}");
        assert!(refused(&json!({}), 1).contains("at least 2 samples"));
        step_equals_parity(&Bench::new(6, 6), entry, &json!({"dropout": 0.0, "adapter": "bn_dropout_linear"}), true);
    }
}

#[test]
fn dropout_is_a_function_of_the_step() {
    let bench = Bench::new(4, 6);
    let entry = find("nd").unwrap();
    let mut method = bench.prepare(entry, &json!({}), B).unwrap();
    let mut at = |seed| scalar(&bench.loss(method.as_mut(), 0, Rng::new(seed)).unwrap().total().unwrap());
    assert_eq!(at(1), at(1));
    assert_ne!(at(1), at(2));
}

#[test]
fn one_run_initialises_like_another() {
    let bench = Bench::new(4, 6);
    for method in ["nd", "uskd"] {
        let build = || bench.prepare(find(method).unwrap(), &json!({}), B).unwrap().networks()[0].params().unwrap().values().tensor();
        let (a, b) = (build().to_vec1::<f64>().unwrap(), build().to_vec1::<f64>().unwrap());
        assert_eq!(a, b);
        assert!(a.iter().any(|&x| x != 0.0 && x != 1.0));
    }
}

#[test]
fn teacher_free_methods_need_no_teacher() {
    let free = ["ce", "label_smoothing", "anisotropic_label_smoothing", "tf_nkd", "uskd", "he", "nd_cosine", "nd_infonce", "sifn"];
    let mut bench = Bench::new(6, 6);
    bench.teachers.clear();
    for entry in seeds() {
        let needs_none = (entry.build)(&json!({})).unwrap().needs().teacher.is_empty();
        assert_eq!(needs_none, free.contains(&entry.name), "{}", entry.name);
        let ran = bench.prepare(entry, &json!({}), B).and_then(|mut m| bench.loss(m.as_mut(), 0, Rng::new(1)));
        match ran {
            Ok(_) => assert!(needs_none, "{}", entry.name),
            Err(e) => assert!(!needs_none && e.to_string().contains("teacher"), "{}: {e}", entry.name),
        }
    }
}

#[test]
fn what_was_not_prepared_is_named() {
    let bench = Bench::new(6, 6);
    for (method, word) in [("nd", "class means"), ("nd_infonce", "class means"), ("kd_pp", "class means"), ("uskd", "weak branch")] {
        let mut method = (find(method).unwrap().build)(&json!({})).unwrap();
        let message = bench.loss(method.as_mut(), 0, Rng::new(1)).unwrap_err().to_string();
        assert!(message.contains(word), "{message}");
    }
    let wrong = |change: fn(&mut Bench), method: &str| {
        let mut bench = Bench::new(6, 6);
        change(&mut bench);
        bench.prepare(find(method).unwrap(), &json!({}), B).err().unwrap().to_string()
    };
    assert!(wrong(|b| b.means = normal(4, &[K + 1, 6]), "nd").contains("[5, 6]"));
    assert!(wrong(|b| b.groups = vec![0, 1], "anisotropic_label_smoothing").contains("class_groups"));
}
