//! A connection that comes to a server with TLS of its own, at home or at a target: the server begins with a handshake, which is
//! long over. OpenSSL never gets to see it; what the server asks of its SSL object is answered from the connection's record layer.
//!
//! The two find each other when OpenSSL reads the socket for the first time, inside a call on the object. It is given what it takes
//! for a request without TLS: at that it gives up, without an alert and without reading (so perhaps waiting) for more; then the
//! call's result is changed. From then on plain data is read and written where OpenSSL reads and writes records: in the socket,
//! or, where a server has its own BIOs, through those, with all that they do about waiting.

use std::cell::Cell;
use std::ffi::{c_char, c_int, c_uchar, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::iovec;
use xo_proto::reason::Reason;
use xo_proto::tls::Version;

use super::openssl::{self, Object, OpenSsl};
use super::ssl::{cookie, current};
use crate::conn::{self, Conn, Kind};
use crate::daemon;
use crate::io::{self, set_errno};
use crate::layer::Layer;

/// In an SSL object's word: the connection has a record layer.
const LAYERED: usize = 1 << 31;
/// A handshake record's first bytes: some servers look whether a client begins with TLS.
const HANDSHAKE: [u8; 6] = [22, 3, 1, 2, 0, 1];
/// `SSL_ERROR_*` (ssl.h).
mod error {
    pub(super) const NONE: i32 = 0;
    pub(super) const WANT_READ: i32 = 2;
    pub(super) const WANT_WRITE: i32 = 3;
    pub(super) const SYSCALL: i32 = 5;
    pub(super) const ZERO_RETURN: i32 = 6;
}

/// There is such a connection in this process, or has been.
static ANY: AtomicBool = AtomicBool::new(false);

/// What OpenSSL calls `SSL_R_HTTP_REQUEST`: as long as a record's header, which it reads first.
const REQUEST: [u8; 5] = *b"HEAD ";

/// A connection that OpenSSL has just read for the first time.
#[derive(Clone, Copy)]
struct Met {
    index: u32,
    conn: &'static Conn,
    /// So much of [`REQUEST`] it has been given.
    given: usize,
}

thread_local! {
    static MET: Cell<Option<Met>> = const { Cell::new(None) };
}

/// Somebody reads a connection with a record layer: is it OpenSSL, or a server that looks for a handshake? `Some` is what to return.
pub(crate) fn reading(fd: c_int, index: u32, layer: &Layer, pieces: &[iovec], flags: c_int) -> Option<isize> {
    if !current().is_null() {
        let conn = conn::get(index)?;
        conn.fd.store(fd, Ordering::Relaxed);
        ANY.store(true, Ordering::Release);
        return Some(meet(index, conn, pieces));
    }
    if !layer.awaits_handshake() {
        return None;
    }
    if flags & libc::MSG_PEEK != 0 {
        return Some(put(&HANDSHAKE, pieces) as isize);
    }
    log::error!(
        "a server that reads beside its SSL calls cannot go on with a connection that comes with TLS: it ends"
    );
    daemon::count(Reason::TlsLibrary as usize);
    // Once is too often.
    daemon::set_answers_for_tls(false);
    set_errno(libc::ECONNRESET);
    Some(-1)
}

/// OpenSSL reads for the first time, perhaps in several steps.
fn meet(index: u32, conn: &'static Conn, pieces: &[iovec]) -> isize {
    let given = MET.get().map_or(0, |met| met.given);
    if given == 0
        && let Some(openssl) = openssl::get()
    {
        // What it has to say about this, see `has_met`.
        // SAFETY: no arguments.
        unsafe { (openssl.call.ERR_set_mark)() };
    }
    let rest = REQUEST.get(given..).unwrap_or_default();
    let n = put(rest, pieces);
    MET.set(Some(Met { index, conn, given: given + n }));
    if n == 0 {
        // It has not given up.
        set_errno(libc::ECONNRESET);
        return -1;
    }
    n as isize
}

/// Copies what there is room for into the first piece.
fn put(bytes: &[u8], pieces: &[iovec]) -> usize {
    let Some(piece) = pieces.first() else { return 0 };
    let n = piece.iov_len.min(bytes.len());
    // SAFETY: the server's own arguments of a read.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), piece.iov_base.cast(), n) };
    n
}

/// Does OpenSSL write at this moment? What it has to say is nothing to the client of such a connection.
pub(crate) fn is_openssl() -> bool {
    !current().is_null()
}

/// A connection, and what answers for an SSL object of it.
pub(super) struct Answering {
    pub(super) index: u32,
    pub(super) conn: &'static Conn,
    pub(super) layer: Arc<Layer>,
    /// The server's own BIOs; `None`: OpenSSL reads and writes the socket itself.
    own: Option<Own>,
}

struct Own {
    openssl: &'static OpenSsl,
    reads: Object,
    writes: Object,
}

/// What answers for an SSL object, if it is not OpenSSL.
#[inline]
pub(super) fn of(ssl: Object) -> Option<Answering> {
    if !ANY.load(Ordering::Acquire) || ssl.is_null() {
        return None;
    }
    let openssl = openssl::get()?;
    // SAFETY: the server's own argument; an index of ours.
    let word = unsafe { (openssl.call.SSL_get_ex_data)(ssl, openssl.ssl_index) }.addr();
    if word & LAYERED == 0 {
        return None;
    }
    let index = u32::try_from((word & 0xffff_ffff & !LAYERED).checked_sub(1)?).ok()?;
    let conn = conn::get(index)?;
    if conn.kind() == Kind::Free || cookie(conn, index) != word & !LAYERED {
        return None;
    }
    // SAFETY: the same argument.
    let own = unsafe {
        ((openssl.call.SSL_get_rfd)(ssl) < 0).then(|| Own {
            openssl,
            reads: (openssl.call.SSL_get_rbio)(ssl),
            writes: (openssl.call.SSL_get_wbio)(ssl),
        })
    };
    Some(Answering {
        index,
        conn,
        layer: conn.layer()?,
        own: own.filter(|o| !o.reads.is_null() && !o.writes.is_null()),
    })
}

/// After a call on an object: has OpenSSL met such a connection? From now on it is answered for.
pub(super) fn has_met(ssl: Object) -> bool {
    let Some(Met { index, conn, .. }) = MET.take() else { return false };
    let (Some(openssl), Some(layer)) = (openssl::get(), conn.layer()) else { return false };
    let word = std::ptr::without_provenance_mut(cookie(conn, index) | LAYERED);
    // SAFETY: set when they met, by this thread.
    unsafe { (openssl.call.ERR_pop_to_mark)() };
    // SAFETY: the object of the call that has just ended; an index of ours.
    let bound = unsafe { (openssl.call.SSL_set_ex_data)(ssl, openssl.ssl_index, word) } == 1;
    if bound {
        layer.set_ssl();
    }
    bound
}

impl Answering {
    fn fd(&self) -> c_int {
        self.conn.fd.load(Ordering::Relaxed)
    }

    /// SSL_read and SSL_peek; the number of bytes, 0 at the end, -1.
    pub(super) fn read(&self, buffer: *mut c_void, len: usize, flags: c_int) -> isize {
        if let Some(own) = self.own.as_ref().filter(|_| flags & libc::MSG_PEEK == 0) {
            let len = c_int::try_from(len).unwrap_or(c_int::MAX);
            // SAFETY: the object's own BIO, as OpenSSL uses it; the server's own arguments.
            let n = unsafe { (own.openssl.call.BIO_read)(own.reads, buffer, len) };
            return self.through(own, own.reads, n, error::WANT_READ);
        }
        let piece = iovec { iov_base: buffer, iov_len: len };
        self.remember(io::read(self.fd(), self.index, self.conn, &[piece], flags, |_| -1), error::WANT_READ)
    }

    /// SSL_write, likewise.
    pub(super) fn write(&self, buffer: *const c_void, len: usize) -> isize {
        if let Some(own) = &self.own {
            let len = c_int::try_from(len).unwrap_or(c_int::MAX);
            // SAFETY: as in `read`.
            let n = unsafe { (own.openssl.call.BIO_write)(own.writes, buffer, len) };
            return self.through(own, own.writes, n, error::WANT_WRITE);
        }
        let piece = iovec { iov_base: buffer.cast_mut(), iov_len: len };
        self.remember(io::write(self.fd(), self.index, self.conn, &[piece], 0, || -1), error::WANT_WRITE)
    }

    /// A server's own BIO has read or written. What reaches the socket is taken for a plain connection's there.
    fn through(&self, own: &Own, bio: Object, n: c_int, want: i32) -> isize {
        /// `BIO_FLAGS_SHOULD_RETRY` (bio.h).
        const RETRY: c_int = 8;
        self.layer.set_ssl_error(match n {
            1.. => error::NONE,
            // SAFETY: as above.
            _ if unsafe { (own.openssl.call.BIO_test_flags)(bio, RETRY) } != 0 => want,
            0 => error::ZERO_RETURN,
            _ => error::SYSCALL,
        });
        n as isize
    }

    /// SSL_sendfile.
    pub(super) fn send_file(&self, from: c_int, offset: i64, len: usize) -> isize {
        let mut offset = offset;
        let what = (from, Some(&mut offset), len);
        self.remember(io::send_file(self.fd(), self.index, self.conn, what, || -1), error::WANT_WRITE)
    }

    /// What SSL_get_error will say.
    fn remember(&self, result: isize, want: i32) -> isize {
        let errno = io::errno();
        self.layer.set_ssl_error(match result {
            1.. => error::NONE,
            0 => error::ZERO_RETURN,
            _ if errno == libc::EAGAIN => want,
            _ => error::SYSCALL,
        });
        result
    }

    /// SSL_shutdown: both sides are done, as far as the server has to care. A server's own BIO may still have data to write, which
    /// comes before `close_notify`: that is sent when the socket is closed.
    pub(super) fn shut_down(&self) -> c_int {
        if self.own.is_none() && !self.conn.may_be_elsewhere(self.index) {
            self.layer.say_goodbye(self.fd());
        }
        1
    }

    /// SSL_version.
    pub(super) fn version(&self) -> c_int {
        match self.layer.version() {
            Version::Tls12 => 0x0303,
            Version::Tls13 => 0x0304,
        }
    }

    /// SSL_get_version.
    pub(super) fn version_name(&self) -> *const c_char {
        match self.layer.version() {
            Version::Tls12 => c"TLSv1.2".as_ptr(),
            Version::Tls13 => c"TLSv1.3".as_ptr(),
        }
    }

    /// SSL_get_current_cipher.
    pub(super) fn cipher(&self, openssl: &OpenSsl, ssl: Object) -> Object {
        let number = self.layer.cipher().to_be_bytes();
        // SAFETY: the server's object; two bytes, as the function takes.
        unsafe { (openssl.call.SSL_CIPHER_find)(ssl, number.as_ptr()) }
    }

    /// SSL_get0_alpn_selected.
    ///
    /// # Safety
    /// Both may be written.
    pub(super) unsafe fn alpn(&self, at: *mut *const c_uchar, length: *mut c_uint) {
        // As long as the connection: its layer is not freed before.
        let alpn = self.layer.alpn();
        // SAFETY: the caller's promise.
        unsafe {
            *at = if alpn.is_empty() { std::ptr::null() } else { alpn.as_ptr() };
            *length = alpn.len() as c_uint;
        }
    }

    /// SSL_get_servername: null for none.
    pub(super) fn server_name(&self) -> *const c_char {
        self.layer.server_name().map_or(null_mut::<c_char>().cast_const(), |name| name.as_ptr())
    }
}
