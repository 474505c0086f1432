//! Methods without PyTorch fixtures: value, terms, gradients and state against implementations of their own in plain f64 loops, the gradients
//! by central differences.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use kd_core::Rng;
use kd_core::registry::evaluate;
use kd_losses::find;
use serde_json::{Value, json};

use crate::main::fixtures::values;

/// A shape and its numbers.
pub(crate) type Given = (Vec<usize>, Vec<f64>);

/// Numbers by name.
pub(crate) type Numbers = BTreeMap<String, Given>;

/// What an independent implementation says: unweighted terms with their weights, and the state after the call.
type Answer = (Vec<(&'static str, f64, f64)>, BTreeMap<String, Vec<f64>>);

/// Normal numbers, rounded to f32 so that both types see the same ones.
pub(crate) fn normal(seed: u64, shape: &[usize], scale: f64) -> Given {
    let n = shape.iter().product::<usize>() as u64;
    (shape.to_vec(), (0..n).map(|i| f64::from((Rng::new(seed).normal(i) * scale) as f32)).collect())
}

pub(crate) fn numbers(list: &[(&str, Given)]) -> Numbers {
    list.iter().map(|(name, given)| (name.to_string(), given.clone())).collect()
}

fn total(answer: &Answer) -> f64 {
    answer.0.iter().map(|(_, raw, weight)| raw * weight).sum()
}

/// Compares a method's parity function with `own` on these inputs, in f64 and f32.
fn check(method: &str, params: &Value, inputs: &Numbers, labels: &[i64], own: impl Fn(&Numbers) -> Answer) {
    let entry = find(method).unwrap();
    let mut tensors: BTreeMap<String, Tensor> =
        inputs.iter().map(|(n, (shape, v))| (n.clone(), Tensor::from_vec(v.clone(), shape.as_slice(), &Device::Cpu).unwrap())).collect();
    tensors.insert("labels".to_string(), Tensor::new(labels, &Device::Cpu).unwrap());
    let expected = own(inputs);
    let leaf = |name: &str| !(name.starts_with("teacher.") || name.starts_with("state_in.") || name == "class_means");
    let gradient = |name: &str| -> Vec<f64> {
        const H: f64 = 1e-5;
        (0..inputs[name].1.len())
            .map(|i| {
                let at = |h: f64| {
                    let mut moved = inputs.clone();
                    moved.get_mut(name).unwrap().1[i] += h;
                    total(&own(&moved))
                };
                (at(H) - at(-H)) / (2.0 * H)
            })
            .collect()
    };
    let gradients: BTreeMap<&String, Vec<f64>> = inputs.keys().filter(|n| leaf(n)).map(|n| (n, gradient(n))).collect();
    let norm = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
    let top = gradients.values().map(|g| norm(g)).fold(0.0, f64::max);
    assert!(top > 1e-6, "{method} {params}: no gradient");
    for (dtype, of_values, of_gradients) in [(DType::F64, 1e-9, 1e-6), (DType::F32, 2e-5, 2e-4)] {
        let found = evaluate(entry, &tensors, params, dtype).unwrap_or_else(|e| panic!("{method} {params}: {e}"));
        let what = |name: &str| format!("{method} {params} {dtype:?}: {name}");
        let scalar = |name: &str, expected: f64| {
            let got = values(&found[name])[0];
            assert!((got - expected).abs() <= of_values * expected.abs() + of_values * 0.1, "{} is {got}, expected {expected}", what(name));
        };
        scalar("value", total(&expected));
        assert_eq!(found.keys().filter(|k| k.starts_with("term.")).count(), expected.0.len(), "{}", what("terms"));
        expected.0.iter().for_each(|(name, raw, _)| scalar(&format!("term.{name}"), *raw));
        assert_eq!(found.keys().filter(|k| k.starts_with("grad.")).count(), gradients.len(), "{}", what("gradients"));
        for (name, expected) in &gradients {
            let got = values(&found[&format!("grad.{name}")]);
            let off = norm(&got.iter().zip(expected).map(|(a, b)| a - b).collect::<Vec<_>>());
            let allowed = of_gradients * norm(expected).max(1e-3 * top) + of_gradients * 1e-2;
            assert!(off <= allowed, "{}: off by {off:e}, allowed {allowed:e}, length {:e}", what(name), norm(expected));
        }
        assert_eq!(found.keys().filter(|k| k.starts_with("state.")).count(), expected.1.len(), "{}", what("state"));
        for (name, expected) in &expected.1 {
            let got = values(&found[&format!("state.{name}")]);
            assert!(got.iter().zip(expected).all(|(a, b)| (a - b).abs() <= of_values * (1.0 + b.abs())), "{}", what(name));
        }
    }
}

/// Row `b` of `[B,K]`.
fn row(n: &Numbers, name: &str, b: usize) -> Vec<f64> {
    let (shape, v) = &n[name];
    v[b * shape[1]..(b + 1) * shape[1]].to_vec()
}

fn softmax(z: &[f64], t: f64) -> Vec<f64> {
    let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = z.iter().map(|v| ((v - max) / t).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|v| v / sum).collect()
}

fn kl(q: &[f64], p: &[f64]) -> f64 {
    q.iter().zip(p).filter(|(q, _)| **q > 0.0).map(|(q, p)| q * (q / p).ln()).sum()
}

fn pair(b: usize, k: usize, scale: f64) -> Numbers {
    numbers(&[("student.logits", normal(1, &[b, k], scale)), ("teacher.logits", normal(2, &[b, k], scale))])
}

#[test]
fn wttm_is_a_weighted_divergence_from_the_teachers_power() {
    for (b, k, scale) in [(4, 6, 2.0), (1, 2, 1.0), (3, 5, 8.0)] {
        for (gamma, weighted) in [(0.2, true), (0.1, false), (1.0, true), (1.7, true)] {
            check("wttm", &json!({"gamma": gamma, "weighted": weighted}), &pair(b, k, scale), &vec![0; b], |n| {
                let mut sum = 0.0;
                for r in 0..b {
                    let v = softmax(&row(n, "teacher.logits", r), 1.0);
                    let powers: Vec<f64> = v.iter().map(|x| x.powf(gamma)).collect();
                    let u: f64 = powers.iter().sum();
                    let p: Vec<f64> = powers.iter().map(|x| x / u).collect();
                    let d = kl(&p, &softmax(&row(n, "student.logits", r), 1.0));
                    sum += if weighted { u * d } else { d };
                }
                (vec![("wttm", sum / b as f64, 1.0)], BTreeMap::new())
            });
        }
    }
    // gamma 1 without weights is kd at temperature 1.
    let n = pair(3, 4, 2.0);
    let tensor = |name: &str| Tensor::from_vec(n[name].1.clone(), n[name].0.as_slice(), &Device::Cpu).unwrap();
    let (s, t) = (tensor("student.logits"), tensor("teacher.logits"));
    let ttm = kd_losses::wttm(&s, &t, &kd_losses::wttm::Params { gamma: 1.0, weighted: false }).unwrap().total().unwrap();
    let kd = kd_losses::kd(&s, &t, &kd_losses::kd::Params { temperature: 1.0, ..Default::default() }).unwrap().total().unwrap();
    assert!((values(&ttm)[0] - values(&kd)[0]).abs() < 1e-13);
}

#[test]
fn rld_refines_the_teachers_logits() {
    let labels = [2i64, 0, 4, 1];
    let mut inputs = pair(4, 5, 2.0);
    // The teacher is right on sample 0, and ranks sample 1's label last.
    let logits = &mut inputs.get_mut("teacher.logits").unwrap().1;
    logits[2] = 6.0;
    logits[5] = -9.0;
    for (alpha, beta, ta, t) in [(1.0, 8.0, 1.0, 4.0), (0.5, 2.0, 2.0, 1.0)] {
        let params = json!({"alpha": alpha, "beta": beta, "alpha_temperature": ta, "temperature": t});
        check("rld", &params, &inputs, &labels, |n| {
            let (mut scd, mut mcd) = (0.0, 0.0);
            for (b, &y) in labels.iter().enumerate() {
                let (zs, zt, y) = (row(n, "student.logits", b), row(n, "teacher.logits", b), y as usize);
                let (p, v) = (softmax(&zs, ta), softmax(&zt, ta));
                let top = v.iter().copied().fold(0.0, f64::max);
                scd += ta * ta * kl(&[top, 1.0 - top], &[p[y], 1.0 - p[y]]);
                let kept: Vec<usize> = (0..5).filter(|&c| zt[c] < zt[y]).collect();
                if !kept.is_empty() {
                    let over = |z: &[f64]| softmax(&kept.iter().map(|&c| z[c]).collect::<Vec<_>>(), t);
                    mcd += t * t * kl(&over(&zt), &over(&zs));
                }
            }
            (vec![("scd", scd / 4.0, alpha), ("mcd", mcd / 4.0, beta)], BTreeMap::new())
        });
    }
}

#[test]
fn rld_without_a_class_below_the_label_is_its_confidence_alone() {
    let one = |v: [f64; 3]| (vec![1, 3], v.to_vec());
    let inputs = numbers(&[("student.logits", one([0.5, -1.0, 0.25])), ("teacher.logits", one([3.0, -2.0, 1.0]))]);
    let tensors = |n: &str| Tensor::from_vec(inputs[n].1.clone(), (1, 3), &Device::Cpu).unwrap();
    let y = Tensor::new(&[1i64], &Device::Cpu).unwrap();
    let terms = kd_losses::rld(&tensors("student.logits"), &tensors("teacher.logits"), &y, &Default::default()).unwrap();
    assert_eq!(values(&terms.terms[1].raw), [0.0]);
}

#[test]
fn crld_crosses_two_views() {
    let labels = [1i64, 3, 0, 2, 2];
    let mut inputs = pair(5, 4, 2.5);
    inputs.insert("student.strong.logits".to_string(), normal(3, &[5, 4], 2.0));
    inputs.insert("teacher.strong.logits".to_string(), normal(4, &[5, 4], 2.0));
    for (tau_weak, tau_strong) in [(0.9, 0.2), (0.6, 0.7), (0.0, 0.0)] {
        let params = json!({"temperature": 3.0, "within_weight": 2.0, "cross_weight": 0.5, "tau_weak": tau_weak, "tau_strong": tau_strong,
                            "strong_ce_weight": 0.75});
        let counted = std::cell::Cell::new((0, 0));
        check("crld", &params, &inputs, &labels, |n| {
            let (mut ce, mut within, mut cross, mut seen) = (0.0, 0.0, 0.0, (0, 0));
            for (b, &y) in labels.iter().enumerate() {
                let [sw, sa, tw, ta] =
                    ["student.logits", "student.strong.logits", "teacher.logits", "teacher.strong.logits"].map(|x| row(n, x, b));
                let kd = |s: &[f64], t: &[f64]| 9.0 * kl(&softmax(t, 3.0), &softmax(s, 3.0));
                let sure = |t: &[f64]| softmax(t, 1.0).into_iter().fold(0.0, f64::max);
                ce -= softmax(&sa, 1.0)[y as usize].ln();
                if sure(&tw) >= tau_weak {
                    within += kd(&sw, &tw) + kd(&sa, &ta);
                    seen.0 += 1;
                }
                if sure(&ta) >= tau_strong {
                    cross += kd(&sa, &tw) + kd(&sw, &ta);
                    seen.1 += 1;
                }
            }
            counted.set(seen);
            (vec![("strong_ce", ce / 5.0, 0.75), ("within", within / 5.0, 2.0), ("cross", cross / 5.0, 0.5)], BTreeMap::new())
        });
        if tau_weak == 0.6 {
            let (w, c) = counted.get();
            assert!((1..5).contains(&w) && (1..5).contains(&c), "the thresholds divide nothing: {w}, {c}");
        }
    }
}

/// As the release: the label's class cut out of both predictions and of the cost.
fn wkd_l(n: &Numbers, labels: &[i64], vectors: &str, p: &kd_losses::wkd_l::Params) -> Answer {
    let (shape, w) = &n[vectors];
    let (k, d) = (shape[0], shape[1]);
    let unit = |i: usize| -> Vec<f64> {
        let row = &w[i * d..(i + 1) * d];
        let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        row.iter().map(|x| x / length).collect()
    };
    let cost = |i: usize, j: usize| {
        let cos: f64 = unit(i).iter().zip(unit(j)).map(|(a, b)| a * b).sum();
        let distance = if p.sharpen == 0.0 { 1.0 - cos } else { 1.0 - (-p.sharpen * (1.0 - cos)).exp() };
        distance.max(0.0) + 1e-8
    };
    let (mut target, mut moved) = (0.0, 0.0);
    for (b, &y) in labels.iter().enumerate() {
        let (zs, zt, y) = (row(n, "student.logits", b), row(n, "teacher.logits", b), y as usize);
        target -= softmax(&zt, 1.0)[y] * softmax(&zs, 1.0)[y].ln();
        let kept: Vec<usize> = (0..k).filter(|&c| c != y).collect();
        let over = |z: &[f64]| softmax(&kept.iter().map(|&c| z[c]).collect::<Vec<_>>(), p.temperature);
        let (from, to, m) = (over(&zs), over(&zt), kept.len());
        let c: Vec<Vec<f64>> = kept.iter().map(|&i| kept.iter().map(|&j| cost(i, j)).collect()).collect();
        let kernel = |i: usize, j: usize| (-c[i][j] / p.reg).exp();
        let (mut u, mut v) = (vec![1.0 / m as f64; m], vec![0.0; m]);
        for _ in 0..p.iterations {
            v = (0..m).map(|j| to[j] / ((0..m).map(|i| kernel(i, j) * u[i]).sum::<f64>() + 1e-8)).collect();
            u = (0..m).map(|i| from[i] / ((0..m).map(|j| kernel(i, j) * v[j]).sum::<f64>() + 1e-8)).collect();
        }
        moved += (0..m).flat_map(|i| (0..m).map(move |j| (i, j))).map(|(i, j)| u[i] * kernel(i, j) * v[j] * c[i][j]).sum::<f64>();
    }
    let b = labels.len() as f64;
    (vec![("target", target / b, 1.0), ("wasserstein", moved / b, p.gamma)], BTreeMap::new())
}

#[test]
fn wkd_l_moves_probability_between_classes() {
    let labels = [3i64, 0, 2];
    let mut inputs = pair(3, 5, 3.0);
    inputs.insert("teacher.fc.weight".to_string(), normal(5, &[5, 4], 1.0));
    inputs.insert("class_means".to_string(), normal(6, &[5, 3], 1.0));
    let default = kd_losses::wkd_l::Params::default();
    for params in [
        kd_losses::wkd_l::Params { gamma: 3.0, ..default.clone() },
        kd_losses::wkd_l::Params { gamma: 2.0, temperature: 1.5, sharpen: 0.0, reg: 0.3, iterations: 3, ..default.clone() },
        kd_losses::wkd_l::Params { gamma: 1.0, cost: kd_losses::wkd_l::ClassCost::ClassMeans, iterations: 1, ..default.clone() },
    ] {
        let means = params.cost == kd_losses::wkd_l::ClassCost::ClassMeans;
        let (used, other) = if means { ("class_means", "teacher.fc.weight") } else { ("teacher.fc.weight", "class_means") };
        let mut inputs = inputs.clone();
        inputs.remove(other);
        check("wkd_l", &serde_json::to_value(&params).unwrap(), &inputs, &labels, |n| wkd_l(n, &labels, used, &params));
    }
}

/// A map `[B,C,H,W]` as nested indices.
pub(crate) struct Map<'a> {
    pub(crate) shape: [usize; 4],
    pub(crate) v: &'a [f64],
}

impl Map<'_> {
    pub(crate) fn at(&self, b: usize, c: usize, y: usize, x: usize) -> f64 {
        let [_, cs, h, w] = self.shape;
        self.v[((b * cs + c) * h + y) * w + x]
    }
}

