//! `imagefolder:PATH`: images of your own, one folder a class, in a folder or in a zip file.
//!
//! ```text
//! PATH/SPLIT/CLASS/*.{png,jpg,jpeg,webp}      SPLIT: train (training); val (valid, validation); test
//! PATH/CLASS/*.{png,jpg,jpeg,webp}            no splits
//! PATH/unlabelled/*                           beside the splits: left alone here
//! ```
//! All of it may lie in one more folder, as it often does in archives; images may lie deeper within their class. Classes are the folders' names,
//! sorted. With both `val` and `test`, `val` is for model selection; with one of them, that is the test set. With neither, a fifth of each class
//! (rounded, chosen by one fixed random permutation) is held out as the test set.
//!
//! Images are decoded when a batch needs them ([`LoaderOptions`](crate::LoaderOptions) says how much stays in memory). When those looked at on
//! opening have one size, that is the set's size; when they differ and `augment` names no size, they are resized and cropped to 224x224
//! (`resize:256`, `center-crop:224`). Mean and deviation are ImageNet's; [`Loader::mean_std`](crate::Loader::mean_std) measures the data's own.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::files::{Labelled, Layout, imagenet_normalise};
use crate::registry::SourceEntry;
use crate::root::{Entry, Root};
use crate::{Error, Result, Splits};

pub(crate) const ENTRY: SourceEntry = SourceEntry {
    name: "imagefolder",
    about: "your own images, [SPLIT/]CLASS/*.{png,jpg,jpeg,webp} in a folder or a zip file",
    argument: "PATH",
    augment: &["flip"],
    open,
};

const EXTENSIONS: [&str; 4] = ["png", "jpg", "jpeg", "webp"];

fn open(path: &str) -> Result<Splits> {
    let root = Root::open(Path::new(path))?;
    layout(&root, root.list()?)?.open("imagefolder", imagenet_normalise(), root)
}

/// Whether a name is an image's.
pub(crate) fn is_image(name: &str) -> bool {
    let extension = name.rsplit_once('.').map(|(_, e)| e.to_ascii_lowercase());
    extension.is_some_and(|e| EXTENSIONS.contains(&e.as_str()))
}

/// A folder's name as a split.
fn split_name(name: &str) -> Option<&'static str> {
    match name.to_ascii_lowercase().as_str() {
        "train" | "training" => Some("train"),
        "val" | "valid" | "validation" => Some("val"),
        "test" => Some("test"),
        _ => None,
    }
}

/// A folder beside the splits for images of no class; [`Unlabelled`](crate::Unlabelled) opens it.
fn is_unlabelled(name: &str) -> bool {
    matches!(name.to_ascii_lowercase().as_str(), "unlabelled" | "unlabeled")
}

fn layout(root: &Root, entries: Vec<Entry>) -> Result<Layout> {
    let mut entries: Vec<Entry> = entries.into_iter().filter(|e| e.name.ends_with('/') || is_image(&e.name)).collect();
    let base = common_folder(&entries);
    // What is left lies in the common folder.
    entries.retain(|e| e.name.len() > base.len());
    let refuse = |name: &str, why: &str| Err(Error::corrupt(&root.path(&format!("{base}{name}")), why));

    // Images by split and class; a class that is there but holds none stands with an empty list.
    let mut splits: BTreeMap<&str, BTreeMap<String, Vec<Entry>>> = BTreeMap::new();
    let has_splits = entries.iter().any(|e| top(&e.name, &base).and_then(split_name).is_some());
    for entry in entries {
        let below = entry.name[base.len()..].to_string();
        let Some((first, rest)) = below.split_once('/') else {
            return refuse(&below, "an image in no class folder: expected [SPLIT/]CLASS/IMAGE");
        };
        let (split, rest) = match (has_splits, split_name(first)) {
            (false, _) => ("train", below.as_str()),
            (true, Some(split)) => (split, rest),
            (true, None) if entry.name.ends_with('/') || is_unlabelled(first) => continue,
            (true, None) => return refuse(first, "a folder beside train, val and test that is none of them"),
        };
        let classes = splits.entry(split).or_default();
        match rest.split_once('/') {
            None if rest.is_empty() => {}
            None => return refuse(&below, "an image in no class folder: expected [SPLIT/]CLASS/IMAGE"),
            Some((class, image)) => {
                let images = classes.entry(class.to_string()).or_default();
                if !image.is_empty() && is_image(image) {
                    images.push(entry);
                }
            }
        }
    }

    let Some(train) = splits.get("train").filter(|classes| !classes.is_empty()) else {
        return refuse("", "no class folder for training: expected [train/]CLASS/*.{png,jpg,jpeg,webp}");
    };
    let class_names: Vec<String> = train.keys().cloned().collect();
    if let [only] = &class_names[..] {
        return refuse("", &format!("only one class (`{only}`): a classifier needs two or more"));
    }
    for (split, classes) in &splits {
        for (class, images) in classes {
            if images.is_empty() {
                let folder = if has_splits { format!("{split}/{class}") } else { class.clone() };
                return refuse(&folder, "a class without an image (png, jpg, jpeg, webp)");
            }
            if !train.contains_key(class) {
                return refuse(&format!("{split}/{class}"), "a class that has no training images");
            }
        }
    }
    let mut labelled = |split: &str| -> Option<Labelled> {
        let classes = splits.remove(split)?;
        let mut list = Labelled::new();
        for (class, images) in classes {
            let label = class_names.binary_search(&class).expect("invariant: checked above") as u32;
            list.extend(images.into_iter().map(|e| (e, label)));
        }
        Some(list)
    };
    let (train, val, test) = (labelled("train").unwrap_or_default(), labelled("val"), labelled("test"));
    let (validation, test) = if test.is_some() { (val, test) } else { (None, val) };
    Ok(Layout { class_names, groups: None, train, validation, test })
}

/// The first part of a name below `base`.
fn top<'a>(name: &'a str, base: &str) -> Option<&'a str> {
    name[base.len()..].split_once('/').map(|(first, _)| first)
}

/// The folder (with its `/`) that everything lies in and that is neither a split nor a class; empty where there is none.
fn common_folder(entries: &[Entry]) -> String {
    let mut base = String::new();
    loop {
        let tops: BTreeSet<&str> =
            entries.iter().filter(|e| e.name.len() > base.len()).map(|e| top(&e.name, &base).unwrap_or("")).collect();
        let mut tops = tops.into_iter();
        let (Some(only), None) = (tops.next(), tops.next()) else { return base };
        let inner = format!("{base}{only}/");
        // A folder that holds images itself is a class.
        let holds_images = entries.iter().any(|e| e.name.strip_prefix(&inner).is_some_and(|rest| is_image(rest) && !rest.contains('/')));
        if only.is_empty() || split_name(only).is_some() || holds_images {
            return base;
        }
        base = inner;
    }
}
