//! CPU kernels of the fused executor: f32, channels last (`[image][row][column][channel]`), written once over a small vector trait.
//!
//! | module | holds |
//! |---|---|
//! | `vector` | the vector trait and the [`Level`]s: AVX-512, AVX2 with FMA, portable; chosen at run time, `KD_CPU` forces one |
//! | `tile` | the two register kernels, and the packing of weights for them |
//! | `sweep` | images with zeros around them, and walks over their pixels |
//! | `conv`, `depthwise` | convolution and its gradients as sweeps of these kernels |
//! | `winograd` | 3x3 convolutions of stride 1 with a quarter of the multiplications |
//! | `norm` | batch norm, and what is done while an image is copied or added |
//! | `pool`, `elementwise`, `layout` | pooling, functions of one element, moving channels |
//! | `threads` | who works on which images; sums that do not depend on it |
//! | `buffer` | aligned memory that is used again |
//! | `clock`, `limits` | how long kernels take, and how fast the machine is |

/// The same block for each of some numbers. Loops over a tile are not always unrolled, and then the tile is not in registers.
macro_rules! unroll {
    ($i:ident in $($n:literal)+ => $body:block) => {
        $({
            let $i: usize = $n;
            $body
        })+
    };
}

/// The same block for every vector of channels, `$c` the first one's number: whole vectors, then what is left. A block, not a closure: a
/// closure that is not inlined is compiled without the level's instructions.
macro_rules! lanes {
    ($v:ident, $channels:expr, $c:ident, $lane:ident => $body:block) => {{
        let channels = $channels;
        let mut $c = 0;
        while $c + $v::LANES <= channels {
            let $lane = $crate::kernels::vector::Lane::<$v>::whole();
            $body
            $c += $v::LANES;
        }
        if $c < channels {
            let $lane = $crate::kernels::vector::Lane::<$v>::first(channels - $c);
            $body
        }
    }};
}

pub(crate) mod buffer;
pub(crate) mod clock;
pub(crate) mod conv;
mod depthwise;
pub(crate) mod elementwise;
pub(crate) mod layout;
pub(crate) mod limits;
pub(crate) mod norm;
pub(crate) mod pool;
pub(crate) mod sweep;
pub(crate) mod threads;
pub(crate) mod tile;
mod vector;
pub(crate) mod winograd;

pub use vector::{Level, missing_for_bf16};
