//! Fixtures and comparisons.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{Device, Tensor};
use safetensors::SafeTensors;

/// A fixture: tensors and string metadata.
pub(crate) struct Fixture {
    pub(crate) file: String,
    pub(crate) tensors: BTreeMap<String, Tensor>,
    pub(crate) metadata: BTreeMap<String, String>,
}

impl Fixture {
    pub(crate) fn get(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("{}: no tensor `{name}`", self.file))
    }
}

/// The files of `kind` (`ops`, ..), or `None` with a printed line when this checkout has no fixtures and none were promised.
pub(crate) fn fixtures(kind: &str) -> Option<Vec<Fixture>> {
    let promised = std::env::var_os("KD_GOLDEN").is_some() || std::env::var_os("KD_SHARED").is_some();
    let shared =
        std::env::var_os("KD_SHARED").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared"), PathBuf::from);
    let golden = std::env::var_os("KD_GOLDEN").map_or_else(|| shared.join("golden/dev"), PathBuf::from);
    let folder = golden.join(kind);
    let Ok(entries) = std::fs::read_dir(&folder) else {
        assert!(!promised, "fixtures were promised, but {} cannot be read", folder.display());
        println!("skipped: no fixtures at {}", folder.display());
        return None;
    };
    let mut paths: Vec<PathBuf> =
        entries.map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "safetensors")).collect();
    paths.sort();
    assert!(!paths.is_empty(), "no fixture in {}", folder.display());
    Some(
        paths
            .into_iter()
            .map(|path| {
                let bytes = std::fs::read(&path).unwrap();
                let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
                Fixture {
                    file: path.file_name().unwrap().to_string_lossy().into_owned(),
                    metadata: header.metadata().clone().unwrap_or_default().into_iter().collect(),
                    tensors: candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap().into_iter().collect(),
                }
            })
            .collect(),
    )
}

/// `|a - b| / |b|` (L2), plain `|a - b|` where `|b|` is tiny.
pub(crate) fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims(), "shapes differ");
    let values = |t: &Tensor| t.to_dtype(candle_core::DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let (a, b) = (values(a), values(b));
    let gap = a.iter().zip(&b).map(|(x, y)| (x - y) * (x - y)).sum::<f64>().sqrt();
    let norm = b.iter().map(|y| y * y).sum::<f64>().sqrt();
    if norm < 1e-6 { gap } else { gap / norm }
}
