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
