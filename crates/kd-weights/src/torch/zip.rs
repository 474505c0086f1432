//! PyTorch's zip: `NAME/data.pkl` is the pickled object, `NAME/data/KEY` the bytes of storage KEY, all stored without compression.

use std::io::{BufReader, Read};

use ::zip::ZipArchive;
use ::zip::result::ZipError;

use super::pickle;
use crate::source::Source;
use crate::{Content, MAX_TENSORS, Result};

/// Beside a storage for each tensor there are half a dozen entries (`version`, `byteorder`, ...).
const MAX_ENTRIES: usize = MAX_TENSORS + 1000;

pub(crate) fn matches(head: &[u8], _: u64) -> bool {
    head.starts_with(b"PK\x03\x04") || head.starts_with(b"PK\x05\x06")
}

pub(crate) fn read(source: &Source) -> Result<Content> {
    let mut archive = Archive::open(source)?;
    let name = archive.object()?;
    let root = name.strip_suffix("data.pkl").unwrap_or_default().to_string();
    if let Some(order) = archive.get(&format!("{root}byteorder"), None)?.filter(|order| order != b"little") {
        return Err(source.corrupt(format!("its byte order is \"{}\"; only little is supported", order.escape_ascii())));
    }
    let bytes = archive.get(&name, None)?.unwrap_or_default();
    let object = pickle::read(&bytes).map_err(|e| source.corrupt(format!("{name}: {e}")))?;
    let state = super::state_dict(&object).map_err(|e| source.corrupt(e))?;
    let tensors = super::tensors(source, &state, |storage| {
        let entry = format!("{root}data/{}", storage.key);
        archive.get(&entry, Some(storage.bytes() as u64))?.ok_or_else(|| source.corrupt(format!("its entry {entry} is missing")))
    })?;
    Ok(Content { tensors, metadata: Default::default() })
}

struct Archive<'s> {
    source: &'s Source,
    zip: ZipArchive<BufReader<&'s std::fs::File>>,
}

impl<'s> Archive<'s> {
    fn open(source: &'s Source) -> Result<Self> {
        let broken = |e: ZipError| source.corrupt(format!("a damaged zip: {e}"));
        let mut zip = ZipArchive::new(BufReader::new(source.file())).map_err(broken)?;
        if zip.len() > MAX_ENTRIES {
            return Err(source.corrupt(format!("a zip of {} entries, more than {MAX_ENTRIES}", zip.len())));
        }
        if zip.has_duplicate_names() {
            return Err(source.corrupt("a damaged zip: two entries have the same name"));
        }
        if zip.has_overlapping_entries().map_err(broken)? {
            return Err(source.corrupt("a damaged zip: two entries overlap"));
        }
        Ok(Self { source, zip })
    }

    /// The name of the entry that holds the pickled object.
    fn object(&self) -> Result<String> {
        let top = |name: &str| name == "data.pkl" || name.strip_suffix("/data.pkl").is_some_and(|root| !root.contains('/'));
        let names: Vec<_> = self.zip.file_names().filter_map(|n| n.ok().map(|n| n.into_owned())).filter(|n| top(n)).collect();
        match names.as_slice() {
            [name] => Ok(name.clone()),
            [] => Err(self.source.corrupt("a zip, but not of torch.save: it has no entry NAME/data.pkl")),
            _ => Err(self.source.corrupt(format!("a zip of {} pickled objects; expected one", names.len()))),
        }
    }

    /// The bytes of an entry: as many as `expected`, or as a pickle may have; `None` when there is no such entry.
    fn get(&mut self, name: &str, expected: Option<u64>) -> Result<Option<Vec<u8>>> {
        let source = self.source;
        let broken = |why: String| source.corrupt(format!("{name}: {why}"));
        let mut entry = match self.zip.by_name(name) {
            Err(ZipError::FileNotFound) => return Ok(None),
            entry => entry.map_err(|e| broken(e.to_string()))?,
        };
        let size = entry.size();
        if entry.compression() != ::zip::CompressionMethod::Stored || entry.compressed_size() != size || entry.encrypted() {
            return Err(broken("compressed or encrypted; torch.save does neither".to_string()));
        }
        match expected {
            Some(expected) if size != expected => return Err(broken(format!("{size} bytes; its tensors declare {expected}"))),
            None if size > pickle::MAX_BYTES => return Err(broken(format!("{size} bytes, more than {}", pickle::MAX_BYTES))),
            _ => {}
        }
        if size > source.len() {
            return Err(broken(format!("{size} bytes in a file of {}", source.len())));
        }
        let mut bytes = Vec::with_capacity(size as usize);
        entry.read_to_end(&mut bytes).map_err(|e| broken(e.to_string()))?;
        if bytes.len() as u64 != size {
            return Err(broken(format!("{} bytes instead of {size}", bytes.len())));
        }
        Ok(Some(bytes))
    }
}
