//! `mnist:DIR`, `fashion-mnist:DIR`: grey images of 28x28 in the IDX format (Y. LeCun, C. Cortes, C. Burges, "The MNIST Database of Handwritten
//! Digits", 1998; H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST", 2017).
//!
//! ```text
//! train-images-idx3-ubyte, t10k-images-idx3-ubyte    00 00 08 03, count, height, width (big-endian u32), pixels
//! train-labels-idx1-ubyte, t10k-labels-idx1-ubyte    00 00 08 01, count, labels
//! ```
//! Each as it is or with `.gz`; a dot before `idx` is as good as the hyphen. `DIR` is their folder, or one that holds them in `MNIST/raw`
//! (`FashionMNIST/raw`), where torchvision puts them.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::registry::SourceEntry;
use crate::{Dataset, Error, Info, Normalise, Result, Splits};

pub(crate) const MNIST: SourceEntry = SourceEntry {
    name: "mnist",
    about: "MNIST: 60,000 + 10,000 handwritten digits, 28x28 grey",
    argument: "DIR",
    augment: &["pad-crop:2"],
    open: |dir| open(dir, "mnist", "MNIST/raw", "0 1 2 3 4 5 6 7 8 9", Normalise::new(&[0.1307], &[0.3081])),
};
pub(crate) const FASHION: SourceEntry = SourceEntry {
    name: "fashion-mnist",
    about: "Fashion-MNIST: 60,000 + 10,000 articles of clothing, 28x28 grey, 10 classes",
    argument: "DIR",
    augment: &["pad-crop:2", "flip"],
    open: |dir| {
        let names = "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle_boot";
        open(dir, "fashion-mnist", "FashionMNIST/raw", names, Normalise::new(&[0.2860], &[0.3530]))
    },
};

/// Bytes of one file; MNIST's largest has 47 million.
const MAX_BYTES: u64 = 1 << 30;

fn open(dir: &str, name: &str, inner: &str, classes: &str, normalise: Normalise) -> Result<Splits> {
    let dir = Path::new(dir);
    let read = |stem: &str, rank: u8| find(dir, inner, stem, rank).map(|path| Idx::read(path, rank)).transpose();
    let pair = |set: &str| -> Result<[Option<Idx>; 2]> { Ok([read(&format!("{set}-images"), 3)?, read(&format!("{set}-labels"), 1)?]) };
    let (train, test) = (pair("train")?, pair("t10k")?);
    let Some(first) = train[0].as_ref().or(test[0].as_ref()) else {
        let what = format!(
            "expected this folder, or {inner} in it, to hold {{train,t10k}}-images-idx3-ubyte and -labels-idx1-ubyte, plain or .gz"
        );
        return Err(Error::not_found(dir, what));
    };
    let info = Arc::new(Info {
        name: name.to_string(),
        shape: [1, first.extents[1], first.extents[2]],
        class_names: classes.split(' ').map(str::to_string).collect(),
        normalise,
        groups: None,
    });
    let set = |files: [Option<Idx>; 2], stem: &str| match files {
        [Some(images), Some(labels)] => join(&info, images, labels).map(Ok),
        [None, _] => Ok(Err(format!("{stem}-images-idx3-ubyte is missing"))),
        [_, None] => Ok(Err(format!("{stem}-labels-idx1-ubyte is missing"))),
    };
    Ok(Splits { train: set(train, "train")?, test: set(test, "t10k")?, validation: None, notes: vec![], info })
}

fn find(dir: &Path, inner: &str, stem: &str, rank: u8) -> Option<PathBuf> {
    let names = [format!("{stem}-idx{rank}-ubyte"), format!("{stem}.idx{rank}-ubyte")];
    let names = names.iter().flat_map(|name| [name.clone(), format!("{name}.gz")]);
    names.flat_map(|name| [dir.join(&name), dir.join(inner).join(&name)]).find(|path| path.is_file())
}

fn join(info: &Arc<Info>, images: Idx, labels: Idx) -> Result<Dataset> {
    if images.extents[1..] != info.shape[1..] {
        return Err(Error::corrupt(
            &images.path,
            format!("images of {:?} pixels, the other set's are {:?}", &images.extents[1..], &info.shape[1..]),
        ));
    }
    if images.extents[0] != labels.extents[0] || labels.extents[0] == 0 {
        return Err(Error::corrupt(&labels.path, format!("{} labels for {} images", labels.extents[0], images.extents[0])));
    }
    if let Some(i) = labels.data.iter().position(|&l| usize::from(l) >= info.class_names.len()) {
        return Err(Error::corrupt(
            &labels.path,
            format!("label {} of image {i}: expected 0..={}", labels.data[i], info.class_names.len() - 1),
        ));
    }
    Dataset::new(info.clone(), images.data, labels.data.into_iter().map(u32::from).collect())
}

/// An array of bytes.
struct Idx {
    path: PathBuf,
    extents: Vec<usize>,
    data: Vec<u8>,
}

impl Idx {
    fn read(path: PathBuf, rank: u8) -> Result<Self> {
        let file = File::open(&path).map_err(Error::io(&path))?;
        let mut bytes = Vec::new();
        match path.extension().is_some_and(|e| e == "gz") {
            true => flate2::read::GzDecoder::new(file).take(MAX_BYTES + 1).read_to_end(&mut bytes),
            false => file.take(MAX_BYTES + 1).read_to_end(&mut bytes),
        }
        .map_err(Error::io(&path))?;
        let head = 4 + 4 * usize::from(rank);
        if bytes.len() < head || bytes[..4] != [0, 0, 8, rank] {
            return Err(Error::corrupt(
                &path,
                format!("expected an IDX file of {rank} dimensions of bytes (it begins with 00 00 08 {rank:02})"),
            ));
        }
        let extent = |b: &[u8]| b.iter().fold(0usize, |value, &byte| value << 8 | usize::from(byte));
        let extents: Vec<usize> = bytes[4..head].chunks_exact(4).map(extent).collect();
        let size = extents.iter().try_fold(1usize, |product, &e| product.checked_mul(e));
        if size != Some(bytes.len() - head) || size == Some(0) {
            return Err(Error::corrupt(
                &path,
                format!("{} bytes after its head, which states {extents:?}; is it cut short?", bytes.len() - head),
            ));
        }
        bytes.drain(..head);
        Ok(Self { path, extents, data: bytes })
    }
}
