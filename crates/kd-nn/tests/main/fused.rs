//! The fused executor against the reference executor in f64: random graphs, shapes, modes, levels and thread counts.

use candle_core::{DType, Device, Tensor, Var};
use kd_core::{Cut, Mode, Model, Rng};
use kd_nn::{Conv, Executor, Graph, GraphBuilder, Level, Network, NodeId, Op, Pool, Precision, backward};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

use crate::support::distance;

/// A random layer: what, and three numbers that it is made from.
type Layer = (u8, u8, u8, u8);

/// Writes random layers behind one another; a layer that does not fit is left out. Stages 0 and 1 lie somewhere in the middle.
fn graph(channels: usize, size: [usize; 2], layers: &[Layer], flatten: bool) -> Graph {
    let mut b = GraphBuilder::new("random", &[channels, size[0], size[1]]);
    let mut seen: Vec<(NodeId, Vec<usize>)> = vec![(0, b.shape().to_vec())];
    let mut stages = 0;
    for (i, &(kind, p, q, r)) in layers.iter().enumerate() {
        let (p, q, r) = (usize::from(p), usize::from(q), usize::from(r));
        let [c, h, w] = <[usize; 3]>::try_from(b.shape()).unwrap();
        let name = |part: &str| format!("l{i}.{part}");
        let out = 1 + p % 41;
        match kind % 22 {
            0 => {
                b.conv(&name("conv"), Conv::new(out, 3).pad(1).stride(1 + q % 2));
            }
            1 => {
                let (kh, kw) = (1 + q % 5, 1 + r % 4);
                let (stride, dilation) = (1 + p % 3, 1 + q % 2);
                let fits = |n: usize, pads: usize, k: usize| n + pads > dilation * (k - 1);
                let pads = [q % 2, r % 3, r % 2, q % 3];
                if fits(h, pads[0] + pads[1], kh) && fits(w, pads[2] + pads[3], kw) {
                    let conv = Conv::new(out, 1).kernel(kh, kw).stride(stride).padding(pads).dilation(dilation).bias();
                    b.conv(&name("conv"), conv);
                }
            }
            2 => {
                b.conv(&name("dw"), Conv::new(c * (1 + r % 2), 3).pad(1).stride(1 + q % 2).groups(c));
            }
            3 | 4 => {
                b.batch_norm_with(&name("bn"), p % 4 != 0, 1e-5);
            }
            5 => {
                b.relu();
            }
            6 => {
                b.layer(Op::Relu6);
            }
            7 => {
                b.conv(&name("conv"), Conv::new(out, 1 + 2 * (q % 2)).pad(q % 2));
                b.batch_norm(&name("bn"));
                b.relu();
            }
            8 | 9 => {
                let skip = b.here();
                b.conv(&name("conv1"), Conv::new(out, 3).pad(1));
                b.batch_norm(&name("bn1"));
                b.relu();
                b.conv(&name("conv2"), Conv::new(c, 3).pad(1));
                b.batch_norm(&name("bn2"));
                let main = b.here();
                if q % 2 == 0 {
                    b.at(skip);
                    b.conv(&name("short"), Conv::new(c, 1));
                    b.batch_norm(&name("bn3"));
                    b.add(main);
                } else {
                    b.add(skip);
                }
                b.relu();
            }
            10 => {
                let same = seen.iter().find(|(_, s)| s == b.shape());
                if let Some(&(other, _)) = same {
                    b.add(other);
                }
            }
            11 => {
                let fitting = seen.iter().rev().find(|(_, s)| s[1..] == b.shape()[1..]);
                if let Some(&(other, _)) = fitting {
                    let here = b.here();
                    b.concat(&[here, other]);
                }
            }
            12 => {
                let start = p % c;
                b.layer(Op::Slice { start, len: 1 + q % (c - start) });
            }
            13 => {
                let groups = (1..=c).filter(|g| c.is_multiple_of(*g)).nth(p % 3).unwrap_or(1);
                b.layer(Op::ChannelShuffle { groups });
            }
            14 => {
                b.layer(Op::PadChannels { before: p % 3, after: q % 3 });
            }
            15 => {
                b.layer(Op::Subsample { stride: 2 });
            }
            16 | 17 => {
                let pool = Pool {
                    kernel: [2 + p % 2, 2 + q % 2],
                    stride: [1 + p % 3, 1 + r % 3],
                    padding: [p / 4 % 2, q / 4 % 2],
                    ceil: r % 2 == 0,
                    count_include_pad: q % 2 == 0,
                };
                if pool.output(h, 0).is_some() && pool.output(w, 1).is_some() {
                    if kind % 22 == 16 {
                        b.max_pool(pool)
                    } else {
                        b.avg_pool(pool)
                    };
                }
            }
            18 => {
                b.layer(Op::AdaptiveAvgPool { output: [1 + p % 4, 1 + q % 4] });
            }
            19 => {
                b.layer([Op::Gelu, Op::Silu, Op::Hardswish, Op::Hardsigmoid, Op::Sigmoid][p % 5].clone());
            }
            20 => {
                let x = b.here();
                b.layer(Op::AdaptiveAvgPool { output: [1, 1] });
                b.conv(&name("gate"), Conv::new(c, 1).bias());
                b.layer(Op::Sigmoid);
                let gate = b.here();
                b.at(x);
                b.mul(gate);
            }
            _ => {
                b.layer(if p % 2 == 0 { Op::Dropout { p: 0.3 } } else { Op::DropPath { p: 0.4 } });
            }
        }
        seen.push((b.here(), b.shape().to_vec()));
        if stages < 2 && r % 3 == 0 {
            b.stage(stages, "", None);
            stages += 1;
        }
    }
    if flatten {
        b.layer(Op::Flatten);
    } else {
        b.global_avg_pool();
    }
    b.cut(Cut::Embedding);
    b.linear("fc", 1 + channels % 20);
    b.cut(Cut::Logits);
    b.finish().unwrap()
}

