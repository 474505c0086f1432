//! How a batch is divided among threads, and sums that come out the same for any number of them.
//!
//! A batch has a fixed number of *lanes*, groups of neighbouring images that depend on nothing but the batch size. A thread of rayon's
//! current pool gets neighbouring lanes, the same ones in every layer and direction, so that its images stay in its cache. What is summed
//! over a batch (batch-norm moments, weight gradients) is summed per lane, image by image, and the lanes in their order: bits do not
//! depend on the number of threads.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Mutex;

use super::buffer::Aligned;
use super::clock;

/// Lanes of a batch that has at least as many images; also the most threads that a layer uses.
pub(crate) const LANES: usize = 16;

/// A batch cut into lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lanes {
    pub images: usize,
    pub count: usize,
    /// Whether one thread does it all: the calling one.
    pub alone: bool,
}

/// The part of a batch that one thread works on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    pub lanes: Range<usize>,
    pub images: Range<usize>,
}

impl Lanes {
    pub(crate) fn new(images: usize) -> Self {
        Self::at_most(images, LANES)
    }

    /// Fewer lanes, for sums that are too big to have many of.
    pub(crate) fn at_most(images: usize, count: usize) -> Self {
        Self { images, count: count.min(images), alone: false }
    }

    /// For a part of a batch that the calling thread works on alone.
    pub(crate) fn alone(images: usize) -> Self {
        Self { alone: true, ..Self::new(images) }
    }

    /// The images of a lane.
    pub(crate) fn lane(&self, lane: usize) -> Range<usize> {
        lane * self.images / self.count..(lane + 1) * self.images / self.count
    }

    /// The lane of an image.
    pub(crate) fn of(&self, image: usize) -> usize {
        ((image + 1) * self.count - 1) / self.images
    }

    /// What each thread of the current pool gets.
    pub(crate) fn shares(&self) -> Vec<Share> {
        let threads = if self.alone { 1 } else { rayon::current_num_threads().min(self.count) };
        (0..threads)
            .map(|t| {
                let lanes = t * self.count / threads..(t + 1) * self.count / threads;
                let images = self.lane(lanes.start).start..self.lane(lanes.end - 1).end;
                Share { lanes, images }
            })
            .collect()
    }
}

/// Runs `f` on every part at once, part k on thread k of the current pool (so at most as many parts as threads).
pub(crate) fn each<T: Send>(parts: Vec<T>, f: impl Fn(T) + Sync) {
    if parts.len() <= 1 {
        return parts.into_iter().for_each(f);
    }
    let slots: Vec<Mutex<Option<T>>> = parts.into_iter().map(|p| Mutex::new(Some(p))).collect();
    let here = clock::here();
    rayon::broadcast(|thread| {
        let part = slots.get(thread.index()).and_then(|slot| slot.lock().unwrap_or_else(|e| e.into_inner()).take());
        if let Some(part) = part {
            clock::helping(here, || f(part));
        }
    });
}

/// Nearly equal ranges of `0..n`, one for each thread of the current pool.
pub(crate) fn ranges(n: usize) -> Vec<Range<usize>> {
    let threads = rayon::current_num_threads().min(n);
    (0..threads).map(|t| t * n / threads..(t + 1) * n / threads).collect()
}

/// Cuts a slice into consecutive parts of the given lengths.
pub(crate) fn cut<T>(mut x: &mut [T], lengths: impl IntoIterator<Item = usize>) -> Vec<&mut [T]> {
    let mut parts = vec![];
    for len in lengths {
        let (part, rest) = x.split_at_mut(len);
        parts.push(part);
        x = rest;
    }
    parts
}

/// Lends this thread's scratch memory, of whatever content. Not to be nested.
pub(crate) fn scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    thread_local! {
        static SCRATCH: RefCell<Aligned> = RefCell::new(Aligned::new(0));
    }
    SCRATCH.with_borrow_mut(|s| {
        if s.len() < len {
            *s = Aligned::new(len);
        }
        f(&mut s.slice_mut()[..len])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_the_batch_and_keep_lanes_whole() {
        for threads in 1..5 {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for images in [1, 5, 16, 37, 64] {
                let lanes = Lanes::new(images);
                let shares = pool.install(|| lanes.shares());
                assert!(shares.len() <= threads);
                let covered: Vec<usize> = shares.iter().flat_map(|s| s.images.clone()).collect();
                assert_eq!(covered, (0..images).collect::<Vec<_>>());
                let by_lane: Vec<usize> = shares.iter().flat_map(|s| s.lanes.clone()).flat_map(|l| lanes.lane(l)).collect();
                assert_eq!(by_lane, covered);
                assert!((0..lanes.count).all(|l| lanes.lane(l).all(|i| lanes.of(i) == l)));
            }
        }
    }

    #[test]
    fn every_part_runs_once() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let mut hits = vec![0; 10];
        pool.install(|| each(cut(&mut hits, [3, 3, 4]), |part| part.iter_mut().for_each(|h| *h += 1)));
        assert_eq!(hits, [1; 10]);
    }
}
