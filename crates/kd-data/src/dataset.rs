//! Data sets in memory: images as bytes, labels, and what is known about them.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::image::Image;
use crate::select::{self, Options};
use crate::{Error, Result};

/// What a data set says about itself; its splits share it.
#[derive(Clone, Debug)]
pub struct Info {
    /// The source's name.
    pub name: String,
    /// `[C,H,W]` of every image.
    pub shape: [usize; 3],
    /// One name a class.
    pub class_names: Vec<String>,
    /// Mean and deviation of the training pixels.
    pub normalise: Normalise,
    /// The group (superclass) of each class, where the data has one.
    pub groups: Option<Vec<i64>>,
}

/// Per channel, in units of the largest pixel value: an input is `(pixel / 255 - mean) / std`.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Normalise {
    /// One value a channel.
    pub mean: Vec<f64>,
    /// One value a channel, positive.
    pub std: Vec<f64>,
}

impl Normalise {
    /// From two lists of one value a channel.
    pub fn new(mean: &[f64], std: &[f64]) -> Self {
        Self { mean: mean.to_vec(), std: std.to_vec() }
    }

    /// Refuses lists that do not fit `channels`, and values that divide by zero.
    pub fn check(&self, channels: usize) -> Result<()> {
        let fits = |list: &[f64]| list.len() == channels && list.iter().all(|v| v.is_finite());
        if !fits(&self.mean) {
            return Err(Error::option("mean", format!("{:?}", self.mean), format!("{channels} numbers, one a channel")));
        }
        if !fits(&self.std) || self.std.iter().any(|v| *v <= 0.0) {
            return Err(Error::option("std", format!("{:?}", self.std), format!("{channels} positive numbers, one a channel")));
        }
        Ok(())
    }

    /// The normalised value of each of the 256 bytes, channel after channel.
    pub(crate) fn table(&self) -> Vec<[f64; 256]> {
        let entry = |(mean, std): (&f64, &f64)| std::array::from_fn(|v| (v as f64 / 255.0 - mean) / std);
        self.mean.iter().zip(&self.std).map(entry).collect()
    }
}

/// Labelled images: a view of some records of a source. Cloning and taking subsets copies no pixel.
#[derive(Clone, Debug)]
pub struct Dataset {
    info: Arc<Info>,
    pixels: Arc<Vec<u8>>,
    records: Vec<u32>,
    labels: Vec<u32>,
    given_labels: Vec<u32>,
}

impl Dataset {
    /// From the pixels of all images (`N` times `[C,H,W]`) and `N` labels.
    ///
    /// # Errors
    /// When the two do not fit each other or `info`, or a label is no class.
    pub fn new(info: Arc<Info>, pixels: Vec<u8>, labels: Vec<u32>) -> Result<Self> {
        let size: usize = info.shape.iter().product();
        if size == 0 || pixels.len() != size * labels.len() || labels.len() > u32::MAX as usize {
            return Err(Error::spec(
                &info.name,
                format!("{} labels of {:?} images need {} bytes, got {}", labels.len(), info.shape, size * labels.len(), pixels.len()),
            ));
        }
        if let Some(i) = labels.iter().position(|l| *l as usize >= info.class_names.len()) {
            return Err(Error::spec(&info.name, format!("label {} of image {i}: must be below {}", labels[i], info.class_names.len())));
        }
        info.normalise.check(info.shape[0])?;
        let records = (0..labels.len() as u32).collect();
        Ok(Self { info, pixels: Arc::new(pixels), records, given_labels: labels.clone(), labels })
    }

    /// What is known about the data.
    pub fn info(&self) -> &Arc<Info> {
        &self.info
    }

    /// The number of samples.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether there is no sample.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// The number of classes.
    pub fn classes(&self) -> usize {
        self.info.class_names.len()
    }

    /// The class of each sample, label noise included.
    pub fn labels(&self) -> &[u32] {
        &self.labels
    }

    /// The class that the source gives each sample: differs from [`Dataset::labels`] where label noise struck.
    pub fn given_labels(&self) -> &[u32] {
        &self.given_labels
    }

    /// The sample's number in the source's own file order.
    pub fn record(&self, sample: usize) -> u32 {
        self.records[sample]
    }

    /// The bytes of one sample.
    pub fn pixels(&self, sample: usize) -> &[u8] {
        let size: usize = self.info.shape.iter().product();
        let start = self.records[sample] as usize * size;
        &self.pixels[start..start + size]
    }

