//! Convolution and linear layers.

use candle_core::{Result, Tensor};

/// Geometry of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvArgs {
    /// Vertical and horizontal stride.
    pub stride: [usize; 2],
    /// Zeros added: top, bottom, left, right.
    pub padding: [usize; 4],
    /// Vertical and horizontal distance of the taps.
    pub dilation: [usize; 2],
    /// Groups of channels that do not mix.
    pub groups: usize,
}

impl ConvArgs {
    /// Whether candle's own convolution knows this geometry and differentiates it rightly: everything the same on both axes,
    /// and the same number of input rows and columns left over by the stride.
    fn native(&self, input: [usize; 2], kernel: [usize; 2]) -> bool {
        let [top, bottom, left, right] = self.padding;
        let ([s, sw], [d, dw]) = (self.stride, self.dilation);
        let left_over = |n: usize, k: usize| (n + 2 * top).checked_sub(d * (k - 1) + 1).map(|room| room % s);
        s == sw
            && d == dw
            && top == bottom
            && top == left
            && top == right
            && kernel[0] == kernel[1]
            && self.groups == 1
            && left_over(input[0], kernel[0]) == left_over(input[1], kernel[1])
            && d * (kernel[0] - 1) >= 2 * top // else candle's output-size arithmetic can go below zero
    }
}

/// Cross-correlation of `x` `[B,C,H,W]` with `weight` `[O,C/groups,kh,kw]` and zero padding, plus `bias` `[O]`.
pub fn conv2d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, args: &ConvArgs) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let (o, cg, kh, kw) = weight.dims4()?;
    let y = if args.native([h, w], [kh, kw]) {
        x.contiguous()?.conv2d(&weight.contiguous()?, args.padding[0], args.stride[0], args.dilation[0], 1)?
    } else {
        let [top, bottom, left, right] = args.padding;
        let padded = x.contiguous()?.pad_with_zeros(2, top, bottom)?.pad_with_zeros(3, left, right)?;
        let out = |n: usize, k: usize, axis: usize| (n - args.dilation[axis] * (k - 1) - 1) / args.stride[axis] + 1;
        let (oh, ow) = (out(h + top + bottom, kh, 0), out(w + left + right, kw, 1));
        let pick = |start: usize, n: usize, stride: usize| Tensor::from_iter((0..n).map(|i| (start + i * stride) as u32), x.device());
        let rows = (0..kh).map(|i| padded.index_select(&pick(i * args.dilation[0], oh, args.stride[0])?, 2)).collect::<Result<Vec<_>>>()?;
        let columns = (0..kw).map(|j| pick(j * args.dilation[1], ow, args.stride[1])).collect::<Result<Vec<_>>>()?;
        let mut taps = Vec::with_capacity(kh * kw);
        for row in &rows {
            for column in &columns {
                taps.push(row.index_select(column, 3)?);
            }
        }
        // [B, C, taps, OH*OW] -> [B, g, C/g * taps, OH*OW], matched by the weight's own order.
        let unfolded = Tensor::stack(&taps, 2)?.reshape((b, args.groups, cg * kh * kw, oh * ow))?;
        let weight = weight.reshape((1, args.groups, o / args.groups, cg * kh * kw))?;
        debug_assert_eq!(c, cg * args.groups);
        weight.broadcast_matmul(&unfolded)?.reshape((b, o, oh, ow))?
    };
    match bias {
        Some(bias) => y.broadcast_add(&bias.reshape((1, o, 1, 1))?),
        None => Ok(y),
    }
}

/// Transposed convolution (the gradient of a convolution) of `x` `[B,C,H,W]` with `weight` `[C,O,k,k]`, plus `bias` `[O]`: to
/// `(H - 1) stride - 2 padding + k` rows. `padding` is at most `k - 1`.
pub fn conv_transpose2d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, stride: usize, padding: usize) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let (_, _, kernel, _) = weight.dims4()?;
    if padding >= kernel {
        candle_core::bail!("conv_transpose2d: padding {padding} with a kernel of {kernel}");
    }
    // A convolution of the spread input with the mirrored kernel: candle's own has no backward for every geometry.
    let spread = if stride > 1 {
        let apart = x.contiguous()?.reshape((b, c, h, 1, w, 1))?.pad_with_zeros(3, 0, stride - 1)?.pad_with_zeros(5, 0, stride - 1)?;
        let apart = apart.reshape((b, c, h * stride, w * stride))?;
        apart.narrow(2, 0, (h - 1) * stride + 1)?.narrow(3, 0, (w - 1) * stride + 1)?
    } else {
        x.clone()
    };
    let mirror = Tensor::from_iter((0..kernel as u32).rev(), x.device())?;
    let mirrored = weight.transpose(0, 1)?.contiguous()?.index_select(&mirror, 2)?.index_select(&mirror, 3)?;
    let args = ConvArgs { stride: [1; 2], padding: [kernel - 1 - padding; 4], dilation: [1; 2], groups: 1 };
    conv2d(&spread, &mirrored, bias, &args)
}

/// `x W^T + b` along the last axis of `x`, any leading axes; weight `[out,in]`.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    let (out, width) = weight.dims2()?;
    let rows: usize = dims.iter().rev().skip(1).product();
    let y = x.reshape((rows, width))?.matmul(&weight.t()?)?;
    if let Some(last) = dims.last_mut() {
        *last = out;
    }
    let y = match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    };
    y.reshape(dims)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    /// `<conv(y, w), x> = <y, conv_transpose(x, w)>` for the convolution with the same weight: that defines the transpose.
    #[test]
    fn the_transposed_convolution_is_the_transpose() {
        for (kernel, stride, padding, n) in [(4, 2, 1, 3), (3, 1, 1, 4), (2, 2, 0, 3), (3, 3, 2, 3), (1, 1, 0, 2)] {
            let random = |seed: u64, shape: &[usize]| {
                let n = shape.iter().product::<usize>() as u64;
                let values: Vec<f64> = (0..n).map(|i| kd_core::Rng::new(seed).normal(i)).collect();
                Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
            };
            let (x, weight) = (random(1, &[2, 3, n, n]), random(2, &[3, 5, kernel, kernel]));
            let x = Var::from_tensor(&x).unwrap();
            let up = conv_transpose2d(&x, &weight, None, stride, padding).unwrap();
            let side = (n - 1) * stride + kernel - 2 * padding;
            assert_eq!(up.dims(), [2, 5, side, side]);
            let y = random(3, up.dims());
            let args = ConvArgs { stride: [stride; 2], padding: [padding; 4], dilation: [1; 2], groups: 1 };
            let down = conv2d(&y, &weight, None, &args).unwrap();
            let inner = |a: &Tensor, b: &Tensor| (a * b).unwrap().sum_all().unwrap();
            let (left, right) = (inner(&down, &x), inner(&up, &y));
            assert!((left.to_scalar::<f64>().unwrap() - right.to_scalar::<f64>().unwrap()).abs() < 1e-9);
            let gradient = right.backward().unwrap().get(&x).unwrap().clone();
            assert!((gradient - down).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap() < 1e-9);
        }
    }
}
