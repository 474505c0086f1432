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

proptest! {
    #[test]
    fn center_crop_is_the_naive_middle(c in 1usize..4, h in 1usize..12, w in 1usize..12, side in 1usize..14) {
        let image = image([c, h, w]);
        let got = run(&[&format!("center-crop:{side}")], &image, Rng::new(0));
        prop_assert_eq!(got.shape(), [c, side, side]);
        // Python's round: a half goes to the even number.
        let corner = |extent: usize| ((extent as f64 - side as f64) / 2.0).round_ties_even() as isize;
        for (i, &value) in got.data.iter().enumerate() {
            let (y, x) = ((i / side % side) as isize + corner(h), (i % side) as isize + corner(w));
            let inside = (0..h as isize).contains(&y) && (0..w as isize).contains(&x);
            let expected = if inside { image.data[i / side / side * h * w + y as usize * w + x as usize] } else { 0 };
            prop_assert_eq!(value, expected);
        }
    }

    #[test]
    fn resize_keeps_proportions(h in 1usize..30, w in 1usize..30, side in 1usize..20) {
        let got = run(&[&format!("resize:{side}")], &image([2, h, w]), Rng::new(0));
        let expected = if h <= w { [2, side, side * w / h] } else { [2, side * h / w, side] };
        prop_assert_eq!(got.shape(), expected);
        prop_assert_eq!(run(&[&format!("resize:{side}x3")], &image([2, h, w]), Rng::new(0)).shape(), [2, side, 3]);
    }

    #[test]
    fn random_resized_crop_takes_an_allowed_part(h in 40usize..160, w in 40usize..160, seed in any::<u64>()) {
        // Pixels tell their place, so the result tells the part: it spans its width from the first column to the last.
        let mut image = Image::default();
        let rows = (0..h).flat_map(|y| vec![y as u8; w]);
        image.assign([2, h, w], &rows.chain((0..h).flat_map(|_| 0..w as u8)).collect::<Vec<_>>());
        let n = 16;
        let got = run(&["random-resized-crop:16,0.25"], &image, Rng::new(seed));
        prop_assert_eq!(got.shape(), [2, n, n]);
        // Interior pixels, whose filter meets no border: 12 steps of 1/16 of the part.
        let span = |from: usize, to: usize| (f64::from(got.data[to]) - f64::from(got.data[from])) * n as f64 / 12.0;
        let (height, width) = (span(2 * n, 14 * n), span(n * n + 2, n * n + 14));
        let tolerance = 3.0;
        prop_assert!(height <= h as f64 + tolerance && width <= w as f64 + tolerance);
        let whole = (h * w) as f64;
        prop_assert!((height + tolerance) * (width + tolerance) >= 0.25 * whole, "{} {}", height, width);
        prop_assert!((width - tolerance) / (height + tolerance) <= 4.0 / 3.0 && (height - tolerance) / (width + tolerance) <= 4.0 / 3.0);
    }

    #[test]
    fn cutout_greys_a_square_cut_by_the_border(h in 1usize..12, w in 1usize..12, side in 1usize..8, seed in any::<u64>()) {
        let mut white = Image::default();
        white.assign([2, h, w], &vec![255; 2 * h * w]);
        let got = run(&[&format!("cutout:{side}")], &white, Rng::new(seed));
        let (first, second) = got.data.split_at(h * w);
        prop_assert_eq!(first, second);
        let grey: Vec<(usize, usize)> = (0..h * w).filter(|&i| first[i] == 128).map(|i| (i / w, i % w)).collect();
        prop_assert!(first.iter().all(|&v| v == 128 || v == 255) && !grey.is_empty());
        let range = |values: Vec<usize>, extent: usize| {
            let (low, high) = (*values.iter().min().unwrap(), *values.iter().max().unwrap());
            let length = high + 1 - low;
            // Shorter than asked only where it touches a border.
            (length == side || (length < side && (low == 0 || high + 1 == extent)), length)
        };
        let (rows, height) = range(grey.iter().map(|p| p.0).collect(), h);
        let (columns, width) = range(grey.iter().map(|p| p.1).collect(), w);
        prop_assert!(rows && columns && height * width == grey.len());
    }
}

#[test]
fn a_part_that_cannot_have_the_ratio_is_the_middle() {
    // 200 x 4: no part of at least nine tenths of the area is less than 4/3 as high as wide.
    let mut image = Image::default();
    image.assign([1, 200, 4], &(0..800u32).map(|i| (i / 4) as u8).collect::<Vec<_>>());
    let got = run(&["random-resized-crop:5,0.9"], &image, Rng::new(1));
    // 4 wide, 4 / (3/4) = 5 high, from row (200 - 5) / 2 = 97 on.
    assert_eq!(got.data.chunks(5).map(|row| row[0]).collect::<Vec<_>>(), [97, 98, 99, 100, 101]);
}

