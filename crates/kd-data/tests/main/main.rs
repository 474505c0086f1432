//! Sources, selection, transforms and the loader, through the public API.

mod cifar;
mod digits;
mod folder;
mod groups;
mod loader;
mod noise;
mod published;
mod select;
mod support;
mod transforms;
mod unlabelled;
