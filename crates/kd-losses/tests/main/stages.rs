//! Feature methods driven as a training loop drives them: on networks they compute their parity function, reach everything that they train,
//! and refuse what cannot work, with the reason.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use kd_core::registry::evaluate;
use kd_core::{Batch, Cut, LossTerms, Method, Mode, Model, Models, Needs, Outputs, Progress, Result, Rng, Setup, StepView};
use kd_losses::find;
use kd_nn::{Conv, GraphBuilder, Network};
use serde_json::{Value, json};

use crate::main::support::{normal, scalar};

const B: usize = 4;
const K: usize = 5;

/// Stages of `widths` on grids of `sizes`, stem first; with batch norms and pre-activations, or with neither.
fn network(widths: &[usize], sizes: &[usize], preact: bool, seed: u64) -> Network {
    let mut b = GraphBuilder::new("small", &[2, sizes[0], sizes[0]]);
    let mut size = sizes[0];
    for (i, (&width, &to)) in widths.iter().zip(sizes).enumerate() {
        let stride = size / to;
        b.conv(&format!("conv{i}"), Conv::new(width, 3).stride(stride).pad(1));
        let norm = format!("bn{i}");
        if preact {
            b.batch_norm(&norm);
            b.cut(Cut::Preact(i));
        }
        b.relu();
        b.stage(i, &format!("conv{i}"), preact.then_some(norm.as_str()));
        if i > 0 {
            b.block(i, &format!("conv{i}"));
        }
        size = to;
    }
    b.global_avg_pool();
    b.cut(Cut::Embedding);
    b.linear("fc", K);
    b.cut(Cut::Logits);
    let network = Network::new(b.finish().unwrap(), DType::F64, &Device::Cpu).unwrap();
    network.init(Rng::new(seed)).unwrap();
    network
}

struct Bench {
    student: Network,
    teachers: Vec<Arc<dyn Model>>,
    batch: Batch,
    batch_size: usize,
    samples: usize,
}

impl Bench {
    fn new(student: Network, teacher: Network) -> Self {
        let side = student.spec().input[1];
        let batch = Batch {
            images: vec![normal(3, &[B, 2, side, side])],
            labels: Tensor::new(&[0i64, 3, 4, 3], &Device::Cpu).unwrap(),
            targets: None,
            indices: Tensor::new(&[0u32, 1, 2, 3], &Device::Cpu).unwrap(),
        };
        Self { student, teachers: vec![Arc::new(teacher.frozen())], batch, batch_size: B, samples: 100 }
    }

    /// Three stages behind the stem; the teacher is wider.
    fn usual() -> Self {
        Self::new(network(&[3, 4, 5, 6], &[8, 8, 4, 2], true, 1), network(&[4, 5, 6, 7], &[8, 8, 4, 2], true, 2))
    }

    /// Networks of one width.
    fn equal() -> Self {
        Self::new(network(&[3, 4, 5, 6], &[8, 8, 4, 2], true, 1), network(&[3, 4, 5, 6], &[8, 8, 4, 2], true, 2))
    }

