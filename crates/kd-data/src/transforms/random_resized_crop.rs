//! `random-resized-crop:N[,S]`: a part of the image, resized to `N` x `N`, as torchvision's `RandomResizedCrop` (Szegedy et al., "Going Deeper
//! with Convolutions", CVPR 2015). In up to ten tries
//!
//! ```text
//! area   uniform in [S, 1] of the image's         (S: 0.08 unless given)
//! ratio  width / height, log-uniform in [3/4, 4/3]
//! ```
//! until the part fits, which is then placed uniformly; if none fits, the largest part in the middle whose ratio is allowed.
//! At evaluation: `resize:M` and `center-crop:N` with `M = N / 0.875`.

use std::sync::Arc;

use kd_core::Rng;

use super::center_crop::CenterCrop;
use super::resize::Resize;
use super::{MAX_SIDE, Step, Transform, TransformEntry};
use crate::Result;
use crate::image::Image;

pub(super) const ENTRY: TransformEntry = TransformEntry {
    name: "random-resized-crop",
    about: "random part of the image, resized to N x N; S: its least share of the area",
    argument: "N[,S] (1 to 4096; above 0 to 1, default 0.08)",
    parse: |argument| {
        let (side, scale) = argument.split_once(',').unwrap_or((argument, "0.08"));
        let side = side.parse().ok().filter(|n| (1..=MAX_SIDE).contains(n))?;
        let scale = scale.parse().ok().filter(|s| *s > 0.0 && *s <= 1.0)?;
        Some(Step::Image(Arc::new(RandomResizedCrop { side, scale })))
    },
};

const TRIES: u64 = 10;
const NARROWEST: f64 = 3.0 / 4.0;
const WIDEST: f64 = 4.0 / 3.0;

#[derive(Debug)]
struct RandomResizedCrop {
    side: usize,
    scale: f64,
}

impl RandomResizedCrop {
    /// Corner and size of the part.
    fn part(&self, [height, width]: [usize; 2], rng: Rng) -> ([usize; 2], [usize; 2]) {
        for t in 0..TRIES {
            let rng = rng.fork(t);
            let within = |draw, low: f64, high: f64| low + (high - low) * rng.uniform(draw);
            let area = (height * width) as f64 * within(0, self.scale, 1.0);
            let ratio = within(1, NARROWEST.ln(), WIDEST.ln()).exp();
            let w = (area * ratio).sqrt().round_ties_even() as usize;
            let h = (area / ratio).sqrt().round_ties_even() as usize;
            if (1..=height).contains(&h) && (1..=width).contains(&w) {
                let place = |draw, slack: usize| rng.below(draw, slack as u64 + 1) as usize;
                return ([place(2, height - h), place(3, width - w)], [h, w]);
            }
        }
        let ratio = (width as f64 / height as f64).clamp(NARROWEST, WIDEST);
        let h = ((width as f64 / ratio).round_ties_even() as usize).clamp(1, height);
        let w = ((height as f64 * ratio).round_ties_even() as usize).clamp(1, width);
        ([(height - h) / 2, (width - w) / 2], [h, w])
    }
}

impl Transform for RandomResizedCrop {
    fn apply(&self, image: &mut Image, spare: &mut Vec<u8>, rng: Rng) {
        let (corner, size) = self.part([image.height, image.width], rng);
        image.crop(spare, corner.map(|c| c as isize), size);
        image.resize(spare, [self.side; 2]);
    }

    fn size(&self, _: Option<[usize; 2]>) -> Result<Option<[usize; 2]>> {
        Ok(Some([self.side; 2]))
    }

    fn at_evaluation(&self) -> Vec<Arc<dyn Transform>> {
        let shorter = (self.side as f64 / 0.875).round() as usize;
        vec![Arc::new(Resize::Shorter(shorter)), Arc::new(CenterCrop { side: self.side })]
    }
}
