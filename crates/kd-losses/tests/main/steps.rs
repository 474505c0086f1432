//! Methods of logits and of relations between samples, driven as a training loop drives them.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use kd_core::registry::evaluate;
use kd_core::{Batch, Cut, LossTerms, Method, Mode, Model, Models, Outputs, Progress, Result, Rng, Setup, StepView};
use kd_losses::{crd, ctkd, find};
use kd_nn::{Conv, GraphBuilder, Network};
use serde_json::{Value, json};

use crate::main::support::{normal, scalar};

const B: usize = 5;
const K: usize = 4;
const N: usize = 40;
const EPOCH: usize = 3;

/// Two blocks, the last `width` channels wide; `late` layers stand between the last block and the pooling.
fn network(width: usize, seed: u64, late: bool) -> Network {
    let mut b = GraphBuilder::new("small", &[2, 4, 4]);
    for (i, channels) in [3, width].into_iter().enumerate() {
        b.conv(&format!("conv{i}"), Conv::new(channels, 3).pad(1));
        b.relu();
        b.block(i + 1, &format!("conv{i}"));
    }
    if late {
        b.relu();
        b.conv("late", Conv::new(width, 1));
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
    means: Tensor,
    labels: Vec<u32>,
    batch_size: usize,
}

impl Bench {
    fn new() -> Self {
        let labels: Vec<u32> = (0..N as u32).map(|i| i % K as u32).collect();
        let indices = [7u32, 21, 2, 7, 30];
        Self {
            student: network(5, 1, false),
            teachers: vec![Arc::new(network(6, 2, false).frozen())],
            batch: Batch {
                images: vec![normal(3, &[B, 2, 4, 4]), normal(4, &[B, 2, 4, 4])],
                labels: Tensor::new(indices.map(|i| i64::from(labels[i as usize])).as_slice(), &Device::Cpu).unwrap(),
                targets: None,
                indices: Tensor::new(&indices, &Device::Cpu).unwrap(),
            },
            means: normal(5, &[K, 6]),
            labels,
            batch_size: B,
        }
    }

    fn models(&self) -> Models<'_> {
        Models { student: &self.student, teachers: &self.teachers }
    }

    fn prepare(&self, name: &str, params: &Value) -> Result<Box<dyn Method>> {
        let mut method = (find(name)?.build)(params)?;
        method.prepare(&Setup {
            models: self.models(),
            classes: K,
            train_samples: N,
            train_labels: Some(&self.labels),
            batch_size: self.batch_size,
            class_means: method.needs().class_means.then_some(&self.means),
            class_groups: None,
            dtype: DType::F64,
            device: &Device::Cpu,
            rng: Rng::new(9),
        })?;
        Ok(method)
    }

    /// One step with exactly the cuts and views that the method asks for.
    fn loss(&self, method: &mut dyn Method, step: u64) -> Result<LossTerms> {
        let needs = method.needs();
        let rng = Rng::new(step);
        let views = &self.batch.images[..needs.views];
        let student: Vec<Outputs> =
            views.iter().map(|x| self.student.run(x, Cut::Input, &needs.student, Mode::Train(rng))).collect::<Result<_>>()?;
        let teacher = |t: &Arc<dyn Model>| views.iter().map(|x| Ok(t.run(x, Cut::Input, &needs.teacher, Mode::Eval)?.detach())).collect();
        let teachers: Vec<Vec<Outputs>> = self.teachers.iter().map(teacher).collect::<Result<_>>()?;
        let progress = Progress { epoch: EPOCH, epochs: 40, ..Progress::default() };
        method.loss(&StepView { student: &student, teachers: &teachers, models: self.models(), batch: &self.batch, progress, rng })
    }

    /// The same step as a parity call: tensors by fixture name.
    fn inputs(&self, method: &dyn Method) -> BTreeMap<String, Tensor> {
        let cuts = [Cut::Block(2), Cut::Embedding, Cut::Logits];
        let mut t = BTreeMap::new();
        for (side, model) in [("student", &self.student as &dyn Model), ("teacher", self.teachers[0].as_ref())] {
            for (view, x) in ["", "strong."].iter().zip(&self.batch.images) {
                let out = model.run(x, Cut::Input, &cuts, Mode::Eval).unwrap().detach();
                t.insert(format!("{side}.{view}logits"), out.logits().unwrap().clone());
                if view.is_empty() {
                    t.insert(format!("{side}.embedding"), out.embedding().unwrap().clone());
                    t.insert(format!("{side}.stage.last"), out.block(2).unwrap().contiguous().unwrap());
                }
            }
            let classifier = model.classifier().unwrap();
            t.insert(format!("{side}.fc.weight"), classifier.weight);
            t.insert(format!("{side}.fc.bias"), classifier.bias.unwrap());
        }
        t.insert("labels".into(), self.batch.labels.clone());
        t.insert("class_means".into(), self.means.clone());
        for network in method.networks() {
            let prefix = if method.name() == "dist_pp" { "param.adapter" } else { "param" };
            let params = network.params().unwrap();
            t.extend(params.entries().iter().map(|e| (format!("{prefix}.{}", e.name), params.get(&e.name).unwrap().unwrap())));
        }
        t.extend(method.vars().into_iter().map(|(name, var)| (format!("param.{name}"), var.as_detached_tensor())));
        t
    }
}

