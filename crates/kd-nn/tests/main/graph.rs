//! Graphs, pieces and the reference executor.

use candle_core::{DType, Device, Tensor, Var};
use kd_core::{Cut, Mode, Model, Rng, Trainable};
use kd_nn::{Conv, Executor, Graph, GraphBuilder, Network, Pool, backward};

/// A two-stage residual network with everything that a piece can stumble over.
fn small(classes: usize) -> Graph {
    let mut b = GraphBuilder::new("small", &[3, 8, 8]);
    b.conv("conv1", Conv::new(6, 3).pad(1));
    b.batch_norm("bn1");
    let stem = b.relu();
    b.stage(0, "bn1", None);
    b.conv("a.conv", Conv::new(6, 3).pad(1).bias());
    b.batch_norm("a.bn");
    b.add(stem);
    b.cut(Cut::Preact(1));
    b.relu();
    b.stage(1, "a", Some("a.bn"));
    b.block(1, "a");
    b.max_pool(Pool::new(2));
    b.conv("c.conv", Conv::new(8, 3).stride(2).pad(1));
    b.relu();
    b.stage(2, "c", None);
    b.block(2, "c");
    b.global_avg_pool();
    b.cut(Cut::Embedding);
    b.linear("fc", classes);
    b.cut(Cut::Logits);
    b.finish().unwrap()
}

fn network(dtype: DType) -> Network {
    let net = Network::new(small(5), dtype, &Device::Cpu).unwrap().with_executor(Executor::Reference);
    net.init(Rng::new(3)).unwrap();
    net
}

