//! The op fixtures of convolutional layers on the fused executor, in f32: each op is a graph of one layer.

use candle_core::{DType, Device, Tensor, Var};
use kd_core::{Cut, Mode, Model, Rng};
use kd_nn::{Conv, Executor, GraphBuilder, Init, Level, Network, Op, Pool, Precision, backward};
use serde_json::Value;

use crate::support::{Fixture, distance, fixtures};

/// Ops that are no layers of a fused graph: losses, optimisers, and what the reference executor does.
const ELSEWHERE: [&str; 12] = [
    "multi_head_attention",
    "window_attention",
    "sgd",
    "adamw",
    "layer_norm",
    "softmax",
    "log_softmax",
    "cross_entropy",
    "kl_div",
    "interpolate",
    "l2_normalize",
    "tanh",
];

#[test]
fn golden_ops_fused() {
    let Some(files) = fixtures("ops") else { return };
    let mut checked = 0;
    for f in files.iter().filter(|f| !ELSEWHERE.contains(&f.metadata["op"].as_str())) {
        let params: Value = serde_json::from_str(&f.metadata["params"]).unwrap();
        for level in Level::available() {
            for precision in [Precision::Strict, Precision::Fast] {
                check(f, &params, level, precision);
            }
        }
        checked += 1;
    }
    println!("{checked} fixtures checked");
    assert!(checked > 0);
}

/// Writes the layer down; `None` where a graph has no such layer.
fn layer(b: &mut GraphBuilder, op: &str, p: &Value, weight: Option<&Tensor>) -> Option<()> {
    let sizes = |key: &str| -> Vec<usize> { p[key].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect() };
    let pair = |key: &str| <[usize; 2]>::try_from(sizes(key)).unwrap();
    match op {
        "conv2d" => {
            let (w, [dilation, other]) = (weight?.dims(), pair("dilation"));
            if dilation != other {
                return None;
            }
            let conv = Conv::new(w[0], 1).kernel(w[2], w[3]).strides(pair("stride")).padding(sizes("padding").try_into().unwrap());
            let conv = conv.dilation(dilation).groups(p["groups"].as_u64().unwrap() as usize);
            b.conv("l", if p["bias"].as_bool().unwrap() { conv.bias() } else { conv });
        }
        "linear" => {
            let bias = p["bias"].as_bool().unwrap().then_some(Init::Const(0.0));
            b.linear_with("l", weight?.dims()[0], Init::Const(0.0), bias);
        }
        "batch_norm" => {
            // Graphs have PyTorch's default momentum.
            if p["momentum"].as_f64() != Some(0.1) {
                return None;
            }
            b.batch_norm_with("l", p["affine"].as_bool().unwrap(), p["eps"].as_f64().unwrap());
        }
        "max_pool2d" | "avg_pool2d" => {
            if p["dilation"].is_array() && pair("dilation") != [1, 1] {
                return None;
            }
            let pool = Pool {
                kernel: pair("kernel"),
                stride: pair("stride"),
                padding: pair("padding"),
                ceil: p["ceil_mode"].as_bool().unwrap(),
                count_include_pad: p["count_include_pad"].as_bool().unwrap_or(true),
            };
            if op == "max_pool2d" {
                b.max_pool(pool)
            } else {
                b.avg_pool(pool)
            };
        }
        "adaptive_avg_pool2d" => drop(b.layer(Op::AdaptiveAvgPool { output: pair("output_size") })),
        "channel_shuffle" => drop(b.layer(Op::ChannelShuffle { groups: p["groups"].as_u64().unwrap() as usize })),
        "relu" => drop(b.relu()),
        "relu6" => drop(b.layer(Op::Relu6)),
        "gelu" => drop(b.layer(Op::Gelu)),
        "silu" => drop(b.layer(Op::Silu)),
        "hardswish" => drop(b.layer(Op::Hardswish)),
        "hardsigmoid" => drop(b.layer(Op::Hardsigmoid)),
        "sigmoid" => drop(b.layer(Op::Sigmoid)),
        other => panic!("unknown op `{other}`"),
    }
    Some(())
}

fn check(f: &Fixture, p: &Value, level: Level, precision: Precision) {
    let op = f.metadata["op"].as_str();
    let single = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
    let rows = |t: &Tensor| if op == "linear" { t.flatten(0, t.rank() - 2).unwrap() } else { t.clone() };
    let x = Var::from_tensor(&single(&rows(f.get("in.x")))).unwrap();
    let mut b = GraphBuilder::new("op", &x.dims()[1..]);
    if layer(&mut b, op, p, f.tensors.get("in.weight")).is_none() {
        return;
    }
    b.cut(Cut::Embedding);
    let net = Network::new(b.finish().unwrap(), DType::F32, &Device::Cpu).unwrap();
    let net = net.with_executor(Executor::Fused).with_level(level).with_precision(precision);
    net.parameters().assign(|name| f.tensors.get(&name.replace("l.", "in.")).cloned()).unwrap();
    let training = p["training"].as_bool().unwrap_or(true);
    let mode = if training { Mode::Train(Rng::new(1)) } else { Mode::Eval };
    let y = net.run(x.as_tensor(), Cut::Input, &[Cut::Embedding], mode).unwrap().embedding().unwrap().clone();
    let grad_out = single(&rows(f.get("grad_out")));
    let grads = backward(&(&y * grad_out).unwrap().sum_all().unwrap(), &[&net]).unwrap();

    let close = |name: &str, found: &Tensor, expected: &Tensor| {
        let offset = f.file.contains("offset");
        let allowed = match op {
            "batch_norm" if offset => 3e-4,
            "batch_norm" => 5e-5,
            _ => 1e-5,
        };
        let gap = distance(found, expected);
        let few = op == "batch_norm" && name == "grad.x" && x.elem_count() / x.dims()[1] <= 2;
        let largest = (found.to_dtype(DType::F64).unwrap() - expected.to_dtype(DType::F64).unwrap()).unwrap().abs().unwrap();
        let largest = largest.flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap();
        assert!(gap <= allowed || (few && largest <= 1e-5), "{} {name} on {}: relative distance {gap:e}", f.file, level.name());
    };
    close("out.y", &y, &rows(f.get("out.y")));
    close("grad.x", grads.store.get(&x).unwrap(), &rows(f.get("grad.x")));
    let own = grads.networks[0].as_ref().unwrap();
    for (i, e) in net.parameters().entries().iter().enumerate().filter(|_| training) {
        assert!(own.reached[i], "{}: {} was not reached", f.file, e.name);
        close(&e.name, &net.parameters().grad_of(&own.flat, i).unwrap(), f.get(&e.name.replace("l.", "grad.")));
    }
    for e in net.parameters().stat_entries().iter().filter(|_| training) {
        close(&e.name, &net.parameters().get(&e.name).unwrap().unwrap(), f.get(&e.name.replace("l.", "out.")));
    }
}
