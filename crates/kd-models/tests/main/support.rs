//! Fixtures: where they are and what they hold.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use serde::de::DeserializeOwned;

/// A fixture: tensors and string metadata.
pub(crate) struct Fixture {
    pub(crate) file: String,
    pub(crate) tensors: BTreeMap<String, Tensor>,
    metadata: BTreeMap<String, String>,
}

impl Fixture {
    pub(crate) fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        Self {
            file: path.file_name().unwrap().to_string_lossy().into_owned(),
            metadata: header.metadata().clone().unwrap_or_default().into_iter().collect(),
            tensors: candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap().into_iter().collect(),
        }
    }

    pub(crate) fn text(&self, key: &str) -> &str {
        self.metadata.get(key).unwrap_or_else(|| panic!("{}: no metadata `{key}`", self.file))
    }

    /// Metadata written as JSON (numbers, lists, objects).
    pub(crate) fn json<T: DeserializeOwned>(&self, key: &str) -> T {
        serde_json::from_str(self.text(key)).unwrap_or_else(|e| panic!("{}: metadata `{key}`: {e}", self.file))
    }

    pub(crate) fn find(&self, name: &str) -> Option<Vec<f64>> {
        self.tensors.get(name).map(values)
    }
}

pub(crate) fn values(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The files of `kind`, or `None` with a printed line when this checkout has no fixtures and none were promised.
pub(crate) fn fixtures(kind: &str) -> Option<Vec<PathBuf>> {
    let promised = std::env::var_os("KD_GOLDEN").is_some() || std::env::var_os("KD_SHARED").is_some();
    let shared =
        std::env::var_os("KD_SHARED").map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared")), PathBuf::from);
    let folder = std::env::var_os("KD_GOLDEN").map_or_else(|| shared.join("golden/dev"), PathBuf::from).join(kind);
    let Ok(entries) = std::fs::read_dir(&folder) else {
        assert!(!promised, "fixtures were promised, but {} cannot be read", folder.display());
        println!("skipped: no fixtures at {}", folder.display());
        return None;
    };
    let mut paths: Vec<PathBuf> =
        entries.map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "safetensors")).collect();
    paths.sort();
    assert!(!paths.is_empty(), "no fixture in {}", folder.display());
    Some(paths)
}
