//! Every model fixture: outputs, features, loss, gradients and running statistics against PyTorch's f64.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor, Var};
use kd_core::{Cut, Mode, Model, Outputs, Rng};
use kd_models::{Config, build, find, recipe};
use kd_nn::ops::{CrossEntropy, Targets, cross_entropy};
use kd_nn::{Executor, Network, Op, Precision, backward};

use crate::support::{Fixture, fixtures, values};

/// Networks of later issues.
const NOT_YET_BUILT: [&str; 3] = ["imagenet_deit_", "imagenet_vit_", "imagenet_swin_"];

#[test]
fn golden_models_eval_f64() {
    walk("eval", DType::F64, Precision::Strict, eval);
}

#[test]
fn golden_models_eval_f32() {
    walk("eval", DType::F32, Precision::Strict, eval);
    walk("eval", DType::F32, Precision::Fast, eval);
}

#[test]
fn golden_models_train_f64() {
    walk("train", DType::F64, Precision::Strict, train);
}

#[test]
fn golden_models_train_f32() {
    walk("train", DType::F32, Precision::Strict, train);
    walk("train", DType::F32, Precision::Fast, train);
}

/// The worst relative deviation of each kind of tensor.
type Worst = BTreeMap<&'static str, (f64, String)>;

/// Runs `check` on every fixture of `mode`: f64 on the reference executor, f32 on the default one.
fn walk(mode: &str, dtype: DType, precision: Precision, check: fn(&Fixture, &Network, &mut Worst)) {
    let Some(paths) = fixtures("models") else { return };
    let (mut checked, mut waiting, mut worst) = (0, 0, Worst::new());
    for path in &paths {
        let f = Fixture::read(path);
        let model = f.text("model");
        match f.text("mode") {
            "eval" | "train" => {}
            other => panic!("{}: mode `{other}`", f.file),
        }
        if f.text("mode") != mode {
            continue;
        }
        if NOT_YET_BUILT.iter().any(|start| model.starts_with(start)) {
            waiting += 1;
            continue;
        }
        let network = network(&f, dtype).with_precision(precision);
        check(&f, &network, &mut worst);
        checked += 1;
    }
    println!("{mode} {} {precision:?}: {checked} fixtures checked, {waiting} of networks not yet built", dtype.as_str());
    for (kind, (deviation, at)) in worst {
        println!("  {kind:<9} {deviation:.1e}  {at}");
    }
    assert!(checked > 0, "no fixture of a network that is built");
}

/// The fixture's network with its recipe weights, its counts checked.
fn network(f: &Fixture, dtype: DType) -> Network {
    let input: [usize; 4] = f.json("input");
    let mut config = Config::new(f.json("num_classes"), [input[1], input[2], input[3]]);
    config.dropout = Some(0.0);
    let graph = build(f.text("model"), &config).unwrap();
    assert_eq!(graph.param_count(), f.json::<usize>("params_count"), "{}: parameters", f.file);
    assert_eq!(graph.macs(&config.input).unwrap(), f.json::<u64>("macs"), "{}: multiply-accumulates", f.file);
    assert_eq!(find(f.text("model")).unwrap().family.keys, f.text("key_style"), "{}: key style", f.file);
    let network = Network::new(graph, dtype, &Device::Cpu).unwrap();
    recipe::load(network.parameters()).unwrap();
    if dtype == DType::F64 { network.with_executor(Executor::Reference) } else { network }
}

