//! `stanford-cars:PATH`: Stanford Cars, 16,185 photographs of 196 models (J. Krause, M. Stark, J. Deng, L. Fei-Fei, "3D Object Representations for
//! Fine-Grained Categorization", 2013), in a folder or a zip file.
//!
//! The labels of the original are MATLAB files, which are not read; the widely used tables made from them are:
//!
//! ```text
//! names.csv                        one class name a line
//! anno_train.csv, anno_test.csv    FILE,X1,Y1,X2,Y2,CLASS    CLASS from 1; the box is not used
//! ```
//! The images lie anywhere below a folder whose name holds `train` or `test` (`cars_train/00001.jpg`, `car_data/train/CLASS/00001.jpg`). A copy that
//! has one folder a class and no tables is an `imagefolder`.

use std::collections::BTreeMap;

use crate::files::{Labelled, Layout, imagenet_normalise};
use crate::published::Listing;
use crate::registry::SourceEntry;
use crate::{Error, Result, Splits};

pub(crate) const ENTRY: SourceEntry = SourceEntry {
    name: "stanford-cars",
    about: "Stanford Cars: 8,144 + 8,041 photographs of 196 models, labels as CSV",
    argument: "PATH",
    augment: &["random-resized-crop:224", "flip"],
    open,
};

fn open(path: &str) -> Result<Splits> {
    let expected =
        "the labels as CSV (names.csv, anno_train.csv, anno_test.csv); a copy with one folder a class opens with `imagefolder:PATH`";
    let set = Listing::open(path, "anno_train.csv", expected)?;
    let class_names = set.lines("names.csv", "a class name", |line| Some(line.trim_matches('"').to_string()))?;
    let read = |split: &str| -> Result<Labelled> {
        let in_split = |name: &&str| {
            name.rsplit_once('/').is_some_and(|(folders, _)| folders.split('/').any(|f| f.to_ascii_lowercase().contains(split)))
        };
        let files: BTreeMap<&str, &str> =
            set.names().filter(in_split).map(|name| (name.rsplit('/').next().unwrap_or(name), name)).collect();
        let table = format!("anno_{split}.csv");
        let rows = set.lines(&table, &format!("FILE,X1,Y1,X2,Y2,CLASS with a class of 1..={}", class_names.len()), |line| {
            let (file, rest) = line.split_once(',')?;
            let class: u32 = rest.rsplit(',').next()?.trim().parse().ok()?;
            (1..=class_names.len()).contains(&(class as usize)).then(|| (file.trim_matches('"').to_string(), class - 1))
        })?;
        let entry = |(file, class): (String, u32)| match files.get(file.as_str()) {
            Some(name) => Ok((set.entry(name)?, class)),
            None => Err(set.corrupt(&table, format!("{file} is in no folder named after `{split}`"))),
        };
        rows.into_iter().map(entry).collect::<Result<_, Error>>()
    };
    let (train, test) = (read("train")?, read("test")?);
    Layout { class_names, groups: None, train, validation: None, test: Some(test) }.open("stanford-cars", imagenet_normalise(), set.root)
}
