//! Writers of the formats, byte by byte, so that tests can write what no program would.

use std::io::Write;

use candle_core::{Device, Tensor};
use kd_weights::WeightFile;
use zip::write::SimpleFileOptions;

/// A pickle in the making.
#[derive(Clone)]
pub(crate) struct Pickle(pub(crate) Vec<u8>);

impl Pickle {
    pub(crate) fn new() -> Self {
        Self(vec![0x80, 2])
    }

    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn text(self, text: &str) -> Self {
        self.raw(b"X").raw(&(text.len() as u32).to_le_bytes()).raw(text.as_bytes())
    }

    pub(crate) fn int(self, n: i64) -> Self {
        self.raw(&[0x8a, 8]).raw(&n.to_le_bytes())
    }

    pub(crate) fn ints(self, all: &[i64]) -> Self {
        all.iter().fold(self.raw(b"("), |p, &n| p.int(n)).raw(b"t")
    }

    pub(crate) fn global(self, module: &str, name: &str) -> Self {
        self.raw(format!("c{module}\n{name}\n").as_bytes())
    }

    /// Opens a dictionary.
    pub(crate) fn dict(self) -> Self {
        self.raw(b"}(")
    }

    /// Closes it.
    pub(crate) fn end(self) -> Self {
        self.raw(b"u")
    }

    pub(crate) fn storage(self, key: &str, class: &str, numel: i64) -> Self {
        self.raw(b"(").text("storage").global("torch", class).text(key).text("cpu").int(numel).raw(b"tQ")
    }

    /// The arguments of `_rebuild_tensor_v2` and the call.
    pub(crate) fn tensor(self, (key, class, numel): (&str, &str, i64), offset: i64, shape: &[i64], strides: &[i64]) -> Self {
        let begun = self.global("torch._utils", "_rebuild_tensor_v2").raw(b"(").storage(key, class, numel);
        begun.int(offset).ints(shape).ints(strides).raw(b"\x89").global("collections", "OrderedDict").raw(b")RtR")
    }

    /// A whole vector of f32.
    pub(crate) fn vector(self, key: &str, numel: i64) -> Self {
        self.tensor((key, "FloatStorage", numel), 0, &[numel], &[1])
    }

    pub(crate) fn stop(self) -> Vec<u8> {
        self.raw(b".").0
    }
}

/// Little-endian bytes of f32.
pub(crate) fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// What `torch.save` writes since 1.6.
pub(crate) fn zip(pickle: &[u8], storages: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let mut entry = |name: &str, bytes: &[u8]| {
        zip.start_file(format!("net/{name}"), options).unwrap();
        zip.write_all(bytes).unwrap();
    };
    entry("data.pkl", pickle);
    entry("byteorder", b"little");
    for (key, bytes) in storages {
        entry(&format!("data/{key}"), bytes);
    }
    zip.finish().unwrap().into_inner()
}

/// What it wrote before; storages with their number of elements.
pub(crate) fn legacy(pickle: &[u8], storages: &[(&str, i64, &[u8])]) -> Vec<u8> {
    let mut file = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.".to_vec();
    file.extend(Pickle::new().dict().text("little_endian").raw(b"\x88").end().stop());
    file.extend_from_slice(pickle);
    file.extend(storages.iter().fold(Pickle::new().raw(b"]("), |p, (key, ..)| p.text(key)).raw(b"e").stop());
    for (_, numel, bytes) in storages {
        file.extend(numel.to_le_bytes());
        file.extend_from_slice(bytes);
    }
    file
}

/// MXNet's list of f32 arrays.
pub(crate) fn mxnet(arrays: &[(&str, &[i64], &[f32])]) -> Vec<u8> {
    let mut file = [0x112u64, 0, arrays.len() as u64].map(u64::to_le_bytes).concat();
    for (_, shape, values) in arrays {
        file.extend([0xf993_fac9u32, 0, shape.len() as u32].map(u32::to_le_bytes).concat());
        file.extend(shape.iter().flat_map(|d| d.to_le_bytes()));
        file.extend([1u32, 0, 0].map(u32::to_le_bytes).concat());
        file.extend(floats(values));
    }
    file.extend((arrays.len() as u64).to_le_bytes());
    for (name, ..) in arrays {
        file.extend((name.len() as u64).to_le_bytes());
        file.extend(name.as_bytes());
    }
    file
}

/// A safetensors file of this header.
pub(crate) fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// Writes `bytes` to a file and reads it.
pub(crate) fn read(bytes: &[u8]) -> kd_weights::Result<WeightFile> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights");
    std::fs::write(&path, bytes).unwrap();
    kd_weights::read(&path)
}

pub(crate) fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

/// Every element as f64.
pub(crate) fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.flatten_all().unwrap().to_dtype(candle_core::DType::F64).unwrap().to_vec1().unwrap()
}