    pub(crate) fn read(&self, sample: usize, into: &mut Image) {
        into.assign(self.info.shape, self.pixels(sample));
    }

    /// The samples at `positions`, in that order.
    #[must_use]
    pub fn subset(&self, positions: &[u32]) -> Self {
        let pick = |from: &[u32]| positions.iter().map(|&p| from[p as usize]).collect();
        Self { records: pick(&self.records), labels: pick(&self.labels), given_labels: pick(&self.given_labels), ..self.clone() }
    }

    pub(crate) fn relabel(&mut self, labels: Vec<u32>) {
        debug_assert_eq!(labels.len(), self.labels.len());
        self.labels = labels;
    }

    /// The positions of each class's samples, ascending.
    pub fn by_class(&self) -> Vec<Vec<u32>> {
        let mut lists = vec![Vec::new(); self.classes()];
        for (i, &label) in self.labels.iter().enumerate() {
            lists[label as usize].push(i as u32);
        }
        lists
    }

    /// Mean and deviation (of the population, as the published constants) of every channel over all samples.
    pub fn mean_std(&self) -> Normalise {
        let [channels, height, width] = self.info.shape;
        let plane = height * width;
        let mut sums = vec![(0u64, 0u64); channels];
        for i in 0..self.len() {
            for (sum, plane) in sums.iter_mut().zip(self.pixels(i).chunks_exact(plane)) {
                sum.0 += plane.iter().map(|&v| u64::from(v)).sum::<u64>();
                sum.1 += plane.iter().map(|&v| u64::from(v) * u64::from(v)).sum::<u64>();
            }
        }
        let n = (self.len() * plane) as f64;
        let mean = |s: &(u64, u64)| s.0 as f64 / n;
        let std = |s: &(u64, u64)| (s.1 as f64 / n - mean(s).powi(2)).max(0.0).sqrt();
        Normalise { mean: sums.iter().map(|s| mean(s) / 255.0).collect(), std: sums.iter().map(|s| std(s) / 255.0).collect() }
    }

    fn hash(&self, hasher: &mut Sha256) {
        hasher.update((self.len() as u64).to_le_bytes());
        for extent in self.info.shape {
            hasher.update((extent as u64).to_le_bytes());
        }
        for i in 0..self.len() {
            hasher.update(self.labels[i].to_le_bytes());
            hasher.update(self.pixels(i));
        }
    }
}

/// The sets of one source.
#[derive(Clone, Debug)]
pub struct Splits {
    /// What is known about the data.
    pub info: Arc<Info>,
    /// The training set, or why there is none.
    pub train: Result<Dataset, String>,
    /// Held out for model selection, when the options ask for it.
    pub validation: Option<Dataset>,
    /// The test set, or why there is none.
    pub test: Result<Dataset, String>,
}

impl Splits {
    /// The training set.
    ///
    /// # Errors
    /// With what is missing, when there is none.
    pub fn train(&self) -> Result<&Dataset> {
        self.train.as_ref().map_err(|why| self.no_split("training", why))
    }

    /// The test set.
    ///
    /// # Errors
    /// With what is missing, when there is none.
    pub fn test(&self) -> Result<&Dataset> {
        self.test.as_ref().map_err(|why| self.no_split("test", why))
    }

    fn no_split(&self, split: &'static str, why: &str) -> Error {
        Error::NoSplit { source_name: self.info.name.clone(), split, why: why.to_string() }
    }

    /// Takes the validation set and the training subset out of the training set and adds label noise, as `options` say.
    ///
    /// # Errors
    /// Options out of range, or a source without a training set.
    pub fn select(mut self, options: &Options, seed: u64) -> Result<Self> {
        let (train, validation) = select::select(self.train()?, options, seed)?;
        self.train = Ok(train);
        self.validation = validation;
        Ok(self)
    }

    /// SHA-256, in hexadecimal, over shape, labels and pixels of every set and over the class names: two runs see the same data exactly when it
    /// is the same. What the options selected is part of it; where the files are is not.
    pub fn fingerprint(&self) -> String {
        let mut hasher = Sha256::new();
        for name in &self.info.class_names {
            hasher.update((name.len() as u64).to_le_bytes());
            hasher.update(name);
        }
        for set in [self.train.as_ref().ok(), self.validation.as_ref(), self.test.as_ref().ok()] {
            hasher.update([u8::from(set.is_some())]);
            if let Some(set) = set {
                set.hash(&mut hasher);
            }
        }
        hasher.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }
}
