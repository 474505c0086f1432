//! `noise:KxSIZExN`: made-up images, for smoke tests and for measuring time without a data set.
//!
//! `N` training images and `K` test images of `SIZE` x `SIZE` RGB pixels, `K` classes in turn, in groups of five. Each image is uniform
//! noise around a colour of its class, a function of nothing but its number: the loss of a working method falls on it, and no accuracy
//! on it means anything.

use std::sync::Arc;

use kd_core::Rng;

use crate::registry::SourceEntry;
use crate::{Dataset, Error, Info, Normalise, Result, Splits};

pub(crate) const ENTRY: SourceEntry = SourceEntry {
    name: "noise",
    about: "K classes of N made-up RGB images of SIZE x SIZE pixels, for smoke tests and measurements",
    argument: "KxSIZExN",
    augment: &["pad-crop:4", "flip"],
    open,
};

/// Classes of a group.
const GROUP: i64 = 5;
/// Bytes of all images together; more is a slip of the finger.
const LARGEST: usize = 1 << 32;

fn open(argument: &str) -> Result<Splits> {
    let numbers: Option<Vec<usize>> = argument.split('x').map(|n| n.parse().ok()).collect();
    let Some(&[classes, size, images]) = numbers.as_deref() else {
        return Err(Error::spec(format!("noise:{argument}"), "expected noise:CLASSESxSIZExIMAGES, as in noise:10x32x50".to_string()));
    };
    let bytes = size.checked_mul(size).and_then(|p| p.checked_mul(3)).and_then(|p| p.checked_mul(images.checked_add(classes)?));
    if classes < 2 || size == 0 || images < classes || bytes.is_none_or(|b| b > LARGEST) {
        let expected = "expected 2 classes or more, an image of each, and 4 GiB at most".to_string();
        return Err(Error::spec(format!("noise:{argument}"), expected));
    }
    let info = Arc::new(Info {
        name: format!("noise:{argument}"),
        shape: [3, size, size],
        class_names: (0..classes).map(|c| c.to_string()).collect(),
        normalise: Normalise::new(&[0.5; 3], &[0.25; 3]),
        groups: Some((0..classes as i64).map(|c| c / GROUP).collect()),
    });
    Ok(Splits {
        train: Ok(draw(&info, "train", images)?),
        validation: None,
        test: Ok(draw(&info, "test", classes)?),
        info,
        notes: vec!["made-up images: no accuracy means anything".to_string()],
    })
}

fn draw(info: &Arc<Info>, split: &str, images: usize) -> Result<Dataset> {
    let ([_, height, width], classes) = (info.shape, info.class_names.len());
    let (colours, rng) = (Rng::new(0).named("noise colours"), Rng::new(0).named("noise").named(split));
    let mut pixels = Vec::with_capacity(images * 3 * height * width);
    for image in 0..images {
        let own = rng.fork(image as u64);
        for channel in 0..3 {
            let colour = colours.below((image % classes * 3 + channel) as u64, 128) as u32;
            let plane = own.fork(channel as u64);
            let noise = (0..).flat_map(|i| plane.block(i)).flat_map(u32::to_le_bytes).take(height * width);
            pixels.extend(noise.map(|n| (colour + u32::from(n) / 2) as u8));
        }
    }
    Dataset::new(Arc::clone(info), pixels, (0..images).map(|i| (i % classes) as u32).collect())
}
