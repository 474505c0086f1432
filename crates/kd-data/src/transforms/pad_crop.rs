//! `pad-crop:P`: a crop of the image's own size out of the image framed by `P` black pixels, at one of the `(2P+1)^2` places, all equally likely.

use std::sync::Arc;

use kd_core::Rng;

use super::{Step, Transform, TransformEntry};
use crate::image::Image;
use crate::{Error, Result};

pub(super) const ENTRY: TransformEntry = TransformEntry {
    name: "pad-crop",
    about: "random crop of the image's own size after padding with P black pixels",
    argument: "P (pixels, 1 or more)",
    parse: |argument| match argument.parse() {
        Ok(pad) if (1..=4096).contains(&pad) => Some(Step::Image(Arc::new(PadCrop { pad }))),
        _ => None,
    },
};

#[derive(Debug)]
struct PadCrop {
    pad: usize,
}

impl Transform for PadCrop {
    fn apply(&self, image: &mut Image, spare: &mut Vec<u8>, rng: Rng) {
        let corner = |draw| rng.below(draw, 2 * self.pad as u64 + 1) as isize - self.pad as isize;
        image.crop(spare, [corner(0), corner(1)], [image.height, image.width]);
    }

    fn size(&self, size: Option<[usize; 2]>) -> Result<Option<[usize; 2]>> {
        match size {
            Some([height, width]) if self.pad >= height.min(width) => {
                Err(Error::spec(format!("pad-crop:{}", self.pad), format!("must be smaller than the image, which is {height}x{width}")))
            }
            size => Ok(size),
        }
    }
}
