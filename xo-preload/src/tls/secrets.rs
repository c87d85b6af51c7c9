//! OpenSSL's keylog callback. A line comes at the moment when its secret's direction changes to it.

use std::ffi::{CStr, c_char};

use xo_proto::reason::Reason;
use xo_proto::tls::{KeylogLine, Label, TlsError};

use super::openssl::{self, Keylog, Object, OpenSsl};
use super::ssl;
use crate::conn::Conn;

/// The callback; its address is compared, so there must be one only.
pub(super) static TOLD: unsafe extern "C" fn(Object, *const c_char) = told;

/// # Safety
/// As OpenSSL calls it: an SSL object and a C string.
unsafe extern "C" fn told(ssl: Object, line: *const c_char) {
    let Some(openssl) = openssl::get() else { return };
    // SAFETY: the caller's promise.
    let parsed = KeylogLine::parse(unsafe { CStr::from_ptr(line) }.to_bytes());
    if let Some(line) = parsed
        && let Some(conn) = ssl::connection(openssl, ssl)
    {
        keep(openssl, ssl, conn, line);
    }
    // SAFETY: the caller's promise, and the server's own callback for it.
    unsafe {
        if let Some(own) = of_the_server(openssl, (openssl.call.SSL_get_SSL_CTX)(ssl)) {
            own(ssl, line);
        }
    }
}

/// The callback that the server has set in a context which has ours.
///
/// # Safety
/// A context.
pub(super) unsafe fn of_the_server(openssl: &OpenSsl, context: Object) -> Keylog {
    // SAFETY: the caller's promise. Our word is null or what the server has given as its callback.
    unsafe { std::mem::transmute((openssl.call.SSL_CTX_get_ex_data)(context, openssl.context_index)) }
}

fn keep(openssl: &OpenSsl, ssl: Object, conn: &Conn, line: KeylogLine) {
    let suite = || ssl::suite(openssl, ssl).map(|(suite, _)| suite).ok_or(TlsError::Suite);
    let secret = line.secret.bytes();
    let kept = match line.label {
        Label::Early => return conn.abandon(Reason::TlsEarlyData),
        Label::Master => {
            let Some(mut half) = conn.read() else { return conn.abandon(Reason::Shared) };
            if let Some(received) = &mut half.tls {
                received.master = Some(line.secret);
            }
            return;
        }
        Label::Client | Label::ClientNext => {
            let Some(mut half) = conn.read() else { return conn.abandon(Reason::Shared) };
            let Some(received) = &mut half.tls else { return };
            match line.label {
                // Each read has ended with a record, so what was read last is what brought the change.
                _ if !received.stream.at_boundary() => Err(TlsError::Record),
                Label::Client => suite().and_then(|suite| received.stream.secret(suite, secret)),
                _ => received.stream.next_secret(secret),
            }
        }
        Label::Server | Label::ServerNext => {
            let Some(mut half) = conn.write() else { return conn.abandon(Reason::Shared) };
            let Some(sent) = &mut half.tls else { return };
            match line.label {
                Label::Server => suite().and_then(|suite| sent.stream.secret(suite, secret)),
                _ if !sent.stream.at_boundary() => Err(TlsError::Record),
                _ => sent.stream.next_secret(secret),
            }
        }
    };
    match kept {
        Ok(()) => {}
        Err(TlsError::Suite) => conn.abandon(Reason::TlsSuite),
        Err(_) => conn.abandon(Reason::TlsLost),
    }
}
