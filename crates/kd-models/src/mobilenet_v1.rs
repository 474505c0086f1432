//! MobileNet v1 (Howard et al. 2017): a 3x3 stem and thirteen depthwise-separable convolutions.
//!
//! Names are mdistiller's and KD++'s. Four stages, counted from 0 without a stem of their own: `model.3`, `.5`, `.11`, `.13` after the ReLU,
//! each with the batch norm before it as pre-activation.

use kd_core::{Cut, Result};
use kd_nn::{Conv, Graph, GraphBuilder};

use crate::{Config, Family};

pub(crate) const FAMILY: Family =
    Family { name: "MobileNet v1", keys: "mdistiller", source: "Howard et al., arXiv 1704.04861; names as mdistiller" };

/// Output channels and stride of `model.1` .. `model.13`.
const LAYERS: [(usize, usize); 13] =
    [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)];
/// The layers that end a stage.
const ENDS: [usize; 4] = [3, 5, 11, 13];

pub(crate) fn build(name: &str, config: &Config) -> Result<Graph> {
    let mut b = GraphBuilder::new(name, &config.input);
    b.conv("model.0.0", Conv::new(32, 3).stride(2).pad(1));
    b.batch_norm("model.0.1");
    b.relu();
    for (i, &(out, stride)) in (1..).zip(&LAYERS) {
        let (module, channels) = (format!("model.{i}"), b.channels());
        b.conv(&format!("{module}.0"), Conv::new(channels, 3).stride(stride).pad(1).groups(channels));
        b.batch_norm(&format!("{module}.1"));
        b.relu();
        b.conv(&format!("{module}.3"), Conv::new(out, 1));
        b.batch_norm(&format!("{module}.4"));
        let stage = ENDS.iter().position(|&end| end == i);
        if let Some(s) = stage {
            b.cut(Cut::Preact(s));
        }
        b.relu();
        if let Some(s) = stage {
            b.stage(s, &module, Some(&format!("{module}.4")));
            b.block(s + 1, &module);
        }
    }
    b.global_avg_pool();
    b.cut(Cut::Embedding);
    b.linear("fc", config.classes);
    b.cut(Cut::Logits);
    b.finish()
}
