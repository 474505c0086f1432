//! `stl10:DIR`: STL-10, 96x96 images of 10 classes (A. Coates, H. Lee, A. Ng, "An Analysis of Single Layer Networks in Unsupervised Feature
//! Learning", AISTATS 2011), the published binary version.
//!
//! ```text
//! stl10_binary/train_X.bin, test_X.bin    per image the R, G and B plane, each 96x96 column after column
//!              train_y.bin, test_y.bin    one byte an image, 1..=10
//! ```
//! `DIR` is that folder or the one that holds it. The 100,000 images of `unlabeled_X.bin` can join a training set ([`Unlabelled`](crate::Unlabelled)).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::registry::SourceEntry;
use crate::{Dataset, Error, Info, Normalise, Result, Splits, unlabelled};

pub(crate) const ENTRY: SourceEntry = SourceEntry {
    name: "stl10",
    about: "STL-10: 5,000 + 8,000 images of 96x96, 10 classes",
    argument: "DIR",
    augment: &["pad-crop:12", "flip"],
    open,
};

const SIDE: usize = 96;
const PLANE: usize = SIDE * SIDE;
const NAMES: &str = "airplane bird car cat deer dog horse monkey ship truck";

/// `dir`, or the folder in it that the archive makes, whichever holds one of `files`.
fn locate(dir: &str, files: &[&str]) -> Option<PathBuf> {
    let dir = Path::new(dir);
    let holds = |d: &PathBuf| files.iter().any(|f| d.join(f).is_file());
    [dir.to_path_buf(), dir.join("stl10_binary")].into_iter().find(holds)
}

/// The images of unlabeled_X.bin.
pub(crate) fn unlabelled(dir: &str) -> Result<Dataset> {
    const FILE: &str = "unlabeled_X.bin";
    let found = locate(dir, &[FILE]);
    let path =
        found.ok_or_else(|| Error::not_found(dir, format!("expected this folder, or stl10_binary in it, to hold {FILE}")))?.join(FILE);
    let pixels = std::fs::read(&path).map_err(Error::io(&path))?;
    if pixels.is_empty() || !pixels.len().is_multiple_of(3 * PLANE) {
        return Err(Error::corrupt(&path, format!("{} bytes, expected 3 x 96 x 96 for each image", pixels.len())));
    }
    let labels = vec![0; pixels.len() / (3 * PLANE)];
    Dataset::new(unlabelled::info([3, SIDE, SIDE]), upright(pixels), labels)
}

fn open(dir: &str) -> Result<Splits> {
    let found = locate(dir, &["train_X.bin", "test_X.bin"]);
    let dir = found.ok_or_else(|| {
        Error::not_found(dir, "expected this folder, or stl10_binary in it, to hold train_X.bin, train_y.bin, test_X.bin, test_y.bin")
    })?;
    let info = Arc::new(Info {
        name: "stl10".to_string(),
        shape: [3, SIDE, SIDE],
        class_names: NAMES.split(' ').map(str::to_string).collect(),
        normalise: Normalise::new(&[0.4467, 0.4398, 0.4066], &[0.2603, 0.2566, 0.2713]),
        groups: None,
    });
    let read = |split: &str| {
        let (images, labels) = (dir.join(format!("{split}_X.bin")), dir.join(format!("{split}_y.bin")));
        match [&images, &labels].into_iter().find(|f| !f.is_file()) {
            Some(gone) => Ok(Err(format!("{} is missing", gone.display()))),
            None => set(&info, &images, &labels).map(Ok),
        }
    };
    Ok(Splits { train: read("train")?, test: read("test")?, validation: None, notes: vec![], info })
}

fn set(info: &Arc<Info>, images: &Path, labels: &Path) -> Result<Dataset> {
    let raw = std::fs::read(labels).map_err(Error::io(labels))?;
    if let Some(i) = raw.iter().position(|l| !(1..=10).contains(l)) {
        return Err(Error::corrupt(labels, format!("label {} of image {i}: expected 1..=10", raw[i])));
    }
    let pixels = std::fs::read(images).map_err(Error::io(images))?;
    let expected = raw.len() * 3 * PLANE;
    if pixels.len() != expected || raw.is_empty() {
        let why =
            format!("{} bytes, expected {expected}: {} labels of {}, 3 x 96 x 96 bytes each", pixels.len(), raw.len(), labels.display());
        return Err(Error::corrupt(images, why));
    }
    Dataset::new(info.clone(), upright(pixels), raw.iter().map(|l| u32::from(l - 1)).collect())
}

/// Planes row after row.
fn upright(mut pixels: Vec<u8>) -> Vec<u8> {
    for plane in pixels.chunks_exact_mut(PLANE) {
        for y in 0..SIDE {
            for x in 0..y {
                plane.swap(y * SIDE + x, x * SIDE + y);
            }
        }
    }
    pixels
}
