//! One vector of f32 and the instruction sets that have it.
//!
//! A kernel is written once against [`Vector`] and entered through [`Level::run`], which compiles it for every level and picks one at run time.

#![allow(unsafe_code, reason = "instructions of a level are called once it is known to be there")]

use std::sync::OnceLock;

use super::clock::{Cost, Watch};

/// An instruction set that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// 16 lanes, 32 registers.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// 8 lanes, 16 registers, fused multiply-add.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Plain Rust on arrays of 4; products and sums rounded separately.
    Portable,
}

impl Level {
    /// The level of this process: the best that the CPU has, or the one named by the environment variable `KD_CPU`
    /// (`avx512`, `avx2`, `portable`) when the CPU has that.
    pub fn current() -> Self {
        static LEVEL: OnceLock<Level> = OnceLock::new();
        *LEVEL.get_or_init(|| {
            let levels = Self::available();
            let forced = std::env::var("KD_CPU").ok();
            levels.iter().copied().find(|l| forced.as_deref() == Some(l.name())).unwrap_or(levels[0])
        })
    }

    /// Every level that this CPU has, best first.
    pub fn available() -> Vec<Self> {
        let mut levels = vec![];
        #[cfg(target_arch = "x86_64")]
        {
            if std::arch::is_x86_feature_detected!("avx512f") && std::arch::is_x86_feature_detected!("fma") {
                levels.push(Self::Avx512);
            }
            if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
                levels.push(Self::Avx2);
            }
        }
        levels.push(Self::Portable);
        levels
    }

    /// Its name in `KD_CPU`.
    pub fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }

    /// Floats in a vector.
    pub(crate) fn lanes(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => Avx512::LANES,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => Avx2::LANES,
            Self::Portable => Portable::LANES,
        }
    }

    /// Rows of the register tile by its vectors: entry `q - 1` is the most rows that `q` vectors leave registers for.
    pub(crate) fn tile_rows(self) -> &'static [usize] {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => Avx512::TILE_ROWS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => Avx2::TILE_ROWS,
            Self::Portable => Portable::TILE_ROWS,
        }
    }

    /// Runs a kernel compiled for this level.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        let watch = Watch::start(|| kernel.cost());
        let out = match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => Avx512::call(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => Avx2::call(kernel),
            Self::Portable => Portable::call(kernel),
        };
        if let Some(watch) = watch {
            watch.stop(K::NAME);
        }
        out
    }
}

/// What this CPU lacks for matrix products of bf16 tiles, by the names in `/proc/cpuinfo`; empty when it has all.
pub fn missing_for_bf16() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        // Leaf 7, EDX; std detects AMX on nightly only.
        #[allow(unused_unsafe, reason = "safe in newer versions of std")]
        // SAFETY: every x86-64 CPU has the instruction, and leaf 0 says which others it answers.
        let flags = unsafe {
            use std::arch::x86_64::{__cpuid, __cpuid_count};
            if __cpuid(0).eax < 7 { 0 } else { __cpuid_count(7, 0).edx }
        };
        [("amx_bf16", 22), ("amx_tile", 24)].into_iter().filter(|(_, bit)| flags >> bit & 1 == 0).map(|(name, _)| name).collect()
    }
    #[cfg(not(target_arch = "x86_64"))]
    vec!["amx_bf16", "amx_tile"]
}

/// A computation written for any [`Vector`].
pub(crate) trait Kernel {
    type Output;
    /// What a profile calls it.
    const NAME: &'static str = "other";

    /// What it is about to do, for a profile.
    fn cost(&self) -> Cost {
        Cost::default()
    }

    /// Implementations are `#[inline(always)]`, so that the body is compiled with the instructions of the level that calls it.
    fn run<V: Vector>(self) -> Self::Output;
}

