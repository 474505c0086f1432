//! Images of no known class that join a training set, for the losses that need no labels.
//!
//! | spec | images |
//! |---|---|
//! | `folder:PATH` | every `*.{png,jpg,jpeg,webp}` below a folder or in a zip file |
//! | `stl10:DIR` | the 100,000 unlabelled images of STL-10 (2.8 GB of memory) |
//! | any other data source | its training images, their labels forgotten |
//!
//! A [`Loader`](crate::Loader) is given them beside the labelled set. Of an image whose size or channels are not those of the training
//! images, the shorter side is resized and the middle cropped, grey is repeated and colour weighted (ITU-R 601-2, as Pillow does); then it is
//! augmented and normalised as they are.

use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::files::{Files, common_size};
use crate::folder::is_image;
use crate::root::Root;
use crate::{Dataset, Error, Image, Info, Normalise, Result, registry, stl10};

/// Images without labels.
#[derive(Clone, Debug)]
pub struct Unlabelled(Dataset);

impl Unlabelled {
    /// Opens what `spec` names; see the [module](self).
    ///
    /// # Errors
    /// An unknown name, a folder without an image, files that do not hold what their format says.
    ///
    /// # Example
    /// ```
    /// assert_eq!(kd_data::Unlabelled::open("digits")?.len(), 1297);
    /// # Ok::<(), kd_data::Error>(())
    /// ```
    pub fn open(spec: &str) -> Result<Self> {
        match spec.split_once(':') {
            Some(("folder", path)) => folder(path),
            Some(("stl10", dir)) => stl10::unlabelled(dir).map(Self),
            _ => Ok(Self(registry::open(spec)?.train()?.clone())),
        }
    }

    /// The number of images.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// SHA-256, in hexadecimal, over the images as [`Splits::fingerprint`](crate::Splits::fingerprint) has them.
    pub fn fingerprint(&self) -> String {
        let mut hasher = Sha256::new();
        self.0.hash(&mut hasher);
        hasher.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }

    /// The images, whose labels mean nothing.
    pub(crate) fn images(&self) -> &Dataset {
        &self.0
    }
}

/// What says that it has no class.
pub(crate) fn info(shape: [usize; 3]) -> Arc<Info> {
    let normalise = Normalise { mean: vec![0.0; shape[0]], std: vec![1.0; shape[0]] };
    Arc::new(Info { name: "unlabelled".to_string(), shape, class_names: vec!["none".to_string()], normalise, groups: None })
}

fn folder(path: &str) -> Result<Unlabelled> {
    let root = Arc::new(Root::open(Path::new(path))?);
    let entries: Vec<_> = root.list()?.into_iter().filter(|e| !e.name.ends_with('/') && is_image(&e.name)).collect();
    if entries.is_empty() {
        return Err(Error::not_found(path, "there is no image (png, jpg, jpeg, webp) in it"));
    }
    let size = common_size(&root, [entries.iter().collect()].into_iter())?;
    let [height, width] = size.unwrap_or([1, 1]);
    let labels = vec![0; entries.len()];
    Ok(Unlabelled(Dataset::from_files(info([3, height, width]), Files { root, entries, size }, labels)?))
}

/// Brings an image to `channels` and, where it is given, to `size`.
pub(crate) fn fit(image: &mut Image, spare: &mut Vec<u8>, channels: usize, size: Option<[usize; 2]>) {
    if image.channels != channels {
        let plane = image.height * image.width;
        spare.clear();
        match (image.channels, channels) {
            (3, 1) => spare.extend((0..plane).map(|i| {
                let [r, g, b] = [0, 1, 2].map(|c| u32::from(image.data[c * plane + i]));
                ((19_595 * r + 38_470 * g + 7_471 * b + (1 << 15)) >> 16) as u8
            })),
            _ => (0..channels).for_each(|c| spare.extend_from_slice(&image.data[c % image.channels * plane..][..plane])),
        }
        std::mem::swap(&mut image.data, spare);
        image.channels = channels;
    }
    let Some([height, width]) = size.filter(|size| *size != [image.height, image.width]) else { return };
    // The smallest image of the same shape that covers the wanted one.
    let scale = (height as f64 / image.height as f64).max(width as f64 / image.width as f64);
    let side = |extent: usize, least: usize| ((extent as f64 * scale).round() as usize).max(least);
    image.resize(spare, [side(image.height, height), side(image.width, width)]);
    let corner = [image.height - height, image.width - width].map(|rest| (rest / 2) as isize);
    image.crop(spare, corner, [height, width]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_brought_to_size_and_channels() {
        let mut image = Image::default();
        let planes: Vec<u8> = [255u8, 0, 0].iter().flat_map(|&v| [v; 8 * 16]).collect();
        image.assign([3, 8, 16], &planes);
        let mut red = image.clone();
        fit(&mut red, &mut vec![], 1, Some([4, 4]));
        // Pillow: Image.new("RGB", (1, 1), (255, 0, 0)).convert("L") is 76.
        assert_eq!((red.shape(), red.data), ([1, 4, 4], vec![76; 16]));
        let mut same = image.clone();
        fit(&mut same, &mut vec![], 3, Some([8, 16]));
        assert_eq!(same, image);
        let mut grey = Image::default();
        grey.assign([1, 1, 2], &[3, 9]);
        fit(&mut grey, &mut vec![], 3, None);
        assert_eq!((grey.shape(), grey.data), ([3, 1, 2], vec![3, 9, 3, 9, 3, 9]));
    }
}
