//! Channels with messages that have been queued and not written: each write costs as much as a dump, and wakes the other daemon.

use std::time::{Duration, Instant};

use xo_proto::wire::PeerMessage;

/// How long a message may wait for company that nobody waits for.
const SOON: Duration = Duration::from_millis(1);

/// When a message is to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Haste {
    /// A connection's service waits for it.
    Now,
    /// At the end of this turn of the event loop.
    Turn,
    /// With the next one that has more haste, or in a millisecond.
    Soon,
}

impl Haste {
    /// Of a message.
    pub(crate) fn of(message: &PeerMessage) -> Haste {
        use PeerMessage as M;
        match message {
            M::BeginOffload(_) | M::HostReady(_) | M::TargetReady(_) | M::Refuse(_) | M::Abort(_) => {
                Haste::Now
            }
            M::Hello(_) | M::Query(_) | M::Ping(_) | M::Pong(_) | M::Recall(_) => Haste::Now,
            // Until the home knows, packets take a detour, and a table has entries too many.
            M::Moved(_) | M::Closed(_) => Haste::Turn,
            M::Handed(_) | M::MovedAck(_) | M::ClosedAck(_) | M::Load(_) => Haste::Soon,
        }
    }
}

/// The channels, by their index.
#[derive(Debug, Default)]
pub(crate) struct Unflushed {
    turn: Vec<usize>,
    soon: Vec<usize>,
    by: Option<Instant>,
}

impl Unflushed {
    /// Something is queued there.
    pub(crate) fn add(&mut self, index: usize, haste: Haste) {
        let list = match haste {
            Haste::Now => return,
            Haste::Turn => &mut self.turn,
            Haste::Soon => {
                self.by.get_or_insert_with(|| Instant::now() + SOON);
                &mut self.soon
            }
        };
        if !list.contains(&index) {
            list.push(index);
        }
    }

    /// All that was queued there has been written.
    pub(crate) fn written(&mut self, index: usize) {
        self.turn.retain(|i| *i != index);
        self.soon.retain(|i| *i != index);
        if self.soon.is_empty() {
            self.by = None;
        }
    }

    /// The next to be written at the end of a turn; `all`: without regard to the time.
    pub(crate) fn next(&self, all: bool) -> Option<usize> {
        let late = || all || self.by.is_some_and(|by| by <= Instant::now());
        self.turn.last().or_else(|| self.soon.last().filter(|_| late())).copied()
    }

    /// How long until one has waited long enough.
    pub(crate) fn until_next(&self) -> Option<Duration> {
        self.by.map(|by| by.saturating_duration_since(Instant::now()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_waits_for_goes_with_the_next_or_in_a_moment() {
        let mut unflushed = Unflushed::default();
        assert_eq!((unflushed.next(true), unflushed.until_next()), (None, None));
        unflushed.add(3, Haste::Now);
        assert_eq!(unflushed.next(true), None, "it is written already");
        unflushed.add(1, Haste::Soon);
        unflushed.add(2, Haste::Soon);
        unflushed.add(2, Haste::Turn);
        assert_eq!(unflushed.next(false), Some(2));
        unflushed.written(2);
        assert_eq!(unflushed.next(true), Some(1));
        assert!(unflushed.until_next().is_some_and(|left| left <= SOON));
        std::thread::sleep(SOON);
        assert_eq!((unflushed.next(false), unflushed.until_next()), (Some(1), Some(Duration::ZERO)));
        unflushed.written(1);
        assert_eq!((unflushed.next(true), unflushed.until_next()), (None, None));
    }
}
