//! Every option does what its line says.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use kd_blockwise::{BlockKd, Params, SteppingStones};
use kd_core::registry::evaluate;
use kd_core::{Cut, LossTerms, Method, Mode, Model, Outputs, Rng};
use kd_nn::Network;
use serde_json::{Value, json};

use super::support::*;

fn weights(terms: &LossTerms) -> BTreeMap<String, f64> {
    terms.terms.iter().map(|t| (t.name.clone(), t.weight)).collect()
}

fn connector(method: &BlockKd, stone: usize) -> &Network {
    method.stones().unwrap().connectors().find(|(i, _)| *i == stone).unwrap().1
}

fn layers_of(network: &Network) -> Vec<&'static str> {
    network.graph().nodes()[1..].iter().map(|n| n.op.kind()).collect()
}

fn vector(network: &Network, name: &str) -> Vec<f64> {
    values(&network.parameters().get(name).unwrap().unwrap())
}

fn outputs(bench: &Bench, method: &BlockKd) -> Outputs {
    bench.outputs(method, Mode::Train(Rng::new(4))).0.remove(0)
}

#[test]
fn the_step_computes_the_parity_function() {
    let mut bench = Bench::small(DType::F64);
    let plain = json!({"alpha": 0.3, "beta": 0.9, "gamma": 0.5, "decay_cross": true, "normalise": true, "stones": [1, 3]});
    let dkd = json!({"distance": "dkd", "dkd_beta": 2.0, "detach_ensemble": false, "stone_distance": {"2": {"method": "kd", "form": "cross_entropy"}}});
    let mixed = Tensor::new(
        &[[0.7, 0.3, 0.0, 0.0, 0.0], [0.0, 0.4, 0.0, 0.6, 0.0], [0.0, 0.0, 0.0, 0.2, 0.8], [0.0, 0.0, 0.3, 0.7, 0.0]],
        &Device::Cpu,
    );
    let mixed = mixed.unwrap();
    for (params, targets) in [(&plain, None), (&dkd, None), (&plain, Some(&mixed)), (&dkd, Some(&mixed))] {
        bench.batch.targets = targets.cloned();
        let mut method = bench.prepared(params.clone());
        let terms = bench.loss(&mut method);

        let rng = Rng::new(5).fork(0);
        let (student, teacher) = bench.outputs(&method, Mode::Train(rng));
        let stones = method.stones().unwrap().run(&student[0], bench.teacher(), &[1, 2, 3], Mode::Train(rng)).unwrap();
        let mut tensors: BTreeMap<String, Tensor> = stones.into_iter().map(|(i, z)| (format!("stone.{i}.logits"), z.detach())).collect();
        tensors.insert("student.logits".into(), student[0].logits().unwrap().detach());
        tensors.insert("teacher.logits".into(), teacher[0][0].logits().unwrap().clone());
        tensors.insert("labels".into(), bench.batch.labels.clone());
        tensors.extend(targets.map(|t| ("targets".to_string(), t.clone())));
        let mut params = params.clone();
        params["blocks"] = json!(3);
        let expected = evaluate(&kd_blockwise::registry()[0], &tensors, &params, DType::F64).unwrap();
        assert!((scalar(&terms.total().unwrap()) - scalar(&expected["value"])).abs() < 1e-12, "{params}");
        for t in &terms.terms {
            let (found, wanted) = (scalar(&t.raw) * t.weight, scalar(&expected[&format!("term.{}", t.name)]));
            assert!((found - wanted).abs() < 1e-12, "{params}, {}: {found} in a step, {wanted} on named tensors", t.name);
        }
        assert_eq!(expected.keys().filter(|k| k.starts_with("term.")).count(), terms.terms.len());
    }
}

/// Values of every stone and gradients of student and connectors.
fn stones_and_gradients(bench: &Bench, method: &BlockKd, groups: &[&[usize]]) -> (BTreeMap<usize, Tensor>, Vec<Tensor>) {
    let student = outputs(bench, method);
    let mut logits = BTreeMap::new();
    for active in groups {
        logits.extend(method.stones().unwrap().run(&student, bench.teacher(), active, Mode::Train(Rng::new(4))).unwrap());
    }
    let loss = logits.iter().map(|(&i, z)| (z.sqr().unwrap().mean_all().unwrap() * i as f64).unwrap());
    let loss = loss.reduce(|a, b| (a + b).unwrap()).unwrap();
    let networks = method.networks();
    let mut models: Vec<&dyn Model> = vec![&bench.student];
    models.extend(networks.iter().map(|n| n.as_ref()));
    let gradients = kd_nn::backward(&loss, &models).unwrap().networks;
    (logits, gradients.into_iter().map(|g| g.unwrap().flat).collect())
}

