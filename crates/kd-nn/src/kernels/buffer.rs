//! Memory of the fused executor: cache-line aligned, returned to a pool when dropped, never given back to the system in between.

#![allow(unsafe_code, reason = "cache lines are seen as floats")]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// One cache line, and one vector of the widest level.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Floats that begin at a cache line, each time at another one of a page: what is at the same place of two tensors would otherwise
/// contend for the same place of the cache, and a load would seem to depend on a store.
pub(crate) struct Aligned {
    lines: Vec<Line>,
    /// Lines left out at the beginning.
    skipped: usize,
}

#[cfg(test)]
thread_local! {
    /// How often this thread has asked the system for memory.
    pub(crate) static ALLOCATED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Lines of a page.
const PAGE: usize = 64;

impl Aligned {
    /// At least `len` zeros.
    pub(crate) fn new(len: usize) -> Self {
        #[cfg(test)]
        ALLOCATED.set(ALLOCATED.get() + 1);
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let skipped = NEXT.fetch_add(11, Ordering::Relaxed) % PAGE;
        Self { lines: vec![Line([0.0; 16]); len.div_ceil(16) + skipped], skipped }
    }

    pub(crate) fn len(&self) -> usize {
        (self.lines.len() - self.skipped) * 16
    }

    pub(crate) fn slice(&self) -> &[f32] {
        // SAFETY: a `Line` is sixteen floats without padding, so n lines are 16 n floats.
        unsafe { std::slice::from_raw_parts(self.lines[self.skipped..].as_ptr().cast(), self.len()) }
    }

    pub(crate) fn slice_mut(&mut self) -> &mut [f32] {
        let len = self.len();
        // SAFETY: as in `slice`; the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.lines[self.skipped..].as_mut_ptr().cast(), len) }
    }
}

/// Free memory of one network. Clones share it.
///
/// Memory comes in sizes of its own, eight to a doubling, and is used again for its own size only. So what a step needs of each size does
/// not depend on what earlier steps have left: once a step has been made, the same step finds everything here.
#[derive(Clone, Default)]
pub(crate) struct Pool(Arc<Mutex<Vec<Aligned>>>);

/// The size of memory that serves `len` floats: at most an eighth more.
fn size(len: usize) -> usize {
    len.next_multiple_of((len.next_power_of_two() / 16).max(16))
}

impl Pool {
    /// `len` floats of whatever content.
    pub(crate) fn take(&self, len: usize) -> Buffer {
        let size = size(len);
        let mut free = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let found = free.iter().rposition(|a| a.len() == size).map(|i| free.swap_remove(i));
        drop(free);
        Buffer { memory: found.unwrap_or_else(|| Aligned::new(size)), len, pool: self.clone() }
    }

    /// `len` zeros.
    pub(crate) fn zeros(&self, len: usize) -> Buffer {
        let mut buffer = self.take(len);
        buffer.fill(0.0);
        buffer
    }
}

/// Floats on loan from a [`Pool`].
pub(crate) struct Buffer {
    memory: Aligned,
    len: usize,
    pool: Pool,
}

impl std::ops::Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.memory.slice()[..self.len]
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.memory.slice_mut()[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let memory = std::mem::replace(&mut self.memory, Aligned { lines: vec![], skipped: 0 });
        self.pool.0.lock().unwrap_or_else(|e| e.into_inner()).push(memory);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_comes_back() {
        let pool = Pool::default();
        let first = pool.take(1000);
        assert!((first.as_ptr() as usize).is_multiple_of(64));
        let at = first.as_ptr();
        drop(first);
        let again = pool.zeros(990);
        assert_eq!((again.as_ptr(), again.len()), (at, 990));
        assert!(again.iter().all(|&v| v == 0.0));
        assert_ne!(pool.take(1000).as_ptr(), at);
        drop(again);
        assert_ne!(pool.take(10).as_ptr(), at);
        assert_eq!(pool.take(1000).as_ptr(), at);
    }

    #[test]
    fn sizes_are_few_and_hardly_larger() {
        assert_eq!([0, 1, 16, 17, 1 << 20, (1 << 20) + 1].map(size), [0, 16, 16, 32, 1 << 20, 9 << 17]);
        assert!((64..100_000).all(|n| (n..n + n / 8 + 16).contains(&size(n)) && size(size(n)) == size(n)));
        let sizes: std::collections::BTreeSet<usize> = (1 << 16..1 << 17).map(size).collect();
        assert_eq!(sizes.len(), 9);
    }
}
