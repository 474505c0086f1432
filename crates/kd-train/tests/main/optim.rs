//! The update rules against PyTorch, and the two ways to compute them against each other.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use kd_core::{Model, Rng};
use kd_train::optim::{AdamW, OptimConfig, OptimKind, Optimiser, Part, Real, Sgd, Step, Target, clip_scale, grad_norm};
use serde_json::Value;

use crate::fixtures::{self, Fixture, relative, values};
use crate::support::tiny_net;

/// Operations of the same folder that kd-nn checks.
const OF_KD_NN: &[&str] = &[
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "batch_norm",
    "channel_shuffle",
    "conv2d",
    "cross_entropy",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "interpolate",
    "kl_div",
    "l2_normalize",
    "layer_norm",
    "linear",
    "log_softmax",
    "max_pool2d",
    "multi_head_attention",
    "relu",
    "relu6",
    "sigmoid",
    "silu",
    "softmax",
    "tanh",
    "window_attention",
];

fn number(params: &Value, key: &str) -> f64 {
    params[key].as_f64().unwrap_or_else(|| panic!("no parameter {key}"))
}

/// Runs the fixture's steps on slices of `T` and on tensors of `dtype`; calls `check(name, found)`.
fn run<T: Real>(fixture: &Fixture, dtype: DType, check: &mut dyn FnMut(&str, &[f64])) {
    let params = fixture.json("params");
    let lr = number(&params, "lr");
    let load = |name: &str| fixture.get(name).to_dtype(dtype).unwrap().flatten_all().unwrap();
    let slice = |t: &Tensor| t.to_vec1::<T>().unwrap();
    let wide = |v: &[T]| v.iter().map(|x| x.to_f64()).collect::<Vec<_>>();
    let (mut p, mut composed) = (slice(&load("in.p")), load("in.p"));
    let zero = composed.zeros_like().unwrap();
    let mut state = [slice(&zero), slice(&zero)];
    let mut state_composed = [zero.clone(), zero];
    for t in 1..=params["steps"].as_u64().unwrap() {
        let g = load(&format!("in.grad.{t}"));
        let step = Step { lr, scale: 1.0, t };
        let [a, b] = &mut state;
        let names: &[&str] = match fixture.text("op") {
            "sgd" => {
                let rule = Sgd {
                    momentum: number(&params, "momentum"),
                    dampening: number(&params, "dampening"),
                    nesterov: params["nesterov"].as_bool().unwrap(),
                    weight_decay: number(&params, "weight_decay"),
                };
                rule.sweep(&mut p, &slice(&g), a, step);
                (composed, state_composed[0]) = rule.compose(&composed, &g, &state_composed[0], step).unwrap();
                &["buf"]
            }
            _ => {
                let rule = AdamW {
                    beta1: number(&params, "beta1"),
                    beta2: number(&params, "beta2"),
                    eps: number(&params, "eps"),
                    weight_decay: number(&params, "weight_decay"),
                };
                rule.sweep(&mut p, &slice(&g), a, b, step);
                let [m, q] = &state_composed;
                let moved = rule.compose(&composed, &g, m, q, step).unwrap();
                (composed, state_composed) = (moved.0, [moved.1, moved.2]);
                &["exp_avg", "exp_avg_sq"]
            }
        };
        check(&format!("out.p.{t}"), &wide(&p));
        check(&format!("out.p.{t}"), &values(&composed));
        for (i, name) in names.iter().enumerate() {
            check(&format!("out.{name}.{t}"), &wide(&state[i]));
            check(&format!("out.{name}.{t}"), &values(&state_composed[i]));
        }
    }
}

#[test]
fn golden_ops_optimisers() {
    let Some(fixtures) = fixtures::all("ops") else { return };
    let (mut sgd, mut adamw) = (0, 0);
    for fixture in &fixtures {
        match fixture.text("op") {
            "sgd" => sgd += 1,
            "adamw" => adamw += 1,
            op if OF_KD_NN.contains(&op) => continue,
            op => panic!("{}: unknown operation {op}", fixture.name),
        }
        let compare = |tolerance: f64| {
            move |name: &str, found: &[f64]| {
                // PyTorch keeps no buffer without momentum.
                let Some(expected) = fixture.find(name) else { return assert!(name.starts_with("out.buf")) };
                let error = relative(found, &values(expected));
                assert!(error <= tolerance, "{}: {name}: relative error {error:e}", fixture.name);
            }
        };
        run::<f64>(fixture, DType::F64, &mut compare(1e-10));
        run::<f32>(fixture, DType::F32, &mut compare(1e-5));
    }
    println!("{sgd} sgd fixtures checked, {adamw} adamw fixtures checked");
    assert!(sgd > 0 && adamw > 0);
}

fn random(n: usize, stream: &str) -> Tensor {
    let rng = Rng::new(3).named(stream);
    Tensor::from_vec((0..n as u64).map(|i| rng.normal(i)).collect::<Vec<_>>(), n, &Device::Cpu).unwrap()
}