pub(crate) fn map<'a>(n: &'a Numbers, name: &str) -> Map<'a> {
    let (shape, v) = &n[name];
    Map { shape: [shape[0], shape[1], shape[2], shape[3]], v }
}

/// Batch norm over a map with the batch's statistics; mean and unbiased variance of each channel too.
pub(crate) fn batch_norm(x: &[f64], shape: [usize; 4], scale: &[f64], shift: &[f64]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let [b, c, h, w] = shape;
    let n = (b * h * w) as f64;
    let of = |channel: usize| (0..x.len()).filter(move |i| i / (h * w) % c == channel);
    let (mut out, mut means, mut variances) = (x.to_vec(), vec![], vec![]);
    for channel in 0..c {
        let mean = of(channel).map(|i| x[i]).sum::<f64>() / n;
        let variance = of(channel).map(|i| (x[i] - mean).powi(2)).sum::<f64>() / n;
        of(channel).for_each(|i| out[i] = (x[i] - mean) / (variance + 1e-5).sqrt() * scale[channel] + shift[channel]);
        means.push(mean);
        variances.push(variance * n / (n - 1.0));
    }
    (out, means, variances)
}

fn wkd_f(n: &Numbers, grid: usize, mean_weight: f64) -> Answer {
    let (s, t) = (map(n, "student.stage.last"), map(n, "teacher.stage.last"));
    let ([b, cs, h, w], ct) = (s.shape, t.shape[1]);
    let (weight, bias) = (&n["param.projector.conv.weight"].1, &n["param.projector.conv.bias"].1);
    let mut x = vec![0.0; b * ct * h * w];
    for (i, x) in x.iter_mut().enumerate() {
        let (column, line, o, sample) = (i % w, i / w % h, i / (h * w) % ct, i / (h * w * ct));
        *x = bias[o] + (0..cs).map(|c| weight[o * cs + c] * s.at(sample, c, line, column)).sum::<f64>();
    }
    let shape = [b, ct, h, w];
    let (x, means, variances) = batch_norm(&x, shape, &n["param.projector.bn.weight"].1, &n["param.projector.bn.bias"].1);
    let x: Vec<f64> = x.iter().map(|v| v.max(0.0)).collect();
    let x = Map { shape, v: &x };
    let (mut mean, mut deviation) = (0.0, 0.0);
    for sample in 0..b {
        for c in 0..ct {
            for (gy, gx) in (0..grid).flat_map(|i| (0..grid).map(move |j| (i, j))) {
                let span = |g: usize, n: usize| g * n / grid..((g + 1) * n).div_ceil(grid);
                let moments = |m: &Map<'_>| {
                    let region: Vec<f64> =
                        span(gy, h).flat_map(|y| span(gx, w).map(move |x| (y, x))).map(|(y, x)| m.at(sample, c, y, x)).collect();
                    let n = region.len() as f64;
                    let mu = region.iter().sum::<f64>() / n;
                    (mu, (region.iter().map(|v| (v - mu).powi(2)).sum::<f64>() / (n - 1.0) + 1e-5).sqrt())
                };
                let (a, b) = (moments(&x), moments(&t));
                mean += (a.0 - b.0).powi(2);
                deviation += (a.1 - b.1).powi(2);
            }
        }
    }
    let scale = 1.0 / (b * grid * grid) as f64;
    let running = |name: &str, batch: &[f64]| -> Vec<f64> {
        n[&format!("state_in.projector.bn.{name}")].1.iter().zip(batch).map(|(old, new)| 0.9 * old + 0.1 * new).collect()
    };
    let state = [("running_mean", means), ("running_var", variances)];
    let state = state.into_iter().map(|(name, batch)| (format!("projector.bn.{name}"), running(name, &batch))).collect();
    (vec![("mean", mean * scale, mean_weight), ("deviation", deviation * scale, 1.0)], state)
}

