//! One backward pass over candle's graph and the flat gradients of the networks in it.

use candle_core::Tensor;
use candle_core::backprop::GradStore;
use kd_core::{Model, Params, Result};

/// Gradients of one backward pass.
pub struct Gradients {
    /// candle's gradients: of ordinary `Var`s and of tracked inputs.
    pub store: GradStore,
    /// One entry per network given to [`backward`]; `None` for a model without flat parameters.
    pub networks: Vec<Option<NetworkGradients>>,
}

/// The gradient of one network's parameters.
pub struct NetworkGradients {
    /// Laid out as the network's values; an owned copy.
    pub flat: Tensor,
    /// Which parameters the pass reached (a reached gradient may still be zero).
    pub reached: Vec<bool>,
}

/// Differentiates `loss` and returns the gradients of `networks`, whichever executor ran them.
///
/// May be called several times on one graph (task and distillation losses apart, say): each call starts from empty sinks.
pub fn backward(loss: &Tensor, networks: &[&dyn Model]) -> Result<Gradients> {
    let params: Vec<Option<&Params>> = networks.iter().map(|n| n.params()).collect();
    for p in params.iter().flatten() {
        p.zero_grads()?;
    }
    let store = loss.backward()?;
    let mut found = Vec::with_capacity(params.len());
    for p in params {
        found.push(match p {
            None => None,
            Some(p) => {
                p.gather(&store)?;
                Some(NetworkGradients { flat: p.grads().snapshot()?, reached: p.reached() })
            }
        });
    }
    Ok(Gradients { store, networks: found })
}
