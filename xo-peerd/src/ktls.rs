//! Connections with TLS for handlers that are programs of their own (`exec`, `pool`): the kernel does the record layer.
//!
//! Keys are installed while the socket is in repair mode still, so that what this kernel does not take is refused, and
//! the connection stays where it was. From then on the program reads and writes plain bytes, sendfile(2) included. What it
//! cannot do is say good-bye: nobody but who writes a record of its own sends `close_notify`. So this daemon keeps a
//! descriptor of each such connection until its handler has done with it.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use xo_proto::reason::Reason;
use xo_proto::tls::{self, Cipher, Content, HEADER, Header, TlsState};
use xo_sys::ktls::{self, CLOSE_NOTIFY, Direction, Keys, Suite, Support, Version, kind};
use xo_sys::raw;
use xo_sys::tcp_repair::Repaired;
use zeroize::Zeroizing;

use crate::records::Records;

/// How long a client may take to make room for what its handler has written, and the good-bye after it.
const PATIENCE: Duration = Duration::from_secs(60);

/// What this kernel's TLS is used for.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct KernelTls(Option<Support>);

impl KernelTls {
    /// Looks what the kernel can do, as far as that is wanted.
    pub(crate) fn probe(records: Records) -> KernelTls {
        if records == Records::Library {
            return KernelTls(None);
        }
        match available() {
            Ok(support) => KernelTls(Some(support)),
            Err(why) => {
                log::info!("connections with TLS are not served by the kernel: {why}");
                KernelTls(None)
            }
        }
    }

    /// Is it used?
    pub(crate) fn is_some(self) -> bool {
        self.0.is_some()
    }

    /// Does it know the connection's suite?
    pub(crate) fn has(self, tls: &TlsState) -> bool {
        let known = |suite| {
            let (version, cipher) = names(suite);
            self.0.is_some_and(|support| support.has(version, cipher))
        };
        tls.suite().is_ok_and(known)
    }

    /// Can this connection be served by the kernel? `received` are the records that wait in it. How many plain bytes that
    /// are.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn takes(self, tls: &TlsState, received: &[u8]) -> Result<u32, String> {
        let Some(support) = self.0 else {
            return Err("this kernel's TLS is not used".into());
        };
        let suite = tls.suite().map_err(|e| e.to_string())?;
        let (version, cipher) = names(suite);
        if !support.has(version, cipher) {
            return Err(format!("this kernel takes no {cipher:?} with {version:?}"));
        }
        waiting(tls, received)
    }
}

/// What the kernel's TLS can do, if that is enough to be used: both versions, and the suite that all clients have.
///
/// # Errors
/// Why it is not.
pub(crate) fn available() -> Result<Support, String> {
    let support = ktls::probe().map_err(|e| e.to_string())?;
    let enough = Version::ALL.into_iter().all(|version| support.has(version, Suite::Aes128Gcm));
    if enough { Ok(support) } else { Err("it lacks a version of TLS, or AES-128-GCM".into()) }
}

fn names(suite: tls::Suite) -> (Version, Suite) {
    let version = match suite.version() {
        tls::Version::Tls12 => Version::Tls12,
        tls::Version::Tls13 => Version::Tls13,
    };
    let cipher = match suite.cipher() {
        Cipher::Aes128Gcm => Suite::Aes128Gcm,
        Cipher::Aes256Gcm => Suite::Aes256Gcm,
        Cipher::Chacha20Poly1305 => Suite::ChaCha20Poly1305,
    };
    (version, cipher)
}

/// Plain bytes in the whole records of a queue. A program cannot read beyond a handshake message of the client, which changes
/// keys; one that comes later ends the connection, one that is there already is somebody else's.
fn waiting(tls: &TlsState, queue: &[u8]) -> Result<u32, String> {
    let mut opener = tls.opener().map_err(|e| e.to_string())?;
    let (mut rest, mut plain) = (queue, 0);
    while let Some(header) = Header::parse(rest).filter(|h| h.total() <= rest.len()) {
        let (record, after) = rest.split_at(header.total());
        let mut record = Zeroizing::new(record.to_vec());
        let opened = opener.open(&mut record).map_err(|e| e.to_string())?;
        match opened.content {
            Content::Data => plain += opened.data.len() as u32,
            // It is the last that can be read.
            Content::Alert => break,
            Content::Handshake | Content::ChangeCipherSpec => {
                return Err("the client has changed its key, which this kernel cannot follow".into());
            }
        }
        rest = after;
    }
    // What is no record at all ends it here as it would elsewhere.
    if rest.len() >= HEADER && Header::parse(rest).is_none() {
        return Err("what waits is no record".into());
    }
    Ok(plain)
}

/// A direction as the kernel takes it.
fn keys(suite: tls::Suite, of: &tls::Direction) -> Option<Keys> {
    let (version, cipher) = names(suite);
    let mut iv = of.iv;
    if suite.has_explicit_nonce() {
        // The kernel counts it up.
        iv[4..].copy_from_slice(&of.explicit.to_be_bytes());
    }
    Keys::new(version, cipher, of.key.get(..cipher.key_len())?, iv, of.seq)
}

/// This daemon's descriptor of a connection whose records are the kernel's.
pub(crate) struct Kept {
    socket: OwnedFd,
    /// Plain bytes that can be read from it at first.
    pub(crate) waiting: u32,
}

impl Kept {
    /// Gives a restored socket its keys; the state is the connection's between two records.
    ///
    /// # Errors
    /// Why the kernel does not take them.
    pub(crate) fn install(
        restored: &Repaired,
        tls: &TlsState,
        waiting: u32,
    ) -> Result<Kept, (Reason, String)> {
        let refused = |text: String| (Reason::TlsUnsupported, text);
        let suite = tls.suite().map_err(|e| refused(e.to_string()))?;
        let both = keys(suite, &tls.sent).zip(keys(suite, &tls.received));
        let (send, receive) = both.ok_or((Reason::TlsState, "a key of the wrong length".to_owned()))?;
        let fd = restored.as_raw_fd();
        ktls::attach(fd)
            .and_then(|()| ktls::install(fd, Direction::Send, &send))
            .and_then(|()| ktls::install(fd, Direction::Receive, &receive))
            .map_err(|e| refused(e.to_string()))?;
        let socket = restored.try_clone().map_err(|e| (Reason::RestoreFailed, e.to_string()))?;
        Ok(Kept { socket, waiting })
    }
}

/// A connection that its handler has done with.
pub(crate) struct Farewell {
    socket: OwnedFd,
    client: SocketAddr,
    said: bool,
    until: Instant,
}

impl Farewell {
    /// Nothing has been said yet.
    pub(crate) fn of(kept: Kept, client: SocketAddr, now: Instant) -> Farewell {
        Farewell { socket: kept.socket, client, said: false, until: now + PATIENCE }
    }

    /// Says `close_notify` when there is room for it; the end of the descriptor is the end of the connection. Is it over?
    ///
    /// Records that were written and did not fit into the socket wait in the kernel for room, and are lost when it is closed.
    /// Where there is room there is nothing left of them.
    pub(crate) fn go_on(&mut self, now: Instant) -> bool {
        let fd = self.socket.as_raw_fd();
        if !self.said && raw::is_writable(fd) {
            match ktls::send_record(fd, kind::ALERT, &CLOSE_NOTIFY, libc::MSG_DONTWAIT) {
                Ok(_) => self.said = true,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(e) => {
                    log::debug!("close_notify to {}: {e}", self.client);
                    return true;
                }
            }
        }
        (self.said && raw::is_writable(fd)) || now >= self.until
    }
}

#[cfg(test)]
pub(crate) mod tests;
