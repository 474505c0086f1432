//! ShuffleNet v1 (Zhang et al. 2018) for CIFAR, 3 groups, widths 240, 480, 960, units 4, 8, 4, as mdistiller's `ShuffleV1`.
//!
//! ```text
//! F = bn3(conv3_g3(ReLU(bn2(dw3x3(shuffle(ReLU(bn1(conv1_g(x)))))))))      g = 1 on the stem's 24 channels, else 3
//! out = ReLU(F + x);   first unit of a stage (stride 2): out = ReLU(concat(F, avgpool3x3(x)))
//! ```
//!
//! The stem is a 1x1 convolution without stride. Pre-activations are the sums before the last ReLU. OFD does not support this network.

use kd_core::{Cut, Result};
use kd_nn::{Conv, Graph, GraphBuilder, Op, Pool};

use crate::{Config, Family};

pub(crate) const FAMILY: Family =
    Family { name: "ShuffleNet v1, CIFAR", keys: "mdistiller", source: "Zhang et al., CVPR 2018; stem and names as mdistiller" };

const GROUPS: usize = 3;

pub(crate) fn build(name: &str, config: &Config) -> Result<Graph> {
    let mut b = GraphBuilder::new(name, &config.input);
    b.conv("conv1", Conv::new(24, 1));
    b.batch_norm("bn1");
    b.relu();
    b.stage(0, "bn1", None);
    for (i, (width, units)) in (1..).zip([(240, 4), (480, 8), (960, 4)]) {
        let module = format!("layer{i}");
        for j in 0..units {
            unit(&mut b, &format!("{module}.{j}"), width, j == 0);
            if j + 1 == units {
                b.cut(Cut::Preact(i));
            }
            b.relu();
        }
        b.stage(i, &module, None);
        b.block(i, &module);
    }
    b.global_avg_pool();
    b.cut(Cut::Embedding);
    b.linear("linear", config.classes);
    b.cut(Cut::Logits);
    b.finish()
}

/// One unit without its last ReLU. The first one of a stage brings the width less its input's channels; the pooled input brings those.
fn unit(b: &mut GraphBuilder, name: &str, width: usize, first: bool) {
    let (x, channels) = (b.here(), b.channels());
    let out = if first { width - channels } else { width };
    let (mid, groups) = (out / 4, if channels == 24 { 1 } else { GROUPS });
    b.conv(&format!("{name}.conv1"), Conv::new(mid, 1).groups(groups));
    b.batch_norm(&format!("{name}.bn1"));
    b.relu();
    b.layer(Op::ChannelShuffle { groups });
    b.conv(&format!("{name}.conv2"), Conv::new(mid, 3).stride(if first { 2 } else { 1 }).pad(1).groups(mid));
    b.batch_norm(&format!("{name}.bn2"));
    b.relu();
    b.conv(&format!("{name}.conv3"), Conv::new(out, 1).groups(GROUPS));
    let main = b.batch_norm(&format!("{name}.bn3"));
    if first {
        b.at(x);
        let pooled = b.avg_pool(Pool::new(3).stride(2).pad(1));
        b.concat(&[main, pooled]);
    } else {
        b.add(x);
    }
}
