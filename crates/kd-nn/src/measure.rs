//! Measurements that a profile or a benchmark is judged by: what the machine can do, what a convolution alone takes.

pub use crate::fused::alone::Alone;
use crate::kernels::{Level, limits};

/// The limits of the machine for the threads of rayon's current pool.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// The instruction set.
    pub level: Level,
    /// Threads.
    pub threads: usize,
    /// Additions and multiplications per second, fused in pairs and all in registers.
    pub flops: f64,
    /// Bytes read per second outside the caches.
    pub read: f64,
    /// Bytes copied per second outside the caches.
    pub copy: f64,
}

impl Machine {
    /// Measures for a fraction of a second.
    pub fn measure() -> Self {
        let level = Level::current();
        let [read, copy] = limits::bandwidth(level);
        Self { level, threads: rayon::current_num_threads(), flops: limits::flops(level), read, copy }
    }
}
