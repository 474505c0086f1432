//! Resizing bytes with the triangle filter, to the bit as Pillow's `BILINEAR` (torchvision's default for images).
//!
//! An output pixel is the weighted mean of the input pixels around its centre. The weights fall linearly to 0 at one input pixel's distance, or at
//! one *output* pixel's when shrinking, so that nothing is skipped (antialiasing). First rows, then columns; weights are integers of 22 fractional
//! bits and the values between the two passes are bytes, which is what makes the result Pillow's own.

const FRACTION: u32 = 22;
const HALF: i32 = 1 << (FRACTION - 1);

/// For each output pixel along one axis: the first input pixel and the weights from there on.
fn weights(from: usize, to: usize) -> Vec<(usize, Vec<i32>)> {
    let scale = from as f64 / to as f64;
    let support = scale.max(1.0);
    let weights_of = |pixel| {
        let centre = (pixel as f64 + 0.5) * scale;
        // Float-to-integer casts round towards zero, and what is negative becomes 0.
        let first = (centre - support + 0.5) as usize;
        let end = ((centre + support + 0.5) as usize).min(from);
        let raw: Vec<f64> = (first..end).map(|i| (1.0 - ((i as f64 - centre + 0.5) / support).abs()).max(0.0)).collect();
        let sum: f64 = raw.iter().sum();
        (first, raw.iter().map(|w| (w / sum * f64::from(1 << FRACTION) + 0.5) as i32).collect())
    };
    (0..to).map(weights_of).collect()
}

fn to_byte(sum: i32) -> u8 {
    (sum >> FRACTION).clamp(0, 255) as u8
}

/// Resizes one plane of `[height, width]` bytes into `to`, of `[to_height, to_width]`.
pub(crate) fn resize(from: &[u8], [height, width]: [usize; 2], to: &mut [u8], [to_height, to_width]: [usize; 2]) {
    let mut narrow = vec![0; height * to_width];
    if width == to_width {
        narrow.copy_from_slice(from);
    } else {
        let columns = weights(width, to_width);
        for (row, out) in from.chunks_exact(width).zip(narrow.chunks_exact_mut(to_width)) {
            for (out, (first, weights)) in out.iter_mut().zip(&columns) {
                let sum: i32 = row[*first..].iter().zip(weights).map(|(&v, w)| i32::from(v) * w).sum();
                *out = to_byte(HALF + sum);
            }
        }
    }
    if height == to_height {
        to.copy_from_slice(&narrow);
        return;
    }
    let mut sums = vec![0; to_width];
    for (out, (first, weights)) in to.chunks_exact_mut(to_width).zip(weights(height, to_height)) {
        sums.fill(HALF);
        for (row, weight) in narrow.chunks_exact(to_width).skip(first).zip(weights) {
            sums.iter_mut().zip(row).for_each(|(sum, &v)| *sum += i32::from(v) * weight);
        }
        out.iter_mut().zip(&sums).for_each(|(out, &sum)| *out = to_byte(sum));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PILLOW: [([usize; 2], &[u8]); 4] = [
        ([2, 3], &[59, 95, 123, 172, 108, 210]),
        ([3, 2], &[53, 98, 104, 136, 168, 187]),
        (
            [4, 8],
            &[
                0, 16, 44, 113, 127, 86, 87, 90, 108, 87, 64, 82, 93, 99, 145, 181, 177, 155, 123, 79, 87, 148, 197, 232, 186, 197, 200,
                105, 111, 218, 226, 224,
            ],
        ),
        ([1, 5], &[127, 104, 83, 136, 191]),
    ];

    #[test]
    fn equals_pillow() {
        // Pillow 13.0.0: Image.frombytes("L", (5, 3), bytes(...)).resize(size, Image.BILINEAR).
        let image: Vec<u8> = (0..15u32).map(|i| (i * i * 37 % 251) as u8).collect();
        for ([height, width], expected) in PILLOW {
            let mut got = vec![0; height * width];
            resize(&image, [3, 5], &mut got, [height, width]);
            assert_eq!(got, expected, "{height}x{width}");
        }
    }

    #[test]
    fn every_pixel_of_a_flat_image_stays() {
        for (from, to) in [([1, 1], [7, 9]), ([13, 4], [5, 5]), ([300, 200], [1, 1])] {
            let mut got = vec![0; to[0] * to[1]];
            resize(&vec![201; from[0] * from[1]], from, &mut got, to);
            assert!(got.iter().all(|&v| v == 201));
        }
    }
}
