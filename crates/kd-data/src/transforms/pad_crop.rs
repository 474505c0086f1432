//! `pad-crop:P`: a crop of the image's own size out of the image framed by `P` black pixels, at one of the `(2P+1)^2` places, all equally likely.

use std::sync::Arc;

use kd_core::Rng;

use super::{Transform, TransformEntry};
use crate::image::Image;
use crate::{Error, Result};

pub(super) const ENTRY: TransformEntry = TransformEntry {
    name: "pad-crop",
    about: "random crop of the image's own size after padding with P black pixels",
    argument: "P (pixels, 1 or more)",
    parse: |argument| match argument.parse() {
        Ok(pad) if pad > 0 => Some(Arc::new(PadCrop { pad })),
        _ => None,
    },
};

#[derive(Debug)]
struct PadCrop {
    pad: usize,
}

impl Transform for PadCrop {
    fn apply(&self, image: &mut Image, spare: &mut Vec<u8>, rng: Rng) {
        let places = 2 * self.pad as u64 + 1;
        // The crop's corner in the framed image.
        let (top, left) = (rng.below(0, places) as usize, rng.below(1, places) as usize);
        let Image { height, width, .. } = *image;
        spare.clear();
        spare.resize(image.data.len(), 0);
        // Output row y shows framed row y + top, that is row y + top - pad of the image; columns alike.
        let rows = overlap(top, self.pad, height);
        let columns = overlap(left, self.pad, width);
        let shift = |range: &std::ops::Range<usize>, corner: usize| range.start + corner - self.pad;
        let source = shift(&columns, left)..shift(&columns, left) + columns.len();
        for (from, to) in image.data.chunks_exact(height * width).zip(spare.chunks_exact_mut(height * width)) {
            let from = from[shift(&rows, top) * width..].chunks_exact(width);
            for (from, to) in from.zip(to.chunks_exact_mut(width).skip(rows.start).take(rows.len())) {
                to[columns.clone()].copy_from_slice(&from[source.clone()]);
            }
        }
        std::mem::swap(&mut image.data, spare);
    }

    fn shape(&self, shape: [usize; 3]) -> Result<[usize; 3]> {
        let [_, height, width] = shape;
        if self.pad >= height.min(width) {
            return Err(Error::spec(
                format!("pad-crop:{}", self.pad),
                format!("must be smaller than the image, which is {height}x{width}"),
            ));
        }
        Ok(shape)
    }
}

/// The output positions along one axis that show the image and not its frame.
fn overlap(corner: usize, pad: usize, extent: usize) -> std::ops::Range<usize> {
    pad.saturating_sub(corner)..extent.min(extent + pad - corner)
}
