//! MobileNet v2 (Sandler et al. 2018): inverted residual units, 1x1 expansion by `t`, 3x3 depthwise, linear 1x1.
//!
//! | | `MobileNetV2` (CIFAR) | `imagenet_mobilenet_v2` |
//! |---|---|---|
//! | names after | mdistiller (`mobile_half`: width 0.5, channels cut off, not rounded to 8) | torchvision |
//! | activation | ReLU | ReLU6 |
//! | expansion with t = 1 | present | absent |
//! | stride of the second group | 1 | 2 |
//! | dropout before the classifier | none | 0.2 |
//!
//! Stages are linear outputs, so none has a pre-activation; the last 1x1 convolution belongs to the last block.
//! `norm_before_relu` names the batch norm that ends a stage (OFD takes its margins from it although no ReLU follows).

use kd_core::{Cut, Result};
use kd_nn::{Conv, Graph, GraphBuilder, Init, Op};

use crate::{Config, Family};

pub(crate) const CIFAR: Family = Family {
    name: "MobileNet v2, CIFAR",
    keys: "mdistiller",
    source: "Sandler et al., CVPR 2018; width 0.5, strides and names as mdistiller's mobile_half",
};
pub(crate) const IMAGENET: Family =
    Family { name: "MobileNet v2", keys: "torchvision", source: "Sandler et al., CVPR 2018; names as torchvision" };

/// Groups of units: expansion, output channels at width 1, units; strides are in the networks' own tables.
const GROUPS: [(usize, usize, usize); 7] = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)];

/// One unit of convolutions `(convolution, batch norm)` named by `names`: expansion (if any), depthwise, projection.
fn unit(b: &mut GraphBuilder, names: &[(String, String)], t: usize, out: usize, stride: usize, act: &Op) {
    let (x, channels) = (b.here(), b.channels());
    let hidden = channels * t;
    let mut layers = vec![Conv::new(hidden, 3).stride(stride).pad(1).groups(hidden), Conv::new(out, 1)];
    if names.len() == 3 {
        layers.insert(0, Conv::new(hidden, 1));
    }
    for (k, (conv, (name, norm))) in layers.into_iter().zip(names).enumerate() {
        b.conv(name, conv.init(Init::HeFanOut));
        b.batch_norm(norm);
        if k + 1 < names.len() {
            b.layer(act.clone());
        }
    }
    if stride == 1 && channels == out {
        b.add(x);
    }
}

fn conv_norm_act(b: &mut GraphBuilder, module: &str, conv: Conv, act: &Op) {
    b.conv(&format!("{module}.0"), conv.init(Init::HeFanOut));
    b.batch_norm(&format!("{module}.1"));
    b.layer(act.clone());
}

fn head(mut b: GraphBuilder, module: &str, classes: usize, dropout: f64) -> Result<Graph> {
    b.global_avg_pool();
    b.cut(Cut::Embedding);
    if dropout > 0.0 {
        b.layer(Op::Dropout { p: dropout });
    }
    b.linear_with(module, classes, Init::Normal(0.01), Some(Init::Const(0.0)));
    b.cut(Cut::Logits);
    b.finish()
}

pub(crate) fn cifar(name: &str, config: &Config) -> Result<Graph> {
    let act = Op::Relu;
    let mut b = GraphBuilder::new(name, &config.input);
    conv_norm_act(&mut b, "conv1", Conv::new(16, 3).stride(2).pad(1), &act);
    b.stage(0, "conv1", None);
    let mut stage = 0;
    for (s, (&(t, c, units), stride)) in GROUPS.iter().zip([1, 1, 2, 2, 1, 2, 1]).enumerate() {
        for j in 0..units {
            let module = format!("blocks.{s}.{j}.conv");
            let names = [0, 3, 6].map(|k| (format!("{module}.{k}"), format!("{module}.{}", k + 1)));
            unit(&mut b, &names, t, c / 2, if j == 0 { stride } else { 1 }, &act);
        }
        if [1, 2, 4, 6].contains(&s) {
            stage += 1;
            let module = format!("blocks.{s}");
            b.stage(stage, &module, Some(&format!("{module}.{}.conv.7", units - 1)));
            if stage < 4 {
                b.block(stage, &module);
            }
        }
    }
    conv_norm_act(&mut b, "conv2", Conv::new(1280, 1), &act);
    b.block(4, "conv2");
    head(b, "classifier.0", config.classes, config.dropout.unwrap_or(0.0))
}

pub(crate) fn imagenet(name: &str, config: &Config) -> Result<Graph> {
    let act = Op::Relu6;
    let mut b = GraphBuilder::new(name, &config.input);
    conv_norm_act(&mut b, "features.0", Conv::new(32, 3).stride(2).pad(1), &act);
    let (mut index, mut stage) = (0, 0);
    for (&(t, out, units), stride) in GROUPS.iter().zip([1, 2, 2, 2, 1, 2, 1]) {
        for j in 0..units {
            index += 1;
            let (module, inner) = (format!("features.{index}"), format!("features.{index}.conv"));
            let mut names: Vec<_> = (0..if t == 1 { 1 } else { 2 }).map(|k| (format!("{inner}.{k}.0"), format!("{inner}.{k}.1"))).collect();
            let last = names.len();
            names.push((format!("{inner}.{last}"), format!("{inner}.{}", last + 1)));
            unit(&mut b, &names, t, out, if j == 0 { stride } else { 1 }, &act);
            if [1, 3, 6, 13, 17].contains(&index) {
                b.stage(stage, &module, Some(&names[last].1));
                stage += 1;
                if stage < 5 {
                    b.block(stage, &module);
                }
            }
        }
    }
    conv_norm_act(&mut b, "features.18", Conv::new(1280, 1), &act);
    b.block(5, "features.18");
    head(b, "classifier.1", config.classes, config.dropout.unwrap_or(0.2))
}
