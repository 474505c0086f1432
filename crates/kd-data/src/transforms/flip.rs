//! `flip`: left and right exchanged, with probability 1/2.

use std::sync::Arc;

use kd_core::Rng;

use super::{Step, Transform, TransformEntry};
use crate::image::Image;

pub(super) const ENTRY: TransformEntry = TransformEntry {
    name: "flip",
    about: "left and right exchanged with probability 1/2",
    argument: "",
    parse: |argument| argument.is_empty().then(|| Step::Image(Arc::new(Flip))),
};

#[derive(Debug)]
struct Flip;

impl Transform for Flip {
    fn apply(&self, image: &mut Image, _: &mut Vec<u8>, rng: Rng) {
        if rng.below(0, 2) == 1 {
            image.rows_mut().for_each(<[u8]>::reverse);
        }
    }
}
