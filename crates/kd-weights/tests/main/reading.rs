//! Well-formed files, as programs write them and as they might.

use candle_core::DType;

use crate::write::{Pickle, floats, legacy, mxnet, read, safetensors, values, zip};

const SIX: [f32; 6] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0];

fn six() -> (&'static str, &'static str, i64) {
    ("0", "FloatStorage", 6)
}

fn names(file: &kd_weights::WeightFile) -> Vec<&str> {
    file.tensors.iter().map(|(name, _)| name.as_str()).collect()
}

#[test]
fn state_dicts_are_found_and_unwrapped() {
    for container in ["state_dict", "model", "model_state_dict", "net", "model_ema"] {
        // Beside it what training scripts keep: a NumPy scalar, an optimiser, an object of their own, None.
        let pickle = Pickle::new().dict().text("best").global("numpy.core.multiarray", "scalar").raw(b"(").global("numpy", "dtype");
        let pickle = pickle.raw(b"(U\x02f8K\x00K\x01tRU\x08").raw(&[0xff; 8]).raw(b"tR");
        let pickle = pickle.text("args").global("argparse", "Namespace").raw(b")\x81}(").text("lr").raw(b"G").raw(&[0; 8]).raw(b"ub");
        let pickle =
            pickle.text("optimizer").dict().text("momentum").vector("1", 6).text("betas").ints(&[1, 2]).end().text("none").raw(b"N");
        let pickle = pickle.text(container).global("collections", "OrderedDict").raw(b")R(");
        let pickle = pickle.text("module.b").tensor(six(), 0, &[2, 3], &[3, 1]).text("module.a").tensor(six(), 4, &[], &[]).end();
        // The attribute `_metadata` of a state dict.
        let pickle = pickle.raw(b"}").text("_metadata").dict().text("version").int(1).end().raw(b"sb").end().stop();
        let bytes = floats(&SIX);
        let both = [zip(&pickle, &[("0", &bytes), ("1", &bytes)]), legacy(&pickle, &[("0", 6, &bytes), ("1", 6, &bytes)])];
        for file in both.map(|bytes| read(&bytes).unwrap()) {
            assert_eq!(names(&file), ["b", "a"]);
            assert_eq!(file.tensors[0].1.dims(), [2, 3]);
            assert_eq!(values(&file.tensors[0].1), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
            assert_eq!(file.tensors[1].1.dims(), [0usize; 0]);
            assert_eq!(values(&file.tensors[1].1), [4.0]);
        }
    }
}

#[test]
fn storages_are_shared_and_strided() {
    let pickle = Pickle::new().dict().text("w").tensor(six(), 0, &[2, 3], &[3, 1]).text("tied").tensor(six(), 0, &[2, 3], &[3, 1]);
    let pickle = pickle.text("transposed").tensor(six(), 0, &[3, 2], &[1, 3]).text("empty").tensor(six(), 6, &[0, 3], &[3, 1]);
    let pickle = pickle.text("ones").tensor(six(), 2, &[1, 2, 1], &[99, 1, 7]).end().stop();
    let file = read(&zip(&pickle, &[("0", &floats(&SIX))])).unwrap();
    let found: Vec<_> = file.tensors.iter().map(|(_, t)| (t.dims().to_vec(), values(t))).collect();
    assert_eq!(found[0], found[1]);
    assert_eq!(found[2], (vec![3, 2], vec![0.0, 3.0, 1.0, 4.0, 2.0, 5.0]));
    assert_eq!(found[3], (vec![0, 3], vec![]));
    assert_eq!(found[4], (vec![1, 2, 1], vec![2.0, 3.0]));
    // Every second column: gaps in the storage.
    let gaps = Pickle::new().dict().text("w").tensor(six(), 1, &[2, 2], &[3, 1]).end().stop();
    assert_eq!(values(&read(&zip(&gaps, &[("0", &floats(&SIX))])).unwrap().tensors[0].1), [1.0, 2.0, 4.0, 5.0]);
}

#[test]
fn parameters_and_tensors_with_attributes_are_tensors() {
    let parameter = Pickle::new().dict().text("w").global("torch._utils", "_rebuild_parameter").raw(b"(").vector("0", 6).raw(b"\x88");
    let parameter = parameter.global("collections", "OrderedDict").raw(b")RtR").end().stop();
    let attributes = Pickle::new().dict().text("w").global("torch._tensor", "_rebuild_from_type_v2").raw(b"(");
    let attributes =
        attributes.global("torch._utils", "_rebuild_tensor_v2").global("torch", "Tensor").raw(b"(").storage("0", "FloatStorage", 6);
    let attributes = attributes.int(0).global("torch", "Size").raw(b"(").ints(&[6]).raw(b"tR").ints(&[1]).raw(b"\x89}t}tR").end().stop();
    // As Python 2 wrote it: the old function of four arguments, byte strings, an ordered dictionary made of pairs.
    let old = Pickle::new().global("collections", "OrderedDict").raw(b"(](](U\x01w").global("torch._utils", "_rebuild_tensor").raw(b"(");
    let old = old.storage("0", "FloatStorage", 6).int(0).ints(&[6]).ints(&[1]).raw(b"tReetR").stop();
    for pickle in [parameter, attributes, old] {
        let bytes = floats(&SIX);
        for file in [zip(&pickle, &[("0", &bytes)]), legacy(&pickle, &[("0", 6, &bytes)])] {
            let file = read(&file).unwrap();
            assert_eq!((names(&file), values(&file.tensors[0].1).len()), (vec!["w"], 6));
        }
    }
}

#[test]
fn protocols_4_and_5_are_read() {
    let class = |p: Pickle, module: &str, name: &str| {
        let short = |p: Pickle, s: &str| p.raw(&[0x8c, s.len() as u8]).raw(s.as_bytes()).raw(&[0x94]);
        short(short(p, module), name).raw(&[0x93, 0x94])
    };
    let pickle = Pickle(vec![0x80, 4]).raw(&[0x95]).raw(&100u64.to_le_bytes()).raw(b"}\x94(\x8c\x01w\x94");
    let pickle = class(pickle, "torch._utils", "_rebuild_tensor_v2").raw(b"((\x8c\x07storage\x94");
    let pickle = class(pickle, "torch", "LongStorage")
        .raw(b"\x8c\x010\x94\x8c\x03cpu\x94K\x02t\x94QK\x00K\x02\x85\x94K\x01\x85\x94\x89}t\x94R\x94u")
        .stop();
    let file = read(&zip(&pickle, &[("0", &[1, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff])])).unwrap();
    assert_eq!(file.tensors[0].1.to_vec1::<i64>().unwrap(), [1, -1]);
}

#[test]
fn every_element_type_is_read() {
    let cases: [(&str, &str, &[u8], DType, f64); 11] = [
        ("FloatStorage", "F32", &[0, 0, 0x40, 0xc0], DType::F32, -3.0),
        ("DoubleStorage", "F64", &[0, 0, 0, 0, 0, 0, 8, 0xc0], DType::F64, -3.0),
        ("HalfStorage", "F16", &[0, 0xc2], DType::F16, -3.0),
        ("BFloat16Storage", "BF16", &[0x40, 0xc0], DType::BF16, -3.0),
        ("LongStorage", "I64", &[0xfd, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], DType::I64, -3.0),
        ("IntStorage", "I32", &[0xfd, 0xff, 0xff, 0xff], DType::I32, -3.0),
        ("ShortStorage", "I16", &[0xfd, 0xff], DType::I16, -3.0),
        ("CharStorage", "I8", &[0xfd], DType::I16, -3.0),
        ("ByteStorage", "U8", &[0xfd], DType::U8, 253.0),
        ("BoolStorage", "BOOL", &[1], DType::U8, 1.0),
        ("", "U16", &[0xfd, 0xff], DType::U32, 65533.0),
    ];
    for (class, name, bytes, dtype, value) in cases {
        let header = format!(r#"{{"w":{{"dtype":"{name}","shape":[1],"data_offsets":[0,{}]}}}}"#, bytes.len());
        let mut files = vec![safetensors(&header, bytes)];
        if !class.is_empty() {
            files.push(zip(&Pickle::new().dict().text("w").tensor(("0", class, 1), 0, &[1], &[1]).end().stop(), &[("0", bytes)]));
        }
        for file in files {
            let tensor = &read(&file).unwrap().tensors[0].1;
            assert_eq!((tensor.dtype(), values(tensor)), (dtype, vec![value]), "{name}");
        }
    }
}

#[test]
fn safetensors_keep_order_and_metadata() {
    let header = r#"{"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},"__metadata__":{"model":"resnet8","mean":"[0.5]"},
        "a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#;
    let file = read(&safetensors(header, &floats(&[1.0, 2.0]))).unwrap();
    assert_eq!(names(&file), ["a", "b"]);
    assert_eq!(values(&file.tensors[1].1), [2.0]);
    assert_eq!(file.metadata.get("mean").map(String::as_str), Some("[0.5]"));
}

#[test]
fn mxnet_arrays_get_their_names() {
    let file = read(&mxnet(&[("arg:w", &[2, 3], &SIX), ("aux:m", &[1], &[7.0])])).unwrap();
    assert_eq!(names(&file), ["arg:w", "aux:m"]);
    assert_eq!((file.tensors[0].1.dims(), values(&file.tensors[1].1)), (&[2, 3][..], vec![7.0]));
}