/// Runs one step both ways and compares value, terms and the gradients of what the method trains.
fn step_equals_parity(name: &str, params: &Value, fixture_only: &Value) {
    let bench = Bench::new();
    let what = format!("{name} {params}");
    let mut method = bench.prepare(name, params).unwrap_or_else(|e| panic!("{what}: {e}"));
    let mut all = params.clone();
    all.as_object_mut().unwrap().extend(fixture_only.as_object().unwrap().clone());
    let expected =
        evaluate(find(name).unwrap(), &bench.inputs(method.as_ref()), &all, DType::F64).unwrap_or_else(|e| panic!("{what}: {e}"));
    let terms = bench.loss(method.as_mut(), 5).unwrap_or_else(|e| panic!("{what}: {e}"));
    let near = |a: f64, b: f64| (a - b).abs() <= 1e-11 * (1.0 + b.abs());
    let total = terms.total().unwrap();
    assert!(near(scalar(&total), scalar(&expected["value"])), "{what}: {total} against {}", expected["value"]);
    for term in &terms.terms {
        let weight = if find(name).unwrap().raw_terms { 1.0 } else { term.weight };
        assert!(near(scalar(&term.raw) * weight, scalar(&expected[&format!("term.{}", term.name)])), "{what}: {}", term.name);
    }
    let networks = method.networks();
    let mut models: Vec<&dyn Model> = vec![&bench.student];
    models.extend(networks.iter().map(|n| n.as_ref()));
    let gradients = kd_nn::backward(&total, &models).unwrap();
    assert!(gradients.networks[0].as_ref().unwrap().reached.iter().any(|&r| r), "{what}: the student is not reached");
    let off = |a: &Tensor, b: &Tensor| scalar(&(a - b).unwrap().abs().unwrap().sum_all().unwrap());
    for (network, gradient) in networks.iter().zip(&gradients.networks[1..]) {
        let (params, gradient) = (network.params().unwrap(), gradient.as_ref().unwrap());
        assert!(gradient.reached.iter().all(|&r| r), "{what}: a parameter of {} has no gradient", network.spec().name);
        for (i, e) in params.entries().iter().enumerate() {
            let found = params.grad_of(&gradient.flat, i).unwrap();
            let suffix = format!("param.{}", e.name);
            let wanted = expected.get(&format!("grad.{suffix}")).or(expected.get(&format!("grad.param.adapter.{}", e.name)));
            assert!(off(&found, wanted.unwrap()) <= 1e-10, "{what}: gradient of {}", e.name);
        }
    }
    for (name, var) in method.vars() {
        let found = gradients.store.get(&var).unwrap_or_else(|| panic!("{what}: no gradient of {name}"));
        assert!(off(found, &expected[&format!("grad.param.{name}")]) <= 1e-10, "{what}: gradient of {name}");
    }
}