fn numbers(dims: &[usize], seed: u64) -> Tensor {
    let n: usize = dims.iter().product();
    let values: Vec<f64> = (0..n as u64).map(|i| Rng::new(seed).normal(i)).collect();
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

/// A network with parameters and running statistics away from their defaults, the same for every type and executor.
fn network(graph: Graph, dtype: DType, executor: Executor) -> Network {
    let net = Network::new(graph, dtype, &Device::Cpu).unwrap().with_executor(executor).with_precision(Precision::Strict);
    net.init(Rng::new(5)).unwrap();
    let p = net.parameters();
    let shake = |n: usize, seed: u64, by: f64| (numbers(&[n], seed) * by).unwrap().to_dtype(DType::F32).unwrap().to_dtype(dtype).unwrap();
    // f32 values everywhere, so that both types start from the same numbers.
    let values = p.values().tensor().to_dtype(DType::F32).unwrap().to_dtype(dtype).unwrap();
    p.values().set(&(values + shake(p.count(), 6, 0.1)).unwrap().to_dtype(DType::F32).unwrap()).unwrap();
    let stats = p.stats().tensor();
    p.stats().set(&(&stats + shake(stats.elem_count(), 7, 0.2).abs().unwrap()).unwrap().to_dtype(DType::F32).unwrap()).unwrap();
    net
}

/// What a run leaves: outputs, input gradient, parameter gradients, running statistics, by name.
type Found = Vec<(String, Tensor)>;

fn run(net: &Network, x: &Tensor, mode: Mode, input: bool) -> Found {
    let dtype = net.parameters().dtype();
    let wanted: Vec<Cut> =
        [Cut::Stage(0), Cut::Stage(1), Cut::Embedding, Cut::Logits].into_iter().filter(|&c| net.graph().cut(c).is_ok()).collect();
    let var = Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap();
    let x = if input { var.as_tensor().clone() } else { var.as_detached_tensor() };
    let out = net.run(&x, Cut::Input, &wanted, mode).unwrap();
    let mut found: Found = out.iter().map(|(c, t)| (c.to_string(), t.detach())).collect();
    let mut loss = Tensor::zeros((), dtype, &Device::Cpu).unwrap();
    for (i, (_, t)) in out.iter().enumerate() {
        let weights = numbers(t.dims(), 20 + i as u64).to_dtype(dtype).unwrap();
        loss = (loss + (t * weights).unwrap().sum_all().unwrap()).unwrap();
    }
    if loss.track_op() {
        let g = backward(&loss, &[net]).unwrap();
        if input {
            found.push(("grad.images".into(), g.store.get(&var).unwrap().clone()));
        }
        let flat = &g.networks[0].as_ref().unwrap().flat;
        let reached = &g.networks[0].as_ref().unwrap().reached;
        assert!(matches!(mode, Mode::Eval) || reached.iter().all(|&r| r));
        for (i, e) in net.parameters().entries().iter().enumerate() {
            found.push((format!("grad.{}", e.name), net.parameters().grad_of(flat, i).unwrap()));
        }
    }
    let counters: Vec<f64> = net.parameters().counters().iter().map(|&c| c as f64).collect();
    let n = counters.len();
    found.push(("statistics".into(), net.parameters().stats().snapshot().unwrap()));
    found.push(("counters".into(), Tensor::from_vec(counters, n, &Device::Cpu).unwrap()));
    found
}

/// Gradients of what a batch norm makes constant are differences of equal numbers: small beside the others, not beside themselves.
fn compare(fused: &Found, reference: &Found, allowed: f64) -> Result<(), TestCaseError> {
    let norm = |t: &Tensor| t.to_dtype(DType::F64).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
    let largest = reference.iter().filter(|(n, _)| n.starts_with("grad.")).map(|(_, t)| norm(t)).fold(0.0, f64::max);
    for ((name, a), (other, b)) in fused.iter().zip(reference) {
        prop_assert_eq!(name, other);
        let mut gap = distance(a, b);
        if name.starts_with("grad.") {
            let a = a.to_dtype(DType::F64).unwrap();
            gap = gap.min(norm(&(a - b.to_dtype(DType::F64).unwrap()).unwrap()) / (largest * 0.05).max(1e-6));
        }
        prop_assert!(gap <= allowed, "{}: distance {:e}", name, gap);
    }
    Ok(())
}

/// Cases that are the same in every run of the test.
fn cases<S: Strategy>(n: u32, strategy: S, test: impl Fn(S::Value) -> Result<(), TestCaseError>) {
    let config = ProptestConfig { cases: n, failure_persistence: None, ..ProptestConfig::default() };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    TestRunner::new_with_rng(config, rng).run(&strategy, test).unwrap();
}

#[derive(Clone, Debug)]
struct Case {
    channels: usize,
    size: [usize; 2],
    batch: usize,
    layers: Vec<Layer>,
    flatten: bool,
    mode: u8,
    input: bool,
}

fn case() -> impl Strategy<Value = Case> {
    let layers = prop::collection::vec(any::<Layer>(), 1..9);
    (1usize..20, 1usize..12, 1usize..12, 1usize..20, layers, any::<bool>(), 0u8..3, any::<bool>()).prop_map(
        |(channels, h, w, batch, layers, flatten, mode, input)| Case { channels, size: [h, w], batch, layers, flatten, mode, input },
    )
}

impl Case {
    fn mode(&self) -> Mode {
        match self.mode {
            0 => Mode::Train(Rng::new(8)),
            1 => Mode::BatchStats,
            _ => Mode::Eval,
        }
    }

    fn graph(&self) -> Graph {
        graph(self.channels, self.size, &self.layers, self.flatten)
    }

    fn images(&self) -> Tensor {
        numbers(&[self.batch, self.channels, self.size[0], self.size[1]], 9).to_dtype(DType::F32).unwrap()
    }
}

#[test]
fn random_graphs_match_the_reference() {
    cases(200, case(), |case| {
        let graph = case.graph();
        let reference = run(&network(graph.clone(), DType::F64, Executor::Reference), &case.images(), case.mode(), case.input);
        let single = run(&network(graph.clone(), DType::F32, Executor::Reference), &case.images(), case.mode(), case.input);
        let fused = run(&network(graph, DType::F32, Executor::Fused), &case.images(), case.mode(), case.input);
        // Deep graphs amplify f32's rounding; the reference executor in f32 shows by how much.
        let rounding = single.iter().zip(&reference).map(|((_, a), (_, b))| distance(a, b)).fold(0.0, f64::max);
        compare(&fused, &reference, 1e-5 + 4.0 * rounding)
    });
}

#[test]
fn the_fast_precision_is_near_the_strict_one() {
    // Convolutions that Winograd's algorithm takes, behind and before all kinds of layers.
    let layers = prop::collection::vec((prop::sample::select(vec![0u8, 7, 8, 16]), 15u8..41, any::<u8>(), any::<u8>()), 1..4);
    let case = (16usize..40, 6usize..18, 6usize..18, 1usize..20, layers, 0u8..3, any::<bool>());
    let case = case.prop_map(|(channels, h, w, batch, layers, mode, input)| {
        let layers = layers.into_iter().map(|(kind, p, q, r)| (kind, p, if kind == 0 { q & !1 } else { q | 1 }, r)).collect();
        Case { channels, size: [h, w], batch, layers, flatten: false, mode, input }
    });
    cases(40, case, |case| {
        for level in Level::available() {
            let net = |precision| network(case.graph(), DType::F32, Executor::Fused).with_level(level).with_precision(precision);
            let go = |precision| run(&net(precision), &case.images(), case.mode(), case.input);
            let fast = go(Precision::Fast);
            for threads in 1..4 {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                prop_assert!(bits(&fast) == bits(&pool.install(|| go(Precision::Fast))), "{threads} threads");
            }
            compare(&fast, &go(Precision::Strict), 2e-4)?;
        }
        Ok(())
    });
}

#[test]
fn every_level_matches_the_reference() {
    cases(40, case(), |case| {
        let graph = case.graph();
        let reference = run(&network(graph.clone(), DType::F32, Executor::Reference), &case.images(), case.mode(), case.input);
        for level in Level::available() {
            let net = network(graph.clone(), DType::F32, Executor::Fused).with_level(level);
            compare(&run(&net, &case.images(), case.mode(), case.input), &reference, 1e-4)?;
        }
        Ok(())
    });
}

fn bits(found: &Found) -> Vec<Vec<u64>> {
    let of = |t: &Tensor| t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    found.iter().map(|(_, t)| of(t).into_iter().map(f64::to_bits).collect()).collect()
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let pools: Vec<_> = (1..4).map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap()).collect();
    cases(40, case(), |case| {
        let graph = case.graph();
        let run = || bits(&run(&network(graph.clone(), DType::F32, Executor::Fused), &case.images(), case.mode(), case.input));
        let found: Vec<_> = pools.iter().map(|p| p.install(run)).collect();
        prop_assert!(found.windows(2).all(|w| w[0] == w[1]));
        Ok(())
    });
    // Weights so large that their gradients are divided by rows.
    let wide = || {
        let mut b = GraphBuilder::new("wide", &[96, 5, 5]);
        b.conv("a", Conv::new(100, 3).pad(1).bias());
        b.batch_norm("bn");
        b.relu();
        b.stage(0, "a", None);
        b.conv("b", Conv::new(80, 3).pad(1).bias());
        b.global_avg_pool();
        b.cut(Cut::Embedding);
        b.linear("fc", 7);
        b.cut(Cut::Logits);
        b.finish().unwrap()
    };
    let x = numbers(&[21, 96, 5, 5], 3).to_dtype(DType::F32).unwrap();
    let reference = run(&network(wide(), DType::F64, Executor::Reference), &x, Mode::Train(Rng::new(1)), true);
    for (precision, allowed) in [(Precision::Strict, 1e-5), (Precision::Fast, 1e-4)] {
        let go = || run(&network(wide(), DType::F32, Executor::Fused).with_precision(precision), &x, Mode::Train(Rng::new(1)), true);
        let found: Vec<_> = pools.iter().map(|p| p.install(|| bits(&go()))).collect();
        assert!(found.windows(2).all(|w| w[0] == w[1]));
        compare(&go(), &reference, allowed).unwrap();
    }
}

