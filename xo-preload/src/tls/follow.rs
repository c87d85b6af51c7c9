//! Records pass through the hooks on read and write.

use libc::{c_int, iovec};
use xo_proto::reason::Reason;

use super::look;
use crate::boundary::{self, Outcome};
use crate::conn::{Conn, Kind, ReadHalf, WriteHalf};
use crate::io::{self, set_errno, shortened};

/// A read of records: never beyond the end of one, so that what OpenSSL has at the end of a call is known, and the next request stays
/// in the socket until it has been decided about.
pub(crate) fn read(
    fd: c_int,
    index: u32,
    conn: &Conn,
    half: &mut ReadHalf,
    pieces: &[iovec],
    nonblocking: bool,
    call: &mut impl FnMut(&[iovec]) -> isize,
) -> isize {
    match before(fd, index, conn, half, nonblocking) {
        Some(Outcome::End) => return 0,
        Some(Outcome::Error(errno)) => {
            set_errno(errno);
            return -1;
        }
        Some(Outcome::Read { .. }) | None => {}
    }
    let Some(received) = half.tls.as_mut().filter(|_| conn.kind() == Kind::Tracked) else {
        return call(pieces);
    };
    let want: usize = pieces.iter().map(|p| p.iov_len).fold(0, usize::saturating_add);
    let allowed = received.allowed.max(received.stream.rest());
    let n = match pieces {
        _ if allowed >= want => call(pieces),
        [one] => call(&[iovec { iov_base: one.iov_base, iov_len: allowed }]),
        _ => shortened(pieces, allowed, call),
    };
    if n > 0 {
        received.allowed = received.allowed.saturating_sub(n as usize);
        io::for_each_piece(pieces, n as usize, |bytes| received.stream.pass(bytes));
        if let Some(reason) = received.stream.trouble() {
            conn.abandon(reason);
        }
    }
    n
}

fn before(fd: c_int, index: u32, conn: &Conn, half: &mut ReadHalf, nonblocking: bool) -> Option<Outcome> {
    if let Some(outcome) = boundary::verdict(fd, conn, index, half, nonblocking) {
        return Some(outcome);
    }
    let at_boundary = half.tracker.at_boundary() && conn.kind() == Kind::Tracked;
    let received = half.tls.as_mut().filter(|r| at_boundary && r.allowed == 0)?;
    if !received.stream.at_boundary() || !received.stream.is_open() {
        return None;
    }
    if received.agreed.is_none() {
        match super::ssl::settle(conn, received) {
            Ok(true) => {}
            Ok(false) => return None,
            Err(reason) => {
                conn.abandon(reason);
                return None;
            }
        }
    }
    Some(look::look(fd, conn, index, half, nonblocking))
}

/// Records that were written.
pub(crate) fn wrote(conn: &Conn, half: &mut WriteHalf, each: impl FnOnce(&mut dyn FnMut(&[u8]))) {
    let Some(sent) = &mut half.tls else { return };
    each(&mut |bytes| sent.stream.pass(bytes));
    if let Some(reason) = sent.stream.trouble() {
        conn.abandon(reason);
    }
}

/// Bytes were written that cannot be looked at: only the kernel can have made records of them.
pub(crate) fn wrote_unseen(conn: &Conn) {
    conn.abandon(Reason::TlsKernel);
}
