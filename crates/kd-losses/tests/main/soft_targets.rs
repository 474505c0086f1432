//! Mixed labels (mixup, cutmix): every seed method against its definition, written out number by number.
//!
//! `q` are the targets, the batch's labels the heavier class of each row. Methods without labels are untouched by them, those that know one
//! label only take the heavier, the others are defined on `q`; anisotropic label smoothing is not and refuses.

use candle_core::{Device, Tensor};
use kd_losses::{ClassMeans, Side};

const Q: [[f64; 4]; 3] = [[0.7, 0.0, 0.3, 0.0], [0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]];
const HEAVIER: [usize; 3] = [0, 1, 3];
const Z: [[f64; 4]; 3] = [[1.5, -0.5, 0.25, 0.0], [0.1, 0.9, -1.2, 2.0], [-0.3, 0.4, 0.8, 1.1]];
const V: [[f64; 4]; 3] = [[2.5, 0.5, -0.25, 0.3], [-0.1, 1.9, 1.2, 0.0], [0.2, 0.1, -0.8, 3.1]];
const F: [[f64; 2]; 3] = [[1.0, 2.0], [-0.5, 0.25], [3.0, -1.0]];
const G: [[f64; 2]; 3] = [[0.5, 1.0], [2.0, 2.0], [-1.0, 0.5]];
const MEANS: [[f64; 2]; 4] = [[1.0, 0.0], [0.5, 2.0], [-1.0, 1.0], [0.0, -3.0]];

fn t<const N: usize>(rows: &[[f64; N]]) -> Tensor {
    Tensor::from_vec(rows.as_flattened().to_vec(), (rows.len(), N), &Device::Cpu).unwrap()
}

