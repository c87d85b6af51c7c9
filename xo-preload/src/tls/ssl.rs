//! The hooks on OpenSSL's functions. Results are OpenSSL's own in every case.

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_uchar, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::atomic::Ordering;

use xo_proto::protocol::{Limit, Requests};
use xo_proto::reason::Reason;
use xo_proto::tls::{RANDOM, Suite, Version};

use super::home::{self, Answering};
use super::openssl::{self, Keylog, Object, OpenSsl};
use super::{Agreed, Received, secrets};
use crate::conn::{self, Conn, Kind};
use crate::interpose::Original;
use crate::{daemon, init, io};

thread_local! {
    /// The SSL object whose call this thread is in.
    static CURRENT: Cell<Object> = const { Cell::new(null_mut()) };
}

/// Runs `call` as one on this object, unless the object is answered for, or turns out to be by what `call` reads.
fn inside<T>(ssl: Object, call: impl FnOnce() -> T) -> Result<T, Answering> {
    if let Some(home) = home::of(ssl) {
        return Err(home);
    }
    let before = CURRENT.replace(ssl);
    let result = call();
    CURRENT.set(before);
    if home::has_met(ssl) { home::of(ssl).map_or(Ok(result), Err) } else { Ok(result) }
}

/// The object whose call this thread is in, or null.
pub(super) fn current() -> Object {
    CURRENT.get()
}

/// What an SSL object remembers: its connection's index, and which one of that index.
pub(super) fn cookie(conn: &Conn, index: u32) -> usize {
    (conn.serial.load(Ordering::Relaxed) as usize) << 32 | (index as usize + 1)
}

/// This thread reads a new connection inside a call on an SSL object: they belong together.
pub(super) fn bind(conn: &Conn, index: u32) -> Result<(), Reason> {
    let ssl = CURRENT.get();
    let openssl = openssl::get().filter(|_| !ssl.is_null()).ok_or(Reason::TlsLibrary)?;
    let word = std::ptr::without_provenance_mut(cookie(conn, index));
    // SAFETY: the object whose call we are in; an index of ours.
    match unsafe { (openssl.call.SSL_set_ex_data)(ssl, openssl.ssl_index, word) } {
        1 => Ok(()),
        _ => Err(Reason::TlsLibrary),
    }
}

/// The followed connection of an SSL object.
#[inline]
pub(super) fn connection(openssl: &OpenSsl, ssl: Object) -> Option<&'static Conn> {
    if ssl.is_null() {
        return None;
    }
    // SAFETY: the server's own argument; an index of ours.
    let word = unsafe { (openssl.call.SSL_get_ex_data)(ssl, openssl.ssl_index) }.addr();
    let index = u32::try_from((word & 0xffff_ffff).checked_sub(1)?).ok()?;
    let conn = conn::get(index)?;
    (conn.kind() == Kind::Tracked && cookie(conn, index) == word).then_some(conn)
}

/// The suite that was agreed on.
pub(super) fn suite(openssl: &OpenSsl, ssl: Object) -> Option<(Suite, u16)> {
    // SAFETY: an object of the server's; a cipher is null or lives as long as the library.
    unsafe {
        let version = Version::of(u16::try_from((openssl.call.SSL_version)(ssl)).ok()?)?;
        let cipher = (openssl.call.SSL_get_current_cipher)(ssl);
        if cipher.is_null() {
            return None;
        }
        let number = (openssl.call.SSL_CIPHER_get_protocol_id)(cipher);
        Some((Suite::of(version, number)?, number))
    }
}

