//! A server's reads as the library makes them, with a receive queue that fills at any pace.

use crate::protocol::Limit;
use crate::reason::Reason;
use crate::resp::{Command, Look, Requests};

/// What the library looks at first at a boundary, and at most; and within a command.
const WINDOW: usize = 16 << 10;
const FAR: usize = WINDOW + 1;
const PEEK: usize = 4096;

/// What has been read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Reading {
    /// Where the server's reads ended between two commands.
    pub(super) boundaries: Vec<usize>,
    /// Where commands begin that belong elsewhere.
    pub(super) away: Vec<usize>,
    /// Replies that are expected.
    pub(super) replies: u32,
    /// Where the connection was left alone, and why.
    pub(super) left: Option<(usize, Reason)>,
    /// Read up to here.
    pub(super) end: usize,
}

/// Reads a stream that comes in pieces of these sizes into buffers of these sizes, each used in turn. What is `away` is
/// read as well, as if by the server elsewhere.
pub(super) fn read(
    stream: &[u8],
    arrivals: &[usize],
    wants: &[usize],
    away: impl Fn(&Command) -> bool,
) -> Reading {
    let mut reading = Reading::default();
    let (mut requests, mut stays) = (Requests::default(), false);
    let (mut arrived, mut arrival, mut turn) = (0, 0, 0);
    loop {
        let at = reading.end;
        let mut more = arrived == at;
        if !more && requests.at_boundary() {
            let window = |size: usize| &stream[at..arrived.min(at + size)];
            let looked = match requests.look(window(WINDOW), stays, &away, |_| ()) {
                Look::Partial if arrived > at + WINDOW => requests.look(window(FAR), stays, &away, |_| ()),
                looked => looked,
            };
            match looked {
                Look::Partial => more = true,
                Look::Leave(reason) => {
                    reading.left = Some((at, reason));
                    return reading;
                }
                Look::Away(_) => {
                    reading.away.push(at);
                    stays = true;
                    continue;
                }
                Look::Here(run) => {
                    (requests, stays) = (run.next, false);
                    reading.replies += run.replies;
                }
            }
        }
        if more {
            if arrived == stream.len() {
                return reading;
            }
            arrived = stream.len().min(arrived + arrivals[arrival % arrivals.len()]);
            arrival += 1;
            continue;
        }
        let want = wants[turn % wants.len()].min(arrived - at);
        turn += 1;
        let n = match requests.allowed() {
            Limit::Bytes(n) => {
                let n = want.min(usize::try_from(n).unwrap_or(usize::MAX));
                requests.consumed_unseen(n as u64);
                n
            }
            Limit::Peek => {
                let window = &stream[at..at + want.min(PEEK)];
                let n = requests.limit(window);
                requests.consumed(&window[..n]);
                n
            }
        };
        assert!(n > 0, "no way on at {at}");
        if requests.is_lost() {
            reading.left = Some((at, Reason::NotRedis));
            return reading;
        }
        reading.end += n;
        if requests.at_boundary() {
            reading.boundaries.push(reading.end);
        }
    }
}
