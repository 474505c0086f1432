//! From a file's bytes to tensors.

use candle_core::{DType, Device, Tensor};

use super::Read;
use crate::limits;

/// Types of numbers in files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    F64,
    F32,
    F16,
    Bf16,
    I64,
    I32,
    I16,
    I8,
    U8,
}

impl Element {
    /// Bytes of one number.
    pub(super) fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 | Self::I16 => 2,
            Self::I8 | Self::U8 => 1,
        }
    }

    /// The tensor of `shape` in row-major little-endian `data`.
    pub(super) fn tensor(self, data: &[u8], shape: &[usize]) -> Read<Tensor> {
        let raw = |dtype| Tensor::from_raw_buffer(data, dtype, shape, &Device::Cpu);
        let widen = |wide: Vec<i64>| Tensor::from_vec(wide, shape, &Device::Cpu);
        let made = match self {
            Self::F64 => raw(DType::F64),
            Self::F32 => raw(DType::F32),
            Self::F16 => raw(DType::F16),
            Self::Bf16 => raw(DType::BF16),
            Self::I64 => raw(DType::I64),
            Self::U8 => raw(DType::U8),
            Self::I32 => widen(data.chunks_exact(4).map(|b| i64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect()),
            Self::I16 => widen(data.chunks_exact(2).map(|b| i64::from(i16::from_le_bytes([b[0], b[1]]))).collect()),
            Self::I8 => widen(data.iter().map(|&b| i64::from(b as i8)).collect()),
        };
        made.map_err(|e| e.to_string())
    }
}

/// The number of elements of `shape`.
pub(super) fn count(shape: &[usize]) -> Read<usize> {
    if shape.len() > limits::DIMENSIONS {
        return Err(format!("a tensor of {} dimensions; at most {} are read", shape.len(), limits::DIMENSIONS));
    }
    // Not a plain product: a dimension of 0 must not hide an overflow.
    let n = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1)));
    let n = n.filter(|&n| n <= isize::MAX as usize / 8).ok_or_else(|| format!("the shape {shape:?} is absurd"))?;
    Ok(if shape.contains(&0) { 0 } else { n })
}

/// Refuses tensors that together are much larger than their file.
pub(super) struct Budget {
    left: usize,
}

impl Budget {
    pub(super) fn new(file: &[u8]) -> Self {
        Self { left: file.len().saturating_mul(limits::EXPANSION) }
    }

    pub(super) fn spend(&mut self, bytes: usize) -> Read<()> {
        let left = self.left.checked_sub(bytes);
        self.left = left.ok_or_else(|| format!("its tensors are more than {} times as large as the file itself", limits::EXPANSION))?;
        Ok(())
    }
}