#[test]
fn stones_together_equal_stones_alone() {
    for tail in ["eval", "train"] {
        for (bench, tolerance) in
            [(Bench::small(DType::F64), 1e-12), (Bench::resnets(DType::F64), 1e-12), (Bench::resnets(DType::F32), 1e-4)]
        {
            let method = bench.prepared(json!({"tail_bn": tail}));
            let (together, gradients) = stones_and_gradients(&bench, &method, &[&[1, 2, 3]]);
            let (alone, gradients_alone) = stones_and_gradients(&bench, &method, &[&[2], &[3], &[1]]);
            for i in 1..=3 {
                assert!(gap(&together[&i], &alone[&i]) <= tolerance, "{tail}, stone {i}: {}", gap(&together[&i], &alone[&i]));
            }
            for (a, b) in gradients.iter().zip(&gradients_alone) {
                let top = values(b).into_iter().fold(0.0, |m: f64, x| m.max(x.abs()));
                assert!(top > 0.0 && gap(a, b) <= tolerance * top.max(1.0), "{tail}: gradients off by {}", gap(a, b));
            }
        }
    }
}

#[test]
fn tails_run_with_the_statistics_asked_for() {
    let bench = Bench::small(DType::F64);
    let run = |tail: &str| {
        let method = bench.prepared(json!({"tail_bn": tail, "stones": [2]}));
        let student = outputs(&bench, &method);
        let found = method.stones().unwrap().run(&student, bench.teacher(), &[2], Mode::BatchStats).unwrap().remove(&2).unwrap();
        let map = method.networks()[0].run(student.block(2).unwrap(), Cut::Input, &[Cut::Block(1)], Mode::BatchStats).unwrap();
        let by_hand =
            |mode| bench.teacher().run(map.block(1).unwrap(), Cut::Block(2), &[Cut::Logits], mode).unwrap().logits().unwrap().clone();
        (found, by_hand(Mode::Eval), by_hand(Mode::BatchStats))
    };
    let (eval, running, batch) = run("eval");
    assert!(gap(&eval, &running) < 1e-14 && gap(&eval, &batch) > 1e-3);
    let (train, running, batch) = run("train");
    assert!(gap(&train, &batch) < 1e-14 && gap(&train, &running) > 1e-3);
}

#[test]
fn a_schedule_says_which_stones_are_active() {
    let bench = Bench::small(DType::F64);
    let schedule =
        json!([{"from": 1, "stones": [3]}, {"from": 3, "stones": [1, 2]}, {"from": 4, "stones": []}, {"from": 5, "stones": [1, 2, 3]}]);
    let mut method = bench.prepared(json!({"stone_schedule": schedule}));
    let stones = |terms: &LossTerms| -> Vec<usize> {
        let numbers = terms.terms.iter().filter_map(|t| t.name.strip_prefix("stone.")?.strip_suffix(".task")?.parse().ok());
        numbers.collect()
    };
    for (epoch, expected) in
        [(0, vec![]), (1, vec![3]), (2, vec![3]), (3, vec![1, 2]), (4, vec![]), (5, vec![1, 2, 3]), (30, vec![1, 2, 3])]
    {
        let terms = bench.loss_at(&mut method, epoch, 0);
        assert_eq!(stones(&terms), expected, "epoch {epoch}");
        assert_eq!(terms.terms.iter().any(|t| t.name == "student.cross"), !expected.is_empty());
        let idle: Vec<usize> = (0..3).filter(|i| !expected.contains(&(i + 1))).collect();
        assert_eq!(method.idle(epoch), idle, "epoch {epoch}");
        let networks = method.networks();
        let models: Vec<&dyn Model> = networks.iter().map(|n| n.as_ref()).collect();
        for (i, reached) in reached(&terms.total().unwrap(), &models).iter().enumerate() {
            assert_eq!(reached.is_empty(), idle.contains(&i), "epoch {epoch}, connector {}", i + 1);
        }
    }
    // Coefficients keep their numbers, whoever else is there.
    assert_eq!(weights(&bench.loss_at(&mut method, 3, 0))["stone.1.task"], 0.25);
}

