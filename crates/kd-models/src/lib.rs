//! The model zoo: image classifiers as graphs, under PyTorch's parameter names.
//!
//! [`registry`] lists the networks; [`build`] makes the [`Graph`] of one, [`network`] a [`Network`] with room for its parameters:
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use kd_core::{Cut, Mode, Model, Rng};
//! use kd_models::{Config, network};
//!
//! let student = network("resnet20", &Config::new(10, [3, 32, 32]), DType::F32, &Device::Cpu)?;
//! student.init(Rng::new(1))?;
//! let images = Tensor::zeros((2, 3, 32, 32), DType::F32, &Device::Cpu)?;
//! let out = student.run(&images, Cut::Input, &[Cut::Stage(3), Cut::Logits], Mode::Eval)?;
//! assert_eq!(out.stage(3)?.dims(), [2, 64, 8, 8]);
//! assert_eq!(out.logits()?.dims(), [2, 10]);
//! # Ok::<(), kd_core::Error>(())
//! ```
//!
//! Classes, input channels and input size are arguments. The last map is always averaged whole, so that any size runs whose strides leave a
//! pixel; a network may also be fed other sizes than the nominal one it was built for.
//!
//! A family is one file with its layers, cuts and initialisation (that of the paper's code); a network is one line of [`registry`].
//! Every network has the cuts [`Cut::Stage`](kd_core::Cut)`(0..)` and, where they exist, `Preact`, of the distillation papers' code; `Block(1..)`,
//! the split of Block-KD: the stem with block 1, whatever stands between the last stage and the mean with the last; `Embedding`; `Logits`.

mod fnkd;
mod mobilenet_v1;
mod mobilenet_v2;
pub mod recipe;
mod registry;
mod regnet;
mod residual;
mod resnet;
mod resnet_cifar;
mod shuffle_v1;
mod shuffle_v2;
mod vgg;
mod wrn;

use candle_core::{DType, Device};
use kd_core::{Error, Result};
use kd_nn::{Graph, Network};
use serde::Serialize;

pub use registry::registry;

const MOST_CLASSES: usize = 1_000_000;
const MOST_PIXELS: usize = 16_384;

/// What every network can be built with.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Config {
    /// Outputs of the classifier.
    pub classes: usize,
    /// Channels, height and width of the input.
    pub input: [usize; 3],
    /// Probability of the network's dropout layers; `None` for the paper's.
    pub dropout: Option<f64>,
}

impl Config {
    /// `classes` outputs on images of `input` channels, height and width.
    pub fn new(classes: usize, input: [usize; 3]) -> Self {
        Self { classes, input, dropout: None }
    }
}

/// What the networks of one family have in common.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Family {
    /// Its name.
    pub name: &'static str,
    /// Whose parameter names it uses.
    pub keys: &'static str,
    /// Paper and the code it was defined after.
    pub source: &'static str,
}

/// A network's line in the registry.
#[derive(Clone, Copy, Serialize)]
pub struct ModelEntry {
    /// Its name in a config.
    pub name: &'static str,
    /// One sentence.
    pub about: &'static str,
    /// Other names that are understood.
    pub aliases: &'static [&'static str],
    /// What it shares with its relatives.
    pub family: &'static Family,
    /// Classes of the data set it was made for.
    pub classes: usize,
    /// Channels, height and width of that data set's images.
    pub input: [usize; 3],
    #[serde(skip)]
    build: fn(&str, &Config) -> Result<Graph>,
}

impl ModelEntry {
    /// The classes and input it was made for.
    pub fn config(&self) -> Config {
        Config::new(self.classes, self.input)
    }

    /// Its graph.
    ///
    /// # Errors
    /// No class, an empty input, one that is too small for the network, or a dropout probability outside `[0, 1)`.
    pub fn build(&self, config: &Config) -> Result<Graph> {
        // The upper ends keep a slip of the finger from asking for all memory.
        if !(1..=MOST_CLASSES).contains(&config.classes) {
            return Err(Error::param("classes", config.classes, format!("1 to {MOST_CLASSES}")));
        }
        if config.input.iter().any(|n| !(1..=MOST_PIXELS).contains(n)) {
            return Err(Error::param("input", format!("{:?}", config.input), format!("channels, height and width of 1 to {MOST_PIXELS}")));
        }
        if let Some(p) = config.dropout.filter(|p| !(0.0..1.0).contains(p)) {
            return Err(Error::param("dropout", p, "at least 0 and below 1"));
        }
        (self.build)(self.name, config)
    }
}

/// The entry called `name`.
///
/// # Errors
/// An unknown name; the message suggests the nearest.
pub fn find(name: &str) -> Result<&'static ModelEntry> {
    let names = |e: &'static ModelEntry| std::iter::once(e.name).chain(e.aliases.iter().copied());
    registry().iter().find(|e| names(e).any(|n| n == name)).ok_or_else(|| {
        let near = registry().iter().flat_map(names).map(|n| (strsim::jaro_winkler(&name.to_lowercase(), &n.to_lowercase()), n));
        let near = near.filter(|(score, _)| *score > 0.7).max_by(|a, b| a.0.total_cmp(&b.0));
        let hint = near.map(|(_, n)| format!("; did you mean `{n}`?")).unwrap_or_default();
        Error::param("model", name, format!("one of the {} networks that `list models` shows{hint}", registry().len()))
    })
}

/// The graph of the network `name`.
///
/// # Errors
/// As [`find`] and [`ModelEntry::build`].
pub fn build(name: &str, config: &Config) -> Result<Graph> {
    find(name)?.build(config)
}

/// The network `name`; its parameters wait for [`Network::init`] or for weights.
///
/// # Errors
/// As [`build`], and a type other than f32 and f64.
pub fn network(name: &str, config: &Config, dtype: DType, device: &Device) -> Result<Network> {
    Network::new(build(name, config)?, dtype, device)
}
