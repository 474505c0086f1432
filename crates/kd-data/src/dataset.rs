//! Data sets: images, labels, and what is known about them.

use std::path::PathBuf;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::files::Files;
use crate::image::Image;
use crate::select::{self, Options};
use crate::{Error, Result};

/// What a data set says about itself; its splits share it.
#[derive(Clone, Debug)]
pub struct Info {
    /// The source's name.
    pub name: String,
    /// `[C,H,W]` of every image as a [`Loader`](crate::Loader) hands it out unless its options change the size.
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

/// Where the images of a set are.
#[derive(Debug)]
enum Images {
    /// In memory, one behind the other, all of the shape that [`Info`] states.
    Memory(Vec<u8>),
    /// In files, decoded when they are asked for.
    Files(Files),
}

/// Labelled images: a view of some records of a source. Cloning and taking subsets copies no pixel.
#[derive(Clone, Debug)]
pub struct Dataset {
    info: Arc<Info>,
    images: Arc<Images>,
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
        Self::with(info, Images::Memory(pixels), labels)
    }

    /// From image files and a label for each.
    pub(crate) fn from_files(info: Arc<Info>, files: Files, labels: Vec<u32>) -> Result<Self> {
        debug_assert_eq!(files.len(), labels.len());
        Self::with(info, Images::Files(files), labels)
    }

    fn with(info: Arc<Info>, images: Images, labels: Vec<u32>) -> Result<Self> {
        if let Some(i) = labels.iter().position(|l| *l as usize >= info.class_names.len()) {
            return Err(Error::spec(&info.name, format!("label {} of image {i}: must be below {}", labels[i], info.class_names.len())));
        }
        info.normalise.check(info.shape[0])?;
        let records = (0..labels.len() as u32).collect();
        Ok(Self { info, images: Arc::new(images), records, given_labels: labels.clone(), labels })
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

    /// The image of one sample as the source has it.
    ///
    /// # Errors
    /// A file that cannot be read as an image.
    pub fn image(&self, sample: usize) -> Result<Image> {
        let mut image = Image::default();
        self.read(sample, &mut image)?;
        Ok(image)
    }

    pub(crate) fn read(&self, sample: usize, into: &mut Image) -> Result<()> {
        let record = self.records[sample] as usize;
        match &*self.images {
            Images::Memory(pixels) => into.assign(self.info.shape, pixels_of(pixels, self.info.shape, record)),
            Images::Files(files) => files.read(record, into)?,
        }
        Ok(())
    }

    /// The `[H,W]` of every image as the source has it; `None` where they differ.
    pub(crate) fn size(&self) -> Option<[usize; 2]> {
        match &*self.images {
            Images::Memory(_) => Some([self.info.shape[1], self.info.shape[2]]),
            Images::Files(files) => files.size(),
        }
    }

    /// The place of a sample's image where it is a file.
    pub(crate) fn file(&self, sample: usize) -> Option<PathBuf> {
        match &*self.images {
            Images::Memory(_) => None,
            Images::Files(files) => Some(files.path(self.records[sample] as usize)),
        }
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

    /// The first samples of each class, in turns, until there are `limit`; all of them for 0 or a limit beyond.
    ///
    /// ```
    /// let test = kd_data::open("digits")?.test()?.balanced(25);
    /// let counts: Vec<usize> = test.by_class().iter().map(Vec::len).collect();
    /// assert_eq!(counts, [3, 3, 3, 3, 3, 2, 2, 2, 2, 2]);
    /// # Ok::<(), kd_data::Error>(())
    /// ```
    pub fn balanced(&self, limit: usize) -> Self {
        if limit == 0 || limit >= self.len() { self.clone() } else { select::in_turns(self, &self.by_class(), limit) }
    }

    pub(crate) fn hash(&self, hasher: &mut Sha256) {
        hasher.update((self.len() as u64).to_le_bytes());
        for extent in self.info.shape {
            hasher.update((extent as u64).to_le_bytes());
        }
        for i in 0..self.len() {
            hasher.update(self.labels[i].to_le_bytes());
            let record = self.records[i] as usize;
            match &*self.images {
                Images::Memory(pixels) => hasher.update(pixels_of(pixels, self.info.shape, record)),
                Images::Files(files) => files.hash(record, hasher),
            }
        }
    }
}

fn pixels_of(pixels: &[u8], shape: [usize; 3], record: usize) -> &[u8] {
    let size: usize = shape.iter().product();
    &pixels[record * size..][..size]
}

/// The sets of one source.
#[derive(Clone, Debug)]
pub struct Splits {
    /// What is known about the data.
    pub info: Arc<Info>,
    /// The training set, or why there is none.
    pub train: Result<Dataset, String>,
    /// Held out for model selection, when the options ask for it or the source has such a set.
    pub validation: Option<Dataset>,
    /// The test set, or why there is none.
    pub test: Result<Dataset, String>,
    /// What a user should know about how the sets were made, one line each.
    pub notes: Vec<String>,
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

    /// The same sets with another mean and deviation.
    ///
    /// # Errors
    /// Lists that do not fit the images, a deviation of 0 (a channel of one value).
    pub fn with_normalise(self, normalise: Normalise) -> Result<Self> {
        normalise.check(self.info.shape[0])?;
        let info = Info { normalise, ..(*self.info).clone() };
        Ok(self.with_info(info))
    }

    /// The same sets with a group for each class.
    ///
    /// # Errors
    /// A list that has not one entry a class.
    pub fn with_groups(self, groups: Vec<i64>) -> Result<Self> {
        let classes = self.info.class_names.len();
        if groups.len() != classes {
            return Err(Error::option(
                "class_groups",
                format!("{} entries", groups.len()),
                format!("one for each of the {classes} classes"),
            ));
        }
        let info = Info { groups: Some(groups), ..(*self.info).clone() };
        Ok(self.with_info(info))
    }

    fn with_info(mut self, info: Info) -> Self {
        self.info = Arc::new(info);
        for set in [self.train.as_mut().ok(), self.validation.as_mut(), self.test.as_mut().ok()].into_iter().flatten() {
            set.info = Arc::clone(&self.info);
        }
        self
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
        self.validation = validation.or(self.validation);
        Ok(self)
    }

    /// SHA-256, in hexadecimal, over shape, labels and pixels of every set and over the class names: two runs see the same data exactly when it
    /// is the same. What the options selected is part of it; where the files are is not. Of images in files, names and sizes in bytes stand for
    /// the pixels.
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