    fn models(&self) -> Models<'_> {
        Models { student: &self.student, teachers: &self.teachers }
    }

    fn prepare(&self, method: &str, params: &Value) -> Result<Box<dyn Method>> {
        let mut method = (find(method)?.build)(params)?;
        method.prepare(&Setup {
            models: self.models(),
            classes: K,
            train_samples: self.samples,
            train_labels: None,
            batch_size: self.batch_size,
            class_means: None,
            class_groups: None,
            dtype: DType::F64,
            device: &Device::Cpu,
            rng: Rng::new(9),
        })?;
        Ok(method)
    }

    fn outputs(&self, needs: &Needs) -> (Vec<Outputs>, Vec<Vec<Outputs>>) {
        let images = &self.batch.images[0];
        let student = self.student.run(images, Cut::Input, &needs.student, Mode::Train(Rng::new(5))).unwrap();
        let teacher = self.teachers[0].run(images, Cut::Input, &needs.teacher, Mode::Eval).unwrap().detach();
        (vec![student], vec![vec![teacher]])
    }

    /// One step with exactly the cuts that are asked for; of an initial phase when one is named.
    fn loss(&self, method: &mut dyn Method, phase: Option<usize>) -> Result<LossTerms> {
        let needs = phase.map_or_else(|| method.needs(), |p| method.phases()[p].needs.clone());
        let (student, teachers) = self.outputs(&needs);
        let view = StepView {
            student: &student,
            teachers: &teachers,
            models: self.models(),
            batch: &self.batch,
            progress: Progress { epochs: 40, ..Progress::default() },
            rng: Rng::new(5),
        };
        match phase {
            Some(phase) => method.phase_loss(phase, &view),
            None => method.loss(&view),
        }
    }

    /// The same step by fixture names. A method's network is called `<method>` or `<method>.<prefix>`, its parameters `param.<prefix>.<name>`.
    fn inputs(&self, method: &dyn Method) -> BTreeMap<String, Tensor> {
        let stages = self.student.spec().stages.len();
        let mut cuts: Vec<Cut> = (0..stages).map(Cut::Stage).chain([Cut::Embedding, Cut::Logits]).collect();
        cuts.extend((0..stages).filter(|&i| self.student.spec().stages[i].has_preact).map(Cut::Preact));
        let (student, teacher) = self.outputs(&Needs { student: cuts.clone(), teacher: cuts, ..Needs::default() });
        let mut t = BTreeMap::new();
        for (side, out) in [("student", &student[0]), ("teacher", &teacher[0][0])] {
            t.extend(out.iter().map(|(cut, x)| (format!("{side}.{cut}"), x.detach())));
            t.insert(format!("{side}.stage.last"), out.stage(stages - 1).unwrap().detach());
        }
        let teacher = self.teachers[0].params().unwrap();
        for i in 0..stages {
            for part in ["weight", "bias"] {
                if let Some(x) = teacher.get(&format!("bn{i}.{part}")) {
                    t.insert(format!("teacher.bn.{i}.{part}"), x.unwrap());
                }
            }
        }
        for network in method.networks() {
            let params = network.params().unwrap();
            for entry in params.entries() {
                t.insert(named(method, network.as_ref(), &entry.name), params.get(&entry.name).unwrap().unwrap());
            }
            for entry in params.stat_entries() {
                let name = named(method, network.as_ref(), &entry.name).replacen("param.", "state_in.", 1);
                t.insert(name, params.get(&entry.name).unwrap().unwrap());
            }
        }
        t.extend(method.vars().into_iter().map(|(name, var)| (format!("param.{name}"), var.as_detached_tensor())));
        t
    }
}

fn named(method: &dyn Method, network: &dyn Model, parameter: &str) -> String {
    let prefix = network.spec().name.strip_prefix(method.name()).unwrap().trim_start_matches('.');
    if prefix.is_empty() { format!("param.{parameter}") } else { format!("param.{prefix}.{parameter}") }
}

fn far(a: &Tensor, b: &Tensor) -> f64 {
    let size = scalar(&b.abs().unwrap().sum_all().unwrap());
    scalar(&(a - b).unwrap().abs().unwrap().sum_all().unwrap()) / (1.0 + size)
}

/// Value, terms, gradients of everything that is trained and running statistics are those of the parity function. Networks in `idle` must
/// stay without a gradient.
fn step_equals_parity(bench: &Bench, method: &str, params: &Value, phase: Option<usize>, parity: &Value, idle: &[usize]) {
    let what = format!("{method} {params}");
    let entry = find(method).unwrap();
    let mut method = bench.prepare(method, params).unwrap_or_else(|e| panic!("{what}: {e}"));
    let inputs = bench.inputs(method.as_ref());
    let expected = evaluate(entry, &inputs, parity, DType::F64).unwrap_or_else(|e| panic!("{what}, parity: {e}"));
    let terms = bench.loss(method.as_mut(), phase).unwrap_or_else(|e| panic!("{what}: {e}"));
    let total = terms.total().unwrap();
    let near = |name: &str, a: f64| {
        let b = scalar(&expected[name]);
        assert!((a - b).abs() <= 1e-11 * (1.0 + b.abs()), "{what}, {name}: {a} in the loop, {b} on named tensors");
    };
    near("value", scalar(&total));
    for term in &terms.terms {
        near(&format!("term.{}", term.name), scalar(&term.raw) * if entry.raw_terms { 1.0 } else { term.weight });
    }
    assert_eq!(expected.keys().filter(|k| k.starts_with("term.")).count(), terms.terms.len(), "{what}");

    let networks = method.networks();
    let mut models: Vec<&dyn Model> = vec![&bench.student];
    models.extend(networks.iter().map(|n| n.as_ref()));
    let gradients = kd_nn::backward(&total, &models).unwrap();
    for (index, (network, gradient)) in networks.iter().zip(&gradients.networks[1..]).enumerate() {
        let (params, gradient) = (network.params().unwrap(), gradient.as_ref().unwrap());
        let reached = gradient.reached.iter().filter(|&&r| r).count();
        assert_eq!(reached, if idle.contains(&index) { 0 } else { gradient.reached.len() }, "{what}: {}", network.spec().name);
        if idle.contains(&index) {
            continue;
        }
        for (i, e) in params.entries().iter().enumerate() {
            let off = far(
                &params.grad_of(&gradient.flat, i).unwrap(),
                &expected[&named(method.as_ref(), network.as_ref(), &e.name).replacen("param", "grad.param", 1)],
            );
            assert!(off <= 1e-9, "{what}, {} {}: gradient off by {off}", network.spec().name, e.name);
        }
        for e in params.stat_entries() {
            let name = named(method.as_ref(), network.as_ref(), &e.name).replacen("param.", "state.", 1);
            let off = far(&params.get(&e.name).unwrap().unwrap(), &expected[&name]);
            assert!(off <= 1e-12, "{what}, {name}: off by {off}");
        }
    }
    for (name, var) in method.vars() {
        let off = far(gradients.store.get(&var).unwrap(), &expected[&format!("grad.param.{name}")]);
        assert!(off <= 1e-9, "{what}, {name}: gradient off by {off}");
    }
    let body = gradients.networks[0].as_ref().unwrap().reached.iter().any(|&r| r);
    assert_eq!(body, phase != Some(0) || entry.name != "ft", "{what}: the student");
}

