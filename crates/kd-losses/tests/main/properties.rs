//! What the formulas promise for any input.

use candle_core::{DType, Device, Tensor, Var};
use kd_core::{LossTerms, Rng};
use kd_losses::{ClassMeans, ce, dkd, fnkd, he, kd, label_smoothing, nd, nd_cosine, nd_infonce, nkd, norm_match, sifn, tf_nkd, uskd};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use crate::main::fixtures::seeds;

/// The same cases in every run.
const SEED: u64 = 1;

fn normal(seed: u64, shape: &[usize], scale: f64) -> Tensor {
    let n = shape.iter().product::<usize>() as u64;
    let values: Vec<f64> = (0..n).map(|i| Rng::new(seed).normal(i) * scale).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn classes(seed: u64, b: usize, k: usize) -> Tensor {
    let ids: Vec<i64> = (0..b as u64).map(|i| Rng::new(seed).named("labels").below(i, k as u64) as i64).collect();
    Tensor::new(ids, &Device::Cpu).unwrap()
}

fn value(terms: &LossTerms) -> f64 {
    terms.total().unwrap().to_dtype(DType::F64).unwrap().to_scalar().unwrap()
}

fn gradient(x: &Var, terms: &LossTerms) -> Vec<f64> {
    let grads = terms.total().unwrap().backward().unwrap();
    grads.get(x).map_or_else(|| vec![0.0; x.elem_count()], |g| g.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap())
}

fn near(a: f64, b: f64, tolerance: f64) -> bool {
    (a - b).abs() <= tolerance * (1.0 + a.abs().max(b.abs()))
}

/// The losses of logits, by name, as functions of the student's and the teacher's.
type OfLogits = (&'static str, fn(&Tensor, &Tensor, &Tensor, f64) -> LossTerms);
const OF_LOGITS: &[OfLogits] = &[
    ("ce", |z, _, y, _| ce(z, y).unwrap()),
    ("label_smoothing", |z, _, y, _| label_smoothing(z, y, &Default::default()).unwrap()),
    ("kd", |z, v, _, temperature| kd(z, v, &kd_losses::kd::Params { temperature, ..Default::default() }).unwrap()),
    ("dkd", |z, v, y, temperature| dkd(z, v, y, &kd_losses::dkd::Params { temperature, ..Default::default() }).unwrap()),
    ("nkd", |z, v, y, temperature| nkd(z, v, y, &kd_losses::nkd::Params { temperature, ..Default::default() }).unwrap()),
    ("tf_nkd", |z, _, y, _| tf_nkd(z, y).unwrap()),
    ("uskd", |z, v, y, _| uskd(z, v, y, &Default::default()).unwrap()),
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, rng_seed: RngSeed::Fixed(SEED), ..ProptestConfig::default() })]

    #[test]
    fn a_constant_added_to_a_row_of_logits_changes_nothing(seed in any::<u64>(), b in 1usize..7, k in 2usize..12, temperature in 0.5f64..20.0) {
        let (z, v, y) = (normal(seed, &[b, k], 3.0), normal(seed ^ 1, &[b, k], 3.0), classes(seed, b, k));
        let (dz, dv) = (normal(seed ^ 2, &[b, 1], 20.0), normal(seed ^ 3, &[b, 1], 20.0));
        let (z2, v2) = (z.broadcast_add(&dz).unwrap(), v.broadcast_add(&dv).unwrap());
        for (name, loss) in OF_LOGITS {
            let (a, c) = (value(&loss(&z, &v, &y, temperature)), value(&loss(&z2, &v2, &y, temperature)));
            prop_assert!(near(a, c, 1e-9), "{name}: {a} became {c}");
        }
    }

    #[test]
    fn gradients_of_logits_sum_to_zero_and_are_those_of_the_value(seed in any::<u64>(), b in 1usize..5, k in 2usize..9, temperature in 0.5f64..10.0) {
        let (v, y) = (normal(seed ^ 1, &[b, k], 3.0), classes(seed, b, k));
        let z = Var::from_tensor(&normal(seed, &[b, k], 3.0)).unwrap();
        let along = normal(seed ^ 4, &[b, k], 1.0);
        let slope: Vec<f64> = along.flatten_all().unwrap().to_vec1().unwrap();
        for (name, loss) in OF_LOGITS {
            let grad = gradient(&z, &loss(&z, &v, &y, temperature));
            for row in grad.chunks(k) {
                prop_assert!(row.iter().sum::<f64>().abs() < 1e-10, "{name}: {row:?}");
            }
            if matches!(*name, "tf_nkd" | "uskd") {
                continue; // detached weights: the gradient is not the value's
            }
            let at = |h: f64| value(&loss(&(z.as_tensor() + (&along * h).unwrap()).unwrap().detach(), &v, &y, temperature));
            let (found, expected) = (grad.iter().zip(&slope).map(|(g, s)| g * s).sum::<f64>(), (at(1e-5) - at(-1e-5)) / 2e-5);
            prop_assert!((found - expected).abs() < 1e-6 * (1.0 + expected.abs()), "{name}: {found}, by differences {expected}");
        }
    }

    #[test]
    fn f32_keeps_the_digits_of_f64(seed in any::<u64>(), b in 1usize..4, k in 2usize..120, hot in any::<bool>()) {
        let temperature = if hot { 20.0 } else { 1.0 };
        let (z, v, y) = (normal(seed, &[b, k], 2.0), normal(seed ^ 1, &[b, k], 3.0), classes(seed, b, k));
        let (z, v) = (z.to_dtype(DType::F32).unwrap(), v.to_dtype(DType::F32).unwrap());
        let exact = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
        for (name, loss) in OF_LOGITS.iter().filter(|(name, _)| *name != "uskd") {
            let (found, expected) = (value(&loss(&z, &v, &y, temperature)), value(&loss(&exact(&z), &exact(&v), &y, temperature)));
            prop_assert!((found - expected).abs() <= 2e-5 * expected.abs() + 5e-6, "{name}: {found} in f32, {expected} in f64");
        }
    }

    #[test]
    fn a_student_that_equals_its_teacher_is_left_alone(seed in any::<u64>(), b in 1usize..6, k in 2usize..12, temperature in 0.5f64..20.0, scale in 0.1f64..80.0) {
        for dtype in [DType::F64, DType::F32] {
            let v = normal(seed, &[b, k], scale).to_dtype(dtype).unwrap();
            let (z, y) = (Var::from_tensor(&v).unwrap(), classes(seed, b, k));
            for (name, loss) in OF_LOGITS.iter().filter(|(name, _)| matches!(*name, "kd" | "dkd")) {
                let terms = loss(&z, &v, &y, temperature);
                prop_assert_eq!(value(&terms), 0.0, "{}", name);
                prop_assert!(gradient(&z, &terms).iter().all(|&g| g == 0.0), "{} {:?}", name, dtype);
            }
        }
    }

    #[test]
    fn everything_is_finite_at_huge_logits(seed in any::<u64>(), b in 1usize..5, k in 2usize..12) {
        for dtype in [DType::F64, DType::F32] {
            let sign = |seed| (normal(seed, &[b, k], 1.0).sign().unwrap() * 80.0).unwrap().to_dtype(dtype).unwrap();
            let (z, v, y) = (Var::from_tensor(&sign(seed)).unwrap(), sign(seed ^ 1), classes(seed, b, k));
            for (name, loss) in OF_LOGITS {
                let terms = loss(&z, &v, &y, 1.0);
                prop_assert!(value(&terms).is_finite(), "{name}");
                prop_assert!(gradient(&z, &terms).iter().all(|g| g.is_finite()), "{name}");
            }
        }
    }

    #[test]
    fn hard_labels_equal_their_one_hot_rows(seed in any::<u64>(), b in 1usize..6, k in 3usize..9) {
        let (z, v, y) = (normal(seed, &[b, k], 3.0), normal(seed ^ 1, &[b, k], 3.0), classes(seed, b, k));
        let ids = y.to_vec1::<i64>().unwrap();
        let rows: Vec<f64> = ids.iter().flat_map(|&id| (0..k as i64).map(move |c| f64::from(u8::from(c == id)))).collect();
        let soft = Tensor::from_vec(rows, (b, k), &Device::Cpu).unwrap();
        for (name, loss) in OF_LOGITS.iter().filter(|(name, _)| *name != "uskd") {
            // uskd's release takes a second class away from the non-targets whenever targets are soft.
            prop_assert!(near(value(&loss(&z, &v, &y, 2.0)), value(&loss(&z, &v, &soft, 2.0)), 1e-12), "{name}");
        }
        let (f, means) = (normal(seed ^ 2, &[b, 4], 1.0), ClassMeans::new(&normal(seed ^ 3, &[k, 4], 1.0)).unwrap());
        for loss in [nd_cosine, nd_like] {
            let params = Default::default();
            prop_assert!(near(value(&loss(&f, &means, &y, &params).unwrap()), value(&loss(&f, &means, &soft, &params).unwrap()), 1e-12));
        }
    }

    #[test]
    fn the_norm_and_direction_loss_stays_in_its_range(seed in any::<u64>(), b in 1usize..6, d in 1usize..9, scale in 0.01f64..100.0) {
        let (y, means) = (classes(seed, b, 4), ClassMeans::new(&normal(seed ^ 2, &[4, d], 5.0)).unwrap());
        let (s, t) = (Var::from_tensor(&normal(seed, &[b, d], scale)).unwrap(), normal(seed ^ 1, &[b, d], 1.0));
        let terms = nd(&s, &t, &means, &y, &Default::default()).unwrap();
        prop_assert!((-1e-12..=2.0 + 1e-12).contains(&value(&terms)));
        // Beyond the teacher's length only the direction counts: the gradient is at a right angle to the feature.
        let (grad, f) = (gradient(&s, &terms), s.to_vec2::<f64>().unwrap());
        let norm = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>().sqrt();
        for ((g, f), t) in grad.chunks(d).zip(&f).zip(t.to_vec2::<f64>().unwrap()) {
            let radial: f64 = g.iter().zip(f).map(|(g, f)| g * f).sum();
            prop_assert!(norm(f) < norm(&t) || radial.abs() < 1e-12, "{radial}");
        }
    }

    #[test]
    fn lengths_do_not_turn_directions(seed in any::<u64>(), b in 1usize..6, d in 1usize..9, factor in 0.1f64..50.0) {
        let (f, y) = (normal(seed, &[b, d], 1.0), classes(seed, b, 4));
        let (z, means) = (normal(seed ^ 1, &[b, 4], 1.0), ClassMeans::new(&normal(seed ^ 2, &[4, d], 5.0)).unwrap());
        let longer = (&f * factor).unwrap();
        let infonce = |f: &Tensor| value(&nd_infonce(f, &means, &y, &Default::default()).unwrap());
        prop_assert!(near(value(&nd_cosine(&f, &means, &y, &Default::default()).unwrap()), value(&nd_cosine(&longer, &means, &y, &Default::default()).unwrap()), 1e-9));
        prop_assert!(near(infonce(&f), infonce(&longer), 1e-9));
        let scaled = (&z * factor).unwrap();
        prop_assert!(near(value(&he(&z, &f, &y, &Default::default()).unwrap()), value(&he(&scaled, &longer, &y, &Default::default()).unwrap()), 1e-9));
    }
}

