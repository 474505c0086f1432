//! Functions of one element, and their gradients, on slices of any layout.

use super::clock::Cost;
use super::norm::{activate, masked};
use super::tile::Activation;
use super::vector::{Kernel, Level, Vector, read, write};

/// A smooth function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Function {
    Gelu,
    Silu,
    Hardswish,
    Hardsigmoid,
    Sigmoid,
}

impl Function {
    /// Its value and its slope.
    #[inline(always)]
    fn at(self, x: f32) -> (f32, f32) {
        let hard = ((x + 3.0).clamp(0.0, 6.0)) / 6.0;
        let slope = if x > -3.0 && x < 3.0 { 1.0 / 6.0 } else { 0.0 };
        match self {
            Self::Gelu => {
                // In f64: the tails of the error function need more digits than they return.
                let x = f64::from(x);
                let phi = 0.5 * (1.0 + candle_core::cpu::erf::erf_f64(x * std::f64::consts::FRAC_1_SQRT_2));
                let density = (-0.5 * x * x).exp() * (0.5 * std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2);
                ((x * phi) as f32, (phi + x * density) as f32)
            }
            Self::Silu => {
                let s = sigmoid(x);
                (x * s, s * (1.0 + x * (1.0 - s)))
            }
            Self::Hardswish => (x * hard, hard + x * slope),
            Self::Hardsigmoid => (hard, slope),
            Self::Sigmoid => {
                let s = sigmoid(x);
                (s, s * (1.0 - s))
            }
        }
    }

    /// `out = f(x)`.
    pub(crate) fn forward(self, x: &[f32], out: &mut [f32]) {
        out.iter_mut().zip(x).for_each(|(o, &x)| *o = self.at(x).0);
    }

    /// `dx += dy f'(x)`.
    pub(crate) fn backward(self, x: &[f32], dy: &[f32], dx: &mut [f32]) {
        dx.iter_mut().zip(x).zip(dy).for_each(|((o, &x), d)| *o += d * self.at(x).1);
    }
}

fn sigmoid(x: f32) -> f32 {
    // Through the exponential of the negative side, which cannot overflow.
    let e = (-x.abs()).exp();
    if x < 0.0 { e / (1.0 + e) } else { 1.0 / (1.0 + e) }
}

/// `out = f(x)` of a ReLU kind.
pub(crate) fn rectify(level: Level, activation: Activation, x: &[f32], out: &mut [f32]) {
    struct Rectify<'a>(Activation, &'a [f32], &'a mut [f32]);
    impl Kernel for Rectify<'_> {
        type Output = ();
        const NAME: &'static str = "relu";

        fn cost(&self) -> Cost {
            Cost { flops: 0, floats: 2 * self.1.len() }
        }

        #[inline(always)]
        fn run<V: Vector>(self) {
            for i in (0..self.1.len()).step_by(V::LANES) {
                write(activate(read::<V>(self.1, i), self.0), self.2, i);
            }
        }
    }
    level.run(Rectify(activation, x, out));
}

/// Zeroes `d` except where the activation of `v` (its input or its output) has slope 1.
pub(crate) fn mask(level: Level, activation: Activation, v: &[f32], d: &mut [f32]) {
    struct Mask<'a>(Activation, &'a [f32], &'a mut [f32]);
    impl Kernel for Mask<'_> {
        type Output = ();
        const NAME: &'static str = "mask";

        fn cost(&self) -> Cost {
            Cost { flops: 0, floats: 3 * self.1.len() }
        }

        #[inline(always)]
        fn run<V: Vector>(self) {
            for i in (0..self.1.len()).step_by(V::LANES) {
                write(masked(read::<V>(self.2, i), read(self.1, i), self.0), self.2, i);
            }
        }
    }
    level.run(Mask(activation, v, d));
}

/// `out += x`.
pub(crate) fn accumulate(x: &[f32], out: &mut [f32]) {
    out.iter_mut().zip(x).for_each(|(o, v)| *o += v);
}
