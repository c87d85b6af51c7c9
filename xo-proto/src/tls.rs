//! A connection's TLS: what another machine needs to go on with it, and the records themselves.
//!
//! The handshake is over when a connection moves, so there is none here: only the record layer of TLS 1.3 (RFC 8446, 5)
//! and of TLS 1.2 with AEAD suites (RFC 5246, 6.2.3.3; RFC 5288; RFC 7905), and how its keys come from the secrets that
//! OpenSSL's keylog callback tells. Ciphers, HKDF and HMAC are ring's.
//!
//! "Received" and "sent" are as the server sees them: the client's records and its own.

use std::fmt;

use bincode::{Decode, Encode};
use zeroize::Zeroize;

#[cfg(test)]
mod cost;
mod incoming;
mod keylog;
mod keys;
mod outgoing;
mod record;
mod session;
mod stream;
mod suite;
#[cfg(test)]
mod tests;

use incoming::shorten;
pub use incoming::{Control, Incoming, alert};
pub use keylog::{KeylogLine, Label, Secret};
pub use outgoing::Outgoing;
pub use record::{
    Content, HEADER, Header, MAX_PLAINTEXT, MAX_RECORD, OVERHEAD, Opened, Opener, Sealer, explicit_nonce,
};
pub use session::{End, Session};
pub use stream::{Proof, Stream};
pub use suite::{Cipher, Suite, Version};

/// Longest secret, bytes: a SHA-384 hash, or the master secret of TLS 1.2.
pub const MAX_SECRET: usize = 48;
/// Longest key, bytes.
pub const MAX_KEY: usize = 32;
/// Nonce of every suite here, bytes.
pub const NONCE: usize = 12;
/// Length of the hello messages' random values, bytes.
pub const RANDOM: usize = 32;

/// Why records cannot be read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// The suite is none of those that are known here, or not one of this version.
    #[error("unknown cipher suite")]
    Suite,
    /// A secret of a length that the suite does not have.
    #[error("a secret of the wrong length")]
    Secret,
    /// The bytes are not one complete record.
    #[error("not a record")]
    Record,
    /// The record was not made with this key and sequence number.
    #[error("the record cannot be decrypted")]
    Decrypt,
    /// The key must not be used for more.
    #[error("the sequence numbers are used up")]
    Exhausted,
}

/// What is needed to go on with a TLS connection between two records.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
pub struct TlsState {
    /// The version that was negotiated.
    pub version: Version,
    /// The cipher suite's number (IANA "TLS Cipher Suites").
    pub cipher: u16,
    /// The client's records.
    pub received: Direction,
    /// The server's records.
    pub sent: Direction,
    /// The name that the client asked for (RFC 6066, 3), empty for none.
    pub server_name: String,
    /// The application protocol that was agreed on (RFC 7301), empty for none.
    pub alpn: Vec<u8>,
}

/// Keys of one direction, and where it stands.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
pub struct Direction {
    /// TLS 1.3: the application traffic secret, in its first bytes; it makes the next one. All zero in TLS 1.2.
    pub secret: [u8; MAX_SECRET],
    /// The key, in its first bytes.
    pub key: [u8; MAX_KEY],
    /// The static part of the nonce: all of it, but in TLS 1.2 with AES-GCM only the first four bytes (the salt).
    pub iv: [u8; NONCE],
    /// TLS 1.2 with AES-GCM: the explicit part of the next record's nonce, one more than the last one's: none may come twice.
    /// Of records that are received it does not matter, for it is in them.
    pub explicit: u64,
    /// Sequence number of the next record.
    pub seq: u64,
}

impl Direction {
    /// No keys yet.
    const EMPTY: Direction =
        Direction { secret: [0; MAX_SECRET], key: [0; MAX_KEY], iv: [0; NONCE], explicit: 0, seq: 0 };
}

impl TlsState {
    /// The suite.
    ///
    /// # Errors
    /// `Suite` when there is none of that number and version.
    pub fn suite(&self) -> Result<Suite, TlsError> {
        Suite::of(self.version, self.cipher).ok_or(TlsError::Suite)
    }

    /// For the client's records.
    ///
    /// # Errors
    /// `Suite`.
    pub fn opener(&self) -> Result<Opener, TlsError> {
        Ok(Opener::new(self.suite()?, self.received.clone()))
    }

    /// For the server's records.
    ///
    /// # Errors
    /// `Suite`.
    pub fn sealer(&self) -> Result<Sealer, TlsError> {
        Ok(Sealer::new(self.suite()?, self.sent.clone()))
    }

    /// The receiving half of a record layer that begins here.
    ///
    /// # Errors
    /// `Suite`.
    pub fn incoming(&self) -> Result<Incoming, TlsError> {
        Ok(Incoming::new(self.suite()?, self.received.clone()))
    }

    /// The sending half.
    ///
    /// # Errors
    /// `Suite`.
    pub fn outgoing(&self) -> Result<Outgoing, TlsError> {
        Ok(Outgoing::new(self.suite()?, self.sent.clone()))
    }

    /// Of the record that `queue` begins with, `used` bytes of data have been used up: puts one with the rest in its place.
    /// Records after it are not touched. (Two records under one nonce: the longer one has been on the wire, the shorter one must
    /// be seen by nobody but who has the key.)
    ///
    /// # Errors
    /// Why there is no such record; the queue is then as before.
    pub fn shorten(&self, queue: &mut Vec<u8>, used: usize) -> Result<(), TlsError> {
        shorten(queue, self.suite()?, &self.received, used)
    }

    /// Is `queue`, which begins with the next record of the client, what this state is for? A machine that is given a
    /// connection asks this before it takes it: a state that does not fit would cost the client its connection.
    ///
    /// # Errors
    /// Why not. A queue without one complete record fits.
    pub fn fits(&self, queue: &[u8]) -> Result<(), TlsError> {
        let mut opener = self.opener()?;
        let Some(header) = Header::parse(queue) else {
            return if queue.len() < HEADER { Ok(()) } else { Err(TlsError::Record) };
        };
        let Some(record) = queue.get(..header.total()) else { return Ok(()) };
        let mut record = record.to_vec();
        let result = opener.open(&mut record).map(|_| ());
        record.zeroize();
        result
    }
}

impl Drop for Direction {
    fn drop(&mut self) {
        self.secret.zeroize();
        self.key.zeroize();
        self.iv.zeroize();
    }
}

/// No secret is ever printed.
impl fmt::Debug for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Direction").field("seq", &self.seq).finish_non_exhaustive()
    }
}

impl fmt::Debug for TlsState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsState")
            .field("version", &self.version)
            .field("cipher", &format_args!("{:#06x}", self.cipher))
            .field("received", &self.received)
            .field("sent", &self.sent)
            .finish_non_exhaustive()
    }
}
