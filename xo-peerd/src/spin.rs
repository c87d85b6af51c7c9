//! When the event loop polls instead of sleeping: each wake of a processor that has gone idle costs a hand-off as much as a
//! dump does, and there are two or three in a row.
//!
//! Between two looks the processor is offered to others. If one keeps it for most of a time slice, the machine has no processor to
//! spare: who sleeps is then served sooner than who polls, for a wake preempts. So polling rests for a while, each time longer.

use std::time::{Duration, Instant};

/// Who keeps the processor for longer has more to do than to answer a message. A time slice is 1.4 ms on two processors, 2.8 ms on eight
/// and more (kernel/sched/fair.c, `sysctl_sched_base_slice`).
const LONG: Duration = Duration::from_millis(1);
/// How long polling rests when the processor has others to serve: at first, and at most.
const REST: [Duration; 2] = [Duration::from_millis(10), Duration::from_secs(1)];
/// So many rests without that, and it begins anew.
const CALM: u32 = 4;

/// When to poll.
#[derive(Debug)]
pub(crate) struct Spin {
    /// After a message of a hand-off.
    time: Duration,
    until: Instant,
    rests_until: Instant,
    rest: Duration,
}

impl Spin {
    /// Polls for `time` after the last message; zero: never.
    pub(crate) fn new(time: Duration, now: Instant) -> Spin {
        Spin { time, until: now, rests_until: now, rest: REST[0] }
    }

    /// A hand-off has got further.
    pub(crate) fn busy(&mut self, now: Instant) {
        self.until = now + self.time;
    }

    /// Poll now?
    pub(crate) fn wanted(&self, now: Instant) -> bool {
        now < self.until && self.rests_until <= now
    }

    /// Others were offered the processor at `offered` and gave it back at `now`.
    pub(crate) fn offered(&mut self, offered: Instant, now: Instant) {
        if now - offered <= LONG {
            return;
        }
        // It has had a processor to spare since.
        if now - self.rests_until > CALM * self.rest {
            self.rest = REST[0];
        }
        self.rests_until = now + self.rest;
        self.rest = REST[1].min(2 * self.rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: Duration = Duration::from_micros(250);

    #[test]
    fn polls_for_a_time_after_each_message() {
        let begin = Instant::now();
        let mut spin = Spin::new(TIME, begin);
        assert!(!spin.wanted(begin));
        spin.busy(begin);
        assert!(spin.wanted(begin) && spin.wanted(begin + TIME / 2) && !spin.wanted(begin + TIME));
        spin.busy(begin + TIME / 2);
        assert!(spin.wanted(begin + TIME));
        let mut never = Spin::new(Duration::ZERO, begin);
        never.busy(begin);
        assert!(!never.wanted(begin));
    }

    /// One that polls at `now` is not given back the processor for long: when it polls again, and after what rest.
    fn taken(spin: &mut Spin, now: Instant) -> (Instant, Duration) {
        spin.busy(now);
        assert!(spin.wanted(now));
        spin.offered(now, now + LONG);
        assert!(spin.wanted(now));
        let back = now + 2 * LONG;
        spin.offered(now, back);
        let rest = (0..).map(Duration::from_millis).find(|&rest| {
            spin.busy(back + rest);
            spin.wanted(back + rest)
        });
        let rest = rest.expect("an end");
        (back + rest, rest)
    }

    #[test]
    fn rests_where_the_processor_is_wanted_by_others() {
        let mut now = Instant::now();
        let mut spin = Spin::new(TIME, now);
        for expected in [10, 20, 40, 80, 160, 320, 640, 1000, 1000] {
            let rest;
            (now, rest) = taken(&mut spin, now);
            assert_eq!(rest, Duration::from_millis(expected));
        }
        let (_, rest) = taken(&mut spin, now + CALM * REST[1]);
        assert_eq!(rest, REST[0]);
    }
}
