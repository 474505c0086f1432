use std::collections::BTreeSet;

use kd_core::Rng;
use kd_data::{Image, Pipeline};
use proptest::prelude::*;

use crate::support::refusal;

fn image(shape: [usize; 3]) -> Image {
    let mut image = Image::default();
    // Neighbours differ, and no pixel is 0 as the padding is.
    let data: Vec<u8> = (0..shape.iter().product()).map(|i: usize| (i * 37 % 255) as u8 + 1).collect();
    image.assign(shape, &data);
    image
}

fn run(specs: &[&str], image: &Image, rng: Rng) -> Image {
    let mut image = image.clone();
    // A dirty spare buffer must not show.
    Pipeline::parse(specs).unwrap().apply(&mut image, &mut vec![77; 5], rng);
    image
}

/// The crop whose corner is (`top`, `left`) of the image framed by `pad` zeros, pixel by pixel.
fn naive_crop(image: &Image, pad: usize, top: usize, left: usize) -> Image {
    let [channels, height, width] = image.shape();
    let mut out = image.clone();
    for (i, value) in out.data.iter_mut().enumerate() {
        let (c, y, x) = (i / (height * width), i / width % height + top, i % width + left);
        let inside = y >= pad && x >= pad && y < height + pad && x < width + pad;
        *value = if inside { image.data[(c * height + y - pad) * width + x - pad] } else { 0 };
    }
    assert_eq!(out.shape(), [channels, height, width]);
    out
}

proptest! {
    #[test]
    fn pad_crop_is_one_of_the_naive_crops(c in 1usize..4, h in 2usize..12, w in 2usize..12, pad in 1usize..5, seed in any::<u64>()) {
        prop_assume!(pad < h.min(w));
        let image = image([c, h, w]);
        let got = run(&[&format!("pad-crop:{pad}")], &image, Rng::new(seed));
        let places = (0..=2 * pad).flat_map(|top| (0..=2 * pad).map(move |left| (top, left)));
        prop_assert!(places.clone().any(|(top, left)| naive_crop(&image, pad, top, left) == got));
    }

    #[test]
    fn flip_mirrors_each_row_or_nothing(c in 1usize..4, h in 1usize..9, w in 1usize..9, seed in any::<u64>()) {
        let image = image([c, h, w]);
        let mut mirrored = image.clone();
        for (i, value) in mirrored.data.iter_mut().enumerate() {
            *value = image.data[i - i % w + (w - 1 - i % w)];
        }
        let got = run(&["flip"], &image, Rng::new(seed));
        prop_assert!(got == image || got == mirrored);
    }
}

#[test]
fn every_crop_and_both_flips_occur_equally() {
    let image = image([1, 5, 4]);
    let n = 9_000u64;
    let mut seen = std::collections::BTreeMap::new();
    for i in 0..n {
        *seen.entry(run(&["pad-crop:1"], &image, Rng::new(3).fork(i)).data).or_insert(0u64) += 1;
    }
    // 1,000 times each, five standard deviations are 149.
    assert_eq!(seen.len(), 9);
    assert!(seen.values().all(|&count| count.abs_diff(1_000) < 149), "{:?}", seen.values());
    let flipped = (0..n).filter(|&i| run(&["flip"], &image, Rng::new(3).fork(i)) != image).count();
    assert!(flipped.abs_diff(4_500) < 237, "{flipped}");
}

#[test]
fn steps_draw_independently() {
    let image = image([1, 8, 8]);
    let outcomes: BTreeSet<Vec<u8>> = (0..300).map(|i| run(&["pad-crop:1", "flip"], &image, Rng::new(i)).data).collect();
    assert_eq!(outcomes.len(), 18, "nine crops times two flips");
}

#[test]
fn what_cannot_be_is_refused() {
    let message = refusal(Pipeline::parse(&["padcrop:4"]));
    assert!(message.contains("`padcrop`") && message.contains("did you mean `pad-crop`?"), "{message}");
    assert!(refusal(Pipeline::parse(&["flip:2"])).contains("takes nothing"));
    for wrong in ["pad-crop", "pad-crop:0", "pad-crop:-1", "pad-crop:x"] {
        let message = refusal(Pipeline::parse(&[wrong]));
        assert!(message.contains(&format!("`{wrong}`")) && message.contains("pad-crop:P"), "{message}");
    }
    let message = refusal(Pipeline::parse(&["pad-crop:8"]).unwrap().size(Some([8, 9])));
    assert!(message.contains("pad-crop:8") && message.contains("8x9"), "{message}");
}