fn softmax(row: &[f64]) -> Vec<f64> {
    let exp: Vec<f64> = row.iter().map(|v| v.exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.iter().map(|e| e / sum).collect()
}

fn mean(of_row: impl Fn(usize) -> f64) -> f64 {
    (0..3).map(of_row).sum::<f64>() / 3.0
}

fn cross_entropy(q: &[f64], row: &[f64]) -> f64 {
    q.iter().zip(softmax(row)).map(|(q, p)| -q * p.ln()).sum()
}

fn norm(v: &[f64]) -> f64 {
    v.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Length-1 direction of the mixed class mean of row `b`.
fn direction(b: usize) -> Vec<f64> {
    let mixed: Vec<f64> = (0..2).map(|d| (0..4).map(|k| Q[b][k] * MEANS[k][d]).sum()).collect();
    mixed.iter().map(|v| v / norm(&mixed)).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// The loss's total equals `expected`.
fn check(name: &str, terms: kd_core::Result<kd_core::LossTerms>, expected: f64) {
    let value = terms.unwrap().total().unwrap().to_scalar::<f64>().unwrap();
    assert!((value - expected).abs() < 1e-12 * (1.0 + expected.abs()), "{name}: {value}, by its definition {expected}");
}

#[test]
fn cross_entropies_are_taken_with_the_targets() {
    let ce = mean(|b| cross_entropy(&Q[b], &Z[b]));
    check("ce", kd_losses::ce(&t(&Z), &t(&Q)), ce);
    let uniform = mean(|b| cross_entropy(&[0.25; 4], &Z[b]));
    let params = kd_losses::label_smoothing::Params { epsilon: 0.2 };
    check("label_smoothing", kd_losses::label_smoothing(&t(&Z), &t(&Q), &params), 0.8 * ce + 0.2 * uniform);
    let params = kd_losses::he::Params { radius: 4.0, ..Default::default() };
    let scaled = |b: usize| Z[b].map(|z| 4.0 * z / norm(&F[b]));
    check("he", kd_losses::he(&t(&Z), &t(&F), &t(&Q), &params), mean(|b| cross_entropy(&Q[b], &scaled(b))));
}

#[test]
fn losses_of_one_label_take_the_heavier_class() {
    let heavier = Tensor::new(HEAVIER.map(|y| y as i64).as_slice(), &Device::Cpu).unwrap();
    for gamma in [0.0, 1.5] {
        let params = kd_losses::nkd::Params { gamma, temperature: 2.0 };
        let rest = |row: &[f64; 4], y: usize| (0..4).filter(|k| *k != y).map(|k| row[k] / 2.0).collect::<Vec<_>>();
        let target = mean(|b| -softmax(&V[b])[HEAVIER[b]] * softmax(&Z[b])[HEAVIER[b]].ln());
        let non_target = mean(|b| cross_entropy(&softmax(&rest(&V[b], HEAVIER[b])), &rest(&Z[b], HEAVIER[b])));
        check("nkd", kd_losses::nkd(&t(&Z), &t(&V), &t(&Q), &params), target + gamma * 4.0 * non_target);
        check("nkd, hard", kd_losses::nkd(&t(&Z), &t(&V), &heavier, &params), target + gamma * 4.0 * non_target);
    }
    let value = |labels: &Tensor| {
        let terms = kd_losses::dkd(&t(&Z), &t(&V), labels, &Default::default()).unwrap();
        terms.total().unwrap().to_scalar::<f64>().unwrap()
    };
    assert_eq!(value(&t(&Q)), value(&heavier));
}

/// `-mean_b sum_j w_j log p_j` over the two labels of each row.
fn own_confidence(g: impl Fn(f64) -> f64) -> f64 {
    let picks = [[(0, 0.7), (2, 0.3)], [(1, 0.5), (2, 0.5)], [(3, 1.0), (0, 0.0)]];
    let s = |b: usize, j: usize| g(softmax(&Z[b])[picks[b][j].0]);
    let centre = [0, 1].map(|j| mean(|b| s(b, j)));
    mean(|b| {
        let of = |j: usize| {
            let (class, u) = picks[b][j];
            let w = if u > 0.0 { s(b, j) + u - centre[j] } else { 0.0 };
            -w * softmax(&Z[b])[class].ln()
        };
        of(0) + of(1)
    })
}

#[test]
fn self_distillation_weighs_both_labels_by_their_own_confidence() {
    check("tf_nkd", kd_losses::tf_nkd(&t(&Z), &t(&Q)), own_confidence(|s| s));
    let params = kd_losses::uskd::Params { alpha: 1.0, beta: 0.0, mu: 0.5, ..Default::default() };
    let smoothed = |b: usize| Q[b].map(|q| 0.9 * q + 0.025);
    let weak = mean(|b| cross_entropy(&smoothed(b), &V[b]));
    check("uskd", kd_losses::uskd(&t(&Z), &t(&V), &t(&Q), &params), own_confidence(|s| s * s) + 0.5 * weak);

    // Two of four classes are left to the non-target part, ranked: 1 and 1/2 of 3/2.
    let params =
        kd_losses::uskd::Params { alpha: 0.0, beta: 1.0, mu: 0.0, zipf_slots: kd_losses::uskd::ZipfSlots::NonTarget, ..Default::default() };
    let left = [[1usize, 3], [0, 3], [1, 2]];
    let non_target = mean(|b| {
        let own = |row: &[f64; 4], k: usize| softmax(row)[k] / (left[b].iter().map(|k| softmax(row)[*k]).sum::<f64>() + 1e-6);
        let score = left[b].map(|k| own(&Z[b], k) + own(&V[b], k));
        let z = if score[0] >= score[1] { [2.0 / 3.0, 1.0 / 3.0] } else { [1.0 / 3.0, 2.0 / 3.0] };
        cross_entropy(&z, &left[b].map(|k| Z[b][k]))
    });
    check("uskd, ranks", kd_losses::uskd(&t(&Z), &t(&V), &t(&Q), &params), non_target);
}

#[test]
fn directions_are_those_of_the_mixed_means() {
    let means = ClassMeans::new(&t(&MEANS)).unwrap();
    let nd = mean(|b| 1.0 - dot(&F[b], &direction(b)) / norm(&F[b]).max(norm(&G[b])));
    check("nd", kd_losses::nd(&t(&F), &t(&G), &means, &t(&Q), &Default::default()), nd);
    let cosine = mean(|b| 1.0 - dot(&F[b], &direction(b)) / norm(&F[b]));
    check("nd_cosine", kd_losses::nd_cosine(&t(&F), &means, &t(&Q), &Default::default()), cosine);
    let cosines = |b: usize| MEANS.map(|c| dot(&F[b], &c) / norm(&F[b]) / norm(&c) / 0.1);
    check("nd_infonce", kd_losses::nd_infonce(&t(&F), &means, &t(&Q), &Default::default()), mean(|b| cross_entropy(&Q[b], &cosines(b))));

    let (z, f, v, g) = (t(&Z), t(&F), t(&V), t(&G));
    let (student, teacher) = (Side { logits: &z, embedding: &f }, Side { logits: &v, embedding: &g });
    let params = kd_losses::kd_pp::Params { warmup_epochs: 0, kd_weight: 0.5, nd_weight: 2.0, ..Default::default() };
    let kd = mean(|b| {
        let soft = |row: &[f64; 4]| softmax(&row.map(|x| x / 4.0));
        16.0 * soft(&V[b]).iter().zip(soft(&Z[b])).map(|(q, p)| q * (q / p).ln()).sum::<f64>()
    });
    let ce = mean(|b| cross_entropy(&Q[b], &Z[b]));
    check("kd_pp", kd_losses::kd_pp(student, teacher, &means, &t(&Q), 3, &params), ce + 0.5 * kd + 2.0 * nd);
}
