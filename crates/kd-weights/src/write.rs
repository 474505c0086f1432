//! Writing safetensors.

use std::collections::BTreeMap;

use candle_core::Tensor;
use serde_json::json;

use crate::Result;

/// A safetensors file of `tensors` and `metadata`, as bytes.
///
/// The same input gives the same bytes, which the safetensors crate's own writer does not promise: it orders metadata by hash.
///
/// # Errors
/// A tensor of a type that the format does not have.
pub fn to_safetensors(tensors: &[(String, Tensor)], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let mut tensors: Vec<&(String, Tensor)> = tensors.iter().collect();
    // Wide types first keep every tensor aligned.
    tensors.sort_by_key(|(_, t)| std::cmp::Reverse(t.dtype().size_in_bytes()));
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    if !metadata.is_empty() {
        header.insert("__metadata__".to_string(), serde_json::to_value(metadata)?);
    }
    for (name, tensor) in tensors {
        let start = data.len();
        tensor.write_bytes(&mut data)?;
        let dtype = tensor.dtype().as_str().to_uppercase();
        let entry = json!({ "dtype": dtype, "shape": tensor.dims(), "data_offsets": [start, data.len()] });
        header.insert(name.clone(), entry);
    }
    let mut header = serde_json::to_string(&header)?;
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.into_bytes());
    file.append(&mut data);
    Ok(file)
}

/// What stands beside exported weights: enough to run them on an image.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelInfo {
    /// Name of the network in the registry.
    pub model: Option<String>,
    /// Outputs of the classifier.
    pub classes: Option<usize>,
    /// Channels, height and width of the images.
    pub input: Option<[usize; 3]>,
    /// Mean per channel of pixels in `[0,1]`.
    pub mean: Option<Vec<f64>>,
    /// Standard deviation per channel.
    pub std: Option<Vec<f64>>,
    /// Names of the classes.
    pub class_names: Option<Vec<String>>,
}

impl ModelInfo {
    /// As a file's metadata: `model`, `num_classes`, `input`, `mean`, `std`, `class_names`; lists as JSON.
    pub fn to_metadata(&self) -> BTreeMap<String, String> {
        let entries = [
            ("model", self.model.clone()),
            ("num_classes", self.classes.map(|n| n.to_string())),
            ("input", self.input.map(|v| json!(v).to_string())),
            ("mean", self.mean.as_ref().map(|v| json!(v).to_string())),
            ("std", self.std.as_ref().map(|v| json!(v).to_string())),
            ("class_names", self.class_names.as_ref().map(|v| json!(v).to_string())),
        ];
        entries.into_iter().filter_map(|(k, v)| Some((k.to_string(), v?))).collect()
    }

    /// From a file's metadata; what is absent or unreadable is `None`.
    pub fn from_metadata(metadata: &BTreeMap<String, String>) -> Self {
        fn list<T: serde::de::DeserializeOwned>(metadata: &BTreeMap<String, String>, key: &str) -> Option<T> {
            serde_json::from_str(metadata.get(key)?).ok()
        }
        Self {
            model: metadata.get("model").cloned(),
            classes: list(metadata, "num_classes"),
            input: list(metadata, "input"),
            mean: list(metadata, "mean"),
            std: list(metadata, "std"),
            class_names: list(metadata, "class_names"),
        }
    }
}
