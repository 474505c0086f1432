//! `color-jitter:B,C,S[,H]`: brightness, contrast, saturation and hue changed by random amounts in random order, as torchvision's `ColorJitter`.
//!
//! ```text
//! brightness, contrast, saturation   by a factor uniform in [max(0, 1 - x), 1 + x], x = B, C, S
//! hue                                turned by a share of the circle uniform in [-H, H]
//! ```

use std::sync::Arc;

use kd_core::Rng;

use super::{Step, Transform, TransformEntry, colour};
use crate::image::Image;

pub(super) const ENTRY: TransformEntry = TransformEntry {
    name: "color-jitter",
    about: "random brightness, contrast, saturation and hue",
    argument: "B,C,S[,H] (0 or more; H up to 0.5)",
    parse: |argument| {
        let parts: Option<Vec<f32>> = argument.split(',').map(|p| p.trim().parse().ok()).collect();
        let (amounts, hue) = match parts?[..] {
            [b, c, s] => ([b, c, s], 0.0),
            [b, c, s, h] => ([b, c, s], h),
            _ => return None,
        };
        let valid = amounts.iter().all(|a| (0.0..=100.0).contains(a)) && (0.0..=0.5).contains(&hue);
        valid.then(|| Step::Image(Arc::new(ColorJitter { amounts, hue })))
    },
};

#[derive(Debug)]
struct ColorJitter {
    amounts: [f32; 3],
    hue: f32,
}

impl Transform for ColorJitter {
    fn apply(&self, image: &mut Image, _: &mut Vec<u8>, rng: Rng) {
        let within = |draw: usize, low: f32, high: f32| low + (high - low) * rng.uniform(draw as u64) as f32;
        for change in rng.named("order").permutation(4) {
            let change = change as usize;
            match self.amounts.get(change) {
                Some(0.0) => {}
                Some(&amount) => {
                    let factor = within(change, (1.0 - amount).max(0.0), 1.0 + amount);
                    [colour::brightness, colour::contrast, colour::saturation][change](image, factor);
                }
                None if self.hue == 0.0 => {}
                None => colour::hue(image, within(change, -self.hue, self.hue)),
            }
        }
    }
}
