//! Request heads and the end of requests.

use std::mem::MaybeUninit;

use httparse::{Header, Request, Status};

use super::chunked::Chunked;
use crate::protocol::Limit;
use crate::reason::Reason;

/// Longest head that is looked at, bytes.
pub const MAX_HEAD: usize = 16 << 10;
/// Most header fields that are looked at.
const MAX_HEADERS: usize = 100;

/// What the first bytes of a request are.
pub enum Head<'b> {
    /// So far a request; more is needed.
    Partial,
    /// Longer than [`MAX_HEAD`].
    TooLong,
    /// Not HTTP/1.x, or framed in a way that is not followed.
    Refused(Reason),
    /// A complete head.
    Complete(RequestHead<'b>),
}

/// How a request's body is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// None.
    None,
    /// Content-Length, bytes, not 0.
    Length(u64),
    /// Transfer-Encoding: chunked.
    Chunked,
}

/// A complete request head.
pub struct RequestHead<'b> {
    /// Method, as sent.
    pub method: &'b str,
    /// Request target, as sent.
    pub target: &'b str,
    /// Path of the target, as sent, without the query.
    pub path: &'b str,
    /// Query, without the `?`.
    pub query: Option<&'b str>,
    /// Authority: of an absolute target, else the Host field.
    pub host: Option<&'b str>,
    /// Minor version: 0 or 1.
    pub minor: u8,
    /// Length of the head, the empty line included, bytes.
    pub len: usize,
    /// Framing of the body.
    pub body: Body,
    /// The connection ends after the response.
    pub close: bool,
    /// CONNECT, or an Upgrade field: HTTP may end here.
    pub upgrade: bool,
    /// `Expect: 100-continue`.
    pub expect_continue: bool,
    /// All of it, for who asks for a field: few policies do, and what is parsed is not kept.
    bytes: &'b [u8],
}

impl<'b> RequestHead<'b> {
    /// Values of all fields of this name, in order.
    pub fn header(&self, name: &str) -> impl Iterator<Item = &'b [u8]> {
        let lines = self.bytes.split(|b| *b == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
        lines.skip_while(|line| line.is_empty()).skip(1).filter_map(move |line| {
            let colon = line.iter().position(|b| *b == b':')?;
            let (field, value) = line.split_at_checked(colon)?;
            field
                .eq_ignore_ascii_case(name.as_bytes())
                .then(|| value.get(1..).unwrap_or_default().trim_ascii())
        })
    }
}

/// Looks at the first bytes after a boundary.
#[must_use]
pub fn parse_head(bytes: &[u8]) -> Head<'_> {
    if !begins_like_http(bytes) {
        return Head::Refused(Reason::NotHttp);
    }
    let mut fields = [const { MaybeUninit::uninit() }; MAX_HEADERS];
    let mut request = Request::new(&mut []);
    let len = match request.parse_with_uninit_headers(bytes, &mut fields) {
        Ok(Status::Complete(n)) if n > MAX_HEAD => return Head::TooLong,
        Ok(Status::Complete(n)) => n,
        Ok(Status::Partial) if bytes.len() >= MAX_HEAD => return Head::TooLong,
        Ok(Status::Partial) => return Head::Partial,
        Err(httparse::Error::TooManyHeaders) => return Head::TooLong,
        Err(_) => return Head::Refused(Reason::NotHttp),
    };
    let (Some(method), Some(target), Some(minor)) = (request.method, request.path, request.version) else {
        return Head::Refused(Reason::NotHttp);
    };
    let bytes = bytes.get(..len).unwrap_or(bytes);
    if oddly_written(bytes) {
        return Head::Refused(Reason::AmbiguousFraming);
    }
    let mut head = RequestHead {
        method,
        target,
        path: target,
        query: None,
        host: None,
        minor,
        len,
        body: Body::None,
        close: false,
        upgrade: method == "CONNECT",
        expect_continue: false,
        bytes,
    };
    match head.read_fields(request.headers) {
        Ok(()) => {
            head.split_target();
            Head::Complete(head)
        }
        Err(reason) => Head::Refused(reason),
    }
}

