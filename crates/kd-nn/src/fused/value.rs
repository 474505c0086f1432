//! What a run keeps: tensors, batch norms, packed weights.

use std::sync::Arc;

use crate::kernels::buffer::Buffer;
use crate::kernels::norm::{Lens, NormGrad};
use crate::kernels::tile::Activation;

/// The output of a node over the batch, `[image][row][column][channel]`.
#[derive(Clone)]
pub(super) enum Value {
    Stored(Arc<Buffer>),
    /// The output of a batch norm (and the ReLU behind it), as a view of its input; and as such, if someone had to have it.
    Seen {
        raw: Arc<Buffer>,
        norm: Arc<Norm>,
        stored: Option<Arc<Buffer>>,
    },
}

impl Value {
    /// The memory, and how to read it.
    pub(super) fn view(&self) -> (&[f32], Option<Lens<'_>>) {
        match self {
            Self::Stored(data) | Self::Seen { stored: Some(data), .. } => (data, None),
            Self::Seen { raw, norm, stored: None } => (raw, Some(norm.lens())),
        }
    }
}

/// A batch norm of one run, per channel.
pub(super) struct Norm {
    pub mean: Vec<f32>,
    /// `1 / sqrt(var + eps)`.
    pub inv: Vec<f32>,
    /// `output = f(scale input + shift)`.
    pub scale: Vec<f32>,
    pub shift: Vec<f32>,
    pub activation: Activation,
}

impl Norm {
    pub(super) fn lens(&self) -> Lens<'_> {
        Lens { scale: &self.scale, shift: &self.shift, activation: self.activation }
    }
}

/// The gradient of a node's output over the batch.
#[derive(Clone)]
pub(super) enum Grad {
    Stored(Arc<Buffer>),
    /// The gradient of a batch norm's input, in terms of that of its output.
    Norm(Arc<BehindNorm>),
}

pub(super) struct BehindNorm {
    /// Gradient of the output.
    pub d: Arc<Buffer>,
    /// The input.
    pub y: Arc<Buffer>,
    pub norm: Arc<Norm>,
    pub k0: Vec<f32>,
    pub k1: Vec<f32>,
    pub k2: Vec<f32>,
}

impl BehindNorm {
    pub(super) fn factors(&self) -> NormGrad<'_> {
        NormGrad { lens: self.norm.lens(), mean: &self.norm.mean, k0: &self.k0, k1: &self.k1, k2: &self.k2 }
    }
}

/// The weights of a convolution as its kernels read them.
pub(super) struct Packed {
    /// Versions of the values and statistics that they were made of.
    pub versions: (u64, u64),
    pub forward: Buffer,
    /// For the input gradient, where one is wanted.
    pub backward: Option<Buffer>,
    pub bias: Option<Vec<f32>>,
}