#[test]
fn colours_change_as_asked_and_no_more() {
    let image = image([3, 6, 7]);
    assert_eq!(run(&["color-jitter:0,0,0"], &image, Rng::new(1)), image);
    assert_eq!(run(&["color-jitter:0,0,0,0"], &image, Rng::new(1)), image);
    let mut factors = BTreeSet::new();
    let high = (0..image.data.len()).max_by_key(|&i| image.data[i]).unwrap();
    let top = f64::from(image.data[high]);
    for seed in 0..200 {
        let got = run(&["color-jitter:0.5,0,0"], &image, Rng::new(seed));
        // The brightest pixel tells the factor; all others follow from it.
        let (low, up) = (f64::from(got.data[high]) / top, (f64::from(got.data[high]) + 1.0) / top);
        assert!(got.data[high] == 255 || (0.49..=1.5).contains(&low));
        for (&from, &to) in image.data.iter().zip(&got.data).filter(|_| got.data[high] < 255) {
            assert!(f64::from(to) >= (f64::from(from) * low).floor() - 1.0 && f64::from(to) <= f64::from(from) * up + 1.0);
        }
        factors.insert(got.data[high]);
    }
    assert!(factors.len() > 60 && *factors.first().unwrap() < 140, "{factors:?}");

    // Without saturation all channels become the grey value; a hue turned on a grey image changes nothing.
    let grey = (0..500)
        .map(|seed| run(&["color-jitter:0,0,1"], &image, Rng::new(seed)))
        .map(|i| i.planes().next().unwrap().iter().zip(i.planes().nth(1).unwrap()).map(|(a, b)| u32::from(a.abs_diff(*b))).sum::<u32>());
    let own: u32 = image.planes().next().unwrap().iter().zip(image.planes().nth(1).unwrap()).map(|(a, b)| u32::from(a.abs_diff(*b))).sum();
    let spreads: Vec<u32> = grey.collect();
    assert!(*spreads.iter().min().unwrap() < own / 20 && *spreads.iter().max().unwrap() > own, "{own}");
    let mut flat = image.clone();
    flat.data = [&image.data[..42]; 3].concat();
    assert_eq!(run(&["color-jitter:0,0,0,0.5"], &flat, Rng::new(1)), flat);
    assert_ne!(run(&["color-jitter:0,0,0,0.5"], &image, Rng::new(1)), image);
}

#[test]
fn randaugment_draws_from_its_whole_list() {
    // Large enough for equalize to have something to spread.
    let image = image([3, 20, 20]);
    let fixed: BTreeSet<Vec<u8>> = (0..400).map(|seed| run(&["randaugment:1,20"], &image, Rng::new(seed)).data).collect();
    // Identity, two histogram changes, posterize and solarize once each, nine others with either sign.
    assert_eq!(fixed.len(), 23);
    let free: BTreeSet<Vec<u8>> = (0..2000).map(|seed| run(&["randaugment:1"], &image, Rng::new(seed)).data).collect();
    assert!(free.len() > 150, "{}", free.len());
    let two: BTreeSet<Vec<u8>> = (0..400).map(|seed| run(&["randaugment:2,20"], &image, Rng::new(seed)).data).collect();
    assert!(two.len() > 150, "{}", two.len());
}

#[test]
fn evaluation_keeps_sizes_and_drops_chance() {
    let image = image([3, 20, 30]);
    let eval = |specs: &[&str]| {
        let mut image = image.clone();
        Pipeline::parse(specs).unwrap().at_evaluation().apply(&mut image, &mut vec![], Rng::new(0));
        image
    };
    assert_eq!(eval(&["pad-crop:2", "flip", "color-jitter:1,1,1", "randaugment:2", "cutout:3", "mixup:1"]), image);
    assert_eq!(eval(&["resize:10", "center-crop:8", "flip"]), run(&["resize:10", "center-crop:8"], &image, Rng::new(7)));
    assert_eq!(eval(&["random-resized-crop:14", "flip"]), run(&["resize:16", "center-crop:14"], &image, Rng::new(7)));
}

#[test]
fn every_transform_refuses_what_does_not_fit() {
    let wrong = [
        "resize",
        "resize:0",
        "resize:5x",
        "resize:4097",
        "center-crop:0",
        "center-crop:5x5",
        "random-resized-crop:8,0",
        "random-resized-crop:8,1.1",
        "color-jitter:1,1",
        "color-jitter:1,1,-1",
        "color-jitter:1,1,1,0.6",
        "color-jitter:1,1,NaN",
        "randaugment:0",
        "randaugment:2,31",
        "randaugment:2,-1",
        "cutout:0",
        "mixup:0",
        "mixup:x",
        "cutmix:-1",
        "cutmix:inf",
    ];
    for spec in wrong {
        let name = spec.split(':').next().unwrap();
        let message = refusal(Pipeline::parse(&[spec]));
        assert!(message.contains(&format!("`{spec}`: expected `{name}:")), "{message}");
    }
    assert!(refusal(Pipeline::parse(&["cutmx:1"])).contains("did you mean `cutmix`?"));
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
