//! The methods with networks of their own, driven as a loop drives them: what they build, reach, refuse and ship.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use kd_core::registry::evaluate;
use kd_core::{Batch, Cut, Method, Mode, Model, Models, Outputs, Progress, Result, Rng, Setup, StepView};
use kd_losses::find;
use kd_nn::{Conv, GraphBuilder, Network};
use serde_json::{Value, json};

use crate::main::fixtures::values;
use crate::main::newer::{Given, batch_norm, normal};

const B: usize = 4;
const K: usize = 5;

/// conv, batch norm, ReLU for each stage, the mean, a linear layer; `widths` channels, strides 2 where `halve` says so.
fn network(widths: &[usize], halve: &[bool], seed: u64) -> Network {
    let mut b = GraphBuilder::new(format!("small{seed}"), &[2, 4, 4]);
    for (i, (&channels, &half)) in widths.iter().zip(halve).enumerate() {
        b.conv(&format!("conv{i}"), Conv::new(channels, 3).pad(1).stride(1 + usize::from(half)));
        b.batch_norm(&format!("bn{i}"));
        b.relu();
        b.stage(i, &format!("bn{i}"), Some(&format!("bn{i}")));
    }
    b.global_avg_pool();
    b.cut(Cut::Embedding);
    b.linear("fc", K);
    b.cut(Cut::Logits);
    let network = Network::new(b.finish().unwrap(), DType::F64, &Device::Cpu).unwrap();
    network.init(Rng::new(seed)).unwrap();
    network
}

fn tensor(seed: u64, shape: &[usize]) -> Tensor {
    Tensor::from_vec(normal(seed, shape, 1.0).1, shape, &Device::Cpu).unwrap()
}

struct Bench {
    student: Arc<Network>,
    teachers: Vec<Arc<dyn Model>>,
    batch: Batch,
}

impl Bench {
    fn new(student: Network, teacher: Network) -> Self {
        let batch = Batch {
            images: vec![tensor(3, &[B, 2, 4, 4]), tensor(4, &[B, 2, 4, 4])],
            labels: Tensor::new(&[0i64, 3, 4, 3], &Device::Cpu).unwrap(),
            targets: None,
            indices: Tensor::new(&[0u32, 1, 2, 3], &Device::Cpu).unwrap(),
        };
        Self { student: Arc::new(student), teachers: vec![Arc::new(teacher.frozen())], batch }
    }

    fn plain() -> Self {
        Self::new(network(&[3, 4, 6], &[false, true, false], 1), network(&[4, 5, 8], &[false, true, false], 2))
    }

    fn models(&self) -> Models<'_> {
        Models { student: self.student.as_ref(), teachers: &self.teachers }
    }

    fn prepare(&self, method: &str, params: &Value, batch_size: usize) -> Result<Box<dyn Method>> {
        let mut method = (find(method)?.build)(params)?;
        let means = tensor(8, &[K, 8]);
        method.prepare(&Setup {
            models: self.models(),
            classes: K,
            train_samples: 100,
            train_labels: None,
            batch_size,
            class_means: method.needs().class_means.then_some(&means),
            class_groups: None,
            dtype: DType::F64,
            device: &Device::Cpu,
            rng: Rng::new(9),
        })?;
        Ok(method)
    }

    fn refusal(&self, method: &str, params: &Value, batch_size: usize) -> String {
        self.prepare(method, params, batch_size).err().unwrap_or_else(|| panic!("{method} {params} is not refused")).to_string()
    }

    /// One step with exactly the cuts and views that the method asks for.
    fn loss(&self, method: &mut dyn Method, epoch: usize, rng: Rng) -> Result<kd_core::LossTerms> {
        let needs = method.needs();
        let views = &self.batch.images[..needs.views];
        let student =
            views.iter().map(|x| self.student.run(x, Cut::Input, &needs.student, Mode::Train(rng))).collect::<Result<Vec<_>>>()?;
        let run = |t: &Arc<dyn Model>| -> Result<Vec<Outputs>> {
            let views = if needs.teacher.is_empty() { &[][..] } else { views };
            views.iter().map(|x| Ok(t.run(x, Cut::Input, &needs.teacher, Mode::Eval)?.detach())).collect()
        };
        let teachers = self.teachers.iter().map(run).collect::<Result<Vec<_>>>()?;
        let progress = Progress { epoch, epochs: 240, ..Progress::default() };
        method.loss(&StepView { student: &student, teachers: &teachers, models: self.models(), batch: &self.batch, progress, rng })
    }
}

