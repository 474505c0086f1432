//! What must hold for any Block-KD, one test each.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Tensor, Var};
use kd_blockwise::{Params, Stones, block_kd};
use kd_core::{Cut, LossTerms, Method, Mode, Model, Outputs};
use kd_nn::Network;
use serde_json::{Value, json};

use super::support::*;

fn stone_logits(bench: &Bench, method: &kd_blockwise::BlockKd, teacher: &dyn Model, active: &[usize]) -> BTreeMap<usize, Tensor> {
    let (student, _) = bench.outputs(method, Mode::Eval);
    method.stones().unwrap().run(&student[0], teacher, active, Mode::Eval).unwrap()
}

fn term<'t>(terms: &'t LossTerms, name: &str) -> &'t kd_core::Term {
    terms.terms.iter().find(|t| t.name == name).unwrap_or_else(|| panic!("no term {name}"))
}

/// A student made of the teacher's blocks, with a classifier of its own.
fn copied(teacher: impl Fn(u64) -> Network) -> Bench {
    let (student, teacher) = (teacher(1), teacher(2));
    let from = teacher.parameters();
    student.parameters().assign(|name| if name.starts_with("fc.") { None } else { from.get(name).map(Result::unwrap) }).unwrap();
    Bench::new(student, teacher)
}

#[test]
fn invariant_1_the_teachers_own_blocks_give_the_teachers_logits() {
    let benches = [
        copied(|seed| small("copied", &[4, 6, 8], DType::F64, seed)),
        copied(|seed| small("copied", &[4, 6, 8], DType::F32, seed)),
        copied(|seed| zoo("resnet20", 16, DType::F32, seed)),
        copied(|seed| zoo("wrn_16_1", 16, DType::F32, seed)),
    ];
    for bench in benches {
        let name = bench.student.spec().name.clone();
        let method = bench.prepared(json!({"connector": "auto_identity"}));
        assert!(method.networks().is_empty(), "{name}: identities only");
        let (student, teacher) = bench.outputs(&method, Mode::Eval);
        let (student, teacher) = (student[0].logits().unwrap(), teacher[0][0].logits().unwrap());
        assert!(gap(student, teacher) > 0.0);
        let exact = |t: &Tensor| values(t).into_iter().map(f64::to_bits).collect::<Vec<_>>();
        let mut stones = BTreeMap::new();
        for i in 1..=3 {
            stones.extend(stone_logits(&bench, &method, bench.teacher(), &[i]));
            assert_eq!(exact(&stones[&i]), exact(teacher), "{name}, stone {i}");
        }
        let terms = block_kd(student, teacher, &bench.batch.labels, &stones, 3, &Params::default()).unwrap();
        for i in 1..=3 {
            assert_eq!(scalar(&term(&terms, &format!("stone.{i}.distill")).raw), 0.0, "{name}");
        }
        let (cross, distill) = (scalar(&term(&terms, "student.cross").raw), scalar(&term(&terms, "student.distill").raw));
        assert!(distill > 0.0 && (cross - distill).abs() <= 1e-5 * distill, "{name}: {cross} and {distill}");
    }
}

#[test]
fn invariant_2_the_teacher_stays_as_it_is() {
    for tail in ["eval", "train"] {
        for bench in [Bench::small(DType::F32), Bench::resnets(DType::F32)] {
            let mut method = bench.prepared(json!({"tail_bn": tail}));
            let (before, counters) = (bits(bench.teacher().parameters()), bench.teacher().parameters().counters());
            for step in 0..3 {
                bench.step(&mut method, step);
            }
            let loss = bench.loss(&mut method).total().unwrap();
            let found = reached(&loss, &[bench.teacher(), &bench.student]);
            assert_eq!(found[0], Vec::<String>::new(), "{tail}: a gradient at the teacher");
            assert_eq!(found[1].len(), bench.student.parameters().entries().len(), "{tail}: all of the student");
            assert!(values(&bench.teacher().parameters().grads().tensor()).iter().all(|&g| g == 0.0));
            assert!(bits(bench.teacher().parameters()) == before && bench.teacher().parameters().counters() == counters, "{tail}");
        }
    }
}