fn images(f: &Fixture, tag: &str, dtype: DType) -> Tensor {
    let shape: [usize; 4] = f.json("input");
    let key = format!("{}{tag}", f.text("images_key"));
    Tensor::from_vec(recipe::images(&key, &shape), &shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

fn labels(f: &Fixture) -> Tensor {
    let shape: [usize; 4] = f.json("input");
    let labels = recipe::labels(f.text("labels_key"), shape[0], f.json("num_classes"));
    assert_eq!(f.tensors["labels"].to_vec1::<i64>().unwrap(), labels, "{}: labels", f.file);
    Tensor::new(labels, &Device::Cpu).unwrap()
}

fn l2(v: &[f64]) -> f64 {
    v.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Compares with `name` of the fixture, stored whole or sampled: relative L2, the truth's norm enlarged by `floor`.
fn compare(f: &Fixture, name: &str, found: &Tensor, tolerance: f64, floor: f64) -> f64 {
    let found = values(found);
    let (truth, found_part) = match f.find(name) {
        Some(truth) => (truth, found.clone()),
        None => {
            let truth = f.find(&format!("{name}#sample")).unwrap_or_else(|| panic!("{}: no `{name}`", f.file));
            let at = |i: usize| found[i * found.len() / truth.len()];
            let part = (0..truth.len()).map(at).collect();
            let stats = f.find(&format!("{name}#stats")).unwrap_or_else(|| panic!("{}: no `{name}#stats`", f.file));
            let n = found.len() as f64;
            let mean = found.iter().sum::<f64>() / n;
            let std = (found.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n).sqrt();
            let scale = tolerance.max(1e-5) * (stats[2] + floor) / n.sqrt();
            assert!((mean - stats[0]).abs() <= scale, "{}: `{name}` has mean {mean}, expected {}", f.file, stats[0]);
            assert!((std - stats[1]).abs() <= scale, "{}: `{name}` has deviation {std}, expected {}", f.file, stats[1]);
            let norm = l2(&found);
            assert!(
                (norm - stats[2]).abs() <= tolerance * (stats[2] + floor),
                "{}: `{name}` has norm {norm}, expected {}",
                f.file,
                stats[2]
            );
            (truth, part)
        }
    };
    assert_eq!(truth.len(), found_part.len(), "{}: size of `{name}`", f.file);
    let gap: Vec<f64> = truth.iter().zip(&found_part).map(|(a, b)| a - b).collect();
    let deviation = l2(&gap) / (l2(&truth) + floor).max(f64::MIN_POSITIVE);
    let worst = (0..gap.len()).max_by(|&a, &b| gap[a].abs().total_cmp(&gap[b].abs())).unwrap_or(0);
    assert!(
        deviation <= tolerance,
        "{}: `{name}` deviates by {deviation:e}, allowed {tolerance:e}; worst at {worst}: expected {}, got {}",
        f.file,
        truth[worst],
        found_part[worst]
    );
    deviation
}

fn note(worst: &mut Worst, kind: &'static str, f: &Fixture, name: &str, deviation: f64) {
    let entry = worst.entry(kind).or_insert((0.0, String::new()));
    if deviation >= entry.0 {
        *entry = (deviation, format!("{} {name}", f.file));
    }
}

/// All cuts of a network that a fixture may hold.
fn cuts(network: &Network) -> Vec<Cut> {
    let found = network.graph().cuts().iter().map(|&(cut, _)| cut);
    found.filter(|cut| !matches!(cut, Cut::Block(_))).collect()
}

/// Compares outputs and, where the fixture has them, features. Shapes are always compared.
fn outputs(f: &Fixture, out: &Outputs, tolerance: f64, worst: &mut Worst) {
    let shapes: BTreeMap<String, Vec<usize>> = f.json("shapes");
    let features = out.iter().filter(|(cut, _)| matches!(cut, Cut::Stage(_) | Cut::Preact(_)));
    let found: BTreeMap<String, Vec<usize>> = features.map(|(cut, t)| (cut.to_string(), t.dims().to_vec())).collect();
    assert_eq!(found, shapes, "{}: features", f.file);
    for (cut, tensor) in out.iter() {
        let name = cut.to_string();
        let kind = match cut {
            Cut::Stage(_) => "stage",
            Cut::Preact(_) => "preact",
            Cut::Embedding => "embedding",
            _ => "logits",
        };
        if matches!(cut, Cut::Stage(_) | Cut::Preact(_)) && !f.tensors.keys().any(|k| k.split('#').next() == Some(&name)) {
            continue;
        }
        let deviation = compare(f, &name, tensor, tolerance, 0.0);
        note(worst, kind, f, &name, deviation);
    }
}

fn eval(f: &Fixture, network: &Network, worst: &mut Worst) {
    let x = images(f, "", network.parameters().dtype());
    compare(f, "images", &x, 1e-7, 0.0);
    labels(f);
    let out = network.run(&x, Cut::Input, &cuts(network), Mode::Eval).unwrap();
    let tolerance = if x.dtype() == DType::F64 { 1e-6 } else { 1e-5 };
    outputs(f, &out, tolerance, worst);
}

/// What one training step computes: outputs, loss, and the gradient of every parameter and of the images.
struct Step {
    images: Tensor,
    out: Outputs,
    loss: Tensor,
    gradients: Vec<(String, Tensor)>,
}

fn step(f: &Fixture, network: &Network, tag: &str) -> Step {
    let x = Var::from_tensor(&images(f, tag, network.parameters().dtype())).unwrap();
    let out = network.run(x.as_tensor(), Cut::Input, &cuts(network), Mode::Train(Rng::new(0))).unwrap();
    let loss = cross_entropy(out.logits().unwrap(), &Targets::Labels(&labels(f)), &CrossEntropy::default()).unwrap();
    let found = backward(&loss, &[network]).unwrap();
    let flat = &found.networks[0].as_ref().unwrap().flat;
    let params = network.parameters();
    let own = params.entries().iter().enumerate().map(|(i, e)| (e.name.clone(), params.grad_of(flat, i).unwrap()));
    let of_images = ("images".to_string(), found.store.get(x.as_tensor()).unwrap().clone());
    Step { images: x.as_tensor().clone(), out, loss, gradients: own.chain([of_images]).collect() }
}

fn train(f: &Fixture, network: &Network, worst: &mut Worst) {
    let exact = network.parameters().dtype() == DType::F64;
    let Step { images, out, loss, gradients } = step(f, network, "");
    compare(f, "images", &images, 1e-7, 0.0);

    let f32_relerr: BTreeMap<String, f64> = f.json("f32_relerr");
    let tolerance = |kind: &str| if exact { 1e-6 } else { f32_relerr.get(kind).map_or(1e-5, |e| 1e-5f64.max(10.0 * e)) };
    let shapes: BTreeMap<String, Vec<usize>> = f.json("shapes");
    for (cut, tensor) in out.iter() {
        let name = cut.to_string();
        match cut {
            Cut::Stage(_) | Cut::Preact(_) => assert_eq!(shapes.get(&name).map(Vec::as_slice), Some(tensor.dims()), "{}: {name}", f.file),
            Cut::Embedding => note(worst, "embedding", f, &name, compare(f, &name, tensor, tolerance("embedding"), 0.0)),
            _ => note(worst, "logits", f, &name, compare(f, &name, tensor, tolerance("logits"), 0.0)),
        }
    }
    note(worst, "loss", f, "loss", compare(f, "loss", &loss, tolerance("loss"), 0.0));

    let params = network.parameters();
    let mut seen = BTreeSet::new();
    for (i, entry) in params.stat_entries().iter().enumerate() {
        let name = format!("running.{}", entry.name);
        note(worst, "running", f, &name, compare(f, &name, &params.stat(i).unwrap(), tolerance("running"), 0.0));
        seen.insert(name);
    }
    assert!(params.counters().iter().all(|&n| n == 1), "{}: a batch norm did not count one batch", f.file);

    let total: f64 = f.json("grad_total_norm");
    let null: BTreeSet<String> = f.json("null_grads");
    let mut deviations = vec![];
    for (key, grad) in &gradients {
        let name = format!("grad.{key}");
        if null.contains(key) {
            let norm = l2(&values(grad));
            assert!(norm <= 1e-5 * total, "{}: `{name}` should be zero but has norm {norm:e}", f.file);
        } else if exact {
            deviations.push(compare(f, &name, grad, 1e-6, 1e-7 * total));
        } else {
            deviations.push(compare(f, &name, grad, f64::INFINITY, 1e-7 * total));
        }
        seen.insert(name);
    }
    let stored = f.tensors.keys().map(|k| k.split('#').next().unwrap_or(k));
    let stored: BTreeSet<String> = stored.filter(|k| k.starts_with("grad.") || k.starts_with("running.")).map(str::to_string).collect();
    assert_eq!(seen, stored, "{}: keys", f.file);

    let median = 1e-4f64.max(20.0 * f32_relerr["grad_median"]);
    let fits = |d: &mut Vec<f64>| {
        d.sort_by(f64::total_cmp);
        d[d.len() - 1] <= 5e-2 && d[d.len() / 2] <= median
    };
    if !exact && !fits(&mut deviations) {
        deviations = without_kinks(f, network, &null, total, fits);
    }
    deviations.sort_by(f64::total_cmp);
    note(worst, "gradient", f, "worst gradient", deviations[deviations.len() - 1]);
    note(worst, "median", f, "gradients", deviations[deviations.len() / 2]);
}

/// A ReLU input within rounding error of 0 falls on either side of it, which moves gradients by percents. The fixture's images were chosen
/// so that PyTorch's own f32 met no such kink; another order of summation may. Then f32 must agree with f64, which agrees with the fixture,
/// where kinks are rare: with every batch norm lifted by 2, on one of a few batches.
fn without_kinks(f: &Fixture, network: &Network, null: &BTreeSet<String>, total: f64, fits: impl Fn(&mut Vec<f64>) -> bool) -> Vec<f64> {
    let exact = crate::golden::network(f, DType::F64);
    lift(&exact);
    lift(network);
    for tag in ["+1", "+2", "+3", "+4", "+5", "+6"] {
        let (truth, found) = (step(f, &exact, tag), step(f, network, tag));
        let pairs = truth.gradients.iter().zip(&found.gradients).filter(|(t, _)| !null.contains(&t.0));
        let mut deviations: Vec<f64> = pairs
            .map(|((_, t), (_, g))| {
                let (t, g) = (values(t), values(g));
                let gap: Vec<f64> = t.iter().zip(&g).map(|(a, b)| a - b).collect();
                l2(&gap) / (l2(&t) + 1e-7 * total)
            })
            .collect();
        if fits(&mut deviations) {
            println!("  {}: met a ReLU kink; lifted, its gradients agree on images {tag}", f.file);
            return deviations;
        }
    }
    panic!("{}: f32 gradients agree with f64 on no batch", f.file);
}

fn lift(network: &Network) {
    let params = network.parameters();
    let biases: BTreeSet<usize> = network
        .graph()
        .nodes()
        .iter()
        .filter_map(|n| if let Op::BatchNorm(bn) = &n.op { bn.affine.map(|(_, bias)| bias) } else { None })
        .collect();
    let lifted: BTreeMap<&str, Tensor> =
        biases.iter().map(|&i| (params.entries()[i].name.as_str(), (params.value(i).unwrap() + 2.0).unwrap())).collect();
    params.assign(|name| lifted.get(name).cloned()).unwrap();
}