/// A vector of [`Vector::LANES`] floats.
///
/// Invariant behind every `unsafe` intrinsic of the implementations: values of a vector type exist only inside a kernel
/// entered through [`Level::run`], and a [`Level`] is only handed out when the CPU has its instructions.
pub(crate) trait Vector: Copy + 'static {
    const LANES: usize;
    /// See [`Level::tile_rows`].
    const TILE_ROWS: &'static [usize];
    /// Selects the first lanes.
    type Mask: Copy;

    /// Runs a kernel as a function of its own, compiled for this level. (Implementations carry `#[inline(never)]` here: on a function
    /// with `#[target_feature]` rustc 1.95 drops it, and all tiles would end in one function with their sums on the stack.)
    fn call<K: Kernel>(kernel: K) -> K::Output;

    /// Asks for the cache line of an address, which need not be valid.
    fn prefetch(p: *const f32);
    fn splat(x: f32) -> Self;
    /// The mask of the first `n` lanes, `n <= LANES`.
    fn first(n: usize) -> Self::Mask;

    /// # Safety
    /// `p` must be valid for reading `LANES` floats.
    unsafe fn load(p: *const f32) -> Self;
    /// Zero in the lanes outside the mask.
    ///
    /// # Safety
    /// `p` must be valid for reading the floats of the mask.
    unsafe fn load_masked(p: *const f32, mask: Self::Mask) -> Self;
    /// # Safety
    /// `p` must be valid for writing `LANES` floats.
    unsafe fn store(self, p: *mut f32);
    /// # Safety
    /// `p` must be valid for writing the floats of the mask.
    unsafe fn store_masked(self, p: *mut f32, mask: Self::Mask);

    /// `self + a * b`, in one rounding where the level has the instruction.
    fn fma(self, a: Self, b: Self) -> Self;
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    /// `max(self, 0)`, a NaN staying NaN.
    fn relu(self) -> Self;
    /// The lesser of `self` and `other`; a NaN of `self` stays NaN.
    fn min(self, other: Self) -> Self;
    /// `self` where `by > 0`, else 0.
    fn where_positive(self, by: Self) -> Self;
}

/// A vector's worth of channels: all lanes, or the first of them.
#[derive(Clone, Copy)]
pub(crate) struct Lane<V: Vector> {
    mask: V::Mask,
    whole: bool,
}

impl<V: Vector> Lane<V> {
    #[inline(always)]
    pub(crate) fn whole() -> Self {
        Self { mask: V::first(V::LANES), whole: true }
    }

    #[inline(always)]
    pub(crate) fn first(lanes: usize) -> Self {
        Self { mask: V::first(lanes), whole: false }
    }

    /// # Safety
    /// `p` must be valid for reading the lanes.
    #[inline(always)]
    pub(crate) unsafe fn load(self, p: *const f32) -> V {
        // SAFETY: as the caller says.
        unsafe { if self.whole { V::load(p) } else { V::load_masked(p, self.mask) } }
    }

    /// # Safety
    /// `p` must be valid for writing the lanes.
    #[inline(always)]
    pub(crate) unsafe fn store(self, v: V, p: *mut f32) {
        // SAFETY: as the caller says.
        unsafe { if self.whole { v.store(p) } else { v.store_masked(p, self.mask) } }
    }
}

/// Floats from `at` on of a slice: a whole vector, or what is left of it.
#[inline(always)]
pub(crate) fn read<V: Vector>(x: &[f32], at: usize) -> V {
    let left = &x[at..];
    if left.len() >= V::LANES {
        // SAFETY: LANES floats are left in the slice.
        unsafe { V::load(left.as_ptr()) }
    } else {
        // SAFETY: the mask selects what is left in the slice.
        unsafe { V::load_masked(left.as_ptr(), V::first(left.len())) }
    }
}

/// Writes `v` to `x[at..]`, as much of it as fits.
#[inline(always)]
pub(crate) fn write<V: Vector>(v: V, x: &mut [f32], at: usize) {
    let left = &mut x[at..];
    if left.len() >= V::LANES {
        // SAFETY: LANES floats are left in the slice.
        unsafe { v.store(left.as_mut_ptr()) }
    } else {
        // SAFETY: the mask selects what is left in the slice.
        unsafe { v.store_masked(left.as_mut_ptr(), V::first(left.len())) }
    }
}

/// See [`Level::Portable`].
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 4]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let (a, b) = (self.0, other.0);
        Self([f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2]), f(a[3], b[3])])
    }
}

