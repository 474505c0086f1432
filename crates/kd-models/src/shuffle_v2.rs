//! ShuffleNet v2 at width 1 (Ma et al. 2018): widths 116, 232, 464, units 4, 8, 4, a last 1x1 convolution to 1024.
//!
//! ```text
//! first unit of a stage:  shuffle(concat(left(x), right(x)))      left: dw3x3 stride 2, 1x1;  right: 1x1, dw3x3 stride 2, 1x1
//! the others:             [x1, x2] = halves of x;  shuffle(concat(x1, right(x2)))
//! ```
//!
//! `ShuffleV2` is mdistiller's for CIFAR: a 1x1 stem; `Preact(i)` is `concat(x1, bn3)` of the last unit, before ReLU *and not shuffled*, so that
//! its channels stand in another order than the stage's, and nothing can be run from it. `imagenet_shufflenet_v2_x1_0` is torchvision's: a
//! 3x3 stem with stride 2 and max pooling, no pre-activations. The last convolution belongs to the last block. OFD does not support them.

use kd_core::{Cut, Result};
use kd_nn::{Conv, Graph, GraphBuilder, NodeId, Op, Pool};

use crate::{Config, Family};

pub(crate) const CIFAR: Family =
    Family { name: "ShuffleNet v2, CIFAR", keys: "mdistiller", source: "Ma et al., ECCV 2018; stem and names as mdistiller" };
pub(crate) const IMAGENET: Family =
    Family { name: "ShuffleNet v2", keys: "torchvision", source: "Ma et al., ECCV 2018; names as torchvision" };

const STAGES: [(usize, usize); 3] = [(116, 4), (232, 8), (464, 4)];

/// A branch from the cursor on: convolutions to `half` channels with the given module names of convolution and batch norm; `'d'` is depthwise
/// (no ReLU behind it), `'p'` 1x1. Returns the last batch norm, with the cursor behind the ReLU that follows it.
fn branch(b: &mut GraphBuilder, kinds: &str, names: &[(String, String)], half: usize, stride: usize) -> NodeId {
    let mut last = b.here();
    for (kind, (name, norm)) in kinds.chars().zip(names) {
        let channels = b.channels();
        let depthwise = kind == 'd';
        b.conv(name, if depthwise { Conv::new(channels, 3).stride(stride).pad(1).groups(channels) } else { Conv::new(half, 1) });
        last = b.batch_norm(norm);
        if !depthwise {
            b.relu();
        }
    }
    last
}

/// One unit. `names` gives the module names of the left branch (empty unless it is the first of its stage) and of the right one.
/// Returns what the right half was joined with, and its last batch norm.
fn unit(b: &mut GraphBuilder, left: &[(String, String)], right: &[(String, String)], width: usize) -> (NodeId, NodeId) {
    let (x, half) = (b.here(), width / 2);
    let stride = if left.is_empty() { 1 } else { 2 };
    let kept = if left.is_empty() {
        let kept = b.layer(Op::Slice { start: 0, len: half });
        b.at(x);
        b.layer(Op::Slice { start: half, len: half });
        kept
    } else {
        branch(b, "dp", left, half, stride);
        let kept = b.here();
        b.at(x);
        kept
    };
    let norm = branch(b, "pdp", right, half, stride);
    let right = b.here();
    b.concat(&[kept, right]);
    b.layer(Op::ChannelShuffle { groups: 2 });
    (kept, norm)
}

fn tail(mut b: GraphBuilder, conv: &str, norm: &str, head: &str, classes: usize) -> Result<Graph> {
    b.conv(conv, Conv::new(1024, 1));
    b.batch_norm(norm);
    b.relu();
    b.block(3, norm);
    b.global_avg_pool();
    b.cut(Cut::Embedding);
    b.linear(head, classes);
    b.cut(Cut::Logits);
    b.finish()
}

pub(crate) fn cifar(name: &str, config: &Config) -> Result<Graph> {
    let mut b = GraphBuilder::new(name, &config.input);
    b.conv("conv1", Conv::new(24, 1));
    b.batch_norm("bn1");
    b.relu();
    b.stage(0, "bn1", None);
    for (i, (width, units)) in (1..).zip(STAGES) {
        let module = format!("layer{i}");
        for j in 0..units {
            let pair = |k: usize| (format!("{module}.{j}.conv{k}"), format!("{module}.{j}.bn{k}"));
            let (left, right) = if j == 0 { (vec![pair(1), pair(2)], [3, 4, 5]) } else { (vec![], [1, 2, 3]) };
            let (kept, norm) = unit(&mut b, &left, &right.map(pair), width);
            if j + 1 == units {
                let out = b.here();
                b.concat(&[kept, norm]);
                b.cut(Cut::Preact(i));
                b.at(out);
            }
        }
        b.stage(i, &module, None);
        if i < 3 {
            b.block(i, &module);
        }
    }
    tail(b, "conv2", "bn2", "linear", config.classes)
}

pub(crate) fn imagenet(name: &str, config: &Config) -> Result<Graph> {
    let mut b = GraphBuilder::new(name, &config.input);
    b.conv("conv1.0", Conv::new(24, 3).stride(2).pad(1));
    b.batch_norm("conv1.1");
    b.relu();
    b.stage(0, "conv1", None);
    b.max_pool(Pool::new(3).stride(2).pad(1));
    for (i, (width, units)) in (1..).zip(STAGES) {
        let module = format!("stage{}", i + 1);
        for j in 0..units {
            let pair =
                |branch: usize, k: usize| (format!("{module}.{j}.branch{branch}.{k}"), format!("{module}.{j}.branch{branch}.{}", k + 1));
            let left = if j == 0 { vec![pair(1, 0), pair(1, 2)] } else { vec![] };
            unit(&mut b, &left, &[0, 3, 5].map(|k| pair(2, k)), width);
        }
        b.stage(i, &module, None);
        if i < 3 {
            b.block(i, &module);
        }
    }
    tail(b, "conv5.0", "conv5.1", "fc", config.classes)
}
