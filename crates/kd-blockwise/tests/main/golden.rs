//! Every Block-KD fixture: value, terms and gradients, in f64 and f32.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use kd_core::registry::evaluate;
use safetensors::SafeTensors;
use serde_json::Value;

use super::support::values;

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

fn largest(v: &[f64]) -> f64 {
    v.iter().fold(0.0, |m, x| m.max(x.abs()))
}

/// Compares by the fixtures' stated tolerances; what is wrong, in words.
fn compare(fixture: &BTreeMap<String, Tensor>, found: &BTreeMap<String, Tensor>, dtype: DType) -> Vec<String> {
    let wanted: BTreeSet<&String> = fixture.keys().filter(|n| is_output(n)).collect();
    let names: BTreeSet<&String> = found.keys().collect();
    let mut wrong = Vec::new();
    if wanted != names {
        wrong.push(format!("outputs {names:?}, expected {wanted:?}"));
    }
    let terms = wanted.iter().filter(|n| n.starts_with("term."));
    let top_term = terms.map(|n| largest(&values(&fixture[*n]))).fold(1.0, f64::max);
    for name in wanted.intersection(&names) {
        let (expected, got) = (&fixture[*name], &found[*name]);
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
            let within = (e - g).abs() <= allowed; // false for a NaN
            if !within {
                wrong.push(format!("{name}[{i}] = {g:e}, expected {e:e}, off by {:e}, allowed {allowed:e}", (e - g).abs()));
                break;
            }
        }
    }
    wrong
}

fn is_output(name: &str) -> bool {
    name == "value" || name.starts_with("term.") || name.starts_with("grad.")
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
    let (mut checked, mut wrong) = (0, Vec::new());
    for path in &paths {
        let case = path.file_stem().unwrap().to_string_lossy();
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().clone().unwrap();
        // Other methods are another crate's.
        let Some(entry) = kd_blockwise::registry().iter().find(|e| e.name == metadata["method"]) else { continue };
        let params: Value = serde_json::from_str(&metadata["params"]).unwrap();
        let fixture: BTreeMap<String, Tensor> = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap().into_iter().collect();
        let inputs = fixture.iter().filter(|(n, _)| !is_output(n)).map(|(n, t)| (n.clone(), t.clone())).collect();
        for dtype in [DType::F64, DType::F32] {
            match evaluate(entry, &inputs, &params, dtype) {
                Ok(found) => wrong.extend(compare(&fixture, &found, dtype).into_iter().map(|w| format!("{case} {dtype:?}: {w}"))),
                Err(e) => wrong.push(format!("{case} {dtype:?}: {e}")),
            }
        }
        checked += 1;
    }
    println!("block_kd: {checked} fixtures checked");
    assert!(checked > 0, "no fixture of block_kd in {}", folder.display());
    assert!(wrong.is_empty(), "{} deviations:\n{}", wrong.len(), wrong.join("\n"));
}
