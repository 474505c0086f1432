//! An adapter's layers on the named tensors of a parity call.
//!
//! The same mathematics as the adapters' networks, on tensors of candle's graph: `param.<layer>.weight` and so on, batch norms with the
//! statistics of the batch, their running ones from `state_in.<layer>.*` to the state after the call.

use std::cell::RefCell;

use candle_core::Tensor;
use kd_core::{Error, ParityInputs, Result, StateDict};
use kd_nn::ops::{self, ConvArgs};

use crate::inputs;

/// Settings of an adapter's batch norms.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Norm {
    pub(crate) eps: f64,
    pub(crate) momentum: f64,
}

impl Norm {
    pub(crate) fn validate(self) -> Result<()> {
        inputs::positive("bn_eps", self.eps)?;
        inputs::share("bn_momentum", self.momentum)
    }
}

/// PyTorch's settings, for adapters without batch norm too.
impl Default for Norm {
    fn default() -> Self {
        Self { eps: 1e-5, momentum: 0.1 }
    }
}

/// The layers below one prefix of a parity call's tensors.
pub(crate) struct Layers<'a> {
    inputs: &'a ParityInputs,
    root: &'static str,
    norm: Norm,
    state: RefCell<StateDict>,
}

impl<'a> Layers<'a> {
    /// Layers that are trained: `param.*`.
    pub(crate) fn trained(inputs: &'a ParityInputs, norm: Norm) -> Self {
        Self { inputs, root: "param", norm, state: RefCell::default() }
    }

    /// Frozen layers of the teacher's side: `teacher.*`.
    pub(crate) fn frozen(inputs: &'a ParityInputs) -> Self {
        Self { inputs, root: "teacher", norm: Norm::default(), state: RefCell::default() }
    }

    /// Whether a layer was given.
    pub(crate) fn has(&self, layer: &str) -> bool {
        self.inputs.find(&format!("{}.{layer}.weight", self.root)).is_some()
    }

    /// A learnable tensor of the given shape.
    pub(crate) fn tensor(&self, name: &str, shape: &[usize]) -> Result<&'a Tensor> {
        named(self.inputs, format!("{}.{name}", self.root), shape)
    }

    fn bias(&self, layer: &str, width: usize) -> Result<Option<&'a Tensor>> {
        let name = format!("{}.{layer}.bias", self.root);
        if self.inputs.find(&name).is_none() { Ok(None) } else { named(self.inputs, name, &[width]).map(Some) }
    }

    /// A layer's weight with one axis checked against the input's channels.
    fn weight(&self, layer: &str, x: &Tensor, rank: usize, axis: usize) -> Result<&'a Tensor> {
        let name = format!("{}.{layer}.weight", self.root);
        let weight = self.inputs.get(&name)?;
        let channels = x.dim(1)?;
        if weight.rank() != rank || weight.dims()[axis] != channels {
            return Err(Error::shape(name, format!("{rank} axes, axis {axis} of length {channels}"), weight.dims()));
        }
        Ok(weight)
    }

    /// A convolution, with a bias if there is one; its kernel is the weight's.
    pub(crate) fn conv(&self, layer: &str, x: &Tensor, stride: usize, padding: usize) -> Result<Tensor> {
        let weight = self.weight(layer, x, 4, 1)?;
        let args = ConvArgs { stride: [stride; 2], padding: [padding; 4], dilation: [1; 2], groups: 1 };
        Ok(ops::conv2d(x, weight, self.bias(layer, weight.dim(0)?)?, &args)?)
    }

    /// A transposed convolution.
    pub(crate) fn conv_transpose(&self, layer: &str, x: &Tensor, stride: usize, padding: usize) -> Result<Tensor> {
        let weight = self.weight(layer, x, 4, 0)?;
        Ok(ops::conv_transpose2d(x, weight, self.bias(layer, weight.dim(1)?)?, stride, padding)?)
    }

    /// A batch norm in training mode.
    pub(crate) fn batch_norm(&self, layer: &str, x: &Tensor) -> Result<Tensor> {
        let c = x.dim(1)?;
        let moments = ops::batch_moments(x)?;
        if moments.count < 2 {
            return Err(one_value(layer));
        }
        let unbiased = (moments.var.detach() * (moments.count as f64 / (moments.count as f64 - 1.0)))?;
        let running = [("running_mean", moments.mean.detach()), ("running_var", unbiased)];
        for (name, batch) in running {
            let key = format!("{layer}.{name}");
            let before = named(self.inputs, format!("state_in.{key}"), &[c])?;
            let after = ((before * (1.0 - self.norm.momentum))? + (batch.flatten_all()? * self.norm.momentum)?)?;
            self.state.borrow_mut().insert(key, after);
        }
        let affine = (self.tensor(&format!("{layer}.weight"), &[c])?, self.tensor(&format!("{layer}.bias"), &[c])?);
        Ok(ops::batch_norm(x, &moments.mean, &moments.var, Some(affine), self.norm.eps)?)
    }

    /// The running statistics after the call.
    pub(crate) fn into_state(self) -> StateDict {
        self.state.into_inner()
    }
}

fn named<'a>(inputs: &'a ParityInputs, name: String, shape: &[usize]) -> Result<&'a Tensor> {
    let tensor = inputs.get(&name)?;
    if tensor.dims() == shape { Ok(tensor) } else { Err(Error::shape(name, format!("{shape:?}"), tensor.dims())) }
}

/// Batch statistics of one value have no variance.
pub(crate) fn one_value(what: &str) -> Error {
    Error::refused(format!("{what}: batch norm in training mode needs at least 2 values of each channel, got 1"))
}