/// Every method here with parameters that the bench's networks allow.
fn methods() -> Vec<(&'static str, Value)> {
    vec![
        ("srrl", json!({})),
        ("srrl", json!({"variant": "feature_map"})),
        ("simkd", json!({})),
        ("ofa", json!({"stages": [1, 2], "final_stage": 2, "eps": [1.0, 1.2, 1.5]})),
        ("wttm", json!({})),
        ("rld", json!({})),
        ("crld", json!({})),
        ("wkd_l", json!({})),
        ("wkd_l", json!({"cost": "class_means"})),
        ("wkd_f", json!({})),
        ("wkd_f", json!({"projector": "bottleneck", "hint_stage": 1})),
        ("fcfd", json!({})),
        ("fcfd", json!({"teacher_statistics": "running", "paths": "student_teacher", "extra_paths": 1})),
        ("fcfd", json!({"paths": "teacher_student", "extra_paths": 1})),
    ]
}

#[test]
fn every_layer_learns_and_a_step_is_a_function_of_its_inputs() {
    let bench = Bench::plain();
    for (name, params) in methods() {
        let what = format!("{name} {params}");
        let mut method = bench.prepare(name, &params, B).unwrap_or_else(|e| panic!("{what}: {e}"));
        let terms = bench.loss(method.as_mut(), 30, Rng::new(5)).unwrap_or_else(|e| panic!("{what}: {e}"));
        let value = values(&terms.total().unwrap())[0];
        assert!(value.is_finite() && value != 0.0, "{what}: {value}");
        let networks = method.networks();
        let idle = method.idle(30);
        let mut models: Vec<&dyn Model> = vec![bench.student.as_ref()];
        models.extend(networks.iter().map(|n| n.as_ref()));
        let gradients = kd_nn::backward(&terms.total().unwrap(), &models).unwrap();
        for (i, (network, gradient)) in networks.iter().zip(&gradients.networks[1..]).enumerate() {
            let reached = gradient.as_ref().unwrap().reached.iter().all(|&r| r);
            assert_eq!(reached, !idle.contains(&i), "{what}: {}", network.spec().name);
        }
        let student = gradients.networks[0].as_ref().unwrap();
        let unused = method.unused();
        for (entry, reached) in bench.student.parameters().entries().iter().zip(&student.reached) {
            let left = unused.iter().any(|u| entry.name.starts_with(u.as_str()));
            assert!(!left || !reached, "{what}: {} is reached", entry.name);
        }
        assert!(student.reached.iter().any(|&r| r), "{what}");
        // The same networks again: a new method from the same setup, the same numbers.
        let mut twin = bench.prepare(name, &params, B).unwrap();
        let again = bench.loss(twin.as_mut(), 30, Rng::new(5)).unwrap();
        assert_eq!(values(&again.total().unwrap())[0].to_bits(), value.to_bits(), "{what}");
    }
}

