//! Counter-based randomness: a number is a function of its key and its index, never of what was drawn before.
//!
//! Nothing has to be saved for an exact resume, and the number of threads changes nothing. The generator is Philox4x32-10
//! (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).

/// A stream of random numbers, addressed by index. Streams are derived from one another with [`Rng::fork`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rng {
    key: u64,
    stream: u64,
}

impl Rng {
    /// The root stream of a run.
    pub fn new(seed: u64) -> Self {
        Self { key: seed, stream: 0 }
    }

    /// The stream of sub-purpose `id` (an epoch, a step, a sample, a view).
    #[must_use]
    pub fn fork(self, id: u64) -> Self {
        // One block of the parent addressed by `id`, in a half of the counter space that `block` never uses.
        let b = philox([id as u32, (id >> 32) as u32, self.stream as u32, (self.stream >> 32) as u32 ^ 0x8000_0000], self.key);
        Self { key: join(b[0], b[1]), stream: join(b[2], b[3]) & (u64::MAX >> 1) }
    }

    /// The stream of a named sub-purpose (`"init"`, `"augment"`, a parameter's name).
    #[must_use]
    pub fn named(self, name: &str) -> Self {
        self.fork(fnv1a64(name))
    }

    /// Four independent 32-bit words.
    pub fn block(self, index: u64) -> [u32; 4] {
        philox([index as u32, (index >> 32) as u32, self.stream as u32, (self.stream >> 32) as u32], self.key)
    }

    /// 64 random bits.
    pub fn bits(self, index: u64) -> u64 {
        let b = self.block(index);
        join(b[0], b[1])
    }

    /// Uniform in `[0, 1)`, 53 bits.
    pub fn uniform(self, index: u64) -> f64 {
        (self.bits(index) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform integer in `0..n` (`n` > 0).
    pub fn below(self, index: u64, n: u64) -> u64 {
        ((u128::from(self.bits(index)) * u128::from(n)) >> 64) as u64
    }

    /// Standard normal (Box-Muller).
    pub fn normal(self, index: u64) -> f64 {
        let b = self.block(index);
        let u = ((join(b[0], b[1]) >> 11) + 1) as f64 * (1.0 / (1u64 << 53) as f64);
        let v = (join(b[2], b[3]) >> 11) as f64 * (1.0 / (1u64 << 53) as f64);
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }

    /// A random permutation of `0..n` (Fisher-Yates).
    pub fn permutation(self, n: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..n as u32).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i as u64, i as u64 + 1) as usize);
        }
        order
    }
}

fn join(lo: u32, hi: u32) -> u64 {
    u64::from(lo) | (u64::from(hi) << 32)
}

fn fnv1a64(s: &str) -> u64 {
    s.bytes().fold(0xCBF2_9CE4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01B3))
}

fn philox(mut c: [u32; 4], key: u64) -> [u32; 4] {
    let (mut k0, mut k1) = (key as u32, (key >> 32) as u32);
    for _ in 0..10 {
        let p0 = u64::from(c[0]) * 0xD251_1F53;
        let p1 = u64::from(c[2]) * 0xCD9E_8D57;
        c = [(p1 >> 32) as u32 ^ c[1] ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k1, p0 as u32];
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_known_answers() {
        // Random123's published test vectors for philox4x32-10.
        assert_eq!(philox([0; 4], 0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], u64::MAX), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn streams_differ_and_repeat() {
        let r = Rng::new(7);
        assert_eq!(r.fork(3).bits(5), Rng::new(7).fork(3).bits(5));
        assert_ne!(r.fork(3).bits(5), r.fork(4).bits(5));
        assert_ne!(r.named("init").bits(0), r.named("augment").bits(0));
        assert_ne!(r.fork(0), r);
    }

    #[test]
    fn moments_are_right() {
        let r = Rng::new(1).named("moments");
        let n = 100_000u64;
        let (mut mean, mut var, mut uni) = (0.0, 0.0, 0.0);
        for i in 0..n {
            let z = r.normal(i);
            mean += z;
            var += z * z;
            uni += r.uniform(i);
        }
        let n = n as f64;
        assert!((mean / n).abs() < 0.02 && (var / n - 1.0).abs() < 0.03 && (uni / n - 0.5).abs() < 0.01);
    }

    #[test]
    fn permutation_holds_every_index() {
        let mut p = Rng::new(2).permutation(257);
        assert_ne!(p, (0..257).collect::<Vec<_>>());
        p.sort_unstable();
        assert_eq!(p, (0..257).collect::<Vec<_>>());
    }
}
