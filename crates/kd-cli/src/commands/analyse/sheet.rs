//! Sheets of images as PNG.

use std::io::Cursor;

use anyhow::{Context, Result};
use image::{ImageFormat, Rgb, RgbImage};
use kd_data::Image;

/// Height and width of a tile.
const TILE: usize = 96;
const GAP: usize = 6;

/// The images of each row beside each other, all scaled to the same tiles, as a PNG file.
pub(super) fn png(rows: &[Vec<Image>]) -> Result<Vec<u8>> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let side = |n: usize| (n * (TILE + GAP) + GAP) as u32;
    let mut sheet = RgbImage::from_pixel(side(columns), side(rows.len()), Rgb([255; 3]));
    for (row, images) in rows.iter().enumerate() {
        for (column, image) in images.iter().enumerate() {
            let corner = [row, column].map(|i| i * (TILE + GAP) + GAP);
            paste(&mut sheet, image, corner);
        }
    }
    let mut bytes = Cursor::new(vec![]);
    sheet.write_to(&mut bytes, ImageFormat::Png).context("cannot encode the sheet")?;
    Ok(bytes.into_inner())
}

/// Centred in its tile; small images keep their pixels visible, large ones are averaged down.
fn paste(sheet: &mut RgbImage, image: &Image, [top, left]: [usize; 2]) {
    let longer = image.height.max(image.width).max(1);
    let mut small = image.clone();
    if longer > TILE {
        let scaled = |n: usize| (n * TILE / longer).max(1);
        small.resize(&mut vec![], [scaled(image.height), scaled(image.width)]);
    }
    let zoom = (TILE / small.height.max(small.width).max(1)).max(1);
    let plane = small.height * small.width;
    let (down, across) = ((TILE - small.height * zoom) / 2, (TILE - small.width * zoom) / 2);
    for y in 0..small.height * zoom {
        for x in 0..small.width * zoom {
            let at = y / zoom * small.width + x / zoom;
            // Grey images have one plane.
            let value = |channel: usize| small.data[channel.min(small.channels - 1) * plane + at];
            sheet.put_pixel((left + across + x) as u32, (top + down + y) as u32, Rgb([value(0), value(1), value(2)]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_keep_their_pixels_in_place() {
        let grey = Image { channels: 1, height: 2, width: 2, data: vec![10, 20, 30, 40] };
        let large = Image { channels: 3, height: 300, width: 100, data: vec![90; 90_000] };
        let sheet = image::load_from_memory(&png(&[vec![grey.clone(), large], vec![grey]]).unwrap()).unwrap().to_rgb8();
        assert_eq!((sheet.width(), sheet.height()), (210, 210));
        assert_eq!(sheet.get_pixel(GAP as u32 + 95, GAP as u32), &Rgb([20; 3]));
        assert_eq!(sheet.get_pixel(GAP as u32, GAP as u32 + 102 + 95), &Rgb([30; 3]));
        // 300 x 100 becomes 96 x 32 in the middle of its tile.
        assert_eq!(sheet.get_pixel(108 + 33, 50), &Rgb([90; 3]));
        assert_eq!(sheet.get_pixel(108 + 31, 50), &Rgb([255; 3]));
        assert_eq!(sheet.get_pixel(150, 150), &Rgb([255; 3]));
    }
}