#[test]
fn invariant_3_a_stone_holds_the_teachers_later_blocks_and_no_others() {
    let bench = Bench::small(DType::F64);
    let method = bench.prepared(json!({}));
    let (student, _) = bench.outputs(&method, Mode::Eval);
    let all = stone_logits(&bench, &method, bench.teacher(), &[1, 2, 3]);

    // By hand: connector on the student's last map, then pooling and classifier of the teacher.
    let connector = &method.networks()[2];
    let map = connector.run(student[0].block(3).unwrap(), Cut::Input, &[Cut::Block(1)], Mode::Eval).unwrap();
    let by_hand = bench.teacher().run(map.block(1).unwrap(), Cut::Block(3), &[Cut::Logits], Mode::Eval).unwrap();
    assert!(gap(&all[&3], by_hand.logits().unwrap()) < 1e-14);

    for j in 1..=4 {
        let other = small("teacher", &[4, 6, 8], DType::F64, 2).frozen();
        let changed = if j == 4 { "fc.".to_string() } else { format!("block{j}.") };
        let from = small("another", &[4, 6, 8], DType::F64, 7);
        other.parameters().assign(|n| if n.starts_with(&changed) { from.parameters().get(n).map(Result::unwrap) } else { None }).unwrap();
        let moved = stone_logits(&bench, &method, &other, &[1, 2, 3]);
        let which: Vec<usize> = (1..=3).filter(|i| gap(&moved[i], &all[i]) > 0.0).collect();
        assert_eq!(which, (1..j).collect::<Vec<_>>(), "another block {j} of the teacher");
    }
}

#[test]
fn invariant_4_gradients_reach_the_student_as_far_as_the_stone_goes() {
    for (bench, block) in [
        (Bench::small(DType::F64), (|name: &str| name[5..6].parse().ok()) as fn(&str) -> Option<usize>),
        (Bench::resnets(DType::F32), |name: &str| if name.starts_with("layer") { name[5..6].parse().ok() } else { Some(1) }),
    ] {
        let block = |name: &str| if name.starts_with("fc.") { 4 } else { block(name).unwrap() };
        let mut method = bench.prepared(json!({"stone_decay": 1.0}));
        let terms = bench.loss(&mut method);
        let networks = method.networks();
        let mut models: Vec<&dyn Model> = vec![&bench.student];
        models.extend(networks.iter().map(|n| n.as_ref()));
        let all: Vec<String> = bench.student.parameters().entries().iter().map(|e| e.name.clone()).collect();
        for t in &terms.terms {
            let found = moved(&t.raw, &models);
            let stone: Option<usize> = t.name.strip_prefix("stone.").map(|rest| rest[..1].parse().unwrap());
            let expected: Vec<String> = all.iter().filter(|n| block(n) <= stone.unwrap_or(4)).cloned().collect();
            assert_eq!(found[0], expected, "{}", t.name);
            for (i, connector) in (1..).zip(&found[1..]) {
                assert_eq!(connector.len(), if stone == Some(i) { 3 } else { 0 }, "{}: connector {i}", t.name);
            }
        }
        assert_eq!(terms.terms.len(), 12);
    }
}

#[test]
fn invariant_5_without_stones_it_is_ce_and_kd() {
    /// Plain KD as two objectives.
    struct Plain(Vec<(f64, Box<dyn Method>)>);
    impl Method for Plain {
        fn name(&self) -> &'static str {
            "plain"
        }
        fn needs(&self) -> kd_core::Needs {
            self.0.iter().fold(kd_core::Needs::logits(), |all, (_, m)| all.merge(&m.needs()))
        }
        fn loss(&mut self, step: &kd_core::StepView<'_>) -> kd_core::Result<LossTerms> {
            let mut all = LossTerms::new();
            for (weight, method) in &mut self.0 {
                all.extend(method.loss(step)?.scaled(*weight));
            }
            Ok(all)
        }
    }
    let weights = json!({"alpha": 0.1, "beta": 0.9, "gamma": 0.0});
    let with = |more: Value| {
        let mut params = weights.clone();
        params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        params
    };
    for fresh in [Bench::small as fn(DType) -> Bench, Bench::resnets] {
        let (plain, values_) = {
            let bench = fresh(DType::F32);
            let build = |name: &str| (kd_losses::find(name).unwrap().build)(&json!({})).unwrap();
            let mut method = Plain(vec![(0.1, build("ce")), (0.9, build("kd"))]);
            let losses: Vec<f64> = (0..4).map(|step| bench.step(&mut method, step)).collect();
            (bits(bench.student.parameters()), losses)
        };
        // No stones at all, and stones of which none is active.
        for params in [with(json!({"stones": []})), with(json!({"stone_schedule": [{"from": 1, "stones": [1]}]}))] {
            let bench = fresh(DType::F32);
            let mut method = bench.prepared(params.clone());
            let losses: Vec<f64> = (0..4).map(|step| bench.step(&mut method, step)).collect();
            assert_eq!(losses, values_, "{params}");
            assert!(bits(bench.student.parameters()) == plain, "{params}: the student differs from plain KD's");
        }
        // The comparison can fail: with a stone the student is another one.
        let bench = fresh(DType::F32);
        let mut method = bench.prepared(with(json!({"stones": [3]})));
        for step in 0..4 {
            bench.step(&mut method, step);
        }
        assert!(bits(bench.student.parameters()) != plain);
    }
}

