//! When all responses are out: following what the server writes.

use std::mem::MaybeUninit;

use httparse::{ParserConfig, Response, Status};

use super::chunked::Chunked;
use super::request::decimal;
use crate::protocol::Progress;

/// Longest response head that is followed, bytes.
const MAX_HEAD: usize = 64 << 10;
const MAX_HEADERS: usize = 128;
/// Most requests that may be unanswered at a time.
const MAX_OUTSTANDING: u8 = 16;

/// What a request's method means for its response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// The response has no body, whatever its head says.
    Head,
    /// CONNECT: a 2xx response ends HTTP on this connection.
    Connect,
    /// Any other.
    Other,
}

impl From<&str> for Method {
    fn from(method: &str) -> Method {
        match method {
            "HEAD" => Method::Head,
            "CONNECT" => Method::Connect,
            _ => Method::Other,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Head,
    Left(u64),
    Chunked(Chunked),
    UntilClose,
    Upgraded,
    Unknown,
}

/// Follows the responses of one connection.
#[derive(Debug)]
pub struct ResponseTracker {
    state: State,
    outstanding: u8,
    /// One bit for each outstanding request, the oldest lowest: HEAD, CONNECT.
    head_bits: u16,
    connect_bits: u16,
    /// Begin of a response head that came in pieces; empty, and not allocated, in the common case.
    piece: Vec<u8>,
}

impl Default for ResponseTracker {
    fn default() -> Self {
        ResponseTracker {
            state: State::Head,
            outstanding: 0,
            head_bits: 0,
            connect_bits: 0,
            piece: Vec::new(),
        }
    }
}

impl ResponseTracker {
    /// The server has been given a request.
    pub fn asked(&mut self, method: Method) {
        if self.outstanding == MAX_OUTSTANDING {
            return self.fail();
        }
        let bit = 1 << self.outstanding;
        match method {
            Method::Head => self.head_bits |= bit,
            Method::Connect => self.connect_bits |= bit,
            Method::Other => {}
        }
        self.outstanding += 1;
    }

    /// Where the responses stand.
    #[must_use]
    pub fn progress(&self) -> Progress {
        match self.state {
            State::Head if self.outstanding == 0 && self.piece.is_empty() => Progress::Clean,
            State::Head | State::Left(_) | State::Chunked(_) => Progress::InProgress,
            State::UntilClose => Progress::UntilClose,
            State::Upgraded => Progress::Upgraded,
            State::Unknown => Progress::Unknown,
        }
    }

    /// The server has written these bytes.
    pub fn wrote(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let n = match &mut self.state {
                State::Head => match self.head(bytes) {
                    Some(n) => n,
                    None => return,
                },
                State::Left(left) => {
                    let n = (*left).min(bytes.len() as u64);
                    *left -= n;
                    if *left == 0 {
                        self.state = State::Head;
                    }
                    n as usize
                }
                State::Chunked(body) => {
                    let n = body.follow(bytes);
                    match body {
                        Chunked::Done => self.state = State::Head,
                        Chunked::Bad => self.fail(),
                        _ => {}
                    }
                    n
                }
                State::UntilClose | State::Upgraded | State::Unknown => return,
            };
            bytes = bytes.get(n..).unwrap_or_default();
        }
    }

    /// The server has written so many bytes that cannot be looked at (sendfile, splice): data of a body.
    pub fn wrote_unseen(&mut self, n: u64) {
        match &mut self.state {
            _ if n == 0 => {}
            State::Left(left) if n < *left => *left -= n,
            State::Left(left) if n == *left => self.state = State::Head,
            State::Chunked(body) => {
                if !body.opaque(n) {
                    self.fail();
                }
            }
            State::UntilClose | State::Upgraded => {}
            _ => self.fail(),
        }
    }

    fn fail(&mut self) {
        self.state = State::Unknown;
        self.piece = Vec::new();
    }

    /// A response head, perhaps in pieces; returns how many of `bytes` belong to it, `None` for all.
    fn head(&mut self, bytes: &[u8]) -> Option<usize> {
        let before = self.piece.len();
        // A long body may follow in the same write; it is not copied.
        let bytes = bytes.get(..MAX_HEAD + 1 - before).unwrap_or(bytes);
        let parsed = if before == 0 {
            parse(bytes)
        } else {
            self.piece.extend_from_slice(bytes);
            parse(&self.piece)
        };
        match parsed {
            Parsed::Partial if before + bytes.len() > MAX_HEAD => {
                self.fail();
                None
            }
            Parsed::Partial => {
                if before == 0 {
                    self.piece.extend_from_slice(bytes);
                }
                None
            }
            Parsed::Bad => {
                self.fail();
                None
            }
            Parsed::Head(head) => {
                self.piece = Vec::new();
                self.begin(&head);
                Some(head.len.saturating_sub(before))
            }
        }
    }

    fn begin(&mut self, head: &ResponseHead) {
        if self.outstanding == 0 {
            // An answer to nothing (408 on an idle connection, say): the server closes after it.
            self.state = State::UntilClose;
            return;
        }
        if head.status == 101 {
            self.state = State::Upgraded;
            return;
        }
        if (100..200).contains(&head.status) {
            return;
        }
        let (is_head, is_connect) = (self.head_bits & 1 != 0, self.connect_bits & 1 != 0);
        self.head_bits >>= 1;
        self.connect_bits >>= 1;
        self.outstanding -= 1;
        self.state = match head.framing {
            _ if is_connect && (200..300).contains(&head.status) => State::Upgraded,
            _ if is_head || head.status == 204 || head.status == 304 => State::Head,
            Framing::Bad => State::Unknown,
            Framing::Length(0) => State::Head,
            Framing::Length(n) => State::Left(n),
            Framing::Chunked => State::Chunked(Chunked::new()),
            Framing::Close => State::UntilClose,
        };
    }
}

enum Framing {
    Length(u64),
    Chunked,
    Close,
    Bad,
}

struct ResponseHead {
    status: u16,
    len: usize,
    framing: Framing,
}

enum Parsed {
    Partial,
    Bad,
    Head(ResponseHead),
}

fn parse(bytes: &[u8]) -> Parsed {
    let mut fields = [const { MaybeUninit::uninit() }; MAX_HEADERS];
    let mut response = Response::new(&mut []);
    let len =
        match ParserConfig::default().parse_response_with_uninit_headers(&mut response, bytes, &mut fields) {
            Ok(Status::Complete(n)) => n,
            Ok(Status::Partial) => return Parsed::Partial,
            Err(_) => return Parsed::Bad,
        };
    let Some(status) = response.code else { return Parsed::Bad };
    let (mut length, mut coding) = (None, None);
    let mut bad = false;
    for h in response.headers.iter() {
        if h.name.eq_ignore_ascii_case("content-length") {
            let value = decimal(h.value);
            bad |= value.is_none() || length.replace(value).is_some();
        } else if h.name.eq_ignore_ascii_case("transfer-encoding") {
            bad |= coding.replace(h.value.eq_ignore_ascii_case(b"chunked")).is_some();
        }
    }
    let framing = match (length.flatten(), coding) {
        _ if bad => Framing::Bad,
        (None, Some(true)) if response.version == Some(1) => Framing::Chunked,
        (_, Some(_)) => Framing::Bad,
        (Some(n), None) => Framing::Length(n),
        (None, None) => Framing::Close,
    };
    Parsed::Head(ResponseHead { status, len, framing })
}