#[test]
fn a_step_computes_the_parity_function() {
    let none = json!({});
    for (name, params) in [
        ("dist", json!({"temperature": 4.0})),
        ("pkt", json!({})),
        ("rkd", json!({})),
        ("rkd", json!({"squared": true})),
        ("cc", json!({"dim": 3})),
        ("cc", json!({"dim": 3, "variant": "gaussian_rbf", "normalize": true, "taylor_order": 3})),
        ("wsld", json!({})),
        ("mlld", json!({})),
        ("mlld", json!({"variant": "paper"})),
        ("logit_standardization", json!({})),
        ("logit_standardization", json!({"ddof": 0, "base": {"method": "dkd", "beta": 2.0, "temperature": 3.0}})),
        ("logit_standardization", json!({"base": "wsld"})),
        ("logit_standardization", json!({"base": "mlld"})),
        ("sdd", json!({"scales": [1, 2]})),
        ("sdd", json!({"base": "dkd", "nested_pool": false, "scales": [1, 3]})),
        ("sdd", json!({"base": "nkd", "nkd_keep_target": true})),
    ] {
        step_equals_parity(name, &params, &none);
    }
    let lambda = ctkd::Params::default().lambda(EPOCH);
    assert!((lambda - (1.0 - (0.4 * std::f64::consts::PI).cos()) / 2.0).abs() < 1e-15);
    for base in ["kd", "dkd", "nkd"] {
        step_equals_parity("ctkd", &json!({"base": base}), &json!({"lambda": lambda}));
    }
    step_equals_parity("dist_pp", &json!({"dropout": 0.0}), &json!({"epoch": EPOCH}));
}

#[test]
fn dist_pp_is_its_parts() {
    let bench = Bench::new();
    let mut method = bench.prepare("dist_pp", &json!({"dropout": 0.0, "dist_weight": 1.5, "nd_weight": 4.0})).unwrap();
    let terms = bench.loss(method.as_mut(), 5).unwrap();
    let of = |name: &str, params: Value| scalar(&bench.loss(bench.prepare(name, &params).unwrap().as_mut(), 5).unwrap().total().unwrap());
    let dist = of("dist", json!({"temperature": 4.0}));
    let nd = terms.terms.iter().find(|t| t.name == "nd").unwrap();
    assert_eq!(nd.weight, 4.0);
    let expected = of("ce", json!({})) + EPOCH as f64 / 20.0 * 1.5 * dist + 4.0 * scalar(&nd.raw);
    assert!((scalar(&terms.total().unwrap()) - expected).abs() < 1e-12);
}

#[test]
fn the_learnt_temperatures_gradient_is_the_reversed_slope_of_the_value() {
    let (z, v) = (normal(1, &[B, K]), (normal(2, &[B, K]) * 3.0).unwrap());
    let labels = Tensor::new(&[0i64, 1, 2, 3, 1], &Device::Cpu).unwrap();
    for base in ["kd", "dkd", "nkd"] {
        for granularity in ["global", "instance"] {
            let params: ctkd::Params =
                serde_json::from_value(json!({"base": base, "granularity": granularity, "alpha": 0.5, "beta": 2.0})).unwrap();
            let n = if granularity == "global" { 1 } else { B };
            let theta: Vec<f64> = (0..n).map(|i| -1.5 + 0.3 * i as f64).collect();
            let value = |theta: &[f64]| {
                let theta = Tensor::new(theta, &Device::Cpu).unwrap();
                scalar(&kd_losses::ctkd(&z, &v, Some(&labels), &theta, 1.0, &params).unwrap().total().unwrap())
            };
            let var = Var::new(theta.as_slice(), &Device::Cpu).unwrap();
            let total = kd_losses::ctkd(&z, &v, Some(&labels), &var, 0.7, &params).unwrap().total().unwrap();
            let gradient = total.backward().unwrap().get(&var).unwrap().to_vec1::<f64>().unwrap();
            for i in 0..n {
                let at = |h: f64| {
                    let mut moved = theta.clone();
                    moved[i] += h;
                    value(&moved)
                };
                let slope = -0.7 * (at(1e-5) - at(-1e-5)) / 2e-5;
                assert!((gradient[i] - slope).abs() < 1e-7 * (1.0 + slope.abs()), "{base} {granularity}: {} against {slope}", gradient[i]);
            }
        }
    }
}