fn same(bench: &Bench, method: &str, params: &Value) {
    step_equals_parity(bench, method, params, None, params, &[]);
}

#[test]
fn feature_methods_compute_their_parity_function() {
    let bench = Bench::usual();
    for (method, params) in [
        ("fitnet", json!({})),
        ("fitnet", json!({"hint_stage": 1, "use_relu": false, "bn_eps": 0.01})),
        ("at", json!({})),
        ("at", json!({"variant": "paper", "p": 4, "stages": [0, 2]})),
        ("nst", json!({})),
        ("sp", json!({})),
        ("sp", json!({"stages": [1, 3]})),
        ("vid", json!({})),
        ("ofd", json!({})),
        ("ofd", json!({"kernel_size": 3, "stages": [2, 3], "bn_momentum": 0.3})),
        ("reviewkd", json!({})),
        ("reviewkd", json!({"student_preact": true, "mid_channel": 3, "stages": [2, 3]})),
        ("kdsvd", json!({})),
        ("kdsvd", json!({"k": 2, "stages": [1, 2]})),
        ("ab", json!({"init_epochs": 0})),
    ] {
        same(&bench, method, &params);
    }
    same(&Bench::equal(), "fsp", &json!({"init_epochs": 0}));
    same(&Bench::equal(), "kdsvd", &json!({"matrix": "hw_c"}));
}

#[test]
fn grids_that_differ_are_brought_together() {
    let half = Bench::new(network(&[3, 4, 5], &[8, 4, 2], true, 1), network(&[4, 5, 6], &[8, 8, 4], true, 2));
    let double = Bench::new(network(&[3, 4, 5], &[8, 8, 4], true, 1), network(&[4, 5, 6], &[8, 4, 2], true, 2));
    for bench in [&half, &double] {
        for method in ["fitnet", "at", "nst", "sp", "vid", "ofd", "reviewkd"] {
            same(bench, method, &json!({}));
        }
        same(bench, "ab", &json!({"init_epochs": 0}));
    }
}

#[test]
fn initial_phases_train_what_they_name() {
    let bench = Bench::usual();
    let phase = |method: &str| bench.prepare(method, &json!({})).unwrap().phases().remove(0);
    step_equals_parity(&bench, "ab", &json!({}), Some(0), &json!({}), &[]);
    step_equals_parity(&Bench::equal(), "fsp", &json!({}), Some(0), &json!({}), &[]);
    assert_eq!((phase("ab").unused, phase("ab").epochs), (vec!["fc.".to_string()], 30));
    for (bench, method) in [(&bench, "ab"), (&Bench::equal(), "fsp")] {
        let mut method = bench.prepare(method, &json!({})).unwrap();
        assert!(bench.loss(method.as_mut(), None).unwrap().terms.is_empty());
        assert!(method.needs().student.is_empty() && method.needs().teacher.is_empty());
        assert_eq!(method.idle(0).len(), method.networks().len());
    }

    let ft = bench.prepare("ft", &json!({})).unwrap();
    assert_eq!((ft.phases()[0].idle.clone(), ft.phases()[0].lr, ft.idle(3)), (vec![1], Some(0.01), vec![0]));
    step_equals_parity(&bench, "ft", &json!({}), Some(0), &json!({"phase": "paraphrase"}), &[1]);
    // After the phase the encoder is the teacher's: a parity call finds it there.
    let mut method = bench.prepare("ft", &json!({})).unwrap();
    let mut inputs = bench.inputs(method.as_ref());
    let encoder: Vec<_> = inputs.iter().filter_map(|(n, t)| Some((n.strip_prefix("param.encoder.")?.to_string(), t.clone()))).collect();
    inputs.extend(encoder.into_iter().map(|(n, t)| (format!("teacher.encoder.{n}"), t)));
    let expected = evaluate(find("ft").unwrap(), &inputs, &json!({}), DType::F64).unwrap();
    let found = bench.loss(method.as_mut(), None).unwrap().total().unwrap();
    assert!((scalar(&found) - scalar(&expected["value"])).abs() < 1e-12);
    let networks = method.networks();
    let gradients = kd_nn::backward(&found, &[networks[0].as_ref(), networks[1].as_ref()]).unwrap();
    let reached = |i: usize| gradients.networks[i].as_ref().unwrap().reached.clone();
    assert!(reached(0).iter().all(|r| !r) && reached(1).iter().all(|&r| r));
}

