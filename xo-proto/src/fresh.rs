//! How long a message was under way, compared with the fastest one of late. Two machines' clocks have nothing in
//! common but their rate; the smallest difference seen between sending and receiving stands for "at once".

use std::time::Duration;

/// How long a sample counts: clocks drift apart by at most some hundred microseconds meanwhile (NTP slews by 500 ppm
/// at the most, so 10 ms in two windows).
const WINDOW_NS: u64 = 10_000_000_000;

/// Samples of one direction of one channel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Freshness {
    began_ns: u64,
    now: Option<i64>,
    before: Option<i64>,
}

impl Freshness {
    /// A message stamped `sent_ns` by the sender's clock was received at `now_ns` of ours. Returns by how much it was
    /// slower than the fastest of late, or `None` when there is nothing to compare it with.
    pub fn observe(&mut self, sent_ns: u64, now_ns: u64) -> Option<Duration> {
        let elapsed = now_ns.saturating_sub(self.began_ns);
        if elapsed >= WINDOW_NS {
            self.before = if elapsed < 2 * WINDOW_NS { self.now } else { None };
            self.now = None;
            self.began_ns = now_ns;
        }
        let difference = now_ns.wrapping_sub(sent_ns) as i64;
        let fastest = [self.now, self.before].into_iter().flatten().min();
        self.now = Some(self.now.map_or(difference, |n| n.min(difference)));
        fastest.map(|f| Duration::from_nanos(u64::try_from(difference.saturating_sub(f)).unwrap_or(0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    #[test]
    fn only_the_delay_beyond_the_fastest_counts() {
        // The clocks differ by anything at all.
        for offset in [0, 5 * S, u64::MAX - S] {
            let mut f = Freshness::default();
            let at = |t: u64| (100 * S + t).wrapping_add(offset);
            assert_eq!(f.observe(100 * S, at(50)), None);
            assert_eq!(f.observe(100 * S, at(70)), Some(Duration::from_nanos(20)));
            assert_eq!(f.observe(101 * S, at(S + 10)), Some(Duration::ZERO), "a faster one");
            assert_eq!(f.observe(102 * S, at(4 * S)), Some(Duration::from_nanos(2 * S - 10)));
        }
    }

    #[test]
    fn old_samples_are_forgotten() {
        let mut f = Freshness::default();
        f.observe(S, S);
        assert_eq!(f.observe(12 * S, 12 * S + 7), Some(Duration::from_nanos(7)));
        assert_eq!(f.observe(23 * S, 23 * S + 5), Some(Duration::ZERO), "the first one is too old");
        assert_eq!(f.observe(90 * S, 90 * S), None, "nothing of late");
    }
}
