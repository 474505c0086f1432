//! `cub200:PATH`: CUB-200-2011, 11,788 birds of 200 species (C. Wah, S. Branson, P. Welinder, P. Perona, S. Belongie, "The Caltech-UCSD
//! Birds-200-2011 Dataset", 2011), as published, in a folder or a zip file.
//!
//! ```text
//! CUB_200_2011/images.txt               IMAGE-ID PATH          below images/
//!              image_class_labels.txt   IMAGE-ID CLASS-ID      from 1
//!              train_test_split.txt     IMAGE-ID 1|0           1: training
//!              classes.txt              CLASS-ID NAME
//! ```
//! Classes whose names end in the same word (the five woodpeckers) are a group.

use std::collections::BTreeMap;

use crate::files::{Layout, imagenet_normalise};
use crate::published::Listing;
use crate::registry::SourceEntry;
use crate::{Result, Splits, groups};

pub(crate) const ENTRY: SourceEntry = SourceEntry {
    name: "cub200",
    about: "CUB-200-2011: 5,994 + 5,794 birds of 200 species",
    argument: "PATH",
    augment: &["random-resized-crop:224", "flip"],
    open,
};

fn open(path: &str) -> Result<Splits> {
    let set = Listing::open(path, "image_class_labels.txt", "the published layout of CUB-200-2011")?;
    let pairs = |name: &str, what: &str| -> Result<Vec<(u32, String)>> {
        set.lines(name, &format!("an id and {what}"), |line| {
            let (id, value) = line.split_once(' ')?;
            Some((id.parse().ok()?, value.trim().to_string()))
        })
    };
    let names = pairs("classes.txt", "a class name")?;
    // `001.Black_footed_Albatross`
    let class_names: Vec<String> =
        names.iter().map(|(_, name)| name.split_once('.').map_or(name.as_str(), |(_, n)| n).to_string()).collect();
    let classes: BTreeMap<u32, u32> = names.iter().zip(0..).map(|((id, _), label)| (*id, label)).collect();
    let class_of: BTreeMap<u32, String> = pairs("image_class_labels.txt", "a class id")?.into_iter().collect();
    let is_train: BTreeMap<u32, String> = pairs("train_test_split.txt", "1 or 0")?.into_iter().collect();
    let (mut train, mut test) = (vec![], vec![]);
    for (id, image) in pairs("images.txt", "a path")? {
        let missing = |name: &str, what: &str| set.corrupt(name, format!("{what} of image {id} ({image})"));
        let class = class_of.get(&id).and_then(|c| c.parse().ok()).and_then(|c: u32| classes.get(&c));
        let class = *class.ok_or_else(|| missing("image_class_labels.txt", "no class of classes.txt is the class"))?;
        let entry = set.entry(&format!("images/{image}"))?;
        match is_train.get(&id).map(String::as_str) {
            Some("1") => train.push((entry, class)),
            Some("0") => test.push((entry, class)),
            _ => return Err(missing("train_test_split.txt", "neither 1 nor 0 is the set")),
        }
    }
    let groups = Some(groups::by_last_word(&class_names));
    Layout { class_names, groups, train, validation: None, test: Some(test) }.open("cub200", imagenet_normalise(), set.root)
}
