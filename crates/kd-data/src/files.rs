//! Data sets whose images are files: which of them, of which class, in which set.

use std::path::PathBuf;
use std::sync::Arc;

use kd_core::Rng;
use sha2::{Digest, Sha256};

use crate::root::{Entry, Root};
use crate::{Dataset, Image, Info, Normalise, Result, Splits, decode, select};

/// Images whose heads are read when a set is opened, to see whether all have one size.
const PROBES: usize = 32;
/// Share of each class that is held out where there is no test set.
const HELD_OUT: f64 = 0.2;
/// What a set of images of different sizes states as theirs, and what brings them to it.
const DEFAULT_SIZE: [usize; 2] = [224, 224];
pub(crate) const TO_DEFAULT_SIZE: [&str; 2] = ["resize:256", "center-crop:224"];

/// Files and the class of each.
pub(crate) type Labelled = Vec<(Entry, u32)>;

/// The files of a data set.
pub(crate) struct Layout {
    pub(crate) class_names: Vec<String>,
    pub(crate) groups: Option<Vec<i64>>,
    pub(crate) train: Labelled,
    pub(crate) validation: Option<Labelled>,
    /// Without it, a part of the training set is held out.
    pub(crate) test: Option<Labelled>,
}

impl Layout {
    pub(crate) fn open(self, name: &str, normalise: Normalise, root: Root) -> Result<Splits> {
        let root = Arc::new(root);
        let lists = [Some(self.train), self.validation, self.test];
        let entries = lists.iter().map(|list| list.iter().flatten().map(|(e, _)| e).collect::<Vec<_>>());
        let size = common_size(&root, entries)?;
        let [height, width] = size.unwrap_or(DEFAULT_SIZE);
        let (class_names, groups) = (self.class_names, self.groups);
        let info = Info { name: name.to_string(), shape: [3, height, width], class_names, normalise, groups };
        let info = Arc::new(info);
        let set = |list: Labelled| {
            let (entries, labels) = list.into_iter().unzip();
            Dataset::from_files(info.clone(), Files { root: root.clone(), entries, size }, labels)
        };
        let [train, validation, test] = lists.map(|list| list.map(set).transpose());
        let (train, validation, test) = (train?.expect("invariant: given above"), validation?, test?);
        if let Some(test) = test {
            return Ok(Splits { info, train: Ok(train), validation, test: Ok(test), notes: vec![] });
        }
        let (rest, held) = select::split(&train, HELD_OUT, Rng::new(0).named("test"));
        let note = format!("no test images: {} of {} training images, a fifth of each class, are held out for it", held.len(), train.len());
        let test = if held.is_empty() { Err("no class has enough images to hold one out".to_string()) } else { Ok(held) };
        Ok(Splits { info, train: Ok(rest), validation, test, notes: vec![note] })
    }
}

/// The `[H,W]` that all images of all sets have, as far as was looked; `None` where they differ.
pub(crate) fn common_size<'a>(root: &Root, sets: impl Iterator<Item = Vec<&'a Entry>>) -> Result<Option<[usize; 2]>> {
    let mut common = None;
    for set in sets {
        for entry in set.iter().step_by(set.len().div_ceil(PROBES).max(1)) {
            let size = decode::size(&root.path(&entry.name), &root.read(&entry.name)?)?;
            if *common.get_or_insert(size) != size {
                return Ok(None);
            }
        }
    }
    Ok(common)
}

/// ImageNet's.
pub(crate) fn imagenet_normalise() -> Normalise {
    Normalise::new(&[0.485, 0.456, 0.406], &[0.229, 0.224, 0.225])
}

/// The image files of one set.
#[derive(Debug)]
pub(crate) struct Files {
    pub(crate) root: Arc<Root>,
    pub(crate) entries: Vec<Entry>,
    pub(crate) size: Option<[usize; 2]>,
}

impl Files {
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The `[H,W]` of every image; `None` where they differ.
    pub(crate) fn size(&self) -> Option<[usize; 2]> {
        self.size
    }

    pub(crate) fn path(&self, i: usize) -> PathBuf {
        self.root.path(&self.entries[i].name)
    }

    pub(crate) fn read(&self, i: usize, into: &mut Image) -> Result<()> {
        decode::decode(&self.path(i), &self.root.read(&self.entries[i].name)?, into)
    }

    pub(crate) fn hash(&self, i: usize, hasher: &mut Sha256) {
        let Entry { name, bytes } = &self.entries[i];
        hasher.update((name.len() as u64).to_le_bytes());
        hasher.update(name);
        hasher.update(bytes.to_le_bytes());
    }
}
