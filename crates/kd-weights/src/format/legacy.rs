//! `torch.save` before PyTorch 1.6, and with `_use_new_zipfile_serialization=False`: five pickles in a row (a magic number, the protocol,
//! facts about the machine, the object, the keys of its storages), then per storage a 64-bit number of elements and the elements.

use std::collections::BTreeMap;

use super::bytes::Bytes;
use super::pickle::{Pickle, Value};
use super::torch::state_dict;
use super::{Contents, Read};

/// 0x1950a86a20f9469cfc6c as a pickle of protocol 2.
const MAGIC: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
const PROTOCOL: i64 = 1001;

pub(super) fn matches(file: &[u8]) -> bool {
    file.starts_with(MAGIC)
}

pub(super) fn read(file: &[u8]) -> Read<Contents> {
    let mut at = MAGIC.len();
    let mut next = || -> Read<Pickle<'_>> {
        let pickle = Pickle::run(&file[at..])?;
        at += pickle.len;
        Ok(pickle)
    };
    let protocol = next()?;
    if !matches!(protocol.root(), Value::Int(PROTOCOL)) {
        return Err(format!("its protocol is not {PROTOCOL}"));
    }
    let machine = next()?;
    if machine.entries(machine.root()).any(|(k, v)| k == "little_endian" && !matches!(v, Value::Bool(true))) {
        return Err("its numbers are big-endian, which is not read".to_string());
    }
    let (object, keys) = (next()?, next()?);
    let Value::List(ids) = keys.root() else { return Err("it does not list its storages".to_string()) };
    let described = object.storages()?;
    let mut bytes = Bytes::seek(file, at);
    let mut found = BTreeMap::new();
    for &id in ids {
        let &Value::Text(key) = keys.get(id) else { return Err("it lists a storage that has no name".to_string()) };
        let storage = described.get(key).ok_or_else(|| format!("nothing says what the storage `{key}` holds"))?;
        let n = bytes.length()?;
        if n != storage.len {
            return Err(format!("the storage `{key}` has {n} elements, its description says {}", storage.len));
        }
        let size = n.checked_mul(storage.element.size()).ok_or_else(|| format!("the storage `{key}` is absurdly long"))?;
        if found.insert(key, bytes.take(size)?).is_some() {
            return Err(format!("the storage `{key}` is there twice"));
        }
    }
    if bytes.left() > 0 {
        return Err(format!("{} bytes are left over behind its storages", bytes.left()));
    }
    state_dict(&object, file, |s| found.get(s.key).copied().ok_or_else(|| format!("the storage `{}` is missing", s.key)))
}