#[test]
fn methods_on_logits_compute_their_parity_functions() {
    let bench = Bench::plain();
    let out = |model: &dyn Model, view: usize, mode: Mode| {
        model.run(&bench.batch.images[view], Cut::Input, &[Cut::Logits], mode).unwrap().logits().unwrap().detach()
    };
    let mut tensors = BTreeMap::from([("labels".to_string(), bench.batch.labels.clone())]);
    for (suffix, view) in [("", 0), (".strong", 1)] {
        tensors.insert(format!("student{suffix}.logits"), out(bench.student.as_ref(), view, Mode::BatchStats));
        tensors.insert(format!("teacher{suffix}.logits"), out(bench.teachers[0].as_ref(), view, Mode::Eval));
    }
    tensors.insert("teacher.fc.weight".to_string(), bench.teachers[0].classifier().unwrap().weight);
    tensors.insert("class_means".to_string(), tensor(8, &[K, 8]));
    for (name, params) in methods() {
        if !matches!(name, "wttm" | "rld" | "crld" | "wkd_l") {
            continue;
        }
        let mut method = bench.prepare(name, &params, B).unwrap();
        let value = values(&bench.loss(method.as_mut(), 30, Rng::new(5)).unwrap().total().unwrap())[0];
        let expected = values(&evaluate(find(name).unwrap(), &tensors, &params, DType::F64).unwrap()["value"])[0];
        assert!((value - expected).abs() < 1e-9 * (1.0 + expected.abs()), "{name}: {value} in the loop, {expected} on named tensors");
        assert!(method.needs().teacher == [Cut::Logits] && method.needs().student == [Cut::Logits], "{name} computes a stage");
    }
}

#[test]
fn wasserstein_weights_fall_after_their_epoch() {
    let bench = Bench::plain();
    for name in ["wkd_l", "wkd_f"] {
        let mut method = bench.prepare(name, &json!({}), B).unwrap();
        let mut weights = |epoch: usize| {
            let terms = bench.loss(method.as_mut(), epoch, Rng::new(5)).unwrap();
            terms.terms.iter().map(|t| t.weight).collect::<Vec<_>>()
        };
        let (full, last, half, end) = (weights(0), weights(149), weights(194), weights(239));
        assert_eq!(full, last, "{name}");
        let share = |w: &[f64]| w[1] / full[1];
        assert!((share(&half) - 0.5).abs() < 1e-12 && share(&end).abs() < 1e-12, "{name}: {half:?} {end:?}");
        assert_eq!(half[0] == full[0], name == "wkd_l", "{name}: the target's term keeps its weight");
    }
}

#[test]
fn simkd_ships_student_projector_and_the_teachers_classifier() {
    let bench = Bench::plain();
    let method = bench.prepare("simkd", &json!({}), B).unwrap();
    assert_eq!(method.needs().student, [Cut::Stage(2)]);
    assert_eq!(method.unused(), ["fc.weight", "fc.bias"]);
    let deployed = method.deploy(bench.student.clone()).unwrap();
    let images = &bench.batch.images[0];
    let out = deployed.run(images, Cut::Input, &[Cut::Stage(1), Cut::Embedding, Cut::Logits], Mode::Eval).unwrap();
    let map = bench.student.run(images, Cut::Input, &[Cut::Stage(2)], Mode::Eval).unwrap();
    let embedding = method.networks()[0].run(map.stage(2).unwrap(), Cut::Input, &[Cut::Embedding], Mode::Eval).unwrap();
    let expected = bench.teachers[0].run(embedding.embedding().unwrap(), Cut::Embedding, &[Cut::Logits], Mode::Eval).unwrap();
    let close = |a: &Tensor, b: &Tensor| values(a).iter().zip(values(b)).all(|(a, b)| (a - b).abs() < 1e-12);
    assert!(close(out.logits().unwrap(), expected.logits().unwrap()));
    assert_eq!(out.stage(1).unwrap().dims(), [B, 4, 2, 2]);
    let again = deployed.run(out.embedding().unwrap(), Cut::Embedding, &[Cut::Logits], Mode::Eval).unwrap();
    assert!(close(again.logits().unwrap(), out.logits().unwrap()));
    assert_eq!((deployed.spec().embedding, deployed.spec().classes), (8, K));
    let names: Vec<String> = deployed.params().unwrap().state_dict().unwrap().into_iter().map(|(n, _)| n).collect();
    for name in ["conv0.weight", "simkd.projector.conv2.weight", "simkd.projector.bn3.running_var", "simkd.classifier.bias"] {
        assert!(names.iter().any(|n| n == name), "{name} is not among {names:?}");
    }
    // An export read back is the same network.
    let exported: BTreeMap<String, Tensor> = deployed.params().unwrap().state_dict().unwrap().into_iter().collect();
    let extra: kd_core::StateDict = exported.into_iter().filter(|(n, _)| n.starts_with(kd_losses::simkd::Deployed::PREFIX)).collect();
    let restored = kd_losses::simkd::Deployed::restore(bench.student.clone(), &extra).unwrap();
    let logits = restored.run(images, Cut::Input, &[Cut::Logits], Mode::Eval).unwrap();
    assert!(close(logits.logits().unwrap(), out.logits().unwrap()));
    for (name, _) in extra.iter().filter(|(n, _)| !n.ends_with("num_batches_tracked") && !n.ends_with("bias")) {
        let mut without = extra.clone();
        without.remove(name);
        let message = kd_losses::simkd::Deployed::restore(bench.student.clone(), &without).err().unwrap().to_string();
        assert!(message.contains(name.as_str()), "{message}");
    }
    assert!(deployed.run(images, Cut::Stage(0), &[Cut::Logits], Mode::Eval).err().unwrap().to_string().contains("stage.0"));
}