/// Asks OpenSSL what was agreed on in the handshake of the connection that this thread is about to read; `None` when the
/// handshake is not over.
pub(super) fn agreed() -> Result<Option<Agreed>, Reason> {
    let ssl = CURRENT.get();
    let openssl = openssl::get().filter(|_| !ssl.is_null()).ok_or(Reason::TlsLibrary)?;
    let call = &openssl.call;
    /// ssl.h, bio.h.
    const VERIFY_PEER: c_int = 1;
    const EARLY_DATA_NOT_SENT: c_int = 0;
    const GET_KTLS_SEND: c_int = 73;
    const GET_KTLS_RECV: c_int = 76;
    const HOST_NAME: c_int = 0;
    // SAFETY: the object whose call this thread is in; results are its own and copied.
    unsafe {
        if (call.SSL_is_init_finished)(ssl) != 1 {
            return Ok(None);
        }
        let (suite, cipher) = suite(openssl, ssl).ok_or(Reason::TlsSuite)?;
        if (call.BIO_ctrl)((call.SSL_get_wbio)(ssl), GET_KTLS_SEND, 0, null_mut()) > 0
            || (call.BIO_ctrl)((call.SSL_get_rbio)(ssl), GET_KTLS_RECV, 0, null_mut()) > 0
        {
            return Err(Reason::TlsKernel);
        }
        if (call.SSL_get_verify_mode)(ssl) & VERIFY_PEER != 0 {
            return Err(Reason::TlsClientCert);
        }
        if (call.SSL_get_early_data_status)(ssl) != EARLY_DATA_NOT_SENT {
            return Err(Reason::TlsEarlyData);
        }
        // The client takes shorter records only (RFC 6066, 4): a record layer elsewhere does not know.
        let session = (call.SSL_get_session)(ssl);
        if !session.is_null() && (call.SSL_SESSION_get_max_fragment_length)(session) != 0 {
            return Err(Reason::TlsSuite);
        }
        let (mut at, mut length): (*const c_uchar, c_uint) = (std::ptr::null(), 0);
        (call.SSL_get0_alpn_selected)(ssl, &raw mut at, &raw mut length);
        let alpn =
            if at.is_null() { &[][..] } else { std::slice::from_raw_parts(at, length as usize) }.to_vec();
        if !matches!(alpn.as_slice(), b"" | b"http/1.1") {
            return Err(Reason::TlsAlpn);
        }
        let name = (call.SSL_get_servername)(ssl, HOST_NAME);
        let server_name =
            if name.is_null() { String::new() } else { CStr::from_ptr(name).to_string_lossy().into_owned() };
        Ok(Some(Agreed { version: suite.version(), cipher, server_name, alpn }))
    }
}

/// The random values of the handshake: the client's, the server's.
pub(super) fn randoms() -> Option<[[u8; RANDOM]; 2]> {
    let ssl = CURRENT.get();
    let openssl = openssl::get().filter(|_| !ssl.is_null())?;
    let mut both = [[0; RANDOM]; 2];
    let [client, server] = &mut both;
    // SAFETY: the object whose call this thread is in; as much room as is said.
    let lengths = unsafe {
        [
            (openssl.call.SSL_get_client_random)(ssl, client.as_mut_ptr(), RANDOM),
            (openssl.call.SSL_get_server_random)(ssl, server.as_mut_ptr(), RANDOM),
        ]
    };
    (lengths == [RANDOM; 2]).then_some(both)
}

/// The server has read `n` bytes at this address.
fn has_read(ssl: Object, buffer: *const c_void, n: usize) {
    let Some(conn) = openssl::get().filter(|_| n > 0).and_then(|openssl| connection(openssl, ssl)) else {
        return;
    };
    let Some(mut half) = conn.read() else { return conn.abandon(Reason::Shared) };
    if half.tls.is_none() {
        return;
    }
    // SAFETY: OpenSSL has just written these bytes.
    let bytes = unsafe { std::slice::from_raw_parts(buffer.cast::<u8>(), n) };
    if half.tracker.at_boundary() {
        // Not looked at before: OpenSSL had it already.
        return conn.abandon(Reason::TlsPending);
    }
    let left = consume(&mut half.tracker, bytes);
    if half.tracker.is_lost() {
        conn.abandon(Reason::AmbiguousFraming);
    } else if left > 0 {
        // The next request, in the same record.
        conn.abandon(Reason::TlsPending);
    }
    if half.tracker.at_boundary() {
        half.stays = false;
    }
}

/// The server has read these bytes; how many of them are beyond the request's end.
fn consume(tracker: &mut Requests, mut bytes: &[u8]) -> usize {
    while !bytes.is_empty() && !tracker.at_boundary() && !tracker.is_lost() {
        let n = match tracker.allowed() {
            Limit::Bytes(n) => bytes.len().min(usize::try_from(n).unwrap_or(usize::MAX)),
            Limit::Peek => tracker.limit(bytes),
        };
        let (now, later) = bytes.split_at(n.clamp(1, bytes.len()));
        tracker.consumed(now);
        bytes = later;
    }
    bytes.len()
}

/// The server has written `n` bytes at this address: they are in the socket.
fn has_written(ssl: Object, buffer: *const c_void, n: usize) {
    let Some(conn) = openssl::get().filter(|_| n > 0).and_then(|openssl| connection(openssl, ssl)) else {
        return;
    };
    if conn.write().is_some_and(|w| w.tls.is_some()) {
        // SAFETY: OpenSSL has just read these bytes.
        let bytes = unsafe { std::slice::from_raw_parts(buffer.cast::<u8>(), n) };
        io::follow_responses(conn, |responses| responses.wrote(bytes));
    }
}

fn length(n: c_int) -> usize {
    usize::try_from(n).unwrap_or(0)
}

/// A context has been made: its secrets are told to us, too.
fn has_made(context: Object) -> Object {
    if !context.is_null()
        && init::active_policy().is_some()
        && let Some(openssl) = openssl::get()
        && !is_ours(openssl, context)
    {
        // SAFETY: a context that nobody else knows yet; our word in it is null.
        unsafe { (openssl.call.SSL_CTX_set_keylog_callback)(context, Some(secrets::TOLD)) };
        daemon::set_answers_for_tls(true);
    }
    context
}

