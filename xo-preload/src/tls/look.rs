//! At a request's boundary: look at the records that wait, without taking them, and decide.

use std::time::Duration;

use xo_proto::http::MAX_HEAD;
use xo_proto::protocol::Requests;
use xo_proto::reason::Reason;
use xo_proto::tls::{Content, HEADER, Header, MAX_RECORD, Opener};
use xo_sys::raw;

use crate::boundary::{self, Outcome, Queue, Seen, judge_http, leave, partial};
use crate::conn::{Conn, ReadHalf};

/// Most heads come in one record that is shorter than this.
const SMALL: usize = 4096;
/// A head may come byte by byte, each in a record of its own. Longer than a record of any length.
const LARGE: usize = 64 << 10;
const _: () = assert!(LARGE > MAX_RECORD && MAX_HEAD <= LARGE);

/// As `boundary::look`, for records.
pub(super) fn look(fd: i32, conn: &Conn, index: u32, half: &mut ReadHalf, nonblocking: bool) -> Outcome {
    let mut small = [0; SMALL];
    let mut large = Vec::new();
    let mut end = None;
    loop {
        // What is held back is there already; SO_RCVLOWAT would make the kernel wait for more.
        let flags = if nonblocking || end.is_some() { libc::MSG_DONTWAIT } else { 0 };
        let queue = if large.is_empty() { &mut small[..] } else { &mut large[..] };
        let size = queue.len();
        let n = match raw::peek(fd, queue, flags) {
            Ok(0) => return Outcome::Read { alone: true, there: 0 },
            Ok(n) => n.min(size),
            Err(e) => return Outcome::Error(e.raw_os_error().unwrap_or(libc::EIO)),
        };
        let seen = judge(fd, conn, index, half, queue.get_mut(..n).unwrap_or_default(), n < size);
        match seen {
            Seen::Cut if large.is_empty() => large.resize(LARGE, 0),
            Seen::Cut => return out(leave(fd, conn, half, Reason::HeadTooLong)),
            Seen::Outcome(outcome) => return outcome,
            Seen::Asked | Seen::HeldBack if nonblocking => return Outcome::Error(libc::EAGAIN),
            Seen::Asked => {
                if let Some(outcome) = boundary::verdict(fd, conn, index, half, false) {
                    return outcome;
                }
            }
            Seen::HeldBack => {
                let end = *end.get_or_insert_with(|| raw::receive_timeout(fd).map(|t| raw::monotonic() + t));
                let left = end.map_or(Duration::MAX, |e: Duration| e.saturating_sub(raw::monotonic()));
                if left.is_zero() {
                    return Outcome::Error(libc::EAGAIN);
                }
                raw::wait_readable(fd, left.min(boundary::until(conn)));
            }
        }
    }
}

fn out(seen: Seen) -> Outcome {
    match seen {
        Seen::Outcome(outcome) => outcome,
        _ => Outcome::Read { alone: true, there: 0 },
    }
}

/// What the records that wait begin with.
enum Next<'q> {
    /// Content of one; all of the queue from there on.
    Record(Content, &'q mut [u8], usize),
    /// Not all of it is there.
    Incomplete,
    /// Not a record of this connection.
    Wrong,
}

fn next<'q>(opener: &mut Opener, queue: &'q mut [u8]) -> Next<'q> {
    let Some(header) = Header::parse(queue) else {
        return if queue.len() < HEADER { Next::Incomplete } else { Next::Wrong };
    };
    match queue.get_mut(..header.total()) {
        None => Next::Incomplete,
        Some(record) => match opener.open(record) {
            Ok(opened) => Next::Record(opened.content, opened.data, header.total()),
            Err(_) => Next::Wrong,
        },
    }
}

/// `all` of the queue is in `queue`, whose records are opened where they are.
fn judge(fd: i32, conn: &Conn, index: u32, half: &mut ReadHalf, queue: &mut [u8], all: bool) -> Seen {
    let Some(received) = &half.tls else { return leave(fd, conn, half, Reason::TlsLost) };
    let Some(mut opener) = received.stream.opener() else { return leave(fd, conn, half, Reason::TlsLost) };
    let length = queue.len();
    let (mut plain, mut used, mut whole) = (Vec::new(), 0, false);
    loop {
        match next(&mut opener, queue.get_mut(used..).unwrap_or_default()) {
            Next::Record(Content::Data, data, total) => {
                plain.extend_from_slice(data);
                used += total;
                // A head ends with a line's end: before that it need not be looked at.
                if !data.contains(&b'\n') {
                    if plain.len() > MAX_HEAD {
                        return leave(fd, conn, half, Reason::HeadTooLong);
                    }
                    continue;
                }
            }
            // For OpenSSL alone: an alert, a new key.
            Next::Record(_, _, total) if plain.is_empty() => return pass(half, total),
            Next::Record(..) | Next::Wrong => return leave(fd, conn, half, Reason::TlsLost),
            // Records without anything in them: nobody's request begins there.
            Next::Incomplete if plain.is_empty() && used > 0 => return pass(half, used),
            Next::Incomplete if !all => return Seen::Cut,
            Next::Incomplete if plain.is_empty() => return partial(fd, conn, half, length),
            Next::Incomplete => whole = true,
        }
        let Requests::Http(tracker) = half.tracker else {
            return leave(fd, conn, half, Reason::TlsAlpn);
        };
        // A head that is not complete yet is not held back before all records have been looked at.
        let waiting = Queue { length, whole };
        match judge_http(fd, conn, index, half, tracker, &plain, waiting) {
            Seen::Cut => {}
            Seen::Outcome(Outcome::Read { .. }) => return pass(half, used),
            seen => return seen,
        }
    }
}

/// The server may have so many bytes of records.
fn pass(half: &mut ReadHalf, n: usize) -> Seen {
    if let Some(received) = &mut half.tls {
        received.allowed = n;
    }
    Seen::Outcome(Outcome::Read { alone: true, there: 0 })
}
