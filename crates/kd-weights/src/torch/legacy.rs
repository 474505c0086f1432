//! What `torch.save` wrote before version 1.6: five pickles and the storages behind them.
//!
//! ```text
//! magic 0x1950a86a20f9469cfc6c | protocol 1001 | facts of the machine | object | list of storage keys | for each key: i64 count, elements
//! ```

use std::collections::BTreeMap;

use super::pickle::{self, Object, Value};
use crate::source::Source;
use crate::{Content, Result};

const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
const PROTOCOL: i64 = 1001;

pub(crate) fn matches(head: &[u8], _: u64) -> bool {
    matches!(head, [0x80, 2..=5, ..])
}

pub(crate) fn read(source: &Source) -> Result<Content> {
    let head = source.head(pickle::MAX_BYTES)?;
    let mut at = 0;
    let mut next = |what: &str| -> Result<Object<'_>> {
        let object = pickle::read(&head[at..]).map_err(|e| source.corrupt(format!("{what} (a pickle at byte {at}): {e}")))?;
        at += object.len;
        Ok(object)
    };
    let magic = next("the magic number")?.top;
    if !matches!(magic, Value::Long(bytes) if bytes == MAGIC) {
        return Err(source.corrupt("a pickle, but not of torch.save: its magic number is missing"));
    }
    let protocol = next("the protocol")?.top;
    if !matches!(protocol, Value::Int(PROTOCOL)) {
        return Err(source.corrupt(format!("a torch.save file of another protocol than {PROTOCOL}")));
    }
    let machine = next("the machine")?;
    let big = machine.dict(machine.top).is_some_and(|d| d.iter().any(|e| matches!(e, (Value::Str("little_endian"), Value::Bool(false)))));
    if big {
        return Err(source.corrupt("its byte order is big; only little is supported"));
    }
    let object = next("the object")?;
    let keys = next("the storage keys")?;
    let state = super::state_dict(&object).map_err(|e| source.corrupt(e))?;
    let places = places(source, &object, &keys, at as u64)?;
    let tensors = super::tensors(source, &state, |storage| {
        let what = format!("storage `{}`", storage.key);
        let &place = places.get(storage.key).ok_or_else(|| source.corrupt(format!("{what} is not in the file's list")))?;
        source.read_at(place, storage.bytes() as u64, &what)
    })?;
    Ok(Content { tensors, metadata: Default::default() })
}

/// Where each storage's elements begin; each has as many as the object declares.
fn places<'a>(source: &Source, object: &Object<'a>, keys: &Object<'a>, mut at: u64) -> Result<BTreeMap<&'a str, u64>> {
    let mut declared = BTreeMap::new();
    for storage in object.storages() {
        declared.insert(storage.key, storage);
    }
    let mut places = BTreeMap::new();
    for &key in keys.list(keys.top).ok_or_else(|| source.corrupt("its storage keys are not a list"))? {
        let Value::Str(key) = key else { return Err(source.corrupt("a storage key that is not a text")) };
        let storage = declared.get(key).ok_or_else(|| source.corrupt(format!("storage `{key}` belongs to no tensor")))?;
        let what = format!("storage `{key}`");
        let count: [u8; 8] = source.read_at(at, 8, &what)?.try_into().unwrap_or_default();
        let count = i64::from_le_bytes(count);
        if usize::try_from(count) != Ok(storage.numel) {
            return Err(source.corrupt(format!("{what} has {count} elements; its tensors declare {}", storage.numel)));
        }
        if places.insert(key, at + 8).is_some() {
            return Err(source.corrupt(format!("{what} is listed twice")));
        }
        at = at.checked_add(8 + storage.bytes() as u64).ok_or_else(|| source.corrupt(format!("{what} is too large")))?;
    }
    match at == source.len() {
        true => Ok(places),
        false => Err(source.corrupt(format!("its storages end at byte {at}, the file has {}", source.len()))),
    }
}
