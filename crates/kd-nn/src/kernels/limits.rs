//! What the machine can do at most: multiply-adds, and reading and copying of large memory.

#![allow(unsafe_code, reason = "vectors are loaded from and stored to slices whose lengths are checked before")]

use std::hint::black_box;
use std::time::Instant;

use super::vector::{Kernel, Level, Vector};

/// `rounds` times 12 independent fused multiply-adds.
struct MultiplyAdds {
    rounds: usize,
}

impl Kernel for MultiplyAdds {
    type Output = f32;

    #[inline(always)]
    fn run<V: Vector>(self) -> f32 {
        let (a, b) = (V::splat(black_box(0.999)), V::splat(black_box(0.001)));
        let mut s = [V::splat(0.0); 12];
        for _ in 0..self.rounds {
            unroll!(i in 0 1 2 3 4 5 6 7 8 9 10 11 => {
                s[i] = b.fma(s[i], a);
            });
        }
        let mut sum = [0.0f32; 16];
        for v in s {
            // SAFETY: sixteen floats hold a vector of any level.
            unsafe { V::load(sum.as_ptr()).add(v).store(sum.as_mut_ptr()) };
        }
        sum.iter().sum()
    }
}

/// Sums a slice.
struct Read<'a>(&'a [f32]);

impl Kernel for Read<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<V: Vector>(self) -> f32 {
        let mut s = [V::splat(0.0); 8];
        for part in self.0.chunks_exact(8 * V::LANES) {
            unroll!(i in 0 1 2 3 4 5 6 7 => {
                // SAFETY: the part has eight vectors.
                s[i] = s[i].add(unsafe { V::load(part.as_ptr().add(i * V::LANES)) });
            });
        }
        let mut sum = [0.0f32; 16];
        for v in s {
            // SAFETY: sixteen floats hold a vector of any level.
            unsafe { V::load(sum.as_ptr()).add(v).store(sum.as_mut_ptr()) };
        }
        sum.iter().sum()
    }
}

/// Calls `f` on every thread of the current pool at the same time; the work of all per second, by the best of `times` tries.
fn best(times: usize, work: f64, f: impl Fn() + Sync) -> f64 {
    let try_once = |_| {
        let begun = Instant::now();
        rayon::broadcast(|_| f());
        work * rayon::current_num_threads() as f64 / begun.elapsed().as_secs_f64()
    };
    (0..times).map(try_once).fold(0.0, f64::max)
}

/// Additions and multiplications per second of all threads of the current pool.
pub(crate) fn flops(level: Level) -> f64 {
    let rounds = 2_000_000;
    best(8, (rounds * 12 * 2 * level.lanes()) as f64, || {
        black_box(level.run(MultiplyAdds { rounds }));
    })
}

/// Bytes per second that all threads of the current pool read, and copy (each byte counted once), outside the caches.
pub(crate) fn bandwidth(level: Level) -> [f64; 2] {
    const FLOATS: usize = 16 << 20;
    thread_local! {
        static MEMORY: std::cell::RefCell<Vec<f32>> = const { std::cell::RefCell::new(vec![]) };
    }
    let with = |f: &dyn Fn(&mut [f32])| {
        MEMORY.with_borrow_mut(|m| {
            m.resize(FLOATS, 1.0);
            f(m);
        });
    };
    rayon::broadcast(|_| with(&|_| {}));
    let read = best(5, 4.0 * FLOATS as f64, || {
        with(&|m| {
            black_box(level.run(Read(m)));
        });
    });
    let copy = best(5, 2.0 * FLOATS as f64, || {
        with(&|m| {
            let (from, to) = m.split_at_mut(FLOATS / 2);
            to.copy_from_slice(from);
        });
    });
    rayon::broadcast(|_| MEMORY.with_borrow_mut(|m| *m = vec![]));
    [read, copy]
}