#[test]
fn an_instance_temperature_trains_its_network() {
    let bench = Bench::new();
    let mut method = bench.prepare("ctkd", &json!({"granularity": "instance"})).unwrap();
    let total = bench.loss(method.as_mut(), 5).unwrap().total().unwrap();
    let network = &method.networks()[0];
    let gradients = kd_nn::backward(&total, &[network.as_ref()]).unwrap();
    assert!(gradients.networks[0].as_ref().unwrap().reached.iter().all(|&r| r));
    assert!(scalar(&gradients.networks[0].as_ref().unwrap().flat.abs().unwrap().sum_all().unwrap()) > 0.0);
}

#[test]
fn crd_remembers_and_resumes_to_the_bit() {
    let bench = Bench::new();
    let params = json!({"negatives": 12, "dim": 6});
    let build = || bench.prepare("crd", &params).unwrap();
    let bits = |t: LossTerms| t.terms.iter().map(|t| scalar(&t.raw).to_bits()).collect::<Vec<_>>();
    let (mut straight, mut first) = (build(), build());
    let initial = straight.state().unwrap();
    assert!(scalar(&initial["z_student"]) < 0.0);
    for step in 0..3 {
        assert_eq!(bits(bench.loss(straight.as_mut(), step).unwrap()), bits(bench.loss(first.as_mut(), step).unwrap()));
    }
    let saved = first.state().unwrap();
    assert!(scalar(&saved["z_student"]) > 0.0 && scalar(&saved["z_teacher"]) > 0.0);
    let mut resumed = build();
    resumed.load_state(&saved).unwrap();
    for step in 3..6 {
        assert_eq!(bits(bench.loss(straight.as_mut(), step).unwrap()), bits(bench.loss(resumed.as_mut(), step).unwrap()), "step {step}");
    }
    // What was saved has not moved with the memory, and only the batch's rows have moved at all.
    let rows = |state: &BTreeMap<String, Tensor>| state["bank_student"].to_vec2::<f64>().unwrap();
    let (before, after, later) = (rows(&initial), rows(&saved), rows(&resumed.state().unwrap()));
    for i in 0..N {
        let seen = [7, 21, 2, 30].contains(&i);
        assert_eq!(before[i] != after[i], seen, "row {i}");
        let length = after[i].iter().map(|x| x * x).sum::<f64>().sqrt();
        assert_eq!((length - 1.0).abs() < 1e-12, seen, "row {i}");
        assert!(before[i].iter().all(|x| x.abs() <= (3f64 / 6.0).sqrt() || seen));
    }
    assert_ne!(after[7], later[7]);
    assert!(build().load_state(&BTreeMap::new()).unwrap_err().to_string().contains("bank_student"));
}