/// Is our callback in this context of the server's?
fn is_ours(openssl: &OpenSsl, context: Object) -> bool {
    // SAFETY: a context of the server's.
    let callback = unsafe { (openssl.call.SSL_CTX_get_keylog_callback)(context) };
    callback.is_some_and(|c| std::ptr::fn_addr_eq(c, secrets::TOLD))
}

/// Exports functions of OpenSSL's names; `real` is OpenSSL's own. Where there is none the result is `failure`.
macro_rules! ssl_hooks {
    ($( fn $name:ident($real:ident, $($arg:ident: $type:ty),*) $(-> $ret:ty, $failure:expr)?; $body:block )*) => {
        $(
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name($($arg: $type),*) $(-> $ret)? {
                static REAL: Original = Original::new();
                if REAL.get().is_null() {
                    REAL.set(openssl::original(concat!(stringify!($name), "\0")));
                }
                let original = REAL.get();
                if original.is_null() {
                    return $($failure)?;
                }
                // SAFETY: the function of that name.
                let $real = unsafe {
                    std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) $(-> $ret)?>(original)
                };
                // SAFETY: OpenSSL's own function gets the server's own arguments.
                unsafe { $body }
            }
        )*
    };
}

ssl_hooks! {
    fn SSL_CTX_new(real, method: Object) -> Object, null_mut(); {
        has_made(real(method))
    }

    fn SSL_CTX_new_ex(real, library: Object, query: *const c_char, method: Object) -> Object, null_mut(); {
        has_made(real(library, query, method))
    }

    fn SSL_CTX_set_keylog_callback(real, context: Object, callback: Keylog); {
        if let Some(openssl) = openssl::get().filter(|o| !context.is_null() && is_ours(o, context)) {
            let word = callback.map_or(null_mut(), |c| c as *mut c_void);
            if (openssl.call.SSL_CTX_set_ex_data)(context, openssl.context_index, word) == 1 {
                return;
            }
        }
        real(context, callback);
    }

    fn SSL_CTX_get_keylog_callback(real, context: Object) -> Keylog, None; {
        match openssl::get().filter(|o| !context.is_null() && is_ours(o, context)) {
            Some(openssl) => secrets::of_the_server(openssl, context),
            None => real(context),
        }
    }

    fn SSL_accept(real, ssl: Object) -> c_int, -1; {
        inside(ssl, || real(ssl)).unwrap_or(1)
    }

    fn SSL_do_handshake(real, ssl: Object) -> c_int, -1; {
        inside(ssl, || real(ssl)).unwrap_or(1)
    }

    // A server that would take early data begins the handshake with it.
    fn SSL_read_early_data(real, ssl: Object, buffer: *mut c_void, len: usize, read: *mut usize) -> c_int, 0; {
        /// `SSL_READ_EARLY_DATA_FINISH`.
        const FINISH: c_int = 2;
        inside(ssl, || real(ssl, buffer, len, read)).unwrap_or_else(|_| {
            *read = 0;
            FINISH
        })
    }

    fn SSL_read(real, ssl: Object, buffer: *mut c_void, len: c_int) -> c_int, -1; {
        match inside(ssl, || real(ssl, buffer, len)) {
            Ok(n) => {
                has_read(ssl, buffer, length(n));
                n
            }
            Err(home) => home.read(buffer, length(len), 0) as c_int,
        }
    }

    fn SSL_read_ex(real, ssl: Object, buffer: *mut c_void, len: usize, read: *mut usize) -> c_int, 0; {
        match inside(ssl, || real(ssl, buffer, len, read)) {
            Ok(result) => {
                if result == 1 {
                    has_read(ssl, buffer, *read);
                }
                result
            }
            Err(home) => told(home.read(buffer, len, 0), read),
        }
    }

    fn SSL_peek(real, ssl: Object, buffer: *mut c_void, len: c_int) -> c_int, -1; {
        let peek = |home: Answering| home.read(buffer, length(len), libc::MSG_PEEK) as c_int;
        inside(ssl, || real(ssl, buffer, len)).unwrap_or_else(peek)
    }

    fn SSL_peek_ex(real, ssl: Object, buffer: *mut c_void, len: usize, read: *mut usize) -> c_int, 0; {
        let peek = |home: Answering| told(home.read(buffer, len, libc::MSG_PEEK), read);
        inside(ssl, || real(ssl, buffer, len, read)).unwrap_or_else(peek)
    }

    fn SSL_write(real, ssl: Object, buffer: *const c_void, len: c_int) -> c_int, -1; {
        match inside(ssl, || real(ssl, buffer, len)) {
            Ok(n) => {
                has_written(ssl, buffer, length(n));
                n
            }
            Err(home) => home.write(buffer, length(len)) as c_int,
        }
    }

    fn SSL_write_ex(real, ssl: Object, buffer: *const c_void, len: usize, written: *mut usize) -> c_int, 0; {
        match inside(ssl, || real(ssl, buffer, len, written)) {
            Ok(result) => {
                if result == 1 {
                    has_written(ssl, buffer, *written);
                }
                result
            }
            Err(home) => told(home.write(buffer, len), written),
        }
    }

    fn SSL_sendfile(real, ssl: Object, file: c_int, offset: libc::off_t, len: usize, flags: c_int) -> isize, -1; {
        match home::of(ssl) {
            Some(home) => home.send_file(file, offset, len),
            None => real(ssl, file, offset, len, flags),
        }
    }

    fn SSL_shutdown(real, ssl: Object) -> c_int, -1; {
        inside(ssl, || real(ssl)).unwrap_or_else(|home| home.shut_down())
    }

    fn SSL_get_error(real, ssl: Object, result: c_int) -> c_int, 1; {
        match home::of(ssl) {
            Some(_) if result > 0 => 0,
            Some(home) => home.layer.ssl_error(),
            None => real(ssl, result),
        }
    }

    fn SSL_pending(real, ssl: Object) -> c_int, 0; {
        if home::of(ssl).is_some() { 0 } else { real(ssl) }
    }

    fn SSL_has_pending(real, ssl: Object) -> c_int, 0; {
        if home::of(ssl).is_some() { 0 } else { real(ssl) }
    }

    fn SSL_in_init(real, ssl: Object) -> c_int, 1; {
        if home::of(ssl).is_some() { 0 } else { real(ssl) }
    }

    fn SSL_is_init_finished(real, ssl: Object) -> c_int, 0; {
        if home::of(ssl).is_some() { 1 } else { real(ssl) }
    }

    fn SSL_get_state(real, ssl: Object) -> c_int, 0; {
        /// `TLS_ST_OK`.
        const OK: c_int = 1;
        if home::of(ssl).is_some() { OK } else { real(ssl) }
    }

    fn SSL_session_reused(real, ssl: Object) -> c_int, 0; {
        if home::of(ssl).is_some() { 0 } else { real(ssl) }
    }

    fn SSL_version(real, ssl: Object) -> c_int, 0; {
        home::of(ssl).map_or_else(|| real(ssl), |home| home.version())
    }

    fn SSL_get_version(real, ssl: Object) -> *const c_char, std::ptr::null(); {
        home::of(ssl).map_or_else(|| real(ssl), |home| home.version_name())
    }

    fn SSL_get_current_cipher(real, ssl: Object) -> Object, null_mut(); {
        match (home::of(ssl), openssl::get()) {
            (Some(home), Some(openssl)) => home.cipher(openssl, ssl),
            _ => real(ssl),
        }
    }

    fn SSL_get0_alpn_selected(real, ssl: Object, at: *mut *const c_uchar, length: *mut c_uint); {
        match home::of(ssl) {
            Some(home) => home.alpn(at, length),
            None => real(ssl, at, length),
        }
    }

    fn SSL_get_servername(real, ssl: Object, kind: c_int) -> *const c_char, std::ptr::null(); {
        home::of(ssl).map_or_else(|| real(ssl, kind), |home| home.server_name())
    }
}

