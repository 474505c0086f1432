//! Reading fixed-width little-endian fields without ever running past the end.

use super::Read;

/// A place in a file.
#[derive(Clone, Copy)]
pub(super) struct Bytes<'a> {
    all: &'a [u8],
    at: usize,
}

impl<'a> Bytes<'a> {
    pub(super) fn new(all: &'a [u8]) -> Self {
        Self { all, at: 0 }
    }

    /// The same bytes from `at` on.
    pub(super) fn seek(all: &'a [u8], at: usize) -> Self {
        Self { all, at }
    }

    pub(super) fn position(&self) -> usize {
        self.at
    }

    pub(super) fn left(&self) -> usize {
        self.all.len().saturating_sub(self.at)
    }

    pub(super) fn take(&mut self, n: usize) -> Read<&'a [u8]> {
        let end = self.at.checked_add(n).filter(|&end| end <= self.all.len());
        let end = end.ok_or_else(|| format!("{n} bytes are announced at offset {}, {} are left", self.at, self.left()))?;
        let taken = &self.all[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Read<[u8; N]> {
        let mut own = [0; N];
        own.copy_from_slice(self.take(N)?);
        Ok(own)
    }

    pub(super) fn u8(&mut self) -> Read<u8> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn u16(&mut self) -> Read<u16> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(super) fn u32(&mut self) -> Read<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Read<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(super) fn i32(&mut self) -> Read<i32> {
        Ok(i32::from_le_bytes(self.array()?))
    }

    pub(super) fn i64(&mut self) -> Read<i64> {
        Ok(i64::from_le_bytes(self.array()?))
    }

    /// A big-endian double.
    pub(super) fn f64_be(&mut self) -> Read<f64> {
        Ok(f64::from_be_bytes(self.array()?))
    }

    /// A length field of 64 bits, as bytes of this file.
    pub(super) fn length(&mut self) -> Read<usize> {
        let n = self.u64()?;
        usize::try_from(n).map_err(|_| format!("{n} bytes are announced at offset {}", self.at))
    }

    /// Text up to the next newline.
    pub(super) fn line(&mut self) -> Read<&'a str> {
        let rest = &self.all[self.at.min(self.all.len())..];
        let n = rest.iter().position(|&b| b == b'\n').ok_or_else(|| format!("no end of the line at offset {}", self.at))?;
        let line = text(self.take(n)?)?;
        self.at += 1;
        Ok(line)
    }
}

pub(super) fn text(bytes: &[u8]) -> Read<&str> {
    std::str::from_utf8(bytes).map_err(|_| "a name is not UTF-8".to_string())
}
