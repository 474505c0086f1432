//! ResNets of depth `6n + 2` for CIFAR (He et al. 2016, section 4.2): a 3x3 stem and three stages of `n` basic units.
//!
//! | name | widths | shortcut | head | names after |
//! |---|---|---|---|---|
//! | `resnet8` .. `resnet110` | 16, 16, 32, 64 | option B: 1x1 convolution and batch norm | `fc` | mdistiller, RepDistiller, chenyaofo |
//! | `resnet8x4`, `resnet32x4` | 32, 64, 128, 256 | the same, in `layer1.0` too | `fc` | mdistiller, RepDistiller |
//! | `resnet20_a` .. `resnet110_a` | 16, 16, 32, 64 | option A: subsampled, zero channels | `linear` | akamaster |
//!
//! Stages: the stem after its ReLU, then each stage after its last ReLU; pre-activations are the sums before that ReLU.

use kd_core::{Cut, Result};
use kd_nn::{Conv, Graph, GraphBuilder, Init};

use crate::residual::{Residual, Shortcut};
use crate::{Config, Family};

pub(crate) const OPTION_B: Family = Family {
    name: "CIFAR ResNet, option B",
    keys: "mdistiller",
    source: "He et al., CVPR 2016; widths and names as mdistiller and RepDistiller",
};
pub(crate) const OPTION_A: Family =
    Family { name: "CIFAR ResNet, option A", keys: "akamaster", source: "He et al., CVPR 2016; names as akamaster/pytorch_resnet_cifar10" };

/// `widths`: stem, then the three stages.
pub(crate) fn option_b(name: &str, config: &Config, depth: usize, widths: [usize; 4]) -> Result<Graph> {
    let init = Init::HeFanOut;
    let mut b = trunk(name, config, depth, widths, Residual { bottleneck: false, shortcut: Shortcut::Projection("downsample"), init });
    b.linear("fc", config.classes);
    b.cut(Cut::Logits);
    b.finish()
}

pub(crate) fn option_a(name: &str, config: &Config, depth: usize) -> Result<Graph> {
    let init = Init::HeFanIn;
    let mut b = trunk(name, config, depth, [16, 16, 32, 64], Residual { bottleneck: false, shortcut: Shortcut::Padded, init });
    b.linear_with("linear", config.classes, init, Some(Init::default_bias(64)));
    b.cut(Cut::Logits);
    b.finish()
}

fn trunk(name: &str, config: &Config, depth: usize, widths: [usize; 4], units: Residual) -> GraphBuilder {
    let mut b = GraphBuilder::new(name, &config.input);
    b.conv("conv1", Conv::new(widths[0], 3).pad(1).init(units.init));
    b.batch_norm("bn1");
    b.relu();
    b.stage(0, "bn1", None);
    for (i, &width) in (1..).zip(&widths[1..]) {
        units.stage(&mut b, i, width, (depth - 2) / 6, if i == 1 { 1 } else { 2 }, true);
    }
    b.global_avg_pool();
    b.cut(Cut::Embedding);
    b
}
