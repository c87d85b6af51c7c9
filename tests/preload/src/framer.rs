//! A stream of requests as the library would frame it, were a server to read it all.

use xo_proto::http::{Body, Head, Limit, RequestHead, RequestTracker, parse_head};
use xo_proto::reason::Reason;

/// A complete request, as the library understands it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Method.
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Body, chunked coding removed.
    pub body: Vec<u8>,
    /// The client says that the connection ends with it.
    pub close: bool,
    /// Where it ends in the stream.
    pub end: usize,
}

/// Why no further request was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// All is read, the last request is complete.
    End,
    /// The stream ends within a request.
    Incomplete,
    /// Left alone from here on, for this reason.
    Left(Reason),
}

/// Frames a stream, taking at most `size` bytes a read.
///
/// # Panics
/// When the tracker gives no way on.
#[must_use]
pub fn frame(stream: &[u8], size: usize) -> (Vec<Request>, Stop) {
    let mut requests: Vec<Request> = Vec::new();
    let mut at = 0;
    loop {
        if at == stream.len() {
            return (requests, Stop::End);
        }
        let head = match parse_head(&stream[at..]) {
            Head::Partial => return (requests, Stop::Incomplete),
            Head::TooLong => return (requests, Stop::Left(Reason::HeadTooLong)),
            Head::Refused(reason) => return (requests, Stop::Left(reason)),
            Head::Complete(head) if head.upgrade => return (requests, Stop::Left(Reason::Upgraded)),
            Head::Complete(head) => head,
        };
        match read(&head, &stream[at..], size) {
            Ok(n) => {
                requests.push(request(&head, &stream[at..at + n], at + n));
                at += n;
            }
            Err(stop) => return (requests, stop),
        }
    }
}

/// Reads the request that begins `stream`; its length.
fn read(head: &RequestHead<'_>, stream: &[u8], size: usize) -> Result<usize, Stop> {
    let mut tracker = RequestTracker::Boundary;
    tracker.begin(head);
    let mut at = 0;
    while at < stream.len() {
        let window = &stream[at..stream.len().min(at + size)];
        let n = match tracker.allowed() {
            Limit::Bytes(n) => {
                let n = window.len().min(usize::try_from(n).unwrap_or(usize::MAX));
                tracker.consumed_unseen(n as u64);
                n
            }
            Limit::Peek => {
                let n = tracker.limit(window);
                tracker.consumed(&window[..n]);
                n
            }
        };
        assert!(n > 0, "no way on at {at}");
        at += n;
        if tracker.at_boundary() {
            return Ok(at);
        }
        if tracker == RequestTracker::Lost {
            return Err(Stop::Left(Reason::AmbiguousFraming));
        }
    }
    Err(Stop::Incomplete)
}

fn request(head: &RequestHead<'_>, bytes: &[u8], end: usize) -> Request {
    let body = match head.body {
        Body::None => Vec::new(),
        Body::Length(_) => bytes[head.len..].to_vec(),
        Body::Chunked => plain(&bytes[head.len..]),
    };
    let query = head.query.map_or(String::new(), |q| format!("?{q}"));
    let target = format!("{}{query}", head.path);
    Request { method: head.method.into(), target, body, close: head.close, end }
}

/// A complete chunked body's data.
fn plain(mut coded: &[u8]) -> Vec<u8> {
    let mut data = Vec::new();
    loop {
        let line_end = coded.windows(2).position(|w| w == b"\r\n").expect("a size line");
        let line = String::from_utf8_lossy(&coded[..line_end]).into_owned();
        let size = line.split([';', ' ', '\t']).next().map(|s| usize::from_str_radix(s, 16));
        match size.expect("a piece").expect("a size") {
            0 => return data,
            n => {
                data.extend_from_slice(&coded[line_end + 2..line_end + 2 + n]);
                coded = &coded[line_end + 2 + n + 2..];
            }
        }
    }
}
