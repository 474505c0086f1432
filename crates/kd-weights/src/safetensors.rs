//! safetensors: u64 length of a JSON header, the header, the tensors' bytes.
//!
//! The `safetensors` crate checks that the tensors lie one behind the other without gap or overlap and that their sizes are those of their shapes;
//! the header is taken apart here because a key that occurs twice is an error (JSON allows it), and because tensors are read one by one.

use std::collections::BTreeMap;

use ::safetensors::Dtype;
use ::safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserialize;
use serde::de::{Error as _, MapAccess, Visitor};

use crate::element::Element;
use crate::source::Source;
use crate::{Content, MAX_TENSORS, Result};

const MAX_HEADER: u64 = 32 << 20;
const LENGTH: u64 = 8;

pub(crate) fn matches(head: &[u8], len: u64) -> bool {
    header_length(head).is_some_and(|n| n <= len - LENGTH) && head.get(8) == Some(&b'{')
}

fn header_length(head: &[u8]) -> Option<u64> {
    head.first_chunk().map(|n| u64::from_le_bytes(*n))
}

pub(crate) fn read(source: &Source) -> Result<Content> {
    let length = header_length(&source.head(LENGTH)?).unwrap_or(0);
    if length > MAX_HEADER {
        return Err(source.corrupt(format!("its header has {length} bytes, more than {MAX_HEADER}")));
    }
    let header = source.read_at(LENGTH, length, "the header")?;
    let Header { metadata, mut tensors } =
        serde_json::from_slice(&header).map_err(|e| source.corrupt(format!("safetensors header: {e}")))?;
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let checked = Metadata::new(None, tensors.clone()).map_err(|e| source.corrupt(format!("safetensors header: {e}")))?;
    let start = LENGTH + length;
    let (declared, present) = (checked.data_len() as u64, source.len() - start);
    if declared != present {
        return Err(source.corrupt(format!("its header declares {declared} bytes of tensors, the file has {present}")));
    }
    let tensors = tensors
        .into_iter()
        .map(|(name, info)| {
            let element =
                element(info.dtype).ok_or_else(|| source.corrupt(format!("`{name}` is of type {}, which is not supported", info.dtype)))?;
            let (from, to) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
            let bytes = source.read_at(start + from, to - from, &name)?;
            let tensor = element.decode(&bytes, &info.shape).map_err(|e| source.corrupt(format!("`{name}`: {e}")))?;
            Ok((name, tensor))
        })
        .collect::<Result<_>>()?;
    Ok(Content { tensors, metadata })
}

fn element(dtype: Dtype) -> Option<Element> {
    Some(match dtype {
        Dtype::BOOL => Element::Bool,
        Dtype::U8 => Element::U8,
        Dtype::I8 => Element::I8,
        Dtype::I16 => Element::I16,
        Dtype::U16 => Element::U16,
        Dtype::I32 => Element::I32,
        Dtype::U32 => Element::U32,
        Dtype::I64 => Element::I64,
        Dtype::F16 => Element::F16,
        Dtype::BF16 => Element::BF16,
        Dtype::F32 => Element::F32,
        Dtype::F64 => Element::F64,
        _ => return None,
    })
}

struct Header {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, TensorInfo)>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header { metadata: BTreeMap::new(), tensors: Vec::new() };
                let mut seen = std::collections::BTreeSet::new();
                while let Some(key) = map.next_key::<String>()? {
                    if !seen.insert(key.clone()) {
                        return Err(A::Error::custom(format_args!("the key `{key}` occurs twice")));
                    }
                    if key == "__metadata__" {
                        header.metadata = map.next_value()?;
                    } else if header.tensors.len() < MAX_TENSORS {
                        header.tensors.push((key, map.next_value()?));
                    } else {
                        return Err(A::Error::custom(format_args!("more than {MAX_TENSORS} tensors")));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