/// A residual network with two stages.
fn residual() -> Graph {
    graph(3, [9, 7], &[(7, 15, 1, 0), (8, 15, 0, 1), (0, 19, 1, 0), (9, 19, 1, 1)], false)
}

#[test]
fn a_graph_may_be_differentiated_twice_and_in_part() {
    let net = network(residual(), DType::F32, Executor::Fused);
    let reference = network(residual(), DType::F64, Executor::Reference);
    let x = numbers(&[5, 3, 9, 7], 1).to_dtype(DType::F32).unwrap();
    let parts = |net: &Network| {
        let out =
            net.run(&x.to_dtype(net.parameters().dtype()).unwrap(), Cut::Input, &[Cut::Stage(0), Cut::Logits], Mode::BatchStats).unwrap();
        [out.stage(0).unwrap(), out.logits().unwrap()].map(|t| t.sqr().unwrap().sum_all().unwrap())
    };
    let flat = |net: &Network, loss: &Tensor| backward(loss, &[net]).unwrap().networks.remove(0).unwrap().flat;
    let (a, b) = (parts(&net), parts(&reference));
    for i in [0, 1, 0] {
        assert!(distance(&flat(&net, &a[i]), &flat(&reference, &b[i])) < 1e-5);
    }
    let both = |p: &[Tensor; 2]| (&p[0] + &p[1]).unwrap();
    assert!(distance(&flat(&net, &both(&a)), &flat(&reference, &both(&b))) < 1e-5);
    assert_eq!(bits(&vec![(String::new(), flat(&net, &both(&a)))]), bits(&vec![(String::new(), flat(&net, &both(&a)))]));
}

