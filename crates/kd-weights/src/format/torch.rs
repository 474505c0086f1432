//! `torch.save` since PyTorch 1.6: a zip archive of `NAME/data.pkl`, a pickle of the structure, and `NAME/data/KEY`, the numbers of each storage.
//!
//! The state dict may be the whole pickle or stand under one of the names in [`WRAPPERS`].

use super::pickle::{Pickle, Storage, Value};
use super::tensor::Budget;
use super::zip::{Archive, MEMBER};
use super::{Contents, Read};

/// Where checkpoints keep the state dict, in the order of search.
const WRAPPERS: [&str; 5] = ["state_dict", "model", "model_state_dict", "net", "model_ema"];

pub(super) fn matches(file: &[u8]) -> bool {
    file.starts_with(MEMBER)
}

pub(super) fn read(file: &[u8]) -> Read<Contents> {
    let archive = Archive::open(file)?;
    let mut pickles = archive.names().filter_map(|n| n.strip_suffix("data.pkl")).filter(|n| n.is_empty() || n.ends_with('/'));
    let (Some(folder), None) = (pickles.next(), pickles.next()) else {
        return Err("it is a zip archive, but not of torch.save: that has exactly one `data.pkl`".to_string());
    };
    let order = format!("{folder}byteorder");
    if archive.names().any(|n| n == order) && archive.get(&order)? != b"little" {
        return Err("its numbers are big-endian, which is not read".to_string());
    }
    let pickle = Pickle::run(archive.get(&format!("{folder}data.pkl"))?)?;
    let storage = |s: &Storage<'_>| {
        let data = archive.get(&format!("{folder}data/{}", s.key))?;
        if Some(data.len()) != s.len.checked_mul(s.element.size()) {
            return Err(format!("the storage `{}` has {} bytes, its description says {} of {:?}", s.key, data.len(), s.len, s.element));
        }
        Ok(data)
    };
    state_dict(&pickle, file, storage)
}

/// The tensors of the state dict in `pickle`, and the plain values beside it.
pub(super) fn state_dict<'a>(pickle: &Pickle<'a>, file: &[u8], storage: impl Fn(&Storage<'a>) -> Read<&'a [u8]>) -> Read<Contents> {
    let root = pickle.root();
    let is_state = |value: &Value<'_>| pickle.entries(value).any(|(_, v)| matches!(v, Value::Tensor(_)));
    let wrapped = WRAPPERS.iter().find_map(|name| pickle.entries(root).find(|(k, v)| k == name && is_state(v)));
    let state = match wrapped {
        Some((_, state)) => state,
        None if is_state(root) => root,
        None => {
            let names: Vec<_> = pickle.entries(root).take(10).map(|(k, _)| format!("`{k}`")).collect();
            let found = if names.is_empty() { "no dictionary".to_string() } else { format!("only {}", names.join(", ")) };
            return Err(format!("there is no state dict at the top nor under {}; found {found}", WRAPPERS.join(", ")));
        }
    };
    let mut contents = Contents::default();
    let mut budget = Budget::new(file);
    for (name, value) in pickle.entries(state) {
        let Value::Tensor(view) = value else {
            return Err(format!("`{name}` in the state dict is not a tensor"));
        };
        let tensor = view.tensor(storage(&view.storage)?, &mut budget).map_err(|e| format!("`{name}`: {e}"))?;
        contents.insert(name, tensor)?;
    }
    if wrapped.is_some() {
        for (name, value) in pickle.entries(root) {
            let text = match value {
                Value::Int(v) => v.to_string(),
                Value::Float(v) => v.to_string(),
                Value::Bool(v) => v.to_string(),
                Value::Text(v) => (*v).to_string(),
                _ => continue,
            };
            contents.metadata.insert(name.to_string(), text);
        }
    }
    Ok(contents)
}
