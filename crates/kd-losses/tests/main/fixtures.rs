//! The loss fixtures of every crate's methods: where they are, how one is read, which kind it is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use kd_core::MethodEntry;
use safetensors::SafeTensors;
use serde_json::Value;

/// The methods with terms that hold their weight, in the order of the registry.
pub(crate) const SEEDS: &[&str] = &[
    "ce",
    "label_smoothing",
    "anisotropic_label_smoothing",
    "kd",
    "dkd",
    "nkd",
    "tf_nkd",
    "uskd",
    "fnkd",
    "he",
    "nd",
    "nd_cosine",
    "nd_infonce",
    "norm_match",
    "sifn",
    "kd_pp",
    "dkd_pp",
];

/// The methods of the common benchmark: their fixtures store terms without weights and compare by norms.
pub(crate) const ANCHORS: &[&str] = &[
    "ab",
    "at",
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

/// The registry's [`SEEDS`].
pub(crate) fn seeds() -> impl Iterator<Item = &'static MethodEntry> {
    kd_losses::registry().iter().filter(|e| SEEDS.contains(&e.name))
}

/// The loss fixtures, or `None` when nobody said where they are and the default place has none.
pub(crate) fn folder() -> Option<PathBuf> {
    let asked = ["KD_GOLDEN", "KD_SHARED"].iter().any(|v| std::env::var_os(v).is_some());
    let shared =
        std::env::var_os("KD_SHARED").map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared")), PathBuf::from);
    let golden = std::env::var_os("KD_GOLDEN").map_or_else(|| shared.join("golden/dev"), PathBuf::from);
    let losses = golden.join("losses");
    if !asked && !losses.is_dir() {
        println!("skipped: no loss fixtures at the default place, and neither KD_GOLDEN nor KD_SHARED is set");
        return None;
    }
    assert!(losses.is_dir(), "{} is not a folder", losses.display());
    Some(losses)
}

/// The fixture files of `folder`, by name.
pub(crate) fn files(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|p| p.extension().is_some_and(|e| e == "safetensors"));
    paths.sort();
    paths
}

/// One file.
pub(crate) struct Fixture {
    /// `<method>.<case>`.
    pub(crate) case: String,
    /// Its method.
    pub(crate) method: String,
    /// Every parameter of the method.
    pub(crate) params: Value,
    /// Inputs and expected outputs.
    pub(crate) tensors: BTreeMap<String, Tensor>,
}

impl Fixture {
    /// What the method is given; outputs and intermediate quantities are not.
    pub(crate) fn inputs(&self) -> BTreeMap<String, Tensor> {
        let output = |n: &str| n == "value" || ["term.", "grad.", "state.", "aux."].iter().any(|p| n.starts_with(p));
        self.tensors.iter().filter(|(n, _)| !output(n)).map(|(n, t)| (n.clone(), t.clone())).collect()
    }
}

/// Reads one file.
pub(crate) fn read(path: &Path) -> Fixture {
    let bytes = std::fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().clone().unwrap();
    Fixture {
        case: path.file_stem().unwrap().to_string_lossy().into_owned(),
        method: metadata["method"].clone(),
        params: serde_json::from_str(&metadata["params"]).unwrap(),
        tensors: candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap().into_iter().collect(),
    }
}

/// The elements in row-major order.
pub(crate) fn values(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Prints how many fixtures of each method were checked, and fails when there were none or something deviated.
pub(crate) fn conclude(checked: &BTreeMap<&'static str, usize>, wrong: &[String]) {
    for (method, n) in checked {
        println!("{method}: {n} fixtures checked");
    }
    println!("{} fixtures checked", checked.values().sum::<usize>());
    assert!(!checked.is_empty(), "no fixture was checked");
    assert!(wrong.is_empty(), "{} deviations:\n{}", wrong.len(), wrong.join("\n"));
}
