//! What is done to the gradient of a node's output once all of it is there, before the step that made the output is run backwards.
//!
//! It is done image by image as soon as the last convolution has written an image, which is then still in the cache; where the last
//! contribution does not come from a convolution, in a pass of its own.

use std::sync::Arc;

use super::forward::{Tape, nth};
use super::plan::Kind;
use super::value::{Norm, Value};
use crate::graph::NodeId;
use crate::kernels::buffer::Buffer;
use crate::kernels::tile::Activation;
use crate::kernels::{Level, elementwise, norm};

/// See the module.
pub(super) struct Finish {
    /// Floats per image.
    pub len: usize,
    /// The activation of the step, and its output: the gradient is zero where that is flat.
    mask: Option<(Activation, Arc<Buffer>)>,
    /// Batch norms whose output's gradient this is: the step itself, or terms of a sum.
    norms: Vec<(NodeId, Arc<Buffer>, Arc<Norm>)>,
}

/// `S1` and `S2` of a batch norm, see [`crate::kernels::norm`].
#[derive(Clone)]
pub(super) struct Sums {
    pub s1: Vec<f64>,
    pub s2: Vec<f64>,
}

impl Finish {
    /// For the gradient of a node's output; `None` when there is nothing to do.
    pub(super) fn of(tape: &Tape, node: NodeId) -> Option<Self> {
        let step = &tape.plan.steps[tape.plan.maker(node)?];
        let norm = |node: NodeId| match (tape.value(node), &tape.plan.steps[tape.plan.maker(node)?].kind) {
            (Value::Seen { raw, norm, .. }, Kind::Norm { batch: true, .. }) => Some((node, raw.clone(), norm.clone())),
            _ => None,
        };
        let (activation, norms) = match &step.kind {
            Kind::Norm { .. } => (Activation::None, norm(node).into_iter().collect()),
            Kind::Add { a, b, activation } => {
                let alone = [*a, *b].into_iter().filter(|&n| tape.plan.private[n]);
                (*activation, alone.filter_map(norm).collect())
            }
            Kind::Conv(conv) => (conv.activation, vec![]),
            Kind::Rectify { activation, .. } => (*activation, vec![]),
            _ => return None,
        };
        let mask = (activation != Activation::None).then(|| (activation, tape.stored(node)));
        (mask.is_some() || !norms.is_empty()).then(|| Self { len: tape.shape(node).len(), mask, norms })
    }

    /// Whether the gradient itself changes.
    pub(super) fn changes(&self) -> bool {
        self.mask.is_some()
    }

    /// What finishing images `start..end` reads, but for the first batch norm's part of it nothing that a convolution's pass has not read.
    pub(super) fn ahead(&self, start: usize, end: usize) -> &[f32] {
        self.norms.first().map_or(&[], |(_, y, _)| &y[start * self.len..end * self.len])
    }

    /// Sums of one lane.
    pub(super) fn sums_len(&self) -> usize {
        self.norms.iter().map(|(_, _, n)| 2 * n.mean.len()).sum()
    }

    /// Room for the sums of all lanes.
    pub(super) fn sums(&self, lanes: usize) -> Vec<f64> {
        vec![0.0; lanes * self.sums_len()]
    }

    /// Finishes the gradient `d` of image `i` and adds to the sums of its lane.
    pub(super) fn image(&self, level: Level, i: usize, d: &mut [f32], sums: &mut [f64]) {
        if let Some((activation, value)) = &self.mask {
            elementwise::mask(level, *activation, nth(value, self.len, i), d);
        }
        self.sum(level, i, d, sums);
    }

    /// Adds a finished gradient to the sums of its lane.
    pub(super) fn sum(&self, level: Level, i: usize, d: &[f32], mut sums: &mut [f64]) {
        for (_, y, norm) in &self.norms {
            let (own, rest) = sums.split_at_mut(2 * norm.mean.len());
            let (s1, s2) = own.split_at_mut(norm.mean.len());
            norm::grad_sums(level, d, nth(y, self.len, i), norm.lens(), &norm.mean, s1, s2);
            sums = rest;
        }
    }

    /// The sums of each batch norm, all lanes in order.
    pub(super) fn collect(&self, lanes: &[f64]) -> Vec<(NodeId, Sums)> {
        let mut at = 0;
        self.norms
            .iter()
            .map(|(node, _, norm)| {
                let channels = norm.mean.len();
                let total = |from: usize| -> Vec<f64> {
                    (from..from + channels).map(|c| lanes.iter().skip(c).step_by(self.sums_len()).sum()).collect()
                };
                at += 2 * channels;
                (*node, Sums { s1: total(at - 2 * channels), s2: total(at - channels) })
            })
            .collect()
    }
}

/// The sums of one lane of a thread's.
pub(super) fn lane_of<'a>(sums: &'a mut [f64], lane: usize, finish: &Finish) -> &'a mut [f64] {
    let len = finish.sums_len();
    &mut sums[lane * len..(lane + 1) * len]
}
