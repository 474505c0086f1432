//! `tiny-imagenet:PATH`: Tiny ImageNet, 64x64 images of 200 classes (Stanford CS231n, 2015), as published, in a folder or a zip file.
//!
//! ```text
//! tiny-imagenet-200/wnids.txt                      one class id a line
//!                   words.txt                      CLASS-ID <tab> NAME, NAME ...
//!                   train/CLASS-ID/images/*.JPEG
//!                   val/val_annotations.txt        FILE <tab> CLASS-ID <tab> box
//!                   val/images/*.JPEG
//! ```
//! Classes are in the order of their ids, as image folders have them; the first name of `words.txt` is theirs. The validation images are the test
//! set, since those of `test/` have no labels.

use std::collections::BTreeMap;

use crate::files::{Labelled, Layout};
use crate::published::Listing;
use crate::registry::SourceEntry;
use crate::{Normalise, Result, Splits};

pub(crate) const ENTRY: SourceEntry = SourceEntry {
    name: "tiny-imagenet",
    about: "Tiny ImageNet: 100,000 + 10,000 images of 64x64, 200 classes",
    argument: "PATH",
    augment: &["pad-crop:8", "flip"],
    open,
};

fn open(path: &str) -> Result<Splits> {
    let set = Listing::open(path, "wnids.txt", "the published layout of Tiny ImageNet")?;
    let mut ids = set.lines("wnids.txt", "a class id", |line| Some(line.to_string()))?;
    ids.sort_unstable();
    ids.dedup();
    let label = |id: &str| ids.binary_search_by(|known| known.as_str().cmp(id)).ok().map(|label| label as u32);
    let words: BTreeMap<String, String> = match set.entry("words.txt") {
        Err(_) => BTreeMap::new(),
        Ok(_) => {
            let word = |line: &str| {
                line.split_once('\t').map(|(id, names)| (id.to_string(), names.split(',').next().unwrap_or(names).to_string()))
            };
            set.lines("words.txt", "CLASS-ID <tab> NAME", word)?.into_iter().collect()
        }
    };
    let class_names = ids.iter().map(|id| words.get(id).unwrap_or(id).clone()).collect();

    let of_class = |name: &str| name.strip_prefix("train/")?.split_once("/images/").and_then(|(id, _)| label(id));
    let train = set.names().filter_map(|name| Some((name, of_class(name)?)));
    let train = train.map(|(name, class)| Ok((set.entry(name)?, class))).collect::<Result<Labelled>>()?;
    let annotated = set.lines("val/val_annotations.txt", "FILE <tab> CLASS-ID of wnids.txt", |line| {
        let mut fields = line.split('\t');
        Some((fields.next()?.to_string(), label(fields.next()?)?))
    })?;
    let test =
        annotated.into_iter().map(|(file, class)| Ok((set.entry(&format!("val/images/{file}"))?, class))).collect::<Result<Labelled>>()?;
    if train.is_empty() {
        return Err(set.corrupt("train", "no image in train/CLASS-ID/images".to_string()));
    }
    let normalise = Normalise::new(&[0.4802, 0.4481, 0.3975], &[0.2770, 0.2691, 0.2821]);
    Layout { class_names, groups: None, train, validation: None, test: Some(test) }.open("tiny-imagenet", normalise, set.root)
}
