//! What happens to an image between the data set and the tensor, one file a transform.
//!
//! A list of transforms is written as strings, `NAME` or `NAME:ARGUMENT`, applied in order: `["pad-crop:4", "flip"]`. Normalisation always
//! follows and is not in the list. Each transform draws from its own random stream, so that appending one changes no other's draws. Most change
//! one image; `mixup` and `cutmix` mix the images of a batch, after all others, one of them drawn for each batch where a list has several.
//!
//! Evaluation uses the same list without its chance: sizes stay (`resize`, `center-crop`), `random-resized-crop:N` becomes a resize and a centre
//! crop to `N`, everything else is left out.

mod center_crop;
mod color_jitter;
mod colour;
mod cutout;
mod flip;
pub(crate) mod mix;
mod pad_crop;
mod randaugment;
mod random_resized_crop;
mod resize;

use std::fmt::Debug;
use std::sync::Arc;

use kd_core::Rng;

use crate::image::Image;
use crate::{Error, Result};
use mix::Mix;

/// Pixels along a side that a transform may ask for.
const MAX_SIDE: usize = 4096;

/// A change of one image. Its `Debug` text tells its parameters: what prints alike does alike.
pub trait Transform: Debug + Send + Sync {
    /// Changes `image`; `spare` is a buffer to build the result in. Randomness comes from `rng` alone.
    fn apply(&self, image: &mut Image, spare: &mut Vec<u8>, rng: Rng);

    /// The `[H,W]` that `size` becomes; `None` where it differs from image to image.
    ///
    /// # Errors
    /// A size that the transform cannot work on.
    fn size(&self, size: Option<[usize; 2]>) -> Result<Option<[usize; 2]>> {
        Ok(size)
    }

    /// What takes its place at evaluation.
    fn at_evaluation(&self) -> Vec<Arc<dyn Transform>> {
        vec![]
    }

    /// Whether it uses `rng`.
    fn is_random(&self) -> bool {
        true
    }
}

/// What a registry entry makes.
#[derive(Clone, Debug)]
pub enum Step {
    /// A change of each image.
    Image(Arc<dyn Transform>),
    /// A mixture of the images of a batch.
    Batch(Mix),
}

/// A transform that [`Pipeline::parse`] knows.
#[derive(Debug, serde::Serialize)]
pub struct TransformEntry {
    /// Its name, what stands before the colon.
    pub name: &'static str,
    /// One line about it.
    pub about: &'static str,
    /// What stands after the colon; empty for a transform that takes nothing.
    pub argument: &'static str,
    /// Makes it from its argument; `None` for an argument that does not fit.
    #[serde(skip)]
    pub parse: fn(&str) -> Option<Step>,
}

/// Every transform, in the order of listings.
pub const TRANSFORMS: &[TransformEntry] = &[
    pad_crop::ENTRY,
    flip::ENTRY,
    resize::ENTRY,
    center_crop::ENTRY,
    random_resized_crop::ENTRY,
    color_jitter::ENTRY,
    randaugment::ENTRY,
    cutout::ENTRY,
    mix::MIXUP,
    mix::CUTMIX,
];

/// A list of transforms.
#[derive(Clone, Debug, Default)]
pub struct Pipeline {
    steps: Vec<Arc<dyn Transform>>,
    mixes: Vec<Mix>,
}

impl Pipeline {
    /// Leaves images as they are.
    pub const fn none() -> Self {
        Self { steps: vec![], mixes: vec![] }
    }

    /// From transforms of your own.
    pub fn new(steps: Vec<Arc<dyn Transform>>) -> Self {
        Self { steps, mixes: vec![] }
    }

    /// From `NAME` and `NAME:ARGUMENT` strings.
    ///
    /// # Errors
    /// An unknown name, an argument that does not fit.
    pub fn parse<S: AsRef<str>>(specs: &[S]) -> Result<Self> {
        let mut pipeline = Self::none();
        for spec in specs {
            match parse_one(spec.as_ref())? {
                Step::Image(step) => pipeline.steps.push(step),
                Step::Batch(mix) => pipeline.mixes.push(mix),
            }
        }
        Ok(pipeline)
    }

    /// What takes the list's place at evaluation.
    #[must_use]
    pub fn at_evaluation(&self) -> Self {
        Self::new(self.steps.iter().flat_map(|s| s.at_evaluation()).collect())
    }

    /// The list without what mixes the images of a batch.
    #[must_use]
    pub fn without_mixes(&self) -> Self {
        Self::new(self.steps.clone())
    }

    /// This list behind the steps of `first`.
    #[must_use]
    pub(crate) fn after(&self, first: &Self) -> Self {
        Self { steps: first.steps.iter().chain(&self.steps).cloned().collect(), mixes: self.mixes.clone() }
    }

    /// The `[H,W]` that comes out for `size`; `None` where it differs from image to image.
    ///
    /// # Errors
    /// When a step cannot work on what it would get.
    pub fn size(&self, size: Option<[usize; 2]>) -> Result<Option<[usize; 2]>> {
        self.steps.iter().try_fold(size, |size, step| step.size(size))
    }

    /// Whether a step is there to change sizes.
    pub(crate) fn changes_size(&self) -> bool {
        self.steps.iter().any(|s| !s.is_random())
    }

    /// Runs every step, the k-th with stream `rng.fork(k)`.
    pub fn apply(&self, image: &mut Image, spare: &mut Vec<u8>, rng: Rng) {
        self.apply_steps(0..self.steps.len(), image, spare, rng);
    }

    /// Runs the first `count` steps.
    pub(crate) fn apply_first(&self, count: usize, image: &mut Image, spare: &mut Vec<u8>, rng: Rng) {
        self.apply_steps(0..count, image, spare, rng);
    }

    /// Runs the steps after the first `count`.
    pub(crate) fn apply_rest(&self, count: usize, image: &mut Image, spare: &mut Vec<u8>, rng: Rng) {
        self.apply_steps(count..self.steps.len(), image, spare, rng);
    }

    fn apply_steps(&self, steps: std::ops::Range<usize>, image: &mut Image, spare: &mut Vec<u8>, rng: Rng) {
        for k in steps {
            self.steps[k].apply(image, spare, rng.fork(k as u64));
        }
    }

    /// The number of steps at the list's head that hold no chance and that `other` begins with as well.
    pub(crate) fn common_fixed_steps(&self, other: &Self) -> usize {
        let alike = |(a, b): &(&Arc<dyn Transform>, &Arc<dyn Transform>)| !a.is_random() && format!("{a:?}") == format!("{b:?}");
        self.steps.iter().zip(&other.steps).take_while(alike).count()
    }

    /// The mixtures that batches draw from.
    pub(crate) fn mixes(&self) -> &[Mix] {
        &self.mixes
    }
}

fn parse_one(spec: &str) -> Result<Step> {
    let (name, argument) = spec.split_once(':').unwrap_or((spec, ""));
    let Some(entry) = TRANSFORMS.iter().find(|e| e.name == name) else {
        return Err(Error::unknown("augmentation", name, &TRANSFORMS.iter().map(|e| e.name).collect::<Vec<_>>()));
    };
    (entry.parse)(argument).ok_or_else(|| match entry.argument {
        "" => Error::spec(spec, format!("`{name}` takes nothing after its name")),
        argument => Error::spec(spec, format!("expected `{name}:{argument}`")),
    })
}
