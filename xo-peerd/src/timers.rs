//! What is to happen later.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use xo_proto::wire::HandoffId;

use crate::engine::ServedKey;

/// Fewer are not worth looking through.
const FEW: usize = 1024;

/// What is to happen at a time.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Timer {
    /// The target has not answered.
    HostDeadline(HandoffId),
    /// Early order: the target has certainly given up what it was not confirmed.
    HostDoubt(HandoffId),
    /// `HOST_READY` or `CLOSED_ACK` has not come.
    TargetDeadline(ServedKey),
    /// Early order: `HOST_READY` has not come; the number of the question that armed it.
    TargetFence(ServedKey, u32),
    /// A parked request's peer has not come up, or a back-off is over.
    Dial(String),
    /// It is settled that a guest is here, which its server has asked to move; or known by now whether a channel is quick.
    Settled(HandoffId),
    /// No packet comes by a detour any more.
    Linger(HandoffId),
    /// A machine that is to be told about a detour has not answered.
    Detour(ServedKey),
    /// A wake-up connection has not been taken.
    Waiting(u16),
    /// A worker has said much; there is more.
    Worker(usize),
    /// Look for closed connections.
    Tick,
}

/// The timers, earliest first. They are not cancelled: their handlers look whether they still mean anything.
#[derive(Default)]
pub(crate) struct Timers {
    heap: BinaryHeap<Reverse<(Instant, Timer)>>,
    /// How many the last purge has left.
    kept: usize,
}

impl Timers {
    /// One more.
    pub(crate) fn arm(&mut self, when: Instant, timer: Timer) {
        self.heap.push(Reverse((when, timer)));
    }

    /// How long until the earliest.
    pub(crate) fn until_next(&self) -> Option<Duration> {
        self.heap.peek().map(|Reverse((when, _))| when.saturating_duration_since(Instant::now()))
    }

    /// Takes out the earliest if its time has come, with what time it is now.
    pub(crate) fn due(&mut self) -> Option<(Instant, Timer)> {
        let now = Instant::now();
        let Reverse((when, _)) = self.heap.peek()?;
        if *when > now {
            return None;
        }
        self.heap.pop().map(|Reverse((_, timer))| (now, timer))
    }

    /// Drops those that mean nothing any more, once they may be the half of all: so their number is bounded by that of
    /// those that do, and a timer costs the same however many there are.
    pub(crate) fn purge(&mut self, means_something: impl Fn(&Timer) -> bool) {
        if self.heap.len() < 2 * self.kept.max(FEW) {
            return;
        }
        self.heap.retain(|Reverse((_, timer))| means_something(timer));
        self.kept = self.heap.len();
        self.heap.shrink_to(2 * self.kept.max(FEW));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(timers: &mut Timers) -> Vec<HandoffId> {
        let next = || timers.due().map(|(_, timer)| timer);
        std::iter::from_fn(next).map(|t| if let Timer::Linger(id) = t { id } else { 0 }).collect()
    }

    #[test]
    fn the_earliest_comes_first_and_none_before_its_time() {
        let mut timers = Timers::default();
        let now = Instant::now();
        assert!(timers.until_next().is_none() && timers.due().is_none());
        timers.arm(now + Duration::from_secs(3600), Timer::Linger(9));
        for id in [3, 1, 2] {
            timers.arm(now - Duration::from_secs(10) + Duration::from_millis(id), Timer::Linger(id));
        }
        assert_eq!(timers.until_next(), Some(Duration::ZERO));
        assert_eq!(ids(&mut timers), [1, 2, 3]);
        assert!(timers.until_next().is_some_and(|left| left > Duration::from_secs(3000)));
    }

    #[test]
    fn their_number_is_bounded_by_those_that_mean_something() {
        let mut timers = Timers::default();
        let later = Instant::now() + Duration::from_secs(3600);
        for id in 0..1_000_000 {
            timers.arm(later, Timer::Linger(id));
            // As if each hand-off but some were over soon after.
            timers.purge(|t| matches!(t, Timer::Linger(of) if of % 1000 == 0 || id - of < 10));
            assert!(timers.heap.len() <= 2 * (FEW + 1010), "{id}: {}", timers.heap.len());
        }
        assert!(timers.heap.capacity() <= 8 * (FEW + 1010), "{}", timers.heap.capacity());
        let kept =
            timers.heap.iter().filter(|Reverse((_, t))| matches!(t, Timer::Linger(of) if of % 1000 == 0));
        assert_eq!(kept.count(), 1000);
    }
}
