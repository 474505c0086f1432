//! Reproducible stand-in weights, images and labels, from names alone.
//!
//! Two programs that follow this recipe hold the same network without exchanging a file: the parity fixtures and
//! `kd-cli forward --weights splitmix64` use it. All arithmetic is on wrapping 64-bit integers:
//!
//! ```text
//! key(s)  = FNV-1a, 64 bits, over the bytes of s
//! z(k, i) = k + (i+1) 0x9E3779B97F4A7C15, finalised as in splitmix64 (Steele et al. 2014)
//! u(s, i) = (z(key(s), i) >> 40) / 2^24        in [0,1), i the flat row-major index
//! ```
//!
//! | the name's last part | value |
//! |---|---|
//! | `num_batches_tracked` | 0 |
//! | `running_var` | 0.5 + u |
//! | `running_mean`, `bias`, `*_bias` | 0.2 (u - 0.5) |
//! | `cls_token`, `pos_embed`, `dist_token`, `relative_position_bias_table` | 0.2 (u - 0.5) |
//! | two or more dimensions | 2 (u - 0.5) sqrt(3 / fan_in), fan_in the product of all dimensions but the first |
//! | `weight`, one dimension | 0.5 + u |
//! | anything else | 0.2 (u - 0.5) |
//!
//! ```
//! let conv = kd_models::recipe::fill("conv1.weight", &[16, 3, 3, 3]);
//! assert_eq!(conv[..3], [0.03004996, 0.16344114, -0.3180522]);
//! ```

use candle_core::{DType, Device, Tensor};
use kd_core::{Params, Result};

fn uniforms(name: &str, n: usize) -> impl Iterator<Item = f64> {
    let key = name.bytes().fold(0xCBF2_9CE4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01B3));
    (1..=n as u64).map(move |i| {
        let mut z = key.wrapping_add(i.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f64 / f64::from(1 << 24)
    })
}

/// The values of the state-dict entry `name` of `shape`, row-major.
pub fn fill(name: &str, shape: &[usize]) -> Vec<f32> {
    let last = name.rsplit('.').next().unwrap_or(name);
    let small = |u: f64| (u - 0.5) * 0.2;
    let n = shape.iter().product();
    let map = |f: &dyn Fn(f64) -> f64| uniforms(name, n).map(|u| f(u) as f32).collect();
    match last {
        "num_batches_tracked" => vec![0.0; n],
        "running_var" => map(&|u| 0.5 + u),
        "running_mean" | "bias" | "cls_token" | "pos_embed" | "dist_token" | "relative_position_bias_table" => map(&small),
        _ if last.ends_with("_bias") => map(&small),
        _ if shape.len() >= 2 => {
            let bound = (3.0 / shape[1..].iter().product::<usize>() as f64).sqrt();
            map(&|u| (u - 0.5) * 2.0 * bound)
        }
        "weight" => map(&|u| 0.5 + u),
        _ => map(&small),
    }
}

/// Images under `key`: multiples of 1/64 in `[-2, 2]`, row-major.
pub fn images(key: &str, shape: &[usize]) -> Vec<f32> {
    uniforms(key, shape.iter().product()).map(|u| (((u * 257.0).floor() - 128.0) / 64.0) as f32).collect()
}

/// `n` labels in `0..classes` under `key`.
pub fn labels(key: &str, n: usize, classes: usize) -> Vec<i64> {
    uniforms(key, n).map(|u| (u * classes as f64).floor() as i64).collect()
}

/// Fills a whole network: parameters, statistics, counters.
pub fn load(params: &Params) -> Result<()> {
    let shapes: std::collections::BTreeMap<_, _> = params.keys().into_iter().collect();
    let mut failed = None;
    params.assign(|name| {
        let shape = shapes.get(name)?;
        let tensor = Tensor::from_vec(fill(name, shape), shape.as_slice(), &Device::Cpu);
        let tensor = if shape.is_empty() { tensor.and_then(|t| t.to_dtype(DType::I64)) } else { tensor };
        tensor.map_err(|e| failed = Some(e)).ok()
    })?;
    failed.map_or(Ok(()), |e| Err(e.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worked_examples() {
        assert_eq!(fill("layer1.0.bn1.running_var", &[16])[..3], [1.146241, 1.3382814, 1.2812443]);
        assert_eq!(fill("fc.bias", &[100])[..3], [-0.00446974, -0.0038536428, -0.043987393]);
        assert_eq!(fill("bn1.weight", &[16])[..3], [0.860204, 1.324409, 1.0691879]);
        assert_eq!(fill("fc.weight", &[100, 64])[..3], [-0.0066485708, 0.16119748, 0.10544941]);
        assert_eq!(fill("bn1.num_batches_tracked", &[]), [0.0]);
        assert_eq!(images("images/dev/resnet20.eval", &[2, 3, 32, 32])[..4], [1.828125, 1.703125, 1.65625, 0.0]);
        assert_eq!(labels("labels/dev/resnet20.eval", 2, 100), [32, 70]);
    }
}
