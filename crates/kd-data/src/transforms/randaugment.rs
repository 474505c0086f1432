//! `randaugment:N[,M]`: `N` changes drawn uniformly, with replacement, from a list of 14 (Cubuk et al., "RandAugment: Practical Automated Data
//! Augmentation with a Reduced Search Space", NeurIPS 2020), with torchvision's ranges. `M` is the magnitude, 0 to 30; without it each change
//! draws its own, uniformly from 0..=30.
//!
//! ```text
//! identity  autocontrast  equalize
//! shear-x, shear-y              +- 0.3 M/30
//! translate-x, translate-y      +- 150/331 M/30 of the side
//! rotate                        +- 30 M/30 degrees
//! brightness, color, contrast, sharpness   factor 1 +- 0.9 M/30
//! posterize                     8 - round(M / 7.5) bits kept
//! solarize                      values from 255 (1 - M/30) on inverted
//! ```
//! Geometric changes take the nearest pixel and leave black where there is none.

use std::sync::Arc;

use kd_core::Rng;

use super::{Step, Transform, TransformEntry, colour};
use crate::image::Image;

pub(super) const ENTRY: TransformEntry = TransformEntry {
    name: "randaugment",
    about: "N random changes out of 14 of magnitude M (random magnitudes without M)",
    argument: "N[,M] (1 to 14; 0 to 30)",
    parse: |argument| {
        let (changes, magnitude) = match argument.split_once(',') {
            Some((n, m)) => (n, Some(m.parse().ok().filter(|m| *m <= LARGEST)?)),
            None => (argument, None),
        };
        let changes = changes.parse().ok().filter(|n| (1..=14).contains(n))?;
        Some(Step::Image(Arc::new(RandAugment { changes, magnitude })))
    },
};

const LARGEST: u64 = 30;

#[derive(Debug)]
struct RandAugment {
    changes: u64,
    magnitude: Option<u64>,
}

impl Transform for RandAugment {
    fn apply(&self, image: &mut Image, spare: &mut Vec<u8>, rng: Rng) {
        for k in 0..self.changes {
            let rng = rng.fork(k);
            let magnitude = self.magnitude.unwrap_or_else(|| rng.below(0, LARGEST + 1));
            let negative = rng.below(1, 2) == 1;
            change(image, spare, rng.below(2, 14), magnitude, negative);
        }
    }
}

fn change(image: &mut Image, spare: &mut Vec<u8>, which: u64, magnitude: u64, negative: bool) {
    let share = magnitude as f64 / LARGEST as f64;
    let signed = if negative { -share } else { share };
    let factor = (1.0 + 0.9 * signed) as f32;
    let (height, width) = (image.height as f64, image.width as f64);
    match which {
        0 => {}
        1 => affine(image, spare, [1.0, 0.3 * signed, 0.0, 0.0, 1.0, 0.0]),
        2 => affine(image, spare, [1.0, 0.0, 0.0, 0.3 * signed, 1.0, 0.0]),
        3 => affine(image, spare, [1.0, 0.0, (150.0 / 331.0 * width * signed).trunc(), 0.0, 1.0, 0.0]),
        4 => affine(image, spare, [1.0, 0.0, 0.0, 0.0, 1.0, (150.0 / 331.0 * height * signed).trunc()]),
        5 => {
            let (sin, cos) = (30.0 * signed).to_radians().sin_cos();
            let (y, x) = (height / 2.0, width / 2.0);
            affine(image, spare, [cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y]);
        }
        6 => colour::brightness(image, factor),
        7 => colour::saturation(image, factor),
        8 => colour::contrast(image, factor),
        9 => colour::sharpness(image, spare, factor),
        10 => {
            let bits = 8 - (4.0 * share).round_ties_even() as u32;
            colour::map(image, |v| v & (0xFF00u16 >> bits) as u8);
        }
        11 => {
            let threshold = 255.0 * (1.0 - share);
            colour::map(image, |v| if f64::from(v) >= threshold { 255 - v } else { v });
        }
        12 => colour::autocontrast(image),
        _ => colour::equalize(image),
    }
}

/// The pixel whose middle is (x, y) shows the one that holds `(a x + b y + c, d x + e y + f)`.
fn affine(image: &mut Image, spare: &mut Vec<u8>, [a, b, c, d, e, f]: [f64; 6]) {
    let (height, width) = (image.height, image.width);
    spare.clear();
    spare.resize(image.data.len(), 0);
    let plane = height * width;
    for y in 0..height {
        for x in 0..width {
            let (mx, my) = (x as f64 + 0.5, y as f64 + 0.5);
            let (from_x, from_y) = ((a * mx + b * my + c).floor(), (d * mx + e * my + f).floor());
            if from_x >= 0.0 && from_y >= 0.0 && from_x < width as f64 && from_y < height as f64 {
                let from = from_y as usize * width + from_x as usize;
                for channel in 0..image.channels {
                    spare[channel * plane + y * width + x] = image.data[channel * plane + from];
                }
            }
        }
    }
    std::mem::swap(&mut image.data, spare);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Image {
        let mut image = Image::default();
        image.assign([3, 6, 8], &(0..144).map(|i| (i * 97 % 256) as u8).collect::<Vec<_>>());
        image
    }

    fn changed(which: u64, magnitude: u64, negative: bool) -> Image {
        let mut changed = image();
        change(&mut changed, &mut vec![1, 2, 3], which, magnitude, negative);
        changed
    }

    #[test]
    fn magnitude_zero_changes_nothing_but_the_histogram() {
        for which in 0..12 {
            let solarized_white = which == 11;
            let expected: Vec<u8> = image().data.iter().map(|&v| if solarized_white && v == 255 { 0 } else { v }).collect();
            assert_eq!(changed(which, 0, false).data, expected, "change {which}");
        }
    }

    #[test]
    fn translation_moves_whole_pixels() {
        // 150/331 of 8 pixels, 4/5 of it: 2.9, cut to 2.
        let moved = changed(3, 24, false);
        for (from, to) in image().data.chunks(8).zip(moved.data.chunks(8)) {
            assert_eq!((&to[..6], &to[6..]), (&from[2..], &[0, 0][..]));
        }
        let moved = changed(4, 30, true);
        for (from, to) in image().planes().zip(moved.planes()) {
            assert_eq!((&to[16..], &to[..16]), (&from[..32], &[0; 16][..]));
        }
    }

    #[test]
    fn posterize_and_solarize_follow_their_tables() {
        let (posterized, solarized) = (changed(10, 30, false), changed(11, 15, false));
        for ((&v, p), s) in image().data.iter().zip(posterized.data).zip(solarized.data) {
            assert_eq!(p, v & 0xF0);
            assert_eq!(s, if v >= 128 { 255 - v } else { v });
        }
    }

    #[test]
    fn rotation_turns_about_the_middle() {
        let mut square = Image::default();
        square.assign([1, 3, 3], &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        // A quarter turn through the same formula as 30 degrees.
        let mut turned = square.clone();
        affine(&mut turned, &mut vec![], [0.0, -1.0, 3.0, 1.0, 0.0, 0.0]);
        assert_eq!(turned.data, [3, 6, 9, 2, 5, 8, 1, 4, 7]);
        // 30 degrees either way move the corners out and keep the middle.
        for negative in [false, true] {
            let mut turned = square.clone();
            change(&mut turned, &mut vec![], 5, 30, negative);
            assert_eq!(turned.data[4], 5);
            assert_ne!(turned, square);
        }
    }
}
