//! RegNetX and RegNetY (Radosavovic et al. 2020), named as torchvision's: bottleneck units of ratio 1 with grouped 3x3 convolutions; Y adds a
//! squeeze-and-excitation gate of a quarter of the unit's *input* width.
//!
//! ```text
//! F = bn(c(gate(ReLU(bn(b_grouped(ReLU(bn(a(x)))))))));   out = ReLU(F + x), or ReLU(F + bn(proj(x))) in the first unit of a stage
//! gate(y) = y * sigmoid(fc2(ReLU(fc1(mean(y)))))
//! ```
//!
//! Stages: the stem, then the four stages after the last ReLU; pre-activations are the sums before it.

use kd_core::{Cut, Result};
use kd_nn::{Conv, Graph, GraphBuilder, Init, Op};

use crate::{Config, Family};

pub(crate) const FAMILY: Family =
    Family { name: "RegNet", keys: "torchvision", source: "Radosavovic et al., CVPR 2020; names as torchvision" };

/// Units and widths of the four stages, width of a group, and whether units carry the gate.
pub(crate) struct Plan {
    pub(crate) units: [usize; 4],
    pub(crate) widths: [usize; 4],
    pub(crate) group: usize,
    pub(crate) gate: bool,
}

pub(crate) fn build(name: &str, config: &Config, plan: &Plan) -> Result<Graph> {
    let mut b = GraphBuilder::new(name, &config.input);
    conv_norm(&mut b, "stem", Conv::new(32, 3).stride(2).pad(1));
    b.relu();
    b.stage(0, "stem", None);
    for (i, (&units, &width)) in (1..).zip(plan.units.iter().zip(&plan.widths)) {
        let module = format!("trunk_output.block{i}");
        for j in 0..units {
            unit(&mut b, &format!("{module}.block{i}-{j}"), width, plan, j == 0);
            if j + 1 == units {
                b.cut(Cut::Preact(i));
            }
            b.relu();
        }
        b.stage(i, &module, Some(&format!("{module}.block{i}-{}.f.c.1", units - 1)));
        b.block(i, &module);
    }
    b.global_avg_pool();
    b.cut(Cut::Embedding);
    b.linear_with("fc", config.classes, Init::Normal(0.01), Some(Init::Const(0.0)));
    b.cut(Cut::Logits);
    b.finish()
}

fn conv_norm(b: &mut GraphBuilder, module: &str, conv: Conv) {
    b.conv(&format!("{module}.0"), conv.init(Init::HeFanOut));
    b.batch_norm(&format!("{module}.1"));
}

/// One unit without its last ReLU.
fn unit(b: &mut GraphBuilder, name: &str, width: usize, plan: &Plan, first: bool) {
    let (x, squeezed, stride) = (b.here(), b.channels().div_ceil(4), if first { 2 } else { 1 });
    if first {
        conv_norm(b, &format!("{name}.proj"), Conv::new(width, 1).stride(2));
    }
    let shortcut = b.here();
    b.at(x);
    conv_norm(b, &format!("{name}.f.a"), Conv::new(width, 1));
    b.relu();
    conv_norm(b, &format!("{name}.f.b"), Conv::new(width, 3).stride(stride).pad(1).groups(width / plan.group));
    let y = b.relu();
    if plan.gate {
        b.layer(Op::AdaptiveAvgPool { output: [1, 1] });
        b.conv(&format!("{name}.f.se.fc1"), Conv::new(squeezed, 1).init(Init::HeFanOut).bias());
        b.relu();
        b.conv(&format!("{name}.f.se.fc2"), Conv::new(width, 1).init(Init::HeFanOut).bias());
        let gate = b.layer(Op::Sigmoid);
        b.at(y);
        b.mul(gate);
    }
    conv_norm(b, &format!("{name}.f.c"), Conv::new(width, 1));
    b.add(shortcut);
}