#[test]
fn combinations_that_cannot_work_are_refused_with_the_reason() {
    let bench = Bench::plain();
    assert!(bench.refusal("srrl", &json!({}), 1).contains("at least 2 samples"));
    assert!(bench.refusal("simkd", &json!({"factor": 3}), B).contains("divisor of 8"));
    let message = bench.refusal("ofa", &json!({}), B);
    assert!(message.contains("final_stage = 4") && message.contains("stages = [1, 2]"), "{message}");
    assert!((find("ofa").unwrap().build)(&json!({"eps": [1.0]})).err().unwrap().to_string().contains("5 numbers"));
    assert!(bench.refusal("fcfd", &json!({"extra_paths": 5}), B).contains("at most 2"));
    assert!(bench.refusal("wkd_f", &json!({"grid": 2}), B).contains("two cells"));
    assert!(bench.refusal("wkd_f", &json!({"hint_stage": 7}), B).contains("no stage 7"));
    let deep = Bench::new(network(&[3, 4, 6, 6], &[false; 4], 1), network(&[4, 5, 8], &[false; 3], 2));
    assert!(deep.refusal("fcfd", &json!({}), B).contains("same number"));
    let odd = Bench::new(network(&[3, 4], &[true, true], 1), network(&[3, 4], &[false, false], 2));
    assert!(odd.refusal("fcfd", &json!({"extra_paths": 0}), B).contains("one twice the other"));
    for name in ["srrl", "simkd", "ofa", "wttm", "rld", "crld", "wkd_l", "wkd_f", "fcfd"] {
        let mut alone = Bench::plain();
        alone.teachers.clear();
        let params = if name == "ofa" { json!({"stages": [], "eps": [1.0]}) } else { json!({}) };
        let ran = alone.prepare(name, &params, B).and_then(|mut m| alone.loss(m.as_mut(), 0, Rng::new(1)));
        assert!(ran.is_err_and(|e| e.to_string().contains("teacher")), "{name}");
    }
    let mut one_view = (find("crld").unwrap().build)(&json!({})).unwrap();
    let (x, cuts) = (&bench.batch.images[0], [Cut::Logits]);
    let student = [bench.student.run(x, Cut::Input, &cuts, Mode::BatchStats).unwrap()];
    let teachers = [vec![bench.teachers[0].run(x, Cut::Input, &cuts, Mode::Eval).unwrap()]];
    let view = StepView {
        student: &student,
        teachers: &teachers,
        models: bench.models(),
        batch: &bench.batch,
        progress: Progress::default(),
        rng: Rng::new(1),
    };
    assert!(one_view.loss(&view).unwrap_err().to_string().contains("two views"));
    for name in ["srrl", "simkd", "wkd_l", "wkd_f", "fcfd"] {
        let mut method = (find(name).unwrap().build)(&json!({})).unwrap();
        assert!(bench.loss(method.as_mut(), 0, Rng::new(1)).unwrap_err().to_string().contains("prepare"), "{name}");
    }
}

