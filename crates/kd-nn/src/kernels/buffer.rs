//! Memory of the fused executor: cache-line aligned, returned to a pool when dropped, never given back to the system in between.

#![allow(unsafe_code)]

use std::sync::{Arc, Mutex};

/// One cache line, and one vector of the widest level.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Floats that begin at a cache line.
pub(crate) struct Aligned(Vec<Line>);

impl Aligned {
    /// At least `len` zeros.
    pub(crate) fn new(len: usize) -> Self {
        Self(vec![Line([0.0; 16]); len.div_ceil(16)])
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len() * 16
    }

    pub(crate) fn slice(&self) -> &[f32] {
        // SAFETY: a `Line` is sixteen floats without padding, so n lines are 16 n floats.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.len()) }
    }

    pub(crate) fn slice_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `slice`; the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.len()) }
    }
}

/// Free memory of one network. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct Pool(Arc<Mutex<Vec<Aligned>>>);

impl Pool {
    /// `len` floats of whatever content.
    pub(crate) fn take(&self, len: usize) -> Buffer {
        let mut free = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let fits = |a: &Aligned| a.len() >= len && a.len() <= 2 * len + 64;
        let best = (0..free.len()).filter(|&i| fits(&free[i])).min_by_key(|&i| free[i].len());
        let memory = best.map_or_else(|| Aligned::new(len), |i| free.swap_remove(i));
        Buffer { memory, len, pool: self.clone() }
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
        let memory = std::mem::replace(&mut self.memory, Aligned(vec![]));
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
        let again = pool.zeros(900);
        assert_eq!((again.as_ptr(), again.len()), (at, 900));
        assert!(again.iter().all(|&v| v == 0.0));
        assert_ne!(pool.take(900).as_ptr(), at);
        assert_ne!(pool.take(10).as_ptr(), at);
    }
}