/// The first byte tells TLS, SSH greetings and binary protocols from a method; a few more tell the rest.
fn begins_like_http(bytes: &[u8]) -> bool {
    // A CRLF or two before the request line is tolerated by RFC 9112 section 2.2.
    let begin = bytes.iter().take(5).position(|b| !matches!(b, b'\r' | b'\n'));
    let Some(rest) = begin.and_then(|n| bytes.get(n..)) else { return bytes.len() < 5 };
    let end = rest.iter().position(|b| *b == b' ').unwrap_or(rest.len());
    end > 0 && end <= 32 && rest.iter().take(end).all(|b| b.is_ascii_alphabetic() || matches!(b, b'-' | b'_'))
}

/// Line ends other than CRLF, folded lines, zeros: parsers differ on them. Every byte is looked at beside the one before
/// it, and without a branch, so that the compiler takes many at a time.
pub(super) fn oddly_written(head: &[u8]) -> bool {
    let (Some(first), Some(rest)) = (head.first(), head.get(1..)) else { return false };
    let begins_oddly = matches!(first, 0 | b'\n');
    head.iter().zip(rest).fold(begins_oddly, |odd, (&last, &b)| {
        let bare = (last == b'\r') != (b == b'\n');
        let folded = (last == b'\n') & ((b == b' ') | (b == b'\t'));
        odd | bare | folded | (b == 0)
    })
}

impl<'b> RequestHead<'b> {
    fn read_fields(&mut self, fields: &[Header<'b>]) -> Result<(), Reason> {
        let (mut length, mut coding) = (None, None);
        let (mut keep_alive, mut hosts) = (false, 0);
        for h in fields {
            let is = |name: &str| h.name.eq_ignore_ascii_case(name);
            if is("content-length") {
                // Twice, even with the same value, is what smuggling looks like.
                if length.replace(decimal(h.value).ok_or(Reason::AmbiguousFraming)?).is_some() {
                    return Err(Reason::AmbiguousFraming);
                }
            } else if is("transfer-encoding") {
                if coding.replace(h.value.eq_ignore_ascii_case(b"chunked")).is_some() {
                    return Err(Reason::AmbiguousFraming);
                }
            } else if is("connection") {
                self.close |= has_token(h.value, "close");
                keep_alive |= has_token(h.value, "keep-alive");
            } else if is("upgrade") {
                self.upgrade = true;
            } else if is("expect") {
                self.expect_continue = h.value.eq_ignore_ascii_case(b"100-continue");
            } else if is("host") {
                hosts += 1;
                self.host = std::str::from_utf8(h.value).ok();
            }
        }
        self.close |= self.minor == 0 && !keep_alive;
        self.body = match (length, coding) {
            (_, Some(false)) | (Some(_), Some(_)) => return Err(Reason::AmbiguousFraming),
            (None, Some(true)) if self.minor == 0 => return Err(Reason::AmbiguousFraming),
            (None, Some(true)) => Body::Chunked,
            (None | Some(0), None) => Body::None,
            (Some(n), None) => Body::Length(n),
        };
        if hosts > 1 { Err(Reason::AmbiguousFraming) } else { Ok(()) }
    }

    fn split_target(&mut self) {
        let mut rest = self.target;
        // Servers take any scheme for HTTP's. A search for text is dear, and most targets begin with a slash.
        let relative = rest.starts_with('/');
        let absolute = if relative { None } else { rest.split_once("://") };
        let absolute = absolute.filter(|(scheme, _)| is_scheme(scheme));
        if let Some((_, authority)) = absolute {
            let end = authority.find(['/', '?']).unwrap_or(authority.len());
            self.host = authority.get(..end);
            rest = authority.get(end..).unwrap_or_default();
        }
        (self.path, self.query) = match rest.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (rest, None),
        };
        if self.path.is_empty() {
            self.path = "/";
        }
    }
}

/// RFC 3986 section 3.1.
fn is_scheme(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.'))
}

