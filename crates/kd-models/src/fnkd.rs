//! Pre-activation ResNets of depth `6n + 2` for CIFAR, as in FNKD's MXNet code (Xu et al., ECCV 2020).
//!
//! ```text
//! F = conv2(ReLU(bn2(conv1(ReLU(bn1(x))))));  out = F + x,  or F + downsample(x) in stage2.0 and stage3.0
//! ```
//!
//! In front stands a batch norm without scale and shift (`bn0`); the 1x1 `downsample`, without batch norm, sees the raw `x`. The head is
//! batch norm, ReLU (left out by the `_noact` networks, FNKD's `isact = false`), mean, linear.
//! Stages are raw sums (stage 0: `conv0`), pre-activations the batch norms behind them; block 3 ends before the mean.
//! Names are ours; kd-weights maps MXNet's onto them.

use kd_core::{Cut, Result};
use kd_nn::{Conv, Graph, GraphBuilder, Init};

use crate::{Config, Family};

pub(crate) const FAMILY: Family =
    Family { name: "FNKD ResNet v2", keys: "fnkd", source: "Xu et al., ECCV 2020, released MXNet code; units of He et al., ECCV 2016" };

/// `last_relu`: whether a ReLU stands before the mean.
pub(crate) fn build(name: &str, config: &Config, depth: usize, last_relu: bool) -> Result<Graph> {
    let init = Init::Uniform(0.07); // Gluon's default
    let conv = |out: usize, kernel: usize| Conv::new(out, kernel).pad(kernel / 2).init(init);
    let mut b = GraphBuilder::new(name, &config.input);
    b.batch_norm_with("bn0", false, 1e-5);
    b.conv("conv0", conv(16, 3));
    b.stage(0, "conv0", None);
    for i in 1..=3 {
        let width = 8 << i;
        for j in 0..(depth - 2) / 6 {
            let unit = format!("stage{i}.{j}");
            let stride = if i > 1 && j == 0 { 2 } else { 1 };
            let x = b.here();
            b.batch_norm(&format!("{unit}.bn1"));
            if stride == 2 {
                b.cut(Cut::Preact(i - 1));
            }
            b.relu();
            b.conv(&format!("{unit}.conv1"), conv(width, 3).stride(stride));
            b.batch_norm(&format!("{unit}.bn2"));
            b.relu();
            let main = b.conv(&format!("{unit}.conv2"), conv(width, 3));
            b.at(x);
            if stride == 2 {
                b.conv(&format!("{unit}.downsample"), conv(width, 1).stride(2));
            }
            b.add(main);
        }
        let (module, norm) = (format!("stage{i}"), if i < 3 { format!("stage{}.0.bn1", i + 1) } else { "bn1".to_string() });
        b.stage(i, &module, Some(&norm));
        if i < 3 {
            b.block(i, &module);
        }
    }
    b.batch_norm("bn1");
    b.cut(Cut::Preact(3));
    if last_relu {
        b.relu();
    }
    b.block(3, "bn1");
    b.global_avg_pool();
    b.cut(Cut::Embedding);
    b.linear_with("fc", config.classes, init, Some(Init::Const(0.0)));
    b.cut(Cut::Logits);
    b.finish()
}