#[test]
fn crd_streams_what_a_gathered_computation_gives() {
    let (n, dim, k, b) = (30, 5, 50, 3);
    let params = crd::Params { negatives: k, dim, temperature: 0.5, ..Default::default() };
    let mut memory = crd::Memory::new(n, dim, DType::F64, Rng::new(1)).unwrap();
    let lists: Vec<Vec<u32>> = (0..b).map(|r| (0..=k).map(|j| ((r * 7 + j * 11) % n) as u32).collect()).collect();
    let index: Vec<u32> = lists.iter().map(|l| l[0]).collect();
    let (u, w) = (Var::from_tensor(&normal(1, &[b, dim])).unwrap(), normal(2, &[b, dim]));
    let bank = crd::Memory::new(n, dim, DType::F64, Rng::new(1)).unwrap();
    let bank = bank.banks()[1].clone();
    let contrast = |r: usize, list: &mut Vec<u32>| list.extend(&lists[r]);
    let terms = kd_losses::crd(&u, &w, &index, &contrast, &mut memory, &params).unwrap();
    let found = terms.terms[0].raw.backward().unwrap().get(&u).unwrap().clone();

    let flat = Tensor::new(lists.concat().as_slice(), &Device::Cpu).unwrap();
    let rows = bank.index_select(&flat, 0).unwrap().reshape((b, k + 1, dim)).unwrap();
    let unit = u.broadcast_div(&u.sqr().unwrap().sum_keepdim(1).unwrap().sqrt().unwrap()).unwrap();
    let o = (rows.matmul(&unit.unsqueeze(2).unwrap()).unwrap().squeeze(2).unwrap() / 0.5).unwrap().exp().unwrap();
    let z = scalar(&o.detach().mean_all().unwrap()) * n as f64;
    let (x, c) = ((o / z).unwrap(), k as f64 / n as f64);
    let all = (&x + (c + params.eps)).unwrap();
    let positive = (x.narrow(1, 0, 1).unwrap() / all.narrow(1, 0, 1).unwrap()).unwrap().log().unwrap().sum_all().unwrap();
    let negative = (all.narrow(1, 1, k).unwrap().recip().unwrap() * c).unwrap().log().unwrap().sum_all().unwrap();
    let loss = ((positive + negative).unwrap() / -(b as f64)).unwrap();
    assert!((scalar(&loss) - scalar(&terms.terms[0].raw)).abs() < 1e-11);
    let expected = loss.backward().unwrap().get(&u).unwrap().clone();
    let off = scalar(&(found - &expected).unwrap().abs().unwrap().sum_all().unwrap());
    assert!(off < 1e-11 && scalar(&expected.abs().unwrap().sum_all().unwrap()) > 1e-3, "{off}");
}

