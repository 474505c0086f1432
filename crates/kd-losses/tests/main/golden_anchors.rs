//! The common benchmark's fixtures: value, unweighted terms, gradients and the state after the step, in f64 and f32.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Tensor};
use kd_core::registry::evaluate;

use crate::main::fixtures::{ANCHORS, Fixture, conclude, files, folder, read, values};

/// An optimiser, whose trajectories kd-train checks.
const OPTIMISER: &str = "dot";

/// Relative tolerances of values (terms too) and of gradients (states too).
fn relative(method: &str, dtype: DType) -> (f64, f64) {
    match (dtype, method) {
        (DType::F64, "kdsvd") => (1e-7, 1e-7),
        (DType::F64, _) => (1e-9, 1e-9),
        (_, "fitnet" | "ab") => (1e-5, 5e-4),
        (_, "reviewkd" | "ft") => (1e-5, 1e-3),
        (_, "rkd" | "pkt" | "kdsvd") => (1e-4, 1e-3),
        (_, "ctkd") => (1e-4, 2e-3),
        _ => (1e-5, 1e-4),
    }
}

/// What is allowed on top. In f32 two cases of a gradient that is zero in theory hold rounding noise alone.
fn absolute(fixture: &Fixture, dtype: DType) -> f64 {
    let two_classes = fixture.tensors.get("student.logits").is_some_and(|z| z.dims().last() == Some(&2));
    match (dtype, fixture.method.as_str()) {
        (DType::F64, _) => 1e-12,
        (_, "rkd") if fixture.tensors["student.embedding"].dims()[0] == 2 => 1e-5,
        (_, "logit_standardization") if two_classes => 1e-5,
        _ => 1e-6,
    }
}

fn norm(v: &[f64]) -> f64 {
    v.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Compares by the fixtures' stated tolerances; what is wrong, in words.
fn compare(fixture: &Fixture, found: &BTreeMap<String, Tensor>, dtype: DType) -> Vec<String> {
    let output = |name: &str| name == "value" || ["term.", "grad.", "state."].iter().any(|p| name.starts_with(p));
    let wanted: BTreeSet<&String> = fixture.tensors.keys().filter(|n| output(n)).collect();
    let names: BTreeSet<&String> = found.keys().collect();
    let mut wrong = Vec::new();
    if wanted != names {
        wrong.push(format!("outputs {names:?}, expected {wanted:?}"));
    }
    let (of_values, of_gradients) = relative(&fixture.method, dtype);
    let absolute = absolute(fixture, dtype);
    let gradients = wanted.iter().filter(|n| n.starts_with("grad."));
    let top = gradients.map(|n| norm(&values(&fixture.tensors[*n]))).fold(0.0, f64::max);
    for name in wanted.intersection(&names) {
        let (expected, got) = (&fixture.tensors[*name], &found[*name]);
        if expected.dims() != got.dims() || got.dtype() != dtype {
            wrong.push(format!("{name}: {:?} {:?}, expected {:?}", got.dtype(), got.dims(), expected.dims()));
            continue;
        }
        let (expected, got) = (values(expected), values(got));
        let off = norm(&expected.iter().zip(&got).map(|(e, g)| e - g).collect::<Vec<_>>());
        let allowed = if name.starts_with("grad.") || name.starts_with("state.") {
            of_gradients * norm(&expected).max(1e-3 * top) + absolute
        } else {
            of_values * norm(&expected) + absolute
        };
        // A NaN must fail.
        if off.is_nan() || off > allowed {
            wrong.push(format!(
                "{name}: off by {off:e} in norm, allowed {allowed:e} (expected {:e}, found {:e})",
                norm(&expected),
                norm(&got)
            ));
        }
    }
    wrong
}

#[test]
fn golden_anchors() {
    let Some(folder) = folder() else { return };
    let (mut checked, mut wrong) = (BTreeMap::new(), Vec::new());
    for fixture in files(&folder).iter().map(|path| read(path)) {
        if !ANCHORS.contains(&fixture.method.as_str()) || fixture.method == OPTIMISER {
            continue;
        }
        let case = &fixture.case;
        let entry = kd_losses::find(&fixture.method).unwrap_or_else(|e| panic!("{case}: {e}"));
        assert!(entry.raw_terms, "{}: the fixtures' terms hold no weight", entry.name);
        for dtype in [DType::F64, DType::F32] {
            match evaluate(entry, &fixture.inputs(), &fixture.params, dtype) {
                Ok(found) => wrong.extend(compare(&fixture, &found, dtype).into_iter().map(|w| format!("{case} {dtype:?}: {w}"))),
                Err(e) => wrong.push(format!("{case} {dtype:?}: {e}")),
            }
        }
        *checked.entry(entry.name).or_insert(0) += 1;
    }
    conclude(&checked, &wrong);
}
