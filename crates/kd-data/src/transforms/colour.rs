//! Changes of colour that `color-jitter` and `randaugment` share, as Pillow's `ImageEnhance` and `ImageOps` define them on bytes.
//!
//! An enhancement blends the image with a degenerate one: `degenerate + factor * (image - degenerate)`, cut to 0..=255 and rounded down; factor 1
//! changes nothing. Images without three channels have no colour: their grey value is the first channel.

use crate::image::Image;

fn blend(degenerate: f32, value: u8, factor: f32) -> u8 {
    // A float-to-byte cast cuts to the range and rounds towards zero.
    (degenerate + factor * (f32::from(value) - degenerate)) as u8
}

/// Luminance in Pillow's integers (ITU-R 601): `(19595 R + 38470 G + 7471 B + 32768) >> 16`.
fn grey(image: &Image) -> Vec<u8> {
    let mut planes = image.planes();
    match (planes.next(), planes.next(), planes.next()) {
        (Some(r), Some(g), Some(b)) => {
            let mix =
                |((&r, &g), &b): ((&u8, &u8), &u8)| (19_595 * u32::from(r) + 38_470 * u32::from(g) + 7_471 * u32::from(b) + 32_768) >> 16;
            r.iter().zip(g).zip(b).map(|p| mix(p) as u8).collect()
        }
        (first, ..) => first.unwrap_or_default().to_vec(),
    }
}

/// Replaces every byte by its entry of a table.
pub(super) fn map(image: &mut Image, f: impl Fn(u8) -> u8) {
    let table: [u8; 256] = std::array::from_fn(|v| f(v as u8));
    image.data.iter_mut().for_each(|v| *v = table[usize::from(*v)]);
}

/// Blends with black.
pub(super) fn brightness(image: &mut Image, factor: f32) {
    map(image, |v| blend(0.0, v, factor));
}

/// Blends with the mean grey value.
pub(super) fn contrast(image: &mut Image, factor: f32) {
    let grey = grey(image);
    let sum: u64 = grey.iter().map(|&v| u64::from(v)).sum();
    let mean = (sum as f64 / grey.len() as f64 + 0.5).floor() as f32;
    map(image, |v| blend(mean, v, factor));
}

/// Blends each pixel with its grey value.
pub(super) fn saturation(image: &mut Image, factor: f32) {
    let grey = grey(image);
    for plane in image.planes_mut() {
        for (value, &grey) in plane.iter_mut().zip(&grey) {
            *value = blend(f32::from(grey), *value, factor);
        }
    }
}

/// Blends with the image smoothed by `[1 1 1; 1 5 1; 1 1 1] / 13`, whose border is the image's own.
pub(super) fn sharpness(image: &mut Image, spare: &mut Vec<u8>, factor: f32) {
    let (height, width) = (image.height, image.width);
    spare.clone_from(&image.data);
    for (from, to) in spare.chunks_exact(height * width).zip(image.planes_mut()) {
        for y in 1..height.saturating_sub(1) {
            for x in 1..width.saturating_sub(1) {
                let at = y * width + x;
                let row = |start: usize| from[start - 1..=start + 1].iter().map(|&v| u32::from(v)).sum::<u32>();
                let sum = row(at - width) + row(at) + row(at + width) + 4 * u32::from(from[at]);
                let smooth = (sum as f32 / 13.0 + 0.5).floor();
                to[at] = blend(smooth, from[at], factor);
            }
        }
    }
}

/// Turns the hue by `turn` of a full circle, saturation and value unchanged.
pub(super) fn hue(image: &mut Image, turn: f32) {
    if image.channels != 3 {
        return;
    }
    let plane = image.height * image.width;
    let (r, rest) = image.data.split_at_mut(plane);
    let (g, b) = rest.split_at_mut(plane);
    for ((r, g), b) in r.iter_mut().zip(g).zip(b) {
        let (high, low) = ((*r).max(*g).max(*b), (*r).min(*g).min(*b));
        if high == low {
            continue;
        }
        let (red, green, blue, spread) = (f32::from(*r), f32::from(*g), f32::from(*b), f32::from(high - low));
        // Sixths of the circle, from red over green to blue.
        let sixth = if high == *r {
            (green - blue) / spread
        } else if high == *g {
            2.0 + (blue - red) / spread
        } else {
            4.0 + (red - green) / spread
        };
        let turned = sixth + 6.0 * turn;
        // The channel that is full at `centre` falls to the lowest over the sixths from 1 to 2 beside it.
        let channel = |centre: f32| {
            let distance = (turned - centre).rem_euclid(6.0);
            let distance = distance.min(6.0 - distance);
            (f32::from(low) + spread * (2.0 - distance).clamp(0.0, 1.0)).round() as u8
        };
        (*r, *g, *b) = (channel(0.0), channel(2.0), channel(4.0));
    }
}

/// Stretches each channel to the whole range.
pub(super) fn autocontrast(image: &mut Image) {
    for plane in image.planes_mut() {
        let (low, high) = plane.iter().fold((u8::MAX, u8::MIN), |(low, high), &v| (low.min(v), high.max(v)));
        if high > low {
            let scale = 255.0 / f32::from(high - low);
            plane.iter_mut().for_each(|v| *v = (f32::from(*v - low) * scale) as u8);
        }
    }
}

/// Spreads each channel's values so that all are about equally frequent.
pub(super) fn equalize(image: &mut Image) {
    for plane in image.planes_mut() {
        let mut counts = [0usize; 256];
        plane.iter().for_each(|&v| counts[usize::from(v)] += 1);
        let last = counts.iter().rposition(|&c| c > 0).unwrap_or(0);
        let step = (plane.len() - counts[last]) / 255;
        if step == 0 {
            continue;
        }
        let mut below = step / 2;
        let table = counts.map(|count| {
            let value = (below / step).min(255) as u8;
            below += count;
            value
        });
        plane.iter_mut().for_each(|v| *v = table[usize::from(*v)]);
    }
}
