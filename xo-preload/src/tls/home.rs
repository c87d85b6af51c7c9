//! A connection that comes home: its server begins with a handshake, which is long over. OpenSSL never gets to see it; what the
//! server asks of its SSL object is answered from the connection's record layer.
//!
//! The two find each other when OpenSSL reads the socket for the first time, inside a call on the object: it is told that nothing
//! is there, and then the call's result is changed. So this works with a server's own BIOs, too, unless they wait themselves; a
//! process says that it can do this when it has given OpenSSL a socket to read.

use std::cell::Cell;
use std::ffi::{c_char, c_int, c_uchar, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::iovec;
use xo_proto::tls::Version;

use super::openssl::{self, Object, OpenSsl};
use super::ssl::{cookie, current};
use crate::conn::{self, Conn, Kind};
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

thread_local! {
    /// The connection that OpenSSL has just tried to read, and its index.
    static MET: Cell<Option<(u32, &'static Conn)>> = const { Cell::new(None) };
}

/// Somebody reads a connection with a record layer: is it OpenSSL, or a server that looks for a handshake? `Some` is what to return.
pub(crate) fn reading(fd: c_int, index: u32, pieces: &[iovec], flags: c_int) -> Option<isize> {
    let conn = conn::get(index)?;
    if !current().is_null() {
        conn.fd.store(fd, Ordering::Relaxed);
        ANY.store(true, Ordering::Release);
        // Who has been told already waits himself: that would be for ever.
        let again = MET.replace(Some((index, conn))).is_some();
        set_errno(if again { libc::ECONNRESET } else { libc::EAGAIN });
        return Some(-1);
    }
    let before_handshake = flags & libc::MSG_PEEK != 0
        && !conn.guest.load(Ordering::Relaxed)
        && conn.layer().is_some_and(|layer| !layer.has_ssl());
    let piece = pieces.first().filter(|_| before_handshake)?;
    let n = piece.iov_len.min(HANDSHAKE.len());
    // SAFETY: the server's own arguments of a read.
    unsafe { std::ptr::copy_nonoverlapping(HANDSHAKE.as_ptr(), piece.iov_base.cast(), n) };
    Some(n as isize)
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
    Some(Answering { index, conn, layer: conn.layer()? })
}

/// After a call on an object: has OpenSSL met such a connection? From now on it is answered for.
pub(super) fn has_met(ssl: Object) -> bool {
    let Some((index, conn)) = MET.take() else { return false };
    let (Some(openssl), Some(layer)) = (openssl::get(), conn.layer()) else { return false };
    let word = std::ptr::without_provenance_mut(cookie(conn, index) | LAYERED);
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
        let piece = iovec { iov_base: buffer, iov_len: len };
        self.remember(io::read(self.fd(), self.index, self.conn, &[piece], flags, |_| -1), error::WANT_READ)
    }

    /// SSL_write, likewise.
    pub(super) fn write(&self, buffer: *const c_void, len: usize) -> isize {
        let piece = iovec { iov_base: buffer.cast_mut(), iov_len: len };
        self.remember(io::write(self.fd(), self.index, self.conn, &[piece], 0, || -1), error::WANT_WRITE)
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

    /// SSL_shutdown: both sides are done, as far as the server has to care.
    pub(super) fn shut_down(&self) -> c_int {
        if !self.conn.may_be_elsewhere(self.index) {
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