#[test]
fn the_warm_up_holds_back_all_that_stones_bring() {
    let bench = Bench::small(DType::F64);
    let full = weights(&bench.loss(&mut bench.prepared(json!({"alpha": 0.5, "beta": 2.0, "gamma": 3.0}))));
    let mut method = bench.prepared(json!({"alpha": 0.5, "beta": 2.0, "gamma": 3.0, "stone_warmup": 4}));
    for (epoch, factor) in [(0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)] {
        for (name, weight) in weights(&bench.loss_at(&mut method, epoch, 0)) {
            let own = ["student.task", "student.distill"].contains(&name.as_str());
            assert_eq!(weight, full[&name] * if own { 1.0 } else { factor }, "epoch {epoch}, {name}");
        }
    }
}

#[test]
fn normalised_coefficients_add_up_to_one() {
    let bench = Bench::small(DType::F64);
    for (more, active) in [(json!({}), 3), (json!({"stones": [1, 3]}), 2), (json!({"decay_cross": true}), 3)] {
        let mut params = json!({"normalise": true, "alpha": 2.0});
        params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let w = weights(&bench.loss(&mut bench.prepared(params)));
        let sum = |kind: &str| w.iter().filter(|(n, _)| n.starts_with("stone.") && n.ends_with(kind)).map(|(_, w)| w).sum::<f64>();
        assert!((sum("task") - 2.0).abs() < 1e-15 && (sum("distill") - 1.0).abs() < 1e-15 && (sum("cross") - 1.0).abs() < 1e-15, "{more}");
        assert_eq!(w["student.cross"], 1.0);
        assert_eq!(w["stone.3.task"] / w["stone.1.task"], 4.0);
        assert_eq!(w.keys().filter(|n| n.ends_with(".task")).count(), active + 1);
    }
}

#[test]
fn a_stone_may_have_a_distance_of_its_own() {
    let bench = Bench::small(DType::F64);
    let mut method =
        bench.prepared(json!({"distance": "dkd", "dkd_alpha": 0.5, "stone_distance": {"2": {"method": "nkd", "temperature": 1.0}}}));
    let terms = bench.loss(&mut method);
    let rng = Rng::new(5).fork(0);
    let (student, teacher) = bench.outputs(&method, Mode::Train(rng));
    let stones = method.stones().unwrap().run(&student[0], bench.teacher(), &[1, 2, 3], Mode::Train(rng)).unwrap();
    let (v, y) = (teacher[0][0].logits().unwrap(), &bench.batch.labels);
    let mean = ((&stones[&1] + &stones[&2]).unwrap() + &stones[&3]).unwrap() / 3.0;
    let dkd = kd_losses::dkd::Params { alpha: 0.5, ..Default::default() };
    let nkd = kd_losses::nkd::Params { temperature: 1.0, ..Default::default() };
    let raw = |name: &str| scalar(&terms.terms.iter().find(|t| t.name == name).unwrap().raw);
    for (name, expected) in [
        ("student.distill", kd_losses::dkd(student[0].logits().unwrap(), v, y, &dkd)),
        ("stone.1.distill", kd_losses::dkd(&stones[&1], v, y, &dkd)),
        ("stone.2.distill", kd_losses::nkd(&stones[&2], v, y, &nkd)),
        ("stone.2.cross", kd_losses::nkd(&stones[&2], mean.as_ref().unwrap(), y, &nkd)),
        ("stone.3.cross", kd_losses::dkd(&stones[&3], mean.as_ref().unwrap(), y, &dkd)),
    ] {
        let expected = scalar(&expected.unwrap().total().unwrap());
        assert!((raw(name) - expected).abs() < 1e-13 * expected.abs().max(1.0), "{name}: {} against {expected}", raw(name));
    }
}

