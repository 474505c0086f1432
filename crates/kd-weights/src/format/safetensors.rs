//! [safetensors](https://github.com/huggingface/safetensors): a JSON header and raw bytes, checked by its own crate for holes, overlaps and sizes.
//!
//! The crate keeps the last of two entries of one name; here that is an error.

use std::collections::BTreeSet;

use ::safetensors::{Dtype, SafeTensors};
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::bytes::Bytes;
use super::tensor::Element;
use super::{Contents, Read};

/// A header length that fits into the file, and an opening brace.
pub(super) fn matches(file: &[u8]) -> bool {
    let length = Bytes::new(file).u64();
    file.get(8) == Some(&b'{') && length.is_ok_and(|n| n <= file.len() as u64)
}

pub(super) fn read(file: &[u8]) -> Read<Contents> {
    let parsed = SafeTensors::deserialize(file).map_err(|e| e.to_string())?;
    let (header, metadata) = SafeTensors::read_metadata(file).map_err(|e| e.to_string())?;
    unique(&file[8..8 + header])?;
    let mut contents = Contents { metadata: metadata.metadata().clone().unwrap_or_default().into_iter().collect(), ..Contents::default() };
    for (name, view) in parsed.iter() {
        let element = match view.dtype() {
            Dtype::F64 => Element::F64,
            Dtype::F32 => Element::F32,
            Dtype::F16 => Element::F16,
            Dtype::BF16 => Element::Bf16,
            Dtype::I64 => Element::I64,
            Dtype::I32 => Element::I32,
            Dtype::I16 => Element::I16,
            Dtype::I8 => Element::I8,
            Dtype::U8 | Dtype::BOOL => Element::U8,
            other => return Err(format!("`{name}` is of type {other:?}, which is not read")),
        };
        contents.insert(name, element.tensor(view.data(), view.shape())?)?;
    }
    Ok(contents)
}

/// Refuses a header that names a tensor twice.
fn unique(header: &[u8]) -> Read<()> {
    struct Names;
    impl<'de> Visitor<'de> for Names {
        type Value = Option<String>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let (mut seen, mut twice) = (BTreeSet::new(), None);
            while let Some((name, _)) = map.next_entry::<String, IgnoredAny>()? {
                if !seen.insert(name.clone()) {
                    twice = Some(name);
                }
            }
            Ok(twice)
        }
    }
    match serde_json::Deserializer::from_slice(header).deserialize_map(Names) {
        Ok(None) => Ok(()),
        Ok(Some(name)) => Err(format!("`{name}` is there twice")),
        Err(e) => Err(e.to_string()),
    }
}