/// `nd` against a teacher of the student's own length.
fn nd_like(f: &Tensor, means: &ClassMeans, y: &Tensor, params: &kd_losses::nd::Params) -> kd_core::Result<LossTerms> {
    nd(f, f, means, y, params)
}

#[test]
fn no_gradient_reaches_the_teacher() {
    let (b, k, d) = (4, 5, 3);
    let var = |seed, shape: &[usize]| Var::from_tensor(&normal(seed, shape, 2.0)).unwrap();
    let (z, f, y) = (var(1, &[b, k]), var(2, &[b, d]), classes(3, b, k));
    let (v, t) = (var(4, &[b, k]), var(5, &[b, d]));
    let means = ClassMeans::new(&normal(6, &[k, d], 1.0)).unwrap();
    let (student, teacher) = (kd_losses::Side { logits: &z, embedding: &f }, kd_losses::Side { logits: &v, embedding: &t });
    let losses = [
        kd(&z, &v, &Default::default()),
        dkd(&z, &v, &y, &Default::default()),
        nkd(&z, &v, &y, &Default::default()),
        fnkd(student, teacher, &Default::default()),
        kd_losses::fnkd_released(&f, &t, |g| Ok(g.clone()), |g| Ok(g.clone()), &Default::default()),
        nd(&f, &t, &means, &y, &Default::default()),
        norm_match(&f, &t, &Default::default()),
        kd_losses::kd_pp(student, teacher, &means, &y, 30, &Default::default()),
        kd_losses::dkd_pp(student, teacher, &means, &y, 30, &Default::default()),
    ];
    for (i, loss) in losses.into_iter().enumerate() {
        let grads = loss.unwrap().total().unwrap().backward().unwrap();
        assert!(grads.get(&v).is_none() && grads.get(&t).is_none(), "loss {i}");
        assert!(grads.get(&z).is_some() || grads.get(&f).is_some(), "loss {i}");
    }
}

