//! A method's graph on named tensors: in a parity call the layers that train compute on the parameters and statistics of the call.
//!
//! The network that a loop trains and the mathematics that is compared with PyTorch come from one graph. Batch norms use the batch's
//! statistics, as in training, and the running ones after the step are part of the answer.

use candle_core::Tensor;
use kd_core::{Cut, Error, ParityInputs, Result, StateDict};
use kd_nn::ops::{self, ConvArgs};
use kd_nn::{BatchNorm, Graph, Op};

/// What `graph` makes of `x` at `cut`, with the parameters `param.<module>.<name>` and the statistics `state_in.<module>.<name>` of the
/// call. The statistics after the step join `state` as `<module>.<name>`.
///
/// # Errors
/// A parameter or statistic that the call lacks or that has another shape; a layer that no method uses.
pub(crate) fn run(graph: &Graph, module: &str, inputs: &ParityInputs, x: &Tensor, cut: Cut, state: &mut StateDict) -> Result<Tensor> {
    run_from(graph, &format!("param.{module}"), module, inputs, x, cut, state)
}

/// As [`run`], the parameters being `<params>.<name>`.
pub(crate) fn run_from(
    graph: &Graph,
    params: &str,
    module: &str,
    inputs: &ParityInputs,
    x: &Tensor,
    cut: Cut,
    state: &mut StateDict,
) -> Result<Tensor> {
    let target = graph.cut(cut)?;
    let piece = graph.piece(0, &[target])?;
    graph.shapes(0, &x.dims()[1..], &piece)?;
    let parameters = graph.params().entries().iter().map(|e| tensor(inputs, &format!("{params}.{}", e.name), &e.shape));
    let parameters = parameters.collect::<Result<Vec<_>>>()?;
    let mut values: Vec<Option<Tensor>> = vec![None; graph.nodes().len()];
    values[0] = Some(x.clone());
    for id in piece {
        let node = &graph.nodes()[id];
        let given: Vec<Tensor> = node.inputs.iter().filter_map(|&i| values[i].clone()).collect();
        let x = given.first().ok_or_else(|| Error::missing(node.op.kind(), "an input"))?;
        let y = match &node.op {
            Op::Conv2d(c) => {
                let args = ConvArgs { stride: c.stride, padding: c.padding, dilation: c.dilation, groups: c.groups };
                ops::conv2d(x, &parameters[c.weight], c.bias.map(|b| &parameters[b]), &args)?
            }
            Op::ConvTranspose2d(c) => ops::conv_transpose2d(x, &parameters[c.weight], Some(&parameters[c.bias]), c.stride, c.padding)?,
            Op::LeakyRelu { slope } => ops::leaky_relu(x, *slope)?,
            Op::BatchNorm(bn) => batch_norm(graph, bn, module, inputs, x, &parameters, state)?,
            Op::Relu => ops::relu(x)?,
            Op::Sigmoid => ops::sigmoid(x)?,
            Op::Add => (x + &given[1])?,
            Op::Mul => x.broadcast_mul(&given[1])?,
            Op::Concat => Tensor::cat(&given, 1)?,
            Op::Slice { start, len } => x.narrow(1, *start, *len)?,
            Op::AdaptiveAvgPool { output } => ops::adaptive_avg_pool2d(x, *output)?,
            Op::ResizeNearest { output } => ops::interpolate_nearest(x, *output)?,
            Op::GlobalAvgPool => x.mean((2, 3))?,
            Op::Flatten => x.flatten_from(1)?,
            Op::Linear { weight, bias, .. } => ops::linear(x, &parameters[*weight], bias.map(|b| &parameters[b]))?,
            other => return Err(Error::refused(format!("{}: `{}` has no form on named tensors", graph.spec().name, other.kind()))),
        };
        values[id] = Some(y);
    }
    values.swap_remove(target).ok_or_else(|| Error::missing(&graph.spec().name, cut.to_string()))
}

fn batch_norm(
    graph: &Graph,
    bn: &BatchNorm,
    module: &str,
    inputs: &ParityInputs,
    x: &Tensor,
    parameters: &[Tensor],
    state: &mut StateDict,
) -> Result<Tensor> {
    let moments = ops::batch_moments(x)?;
    let unbias = moments.count as f64 / (moments.count as f64 - 1.0).max(1.0);
    for (index, batch) in [(bn.running.0, moments.mean.detach()), (bn.running.1, (moments.var.detach() * unbias)?)] {
        let entry = &graph.params().stats()[index];
        let old = tensor(inputs, &format!("state_in.{module}.{}", entry.name), &entry.shape)?;
        let new = ((old * (1.0 - bn.momentum))? + (batch.reshape(entry.shape.as_slice())? * bn.momentum)?)?;
        state.insert(format!("{module}.{}", entry.name), new);
    }
    let affine = bn.affine.map(|(w, b)| (&parameters[w], &parameters[b]));
    Ok(ops::batch_norm(x, &moments.mean, &moments.var, affine, bn.eps)?)
}

fn tensor(inputs: &ParityInputs, name: &str, shape: &[usize]) -> Result<Tensor> {
    let found = inputs.get(name)?;
    if found.dims() == shape { Ok(found.clone()) } else { Err(Error::shape(name, format!("{shape:?}"), found.dims())) }
}