#[test]
fn connectors_resize_and_end_like_the_teachers_block() {
    let layers = |student: Network, teacher: Network, params: Value| -> Vec<Vec<&'static str>> {
        let bench = Bench::new(student, teacher);
        let method = bench.prepared(params);
        (1..=3).map(|i| layers_of(connector(&method, i))).collect()
    };
    let net = |name: &str| zoo(name, 16, DType::F32, 1);
    let (down, up, plain) = (["adaptive_avg_pool"], ["resize_nearest"], ["conv2d", "batch_norm", "relu"]);
    let all = [&plain[..], &plain, &plain];
    assert_eq!(layers(net("resnet8"), net("resnet20"), json!({})), all);
    // ShuffleNet v1 halves the image once more than the ResNet.
    assert_eq!(
        layers(net("ShuffleV1"), net("resnet20"), json!({})),
        [[&up[..], &plain].concat(), [&up[..], &plain].concat(), [&up[..], &plain].concat()]
    );
    assert_eq!(
        layers(net("resnet8"), net("ShuffleV1"), json!({})),
        [[&down[..], &plain].concat(), [&down[..], &plain].concat(), [&down[..], &plain].concat()]
    );
    // A Wide ResNet's first two blocks end in sums.
    assert_eq!(layers(net("resnet8"), net("wrn_16_1"), json!({})), [&plain[..2], &plain[..2], &plain]);
    assert_eq!(layers(net("resnet8"), net("wrn_16_1"), json!({"connector_relu": "always"})), all);
    assert_eq!(layers(net("resnet8"), net("resnet20"), json!({"connector_relu": "never"})), [&plain[..2], &plain[..2], &plain[..2]]);

    // One axis shrinks, the other grows.
    let wide = |name: &str, strides: [usize; 2]| {
        let mut b = kd_nn::GraphBuilder::new(name, &[2, 8, 8]);
        b.conv("conv", kd_nn::Conv::new(3, 3).pad(1).strides(strides));
        b.relu();
        b.block(1, "conv");
        b.global_avg_pool();
        b.cut(Cut::Embedding);
        b.linear("fc", K);
        b.cut(Cut::Logits);
        let network = Network::new(b.finish().unwrap(), DType::F32, &Device::Cpu).unwrap();
        network.init(Rng::new(1)).unwrap();
        network
    };
    let bench = Bench::new(wide("tall", [1, 4]), wide("flat", [4, 1]));
    let mut method = bench.prepared(json!({}));
    assert_eq!(layers_of(connector(&method, 1)), [&down[..], &up, &plain].concat());
    assert_eq!(bench.loss(&mut method).terms.len(), 6);
}

#[test]
fn identities_stand_where_shapes_agree() {
    // The last blocks have 64 channels of 2x2 on both sides, as all others.
    let bench = Bench::resnets(DType::F32);
    assert_eq!(bench.prepared(json!({})).networks().len(), 3);
    assert_eq!(bench.prepared(json!({"connector": "auto_identity"})).networks().len(), 0);
    let bench = Bench::new(small("student", &[3, 6, 8], DType::F32, 1), small("teacher", &[4, 6, 8], DType::F32, 2));
    let method = bench.prepared(json!({"connector": "auto_identity"}));
    assert_eq!(method.stones().unwrap().connectors().map(|(i, _)| i).collect::<Vec<_>>(), [1]);
}

#[test]
fn a_connector_depends_on_its_number_alone() {
    let bench = Bench::small(DType::F32);
    let drawn = |params: Value, stone: usize| vector(connector(&bench.prepared(params), stone), "conv.weight");
    assert_eq!(drawn(json!({}), 3), drawn(json!({"stones": [3]}), 3));
    assert_ne!(drawn(json!({}), 3)[..8], drawn(json!({}), 2)[..8]);
    let mut other = kd_blockwise::BlockKd::new(Default::default()).unwrap();
    other.prepare(&bench.setup(10)).unwrap();
    assert_ne!(vector(connector(&other, 3), "conv.weight"), drawn(json!({}), 3));
}

