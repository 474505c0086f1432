//! MXNet's `.params`: a list of arrays, then the list of their names.
//!
//! ```text
//! u64 0x112 | u64 0 | u64 count | arrays | u64 count | for each name: u64 length, bytes
//! array: u32 0xf993fac9 | i32 storage type (0: dense) | u32 rank | rank x i64 | i32 device type | i32 device | i32 element type | elements
//! ```
//!
//! All little-endian. Names carry `arg:` (parameters) or `aux:` (running statistics).

use crate::element::Element;
use crate::source::Source;
use crate::{Content, MAX_NAME, MAX_TENSORS, Result};

const LIST: u64 = 0x112;
const ARRAY: u32 = 0xf993_fac9;
/// The same layout, written under NumPy's rules for shapes.
const NUMPY_ARRAY: u32 = 0xf993_faca;
const MAX_RANK: u32 = 32;

pub(crate) fn matches(head: &[u8], _: u64) -> bool {
    head.get(..8) == Some(&LIST.to_le_bytes()) && head.get(8..16) == Some(&[0; 8])
}

pub(crate) fn read(source: &Source) -> Result<Content> {
    let mut reader = Reader { source, at: 16 };
    let count = reader.count("arrays")?;
    let tensors = (0..count).map(|i| reader.array(i)).collect::<Result<Vec<_>>>()?;
    let named = reader.count("names")?;
    if named != count {
        return Err(source.corrupt(format!("{count} arrays, but {named} names")));
    }
    let tensors = tensors.into_iter().map(|t| Ok((reader.name()?, t))).collect::<Result<_>>()?;
    if reader.at != source.len() {
        return Err(source.corrupt(format!("ends at byte {}, the file has {}", reader.at, source.len())));
    }
    Ok(Content { tensors, metadata: Default::default() })
}

struct Reader<'s> {
    source: &'s Source,
    at: u64,
}

impl Reader<'_> {
    fn take(&mut self, len: u64, what: &str) -> Result<Vec<u8>> {
        let bytes = self.source.read_at(self.at, len, what)?;
        self.at += len;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(self.take(4, what)?.first_chunk().map_or(0, |b| u32::from_le_bytes(*b)))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(self.take(8, what)?.first_chunk().map_or(0, |b| u64::from_le_bytes(*b)))
    }

    fn count(&mut self, what: &str) -> Result<u64> {
        let count = self.u64(what)?;
        match count <= MAX_TENSORS as u64 {
            true => Ok(count),
            false => Err(self.source.corrupt(format!("{count} {what}, more than {MAX_TENSORS}"))),
        }
    }

    fn array(&mut self, index: u64) -> Result<candle_core::Tensor> {
        let what = format!("array {index}");
        let begin = self.at;
        let corrupt = |why: String| self.source.corrupt(format!("{what} at byte {begin}: {why}"));
        let header = (self.u32(&what)?, self.u32(&what)?, self.u32(&what)?);
        let rank = match header {
            (ARRAY | NUMPY_ARRAY, 0, rank @ 1..=MAX_RANK) => rank,
            (ARRAY | NUMPY_ARRAY, 0, rank) => return Err(corrupt(format!("{rank} dimensions"))),
            (ARRAY | NUMPY_ARRAY, ..) => return Err(corrupt("sparse; only dense arrays are supported".to_string())),
            (magic, ..) => return Err(corrupt(format!("begins with {magic:#x}; expected {ARRAY:#x}"))),
        };
        let mut shape = Vec::new();
        for _ in 0..rank {
            let d = self.u64(&what)?.cast_signed();
            shape.push(usize::try_from(d).map_err(|_| corrupt(format!("a dimension of {d}")))?);
        }
        let (_device, _number, kind) = (self.u32(&what)?, self.u32(&what)?, self.u32(&what)?);
        let element = match kind {
            0 => Element::F32,
            1 => Element::F64,
            2 => Element::F16,
            3 => Element::U8,
            4 => Element::I32,
            5 => Element::I8,
            6 => Element::I64,
            other => return Err(corrupt(format!("elements of type {other}, which is not supported"))),
        };
        let bytes = element.bytes(&shape).ok_or_else(|| corrupt(format!("a shape of {shape:?}")))?;
        let data = self.take(bytes as u64, &what)?;
        element.decode(&data, &shape).map_err(corrupt)
    }

    fn name(&mut self) -> Result<String> {
        let len = self.u64("a name")?;
        if len > MAX_NAME as u64 {
            return Err(self.source.corrupt(format!("a name of {len} bytes, more than {MAX_NAME}")));
        }
        String::from_utf8(self.take(len, "a name")?).map_err(|_| self.source.corrupt("a name that is not UTF-8"))
    }
}
