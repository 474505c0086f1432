//! The tensors of a model under stable names, whether it keeps them flat or in variables of its own.

use candle_core::{DType, Device, Tensor};
use kd_core::{Error, Model, Result, StateDict, Trainable};
use sha2::{Digest, Sha256};

/// Type and place of a model's parameters, `None` when it has none.
pub(crate) fn home(model: &dyn Model) -> Option<(DType, Device)> {
    if let Some(params) = model.params() {
        return Some((params.dtype(), params.device().clone()));
    }
    match model.trainable() {
        Trainable::Vars(vars) => vars.first().map(|v| (v.dtype(), v.device().clone())),
        _ => None,
    }
}

/// Copies of a model's tensors: the state dict in PyTorch's order, or the variables of a user's own model as `var.<i>`.
pub fn tensors(model: &dyn Model) -> Result<Vec<(String, Tensor)>> {
    if let Some(params) = model.params() {
        return params.state_dict();
    }
    match model.trainable() {
        Trainable::Vars(vars) => vars.iter().enumerate().map(|(i, v)| Ok((format!("var.{i}"), v.as_detached_tensor().copy()?))).collect(),
        _ => Ok(vec![]),
    }
}

/// Puts back what [`tensors`] gave. `find` is asked for every name.
///
/// # Errors
/// A name that is not found or a tensor of another shape; then nothing has changed.
pub(crate) fn assign(model: &dyn Model, who: &str, find: impl Fn(&str) -> Option<Tensor>) -> Result<()> {
    for (name, old) in tensors(model)? {
        match find(&name) {
            None => return Err(Error::missing(who, name)),
            Some(new) if new.dims() != old.dims() => return Err(Error::shape(name, format!("{:?}", old.dims()), new.dims())),
            Some(_) => {}
        }
    }
    if let Some(params) = model.params() {
        return params.assign(find);
    }
    if let Trainable::Vars(vars) = model.trainable() {
        for (i, var) in vars.iter().enumerate() {
            if let Some(new) = find(&format!("var.{i}")) {
                var.set(&new.to_device(var.device())?.to_dtype(var.dtype())?)?;
            }
        }
    }
    Ok(())
}

/// SHA-256 over names, shapes and values: the same for the same weights, wherever they were read from.
pub fn fingerprint(model: &dyn Model) -> Result<String> {
    let mut hash = Sha256::new();
    for (name, tensor) in tensors(model)? {
        hash.update(format!("{name} {:?} {:?}\n", tensor.dtype(), tensor.dims()));
        hash.update(bytes(&tensor)?);
    }
    Ok(hex(&hash.finalize()))
}

/// The file format of weights and checkpoints: [safetensors](https://github.com/huggingface/safetensors), byte for byte the same for the
/// same input (the crate's own writer orders metadata by hash).
pub(crate) fn to_safetensors<'a>(tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>, metadata: &StringMap) -> Result<Vec<u8>> {
    let mut tensors: Vec<(&str, &Tensor)> = tensors.into_iter().collect();
    // Wide types first keep every tensor aligned.
    tensors.sort_by_key(|(_, t)| std::cmp::Reverse(t.dtype().size_in_bytes()));
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".to_string(), serde_json::to_value(metadata)?);
    }
    let mut data = Vec::new();
    for (name, tensor) in tensors {
        let start = data.len();
        data.extend(bytes(tensor)?);
        let dtype = tensor.dtype().as_str().to_uppercase();
        header.insert(name.to_string(), serde_json::json!({ "dtype": dtype, "shape": tensor.dims(), "data_offsets": [start, data.len()] }));
    }
    let mut header = serde_json::to_string(&header)?;
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.into_bytes());
    file.append(&mut data);
    Ok(file)
}

/// Reads [`to_safetensors`] back, onto the CPU.
pub(crate) fn from_safetensors(file: &[u8]) -> Result<StateDict> {
    Ok(candle_core::safetensors::load_buffer(file, &Device::Cpu)?.into_iter().collect())
}

/// Text by key.
pub type StringMap = std::collections::BTreeMap<String, String>;

/// Row-major little-endian bytes.
fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let mut own = Vec::new();
    tensor.write_bytes(&mut own)?;
    Ok(own)
}

pub(crate) fn hex(digest: &[u8]) -> String {
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

/// SHA-256 of `bytes`.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}
