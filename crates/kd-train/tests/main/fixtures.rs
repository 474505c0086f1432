//! Reading the golden fixtures.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use serde_json::Value;

/// One fixture file.
pub(crate) struct Fixture {
    pub(crate) name: String,
    tensors: BTreeMap<String, Tensor>,
    metadata: BTreeMap<String, String>,
}

impl Fixture {
    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap().into_iter().collect();
        Self { name: path.file_stem().unwrap().to_string_lossy().into_owned(), tensors, metadata }
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub(crate) fn get(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("{}: no tensor {name}", self.name))
    }

    pub(crate) fn find(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    pub(crate) fn values(&self, name: &str) -> Vec<f64> {
        values(self.get(name))
    }

    pub(crate) fn text(&self, key: &str) -> &str {
        self.metadata.get(key).unwrap_or_else(|| panic!("{}: no metadata {key}", self.name))
    }

    pub(crate) fn json(&self, key: &str) -> Value {
        serde_json::from_str(self.text(key)).unwrap()
    }
}

pub(crate) fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// `||a - b|| / ||b||`, the plain difference where `b` is next to nothing.
pub(crate) fn relative(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let (difference, size) = (norm(&mut a.iter().zip(b).map(|(a, b)| a - b)), norm(&mut b.iter().copied()));
    if size < 1e-6 { difference } else { difference / size }
}

/// Every fixture of a kind, by name. `None` when there are none and nobody said that there must be.
pub(crate) fn all(kind: &str) -> Option<Vec<Fixture>> {
    let set = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let shared = set("KD_SHARED").unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"));
    let dir = set("KD_GOLDEN").unwrap_or_else(|| shared.join("golden/dev")).join(kind);
    let wanted = set("KD_GOLDEN").is_some() || set("KD_SHARED").is_some();
    let mut paths: Vec<PathBuf> = match std::fs::read_dir(&dir) {
        Ok(entries) => entries.map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "safetensors")).collect(),
        Err(_) => vec![],
    };
    paths.sort();
    if paths.is_empty() {
        assert!(!wanted, "no fixtures in {}", dir.display());
        println!("skipped: no fixtures in {}", dir.display());
        return None;
    }
    Some(paths.iter().map(|p| Fixture::read(p)).collect())
}
