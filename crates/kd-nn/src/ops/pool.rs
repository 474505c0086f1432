//! Pooling and resizing.
//!
//! Averages and resizings are separable linear maps: one matrix per axis, applied by two matrix products.

use candle_core::{Result, Tensor};

use crate::graph::Pool;

/// Maximum of each window of `[B,C,H,W]`, and the flat index `h*W+w` it came from (u32). Among equals the first cell in row-major
/// order counts and takes the gradient; padding never wins.
pub fn max_pool2d(x: &Tensor, pool: &Pool, dilation: [usize; 2]) -> Result<(Tensor, Tensor)> {
    let (b, c, h, w) = x.dims4()?;
    let spread = Pool { kernel: [0, 1].map(|a| dilation[a] * (pool.kernel[a] - 1) + 1), ..*pool };
    let out = |n, axis| spread.output(n, axis).ok_or_else(|| candle_core::Error::Msg("max_pool2d: the window does not fit".into()));
    let (oh, ow) = (out(h, 0)?, out(w, 1)?);
    // Candidates of each window in row-major order: all cells that exist, the missing ones replaced by the first that does
    // (a copy of an earlier or equal candidate can never win over the first).
    let cells = |n: usize, o: usize, axis: usize| -> Vec<usize> {
        let start = (o * pool.stride[axis]) as isize - pool.padding[axis] as isize;
        (0..pool.kernel[axis] as isize)
            .map(|k| start + k * dilation[axis] as isize)
            .filter(|&i| i >= 0 && i < n as isize)
            .map(|i| i as usize)
            .collect()
    };
    let k = pool.kernel[0] * pool.kernel[1];
    let mut index = Vec::with_capacity(oh * ow * k);
    for i in 0..oh {
        let rows = cells(h, i, 0);
        for j in 0..ow {
            let columns = cells(w, j, 1);
            let found: Vec<u32> = rows.iter().flat_map(|&r| columns.iter().map(move |&q| (r * w + q) as u32)).collect();
            let Some(&first) = found.first() else {
                candle_core::bail!("max_pool2d: a window lies in the padding alone");
            };
            index.extend((0..k).map(|t| found.get(t).copied().unwrap_or(first)));
        }
    }
    let flat = x.reshape((b * c, h * w))?;
    let candidates = Tensor::from_vec(index, oh * ow * k, x.device())?;
    let windows = flat.detach().index_select(&candidates, 1)?.reshape((b * c * oh * ow, k))?;
    let winner = first_max(&windows)?; // [B*C*OH*OW]
    let base = (Tensor::arange(0u32, (oh * ow) as u32, x.device())? * k as f64)?;
    let position = winner.reshape((b * c, oh * ow))?.broadcast_add(&base)?;
    let chosen = candidates.index_select(&position.flatten_all()?, 0)?.reshape((b * c, oh * ow))?;
    let y = flat.gather(&chosen, 1)?.reshape((b, c, oh, ow))?;
    Ok((y, chosen.reshape((b, c, oh, ow))?))
}

/// Index of the first maximum of each row (u32).
fn first_max(rows: &Tensor) -> Result<Tensor> {
    let (n, k) = rows.dims2()?;
    let is_max = rows.broadcast_eq(&rows.max_keepdim(1)?)?;
    let order = Tensor::arange(0u32, k as u32, rows.device())?.reshape((1, k))?.broadcast_as((n, k))?;
    let none = Tensor::full(k as u32 - 1, (n, k), rows.device())?;
    is_max.where_cond(&order.contiguous()?, &none)?.min(1)
}

/// Mean of each window of `[B,C,H,W]`.
pub fn avg_pool2d(x: &Tensor, pool: &Pool) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    let axis = |n: usize, axis: usize| -> Result<Vec<Vec<(usize, f64)>>> {
        let out = pool.output(n, axis).ok_or_else(|| candle_core::Error::Msg("avg_pool2d: the window does not fit".into()))?;
        let (k, s, p) = (pool.kernel[axis], pool.stride[axis], pool.padding[axis]);
        Ok((0..out)
            .map(|o| {
                let (begin, end) = (o * s, (o * s + k).min(n + 2 * p));
                let cells: Vec<usize> = (begin.max(p)..end.min(n + p)).map(|i| i - p).collect();
                let divisor = if pool.count_include_pad { end - begin } else { cells.len() };
                cells.into_iter().map(|i| (i, 1.0 / divisor as f64)).collect()
            })
            .collect())
    };
    separable(x, &axis(h, 0)?, &axis(w, 1)?)
}

/// Mean of each of `output` bins; bin i covers `floor(i n/out) .. ceil((i+1) n/out)`.
pub fn adaptive_avg_pool2d(x: &Tensor, output: [usize; 2]) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    let axis = |n: usize, out: usize| -> Vec<Vec<(usize, f64)>> {
        (0..out)
            .map(|o| {
                let (begin, end) = (o * n / out, ((o + 1) * n).div_ceil(out));
                (begin..end).map(|i| (i, 1.0 / (end - begin) as f64)).collect()
            })
            .collect()
    };
    separable(x, &axis(h, output[0]), &axis(w, output[1]))
}

/// Nearest neighbour, `floor(i in/out)`.
pub fn interpolate_nearest(x: &Tensor, output: [usize; 2]) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    let pick = |n: usize, out: usize| Tensor::from_iter((0..out).map(|i| (i * n / out) as u32), x.device());
    x.contiguous()?.index_select(&pick(h, output[0])?, 2)?.index_select(&pick(w, output[1])?, 3)
}

/// Bilinear without anti-aliasing. `align_corners` false: `src = (i+0.5) in/out - 0.5`, clamped; true: `src = i (in-1)/(out-1)`.
pub fn interpolate_bilinear(x: &Tensor, output: [usize; 2], align_corners: bool) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    let axis = |n: usize, out: usize| -> Vec<Vec<(usize, f64)>> {
        (0..out)
            .map(|i| {
                let src = if !align_corners {
                    ((i as f64 + 0.5) * n as f64 / out as f64 - 0.5).max(0.0)
                } else if out > 1 {
                    i as f64 * (n - 1) as f64 / (out - 1) as f64
                } else {
                    0.0
                };
                let low = (src as usize).min(n - 1);
                let share = (src - low as f64).min(1.0);
                if low + 1 < n { vec![(low, 1.0 - share), (low + 1, share)] } else { vec![(low, 1.0)] }
            })
            .collect()
    };
    separable(x, &axis(h, output[0]), &axis(w, output[1]))
}

/// `rows X columns^T` per channel, the matrices given as (input index, factor) lists per output.
fn separable(x: &Tensor, rows: &[Vec<(usize, f64)>], columns: &[Vec<(usize, f64)>]) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let matrix = |map: &[Vec<(usize, f64)>], n: usize| -> Result<Tensor> {
        let mut dense = vec![0f64; map.len() * n];
        for (o, cells) in map.iter().enumerate() {
            for &(i, factor) in cells {
                dense[o * n + i] += factor;
            }
        }
        Tensor::from_vec(dense, (map.len(), n), x.device())?.to_dtype(x.dtype())
    };
    let (oh, ow) = (rows.len(), columns.len());
    let wide = x.contiguous()?.reshape((b * c * h, w))?.matmul(&matrix(columns, w)?.t()?)?;
    let tall = wide.reshape((b * c, h, ow))?.transpose(1, 2)?.contiguous()?.reshape((b * c * ow, h))?.matmul(&matrix(rows, h)?.t()?)?;
    tall.reshape((b * c, ow, oh))?.transpose(1, 2)?.contiguous()?.reshape((b, c, oh, ow))
}