#[test]
fn batch_norms_may_begin_like_the_teachers_maps() {
    let start = |student: Network, teacher: Network, stone: usize| {
        let bench = Bench::new(student, teacher);
        let method = bench.prepared(json!({"connector_bn": "teacher"}));
        let own = connector(&method, stone);
        let (weight, bias, conv) = (vector(own, "bn.weight"), vector(own, "bn.bias"), vector(own, "conv.weight"));
        let plain = vector(connector(&bench.prepared(json!({})), stone), "conv.weight");
        assert_eq!(conv, plain, "the convolution is drawn as ever");
        let of = |name: &str| values(&bench.teacher().parameters().get(name).unwrap().unwrap());
        let names: Vec<String> = bench.teacher().parameters().keys().into_iter().map(|k| k.0).collect();
        let all: BTreeMap<String, Vec<f64>> = names.iter().filter(|n| !n.ends_with("tracked")).map(|n| (n.clone(), of(n))).collect();
        (weight, bias, all)
    };
    let near = |a: &[f64], b: Vec<f64>| a.len() == b.len() && a.iter().zip(b).all(|(x, y)| (x - y).abs() < 1e-12 * y.abs().max(1.0));

    // Convolution, batch norm, ReLU: scale and shift of that batch norm.
    let (weight, bias, t) = start(small("student", &[3, 4, 6], DType::F64, 1), small("teacher", &[4, 6, 8], DType::F64, 2), 2);
    assert!(near(&weight, t["block2.bn.weight"].iter().map(|w| w.abs()).collect()) && near(&bias, t["block2.bn.bias"].clone()));

    // A sum that the next batch norm reads: its running statistics.
    let (weight, bias, t) = start(zoo("resnet8", 8, DType::F64, 1), zoo("wrn_16_1", 8, DType::F64, 2), 1);
    assert!(near(&weight, t["block2.layer.0.bn1.running_var"].iter().map(|v| v.sqrt()).collect()));
    assert!(near(&bias, t["block2.layer.0.bn1.running_mean"].clone()));

    // A residual sum of two batch norms.
    let (weight, bias, t) = start(zoo("resnet8", 8, DType::F64, 1), zoo("resnet8", 8, DType::F64, 2), 2);
    let (a, b) = ("layer2.0.bn2", "layer2.0.downsample.1");
    let sum = |key: &str, f: fn(f64, f64) -> f64| {
        t[&format!("{a}.{key}")].iter().zip(&t[&format!("{b}.{key}")]).map(|(x, y)| f(*x, *y)).collect::<Vec<_>>()
    };
    assert!(near(&bias, sum("bias", |x, y| x + y)) && near(&weight, sum("weight", |x, y| x.hypot(y))));

    // Through identity shortcuts, shuffles and slices: positive, finite, and one for every channel.
    for (teacher, stone) in [("resnet20", 3), ("resnet20_a", 3), ("ShuffleV2", 1), ("ShuffleV2", 2), ("MobileNetV2", 1), ("vgg8", 3)] {
        let (weight, bias, _) = start(zoo("resnet8", 16, DType::F64, 1), zoo(teacher, 16, DType::F64, 2), stone);
        assert!(weight.iter().all(|w| w.is_finite() && *w > 0.0) && bias.iter().all(|b| b.is_finite()), "{teacher}, stone {stone}");
    }
}

/// The map in front of a block's ReLU really has the moments that a connector starts with.
#[test]
fn the_predicted_moments_are_those_of_the_map() {
    // A teacher whose running statistics are those of one batch, so that its batch norms put out what their parameters say.
    let size = 8;
    let teacher = zoo("resnet14", size, DType::F64, 2);
    let x = normal(6, &[32, 2, size, size], DType::F64);
    for _ in 0..60 {
        teacher.run(&x, Cut::Input, &[Cut::Logits], Mode::Train(Rng::new(0))).unwrap();
    }
    let maps = teacher.run(&x, Cut::Input, &[Cut::Preact(1), Cut::Preact(2), Cut::Preact(3)], Mode::Eval).unwrap();
    let bench = Bench::new(zoo("resnet8", size, DType::F64, 1), teacher);
    let method = bench.prepared(json!({"connector_bn": "teacher"}));
    for stone in 1..=3 {
        let own = connector(&method, stone);
        let map = maps.preact(stone).unwrap();
        let mean = map.mean((0, 2, 3)).unwrap();
        let centred = map.broadcast_sub(&mean.reshape((1, (), 1, 1)).unwrap()).unwrap();
        let std = centred.sqr().unwrap().mean((0, 2, 3)).unwrap().sqrt().unwrap();
        let off = |found: &[f64], expected: &Tensor| {
            let expected = values(expected);
            found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).sum::<f64>() / expected.iter().map(|x| x.abs()).sum::<f64>()
        };
        let (mean_off, std_off) = (off(&vector(own, "bn.bias"), &mean), off(&vector(own, "bn.weight"), &std));
        assert!(mean_off < 0.1 && std_off < 0.15, "stone {stone}: mean off by {mean_off}, deviation by {std_off}");
    }
}