/// Digits and nothing else; so many that no arithmetic with them overflows.
pub(super) fn decimal(value: &[u8]) -> Option<u64> {
    if value.is_empty() || value.len() > 18 {
        return None;
    }
    value.iter().try_fold(0_u64, |n, b| b.is_ascii_digit().then(|| n * 10 + u64::from(b - b'0')))
}

fn has_token(value: &[u8], token: &str) -> bool {
    value.split(|b| *b == b',').any(|t| t.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
}

/// Follows what the application reads, from one request's beginning to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestTracker {
    /// Between two requests.
    Boundary,
    /// So many bytes of this request are left to read.
    Left(u64),
    /// So many bytes of the head are left, then a chunked body follows.
    ChunkedHead(u64),
    /// In a chunked body.
    ChunkedBody(ChunkedBody),
    /// The body is not the chunked coding: the end cannot be known.
    Lost,
}

/// State of a chunked request body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkedBody(Chunked);

impl RequestTracker {
    /// Is the next byte the first of a request?
    #[must_use]
    pub fn at_boundary(&self) -> bool {
        matches!(self, RequestTracker::Boundary)
    }

    /// Can the end of the request not be known?
    #[must_use]
    pub fn is_lost(&self) -> bool {
        matches!(self, RequestTracker::Lost)
    }

    /// A request begins; none of its bytes has been read.
    pub fn begin(&mut self, head: &RequestHead<'_>) {
        let len = head.len as u64;
        *self = match head.body {
            Body::None => RequestTracker::Left(len),
            Body::Length(n) => RequestTracker::Left(len.saturating_add(n)),
            Body::Chunked => RequestTracker::ChunkedHead(len),
        };
    }

    /// How far the application may read without crossing the request's end.
    #[must_use]
    pub fn allowed(&self) -> Limit {
        match *self {
            RequestTracker::Left(n) | RequestTracker::ChunkedHead(n) => Limit::Bytes(n),
            RequestTracker::Boundary | RequestTracker::ChunkedBody(_) => Limit::Peek,
            RequestTracker::Lost => Limit::Bytes(u64::MAX),
        }
    }

    /// How many of these bytes, the next in the socket, belong to the request. For [`Limit::Peek`] within a
    /// request.
    #[must_use]
    pub fn limit(&self, peeked: &[u8]) -> usize {
        match *self {
            RequestTracker::ChunkedBody(ChunkedBody(mut body)) => match body.follow(peeked) {
                _ if body == Chunked::Bad => peeked.len(),
                n => n,
            },
            _ => peeked.len(),
        }
    }

    /// The application has read these bytes.
    pub fn consumed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let n = match self {
                RequestTracker::Left(n) | RequestTracker::ChunkedHead(n) => {
                    (*n).min(bytes.len() as u64) as usize
                }
                RequestTracker::ChunkedBody(ChunkedBody(body)) => {
                    let n = body.follow(bytes);
                    *self = match *body {
                        Chunked::Done => RequestTracker::Boundary,
                        Chunked::Bad => RequestTracker::Lost,
                        state => RequestTracker::ChunkedBody(ChunkedBody(state)),
                    };
                    bytes = bytes.get(n..).unwrap_or_default();
                    if n == 0 { return } else { continue }
                }
                RequestTracker::Boundary => {
                    *self = RequestTracker::Lost;
                    return;
                }
                RequestTracker::Lost => return,
            };
            self.consumed_unseen(n as u64);
            bytes = bytes.get(n..).unwrap_or_default();
        }
    }

    /// The application has read so many bytes, within what [`RequestTracker::allowed`] gave.
    pub fn consumed_unseen(&mut self, n: u64) {
        *self = match *self {
            RequestTracker::Left(left) if n == left => RequestTracker::Boundary,
            RequestTracker::Left(left) if n < left => RequestTracker::Left(left - n),
            RequestTracker::ChunkedHead(left) if n == left => {
                RequestTracker::ChunkedBody(ChunkedBody(Chunked::new()))
            }
            RequestTracker::ChunkedHead(left) if n < left => RequestTracker::ChunkedHead(left - n),
            _ if n == 0 => *self,
            _ => RequestTracker::Lost,
        };
    }
}
