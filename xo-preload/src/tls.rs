//! Connections with TLS: their secrets, where their records stand, and what the next request is.
//!
//! OpenSSL goes on as if nobody were there: its secrets come by its keylog callback (`secrets.rs`), its records pass through the
//! hooks on read and write like any bytes (`follow.rs`), what it gives to and takes from the server passes through the hooks on
//! `SSL_read` and `SSL_write` (`ssl.rs`). At a request's boundary the records that wait in the socket are looked at, opened
//! in memory of ours, and decided about (`look.rs`); they stay in the socket.
//!
//! Which connection an SSL object belongs to is seen by what is read while it is in a call: that holds for sockets that
//! OpenSSL reads itself and for a server's own BIOs. A server that reads beside its SSL calls (memory BIOs) is left alone.

mod follow;
pub(crate) mod home;
mod look;
mod openssl;
mod secrets;
pub(crate) mod ssl;

use std::sync::atomic::{AtomicBool, Ordering};

use xo_proto::reason::Reason;
use xo_proto::tls::{Direction, Proof, RANDOM, Secret, Stream, Suite, TlsState, Version};

use crate::conn::{Conn, ReadHalf};

pub(crate) use follow::{read, wrote, wrote_unseen};

/// Every record that is sent is opened again, to see that its sequence number is known: for tests.
static CHECKS: AtomicBool = AtomicBool::new(false);

/// At load.
pub(crate) fn check() {
    CHECKS.store(true, Ordering::Relaxed);
}

/// What was agreed on in the handshake.
pub(crate) struct Agreed {
    version: Version,
    cipher: u16,
    server_name: String,
    alpn: Vec<u8>,
}

/// The reading half's.
pub(crate) struct Received {
    stream: Stream,
    /// The server may read so much: whole records that have been looked at.
    allowed: usize,
    agreed: Option<Agreed>,
    /// TLS 1.2.
    master: Option<Secret>,
}

/// The writing half's.
pub(crate) struct Sent {
    stream: Stream,
}

impl Received {
    /// What another machine needs, if both directions are between two records and known.
    pub(crate) fn state(&self, sent: &Sent) -> Option<TlsState> {
        let agreed = self.agreed.as_ref()?;
        Some(TlsState {
            version: agreed.version,
            cipher: agreed.cipher,
            received: self.stream.state()?,
            sent: sent.stream.state()?,
            server_name: agreed.server_name.clone(),
            alpn: agreed.alpn.clone(),
        })
    }

    /// TLS 1.2: both directions' keys.
    fn derive(&self, client: &[u8; RANDOM], server: &[u8; RANDOM]) -> Option<[Direction; 2]> {
        let suite = Suite::of(Version::Tls12, self.agreed.as_ref()?.cipher)?;
        Direction::from_master(suite, self.master.as_ref()?.master()?, client, server).ok()
    }
}

/// Do these bytes, a connection's first, begin a handshake (RFC 8446, 5.1: a record of type 22)?
pub(crate) fn begins(bytes: &[u8]) -> bool {
    matches!(bytes, [22, 3, ..] | [22])
}

/// A connection begins with a handshake: it is followed from here on, or a reason why not.
#[cold]
pub(crate) fn begin(conn: &Conn, index: u32, half: &mut ReadHalf) -> Result<(), Reason> {
    ssl::bind(conn, index)?;
    let mut write = conn.write().ok_or(Reason::Shared)?;
    let proof = if CHECKS.load(Ordering::Relaxed) { Proof::Every } else { Proof::First };
    write.tls = Some(Box::new(Sent { stream: Stream::new(proof) }));
    let stream = Stream::new(Proof::None);
    half.tls = Some(Box::new(Received { stream, allowed: 0, agreed: None, master: None }));
    Ok(())
}