const FAMILIES: [&str; 8] = ["resnet8", "resnet20_a", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2", "fnkd_resnet20_v2"];

#[test]
fn all_families_have_stones_together() {
    let networks: Vec<Network> = FAMILIES.iter().map(|name| zoo(name, 16, DType::F32, 1).frozen()).collect();
    for student in &networks {
        for teacher in &networks {
            let (s, t) = (student.spec(), teacher.spec());
            let stones = SteppingStones::new(s, teacher, &Params::default(), DType::F32, &Device::Cpu, Rng::new(1)).unwrap();
            let cuts: Vec<_> = stones.cuts().collect();
            let n = s.blocks.len().min(t.blocks.len());
            assert_eq!((stones.blocks(), cuts.len(), stones.connectors().count()), (n, n, n), "{}, {}", s.name, t.name);
            assert_eq!(
                cuts[n - 1],
                (n, Cut::Block(s.blocks.len()), Cut::Block(t.blocks.len())),
                "{}, {}: the last blocks meet",
                s.name,
                t.name
            );
        }
    }
}

#[test]
fn all_families_train_together() {
    for (student, teacher) in FAMILIES.iter().zip(FAMILIES.iter().cycle().skip(1)) {
        let bench = Bench::new(zoo(student, 16, DType::F32, 1), zoo(teacher, 16, DType::F32, 2));
        let mut method = bench.prepared(json!({}));
        let loss = bench.loss(&mut method).total().unwrap();
        assert!(scalar(&loss).is_finite(), "{student}, {teacher}");
        let networks = method.networks();
        let mut models: Vec<&dyn Model> = vec![&bench.student];
        models.extend(networks.iter().map(|n| n.as_ref()));
        for (model, reached) in models.iter().zip(reached(&loss, &models)) {
            assert_eq!(reached.len(), model.params().unwrap().entries().len(), "{student}, {teacher}: {}", model.spec().name);
        }
    }
}

#[test]
fn a_given_split_is_used() {
    let bench = Bench::new(zoo("resnet8", 8, DType::F32, 1), zoo("vgg8", 8, DType::F32, 2));
    let cuts = |params: Value| bench.prepared(params).stones().unwrap().cuts().collect::<Vec<_>>();
    let at = |i, s, t| (i, Cut::Block(s), Cut::Block(t));
    assert_eq!(cuts(json!({})), [at(1, 1, 2), at(2, 2, 3), at(3, 3, 5)]);
    assert_eq!(cuts(json!({"teacher_blocks": [1, 2, 3]})), [at(1, 1, 1), at(2, 2, 2), at(3, 3, 3)]);
    assert_eq!(cuts(json!({"student_blocks": [2, 3], "teacher_blocks": [3, 4], "stones": [2]})), [at(2, 3, 4)]);
    assert_eq!(cuts(json!({"blocks": 1})), [at(1, 3, 5)]);
    let mut method = bench.prepared(json!({"student_blocks": [2, 3], "teacher_blocks": [3, 4]}));
    assert_eq!(method.needs().student, [Cut::Block(2), Cut::Block(3), Cut::Logits]);
    assert_eq!(bench.loss(&mut method).terms.len(), 9);
}

#[test]
fn a_teacher_of_another_type_serves() {
    let bench = Bench::small(DType::F64);
    let mixed = Bench::new(small("student", &[3, 4, 6], DType::F64, 1), small("teacher", &[4, 6, 8], DType::F32, 2));
    let run = |bench: &Bench| {
        let method = bench.prepared(json!({}));
        method.stones().unwrap().run(&outputs(bench, &method), bench.teacher(), &[1, 2, 3], Mode::BatchStats).unwrap()
    };
    let (expected, found) = (run(&bench), run(&mixed));
    for i in 1..=3 {
        assert_eq!(found[&i].dtype(), DType::F64);
        let off = gap(&found[&i], &expected[&i]);
        assert!(off > 0.0 && off < 1e-5, "stone {i}: {off}");
    }
}

#[test]
fn the_listing_is_what_is_read() {
    let entry = &kd_blockwise::registry()[0];
    let mut defaults = serde_json::Map::new();
    for p in entry.parameters {
        defaults.insert(p.name.to_string(), serde_json::from_str(p.default).unwrap_or_else(|e| panic!("{}: {e}", p.name)));
    }
    let read: Params = serde_json::from_value(Value::Object(defaults.clone())).unwrap();
    assert_eq!(read, Params::default());
    let written = serde_json::to_value(&read).unwrap();
    assert_eq!(
        written.as_object().unwrap().keys().collect::<Vec<_>>(),
        defaults.keys().collect::<Vec<_>>(),
        "keys of Params and of the listing"
    );
    assert_eq!((entry.build)(&written).unwrap().name(), "block_kd");
}