#[test]
fn a_mask_hides_its_share_and_is_drawn_by_step() {
    let bench = Bench::usual();
    let mut method = bench.prepare("mgd", &json!({"mask_ratio": 0.0})).unwrap();
    let mut inputs = bench.inputs(method.as_ref());
    inputs.insert("mask".to_string(), Tensor::ones((B, 7, 1, 1), DType::F64, &Device::Cpu).unwrap());
    let expected = evaluate(find("mgd").unwrap(), &inputs, &json!({"mask_ratio": 0.0}), DType::F64).unwrap();
    let terms = bench.loss(method.as_mut(), None).unwrap();
    assert!((scalar(&terms.total().unwrap()) - scalar(&expected["value"])).abs() < 1e-11);
    let network = method.networks().remove(0);
    let gradients = kd_nn::backward(&terms.total().unwrap(), &[network.as_ref()]).unwrap();
    assert!(gradients.networks[0].as_ref().unwrap().reached.iter().all(|&r| r));
    for shape in ["channel", "spatial"] {
        let value = |ratio: f64| {
            let mut method = bench.prepare("mgd", &json!({"mask_ratio": ratio, "mask_shape": shape})).unwrap();
            scalar(&bench.loss(method.as_mut(), None).unwrap().total().unwrap())
        };
        assert_eq!(value(0.5), value(0.5));
        assert!(value(0.5) != value(0.0) && value(0.5) != value(1.0));
    }
}

#[test]
fn class_maps_are_the_classifiers_at_every_position() {
    let bench = Bench::usual();
    let (student, teacher) = bench.outputs(&Needs { student: vec![Cut::Stage(3)], teacher: vec![Cut::Stage(3)], ..Needs::default() });
    let cam = |model: &dyn Model, map: &Tensor| {
        let (b, d, h, w) = map.dims4().unwrap();
        let weight = model.classifier().unwrap().weight.unsqueeze(0).unwrap();
        weight.broadcast_matmul(&map.detach().reshape((b, d, h * w)).unwrap()).unwrap().reshape((b, K, h, w)).unwrap()
    };
    let inputs: BTreeMap<String, Tensor> = [
        ("student.cam".to_string(), cam(&bench.student, student[0].stage(3).unwrap())),
        ("teacher.cam".to_string(), cam(bench.teachers[0].as_ref(), teacher[0][0].stage(3).unwrap())),
    ]
    .into();
    for params in [json!({}), json!({"normalize": true, "resolution": 1}), json!({"binarize": true, "normalize": true})] {
        let expected = evaluate(find("catkd").unwrap(), &inputs, &params, DType::F64).unwrap();
        let mut method = bench.prepare("catkd", &params).unwrap();
        let total = bench.loss(method.as_mut(), None).unwrap().total().unwrap();
        assert!((scalar(&total) - scalar(&expected["value"])).abs() < 1e-11, "{params}");
        let gradients = kd_nn::backward(&total, &[&bench.student]).unwrap();
        let (params, gradient) = (bench.student.params().unwrap(), gradients.networks[0].as_ref().unwrap());
        let of = |name: &str| {
            let i = params.entries().iter().position(|e| e.name == name).unwrap();
            scalar(&params.grad_of(&gradient.flat, i).unwrap().abs().unwrap().sum_all().unwrap())
        };
        assert!(of("fc.weight") > 0.0 && of("conv0.weight") > 0.0 && of("fc.bias") < 1e-15);
    }
}

