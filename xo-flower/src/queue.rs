//! The queue before a NIC's flow table (paper 4.2.3, Figure 4): many threads ask for rules, one puts them in and takes them out.
//!
//! A NIC takes rules one by one, each in some hundreds of microseconds; a command that the kernel has cannot be called back. Commands
//! therefore wait here: the removal of a rule whose insertion still waits costs nothing, and that of one that is being put in follows
//! it. Removals go first, because somebody waits for them. A rule's *station* says where it is; each step is one compare-and-swap, so
//! the threads that ask never wait for the one that works. `queue/model.rs` has loom go through all interleavings.

use std::fmt;

mod alarm;
mod sync;

use self::alarm::Alarm;
use self::sync::{Arc, AtomicBool, AtomicU8, AtomicU64, Bounded, Ordering, Unbounded};
use crate::nic::Nic;

/// Stations. Waits to be put in.
const QUEUED: u8 = 0;
/// Being put in.
const ENTERING: u8 = 1;
/// In the NIC.
const IN: u8 = 2;
/// To be taken out, or being taken out.
const LEAVING: u8 = 3;
/// Not in the NIC, and will not be.
const GONE: u8 = 4;

/// What has become of a command, told by the thread that works.
#[derive(Debug, PartialEq, Eq)]
pub enum Report<E> {
    /// The rule is in.
    Inserted,
    /// The NIC has not taken it.
    Refused(E),
    /// The rule is out of the NIC for sure.
    Removed,
    /// It could not be taken out: it is in still, and may be asked for again.
    Stuck(E),
}

/// What asking for a removal leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// The rule is not in the NIC and will not be.
    Done,
    /// [`Report::Removed`] is to come, or [`Report::Stuck`].
    Waits,
}

/// How much there is to do, and was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Commands that wait.
    pub depth: u64,
    /// Insertions that a removal met in time.
    pub cancelled: u64,
    /// Insertions for which there was no room.
    pub full: u64,
}

struct Entry<R> {
    rule: R,
    station: AtomicU8,
}

/// One rule in the queue's care.
pub struct Ticket<R>(Arc<Entry<R>>);

impl<R: fmt::Debug> fmt::Debug for Ticket<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Ticket").field(&self.0.rule).finish()
    }
}

struct Shared<R> {
    insertions: Bounded<Arc<Entry<R>>>,
    /// As many as rules are in.
    removals: Unbounded<Arc<Entry<R>>>,
    alarm: Alarm,
    closed: AtomicBool,
    cancelled: AtomicU64,
    full: AtomicU64,
}

/// The side of those who ask; any number of them.
pub struct Queue<R>(Arc<Shared<R>>);

impl<R> Clone for Queue<R> {
    fn clone(&self) -> Self {
        Queue(self.0.clone())
    }
}

/// The side of the one who works.
pub struct Worker<R>(Arc<Shared<R>>);

/// A queue in which `length` insertions can wait, at least 1.
#[must_use]
pub fn queue<R>(length: usize) -> (Queue<R>, Worker<R>) {
    let shared = Arc::new(Shared {
        insertions: Bounded::new(length.max(1)),
        removals: Unbounded::new(),
        alarm: Alarm::new(),
        closed: AtomicBool::new(false),
        cancelled: AtomicU64::new(0),
        full: AtomicU64::new(0),
    });
    (Queue(shared.clone()), Worker(shared))
}

impl<R> Queue<R> {
    /// Asks for a rule. [`Report::Inserted`] or [`Report::Refused`] follows, unless its removal is asked for.
    ///
    /// # Errors
    /// The rule, when the queue is full.
    pub fn insert(&self, rule: R) -> Result<Ticket<R>, R>
    where
        R: Clone,
    {
        let entry = Arc::new(Entry { rule, station: AtomicU8::new(QUEUED) });
        if let Err(entry) = self.0.insertions.push(entry.clone()) {
            self.0.full.fetch_add(1, Ordering::Relaxed);
            return Err(entry.rule.clone());
        }
        self.0.alarm.ring();
        Ok(Ticket(entry))
    }

    /// Asks for a rule's removal; may be asked for again.
    pub fn remove(&self, ticket: &Ticket<R>) -> Removal {
        let station = &ticket.0.station;
        let mut now = station.load(Ordering::Acquire);
        loop {
            let next = match now {
                QUEUED => GONE,
                ENTERING | IN => LEAVING,
                LEAVING => return Removal::Waits,
                _ => return Removal::Done,
            };
            match station.compare_exchange(now, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(QUEUED) => {
                    self.0.cancelled.fetch_add(1, Ordering::Relaxed);
                    return Removal::Done;
                }
                // Who puts it in takes it out again.
                Ok(ENTERING) => return Removal::Waits,
                Ok(_) => {
                    self.0.removals.push(ticket.0.clone());
                    self.0.alarm.ring();
                    return Removal::Waits;
                }
                Err(other) => now = other,
            }
        }
    }

    /// What waits is not put in any more, but taken out where that was asked for; then the worker is done.
    pub fn close(&self) {
        self.0.closed.store(true, Ordering::Release);
        self.0.alarm.ring();
    }

    /// How much there is to do, and was.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts {
            depth: (self.0.insertions.len() + self.0.removals.len()) as u64,
            cancelled: self.0.cancelled.load(Ordering::Relaxed),
            full: self.0.full.load(Ordering::Relaxed),
        }
    }
}

impl<R> Worker<R> {
    /// Works until the queue is closed. What has become of each rule is told to `report`, on this thread.
    pub fn run<N: Nic<Rule = R>>(self, nic: &mut N, mut report: impl FnMut(&R, Report<N::Error>)) {
        loop {
            let closed = self.0.closed.load(Ordering::Acquire);
            if let Some(entry) = self.0.removals.pop() {
                take_out(nic, &entry, &mut report);
            } else if closed {
                return;
            } else if let Some(entry) = self.0.insertions.pop() {
                put_in(nic, &entry, &mut report);
            } else {
                self.0.alarm.wait();
            }
        }
    }
}

fn put_in<N: Nic>(nic: &mut N, entry: &Entry<N::Rule>, report: &mut impl FnMut(&N::Rule, Report<N::Error>)) {
    let step =
        |from, to| entry.station.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok();
    if !step(QUEUED, ENTERING) {
        // Cancelled.
        return;
    }
    match nic.insert(&entry.rule) {
        Ok(()) if step(ENTERING, IN) => report(&entry.rule, Report::Inserted),
        Ok(()) => take_out(nic, entry, report),
        Err(e) => {
            let before = entry.station.swap(GONE, Ordering::AcqRel);
            report(&entry.rule, if before == LEAVING { Report::Removed } else { Report::Refused(e) });
        }
    }
}

fn take_out<N: Nic>(
    nic: &mut N,
    entry: &Entry<N::Rule>,
    report: &mut impl FnMut(&N::Rule, Report<N::Error>),
) {
    let (station, report_this) = match nic.remove(&entry.rule) {
        Ok(()) => (GONE, Report::Removed),
        Err(e) => (IN, Report::Stuck(e)),
    };
    entry.station.store(station, Ordering::Release);
    report(&entry.rule, report_this);
}

#[cfg(all(test, loom))]
mod model;
#[cfg(all(test, not(loom)))]
mod tests;
