//! One image as planes of bytes.

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

    /// The rows of all planes, top to bottom.
    pub fn rows_mut(&mut self) -> impl Iterator<Item = &mut [u8]> {
        self.data.chunks_exact_mut(self.width.max(1))
    }

    /// `[channels, height, width]`.
    pub fn shape(&self) -> [usize; 3] {
        [self.channels, self.height, self.width]
    }
}