impl Vector for Portable {
    const LANES: usize = 4;
    const TILE_ROWS: &'static [usize] = &[8, 4];
    type Mask = usize;

    #[inline(never)]
    fn call<K: Kernel>(kernel: K) -> K::Output {
        kernel.run::<Self>()
    }

    #[inline(always)]
    fn prefetch(_: *const f32) {}

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([x; 4])
    }

    #[inline(always)]
    fn first(n: usize) -> usize {
        n
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller vouches for 4 floats; an array of floats has their alignment.
        Self(unsafe { p.cast::<[f32; 4]>().read() })
    }

    #[inline(always)]
    unsafe fn load_masked(p: *const f32, mask: usize) -> Self {
        if mask == Self::LANES {
            // SAFETY: the mask selects all floats.
            return unsafe { Self::load(p) };
        }
        let mut v = [0.0; 4];
        // SAFETY: the caller vouches for the floats of the mask, which has at most 4.
        unsafe { std::ptr::copy_nonoverlapping(p, v.as_mut_ptr(), mask) };
        Self(v)
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: as in `load`.
        unsafe { p.cast::<[f32; 4]>().write(self.0) }
    }

    #[inline(always)]
    unsafe fn store_masked(self, p: *mut f32, mask: usize) {
        // SAFETY: as in `load_masked`.
        unsafe { std::ptr::copy_nonoverlapping(self.0.as_ptr(), p, mask) }
    }

    #[inline(always)]
    fn fma(self, a: Self, b: Self) -> Self {
        // Not `mul_add`: without the instruction it is a library call.
        self.add(a.mul(b))
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    fn relu(self) -> Self {
        self.zip(self, |a, _| if a < 0.0 { 0.0 } else { a })
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if b < a { b } else { a })
    }

    #[inline(always)]
    fn where_positive(self, by: Self) -> Self {
        self.zip(by, |a, b| if b > 0.0 { a } else { 0.0 })
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Kernel, Vector};

    /// See [`super::Level::Avx512`].
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(__m512);

    #[target_feature(enable = "avx512f,avx2,fma")]
    fn with_avx512<K: Kernel>(kernel: K) -> K::Output {
        kernel.run::<Avx512>()
    }

    impl Vector for Avx512 {
        const LANES: usize = 16;
        const TILE_ROWS: &'static [usize] = &[16, 12, 8, 6];
        type Mask = __mmask16;

        #[inline(never)]
        fn call<K: Kernel>(kernel: K) -> K::Output {
            // SAFETY: the invariant of `Vector`.
            unsafe { with_avx512(kernel) }
        }

        #[inline(always)]
        fn prefetch(p: *const f32) {
            // SAFETY: a prefetch never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
        }

        #[inline(always)]
        fn splat(x: f32) -> Self {
            // SAFETY: the invariant of `Vector`; so below.
            Self(unsafe { _mm512_set1_ps(x) })
        }

        #[inline(always)]
        fn first(n: usize) -> __mmask16 {
            ((1u32 << n) - 1) as __mmask16
        }

        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            // SAFETY: the caller vouches for the floats.
            Self(unsafe { _mm512_loadu_ps(p) })
        }

        #[inline(always)]
        unsafe fn load_masked(p: *const f32, mask: __mmask16) -> Self {
            // SAFETY: the caller vouches for the floats of the mask; the others are not touched.
            Self(unsafe { _mm512_maskz_loadu_ps(mask, p) })
        }

        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            // SAFETY: the caller vouches for the floats.
            unsafe { _mm512_storeu_ps(p, self.0) }
        }

        #[inline(always)]
        unsafe fn store_masked(self, p: *mut f32, mask: __mmask16) {
            // SAFETY: the caller vouches for the floats of the mask; the others are not touched.
            unsafe { _mm512_mask_storeu_ps(p, mask, self.0) }
        }

        #[inline(always)]
        fn fma(self, a: Self, b: Self) -> Self {
            // SAFETY: the invariant of `Vector`.
            Self(unsafe { _mm512_fmadd_ps(a.0, b.0, self.0) })
        }

        #[inline(always)]
        fn add(self, other: Self) -> Self {
            // SAFETY: the invariant of `Vector`.
            Self(unsafe { _mm512_add_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            // SAFETY: the invariant of `Vector`.
            Self(unsafe { _mm512_sub_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            // SAFETY: the invariant of `Vector`.
            Self(unsafe { _mm512_mul_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn relu(self) -> Self {
            // SAFETY: the invariant of `Vector`. `max` returns its second operand when one is NaN.
            Self(unsafe { _mm512_max_ps(_mm512_setzero_ps(), self.0) })
        }

        #[inline(always)]
        fn min(self, other: Self) -> Self {
            // SAFETY: the invariant of `Vector`. `min` returns its second operand when one is NaN.
            Self(unsafe { _mm512_min_ps(other.0, self.0) })
        }

        #[inline(always)]
        fn where_positive(self, by: Self) -> Self {
            // SAFETY: the invariant of `Vector`.
            Self(unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(by.0, _mm512_setzero_ps()), self.0) })
        }
    }

    /// See [`super::Level::Avx2`].
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(__m256);

    #[target_feature(enable = "avx2,fma")]
    fn with_avx2<K: Kernel>(kernel: K) -> K::Output {
        kernel.run::<Avx2>()
    }

    impl Vector for Avx2 {
        const LANES: usize = 8;
        const TILE_ROWS: &'static [usize] = &[12, 6];
        type Mask = __m256i;

        #[inline(never)]
        fn call<K: Kernel>(kernel: K) -> K::Output {
            // SAFETY: the invariant of `Vector`.
            unsafe { with_avx2(kernel) }
        }

        #[inline(always)]
        fn prefetch(p: *const f32) {
            // SAFETY: a prefetch never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
        }

        #[inline(always)]
        fn splat(x: f32) -> Self {
            // SAFETY: the invariant of `Vector`; so below.
            Self(unsafe { _mm256_set1_ps(x) })
        }

        #[inline(always)]
        fn first(n: usize) -> __m256i {
            // SAFETY: the invariant of `Vector`.
            unsafe { _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)) }
        }

        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            // SAFETY: the caller vouches for the floats.
            Self(unsafe { _mm256_loadu_ps(p) })
        }

        #[inline(always)]
        unsafe fn load_masked(p: *const f32, mask: __m256i) -> Self {
            // SAFETY: the caller vouches for the floats of the mask; the others are not touched.
            Self(unsafe { _mm256_maskload_ps(p, mask) })
        }

        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            // SAFETY: the caller vouches for the floats.
            unsafe { _mm256_storeu_ps(p, self.0) }
        }

        #[inline(always)]
        unsafe fn store_masked(self, p: *mut f32, mask: __m256i) {
            // SAFETY: the caller vouches for the floats of the mask; the others are not touched.
            unsafe { _mm256_maskstore_ps(p, mask, self.0) }
        }

        #[inline(always)]
        fn fma(self, a: Self, b: Self) -> Self {
            // SAFETY: the invariant of `Vector`.
            Self(unsafe { _mm256_fmadd_ps(a.0, b.0, self.0) })
        }

        #[inline(always)]
        fn add(self, other: Self) -> Self {
            // SAFETY: the invariant of `Vector`.
            Self(unsafe { _mm256_add_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            // SAFETY: the invariant of `Vector`.
            Self(unsafe { _mm256_sub_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            // SAFETY: the invariant of `Vector`.
            Self(unsafe { _mm256_mul_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn relu(self) -> Self {
            // SAFETY: the invariant of `Vector`. `max` returns its second operand when one is NaN.
            Self(unsafe { _mm256_max_ps(_mm256_setzero_ps(), self.0) })
        }

        #[inline(always)]
        fn min(self, other: Self) -> Self {
            // SAFETY: the invariant of `Vector`. `min` returns its second operand when one is NaN.
            Self(unsafe { _mm256_min_ps(other.0, self.0) })
        }

        #[inline(always)]
        fn where_positive(self, by: Self) -> Self {
            // SAFETY: the invariant of `Vector`.
            Self(unsafe { _mm256_and_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(by.0, _mm256_setzero_ps()), self.0) })
        }
    }
}
