//! Every loss fixture: value, terms and gradients, in f64 and f32.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use kd_core::registry::evaluate;
use safetensors::SafeTensors;
use serde_json::Value;

/// Fixtures of methods that no crate has yet, or that another crate holds.
const NOT_YET_BUILT: &[&str] = &[
    "ab",
    "at",
    "block_kd",
    "catkd",
    "cc",
    "crd",
    "ctkd",
    "dist",
    "dot",
    "fitnet",
    "fsp",
    "ft",
    "kdsvd",
    "logit_standardization",
    "mgd",
    "mlld",
    "nst",
    "ofa",
    "ofd",
    "pkt",
    "reviewkd",
    "rkd",
    "sdd",
    "simkd",
    "sp",
    "srrl",
    "vid",
    "wsld",
];

/// The loss fixtures, or `None` when nobody said where they are and the default place has none.
fn folder() -> Option<PathBuf> {
    let asked = ["KD_GOLDEN", "KD_SHARED"].iter().any(|v| std::env::var_os(v).is_some());
    let shared =
        std::env::var_os("KD_SHARED").map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared")), PathBuf::from);
    let golden = std::env::var_os("KD_GOLDEN").map_or_else(|| shared.join("golden/dev"), PathBuf::from);
    let losses = golden.join("losses");
    if !asked && !losses.is_dir() {
        return None;
    }
    assert!(losses.is_dir(), "{} is not a folder", losses.display());
    Some(losses)
}

struct Fixture {
    method: String,
    params: Value,
    tensors: BTreeMap<String, Tensor>,
}

fn read(path: &Path) -> Fixture {
    let bytes = std::fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().clone().unwrap();
    let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap().into_iter().collect();
    Fixture { method: metadata["method"].clone(), params: serde_json::from_str(&metadata["params"]).unwrap(), tensors }
}

fn values(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

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
    let Some(folder) = folder() else {
        println!("skipped: no loss fixtures at the default place, and neither KD_GOLDEN nor KD_SHARED is set");
        return;
    };
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|p| p.extension().is_some_and(|e| e == "safetensors"));
    paths.sort();
    let (mut checked, mut wrong) = (BTreeMap::new(), Vec::new());
    for path in &paths {
        let case = path.file_stem().unwrap().to_string_lossy();
        let fixture = read(path);
        if NOT_YET_BUILT.contains(&fixture.method.as_str()) {
            assert!(kd_losses::find(&fixture.method).is_err(), "{} is built: take it off the list", fixture.method);
            continue;
        }
        let entry = kd_losses::find(&fixture.method).unwrap_or_else(|e| panic!("{case}: {e}"));
        let inputs = fixture.tensors.iter().filter(|(n, _)| *n != "value" && !n.starts_with("term.") && !n.starts_with("grad."));
        let inputs: BTreeMap<String, Tensor> = inputs.map(|(n, t)| (n.clone(), t.clone())).collect();
        for dtype in [DType::F64, DType::F32] {
            match evaluate(entry, &inputs, &fixture.params, dtype) {
                Ok(found) => wrong.extend(compare(&fixture, &found, dtype).into_iter().map(|w| format!("{case} {dtype:?}: {w}"))),
                Err(e) => wrong.push(format!("{case} {dtype:?}: {e}")),
            }
        }
        *checked.entry(entry.name).or_insert(0) += 1;
    }
    for (method, n) in &checked {
        println!("{method}: {n} fixtures checked");
    }
    println!("losses: {} fixtures checked", checked.values().sum::<usize>());
    assert!(!checked.is_empty(), "no fixture in {}", folder.display());
    assert!(wrong.is_empty(), "{} deviations:\n{}", wrong.len(), wrong.join("\n"));
}
