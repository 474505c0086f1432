//! A run of a plan as candle sees it.
//!
//! ```text
//! x, anchor ──► token ──► tap 0 ──► output 0
//!                    └──► tap 1 ──► output 1 ..
//! ```
//!
//! The token has one element and no meaning. In candle's backward pass every tap that is reached puts its gradient into the piece, then
//! comes the token: it runs the tape backwards, adds the parameters' gradients to the network's sink and returns the input's. The anchor
//! is a variable when parameters are tracked, so that candle follows the graph although nothing else in it is one.

use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Device, Layout, Shape as Dims, Storage, Tensor};
use kd_core::{Error, Result};

use super::forward::Tape;
use super::plan::Shape;
use crate::graph::NodeId;
use crate::kernels::buffer::{Buffer, Pool};
use crate::kernels::layout::{self, Strided};
use crate::kernels::threads::{Lanes, cut, each};

/// A tape in candle's graph.
struct Piece {
    tape: Tape,
    /// Gradients of the wanted outputs that have arrived in this backward pass.
    arrived: Mutex<Vec<Option<Tensor>>>,
}

struct Token(Arc<Piece>);

struct Tap {
    piece: Arc<Piece>,
    /// Its number among the wanted outputs.
    index: usize,
}

/// The wanted outputs of an untracked run.
pub(super) fn outputs(tape: &Tape) -> Result<Vec<(NodeId, Tensor)>> {
    let of = |&node: &NodeId| Ok((node, tensor(&tape.stored(node), tape.shape(node), tape.lanes.images)?));
    tape.plan.wanted.iter().map(of).collect()
}

/// The wanted outputs of a run, in candle's graph behind `x` and `anchor`.
pub(super) fn track(tape: Tape, x: &Tensor, anchor: &Tensor) -> Result<Vec<(NodeId, Tensor)>> {
    let wanted: Vec<(NodeId, Shape)> = tape.plan.wanted.iter().map(|&w| (w, tape.shape(w))).collect();
    let piece = Arc::new(Piece { tape, arrived: Mutex::new(vec![None; wanted.len()]) });
    let token = x.apply_op2(anchor, Token(piece.clone()))?;
    let tap = |(index, &(node, shape)): (usize, &(NodeId, Shape))| {
        Ok((node, present(token.apply_op1(Tap { piece: piece.clone(), index })?, shape)?))
    };
    wanted.iter().enumerate().map(tap).collect()
}

/// A copy of images as a tensor of candle's.
pub(super) fn tensor(data: &[f32], shape: Shape, images: usize) -> Result<Tensor> {
    present(Tensor::from_vec(data.to_vec(), dims(shape, images), &Device::Cpu)?, shape)
}

/// `[B,H,W,C]` or `[B,C]`.
fn dims(shape: Shape, images: usize) -> Dims {
    let [c, h, w] = shape.image;
    if shape.vector { Dims::from((images, c)) } else { Dims::from((images, h, w, c)) }
}

/// Images `[B,H,W,C]` as candle's `[B,C,H,W]`, a view.
fn present(t: Tensor, shape: Shape) -> Result<Tensor> {
    Ok(if shape.vector { t } else { t.permute((0, 3, 1, 2))? })
}

/// Reads a tensor `[B,C,H,W]` or `[B,C]` of any strides.
pub(super) fn read(t: &Tensor, shape: Shape, images: usize, pool: &Pool) -> Result<Buffer> {
    let (storage, layout) = t.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        return Err(Error::refused("the fused executor reads tensors on the CPU only"));
    };
    let from = storage.as_slice::<f32>()?;
    let stride = layout.stride();
    let axis = |a: usize| stride.get(a).copied().unwrap_or(0);
    let len = shape.len();
    let mut out = pool.take(images * len);
    let shares = Lanes::new(images).shares();
    let parts = cut(&mut out, shares.iter().map(|s| s.images.len() * len));
    each(shares.into_iter().zip(parts).collect(), |(share, part)| {
        for (i, image) in share.images.zip(part.chunks_exact_mut(len)) {
            let at = Strided { offset: layout.start_offset() + i * axis(0), channel: axis(1), row: axis(2), col: axis(3) };
            layout::gather(from, at, shape.image, image);
        }
    });
    Ok(out)
}

impl CustomOp2 for Token {
    fn name(&self) -> &'static str {
        "fused"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Dims)> {
        Ok((CpuStorage::F32(vec![0.0]), Dims::from(1)))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let tape = &self.0.tape;
        let arrived: Vec<_> = self.0.arrived.lock().unwrap_or_else(|e| e.into_inner()).iter_mut().map(Option::take).collect();
        let run = || -> Result<Option<Tensor>> {
            let mut grads = vec![];
            for (&node, grad) in tape.plan.wanted.iter().zip(&arrived) {
                if let Some(grad) = grad {
                    grads.push((node, read(grad, tape.shape(node), tape.lanes.images, &tape.pool)?));
                }
            }
            let from = tape.plan.from;
            let Some(dx) = tape.backward(grads, x.track_op())? else { return Ok(None) };
            Ok(Some(tensor(&dx, tape.shape(from), tape.lanes.images)?))
        };
        Ok((run().map_err(candle_core::Error::wrap)?, None))
    }
}

impl CustomOp1 for Tap {
    fn name(&self) -> &'static str {
        "fused-output"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Dims)> {
        let tape = &self.piece.tape;
        let node = tape.plan.wanted[self.index];
        Ok((CpuStorage::F32(tape.stored(node).to_vec()), dims(tape.shape(node), tape.lanes.images)))
    }

    fn bwd(&self, token: &Tensor, output: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        // The gradient of `[B,H,W,C]`, kept as that of `[B,C,H,W]`.
        let grad = if output.rank() == 4 { grad.permute((0, 3, 1, 2))? } else { grad.clone() };
        self.piece.arrived.lock().unwrap_or_else(|e| e.into_inner())[self.index] = Some(grad);
        Ok(Some(Tensor::zeros(token.dims(), DType::F32, &Device::Cpu)?))
    }
}
