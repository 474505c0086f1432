//! Connectors: small trainable networks that bring a student's map to the channels and size of a teacher's.

use std::f64::consts::{PI, SQRT_2};

use candle_core::cpu::erf::erf_f64;
use candle_core::{DType, Device, Tensor};
use kd_core::{Cut, Error, FeatureSpec, Model, Params, Result};
use kd_nn::{BatchNorm, Conv, Graph, GraphBuilder, Network, NodeId, Op};

/// What leaves a connector.
pub(crate) const OUT: Cut = Cut::Block(1);

/// Resize if the sizes differ (average pooling where the map shrinks, nearest neighbour where it grows), 1x1 convolution without bias, batch
/// norm, and ReLU if wanted.
pub(crate) fn graph(stone: usize, from: &FeatureSpec, to: &FeatureSpec, relu: bool) -> Result<Graph> {
    let mut b = GraphBuilder::new(format!("connector.{stone}"), &[from.channels, from.size[0], from.size[1]]);
    let shrunk = [from.size[0].min(to.size[0]), from.size[1].min(to.size[1])];
    if shrunk != from.size {
        b.layer(Op::AdaptiveAvgPool { output: shrunk });
    }
    if to.size != shrunk {
        b.layer(Op::ResizeNearest { output: to.size });
    }
    b.conv("conv", Conv::new(to.channels, 1));
    b.batch_norm("bn");
    if relu {
        b.relu();
    }
    b.block(1, "bn");
    b.finish()
}

/// Lets a connector's batch norm begin with the mean and deviation that the teacher's map has in front of its ReLU (of the map itself, where
/// the connector ends without one).
///
/// # Errors
/// A teacher whose batch norms are not known, or do not tell.
pub(crate) fn start_like_teacher(connector: &Network, teacher: &dyn Model, block: usize, relu: bool) -> Result<()> {
    let unknown = |why: &str| {
        let name = &teacher.spec().name;
        Error::param(
            "connector_bn",
            "\"teacher\"",
            format!("\"default\": the statistics of {name} at `{}` are not known: {why}", Cut::Block(block)),
        )
    };
    let network = teacher.as_any().downcast_ref::<Network>().ok_or_else(|| unknown("it is no kd-nn network"))?;
    let (graph, params) = (network.graph(), network.parameters());
    let mut node = graph.cut(Cut::Block(block))?;
    if relu && matches!(graph.nodes()[node].op, Op::Relu | Op::Relu6) {
        node = graph.nodes()[node].inputs[0];
    }
    let reader = graph.nodes().iter().find_map(|n| match &n.op {
        Op::BatchNorm(bn) if n.inputs == [node] => Some(bn),
        _ => None,
    });
    let channels = match reader {
        Some(bn) => {
            let (mean, var) = (vector(&params.stat(bn.running.0)?)?, vector(&params.stat(bn.running.1)?)?);
            mean.into_iter().zip(var).collect()
        }
        None => moments(graph, params, node).map_err(|e| unknown(&e.to_string()))?,
    };
    let (mean, std): (Vec<f64>, Vec<f64>) = channels.into_iter().map(|(mean, var)| (mean, var.sqrt())).unzip();
    let (mean, std) = (Tensor::new(mean, &Device::Cpu)?, Tensor::new(std, &Device::Cpu)?);
    connector.parameters().assign(|name| match name {
        "bn.weight" => Some(std.clone()),
        "bn.bias" => Some(mean.clone()),
        _ => None,
    })
}

fn vector(t: &Tensor) -> Result<Vec<f64>> {
    Ok(t.to_dtype(DType::F64)?.to_vec1()?)
}

/// Mean and variance of every channel of a node over the data, as far as the batch norms before it tell.
///
/// A batch norm's output has mean `bias` and deviation `weight`; the terms of a sum are taken as uncorrelated, what a ReLU sees as normal.
fn moments(graph: &Graph, params: &Params, node: NodeId) -> Result<Vec<(f64, f64)>> {
    let node = &graph.nodes()[node];
    let input = |i: usize| moments(graph, params, node.inputs[i]);
    Ok(match &node.op {
        Op::BatchNorm(bn) => of_batch_norm(bn, params)?,
        Op::Relu => input(0)?.into_iter().map(rectified).collect(),
        Op::Add => input(0)?.into_iter().zip(input(1)?).map(|(a, b)| (a.0 + b.0, a.1 + b.1)).collect(),
        Op::Concat => (0..node.inputs.len()).map(input).collect::<Result<Vec<_>>>()?.concat(),
        Op::Slice { start, len } => input(0)?[*start..start + len].to_vec(),
        Op::ChannelShuffle { groups } => {
            let x = input(0)?;
            (0..x.len()).map(|c| x[c % groups * (x.len() / groups) + c / groups]).collect()
        }
        Op::PadChannels { before, after } => [vec![(0.0, 0.0); *before], input(0)?, vec![(0.0, 0.0); *after]].concat(),
        Op::Subsample { .. } => input(0)?,
        op => return Err(Error::refused(format!("its {} hides what the batch norms say", op.kind()))),
    })
}

fn of_batch_norm(bn: &BatchNorm, params: &Params) -> Result<Vec<(f64, f64)>> {
    let Some((weight, bias)) = bn.affine else { return Ok(vec![(0.0, 1.0); bn.channels]) };
    let (weight, bias) = (vector(&params.value(weight)?)?, vector(&params.value(bias)?)?);
    Ok(bias.into_iter().zip(weight).map(|(b, w)| (b, w * w)).collect())
}

/// Mean and variance of `max(x, 0)` for a normal `x`.
fn rectified((mean, var): (f64, f64)) -> (f64, f64) {
    if var <= 0.0 {
        return (mean.max(0.0), 0.0);
    }
    let std = var.sqrt();
    let z = mean / std;
    let (density, share) = ((-0.5 * z * z).exp() / (2.0 * PI).sqrt(), 0.5 * (1.0 + erf_f64(z / SQRT_2)));
    let first = mean * share + std * density;
    let second = (mean * mean + var) * share + mean * std * density;
    (first, (second - first * first).max(0.0))
}