/// conv 3x3 of a map, no bias.
fn conv3(x: &[f64], shape: [usize; 4], weight: &[f64], out: usize, stride: usize) -> (Vec<f64>, [usize; 4]) {
    let [b, c, h, w] = shape;
    let (oh, ow) = (h.div_ceil(stride), w.div_ceil(stride));
    let mut y = vec![0.0; b * out * oh * ow];
    for (i, y) in y.iter_mut().enumerate() {
        let (column, line, o, sample) = (i % ow * stride, i / ow % oh * stride, i / (oh * ow) % out, i / (oh * ow * out));
        for (ch, ky, kx) in (0..c).flat_map(|ch| (0..9).map(move |k| (ch, k / 3, k % 3))) {
            let (at_y, at_x) = (line + ky, column + kx);
            if (1..=h).contains(&at_y) && (1..=w).contains(&at_x) {
                *y += weight[((o * c + ch) * 3 + ky) * 3 + kx] * x[((sample * c + ch) * h + at_y - 1) * w + at_x - 1];
            }
        }
    }
    (y, [b, out, oh, ow])
}

/// FCFD over whole networks in plain loops, with the batch's statistics everywhere.
struct Plain {
    tensors: BTreeMap<String, Given>,
}

type Stage = (Vec<f64>, [usize; 4]);

impl Plain {
    fn get(&self, name: &str) -> &Given {
        &self.tensors[name]
    }

    /// conv, batch norm, and what stands behind.
    fn layer(&self, x: &Stage, conv: &str, norm: &str, stride: usize, slope: f64) -> Stage {
        let (shape, weight) = self.get(&format!("{conv}.weight"));
        let (y, shape) = conv3(&x.0, x.1, weight, shape[0], stride);
        let (y, ..) = batch_norm(&y, shape, &self.get(&format!("{norm}.weight")).1, &self.get(&format!("{norm}.bias")).1);
        (y.into_iter().map(|v| if v > 0.0 { v } else { slope * v }).collect(), shape)
    }

    fn stage(&self, net: &str, i: usize, x: &Stage) -> Stage {
        self.layer(x, &format!("{net}.conv{i}"), &format!("{net}.bn{i}"), 1 + usize::from(i == 1), 0.0)
    }

    fn bridge(&self, name: &str, x: &Stage) -> Stage {
        self.layer(x, &format!("{name}.conv"), &format!("{name}.bn"), 1, 0.1)
    }

    fn gap(x: &Stage) -> Vec<f64> {
        let cells = x.1[2] * x.1[3];
        x.0.chunks(cells).map(|c| c.iter().map(|v| v.max(0.0)).sum::<f64>() / cells as f64).collect()
    }

    fn soft(&self, net: &str, x: &Stage, t: f64) -> Vec<Vec<f64>> {
        let (width, weight, bias) = (x.1[1], &self.get(&format!("{net}.fc.weight")).1, &self.get(&format!("{net}.fc.bias")).1);
        let means = Self::gap(x);
        let logits = means
            .chunks(width)
            .map(|e| (0..K).map(|k| (bias[k] + (0..width).map(|d| weight[k * width + d] * e[d]).sum::<f64>()) / t).collect::<Vec<f64>>());
        let softmax = |z: Vec<f64>| {
            let sum: f64 = z.iter().map(|v| v.exp()).sum();
            z.iter().map(|v| v.exp() / sum).collect()
        };
        logits.map(softmax).collect()
    }

