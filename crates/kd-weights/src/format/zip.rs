//! Just enough of zip for `torch.save`: members that are stored, not compressed, found through the central directory.
//!
//! Members must lie apart, have names of their own and the announced checksum; zip64 is understood.

use std::collections::BTreeMap;

use super::Read;
use super::bytes::{Bytes, text};
use crate::limits;

const END: &[u8; 4] = b"PK\x05\x06";
const END64: &[u8; 4] = b"PK\x06\x06";
const LOCATOR64: &[u8; 4] = b"PK\x06\x07";
const DIRECTORY: &[u8; 4] = b"PK\x01\x02";
pub(super) const MEMBER: &[u8; 4] = b"PK\x03\x04";

/// The end record without its comment, and the longest comment.
const END_SIZE: usize = 22;
const COMMENT: usize = u16::MAX as usize;

struct Member {
    start: usize,
    len: usize,
    crc: u32,
    readable: bool,
}

/// The members of an archive.
pub(super) struct Archive<'a> {
    file: &'a [u8],
    members: BTreeMap<&'a str, Member>,
}

impl<'a> Archive<'a> {
    pub(super) fn open(file: &'a [u8]) -> Read<Self> {
        let end = find_end(file)?;
        let (entries, start, directory_end) = directory(file, end)?;
        if entries > limits::TENSORS as u64 {
            return Err(format!("{entries} members; at most {} are read", limits::TENSORS));
        }
        let mut bytes = Bytes::seek(&file[..directory_end], start);
        let (mut members, mut ranges) = (BTreeMap::new(), Vec::new());
        for _ in 0..entries {
            let (name, range, member) = entry(file, &mut bytes, start)?;
            ranges.push((range, name));
            if members.insert(name, member).is_some() {
                return Err(format!("the member `{name}` is there twice"));
            }
        }
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            if pair[0].0.1 > pair[1].0.0 {
                return Err(format!("the members `{}` and `{}` overlap", pair[0].1, pair[1].1));
            }
        }
        Ok(Self { file, members })
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &'a str> {
        self.members.keys().copied()
    }

    /// The content of a member.
    pub(super) fn get(&self, name: &str) -> Read<&'a [u8]> {
        let member = self.members.get(name).ok_or_else(|| format!("the member `{name}` is missing"))?;
        if !member.readable {
            return Err(format!("the member `{name}` is compressed or encrypted, which torch.save never does"));
        }
        let data = &self.file[member.start..member.start + member.len];
        if crc32fast::hash(data) != member.crc {
            return Err(format!("the member `{name}` does not have the announced checksum"));
        }
        Ok(data)
    }
}

/// Where the end record begins; its comment must reach to the end of the file.
fn find_end(file: &[u8]) -> Read<usize> {
    let last = file.len().checked_sub(END_SIZE).ok_or("it is too short for a zip archive")?;
    let first = last.saturating_sub(COMMENT);
    let is_end = |at: usize| {
        file[at..].starts_with(END) && Bytes::seek(file, at + 20).u16().is_ok_and(|comment| at + END_SIZE + comment as usize == file.len())
    };
    (first..=last).rev().find(|&at| is_end(at)).ok_or_else(|| "it has no end record (it may be cut off)".to_string())
}

/// Number of entries, start and end of the central directory.
fn directory(file: &[u8], end: usize) -> Read<(u64, usize, usize)> {
    let locator = end.checked_sub(20).filter(|&at| file[at..].starts_with(LOCATOR64));
    let (entries, size, start, limit) = if let Some(locator) = locator {
        let at = Bytes::seek(file, locator + 8).length()?;
        let mut record = Bytes::seek(file, at);
        if record.take(4)? != END64 {
            return Err("its zip64 end record is not where it should be".to_string());
        }
        let mut record = Bytes::seek(file, at + 32);
        (record.u64()?, record.length()?, record.length()?, at)
    } else {
        let mut record = Bytes::seek(file, end + 10);
        (u64::from(record.u16()?), record.u32()? as usize, record.u32()? as usize, end)
    };
    match start.checked_add(size) {
        Some(stop) if stop <= limit => Ok((entries, start, stop)),
        _ => Err("its central directory does not fit into the file".to_string()),
    }
}

/// One entry of the central directory, and the member's extent from its local header on.
fn entry<'a>(file: &'a [u8], bytes: &mut Bytes<'a>, directory: usize) -> Read<(&'a str, (usize, usize), Member)> {
    if bytes.take(4)? != DIRECTORY {
        return Err("its central directory is damaged".to_string());
    }
    bytes.take(4)?; // versions
    let (flags, method) = (bytes.u16()?, bytes.u16()?);
    bytes.take(4)?; // time
    let crc = bytes.u32()?;
    let (packed, size) = (bytes.u32()?, bytes.u32()?);
    let (name_len, extra_len, comment_len) = (bytes.u16()?, bytes.u16()?, bytes.u16()?);
    bytes.take(8)?; // disk, attributes
    let offset = bytes.u32()?;
    let name = text(bytes.take(name_len.into())?)?;
    if name.len() > limits::NAME {
        return Err(format!("a member's name has {} bytes; at most {} are read", name.len(), limits::NAME));
    }
    let mut extra = Bytes::new(bytes.take(extra_len.into())?);
    bytes.take(comment_len.into())?;
    let mut wide = [u64::from(size), u64::from(packed), u64::from(offset)];
    while extra.left() >= 4 {
        let (id, len) = (extra.u16()?, extra.u16()?);
        let mut field = Bytes::new(extra.take(len.into())?);
        if id == 1 {
            // zip64: in this order, those that do not fit into 32 bits.
            for value in wide.iter_mut().filter(|v| **v == u64::from(u32::MAX)) {
                *value = field.u64()?;
            }
        }
    }
    let fits = |n: u64| usize::try_from(n).ok().filter(|&n| n <= directory);
    let (Some(len), Some(offset)) = (fits(wide[1]), fits(wide[2])) else {
        return Err(format!("the member `{name}` does not fit into the file"));
    };
    let readable = method == 0 && wide[0] == wide[1] && flags & 1 == 0;

    let mut local = Bytes::seek(&file[..directory], offset);
    let damaged = |_: String| format!("the member `{name}` is not where the directory says");
    if local.take(4).map_err(damaged)? != MEMBER {
        return Err(damaged(String::new()));
    }
    local.take(22).map_err(damaged)?;
    let (own_name, own_extra) = (local.u16().map_err(damaged)?, local.u16().map_err(damaged)?);
    if local.take(own_name.into()).map_err(damaged)? != name.as_bytes() {
        return Err(damaged(String::new()));
    }
    local.take(own_extra.into()).map_err(damaged)?;
    let start = local.position();
    local.take(len).map_err(damaged)?;
    Ok((name, (offset, start + len), Member { start, len, crc, readable }))
}