#[test]
fn what_cannot_work_is_refused_with_the_reason() {
    let usual = Bench::usual();
    let refused = |bench: &Bench, method: &str, params: Value, words: &[&str]| {
        let message = bench.prepare(method, &params).err().unwrap_or_else(|| panic!("{method} {params} was taken")).to_string();
        for word in words {
            assert!(message.contains(word), "{method}: {message:?} does not say {word:?}");
        }
    };
    refused(&usual, "at", json!({"stages": [1, 7]}), &["at", "no stage 7", "0 to 3"]);
    refused(&usual, "at", json!({"stages": [2, 1]}), &["stages", "[2, 1]", "ascending"]);
    refused(&usual, "sp", json!({"stages": []}), &["stages", "ascending"]);
    refused(&usual, "at", json!({"p": 3}), &["p = 3", "even"]);
    refused(&usual, "fitnet", json!({"hint_stage": 9}), &["fitnet", "no stage 9"]);
    refused(&usual, "fsp", json!({}), &["equal width", "stage 0", "3 channels", "4"]);
    refused(&usual, "fsp", json!({"stages": [1]}), &["stages", "two or more"]);
    refused(&usual, "kdsvd", json!({"stages": [1]}), &["stages", "two or more"]);
    refused(&usual, "ofd", json!({"kernel_size": 2}), &["kernel_size", "odd"]);
    refused(&usual, "reviewkd", json!({"mid_channel": 513}), &["mid_channel", "1..=512"]);
    refused(&usual, "reviewkd", json!({"shapes": [1, 2, 4, 9]}), &["shapes", "[1, 2, 4, 8]", "student"]);
    refused(&usual, "reviewkd", json!({"out_shapes": [2, 4]}), &["out_shapes", "1 for the embedding"]);
    refused(&usual, "vid", json!({"init_pred_var": 1e-6}), &["init_pred_var", "above eps"]);
    refused(&usual, "mgd", json!({"mask_ratio": 1.5}), &["mask_ratio", "0..=1"]);
    refused(&usual, "ft", json!({"init_epochs": 0}), &["init_epochs", "at least 1"]);
    refused(&usual, "ft", json!({"factor": 0.01}), &["factor", "channel"]);
    refused(&usual, "ab", json!({"margin": 0.0}), &["margin", "above 0"]);
    refused(&usual, "catkd", json!({"resolution": 0}), &["resolution", "at least 1"]);

    let plain = Bench::new(network(&[3, 4], &[4, 2], false, 1), network(&[3, 4], &[4, 2], true, 2));
    for method in ["ofd", "ab"] {
        refused(&plain, method, json!({}), &[method, "no pre-activation"]);
    }
    let plain = Bench::new(network(&[3, 4], &[4, 2], true, 1), network(&[3, 4], &[4, 2], false, 2));
    refused(&plain, "reviewkd", json!({}), &["reviewkd", "no pre-activation"]);
    let third = Bench::new(network(&[3, 4, 4], &[8, 2, 1], true, 1), network(&[3, 4, 4], &[8, 8, 4], true, 2));
    refused(&third, "fitnet", json!({}), &["fitnet, stage 2", "1x1", "4x4"]);
    refused(&third, "mgd", json!({}), &["mgd", "equal grids", "1x1 and 4x4"]);

    // Batch statistics of a single value.
    let alone = |size: usize, samples: usize| Bench { batch_size: size, samples, ..Bench::usual() };
    refused(&alone(1, 100), "reviewkd", json!({}), &["reviewkd", "at least 2", "got 1"]);
    refused(&alone(33, 100), "reviewkd", json!({}), &["reviewkd", "batches of 33", "alone"]);
    let last = Bench { batch_size: 1, ..Bench::new(network(&[3, 4], &[4, 1], true, 1), network(&[3, 4], &[4, 1], true, 2)) };
    refused(&last, "ofd", json!({}), &["ofd", "at least 2"]);
    assert!(alone(1, 100).prepare("fitnet", &json!({})).is_ok());
    let none = Bench { teachers: vec![], ..Bench::usual() };
    for method in ["fitnet", "at", "nst", "sp", "vid", "ofd", "reviewkd", "kdsvd", "fsp", "ab", "ft", "mgd", "catkd"] {
        refused(&none, method, json!({}), &[method, "teacher"]);
        let mut method = (find(method).unwrap().build)(&json!({})).unwrap();
        let unprepared = if method.phases().is_empty() { usual.loss(method.as_mut(), None) } else { usual.loss(method.as_mut(), Some(0)) };
        assert!(unprepared.unwrap_err().to_string().contains("prepare"), "{}", method.name());
    }
}
