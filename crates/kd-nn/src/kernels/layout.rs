//! Between candle's `[batch][channel][row][column]` with any strides and images of `[row][column][channel]`; moving channels about.

/// Offset and strides of a tensor `[C,H,W]` (or `[C]`) of one image inside its storage.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strided {
    pub offset: usize,
    pub channel: usize,
    pub row: usize,
    pub col: usize,
}

/// Copies an image out of a strided tensor.
pub(crate) fn gather(from: &[f32], s: Strided, [channels, h, w]: [usize; 3], image: &mut [f32]) {
    for (y, row) in image.chunks_exact_mut(w * channels).take(h).enumerate() {
        let base = s.offset + y * s.row;
        if s.channel == 1 {
            for (x, pixel) in row.chunks_exact_mut(channels).enumerate() {
                pixel.copy_from_slice(&from[base + x * s.col..][..channels]);
            }
        } else {
            for c in 0..channels {
                for x in 0..w {
                    row[x * channels + c] = from[base + c * s.channel + x * s.col];
                }
            }
        }
    }
}

/// Flattens an image of `[pixel][channel]` to `[channel][pixel]`.
pub(crate) fn flatten(image: &[f32], channels: usize, flat: &mut [f32]) {
    for (c, plane) in flat.chunks_exact_mut(image.len() / channels).enumerate() {
        plane.iter_mut().zip(image[c..].iter().step_by(channels)).for_each(|(o, v)| *o = *v);
    }
}

/// Adds `[channel][pixel]` to an image of `[pixel][channel]`.
pub(crate) fn add_flattened(flat: &[f32], channels: usize, image: &mut [f32]) {
    for (c, plane) in flat.chunks_exact(image.len() / channels).enumerate() {
        image[c..].iter_mut().step_by(channels).zip(plane).for_each(|(o, v)| *o += v);
    }
}

/// One run of channels that moves together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Move {
    pub from: usize,
    pub to: usize,
    pub len: usize,
}

/// Copies runs of channels of every pixel from `x` to `out`; adds them when `add`.
pub(crate) fn move_channels(moves: &[Move], x: &[f32], x_channels: usize, out: &mut [f32], out_channels: usize, add: bool) {
    let single = moves.iter().all(|m| m.len == 1);
    for (x, out) in x.chunks_exact(x_channels).zip(out.chunks_exact_mut(out_channels)) {
        match (single, add) {
            (true, false) => moves.iter().for_each(|m| out[m.to] = x[m.from]),
            (true, true) => moves.iter().for_each(|m| out[m.to] += x[m.from]),
            (false, false) => moves.iter().for_each(|m| out[m.to..m.to + m.len].copy_from_slice(&x[m.from..m.from + m.len])),
            (false, true) => moves.iter().for_each(|m| {
                out[m.to..m.to + m.len].iter_mut().zip(&x[m.from..m.from + m.len]).for_each(|(o, v)| *o += v);
            }),
        }
    }
}

/// First `before`, then `after`, in one go.
pub(crate) fn compose(before: &[Move], after: &[Move]) -> Vec<Move> {
    let pairs = after.iter().flat_map(|b| before.iter().map(move |a| (a, b)));
    pairs
        .filter_map(|(a, b)| {
            let (start, end) = (a.to.max(b.from), (a.to + a.len).min(b.from + b.len));
            (start < end).then(|| Move { from: a.from + start - a.to, to: b.to + start - b.from, len: end - start })
        })
        .collect()
}

/// The moves of a channel shuffle: channel `g * n + i` goes to `i * groups + g`, `n` channels per group.
pub(crate) fn shuffle(channels: usize, groups: usize) -> Vec<Move> {
    let n = channels / groups;
    (0..channels).map(|c| Move { from: c, to: c % n * groups + c / n, len: 1 }).collect()
}
