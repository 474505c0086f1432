//! `cutout:N`: a grey square of `N` x `N` pixels around a uniformly random centre, cut off where it leaves the image (DeVries and Taylor,
//! "Improved Regularization of Convolutional Neural Networks with Cutout", 2017). The paper sets normalised pixels to 0, which is the data's
//! mean; here the pixels become 128 of 255.

use std::sync::Arc;

use kd_core::Rng;

use super::{MAX_SIDE, Step, Transform, TransformEntry};
use crate::image::Image;

pub(super) const ENTRY: TransformEntry = TransformEntry {
    name: "cutout",
    about: "a grey square of N x N pixels at a random place",
    argument: "N (1 to 4096)",
    parse: |argument| {
        let side = argument.parse().ok().filter(|n| (1..=MAX_SIDE).contains(n))?;
        Some(Step::Image(Arc::new(Cutout { side })))
    },
};

const GREY: u8 = 128;

#[derive(Debug)]
struct Cutout {
    side: usize,
}

impl Transform for Cutout {
    fn apply(&self, image: &mut Image, _: &mut Vec<u8>, rng: Rng) {
        let span = |draw, extent: usize| {
            let centre = rng.below(draw, extent as u64) as usize;
            // Of an even square's two middles the centre is the second.
            centre.saturating_sub(self.side / 2)..(centre + self.side.div_ceil(2)).min(extent)
        };
        let (rows, columns) = (span(0, image.height), span(1, image.width));
        let width = image.width;
        for plane in image.planes_mut() {
            for row in plane.chunks_exact_mut(width).skip(rows.start).take(rows.len()) {
                row[columns.clone()].fill(GREY);
            }
        }
    }
}
