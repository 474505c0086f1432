//! The element types of weight files.

use candle_core::{DType, Device, Tensor};

/// A type that some format stores; those that candle lacks are widened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Element {
    Bool,
    U8,
    I8,
    I16,
    U16,
    I32,
    U32,
    I64,
    F16,
    BF16,
    F32,
    F64,
}

impl Element {
    /// Bytes of one element.
    pub(crate) fn size(self) -> usize {
        match self {
            Self::Bool | Self::U8 | Self::I8 => 1,
            Self::I16 | Self::U16 | Self::F16 | Self::BF16 => 2,
            Self::I32 | Self::U32 | Self::F32 => 4,
            Self::I64 | Self::F64 => 8,
        }
    }

    /// Bytes of a tensor of this type; `None` beyond what memory can address, which a dimension of 0 does not hide.
    pub(crate) fn bytes(self, shape: &[usize]) -> Option<usize> {
        let bytes = shape.iter().try_fold(self.size(), |n, &d| n.checked_mul(d.max(1))).filter(|&n| isize::try_from(n).is_ok())?;
        Some(if shape.contains(&0) { 0 } else { bytes })
    }

    /// The tensor of `shape` whose row-major little-endian bytes these are.
    pub(crate) fn decode(self, bytes: &[u8], shape: &[usize]) -> Result<Tensor, String> {
        if self.bytes(shape) != Some(bytes.len()) {
            return Err(format!("{} bytes for a shape of {shape:?}", bytes.len()));
        }
        let plain = |dtype| Tensor::from_raw_buffer(bytes, dtype, shape, &Device::Cpu);
        let tensor = match self {
            Self::Bool | Self::U8 => plain(DType::U8),
            Self::I8 => Tensor::from_vec(bytes.iter().map(|&b| i16::from(b.cast_signed())).collect::<Vec<_>>(), shape, &Device::Cpu),
            Self::I16 => plain(DType::I16),
            Self::U16 => {
                let wide: Vec<u32> = bytes.chunks_exact(2).map(|b| u32::from(b[0]) | u32::from(b[1]) << 8).collect();
                Tensor::from_vec(wide, shape, &Device::Cpu)
            }
            Self::I32 => plain(DType::I32),
            Self::U32 => plain(DType::U32),
            Self::I64 => plain(DType::I64),
            Self::F16 => plain(DType::F16),
            Self::BF16 => plain(DType::BF16),
            Self::F32 => plain(DType::F32),
            Self::F64 => plain(DType::F64),
        };
        tensor.map_err(|e| e.to_string())
    }
}
