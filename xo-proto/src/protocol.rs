//! The seam between the protocols and the library: what it asks about a connection's bytes, whatever they speak.
//!
//! A protocol says where requests end ([`Requests`]) and when all responses are out ([`Responses`]); how requests are
//! looked at and decided about differs too much to be one function, and stands in the library beside each other. Enums
//! and not traits: the state lives in a table that all protocols share, and is copied.

use crate::http::{self, RequestTracker, ResponseTracker};
use crate::resp;

/// What is spoken on a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// HTTP/1.x.
    #[default]
    Http,
    /// Redis's RESP.
    Redis,
}

impl Protocol {
    /// All names.
    pub const NAMES: [(&'static str, Protocol); 2] = [("http", Protocol::Http), ("redis", Protocol::Redis)];

    /// By its name in a policy.
    #[must_use]
    pub fn named(name: &str) -> Option<Protocol> {
        Protocol::NAMES.iter().find(|(n, _)| *n == name).map(|(_, p)| *p)
    }
}

/// A request, as far as it decides where it is served.
#[derive(Clone, Copy)]
pub enum Request<'b> {
    /// HTTP.
    Http(&'b http::RequestHead<'b>),
    /// Redis.
    Redis(&'b resp::Command),
}

impl<'b> From<&'b http::RequestHead<'b>> for Request<'b> {
    fn from(head: &'b http::RequestHead<'b>) -> Request<'b> {
        Request::Http(head)
    }
}

impl<'b> From<&'b resp::Command> for Request<'b> {
    fn from(command: &'b resp::Command) -> Request<'b> {
        Request::Redis(command)
    }
}

/// How far the application may read now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Up to so many bytes: the rest of the request, as far as it is known.
    Bytes(u64),
    /// The bytes in the socket have to be looked at first: see [`Requests::limit`].
    Peek,
}

/// How far the responses are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Every request has its complete response.
    Clean,
    /// A response is missing or incomplete.
    InProgress,
    /// The last response lasts until the connection closes.
    UntilClose,
    /// The connection has changed to another protocol.
    Upgraded,
    /// What was written could not be followed.
    Unknown,
}

/// Follows what the application reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Requests {
    /// HTTP.
    Http(RequestTracker),
    /// Redis.
    Redis(resp::Requests),
}

/// The same of either.
macro_rules! either {
    ($kind:ident, $value:expr, $inner:ident => $result:expr) => {
        match $value {
            $kind::Http($inner) => $result,
            $kind::Redis($inner) => $result,
        }
    };
}

impl Requests {
    /// Of a new connection.
    #[must_use]
    pub fn new(protocol: Protocol) -> Requests {
        match protocol {
            Protocol::Http => Requests::Http(RequestTracker::Boundary),
            Protocol::Redis => Requests::Redis(resp::Requests::default()),
        }
    }

    /// Is the next byte the first of a request?
    #[must_use]
    pub fn at_boundary(&self) -> bool {
        either!(Requests, self, r => r.at_boundary())
    }

    /// Can the end of the request not be known?
    #[must_use]
    pub fn is_lost(&self) -> bool {
        either!(Requests, self, r => r.is_lost())
    }

    /// How far the application may read without crossing the end of what it may have.
    #[must_use]
    pub fn allowed(&self) -> Limit {
        either!(Requests, self, r => r.allowed())
    }

    /// How many of these bytes, the next in the socket, belong to the request. For [`Limit::Peek`] within a request.
    #[must_use]
    pub fn limit(&self, peeked: &[u8]) -> usize {
        either!(Requests, self, r => r.limit(peeked))
    }

    /// The application has read these bytes.
    pub fn consumed(&mut self, bytes: &[u8]) {
        either!(Requests, self, r => r.consumed(bytes));
    }

    /// The application has read so many bytes, within what [`Requests::allowed`] gave.
    pub fn consumed_unseen(&mut self, n: u64) {
        either!(Requests, self, r => r.consumed_unseen(n));
    }
}

/// Follows what the application writes.
#[derive(Debug)]
pub enum Responses {
    /// HTTP.
    Http(ResponseTracker),
    /// Redis.
    Redis(resp::Replies),
}

impl Default for Responses {
    fn default() -> Self {
        Responses::new(Protocol::default())
    }
}

impl Responses {
    /// Of a new connection.
    #[must_use]
    pub fn new(protocol: Protocol) -> Responses {
        match protocol {
            Protocol::Http => Responses::Http(ResponseTracker::default()),
            Protocol::Redis => Responses::Redis(resp::Replies::default()),
        }
    }

    /// Where the responses stand.
    #[must_use]
    pub fn progress(&self) -> Progress {
        either!(Responses, self, r => r.progress())
    }

    /// The application has written these bytes.
    pub fn wrote(&mut self, bytes: &[u8]) {
        either!(Responses, self, r => r.wrote(bytes));
    }

    /// The application has written so many bytes that cannot be looked at (sendfile, splice).
    pub fn wrote_unseen(&mut self, n: u64) {
        either!(Responses, self, r => r.wrote_unseen(n));
    }
}