/// Random logits of student, teacher and stones.
fn random(stones: &[usize]) -> (Tensor, Tensor, Tensor, BTreeMap<usize, Tensor>) {
    let labels = Tensor::new(&[0i64, 3, 4, 3], &candle_core::Device::Cpu).unwrap();
    let logits = |seed| normal(seed, &[B, K], DType::F64);
    (logits(1), logits(2), labels, stones.iter().map(|&i| (i, logits(10 + i as u64))).collect())
}

#[test]
fn invariant_6_coefficients_halve_and_one_block_is_one_stone() {
    let (s, t, y, stones) = random(&[1, 2, 3]);
    let weights = |params: &Params, kind: &str| -> Vec<f64> {
        let terms = block_kd(&s, &t, &y, &stones, 3, params).unwrap();
        (1..=3).map(|i| term(&terms, &format!("stone.{i}.{kind}")).weight).collect()
    };
    let plain = Params::default();
    assert_eq!(weights(&plain, "task"), [0.25, 0.5, 1.0]);
    assert_eq!(weights(&plain, "distill"), [0.25, 0.5, 1.0]);
    assert_eq!(weights(&plain, "cross"), [1.0, 1.0, 1.0]);
    assert_eq!(weights(&Params { decay_cross: true, gamma: 2.0, ..plain.clone() }, "cross"), [0.5, 1.0, 2.0]);
    let flat = Params { stone_decay: 1.0, decay_cross: true, ..plain.clone() };
    assert!(["task", "distill", "cross"].iter().all(|kind| weights(&flat, kind) == [1.0, 1.0, 1.0]));

    let (s, t, y, one) = random(&[1]);
    let terms = block_kd(&s, &t, &y, &one, 1, &plain).unwrap();
    assert_eq!(terms.terms.iter().map(|t| t.weight).collect::<Vec<_>>(), [1.0; 6]);
    assert_eq!(scalar(&term(&terms, "stone.1.cross").raw), 0.0, "the mean is that stone");
    let expected = kd_losses::kd(&s, &one[&1], &Default::default()).unwrap().total().unwrap();
    assert_eq!(scalar(&term(&terms, "student.cross").raw), scalar(&expected));
}

#[test]
fn invariant_7_the_order_of_stones_is_nothing_and_detaching_changes_gradients_alone() {
    let bench = Bench::small(DType::F64);
    let value = |stones: Value| scalar(&bench.loss(&mut bench.prepared(json!({"stones": stones}))).total().unwrap());
    assert_eq!(value(json!([3, 1, 2])).to_bits(), value(json!("all")).to_bits());
    assert_ne!(value(json!([3, 1])), value(json!("all")));

    let (s, t, y, stones) = random(&[1, 2, 3]);
    let vars: BTreeMap<usize, Var> = stones.iter().map(|(&i, z)| (i, Var::from_tensor(z).unwrap())).collect();
    let stones: BTreeMap<usize, Tensor> = vars.iter().map(|(&i, v)| (i, v.as_tensor().clone())).collect();
    for distance in ["kd", "dkd"] {
        let run = |detach_ensemble: bool| {
            let params = Params { detach_ensemble, distance: kd_blockwise::Distance::new(distance), ..Params::default() };
            let loss = block_kd(&s, &t, &y, &stones, 3, &params).unwrap().total().unwrap();
            let grads = loss.backward().unwrap();
            (scalar(&loss), vars.values().map(|v| grads.get(v).unwrap().clone()).collect::<Vec<_>>())
        };
        let ((fixed, fixed_grads), (live, live_grads)) = (run(true), run(false));
        assert_eq!(fixed.to_bits(), live.to_bits(), "{distance}");
        assert!(fixed_grads.iter().zip(&live_grads).all(|(a, b)| gap(a, b) > 1e-4), "{distance}");
    }
}

