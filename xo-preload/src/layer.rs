//! The record layer of a connection that has come with its TLS: the server reads and writes plain bytes, the socket has
//! records. Used where the kernel has none (kTLS).
//!
//! A record stays in the socket until its data has been used up: so a server that polls sees it as long as there is something
//! to read, and at a request's boundary all that has not been read is still there for another machine. Only the beginning of a
//! record that the socket has no room for is taken out before; the request that it belongs to is served here. Of a record that
//! the kernel has taken a part of, the data counts as not written.
//!
//! Two processes may have a connection in common after a fork. Each has its own copy of the sequence numbers, so that only one
//! can use a direction from then on: the other is told that the connection is broken (`common.rs`).

mod common;
mod end;
mod read;
mod write;

use std::ffi::{CStr, CString};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

use xo_proto::tls::{Incoming, Outgoing, TlsState, Version};

use self::common::Common;
use crate::lock::Lock;

pub(crate) use common::about_to_fork;
pub(crate) use write::Asked;

/// A connection's record layer.
pub(crate) struct Layer {
    version: Version,
    cipher: u16,
    server_name: String,
    alpn: Vec<u8>,
    receive: Lock<Incoming>,
    send: Lock<Outgoing>,
    /// The errno with which it has ended; 0 while it has not.
    broken: AtomicI32,
    /// What SO_RCVLOWAT has been raised to; 0: it has not.
    raised: AtomicUsize,
    /// The client waits for a KeyUpdate, which comes before the next data.
    owes_update: AtomicBool,
    /// `close_notify` has been sent.
    said_goodbye: AtomicBool,
    common: Common,
    /// Its server begins with a handshake, for which it makes an SSL object.
    handshake: bool,
    /// For a server that has an SSL object for the connection: its name as a C string, and what the last call came to.
    name: Option<CString>,
    has_ssl: AtomicBool,
    ssl_error: AtomicI32,
}

impl Layer {
    /// Goes on with a connection; `handshake`: its server begins with one. `None` when there is no such suite, or no memory.
    pub(crate) fn new(state: &TlsState, handshake: bool) -> Option<Layer> {
        Some(Layer {
            version: state.version,
            cipher: state.cipher,
            server_name: state.server_name.clone(),
            alpn: state.alpn.clone(),
            receive: Lock::new(state.incoming().ok()?),
            send: Lock::new(state.outgoing().ok()?),
            broken: AtomicI32::new(0),
            raised: AtomicUsize::new(0),
            owes_update: AtomicBool::new(false),
            said_goodbye: AtomicBool::new(false),
            common: Common::new()?,
            handshake,
            name: CString::new(state.server_name.as_str()).ok().filter(|name| !name.is_empty()),
            has_ssl: AtomicBool::new(false),
            ssl_error: AtomicI32::new(0),
        })
    }

    /// What another machine needs, and how much data of the first record in the socket has been used up. `None` while something
    /// is on its way out.
    pub(crate) fn state(&self, fd: i32) -> Option<(TlsState, u32)> {
        if self.broken.load(Ordering::Acquire) != 0 || self.said_goodbye.load(Ordering::Acquire) {
            return None;
        }
        let incoming = self.receive.lock();
        let mut outgoing = self.send.lock();
        if self.common.is_shared() || incoming.end().is_some() {
            return None;
        }
        self.pay_update(fd, &mut outgoing);
        let (received, used) = incoming.state()?;
        let state = TlsState {
            version: self.version,
            cipher: self.cipher,
            received,
            sent: outgoing.state().filter(|_| !self.owes_update.load(Ordering::Acquire))?,
            server_name: self.server_name.clone(),
            alpn: self.alpn.clone(),
        };
        Some((state, u32::try_from(used).ok()?))
    }

    /// The version that was negotiated.
    pub(crate) fn version(&self) -> Version {
        self.version
    }

    /// The cipher suite's number.
    pub(crate) fn cipher(&self) -> u16 {
        self.cipher
    }

    /// The application protocol, empty for none.
    pub(crate) fn alpn(&self) -> &[u8] {
        &self.alpn
    }

    /// The name that the client asked for.
    pub(crate) fn server_name(&self) -> Option<&CStr> {
        self.name.as_deref()
    }

    /// Has the server an SSL object for it?
    pub(crate) fn has_ssl(&self) -> bool {
        self.has_ssl.load(Ordering::Acquire)
    }

    /// Will the server begin with a handshake?
    pub(crate) fn awaits_handshake(&self) -> bool {
        self.handshake && !self.has_ssl()
    }

    /// It has.
    pub(crate) fn set_ssl(&self) {
        self.has_ssl.store(true, Ordering::Release);
    }

    /// What the last call on the SSL object came to (`SSL_ERROR_*`).
    pub(crate) fn ssl_error(&self) -> i32 {
        self.ssl_error.load(Ordering::Acquire)
    }

    /// As [`Layer::ssl_error`].
    pub(crate) fn set_ssl_error(&self, error: i32) {
        self.ssl_error.store(error, Ordering::Release);
    }

    fn fail(&self, errno: i32) -> i32 {
        match self.broken.compare_exchange(0, errno, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => errno,
            Err(before) => before,
        }
    }
}