fn configs() -> Vec<OptimConfig> {
    let sgd = OptimConfig { nesterov: true, ..OptimConfig::default() };
    vec![OptimConfig { kind: OptimKind::Adamw, lr: 1e-2, weight_decay: 0.1, ..sgd.clone() }, sgd]
}

#[test]
fn networks_and_variables_move_alike_and_unused_parameters_stay() {
    for config in configs() {
        let network = Arc::new(tiny_net(3, DType::F64));
        let before = network.parameters().values().snapshot().unwrap();
        let var = Var::from_tensor(&before).unwrap();
        let part = |name: &str, target| Part { name: name.to_string(), target, unused: vec!["bn".to_string()] };
        let parts = vec![part("network", Target::Network(network.clone() as Arc<dyn Model>)), part("var", Target::Var(var.clone()))];
        let mut optimiser = Optimiser::new(&config, parts.clone()).unwrap();
        let n = before.elem_count();
        for t in 0..3 {
            let g = random(n, &format!("g{t}"));
            optimiser.step(&[Some(g.clone()), Some(g)], 0.1, 0.5).unwrap();
        }
        let (old, moved, free) = (values(&before), values(&network.parameters().values().tensor()), values(var.as_tensor()));
        for entry in network.parameters().entries() {
            let range = entry.range();
            if entry.name.starts_with("bn") {
                assert_eq!(moved[range.clone()], old[range]);
            } else {
                assert!(relative(&moved[range.clone()], &free[range.clone()]) < 1e-14);
                assert!(relative(&moved[range.clone()], &old[range]) > 1e-3);
            }
        }

        // A second optimiser with the first one's state makes the same step.
        let mut resumed = Optimiser::new(&config, parts).unwrap();
        resumed.load_state(&optimiser.state().unwrap()).unwrap();
        let g = random(n, "next");
        let at = network.parameters().values().snapshot().unwrap();
        optimiser.step(&[Some(g.clone()), None], 0.1, 1.0).unwrap();
        let first = values(&network.parameters().values().tensor());
        network.parameters().values().set(&at).unwrap();
        resumed.step(&[Some(g), None], 0.1, 1.0).unwrap();
        assert_eq!(first, values(&network.parameters().values().tensor()));
        assert!(resumed.load_state(&Default::default()).is_err());
    }
}

#[test]
fn zero_gradients_decay_and_none_leaves_alone() {
    for config in configs() {
        let [var, twin] = [(); 2].map(|()| Var::from_tensor(&random(5, "p")).unwrap());
        let part = |name: &str, v: &Var| Part { name: name.to_string(), target: Target::Var(v.clone()), unused: vec![] };
        let mut optimiser = Optimiser::new(&config, vec![part("var", &var), part("twin", &twin)]).unwrap();
        optimiser.step(&[Some(var.zeros_like().unwrap()), None], 0.1, 1.0).unwrap();
        assert_ne!(values(var.as_tensor()), values(&random(5, "p")));
        assert_eq!(values(twin.as_tensor()), values(&random(5, "p")));
        // A part that was left out begins with its own first step.
        var.set(twin.as_tensor()).unwrap();
        let (g, mut fresh) = (random(5, "g"), Optimiser::new(&config, vec![part("var", &var)]).unwrap());
        optimiser.step(&[None, Some(g.clone())], 0.1, 1.0).unwrap();
        fresh.step(&[Some(g)], 0.1, 1.0).unwrap();
        assert_eq!(values(var.as_tensor()), values(twin.as_tensor()));
    }
}

#[test]
fn clipping_bounds_the_norm_over_everything() {
    for dtype in [DType::F64, DType::F32] {
        let (a, b) = (random(1003, "a").to_dtype(dtype).unwrap(), random(7, "b").to_dtype(dtype).unwrap());
        let expected = values(&a).iter().chain(&values(&b)).map(|v| v * v).sum::<f64>().sqrt();
        let norm = grad_norm(&[Some(a), None, Some(b)]).unwrap();
        assert!((norm / expected - 1.0).abs() < 1e-12, "{norm} instead of {expected}");
    }
    assert_eq!(clip_scale(10.0, 0.0), 1.0);
    assert_eq!(clip_scale(1.0, 2.0), 1.0);
    assert!((clip_scale(10.0, 2.0) - 0.2).abs() < 1e-7);
}

#[test]
fn nonsense_is_refused_by_name() {
    let good = OptimConfig::default();
    good.validate().unwrap();
    let bad = [
        ("lr", OptimConfig { lr: 0.0, ..good.clone() }),
        ("lr", OptimConfig { lr: f64::NAN, ..good.clone() }),
        ("weight_decay", OptimConfig { weight_decay: -1.0, ..good.clone() }),
        ("momentum", OptimConfig { momentum: 1.0, ..good.clone() }),
        ("beta2", OptimConfig { beta2: 1.5, ..good.clone() }),
        ("nesterov", OptimConfig { nesterov: true, momentum: 0.0, ..good.clone() }),
        ("clip_grad_norm", OptimConfig { clip_grad_norm: f64::INFINITY, ..good }),
    ];
    for (key, config) in bad {
        let message = config.validate().unwrap_err().to_string();
        assert!(message.contains(&format!("optim.{key}")), "{message}");
    }
}
