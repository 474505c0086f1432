//! Whatever is written is read back.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;

use crate::write::{Pickle, floats, legacy, mxnet, read, values, zip};

/// Names, shapes and seeds of the values; scalars and empty tensors among them.
fn state() -> impl Strategy<Value = BTreeMap<String, (Vec<usize>, u32)>> {
    let shape = prop::collection::vec(0usize..5, 0..4);
    prop::collection::btree_map("[a-z]{1,3}(\\.[a-z0-9_é]{1,6}){0,2}", (shape, any::<u32>()), 1..8)
}

fn numbers(count: usize, seed: u32) -> Vec<f32> {
    (0..count as u32).map(|i| f32::from_bits((seed ^ i).wrapping_mul(0x9e37_79b9) & 0xbfff_ffff)).collect()
}

fn count(shape: &[usize]) -> usize {
    shape.iter().product()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn safetensors_round_trip(state in state(), kind in 0usize..6) {
        let dtype = [DType::F32, DType::F64, DType::F16, DType::BF16, DType::I64, DType::U8][kind];
        let tensors: BTreeMap<String, Tensor> = state
            .iter()
            .map(|(name, (shape, seed))| {
                let values = numbers(count(shape), *seed);
                (name.clone(), Tensor::from_vec(values, shape.as_slice(), &Device::Cpu).unwrap().to_dtype(dtype).unwrap())
            })
            .collect();
        let bytes = safetensors::serialize(tensors.iter(), None).unwrap();
        let file = read(&bytes).unwrap();
        prop_assert_eq!(file.tensors.len(), tensors.len());
        for (name, found) in &file.tensors {
            prop_assert_eq!(found.dims(), tensors[name].dims());
            prop_assert_eq!(found.dtype(), dtype);
            prop_assert_eq!(values(found), values(&tensors[name]));
        }
    }

    /// Each tensor a transposed view, of one storage for all or of one each.
    #[test]
    fn torch_round_trip(state in state(), shared: bool, old: bool) {
        let (mut pickle, mut storages, mut expected) = (Pickle::new().dict(), Vec::new(), Vec::new());
        let total: usize = state.values().map(|(shape, _)| count(shape)).sum();
        let mut pool = Vec::new();
        for (i, (name, (shape, seed))) in state.iter().enumerate() {
            let own = numbers(count(shape), *seed);
            let mut strides = vec![1i64; shape.len()];
            for axis in 1..shape.len() {
                strides[axis] = strides[axis - 1] * shape[axis - 1] as i64;
            }
            let reversed: Vec<usize> = shape.iter().rev().copied().collect();
            let tensor = Tensor::from_slice(&own, reversed.as_slice(), &Device::Cpu).unwrap();
            expected.push((name, tensor.permute((0..shape.len()).rev().collect::<Vec<_>>()).unwrap()));
            let dims: Vec<i64> = shape.iter().map(|&d| d as i64).collect();
            let (key, numel, offset) = if shared { ("0".to_string(), total, pool.len()) } else { (i.to_string(), own.len(), 0) };
            pickle = pickle.text(name).tensor((&key, "FloatStorage", numel as i64), offset as i64, &dims, &strides);
            pool.extend_from_slice(&own);
            if !shared {
                storages.push((key, own.len() as i64, floats(&own)));
            }
        }
        if shared {
            storages.push(("0".to_string(), total as i64, floats(&pool)));
        }
        let pickle = pickle.end().stop();
        let bytes = if old {
            legacy(&pickle, &storages.iter().map(|(k, n, b)| (k.as_str(), *n, b.as_slice())).collect::<Vec<_>>())
        } else {
            zip(&pickle, &storages.iter().map(|(k, _, b)| (k.as_str(), b.as_slice())).collect::<Vec<_>>())
        };
        let file = read(&bytes).unwrap();
        prop_assert_eq!(file.tensors.len(), expected.len());
        for ((name, found), (own, tensor)) in file.tensors.iter().zip(expected) {
            prop_assert_eq!(name, own);
            prop_assert_eq!(found.dims(), tensor.dims());
            prop_assert_eq!(values(found), values(&tensor));
        }
    }

    #[test]
    fn mxnet_round_trip(state in state()) {
        let all: Vec<_> = state
            .iter()
            .filter(|(_, (shape, _))| !shape.is_empty())
            .map(|(name, (shape, seed))| {
                (name.as_str(), shape.iter().map(|&d| d as i64).collect::<Vec<_>>(), numbers(count(shape), *seed))
            })
            .collect();
        prop_assume!(!all.is_empty());
        let file = read(&mxnet(&all.iter().map(|(n, s, v)| (*n, s.as_slice(), v.as_slice())).collect::<Vec<_>>())).unwrap();
        prop_assert_eq!(file.tensors.len(), all.len());
        for ((name, found), (own, _, numbers)) in file.tensors.iter().zip(&all) {
            prop_assert_eq!(name, own);
            prop_assert_eq!(values(found), numbers.iter().map(|&v| f64::from(v)).collect::<Vec<_>>());
        }
    }

    /// Bytes of no format, and of a pickle machine's opcodes in any order.
    #[test]
    fn noise_is_an_error(noise in prop::collection::vec(any::<u8>(), 0..300), opcodes in prop::collection::vec(0usize..40, 0..200)) {
        const OPCODES: &[u8] = b"(012NKMJGX)t]ae}dsucRbQqhjl\x81\x85\x86\x87\x88\x89\x8a\x8c\x8f\x90\x91\x93\x94";
        prop_assert!(read(&noise).is_err());
        let program: Vec<u8> = opcodes.iter().map(|&i| OPCODES[i % OPCODES.len()]).chain(noise).collect();
        prop_assert!(read(&zip(&program, &[])).is_err());
    }
}
