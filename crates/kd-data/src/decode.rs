//! Image files to bytes: png, jpeg and webp, told apart by their content, always as three channels (grey repeated, alpha dropped, 16 bits cut to
//! 8). An orientation noted in a photograph's metadata is not applied, as in PyTorch's image folders.

use std::io::Cursor;
use std::path::Path;

use ::image::{DynamicImage, ImageDecoder, ImageReader, Limits};

use crate::{Error, Image, Result};

/// Pixels along a side.
const MAX_SIDE: u32 = 16_384;
/// Pixels of an image.
const MAX_PIXELS: u64 = 100_000_000;

fn decoder<'a>(path: &Path, bytes: &'a [u8]) -> Result<impl ImageDecoder + 'a> {
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(Error::io(path))?;
    if reader.format().is_none() {
        return Err(Error::corrupt(path, "not an image: expected png, jpeg or webp"));
    }
    let mut limits = Limits::default();
    (limits.max_image_width, limits.max_image_height) = (Some(MAX_SIDE), Some(MAX_SIDE));
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(|e| Error::corrupt(path, format!("not readable as an image: {e}")))?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 || u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(Error::corrupt(path, format!("{width}x{height} pixels: expected 1 to {MAX_PIXELS}")));
    }
    Ok(decoder)
}

/// Height and width, from the file's head.
pub(crate) fn size(path: &Path, bytes: &[u8]) -> Result<[usize; 2]> {
    let (width, height) = decoder(path, bytes)?.dimensions();
    Ok([height as usize, width as usize])
}

/// Whether a file is a JPEG that ends before its image does. The decoder fills what is missing with grey and says nothing.
fn is_cut_short(bytes: &[u8]) -> bool {
    let Some(mut rest) = bytes.strip_prefix(&[0xFF, 0xD8]) else { return false };
    // Past the segments before the first scan: a thumbnail in them has an end of its own.
    loop {
        let length = match rest {
            // A byte that fills.
            [0xFF, 0xFF, ..] => 1,
            [0xFF, 0xDA, scan @ ..] => return !scan.windows(2).rev().any(|pair| pair == [0xFF, 0xD9]),
            [0xFF, _, high, low, ..] => 2 + usize::from(u16::from_be_bytes([*high, *low])),
            // What is no segment is for the decoder to judge.
            _ => return rest.len() < 4,
        };
        match rest.get(length..) {
            Some(next) => rest = next,
            None => return true,
        }
    }
}

/// The whole image.
pub(crate) fn decode(path: &Path, bytes: &[u8], into: &mut Image) -> Result<()> {
    let decoder = decoder(path, bytes)?;
    if is_cut_short(bytes) {
        return Err(Error::corrupt(path, "not readable as an image: the file is cut short"));
    }
    let decoded = DynamicImage::from_decoder(decoder).map_err(|e| Error::corrupt(path, format!("not readable as an image: {e}")))?;
    let rgb = decoded.into_rgb8();
    let (width, height) = (rgb.width() as usize, rgb.height() as usize);
    (into.channels, into.height, into.width) = (3, height, width);
    into.data.clear();
    into.data.reserve(rgb.len());
    for channel in 0..3 {
        into.data.extend(rgb.chunks_exact(3).map(|pixel| pixel[channel]));
    }
    Ok(())
}
