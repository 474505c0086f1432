//! The seeds' loss fixtures: value, weighted terms and gradients, element by element, in f64 and f32.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Tensor};
use kd_core::registry::evaluate;

use crate::main::fixtures::{ANCHORS, Fixture, conclude, files, folder, read, values};

/// Fixtures of methods that another crate holds.
const ELSEWHERE: &[&str] = &["block_kd"];

fn largest(v: &[f64]) -> f64 {
    v.iter().fold(0.0, |m, x| m.max(x.abs()))
}

/// Compares by the fixtures' stated tolerances; what is wrong, in words.
fn compare(fixture: &Fixture, found: &BTreeMap<String, Tensor>, dtype: DType) -> Vec<String> {
    let output = |name: &str| name == "value" || name.starts_with("term.") || name.starts_with("grad.");
    let wanted: BTreeSet<&String> = fixture.tensors.keys().filter(|n| output(n)).collect();
    let names: BTreeSet<&String> = found.keys().collect();
    let mut wrong = Vec::new();
    if wanted != names {
        wrong.push(format!("outputs {names:?}, expected {wanted:?}"));
    }
    let terms = wanted.iter().filter(|n| n.starts_with("term."));
    let top_term = terms.map(|n| largest(&values(&fixture.tensors[*n]))).fold(1.0, f64::max);
    for name in wanted.intersection(&names) {
        let (expected, got) = (&fixture.tensors[*name], &found[*name]);
        if expected.dims() != got.dims() || got.dtype() != dtype {
            wrong.push(format!("{name}: {:?} {:?}, expected {:?}", got.dtype(), got.dims(), expected.dims()));
            continue;
        }
        let (expected, got) = (values(expected), values(got));
        let top = largest(&expected);
        for (i, (e, g)) in expected.iter().zip(&got).enumerate() {
            let allowed = match (dtype, name.starts_with("grad.")) {
                (DType::F64, false) => 1e-9 * e.abs() + 1e-12,
                (DType::F64, true) => 1e-9 * top + 1e-12,
                (_, false) => 2e-5 * e.abs() + 5e-6 * top_term,
                (_, true) => 2e-5 * top + 1e-7,
            };
            // A NaN must fail.
            if g.is_nan() || (e - g).abs() > allowed {
                wrong.push(format!("{name}[{i}] = {g:e}, expected {e:e}, off by {:e}, allowed {allowed:e}", (e - g).abs()));
                break;
            }
        }
    }
    wrong
}

#[test]
fn golden_losses() {
    let Some(folder) = folder() else { return };
    let (mut checked, mut wrong) = (BTreeMap::new(), Vec::new());
    for fixture in files(&folder).iter().map(|path| read(path)) {
        if ANCHORS.contains(&fixture.method.as_str()) || ELSEWHERE.contains(&fixture.method.as_str()) {
            continue;
        }
        let case = &fixture.case;
        let entry = kd_losses::find(&fixture.method).unwrap_or_else(|e| panic!("{case}: {e}"));
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
