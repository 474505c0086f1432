//! `center-crop:N`: the `N` x `N` pixels in the middle, as torchvision's `CenterCrop`; what a smaller image does not cover is black.

use std::sync::Arc;

use kd_core::Rng;

use super::{MAX_SIDE, Step, Transform, TransformEntry};
use crate::Result;
use crate::image::Image;

pub(super) const ENTRY: TransformEntry = TransformEntry {
    name: "center-crop",
    about: "the N x N pixels in the middle",
    argument: "N (1 to 4096)",
    parse: |argument| {
        let side = argument.parse().ok().filter(|n| (1..=MAX_SIDE).contains(n))?;
        Some(Step::Image(Arc::new(CenterCrop { side })))
    },
};

#[derive(Clone, Copy, Debug)]
pub(super) struct CenterCrop {
    pub(super) side: usize,
}

impl Transform for CenterCrop {
    fn apply(&self, image: &mut Image, spare: &mut Vec<u8>, _: Rng) {
        // Half of an odd difference goes to the even number, as Python rounds.
        let corner = |extent: usize| ((extent as f64 - self.side as f64) / 2.0).round_ties_even() as isize;
        image.crop(spare, [corner(image.height), corner(image.width)], [self.side; 2]);
    }

    fn size(&self, _: Option<[usize; 2]>) -> Result<Option<[usize; 2]>> {
        Ok(Some([self.side; 2]))
    }

    fn at_evaluation(&self) -> Vec<Arc<dyn Transform>> {
        vec![Arc::new(*self)]
    }

    fn is_random(&self) -> bool {
        false
    }
}
