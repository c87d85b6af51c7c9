//! Numbers by chance that a seed brings back.

use std::env;

/// A number from the environment: a seed, or how much to do.
///
/// # Panics
/// When it is no number.
#[must_use]
pub fn setting(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |v| v.parse().unwrap_or_else(|e| panic!("{name}: {e}")))
}

/// SplitMix64: the same numbers from the same seed, everywhere.
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// One of them.
    pub fn of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }

    /// One of `plain`, but once in `n` times one of `odd`.
    pub fn rarely<'v>(&mut self, n: usize, odd: &[&'v str], plain: &[&'v str]) -> &'v str {
        if self.one_in(n) { self.of(odd) } else { self.of(plain) }
    }
}