    fn value(&self, images: &Stage) -> f64 {
        let square = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / a.len() as f64;
        let stages = |net: &str| {
            let first = self.stage(net, 1, &self.stage(net, 0, images));
            let second = self.stage(net, 2, &first);
            [first, second]
        };
        let (s, t) = (stages("s"), stages("t"));
        let last = |x: &Stage| square(&x.0, &t[1].0) + square(&Self::gap(x), &Self::gap(&t[1]));
        let bridged = [self.bridge("fcfd.into_teacher.1", &s[0]), self.bridge("fcfd.into_teacher.2", &s[1])];
        let through_teacher = self.stage("t", 2, &bridged[0]);
        let through_student = self.stage("s", 2, &self.bridge("fcfd.into_student.1", &t[0]));
        let features = square(&bridged[0].0, &t[0].0) + last(&bridged[1]) + last(&through_teacher);
        let teacher = self.soft("t", &t[1], 4.0);
        let kl = |other: Vec<Vec<f64>>| {
            let rows = teacher.iter().zip(&other).map(|(q, p)| q.iter().zip(p).map(|(q, p)| q * (q / p).ln()).sum::<f64>());
            16.0 * rows.sum::<f64>() / B as f64
        };
        5.0 * features + kl(self.soft("t", &through_teacher, 4.0)) + kl(self.soft("s", &through_student, 4.0))
    }
}

#[test]
fn fcfd_through_networks_is_what_plain_loops_compute() {
    let bench = Bench::plain();
    let mut method = bench.prepare("fcfd", &json!({}), B).unwrap();
    let mut tensors = BTreeMap::new();
    let mut add = |prefix: &str, model: &dyn Model| {
        let params = model.params().unwrap();
        for (i, e) in params.entries().iter().enumerate() {
            tensors.insert(format!("{prefix}.{}", e.name), (e.shape.clone(), values(&params.value(i).unwrap())));
        }
    };
    add("s", bench.student.as_ref());
    add("t", bench.teachers[0].as_ref());
    let networks = method.networks();
    networks.iter().for_each(|n| add(&n.spec().name.clone(), n.as_ref()));
    let images: Stage = (values(&bench.batch.images[0]), [B, 2, 4, 4]);
    let mut plain = Plain { tensors };
    let expected = plain.value(&images);

    let terms = bench.loss(method.as_mut(), 30, Rng::new(5)).unwrap();
    let value = values(&terms.total().unwrap())[0];
    assert!((value - expected).abs() < 1e-9 * expected.abs(), "{value}, expected {expected}");
    let mut models: Vec<&dyn Model> = vec![bench.student.as_ref()];
    models.extend(networks.iter().map(|n| n.as_ref()));
    let gradients = kd_nn::backward(&terms.total().unwrap(), &models).unwrap();
    let named = std::iter::once("s".to_string()).chain(networks.iter().map(|n| n.spec().name.clone()));
    let mut checked = 0;
    for ((prefix, model), gradient) in named.zip(&models).zip(&gradients.networks) {
        let params = model.params().unwrap();
        for (i, e) in params.entries().iter().enumerate() {
            let got = values(&params.grad_of(&gradient.as_ref().unwrap().flat, i).unwrap());
            let key = format!("{prefix}.{}", e.name);
            // Every seventh number is enough; the loops are slow.
            for j in (0..got.len()).step_by(7) {
                const H: f64 = 1e-5;
                let mut at = |h: f64| {
                    plain.tensors.get_mut(&key).unwrap().1[j] += h;
                    let value = plain.value(&images);
                    plain.tensors.get_mut(&key).unwrap().1[j] -= h;
                    value
                };
                let expected = (at(H) - at(-H)) / (2.0 * H);
                assert!((got[j] - expected).abs() < 1e-4 * (1.0 + expected.abs()), "{key}[{j}]: {}, expected {expected}", got[j]);
                checked += usize::from(expected.abs() > 1e-6);
            }
        }
    }
    assert!(checked > 50, "{checked}");
    // The student's running statistics moved in its own pass alone.
    assert_eq!(bench.student.parameters().counters(), [1, 1, 1]);
    assert_eq!(bench.teachers[0].params().unwrap().counters(), [0, 0, 0]);
}
