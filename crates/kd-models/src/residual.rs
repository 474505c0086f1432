//! The post-activation residual unit (He et al. 2016) that CIFAR and ImageNet ResNets share: `ReLU(F(x) + shortcut(x))`.

use kd_core::Cut;
use kd_nn::{Conv, GraphBuilder, Init, Op};

/// What stands beside `F` where the stride or the channels change; elsewhere it is the identity.
#[derive(Clone, Copy)]
pub(crate) enum Shortcut {
    /// Option B: 1x1 convolution and batch norm, in a module of this name.
    Projection(&'static str),
    /// Option A: every `stride`-th pixel, then a quarter of the width of zero channels in front and behind.
    Padded,
}

/// The units of a network.
#[derive(Clone, Copy)]
pub(crate) struct Residual {
    /// `F` is 1x1, 3x3, 1x1 to four times the width instead of two 3x3.
    pub(crate) bottleneck: bool,
    /// See [`Shortcut`].
    pub(crate) shortcut: Shortcut,
    /// Of all convolutions.
    pub(crate) init: Init,
}

impl Residual {
    fn conv(self, out: usize, kernel: usize) -> Conv {
        Conv::new(out, kernel).pad(kernel / 2).init(self.init)
    }

    /// One unit without its last ReLU: the cursor ends at the sum.
    fn unit(self, b: &mut GraphBuilder, name: &str, width: usize, stride: usize) {
        let (x, channels) = (b.here(), b.channels());
        // (output channels, kernel, stride): a bottleneck strides in its 3x3.
        let layers: &[_] =
            if self.bottleneck { &[(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)] } else { &[(width, 3, stride), (width, 3, 1)] };
        for (k, &(out, kernel, stride)) in layers.iter().enumerate() {
            if k > 0 {
                b.relu();
            }
            b.conv(&format!("{name}.conv{}", k + 1), self.conv(out, kernel).stride(stride));
            b.batch_norm(&format!("{name}.bn{}", k + 1));
        }
        let (main, out) = (b.here(), b.channels());
        b.at(x);
        if stride != 1 || channels != out {
            match self.shortcut {
                Shortcut::Projection(module) => {
                    b.conv(&format!("{name}.{module}.0"), self.conv(out, 1).stride(stride));
                    b.batch_norm(&format!("{name}.{module}.1"));
                }
                Shortcut::Padded => {
                    b.layer(Op::Subsample { stride });
                    b.layer(Op::PadChannels { before: out / 4, after: out / 4 });
                }
            }
        }
        b.add(main);
    }

    /// `layer{i}`: `units` units, the first with `stride`; cuts `Preact(i)`, `Stage(i)` and `Block(i)`.
    /// `margins`: whether OFD reads the last batch norm of this stage.
    pub(crate) fn stage(self, b: &mut GraphBuilder, i: usize, width: usize, units: usize, stride: usize, margins: bool) {
        let module = format!("layer{i}");
        for j in 0..units {
            self.unit(b, &format!("{module}.{j}"), width, if j == 0 { stride } else { 1 });
            if j + 1 == units {
                b.cut(Cut::Preact(i));
            }
            b.relu();
        }
        let norm = format!("{module}.{}.bn{}", units - 1, if self.bottleneck { 3 } else { 2 });
        b.stage(i, &module, margins.then_some(norm.as_str()));
        b.block(i, &module);
    }
}