#[test]
fn crd_takes_images_without_labels_after_those_with_one() {
    let mut bench = Bench::new();
    bench.labels.truncate(25); // samples 25 to 39 have none
    let mut method = bench.prepare("crd", &json!({"negatives": 24})).unwrap();
    let terms = bench.loss(method.as_mut(), 1).unwrap(); // sample 30 is one of them
    assert!(scalar(&terms.total().unwrap()).is_finite());
    let rows = method.state().unwrap()["bank_teacher"].to_vec2::<f64>().unwrap();
    assert!((rows[30].iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-12);
}

#[test]
fn what_cannot_work_is_refused_with_the_reason() {
    let mut bench = Bench::new();
    let refused = |bench: &Bench, name: &str, params: Value, words: &[&str]| {
        let message = bench.prepare(name, &params).map(|_| ()).unwrap_err().to_string();
        words.iter().for_each(|word| assert!(message.contains(word), "{name} {params}: {message:?} does not say {word:?}"));
    };
    for base in ["nd", "sdd", "fnkd", "logit_standardization", "crd", "ce"] {
        refused(&bench, "logit_standardization", json!({"base": base}), &["base", base, "logits of both sides"]);
    }
    refused(&bench, "logit_standardization", json!({"base": "wsdl"}), &["base", "did you mean `wsld`?"]);
    refused(&bench, "logit_standardization", json!({"base": {"method": "dkd", "alpa": 1}}), &["base", "`alpa`", "dkd", "`alpha`"]);
    refused(&bench, "logit_standardization", json!({"base": {"method": "dkd", "alpha": -1}}), &["alpha", "at least 0"]);
    refused(&bench, "logit_standardization", json!({"base": {"alpha": 1}}), &["base", "`method`"]);
    refused(&bench, "logit_standardization", json!({"ddof": 2}), &["ddof", "0 or 1"]);
    refused(&bench, "mlld", json!({"temperatures": []}), &["temperatures", "at least one"]);
    refused(&bench, "mlld", json!({"strong_count": 6}), &["strong_count", "at most 5"]);
    refused(&bench, "sdd", json!({"scales": [2, 4]}), &["scales", "ascending from 1"]);
    refused(&bench, "sdd", json!({"scales": [1, 8]}), &["scales", "at most 4"]);
    refused(&bench, "sdd", json!({"base": "wsld"}), &["wsld", "nkd"]);
    refused(&bench, "ctkd", json!({"tau_init": 0.0}), &["tau_init", "above 0"]);
    refused(&bench, "crd", json!({"negatives": 0}), &["negatives", "at least 1"]);
    refused(&bench, "crd", json!({"momentum": 1.5}), &["momentum", "0..=1"]);

    bench.labels = vec![1; N];
    refused(&bench, "crd", json!({}), &["one class", "negative"]);
    bench.batch_size = 1;
    for name in ["rkd", "pkt", "cc"] {
        refused(&bench, name, json!({}), &[name, "batch_size", "at least 2"]);
    }
    bench = Bench::new();
    bench.student = network(5, 1, true);
    refused(&bench, "sdd", json!({}), &["student", "block.2", "mean"]);
    bench = Bench::new();
    bench.teachers.clear();
    refused(&bench, "crd", json!({}), &["teacher"]);

    bench = Bench::new();
    let mut crd = bench.prepare("crd", &json!({"negatives": 3})).unwrap();
    bench.batch.indices = Tensor::new(&[1u32, 2, 3, 4, N as u32], &Device::Cpu).unwrap();
    let message = bench.loss(crd.as_mut(), 1).unwrap_err().to_string();
    assert!(message.contains("sample index = 40") && message.contains("less than 40"), "{message}");
    for (method, word) in [("crd", "memory"), ("cc", "heads"), ("ctkd", "temperature"), ("sdd", "maps")] {
        let mut method = (find(method).unwrap().build)(&json!({})).unwrap();
        assert!(Bench::new().loss(method.as_mut(), 1).unwrap_err().to_string().contains(word), "{word}");
    }
}

#[test]
fn a_batch_of_one_sample_compares_nothing() {
    let (e, t) = (Var::from_tensor(&normal(1, &[1, 3])).unwrap(), normal(2, &[1, 4]));
    let nothing = |terms: LossTerms| {
        let total = terms.total().unwrap();
        assert_eq!(scalar(&total), 0.0);
        total.backward().unwrap().get(&e).is_none_or(|g| scalar(&g.abs().unwrap().sum_all().unwrap()) == 0.0)
    };
    assert!(nothing(kd_losses::rkd(&e, &t, &Default::default()).unwrap()));
    assert!(nothing(kd_losses::pkt(&e, &t, &Default::default()).unwrap()));
    assert!(nothing(kd_losses::cc(&e, &normal(2, &[1, 3]), &Default::default()).unwrap()));
}

#[test]
fn equal_samples_have_finite_gradients() {
    for dtype in [DType::F32, DType::F64] {
        let row = normal(1, &[1, 3]).to_dtype(dtype).unwrap();
        let e = Var::from_tensor(&Tensor::cat(&[&row, &row, &(&row * 2.0).unwrap(), &row.zeros_like().unwrap()], 0).unwrap()).unwrap();
        let t = normal(2, &[4, 5]).to_dtype(dtype).unwrap();
        for terms in [kd_losses::rkd(&e, &t, &Default::default()), kd_losses::pkt(&e, &t, &Default::default())] {
            let total = terms.unwrap().total().unwrap();
            let gradient = total.backward().unwrap().get(&e).unwrap().to_dtype(DType::F64).unwrap();
            assert!(scalar(&gradient.abs().unwrap().sum_all().unwrap()).is_finite());
        }
    }
}
