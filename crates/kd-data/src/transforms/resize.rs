//! `resize:N`: the shorter side becomes `N` pixels, the longer one keeps the proportion (rounded down). `resize:HxW`: exactly that size.
//! Both as torchvision's `Resize`, antialiased.

use std::sync::Arc;

use kd_core::Rng;

use super::{MAX_SIDE, Step, Transform, TransformEntry};
use crate::Result;
use crate::image::Image;

pub(super) const ENTRY: TransformEntry = TransformEntry {
    name: "resize",
    about: "shorter side to N pixels (or exactly to HxW), antialiased",
    argument: "N or HxW (1 to 4096)",
    parse: |argument| {
        let side = |s: &str| s.parse().ok().filter(|n| (1..=MAX_SIDE).contains(n));
        let to = match argument.split_once('x') {
            Some((height, width)) => Resize::Exactly([side(height)?, side(width)?]),
            None => Resize::Shorter(side(argument)?),
        };
        Some(Step::Image(Arc::new(to)))
    },
};

#[derive(Clone, Copy, Debug)]
pub(super) enum Resize {
    Shorter(usize),
    Exactly([usize; 2]),
}

impl Resize {
    fn target(self, [height, width]: [usize; 2]) -> [usize; 2] {
        match self {
            Self::Exactly(size) => size,
            Self::Shorter(n) if height <= width => [n, n * width / height],
            Self::Shorter(n) => [n * height / width, n],
        }
    }
}

impl Transform for Resize {
    fn apply(&self, image: &mut Image, spare: &mut Vec<u8>, _: Rng) {
        image.resize(spare, self.target([image.height, image.width]));
    }

    fn size(&self, size: Option<[usize; 2]>) -> Result<Option<[usize; 2]>> {
        Ok(match self {
            Self::Exactly(to) => Some(*to),
            Self::Shorter(_) => size.map(|s| self.target(s)),
        })
    }

    fn at_evaluation(&self) -> Vec<Arc<dyn Transform>> {
        vec![Arc::new(*self)]
    }

    fn is_random(&self) -> bool {
        false
    }
}