fn images(dtype: DType, batch: usize) -> Tensor {
    let rng = Rng::new(9);
    let n = batch * 3 * 8 * 8;
    let v: Vec<f64> = (0..n as u64).map(|i| rng.normal(i)).collect();
    Tensor::from_vec(v, (batch, 3, 8, 8), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

#[test]
fn spec_is_read_off_the_cuts() {
    let g = small(5);
    let s = g.spec();
    assert_eq!((s.classes, s.embedding), (5, 8));
    assert_eq!(s.stages.iter().map(|f| f.channels).collect::<Vec<_>>(), [6, 6, 8]);
    assert_eq!(s.stages[2].size, [2, 2]);
    assert!(s.stages[1].has_preact && !s.stages[0].has_preact && s.stages[1].post_relu);
    assert_eq!(s.stages[1].norm_before_relu.as_deref(), Some("a.bn"));
    assert_eq!(g.macs(&[3, 8, 8]).unwrap(), (64 * 6 * 27 + 64 * 6 * 54 + 4 * 8 * 54 + 40) as u64);
}

#[test]
fn a_cut_that_is_not_a_single_crossing_cannot_be_fed() {
    let net = network(DType::F64);
    let x = images(DType::F64, 2);
    // Behind the stem's ReLU two paths go on, but both leave from it; behind the block's inner layers they would not.
    let out = net.run(&x, Cut::Input, &[Cut::Stage(0), Cut::Preact(1)], Mode::Eval).unwrap();
    assert!(net.run(out.stage(0).unwrap(), Cut::Stage(0), &[Cut::Logits], Mode::Eval).is_ok());
    let e = net.run(out.preact(1).unwrap(), Cut::Preact(1), &[Cut::Stage(0)], Mode::Eval).unwrap_err().to_string();
    assert!(e.contains("does not lie behind `preact.1`"), "{e}");
    let e = net.run(&x, Cut::Input, &[Cut::Stage(7)], Mode::Eval).unwrap_err().to_string();
    assert!(e.contains("no cut `stage.7`") && e.contains("stage.2"), "{e}");
    assert!(net.run(&x.narrow(1, 0, 2).unwrap(), Cut::Input, &[Cut::Logits], Mode::Eval).is_err());
    assert!(net.run(&x.to_dtype(DType::F32).unwrap(), Cut::Input, &[Cut::Logits], Mode::Eval).is_err());
}

#[test]
fn pieces_one_after_another_are_the_whole() {
    let net = network(DType::F32);
    let x = images(DType::F32, 3);
    let whole = net.run(&x, Cut::Input, &[Cut::Logits], Mode::Eval).unwrap();
    let mut h = x;
    for pair in [Cut::Input, Cut::Stage(0), Cut::Block(1), Cut::Block(2), Cut::Embedding, Cut::Logits].windows(2) {
        h = net.run(&h, pair[0], &[pair[1]], Mode::Eval).unwrap().get(pair[1]).unwrap().clone();
    }
    assert_eq!(h.to_vec2::<f32>().unwrap(), whole.logits().unwrap().to_vec2::<f32>().unwrap());
}

/// The loss that the gradient tests differentiate: a fixed random projection of two outputs.
fn loss(net: &Network, x: &Tensor, mode: Mode) -> Tensor {
    let out = net.run(x, Cut::Input, &[Cut::Stage(1), Cut::Logits], mode).unwrap();
    let weigh = |t: &Tensor, key: u64| {
        let v: Vec<f64> = (0..t.elem_count() as u64).map(|i| Rng::new(key).normal(i)).collect();
        (t * Tensor::from_vec(v, t.dims(), t.device()).unwrap()).unwrap().sum_all().unwrap()
    };
    (weigh(out.logits().unwrap(), 1) + (weigh(out.stage(1).unwrap(), 2) * 0.1).unwrap()).unwrap()
}

#[test]
fn gradients_are_finite_differences() {
    let net = network(DType::F64);
    let x = Var::from_tensor(&images(DType::F64, 3)).unwrap();
    let g = backward(&loss(&net, &x, Mode::BatchStats), &[&net]).unwrap();
    let found = g.networks[0].as_ref().unwrap();
    assert!(found.reached.iter().all(|&r| r));
    let grads = found.flat.to_vec1::<f64>().unwrap();
    let value = || loss(&net, &x, Mode::BatchStats).to_scalar::<f64>().unwrap();
    let h = 1e-6;
    for i in (0..grads.len()).step_by(7) {
        let shift = |by: f64| net.parameters().values().write::<f64, _>(|v| v[i] += by).unwrap();
        shift(h);
        let up = value();
        shift(-2.0 * h);
        let down = value();
        shift(h);
        let slope = (up - down) / (2.0 * h);
        assert!((slope - grads[i]).abs() <= 1e-6 * (1.0 + slope.abs()), "parameter {i}: {slope} against {}", grads[i]);
    }
    let gx = g.store.get(&x).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let base = x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    for i in (0..base.len()).step_by(41) {
        let at = |d: f64| {
            let mut v = base.clone();
            v[i] += d;
            loss(&net, &Tensor::from_vec(v, x.dims(), x.device()).unwrap(), Mode::BatchStats).to_scalar::<f64>().unwrap()
        };
        let slope = (at(h) - at(-h)) / (2.0 * h);
        assert!((slope - gx[i]).abs() <= 1e-6 * (1.0 + slope.abs()), "pixel {i}: {slope} against {}", gx[i]);
    }
}

#[test]
fn training_moves_the_statistics_and_nothing_else_does() {
    let net = network(DType::F64);
    let x = images(DType::F64, 4);
    let stats = || net.parameters().stats().snapshot().unwrap().to_vec1::<f64>().unwrap();
    let before = stats();
    net.run(&x, Cut::Input, &[Cut::Logits], Mode::Eval).unwrap();
    net.run(&x, Cut::Input, &[Cut::Logits], Mode::BatchStats).unwrap();
    assert_eq!(stats(), before);
    assert_eq!(net.parameters().counters(), [0, 0]);
    net.run(&x, Cut::Input, &[Cut::Logits], Mode::Train(Rng::new(1))).unwrap();
    assert_ne!(stats(), before);
    assert_eq!(net.parameters().counters(), [1, 1]);
    // The stem's mean after one step: 0.1 of the batch mean of its convolution.
    let w = net.parameters().get("conv1.weight").unwrap().unwrap();
    let y = x.conv2d(&w, 1, 1, 1, 1).unwrap().mean((0, 2, 3)).unwrap().to_vec1::<f64>().unwrap();
    let running = net.parameters().get("bn1.running_mean").unwrap().unwrap().to_vec1::<f64>().unwrap();
    for (r, m) in running.iter().zip(y) {
        assert!((r - 0.1 * m).abs() < 1e-12);
    }
}

#[test]
fn a_frozen_network_is_outside_the_graph_but_lets_gradients_through() {
    let net = network(DType::F64).frozen();
    let x = images(DType::F64, 2);
    assert!(matches!(net.trainable(), Trainable::Frozen));
    assert!(!loss(&net, &x, Mode::Eval).track_op());
    let v = Var::from_tensor(&x).unwrap();
    let g = backward(&loss(&net, &v, Mode::Eval), &[&net]).unwrap();
    assert!(g.store.get(&v).is_some());
    let own = g.networks[0].as_ref().unwrap();
    assert!(own.reached.iter().all(|&r| !r));
    assert!(own.flat.to_vec1::<f64>().unwrap().iter().all(|&v| v == 0.0));
}

#[test]
fn two_runs_and_two_passes_add_up() {
    let net = network(DType::F64);
    let (a, b) = (images(DType::F64, 2), images(DType::F64, 3));
    let flat = |l: &Tensor| backward(l, &[&net]).unwrap().networks.remove(0).unwrap().flat.to_vec1::<f64>().unwrap();
    let (la, lb) = (loss(&net, &a, Mode::BatchStats), loss(&net, &b, Mode::BatchStats));
    let (ga, gb, gsum) = (flat(&la), flat(&lb), flat(&(&la + &lb).unwrap()));
    for ((x, y), s) in ga.iter().zip(&gb).zip(&gsum) {
        assert!((x + y - s).abs() < 1e-10 * (1.0 + s.abs()));
    }
    assert_eq!(flat(&la), ga, "a second pass over one graph gives the same sums");
}

#[test]
fn mistakes_in_a_graph_are_named() {
    let mut b = GraphBuilder::new("bad", &[3, 4, 4]);
    b.conv("head", Conv::new(4, 7));
    let e = b.finish().unwrap_err().to_string();
    assert!(e.contains("bad") && e.contains("head") && e.contains("kernel"), "{e}");
    let mut b = GraphBuilder::new("bad", &[3, 4, 4]);
    let x = b.here();
    b.conv("c", Conv::new(4, 3).pad(1));
    b.add(x);
    assert!(b.finish().unwrap_err().to_string().contains("add"));
    let mut b = GraphBuilder::new("bad", &[4, 4, 4]);
    b.conv("c", Conv::new(6, 3).groups(4));
    assert!(b.finish().unwrap_err().to_string().contains("groups"));
    let mut b = GraphBuilder::new("bad", &[4, 4, 4]);
    b.relu();
    b.stage(1, "x", None);
    assert!(b.finish().unwrap_err().to_string().contains("stage.0"));
}

#[test]
fn dropout_is_counted_not_drawn() {
    let mut b = GraphBuilder::new("drop", &[64]);
    b.layer(kd_nn::Op::Dropout { p: 0.25 });
    b.cut(Cut::Embedding);
    let net = Network::new(b.finish().unwrap(), DType::F32, &Device::Cpu).unwrap().with_executor(Executor::Reference);
    let x = Tensor::ones((32, 64), DType::F32, &Device::Cpu).unwrap();
    let run = |seed| {
        let out = net.run(&x, Cut::Input, &[Cut::Embedding], Mode::Train(Rng::new(seed))).unwrap();
        out.embedding().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let a = run(1);
    assert_eq!(a, run(1));
    assert_ne!(a, run(2));
    let dropped = a.iter().filter(|&&v| v == 0.0).count() as f64 / a.len() as f64;
    assert!((dropped - 0.25).abs() < 0.04, "{dropped}");
    assert!(a.iter().all(|&v| v == 0.0 || (v - 4.0 / 3.0).abs() < 1e-6));
    let eval = net.run(&x, Cut::Input, &[Cut::Embedding], Mode::Eval).unwrap();
    assert_eq!(eval.embedding().unwrap().to_vec2::<f32>().unwrap(), x.to_vec2::<f32>().unwrap());
}
