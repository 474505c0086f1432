//! What the two formats of `torch.save` share: the state dict inside the pickled object, and tensors as views of storages.

pub(crate) mod legacy;
mod pickle;
pub(crate) mod zip;

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};

use crate::source::Source;
use crate::{MAX_TENSORS, Result};
use pickle::{Node, Object, Storage, TensorRef, Value};

/// Where training scripts put the state dict.
const CONTAINERS: [&str; 5] = ["state_dict", "model", "model_state_dict", "net", "model_ema"];

/// The tensors of the state dict in `object`.
///
/// # Errors
/// An object without one, or one that holds anything else than tensors; the text says what was found.
fn state_dict<'o, 'a>(object: &'o Object<'a>) -> Result<Vec<(&'a str, &'o TensorRef<'a>)>, String> {
    let Some(top) = object.dict(object.top) else {
        return Err(format!("holds {}, not a state dict; save `model.state_dict()`", object.describe(object.top)));
    };
    let tensors = |dict: &[(Value, Value)]| dict.iter().any(|&(_, v)| object.tensor(v).is_some());
    let inner = |key: &str| {
        let value = top.iter().rev().find(|(k, _)| matches!(k, Value::Str(k) if *k == key))?.1;
        object.dict(value).filter(|d| tensors(d))
    };
    let dict = CONTAINERS.iter().find_map(|key| inner(key)).or_else(|| tensors(top).then_some(top)).ok_or_else(|| {
        let keys: Vec<String> = top.iter().take(10).map(|&(k, _)| object.describe(k)).collect();
        format!("holds no tensor at its top or under {}; its keys: {}", CONTAINERS.join(", "), keys.join(", "))
    })?;
    if dict.len() > MAX_TENSORS {
        return Err(format!("its state dict has {} entries, more than {MAX_TENSORS}", dict.len()));
    }
    dict.iter()
        .map(|&(key, value)| {
            let Value::Str(key) = key else { return Err(format!("a key of its state dict is {}, not a text", object.describe(key))) };
            let tensor = object.tensor(value).ok_or_else(|| format!("`{key}` is {}, not a tensor", object.describe(value)))?;
            Ok((key, tensor))
        })
        .collect()
}

/// The named tensors, whose storages `load` reads. Tensors of one storage share its memory.
fn tensors<'a>(
    source: &Source,
    state: &[(&'a str, &TensorRef<'a>)],
    mut load: impl FnMut(&Storage<'a>) -> Result<Vec<u8>>,
) -> Result<Vec<(String, Tensor)>> {
    // A storage's elements, and how many were copied out of it.
    let mut storages: BTreeMap<&str, (Storage, Tensor, usize)> = BTreeMap::new();
    state
        .iter()
        .map(|&(name, tensor)| {
            let storage = &tensor.storage;
            let corrupt = |why: &dyn std::fmt::Display| source.corrupt(format!("`{name}`: {why}"));
            if !storages.contains_key(storage.key) {
                let bytes = load(storage)?;
                let flat = storage.element.decode(&bytes, &[storage.numel]).map_err(|e| corrupt(&e))?;
                storages.insert(storage.key, (*storage, flat, 0));
            }
            let (first, flat, copied) = storages.get_mut(storage.key).expect("invariant: inserted above");
            if first != storage {
                return Err(corrupt(&format!("storage `{}` is declared twice, differently", storage.key)));
            }
            let count: usize = tensor.shape.iter().product();
            let view = if tensor.is_row_major() {
                flat.narrow(0, if count == 0 { 0 } else { tensor.offset }, count)
            } else {
                *copied += count;
                if *copied > storage.numel {
                    return Err(corrupt(&format!("the tensors of storage `{}` hold more than it does", storage.key)));
                }
                let indices = tensor.indices().map_err(|e| corrupt(&e))?;
                Tensor::from_vec(indices, count, &Device::Cpu).and_then(|i| flat.index_select(&i, 0))
            };
            Ok((name.to_string(), view.and_then(|t| t.reshape(tensor.shape.as_slice())).map_err(|e| corrupt(&e))?))
        })
        .collect()
}

impl<'a> Object<'a> {
    fn dict(&self, value: Value<'a>) -> Option<&[(Value<'a>, Value<'a>)]> {
        match self.node(value)? {
            Node::Dict(entries) => Some(entries),
            _ => None,
        }
    }

    fn tensor(&self, value: Value<'a>) -> Option<&TensorRef<'a>> {
        match self.node(value)? {
            Node::Tensor(tensor) => Some(tensor),
            _ => None,
        }
    }
}
