//! Printing: data to standard output, everything else to standard error.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use serde::Serialize;

/// One line of data.
pub fn line(text: &str) -> Result<()> {
    writeln!(std::io::stdout().lock(), "{text}")?;
    Ok(())
}

/// JSON, indented.
pub fn json(value: &impl Serialize) -> Result<()> {
    line(&serde_json::to_string_pretty(value)?)
}

/// One line for the person at the terminal; a closed standard error is no reason to stop.
pub fn message(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// A table: a header and rows; numbers (columns marked so) to the right.
pub fn table(header: &[&str], right: &[bool], rows: &[Vec<String>]) -> Result<()> {
    render(header, right, rows).iter().try_for_each(|l| line(l))
}

/// The lines of a [`table`].
pub fn render(header: &[&str], right: &[bool], rows: &[Vec<String>]) -> Vec<String> {
    let width = |c: usize| rows.iter().map(|r| r[c].chars().count()).chain([header[c].chars().count()]).max().unwrap_or(0);
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: &[String]| {
        let mut out = String::new();
        for (c, cell) in cells.iter().enumerate() {
            let pad = " ".repeat(widths[c] - cell.chars().count());
            out += &if right[c] { format!("{pad}{cell}  ") } else { format!("{cell}{pad}  ") };
        }
        out.trim_end().to_string()
    };
    let header: Vec<String> = header.iter().map(ToString::to_string).collect();
    let rule = widths.iter().map(|w| "-".repeat(*w)).collect::<Vec<_>>().join("  ");
    [line(&header), rule].into_iter().chain(rows.iter().map(|r| line(r))).collect()
}

/// `1234567` as `1,234,567`.
pub fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, d) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(d);
    }
    out
}

/// The tensors and the string metadata of a safetensors file.
pub fn read_tensors(path: &Path) -> Result<(BTreeMap<String, Tensor>, BTreeMap<String, String>)> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let wrong = || format!("{} is not a safetensors file", path.display());
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).with_context(wrong)?;
    let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
    let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).with_context(wrong)?.into_iter().collect();
    Ok((tensors, metadata))
}

/// Writes a safetensors file, whole or not at all.
pub fn write_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let contiguous = tensors.iter().map(|(k, t)| Ok((k, t.contiguous()?))).collect::<Result<Vec<_>>>()?;
    let bytes = safetensors::serialize(contiguous.iter().map(|(k, t)| (k.as_str(), t)), None)?;
    write_file(path, &bytes)
}

/// Writes a file through a neighbour and a rename, so that no half file is ever seen under its name.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let context = || format!("cannot write {}", path.display());
    let mut name = path.file_name().with_context(context)?.to_os_string();
    name.push(format!(".{}.part", std::process::id()));
    let part = path.with_file_name(name);
    let written = std::fs::write(&part, bytes).and_then(|()| std::fs::rename(&part, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&part);
    }
    written.with_context(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_set_apart() {
        assert_eq!([0, 999, 1000, 1234567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
    }
}
