//! What happens to an image between the data set and the tensor, one file a transform.
//!
//! A list of transforms is written as strings, `NAME` or `NAME:ARGUMENT`, applied in order: `["pad-crop:4", "flip"]`. Normalisation always
//! follows and is not in the list. Each transform draws from its own random stream, so that appending one changes no other's draws.

mod flip;
mod pad_crop;

use std::fmt::Debug;
use std::sync::Arc;

use kd_core::Rng;

use crate::image::Image;
use crate::{Error, Result};

/// A change of one image.
pub trait Transform: Debug + Send + Sync {
    /// Changes `image`; `spare` is a buffer to build the result in. Randomness comes from `rng` alone.
    fn apply(&self, image: &mut Image, spare: &mut Vec<u8>, rng: Rng);

    /// The `[C,H,W]` that `shape` becomes.
    ///
    /// # Errors
    /// An image that the transform cannot work on.
    fn shape(&self, shape: [usize; 3]) -> Result<[usize; 3]>;
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
    pub parse: fn(&str) -> Option<Arc<dyn Transform>>,
}

/// Every transform, in the order of listings.
pub const TRANSFORMS: &[TransformEntry] = &[pad_crop::ENTRY, flip::ENTRY];

/// A list of transforms.
#[derive(Clone, Debug, Default)]
pub struct Pipeline {
    steps: Vec<Arc<dyn Transform>>,
}

impl Pipeline {
    /// Leaves images as they are.
    pub const fn none() -> Self {
        Self { steps: vec![] }
    }

    /// From transforms of your own.
    pub fn new(steps: Vec<Arc<dyn Transform>>) -> Self {
        Self { steps }
    }

    /// From `NAME` and `NAME:ARGUMENT` strings.
    ///
    /// # Errors
    /// An unknown name, an argument that does not fit.
    pub fn parse<S: AsRef<str>>(specs: &[S]) -> Result<Self> {
        let steps = specs.iter().map(|s| parse_one(s.as_ref())).collect::<Result<_>>()?;
        Ok(Self { steps })
    }

    /// The `[C,H,W]` that comes out for `shape`.
    ///
    /// # Errors
    /// When a step cannot work on what it would get.
    pub fn shape(&self, shape: [usize; 3]) -> Result<[usize; 3]> {
        self.steps.iter().try_fold(shape, |shape, step| step.shape(shape))
    }

    /// Runs every step, the k-th with stream `rng.fork(k)`.
    pub fn apply(&self, image: &mut Image, spare: &mut Vec<u8>, rng: Rng) {
        for (k, step) in self.steps.iter().enumerate() {
            step.apply(image, spare, rng.fork(k as u64));
        }
    }
}

fn parse_one(spec: &str) -> Result<Arc<dyn Transform>> {
    let (name, argument) = spec.split_once(':').unwrap_or((spec, ""));
    let Some(entry) = TRANSFORMS.iter().find(|e| e.name == name) else {
        return Err(Error::unknown("augmentation", name, &TRANSFORMS.iter().map(|e| e.name).collect::<Vec<_>>()));
    };
    (entry.parse)(argument).ok_or_else(|| match entry.argument {
        "" => Error::spec(spec, format!("`{name}` takes nothing after its name")),
        argument => Error::spec(spec, format!("expected `{name}:{argument}`")),
    })
}
