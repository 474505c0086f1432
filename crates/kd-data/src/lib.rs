//! Image data sets, deterministic augmentation and a prefetching loader for the kd knowledge-distillation toolkit.
//!
//! | module | holds |
//! |---|---|
//! | [`registry`] | the sources ([`open`]): `digits` (embedded), CIFAR, MNIST, STL-10, Tiny ImageNet, CUB-200-2011, Stanford Cars, the Hub, and `imagefolder:PATH` for your own |
//! | [`dataset`] | [`Dataset`]: images and labels; [`Splits`]; [`Info`] |
//! | [`select`] | [`Options`]: validation split, class-balanced training subset, label noise |
//! | [`transforms`] | [`Pipeline`]: augmentation written as strings, one file a transform |
//! | [`loader`] | [`Loader`]: batches, prefetched by a thread of its own |
//! | [`unlabelled`] | [`Unlabelled`]: images of no class that join a training set |
//! | [`groups`] | groups of classes: by the last word of their names, or from a file |
//!
//! Invariant: the order of the samples and what happens to each is a function of (seed, epoch, sample, view), never of threads or of what was
//! drawn before. A run that resumes in the middle of an epoch sees the same bits.
//!
//! ```
//! use kd_core::BatchSource;
//! use kd_data::{Loader, LoaderOptions, Options, Pipeline};
//!
//! let data = kd_data::open("digits")?.select(&Options { train_limit: 200, ..Options::default() }, 1)?;
//! let options = LoaderOptions { batch_size: 64, augment: vec![Pipeline::parse(&["pad-crop:1"])?], ..LoaderOptions::default() };
//! let mut loader = Loader::train(data.train()?, &options)?;
//! loader.start(0, 0)?;
//! while let Some(batch) = loader.next_batch()? {
//!     assert_eq!(batch.images[0].dims()[1..], [1, 8, 8]);
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod cifar;
mod cub;
pub mod dataset;
mod decode;
mod digits;
pub mod error;
mod files;
mod folder;
pub mod groups;
mod hub;
mod idx;
pub mod image;
pub mod loader;
mod noise;
mod published;
pub mod registry;
mod resize;
mod root;
pub mod select;
mod stanford_cars;
mod stl10;
mod tiny_imagenet;
pub mod transforms;
pub mod unlabelled;

pub use dataset::{Dataset, Info, Normalise, Splits};
pub use error::{Error, Result};
pub use image::Image;
pub use loader::{Loader, LoaderOptions};
pub use registry::{SOURCES, SourceEntry, absolute, open};
pub use select::Options;
pub use transforms::mix::Mix;
pub use transforms::{Pipeline, Step, TRANSFORMS, Transform, TransformEntry};
pub use unlabelled::Unlabelled;