#[test]
fn invariant_8_the_student_alone_is_shipped_and_connectors_resume() {
    let bench = Bench::resnets(DType::F32);
    let mut method = bench.prepared(json!({}));
    for step in 0..2 {
        bench.step(&mut method, step);
    }

    let student: Arc<dyn Model> = Arc::new(zoo("resnet8", 8, DType::F32, 1));
    let shipped = method.deploy(Arc::clone(&student)).unwrap();
    assert!(Arc::ptr_eq(&shipped, &student));
    let (shipped, plain) = (shipped.as_any().downcast_ref::<Network>().unwrap(), zoo("resnet8", 8, DType::F32, 3));
    assert_eq!(shipped.parameters().keys(), plain.parameters().keys());
    assert_eq!(shipped.graph().macs(&[2, 8, 8]).unwrap(), plain.graph().macs(&[2, 8, 8]).unwrap());

    // A checkpoint of student and method's networks, taken up by a method that began elsewhere.
    let save = |p: &kd_core::Params| p.state_dict().unwrap();
    let saved: Vec<_> = method.networks().iter().map(|n| save(n.params().unwrap())).collect();
    let saved_student = save(bench.student.parameters());
    let unbroken = [bench.step(&mut method, 2), bench.step(&mut method, 3)];

    let other = Bench::new(zoo("resnet8", 8, DType::F32, 11), zoo("resnet20", 8, DType::F32, 2));
    let mut resumed = kd_blockwise::BlockKd::new(Params::default()).unwrap();
    resumed.prepare(&other.setup(77)).unwrap();
    let load = |p: &kd_core::Params, from: &[(String, Tensor)]| {
        p.assign(|name| from.iter().find(|(n, _)| n == name).map(|(_, t)| t.clone())).unwrap();
    };
    load(other.student.parameters(), &saved_student);
    resumed.networks().iter().zip(&saved).for_each(|(n, from)| load(n.params().unwrap(), from));
    assert_eq!([other.step(&mut resumed, 2), other.step(&mut resumed, 3)], unbroken);
    assert!(bits(other.student.parameters()) == bits(bench.student.parameters()));
    for (a, b) in resumed.networks().iter().zip(method.networks()) {
        assert!(bits(a.params().unwrap()) == bits(b.params().unwrap()));
    }
}

#[test]
fn invariant_9_blocks_one_after_another_are_the_whole_network() {
    for name in ["resnet8", "resnet20", "wrn_16_1", "vgg8", "ShuffleV2", "MobileNetV2"] {
        let network = zoo(name, 16, DType::F32, 1);
        let x = normal(3, &[2, 2, 16, 16], DType::F32);
        let whole = network.run(&x, Cut::Input, &[Cut::Logits], Mode::Eval).unwrap();
        let (mut from, mut here) = (Cut::Input, x);
        for cut in (1..=network.spec().blocks.len()).map(Cut::Block).chain([Cut::Logits]) {
            here = network.run(&here, from, &[cut], Mode::Eval).unwrap().get(cut).unwrap().clone();
            from = cut;
        }
        let exact = |t: &Tensor| values(t).into_iter().map(f64::to_bits).collect::<Vec<_>>();
        assert_eq!(exact(&here), exact(whole.logits().unwrap()), "{name}");
    }
}

#[test]
fn invariant_10_a_connectors_gradient_through_the_frozen_teacher_is_the_difference_quotient() {
    for (bench, h) in [(Bench::small(DType::F64), 1e-6), (Bench::resnets(DType::F64), 1e-6)] {
        let method = bench.prepared(json!({}));
        let (student, teacher) = bench.outputs(&method, Mode::BatchStats);
        let student = Outputs::new(student[0].iter().map(|(cut, t)| (cut, t.detach())));
        // A detached mean is no constant to a difference quotient.
        let live = Params { detach_ensemble: false, ..Params::default() };
        let value = || -> Tensor {
            let stones = method.stones().unwrap().run(&student, bench.teacher(), &[1, 2, 3], Mode::BatchStats).unwrap();
            let teacher = teacher[0][0].logits().unwrap();
            block_kd(student.logits().unwrap(), teacher, &bench.batch.labels, &stones, 3, &live).unwrap().total().unwrap()
        };
        let networks = method.networks();
        let models: Vec<&dyn Model> = networks.iter().map(|n| n.as_ref()).collect();
        let gradients = kd_nn::backward(&value(), &models).unwrap();
        for (stone, (model, gradient)) in (1..).zip(models.iter().zip(&gradients.networks)) {
            let (params, gradient) = (model.params().unwrap(), values(&gradient.as_ref().unwrap().flat));
            for entry in params.entries() {
                let at = entry.offset + entry.len() / 2;
                let moved = |by: f64| {
                    params.values().write::<f64, _>(|v| v[at] += by).unwrap();
                    let value = scalar(&value());
                    params.values().write::<f64, _>(|v| v[at] -= by).unwrap();
                    value
                };
                let numeric = (moved(h) - moved(-h)) / (2.0 * h);
                let off = (gradient[at] - numeric).abs();
                assert!(off <= 1e-6 * (1.0 + numeric.abs()), "connector {stone}, {}: {} against {numeric}", entry.name, gradient[at]);
                assert!(numeric.abs() > 1e-9, "connector {stone}, {}: nothing to compare", entry.name);
            }
        }
    }
}

#[test]
fn stones_as_a_config_says_them() {
    for (stones, text) in [(Stones::All, json!("all")), (Stones::Some(vec![2, 3]), json!([2, 3]))] {
        assert_eq!(serde_json::to_value(&stones).unwrap(), text);
        assert_eq!(serde_json::from_value::<Stones>(text).unwrap(), stones);
    }
    assert!(serde_json::from_value::<Stones>(json!("last")).unwrap_err().to_string().contains("\"all\" or a list"));
}
