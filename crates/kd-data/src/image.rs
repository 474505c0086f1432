//! One image as planes of bytes.

use crate::resize;

/// An image of `channels` planes, each `height` rows of `width` bytes: what a data set holds and a transform changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// Planes.
    pub channels: usize,
    /// Rows of a plane.
    pub height: usize,
    /// Pixels of a row.
    pub width: usize,
    /// `channels * height * width` bytes.
    pub data: Vec<u8>,
}

impl Image {
    /// Becomes a copy of `data`, keeping its allocation.
    pub fn assign(&mut self, [channels, height, width]: [usize; 3], data: &[u8]) {
        debug_assert_eq!(data.len(), channels * height * width);
        (self.channels, self.height, self.width) = (channels, height, width);
        self.data.clear();
        self.data.extend_from_slice(data);
    }

    /// `[channels, height, width]`.
    pub fn shape(&self) -> [usize; 3] {
        [self.channels, self.height, self.width]
    }

    /// The planes.
    pub fn planes(&self) -> impl Iterator<Item = &[u8]> {
        self.data.chunks_exact((self.height * self.width).max(1))
    }

    /// The planes.
    pub fn planes_mut(&mut self) -> impl Iterator<Item = &mut [u8]> {
        self.data.chunks_exact_mut((self.height * self.width).max(1))
    }

    /// The rows of all planes, top to bottom.
    pub fn rows_mut(&mut self) -> impl Iterator<Item = &mut [u8]> {
        self.data.chunks_exact_mut(self.width.max(1))
    }

    /// Becomes the part of `height` x `width` pixels whose corner is (`top`, `left`), which may lie outside: what no pixel covers is black.
    /// `spare` is a buffer to build it in.
    pub fn crop(&mut self, spare: &mut Vec<u8>, [top, left]: [isize; 2], [height, width]: [usize; 2]) {
        spare.clear();
        spare.resize(self.channels * height * width, 0);
        // The rows and columns of the result that show the image.
        let (rows, columns) = (overlap(top, height, self.height), overlap(left, width, self.width));
        if !rows.is_empty() && !columns.is_empty() {
            let first_row = rows.start.wrapping_add_signed(top);
            let first_column = columns.start.wrapping_add_signed(left);
            for (from, to) in self.planes().zip(spare.chunks_exact_mut(height * width)) {
                let from = from.chunks_exact(self.width).skip(first_row);
                for (from, to) in from.zip(to.chunks_exact_mut(width).skip(rows.start).take(rows.len())) {
                    to[columns.clone()].copy_from_slice(&from[first_column..first_column + columns.len()]);
                }
            }
        }
        std::mem::swap(&mut self.data, spare);
        (self.height, self.width) = (height, width);
    }

    /// Becomes `height` x `width` pixels large, antialiased, as Pillow's `BILINEAR` and torchvision's default have it.
    pub fn resize(&mut self, spare: &mut Vec<u8>, [height, width]: [usize; 2]) {
        if [height, width] == [self.height, self.width] {
            return;
        }
        spare.clear();
        spare.resize(self.channels * height * width, 0);
        for (from, to) in self.planes().zip(spare.chunks_exact_mut(height * width)) {
            resize::resize(from, [self.height, self.width], to, [height, width]);
        }
        std::mem::swap(&mut self.data, spare);
        (self.height, self.width) = (height, width);
    }
}

/// The positions of a window of `length` from `start` on that lie within `0..extent`, counted in the window.
fn overlap(start: isize, length: usize, extent: usize) -> std::ops::Range<usize> {
    let first = start.min(0).unsigned_abs().min(length);
    let end = (extent as isize - start).clamp(first as isize, length as isize) as usize;
    first..end
}