/// The result of one of the functions that say the length apart.
///
/// # Safety
/// `*length` may be written.
unsafe fn told(n: isize, length: *mut usize) -> c_int {
    match usize::try_from(n) {
        Ok(n @ 1..) => {
            // SAFETY: the caller's promise.
            unsafe { *length = n };
            1
        }
        _ => 0,
    }
}

/// What this thread's OpenSSL has agreed on, and in TLS 1.2 the keys of both directions.
pub(super) fn settle(conn: &Conn, received: &mut Received) -> Result<bool, Reason> {
    let Some(agreed) = agreed()? else { return Ok(false) };
    let version = agreed.version;
    received.agreed = Some(agreed);
    if received.stream.has_keys() {
        return Ok(true);
    }
    if version == Version::Tls13 {
        return Err(Reason::TlsLost);
    }
    let [client, server] = randoms().ok_or(Reason::TlsLost)?;
    let [theirs, ours] = received.derive(&client, &server).ok_or(Reason::TlsLost)?;
    let suite =
        received.agreed.as_ref().and_then(|a| Suite::of(version, a.cipher)).ok_or(Reason::TlsSuite)?;
    received.master = None;
    received.stream.keys(suite, theirs);
    let mut write = conn.write().ok_or(Reason::Shared)?;
    let sent = write.tls.as_mut().ok_or(Reason::TlsLost)?;
    sent.stream.keys(suite, ours);
    Ok(true)
}
