//! What a weight file may cost at most. Real files stay far below.

/// Bytes of a pickle (a real one holds names and shapes, not numbers).
pub const PICKLE_BYTES: usize = 64 << 20;
/// Instructions of a pickle.
pub const PICKLE_STEPS: usize = 1_000_000;
/// Tensors, and members of a zip archive.
pub const TENSORS: usize = 100_000;
/// Bytes of a name.
pub const NAME: usize = 10_000;
/// Dimensions of a tensor.
pub const DIMENSIONS: usize = 8;
/// Bytes of all tensors together, as a multiple of the file's size. Tensors may share a storage (tied weights), but not without end.
pub const EXPANSION: usize = 4;
