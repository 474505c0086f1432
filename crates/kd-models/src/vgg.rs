//! VGG for CIFAR (Simonyan and Zisserman 2015) with batch norm, 8 .. 19 layers: five groups of 3x3 convolutions with bias, one linear layer.
//!
//! A 2x2 max pooling follows groups 0, 1 and 2, and group 3 when the nominal input is 64 pixels high, as in mdistiller; then the map is averaged.
//! Stages are the groups after their last ReLU, before the pooling; blocks are the same, so that a pooling opens the block behind it.

use kd_core::{Cut, Result};
use kd_nn::{Conv, Graph, GraphBuilder, Init, Pool};

use crate::{Config, Family};

pub(crate) const FAMILY: Family = Family {
    name: "VGG, CIFAR",
    keys: "mdistiller",
    source: "Simonyan and Zisserman, ICLR 2015; batch norm, one linear layer and names as mdistiller",
};

/// `groups`: convolutions per group.
pub(crate) fn build(name: &str, config: &Config, groups: [usize; 5]) -> Result<Graph> {
    let widths = [64, 128, 256, 512, 512];
    let mut b = GraphBuilder::new(name, &config.input);
    for (i, (&width, &convs)) in widths.iter().zip(&groups).enumerate() {
        if (1..=3).contains(&i) || i == 4 && config.input[1] == 64 {
            b.max_pool(Pool::new(2));
        }
        let module = format!("block{i}");
        for j in 0..convs {
            if j > 0 {
                b.relu();
            }
            b.conv(&format!("{module}.{}", 3 * j), Conv::new(width, 3).pad(1).init(Init::HeFanOut).bias_init(Init::Const(0.0)));
            b.batch_norm(&format!("{module}.{}", 3 * j + 1));
        }
        if i > 0 {
            b.cut(Cut::Preact(i));
        }
        b.relu();
        let norm = format!("{module}.{}", 3 * convs - 2);
        b.stage(i, &module, (i > 0).then_some(norm.as_str()));
        b.block(i + 1, &module);
    }
    b.global_avg_pool();
    b.cut(Cut::Embedding);
    b.linear_with("classifier", config.classes, Init::Normal(0.01), Some(Init::Const(0.0)));
    b.cut(Cut::Logits);
    b.finish()
}