#[test]
fn any_strides_and_pieces() {
    let net = network(residual(), DType::F32, Executor::Fused);
    let x = numbers(&[4, 3, 9, 7], 1).to_dtype(DType::F32).unwrap();
    let whole = net.run(&x, Cut::Input, &[Cut::Stage(0), Cut::Stage(1), Cut::Logits], Mode::Eval).unwrap();
    let logits = |t: &Tensor, from: Cut| {
        let out = net.run(t, from, &[from, Cut::Logits], Mode::Eval).unwrap();
        assert_eq!(out.get(from).unwrap().id(), t.id());
        out.logits().unwrap().to_vec2::<f32>().unwrap()
    };
    let expected = whole.logits().unwrap().to_vec2::<f32>().unwrap();
    let transposed = x.transpose(2, 3).unwrap().contiguous().unwrap().transpose(2, 3).unwrap();
    let wide = Tensor::cat(&[&x, &x], 0).unwrap().narrow(0, 4, 4).unwrap();
    for x in [&x, &transposed, &wide] {
        assert_eq!(logits(x, Cut::Input), expected);
    }
    let stage = whole.stage(1).unwrap();
    assert!(!stage.is_contiguous());
    assert_eq!(logits(stage, Cut::Stage(1)), expected);
    assert_eq!(logits(&stage.contiguous().unwrap(), Cut::Stage(1)), expected);
}

