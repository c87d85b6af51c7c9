//! A server's reads as the library makes them: the same calls in the same order as in its `read`, with a receive queue
//! that fills at any pace.

use crate::http::{Head, Limit, MAX_HEAD, Method, RequestTracker, parse_head};
use crate::reason::Reason;

/// What the library looks at first at a boundary.
const SMALL: usize = 4096;
/// What it looks at in a chunked body.
const PEEK: usize = 4096;

/// A kind of read.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    /// read(2).
    Plain,
    /// readv(2) into pieces of this size.
    Pieces(usize),
    /// recv(2) with MSG_PEEK: nothing is taken.
    Peeking,
    /// splice(2): the bytes never reach memory.
    Unseen,
}

/// What a read came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// So many bytes, or nothing to read now.
    Bytes(usize),
    /// Left alone from here on.
    Left(Reason),
}

/// One connection's reading half.
pub(super) struct Reader<'s> {
    stream: &'s [u8],
    /// Read so far.
    pub(super) at: usize,
    /// In the receive queue up to here.
    arrived: usize,
    pub(super) tracker: RequestTracker,
    /// Methods of the requests that have begun.
    pub(super) expected: Vec<Method>,
}

impl<'s> Reader<'s> {
    pub(super) fn new(stream: &'s [u8]) -> Reader<'s> {
        Reader { stream, at: 0, arrived: 0, tracker: RequestTracker::Boundary, expected: Vec::new() }
    }

    pub(super) fn arrive(&mut self, n: usize) {
        self.arrived = self.stream.len().min(self.arrived + n);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.at == self.arrived
    }

    fn queue(&self, most: usize) -> &'s [u8] {
        let queue = &self.stream[self.at..self.arrived];
        &queue[..queue.len().min(most)]
    }

    /// A read of `want` bytes; `late` bytes arrive between the look and the read.
    pub(super) fn read(&mut self, want: usize, kind: Kind, late: usize) -> Outcome {
        let unseen = matches!(kind, Kind::Unseen);
        if unseen && self.tracker.allowed() == Limit::Peek && !self.tracker.at_boundary() {
            return Outcome::Left(Reason::AmbiguousFraming);
        }
        let peeking = matches!(kind, Kind::Peeking);
        if self.tracker.at_boundary() && !peeking {
            if self.is_empty() {
                return Outcome::Bytes(0);
            }
            let mut head = parse_head(self.queue(SMALL));
            if matches!(head, Head::Partial) && self.queue(SMALL).len() == SMALL {
                head = parse_head(self.queue(MAX_HEAD + 1));
            }
            match head {
                Head::Partial => return Outcome::Bytes(0),
                Head::TooLong => return Outcome::Left(Reason::HeadTooLong),
                Head::Refused(reason) => return Outcome::Left(reason),
                Head::Complete(head) if head.upgrade => return Outcome::Left(Reason::Upgraded),
                Head::Complete(head) => {
                    self.tracker.begin(&head);
                    self.expected.push(Method::from(head.method));
                }
            }
        }
        let allowed = match self.tracker.allowed() {
            Limit::Bytes(n) => want.min(usize::try_from(n).unwrap_or(usize::MAX)),
            Limit::Peek if self.tracker.at_boundary() => want,
            Limit::Peek => match self.queue(want.min(PEEK)) {
                [] => return Outcome::Bytes(0),
                window => self.tracker.limit(window).min(want),
            },
        };
        self.arrive(late);
        let bytes = self.queue(allowed);
        if bytes.is_empty() || peeking {
            return Outcome::Bytes(0);
        }
        if let Limit::Bytes(_) = self.tracker.allowed() {
            self.tracker.consumed_unseen(bytes.len() as u64);
        } else {
            let size = if let Kind::Pieces(n) = kind { n } else { bytes.len() };
            bytes.chunks(size).for_each(|piece| self.tracker.consumed(piece));
        }
        self.at += bytes.len();
        match self.tracker {
            RequestTracker::Lost => Outcome::Left(Reason::AmbiguousFraming),
            _ => Outcome::Bytes(bytes.len()),
        }
    }
}

/// How a connection's bytes come in and are read; each list is used in turn.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    pub(super) arrivals: Vec<usize>,
    pub(super) wants: Vec<usize>,
    pub(super) kinds: Vec<Kind>,
}

/// The whole stream read at this pace: where requests ended, their methods, and why the connection was left alone, if
/// it was. An end within a read, instead of at a read's end, would be missing.
pub(super) fn run(stream: &[u8], pace: &Pace) -> (Vec<usize>, Vec<Method>, Option<Reason>) {
    let mut reader = Reader::new(stream);
    let mut ends = Vec::new();
    for i in 0.. {
        let of = |list: &[usize]| list[i % list.len()];
        if i % 2 == 0 || reader.is_empty() {
            reader.arrive(of(&pace.arrivals));
        }
        let mut kind = pace.kinds[i % pace.kinds.len()];
        // The library gives a connection up that splices in a chunked body: not what is asked here.
        if reader.tracker.allowed() == Limit::Peek && matches!(kind, Kind::Unseen) {
            kind = Kind::Plain;
        }
        match reader.read(of(&pace.wants), kind, of(&pace.arrivals) / 2) {
            Outcome::Bytes(n) if n > 0 && reader.tracker.at_boundary() => ends.push(reader.at),
            Outcome::Bytes(_) => {}
            Outcome::Left(reason) => return (ends, reader.expected, Some(reason)),
        }
        // An incomplete last request is never read to its end.
        if reader.at == stream.len() || i > 8 * stream.len() + 64 {
            break;
        }
    }
    (ends, reader.expected, None)
}
