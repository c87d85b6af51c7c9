//! What is to happen later.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
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

/// How many lengths of time there may be before some share a heap.
const LANES: usize = 8;

/// The timers, earliest first. They are not cancelled: their handlers look whether they still mean anything.
///
/// There are many, of a few lengths of time each, so those of one length are armed in the order in which they are due: a queue for each
/// length costs less than a heap.
#[derive(Default)]
pub(crate) struct Timers {
    /// Each in order.
    lanes: [VecDeque<(Instant, Timer)>; LANES],
    /// What fits behind none of them.
    heap: BinaryHeap<Reverse<(Instant, Timer)>>,
    /// How many the last purge has left.
    kept: usize,
}

impl Timers {
    /// One more.
    pub(crate) fn arm(&mut self, when: Instant, timer: Timer) {
        let last = |lane: &VecDeque<(Instant, Timer)>| lane.back().map(|(last, _)| *last);
        // Behind the latest that is not later, so that each length keeps its lane.
        let fitting = self.lanes.iter_mut().filter(|lane| last(lane).is_none_or(|last| last <= when));
        match fitting.max_by_key(|lane| last(lane)) {
            Some(lane) => lane.push_back((when, timer)),
            None => self.heap.push(Reverse((when, timer))),
        }
    }

    /// When the earliest is due, and its lane if it is in one.
    fn earliest(&self) -> Option<(Instant, Option<usize>)> {
        let lanes = self.lanes.iter().enumerate();
        let fronts = lanes.filter_map(|(i, lane)| lane.front().map(|(when, _)| (*when, Some(i))));
        fronts.chain(self.heap.peek().map(|Reverse((when, _))| (*when, None))).min()
    }

    /// How long until the earliest.
    pub(crate) fn until_next(&self) -> Option<Duration> {
        self.earliest().map(|(when, _)| when.saturating_duration_since(Instant::now()))
    }

    /// Takes out the earliest if its time has come, with what time it is now.
    pub(crate) fn due(&mut self) -> Option<(Instant, Timer)> {
        let now = Instant::now();
        let (_, lane) = self.earliest().filter(|(when, _)| *when <= now)?;
        let timer = match lane {
            Some(lane) => self.lanes[lane].pop_front().map(|(_, timer)| timer),
            None => self.heap.pop().map(|Reverse((_, timer))| timer),
        };
        timer.map(|timer| (now, timer))
    }

    fn len(&self) -> usize {
        self.lanes.iter().map(VecDeque::len).sum::<usize>() + self.heap.len()
    }

    /// Drops those that mean nothing any more, once they may be the half of all: so their number is bounded by that of
    /// those that do, and a timer costs the same however many there are.
    pub(crate) fn purge(&mut self, means_something: impl Fn(&Timer) -> bool) {
        if self.len() < 2 * self.kept.max(FEW) {
            return;
        }
        self.heap.retain(|Reverse((_, timer))| means_something(timer));
        for lane in &mut self.lanes {
            lane.retain(|(_, timer)| means_something(timer));
        }
        self.kept = self.len();
        let room = 2 * self.kept.max(FEW);
        self.heap.shrink_to(room);
        self.lanes.iter_mut().for_each(|lane| lane.shrink_to(room));
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
    fn any_order_of_arming_comes_out_in_order() {
        let mut timers = Timers::default();
        let begun = Instant::now() - Duration::from_secs(10);
        let mut x = 1_u64;
        let mut all: Vec<_> = (0..10_000)
            .map(|_| {
                // xorshift64
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                x >> 32
            })
            .collect();
        all.iter().for_each(|t| timers.arm(begun + Duration::from_nanos(*t), Timer::Linger(*t)));
        assert!(!timers.heap.is_empty() && timers.heap.len() < all.len());
        all.sort_unstable();
        assert_eq!(ids(&mut timers), all);
    }

    #[test]
    fn those_of_a_few_lengths_of_time_need_no_heap() {
        let mut timers = Timers::default();
        let now = Instant::now();
        for n in 0..1000 {
            for length in 1..=LANES as u64 {
                timers.arm(now + Duration::from_millis(n + 1000 * length * length), Timer::Linger(n));
            }
        }
        assert_eq!((timers.heap.len(), timers.len()), (0, 1000 * LANES));
    }

    #[test]
    fn their_number_is_bounded_by_those_that_mean_something() {
        let mut timers = Timers::default();
        let later = Instant::now() + Duration::from_secs(3600);
        for id in 0..1_000_000 {
            timers.arm(later, Timer::Linger(id));
            // As if each hand-off but some were over soon after.
            timers.purge(|t| matches!(t, Timer::Linger(of) if of % 1000 == 0 || id - of < 10));
            assert!(timers.len() <= 2 * (FEW + 1010), "{id}: {}", timers.len());
        }
        let room: usize = timers.lanes.iter().map(VecDeque::capacity).sum();
        assert!(room + timers.heap.capacity() <= 8 * (FEW + 1010), "{room}");
        let kept =
            timers.lanes.iter().flatten().filter(|(_, t)| matches!(t, Timer::Linger(of) if of % 1000 == 0));
        assert_eq!(kept.count(), 1000);
    }
}
