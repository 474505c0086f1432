//! The reference executor: layer by layer through differentiable candle operations.
//!
//! Any device, f32 and f64. It is the GPU path, the path of gradient checks, and what the fused executor is measured against.

use candle_core::{DType, Tensor};
use kd_core::{Mode, Params, Result, Rng};

use crate::fused::Job;
use crate::graph::{BatchNorm, NodeId, Op};
use crate::ops::{self, ConvArgs};

/// Runs a piece; the outputs in the order of `job.wanted`.
///
/// With `job.tracked`, gradients flow into the parameters' leaf variables.
pub fn run(job: &Job<'_>) -> Result<Vec<Tensor>> {
    let Job { graph, params, x, from, piece, wanted, mode, tracked } = *job;
    let leaves: Vec<Tensor> =
        params.leaves()?.iter().map(|v| if tracked { v.as_tensor().clone() } else { v.as_detached_tensor() }).collect();
    // A tensor is dropped after its last use, so that a run without gradients holds few of them.
    let mut last_use = vec![0; graph.nodes().len()];
    for &id in piece {
        graph.nodes()[id].inputs.iter().for_each(|&i| last_use[i] = id);
    }
    wanted.iter().for_each(|&w| last_use[w] = usize::MAX);
    let mut values: Vec<Option<Tensor>> = vec![None; graph.nodes().len()];
    values[from] = Some(x.clone());
    for &id in piece {
        let node = &graph.nodes()[id];
        let inputs: Vec<Tensor> = node.inputs.iter().filter_map(|&i| values[i].clone()).collect();
        values[id] = Some(compute(&node.op, &inputs, &leaves, params, mode, id)?);
        for &i in &node.inputs {
            if last_use[i] <= id {
                values[i] = None;
            }
        }
    }
    Ok(wanted.iter().filter_map(|&w| values[w].clone()).collect())
}

fn compute(op: &Op, inputs: &[Tensor], leaves: &[Tensor], params: &Params, mode: Mode, id: NodeId) -> Result<Tensor> {
    let x = &inputs[0];
    Ok(match op {
        Op::Input => x.clone(),
        Op::Conv2d(c) => {
            let args = ConvArgs { stride: c.stride, padding: c.padding, dilation: c.dilation, groups: c.groups };
            ops::conv2d(x, &leaves[c.weight], c.bias.map(|b| &leaves[b]), &args)?
        }
        Op::ConvTranspose2d(c) => ops::conv_transpose2d(x, &leaves[c.weight], Some(&leaves[c.bias]), c.stride, c.padding)?,
        Op::BatchNorm(bn) => batch_norm(bn, x, leaves, params, mode)?,
        Op::Relu => ops::relu(x)?,
        Op::Relu6 => ops::relu6(x)?,
        Op::LeakyRelu { slope } => ops::leaky_relu(x, *slope)?,
        Op::Gelu => ops::gelu(x)?,
        Op::Silu => ops::silu(x)?,
        Op::Hardswish => ops::hardswish(x)?,
        Op::Hardsigmoid => ops::hardsigmoid(x)?,
        Op::Sigmoid => ops::sigmoid(x)?,
        Op::Add => (x + &inputs[1])?,
        Op::Mul => x.broadcast_mul(&inputs[1])?,
        Op::Concat => Tensor::cat(inputs, 1)?,
        Op::Slice { start, len } => x.narrow(1, *start, *len)?,
        Op::ChannelShuffle { groups } => ops::channel_shuffle(x, *groups)?,
        Op::PadChannels { before, after } => ops::pad_channels(x, *before, *after)?,
        Op::Subsample { stride } => ops::subsample(&x.contiguous()?, *stride)?,
        Op::MaxPool(pool) => ops::max_pool2d(x, pool, [1, 1])?.0,
        Op::AvgPool(pool) => ops::avg_pool2d(x, pool)?,
        Op::AdaptiveAvgPool { output } => ops::adaptive_avg_pool2d(x, *output)?,
        Op::ResizeNearest { output } => ops::interpolate_nearest(x, *output)?,
        Op::GlobalAvgPool => x.mean((2, 3))?,
        Op::Flatten => x.flatten_from(1)?,
        Op::Linear { weight, bias, .. } => ops::linear(x, &leaves[*weight], bias.map(|b| &leaves[b]))?,
        Op::Dropout { p } => match mode {
            Mode::Train(rng) if *p > 0.0 => (x * keep_mask(x.dims(), *p, node_rng(rng, id), x)?)?,
            _ => x.clone(),
        },
        Op::DropPath { p } => match mode {
            Mode::Train(rng) if *p > 0.0 => {
                let mut per_sample = vec![1; x.rank()];
                per_sample[0] = x.dims()[0];
                x.broadcast_mul(&keep_mask(&per_sample, *p, node_rng(rng, id), x)?)?
            }
            _ => x.clone(),
        },
    })
}

fn batch_norm(bn: &BatchNorm, x: &Tensor, leaves: &[Tensor], params: &Params, mode: Mode) -> Result<Tensor> {
    let affine = bn.affine.map(|(w, b)| (&leaves[w], &leaves[b]));
    if let Mode::Eval = mode {
        return Ok(ops::batch_norm(x, &params.stat(bn.running.0)?, &params.stat(bn.running.1)?, affine, bn.eps)?);
    }
    let moments = ops::batch_moments(x)?;
    if let Mode::Train(_) = mode {
        // PyTorch keeps the unbiased variance; of a single value it would be infinite.
        let unbias = moments.count as f64 / (moments.count as f64 - 1.0).max(1.0);
        update_running(params, bn.running.0, &moments.mean.detach(), bn.momentum)?;
        update_running(params, bn.running.1, &(moments.var.detach() * unbias)?, bn.momentum)?;
        params.bump_counter(bn.counter);
    }
    Ok(ops::batch_norm(x, &moments.mean, &moments.var, affine, bn.eps)?)
}

/// `running = (1 - momentum) running + momentum batch`.
fn update_running(params: &Params, index: usize, batch: &Tensor, momentum: f64) -> Result<()> {
    let entry = &params.stat_entries()[index];
    let flat = params.stats().tensor();
    let new = ((params.stat(index)?.affine(1.0 - momentum, 0.0))? + (batch.flatten_all()? * momentum)?)?;
    let end = entry.range().end;
    let parts = [flat.narrow(0, 0, entry.offset)?, new, flat.narrow(0, end, flat.elem_count() - end)?];
    params.stats().set(&Tensor::cat(&parts, 0)?)
}

/// The stream of a random layer: node `id` of the step's stream.
pub fn node_rng(rng: Rng, id: NodeId) -> Rng {
    rng.named("layer").fork(id as u64)
}

/// `1/(1-p)` with probability `1-p`, else 0; element i (row-major NCHW) draws number i of the stream.
fn keep_mask(dims: &[usize], p: f64, rng: Rng, like: &Tensor) -> Result<Tensor> {
    let n: usize = dims.iter().product();
    let mask: Vec<f64> = (0..n as u64).map(|i| keep_factor(rng, i, p)).collect();
    Ok(Tensor::from_vec(mask, dims, like.device())?.to_dtype(if like.dtype() == DType::F64 { DType::F64 } else { like.dtype() })?)
}

/// The dropout factor of element `i`: kept elements are scaled by `1/(1-p)`.
pub fn keep_factor(rng: Rng, i: u64, p: f64) -> f64 {
    if rng.uniform(i) < p { 0.0 } else { 1.0 / (1.0 - p) }
}
