//! HTTP/1.x framing: where a request ends, and when its response is complete (RFC 9112).
//!
//! Nothing here changes a byte. What is ambiguous is refused, so that a request can never be framed one way
//! here and another way by the server behind: such a connection is left alone.

mod chunked;
mod request;
mod response;

pub use request::{Body, Head, MAX_HEAD, RequestHead, RequestTracker, parse_head};
pub use response::{Method, ResponseTracker};

pub use crate::protocol::{Limit, Progress};

#[cfg(test)]
mod tests;
