//! `digits`: 1,797 handwritten digits of 8x8 grey pixels, embedded in the crate.
//!
//! Source: "Optical Recognition of Handwritten Digits" (its test part), E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998,
//! <https://doi.org/10.24432/C50P49>, licensed under CC BY 4.0. Unchanged but for the packing and for the scale of the pixels, which go from
//! 0..=16 to 0..=255: `(v * 255 + 8) / 16`.
//!
//! The split is fixed: for each digit, the 50 images that come first in one fixed random permutation of the file are the test set (500), the
//! other 1,297 the training set, both in file order. The file does not say who wrote what, so writers are shared between the two.

use std::io::Read;
use std::sync::Arc;

use kd_core::Rng;

use crate::registry::SourceEntry;
use crate::{Dataset, Error, Info, Normalise, Result, Splits};

pub(crate) const ENTRY: SourceEntry = SourceEntry {
    name: "digits",
    about: "1,797 handwritten digits, 8x8 grey, embedded (UCI 1998, CC BY 4.0)",
    argument: "",
    augment: &["pad-crop:1"],
    open,
};

const PACKED: &[u8] = include_bytes!("../data/digits.zlib");
const IMAGES: usize = 1797;
const PIXELS: usize = 64;
const TEST_PER_CLASS: usize = 50;

/// Mean and deviation of the 1,297 training images.
const MEAN: f64 = 0.305_787_488;
const STD: f64 = 0.376_158_151;

fn open(_: &str) -> Result<Splits> {
    let mut raw = Vec::with_capacity(IMAGES * (1 + PIXELS));
    flate2::read::ZlibDecoder::new(PACKED).read_to_end(&mut raw).map_err(Error::io("embedded digits".as_ref()))?;
    let (labels, pixels) = raw.split_at(IMAGES);
    let labels = labels.iter().map(|&l| u32::from(l)).collect();
    let pixels = pixels.iter().map(|&v| ((u16::from(v) * 255 + 8) / 16) as u8).collect();
    let info = Arc::new(Info {
        name: "digits".to_string(),
        shape: [1, 8, 8],
        class_names: (0..10).map(|d| d.to_string()).collect(),
        normalise: Normalise::new(&[MEAN], &[STD]),
        groups: None,
    });
    let all = Dataset::new(info.clone(), pixels, labels)?;
    let mut taken = [0; 10];
    let mut test = vec![false; IMAGES];
    for i in Rng::new(0).named("digits").permutation(IMAGES) {
        let count = &mut taken[all.labels()[i as usize] as usize];
        test[i as usize] = *count < TEST_PER_CLASS;
        *count += 1;
    }
    let (test, train): (Vec<u32>, Vec<u32>) = (0..IMAGES as u32).partition(|&i| test[i as usize]);
    Ok(Splits { info, train: Ok(all.subset(&train)), validation: None, test: Ok(all.subset(&test)), notes: vec![] })
}