#[test]
fn sifn_lengthens_every_feature_at_the_same_pace() {
    let f = Var::new(&[[3f64, 4.0], [0.0, 0.5], [0.0, 0.0]], &Device::Cpu).unwrap();
    let terms = sifn(&f, &kd_losses::sifn::Params { step: 0.5, ..Default::default() }).unwrap();
    assert_eq!(value(&terms), 0.25);
    let expected = [-0.2, -4.0 / 15.0, 0.0, -1.0 / 3.0, 0.0, 0.0];
    for (g, e) in gradient(&f, &terms).iter().zip(expected) {
        assert!((g - e).abs() < 1e-15, "{g} {e}");
    }
}

#[test]
fn a_weight_of_zero_costs_no_gradient() {
    let z = Var::new(&[[1f64, 2.0, 0.5]], &Device::Cpu).unwrap();
    let (v, y) = (Tensor::new(&[[0f64, 1.0, 2.0]], &Device::Cpu).unwrap(), Tensor::new(&[1i64], &Device::Cpu).unwrap());
    let silent = dkd(&z, &v, &y, &kd_losses::dkd::Params { alpha: 0.0, beta: 0.0, ..Default::default() }).unwrap();
    assert!(silent.total().unwrap().backward().unwrap().get(&z).is_none());
}