#[test]
fn wkd_f_compares_gaussians() {
    let inputs = numbers(&[
        ("student.stage.last", normal(1, &[3, 2, 5, 4], 1.0)),
        ("teacher.stage.last", normal(2, &[3, 3, 5, 4], 1.0)),
        ("param.projector.conv.weight", normal(3, &[3, 2, 1, 1], 1.0)),
        ("param.projector.conv.bias", normal(4, &[3], 0.5)),
        ("param.projector.bn.weight", normal(5, &[3], 1.0)),
        ("param.projector.bn.bias", normal(6, &[3], 1.0)),
        ("state_in.projector.bn.running_mean", normal(7, &[3], 1.0)),
        ("state_in.projector.bn.running_var", (vec![3], vec![1.0, 0.5, 2.0])),
    ]);
    for (grid, mean_weight) in [(1, 4.0), (2, 2.0)] {
        check("wkd_f", &json!({"grid": grid, "mean_weight": mean_weight}), &inputs, &[0, 0, 0], |n| wkd_f(n, grid, mean_weight));
    }
}

#[test]
fn fcfd_sums_what_the_paths_give() {
    let mut inputs = numbers(&[("teacher.logits", normal(9, &[3, 4], 2.0))]);
    for (s, shape) in [(1, [3, 2, 4, 4]), (2, [3, 3, 2, 2])] {
        inputs.insert(format!("student.bridged.{s}"), normal(10 + s, &shape, 1.0));
        inputs.insert(format!("teacher.stage.{s}"), normal(20 + s, &shape, 1.0));
    }
    inputs.insert("student.mixed.1.stage.2".to_string(), normal(31, &[3, 3, 2, 2], 1.0));
    inputs.insert("student.mixed.1.logits".to_string(), normal(32, &[3, 4], 2.0));
    inputs.insert("student.mixed.2.logits".to_string(), normal(33, &[3, 4], 2.0));
    for (epoch, warm) in [(0usize, 0.05), (40, 1.0)] {
        let params = json!({"epoch": epoch, "temperature": 2.0, "feature_weight": 5.0, "mixture_weight": 0.2});
        check("fcfd", &params, &inputs, &[0, 0, 0], |n| {
            let square = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / a.len() as f64;
            let gap = |m: &Map<'_>| -> Vec<f64> {
                let cells = m.shape[2] * m.shape[3];
                m.v.chunks(cells).map(|c| c.iter().map(|v| v.max(0.0)).sum::<f64>() / cells as f64).collect()
            };
            let distance = |x: &str, s: usize| {
                let (x, t) = (map(n, x), map(n, &format!("teacher.stage.{s}")));
                square(x.v, t.v) + if s == 2 { square(&gap(&x), &gap(&t)) } else { 0.0 }
            };
            let appearance = distance("student.bridged.1", 1) + distance("student.bridged.2", 2);
            let function = distance("student.mixed.1.stage.2", 2);
            let paths = (0..3).flat_map(|b| [1, 2].map(|p| (b, p)));
            let soft = |name: &str, b: usize| softmax(&row(n, name, b), 2.0);
            let mixture =
                paths.map(|(b, p)| 4.0 * kl(&soft("teacher.logits", b), &soft(&format!("student.mixed.{p}.logits"), b))).sum::<f64>() / 3.0;
            (vec![("appearance", appearance, 5.0 * warm), ("function", function, 5.0 * warm), ("mixture", mixture, 0.2)], BTreeMap::new())
        });
    }
}
