//! The update rules against PyTorch, and the two ways to compute them against each other.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use kd_core::{Model, Rng};
use kd_train::dot::{Dot, Kind};
use kd_train::optim::{AdamW, OptimConfig, OptimKind, Optimiser, Part, Real, Sgd, SplitGradient, Step, Target, clip_scale, grad_norm};
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

/// DOT's trajectories through the optimiser itself, each parameter a variable of its own.
#[test]
fn golden_dot_trajectories() {
    let Some(fixtures) = fixtures::all("losses") else { return };
    let mut checked = 0;
    for fixture in fixtures.iter().filter(|f| f.name.starts_with("dot.")) {
        let params = fixture.json("params");
        let dot = Dot {
            momentum: number(&params, "momentum"),
            delta: number(&params, "delta"),
            dampening: number(&params, "dampening"),
            weight_decay: number(&params, "weight_decay"),
        };
        let lr = number(&params, "lr");
        let names: Vec<&str> = fixture.names().filter_map(|n| n.strip_prefix("param.")).collect();
        let steps = (0..).take_while(|t| names.iter().any(|n| fixture.find(&format!("state.param.{t}.{n}")).is_some())).count();
        assert!(steps >= 3 && !names.is_empty());
        for (dtype, tolerance) in [(DType::F64, 1e-10), (DType::F32, 1e-6)] {
            let check = |name: &str, found: &[f64]| {
                let error = relative(found, &fixture.values(name));
                assert!(error <= tolerance, "{} {dtype:?}: {name}: relative error {error:e}", fixture.name);
            };
            for name in &names {
                let load = |name: &str| fixture.find(name).map(|t| t.to_dtype(dtype).unwrap().flatten_all().unwrap());
                let p = load(&format!("param.{name}")).unwrap();
                // Through the optimiser, where its rule has no dampening.
                let var = Var::from_tensor(&p).unwrap();
                let config = OptimConfig {
                    kind: OptimKind::Dot,
                    lr,
                    momentum: dot.momentum,
                    delta: dot.delta,
                    weight_decay: dot.weight_decay,
                    ..OptimConfig::default()
                };
                let part = Part { name: "p".to_string(), target: Target::Var(var.clone()), unused: vec![] };
                let mut optimiser = Optimiser::new(&config, vec![part]).unwrap();
                // And the two ways to compute the rule.
                let zero = p.zeros_like().unwrap();
                let (mut composed, mut buffers) = (p.clone(), [zero.clone(), zero.clone()]);
                let (mut swept, mut v) = (values(&p), [values(&zero), values(&zero)]);
                let mut taken = [0; 2];
                for t in 0..steps {
                    let g = [load(&format!("grad_task.{t}.{name}")), load(&format!("grad_kd.{t}.{name}"))];
                    let kind =
                        Kind { task: g[0].is_some(), distill: g[1].is_some(), first_task: taken[0] == 0, first_distill: taken[1] == 0 };
                    taken = [taken[0] + usize::from(kind.task), taken[1] + usize::from(kind.distill)];
                    let [task, kd] = [&g[0], &g[1]].map(|g| g.clone().unwrap_or_else(|| zero.clone()));
                    let step = Step { lr, scale: 1.0, t: t as u64 + 1 };
                    (composed, buffers) = dot.compose(&composed, [&task, &kd], [&buffers[0], &buffers[1]], kind, step).unwrap();
                    let [a, b] = &mut v;
                    dot.sweep(&mut swept, [&values(&task), &values(&kd)], [a, b], kind, step);
                    let key = format!("state.param.{t}.{name}");
                    check(&key, &values(&composed));
                    check(&key, &swept);
                    if dot.dampening == 0.0 {
                        let split = g.map(|g| g.map(|flat| SplitGradient { flat, reached: vec![true] }));
                        optimiser.step_split(&[split], lr, 1.0).unwrap();
                        check(&key, &values(var.as_tensor()));
                    }
                }
                for (i, which) in ["task", "kd"].iter().enumerate() {
                    let key = format!("state.momentum_{which}.{name}");
                    assert_eq!(fixture.find(&key).is_some(), taken[i] > 0, "{}: {key}", fixture.name);
                    if taken[i] > 0 {
                        check(&key, &values(&buffers[i]));
                        check(&key, &v[i]);
                    }
                }
            }
        }
        checked += 1;
    }
    println!("{checked} dot fixtures checked");
    assert!(checked > 0);
}

/// A network whose batch norm learns from the task alone and whose classifier from distillation alone, against variables of their own.
#[test]
fn dot_tells_the_tensors_of_a_network_apart_and_resumes() {
    let config = OptimConfig { kind: OptimKind::Dot, ..OptimConfig::default() };
    let network = Arc::new(tiny_net(3, DType::F64));
    let entries = network.parameters().entries().to_vec();
    let n = network.parameters().values().len();
    let reaches = |which: usize, name: &str| if name.starts_with("bn") { which == 0 } else { which == 1 || !name.starts_with("fc") };
    let vars: Vec<Var> = (0..entries.len()).map(|i| Var::from_tensor(&network.parameters().value(i).unwrap()).unwrap()).collect();
    let part = |name: String, target| Part { name, target, unused: vec![] };
    let whole = || vec![part("network".to_string(), Target::Network(network.clone() as Arc<dyn Model>))];
    let mut optimiser = Optimiser::new(&config, whole()).unwrap();
    let single = vars.iter().enumerate().map(|(i, v)| part(format!("var.{i}"), Target::Var(v.clone()))).collect();
    let mut apart = Optimiser::new(&config, single).unwrap();
    assert!(optimiser.splits() && optimiser.step(&[Some(random(n, "g"))], 0.1, 1.0).is_err());
    for t in 0..4 {
        let flat = [random(n, &format!("task{t}")), random(n, &format!("kd{t}"))];
        let reached = |which| entries.iter().map(|e| reaches(which, &e.name)).collect::<Vec<_>>();
        let grads = [0, 1].map(|w| Some(SplitGradient { flat: flat[w].clone(), reached: reached(w) }));
        if t == 2 {
            // A second optimiser goes on from the first one's state.
            let state = optimiser.state().unwrap();
            optimiser = Optimiser::new(&config, whole()).unwrap();
            optimiser.load_state(&state).unwrap();
        }
        optimiser.step_split(&[grads], 0.1, 0.5).unwrap();
        let own = |e: &kd_core::ParamEntry| {
            [0, 1].map(|w| {
                let flat = flat[w].narrow(0, e.offset, e.len()).unwrap();
                reaches(w, &e.name).then_some(SplitGradient { flat, reached: vec![true] })
            })
        };
        apart.step_split(&entries.iter().map(own).collect::<Vec<_>>(), 0.1, 0.5).unwrap();
        for (i, var) in vars.iter().enumerate() {
            let (a, b) = (values(&network.parameters().value(i).unwrap()), values(var.as_tensor()));
            assert!(relative(&a, &b) < 1e-14, "step {t}: {}", entries[i].name);
        }
    }
    let mut wrong = optimiser.state().unwrap();
    wrong.remove("network.momentum_kd.taken");
    assert!(optimiser.load_state(&wrong).is_err());
    let refused = |c: OptimConfig| c.validate().unwrap_err().to_string();
    assert!(refused(OptimConfig { delta: 0.1, ..config.clone() }).contains("optim.delta = 0.1"));
    assert!(refused(OptimConfig { nesterov: true, ..config }).contains("nesterov"));
}