#[test]
fn two_labels_of_two_classes_leave_no_class_to_uskd() {
    let z = Var::new(&[[1f64, 2.0]], &Device::Cpu).unwrap();
    let targets = Tensor::new(&[[0.25f64, 0.75]], &Device::Cpu).unwrap();
    let terms = uskd(&z, &z, &targets, &Default::default()).unwrap();
    assert_eq!(terms.terms.iter().find(|t| t.name == "non_target").unwrap().raw.to_scalar::<f64>().unwrap(), 0.0);
    assert!(gradient(&z, &terms).iter().all(|g| g.is_finite()));
}

#[test]
fn the_registry_tells_the_truth_about_parameters() {
    use serde_json::{Map, Value, to_value};
    let defaults: Vec<(&str, Value)> = vec![
        ("ce", to_value(kd_losses::ce::Params::default()).unwrap()),
        ("label_smoothing", to_value(kd_losses::label_smoothing::Params::default()).unwrap()),
        ("anisotropic_label_smoothing", to_value(kd_losses::anisotropic_label_smoothing::Params::default()).unwrap()),
        ("kd", to_value(kd_losses::kd::Params::default()).unwrap()),
        ("dkd", to_value(kd_losses::dkd::Params::default()).unwrap()),
        ("nkd", to_value(kd_losses::nkd::Params::default()).unwrap()),
        ("tf_nkd", to_value(kd_losses::tf_nkd::Params::default()).unwrap()),
        ("uskd", to_value(kd_losses::uskd::Params::default()).unwrap()),
        ("fnkd", to_value(kd_losses::fnkd::Params::default()).unwrap()),
        ("he", to_value(kd_losses::he::Params::default()).unwrap()),
        ("nd", to_value(kd_losses::nd::Params::default()).unwrap()),
        ("nd_cosine", to_value(kd_losses::nd_cosine::Params::default()).unwrap()),
        ("nd_infonce", to_value(kd_losses::nd_infonce::Params::default()).unwrap()),
        ("norm_match", to_value(kd_losses::norm_match::Params::default()).unwrap()),
        ("sifn", to_value(kd_losses::sifn::Params::default()).unwrap()),
        ("kd_pp", to_value(kd_losses::kd_pp::Params::default()).unwrap()),
        ("dkd_pp", to_value(kd_losses::dkd_pp::Params::default()).unwrap()),
    ];
    assert_eq!(defaults.iter().map(|(n, _)| *n).collect::<Vec<_>>(), seeds().map(|e| e.name).collect::<Vec<_>>());
    for (entry, (_, expected)) in seeds().zip(defaults) {
        let documented: Map<String, Value> =
            entry.parameters.iter().map(|p| (p.name.to_string(), serde_json::from_str(p.default).unwrap())).collect();
        assert_eq!(Value::Object(documented.clone()), expected, "{}", entry.name);
        assert_eq!((entry.build)(&Value::Object(documented)).unwrap().name(), entry.name);
        assert_eq!((entry.build)(&Value::Object(Map::new())).unwrap().name(), entry.name);
        assert!(!entry.raw_terms && !entry.about.is_empty() && !entry.source.is_empty());
    }
}
