//! ResNet-18 .. 152 (He et al. 2016, table 1): four stages of basic units (18, 34) or bottlenecks (50, 101, 152).
//!
//! | name | stem | shortcut | head | names after |
//! |---|---|---|---|---|
//! | `imagenet_resnet18` .. `imagenet_resnet152` | 7x7 stride 2, batch norm, ReLU, 3x3 max pooling stride 2 | `downsample` | `fc` | torchvision, timm |
//! | `ResNet18`, `ResNet34`, `ResNet50` | 3x3, batch norm, ReLU | `shortcut` | `linear` | mdistiller (`resnetv2.py`) |
//!
//! Stage 0 is the stem after its ReLU and, for ImageNet, before the pooling; its pre-activation there is the stem's batch norm.
//! OFD takes its margins from stages 1..4, on ImageNet from 2..4, as mdistiller does.

use kd_core::{Cut, Result};
use kd_nn::{Conv, Graph, GraphBuilder, Init, Pool};

use crate::residual::{Residual, Shortcut};
use crate::{Config, Family};

pub(crate) const IMAGENET: Family =
    Family { name: "ResNet", keys: "torchvision", source: "He et al., CVPR 2016; stride in the bottleneck's 3x3 and names as torchvision" };
pub(crate) const CIFAR: Family = Family {
    name: "ResNet, CIFAR stem",
    keys: "mdistiller",
    source: "He et al., CVPR 2016; 3x3 stem without pooling and names as mdistiller's resnetv2",
};

/// Units per stage, and whether they are bottlenecks.
fn plan(depth: usize) -> ([usize; 4], bool) {
    match depth {
        18 => ([2, 2, 2, 2], false),
        34 => ([3, 4, 6, 3], false),
        50 => ([3, 4, 6, 3], true),
        101 => ([3, 4, 23, 3], true),
        _ => ([3, 8, 36, 3], true),
    }
}

pub(crate) fn imagenet(name: &str, config: &Config, depth: usize) -> Result<Graph> {
    let mut b = GraphBuilder::new(name, &config.input);
    b.conv("conv1", Conv::new(64, 7).stride(2).pad(3).init(Init::HeFanOut));
    b.batch_norm("bn1");
    b.cut(Cut::Preact(0));
    b.relu();
    b.stage(0, "bn1", None);
    b.max_pool(Pool::new(3).stride(2).pad(1));
    body(b, depth, "downsample", 2, "fc", config.classes)
}

pub(crate) fn cifar(name: &str, config: &Config, depth: usize) -> Result<Graph> {
    let mut b = GraphBuilder::new(name, &config.input);
    b.conv("conv1", Conv::new(64, 3).pad(1).init(Init::HeFanOut));
    b.batch_norm("bn1");
    b.relu();
    b.stage(0, "bn1", None);
    body(b, depth, "shortcut", 1, "linear", config.classes)
}

/// The four stages and the head; `margins` is the first stage that OFD takes margins from.
fn body(mut b: GraphBuilder, depth: usize, shortcut: &'static str, margins: usize, head: &str, classes: usize) -> Result<Graph> {
    let (units, bottleneck) = plan(depth);
    let residual = Residual { bottleneck, shortcut: Shortcut::Projection(shortcut), init: Init::HeFanOut };
    for i in 1..=4 {
        residual.stage(&mut b, i, 32 << i, units[i - 1], if i == 1 { 1 } else { 2 }, i >= margins);
    }
    b.global_avg_pool();
    b.cut(Cut::Embedding);
    b.linear(head, classes);
    b.cut(Cut::Logits);
    b.finish()
}