#[test]
fn folding_follows_values_and_statistics() {
    let net = network(residual(), DType::F32, Executor::Fused);
    let reference = network(residual(), DType::F64, Executor::Reference);
    let x = numbers(&[3, 3, 9, 7], 1).to_dtype(DType::F32).unwrap();
    let step = |net: &Network, mode| {
        let x = x.to_dtype(net.parameters().dtype()).unwrap();
        net.run(&x, Cut::Input, &[Cut::Logits], mode).unwrap().logits().unwrap().detach()
    };
    for i in 0..3 {
        assert!(distance(&step(&net, Mode::Eval), &step(&reference, Mode::Eval)) < 1e-5, "round {i}");
        // The statistics change, then the values.
        [&net, &reference].iter().for_each(|n| drop(step(n, Mode::Train(Rng::new(i)))));
        assert!(distance(&step(&net, Mode::Eval), &step(&reference, Mode::Eval)) < 1e-5, "round {i}");
        for n in [&net, &reference] {
            let values = (n.parameters().values().snapshot().unwrap() * 1.1).unwrap();
            n.parameters().values().set(&values).unwrap();
        }
    }
}

#[test]
fn what_it_lacks_is_refused_or_left_to_the_reference() {
    let lacking = || {
        let mut b = GraphBuilder::new("resize", &[2, 4, 4]);
        b.conv("c", Conv::new(3, 3).pad(1));
        b.layer(Op::ResizeNearest { output: [8, 8] });
        b.stage(0, "c", None);
        b.finish().unwrap()
    };
    let x = numbers(&[1, 2, 4, 4], 1).to_dtype(DType::F32).unwrap();
    let net = network(lacking(), DType::F32, Executor::Fused);
    let e = net.run(&x, Cut::Input, &[Cut::Stage(0)], Mode::Eval).unwrap_err().to_string();
    assert!(e.contains("resize_nearest"), "{e}");
    let auto = network(lacking(), DType::F32, Executor::Auto);
    assert_eq!(auto.executor_of(Cut::Input, &[Cut::Stage(0)]).unwrap(), "reference");
    assert!(auto.run(&x, Cut::Input, &[Cut::Stage(0)], Mode::Eval).is_ok());
    let auto = network(residual(), DType::F32, Executor::Auto);
    assert_eq!(auto.executor_of(Cut::Input, &[Cut::Logits]).unwrap(), "fused");
    let double = network(residual(), DType::F64, Executor::Auto);
    assert_eq!(double.executor_of(Cut::Input, &[Cut::Logits]).unwrap(), "reference");
}
