//! MXNet's `.params`: arrays, then their names (`arg:NAME` for parameters, `aux:NAME` for statistics).
//!
//! ```text
//! u64 0x112, u64 0, u64 number of arrays
//! per array: u32 0xF993FAC9, i32 storage type (0: dense), u32 dimensions, i64 each, i32 device type, i32 device id, i32 element type, data
//! u64 number of names; per name: u64 length, bytes
//! ```

use super::bytes::{Bytes, text};
use super::tensor::{Element, count};
use super::{Contents, Read};
use crate::limits;

const LIST: u64 = 0x112;
const ARRAY: u32 = 0xF993_FAC9;

pub(super) fn matches(file: &[u8]) -> bool {
    Bytes::new(file).u64() == Ok(LIST)
}

pub(super) fn read(file: &[u8]) -> Read<Contents> {
    let mut bytes = Bytes::seek(file, 16);
    let arrays = bytes.length()?;
    // The least that an array takes bounds what is reserved for them.
    if arrays > limits::TENSORS || arrays > file.len() / 28 {
        return Err(format!("{arrays} arrays are announced in a file of {} bytes", file.len()));
    }
    let tensors = (0..arrays).map(|i| array(&mut bytes).map_err(|e| format!("array {i}: {e}"))).collect::<Read<Vec<_>>>()?;
    let names = bytes.length()?;
    if names != arrays {
        return Err(format!("{names} names for {arrays} arrays"));
    }
    let mut contents = Contents::default();
    for tensor in tensors {
        let length = bytes.length()?;
        contents.insert(text(bytes.take(length)?)?, tensor)?;
    }
    match bytes.left() {
        0 => Ok(contents),
        n => Err(format!("{n} bytes are left over behind the names")),
    }
}

fn array(bytes: &mut Bytes<'_>) -> Read<candle_core::Tensor> {
    let (magic, storage) = (bytes.u32()?, bytes.i32()?);
    if magic != ARRAY || storage != 0 {
        return Err(format!("begins with {magic:#x} and storage type {storage}; only dense arrays of version 2 ({ARRAY:#x}) are read"));
    }
    let dimensions = bytes.u32()? as usize;
    if dimensions > limits::DIMENSIONS {
        return Err(format!("has {dimensions} dimensions; at most {} are read", limits::DIMENSIONS));
    }
    let size = |n: i64| usize::try_from(n).map_err(|_| format!("has a dimension of {n}"));
    let shape = (0..dimensions).map(|_| size(bytes.i64()?)).collect::<Read<Vec<_>>>()?;
    bytes.take(8)?; // device
    let element = match bytes.i32()? {
        0 => Element::F32,
        1 => Element::F64,
        2 => Element::F16,
        3 => Element::U8,
        4 => Element::I32,
        5 => Element::I8,
        6 => Element::I64,
        other => return Err(format!("has element type {other}; 0 to 6 are read")),
    };
    element.tensor(bytes.take(count(&shape)? * element.size())?, &shape)
}
