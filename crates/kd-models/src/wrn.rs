//! Wide ResNets for CIFAR (Zagoruyko and Komodakis 2016), depth `d = 6n + 4`, width factor `k`: pre-activation units in three stages of
//! widths `16k, 32k, 64k`.
//!
//! ```text
//! a = ReLU(bn1(x));  F = conv2(dropout(ReLU(bn2(conv1(a)))));  out = F + x,  or F + convShortcut(a) where the channels change
//! ```
//!
//! The 1x1 projection, without batch norm, sees `a`. Stages are raw sums (stage 0: the stem convolution); the pre-activation of a stage is
//! the batch norm that follows it: the first of the next stage, the last one the head's. Block 3 ends behind the head's ReLU.
//! Names are mdistiller's; unlike there, the three batch norms behind the stages update their statistics once a step.

use kd_core::{Cut, Result};
use kd_nn::{Conv, Graph, GraphBuilder, Init, Op};

use crate::{Config, Family};

pub(crate) const FAMILY: Family =
    Family { name: "Wide ResNet", keys: "mdistiller", source: "Zagoruyko and Komodakis, BMVC 2016; names as mdistiller and RepDistiller" };

pub(crate) fn build(name: &str, config: &Config, depth: usize, factor: usize) -> Result<Graph> {
    let conv = |out: usize, kernel: usize| Conv::new(out, kernel).pad(kernel / 2).init(Init::HeFanOut);
    let mut b = GraphBuilder::new(name, &config.input);
    b.conv("conv1", conv(16, 3));
    b.stage(0, "conv1", None);
    for i in 1..=3 {
        let width = (8 << i) * factor;
        for j in 0..(depth - 4) / 6 {
            let unit = format!("block{i}.layer.{j}");
            let (x, channels) = (b.here(), b.channels());
            b.batch_norm(&format!("{unit}.bn1"));
            if i > 1 && j == 0 {
                b.cut(Cut::Preact(i - 1));
            }
            let a = b.relu();
            b.conv(&format!("{unit}.conv1"), conv(width, 3).stride(if i > 1 && j == 0 { 2 } else { 1 }));
            b.batch_norm(&format!("{unit}.bn2"));
            b.relu();
            let p = config.dropout.unwrap_or(0.0);
            if p > 0.0 {
                b.layer(Op::Dropout { p });
            }
            let main = b.conv(&format!("{unit}.conv2"), conv(width, 3));
            if channels == width {
                b.at(x);
            } else {
                b.at(a);
                b.conv(&format!("{unit}.convShortcut"), conv(width, 1).stride(if i > 1 { 2 } else { 1 }));
            }
            b.add(main);
        }
        let (module, norm) = (format!("block{i}"), if i < 3 { format!("block{}.layer.0.bn1", i + 1) } else { "bn1".to_string() });
        b.stage(i, &module, Some(&norm));
        if i < 3 {
            b.block(i, &module);
        }
    }
    b.batch_norm("bn1");
    b.cut(Cut::Preact(3));
    b.relu();
    b.block(3, "bn1");
    b.global_avg_pool();
    b.cut(Cut::Embedding);
    b.linear_with("fc", config.classes, Init::Default, Some(Init::Const(0.0)));
    b.cut(Cut::Logits);
    b.finish()
}
