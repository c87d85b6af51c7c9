//! Reading and writing on followed connections.

use std::sync::atomic::{Ordering, fence};

use libc::{c_int, iovec};
use xo_proto::protocol::{Limit, Progress, Responses};
use xo_proto::reason::Reason;
use xo_proto::slot::{GONE, PENDING};
use xo_sys::{raw, tcp_repair};

use crate::boundary::{self, Outcome};
use crate::conn::{self, Claim, Conn, Kind, ReadHalf, WriteHalf};
use crate::layer::Asked;
use crate::{fdtable, tls};

/// Most pieces of a scattered read that are followed; a longer list is shortened, which is a short read.
const MAX_PIECES: usize = 64;
/// A chunked body is looked at in pieces of this size, bytes.
const PEEK: usize = 4096;
/// The smallest buffer into which a head is looked at, bytes.
const LEAST_DIRECT: usize = 512;
/// Flags with which a read is something else than reading the stream.
const BESIDE: c_int = libc::MSG_OOB | libc::MSG_ERRQUEUE;

/// The followed connection behind a descriptor. One that is left alone is still followed while a hand-off is under way,
/// and when it is over and the connection gone; and so is one with a record layer, as long as it lasts.
#[inline]
pub(crate) fn followed(fd: c_int) -> Option<(u32, &'static Conn)> {
    match fdtable::get(fd) {
        fdtable::Entry::Connection(index) => {
            let is_followed =
                |c: &&Conn| c.kind() == Kind::Tracked || c.asked.load(Ordering::Relaxed) || c.has_layer();
            conn::get(index).filter(is_followed).map(|c| (index, c))
        }
        _ => None,
    }
}

/// Sets errno of this thread.
pub(crate) fn set_errno(errno: c_int) {
    // SAFETY: glibc's errno location is valid for the thread's life.
    unsafe { *libc::__errno_location() = errno };
}

/// errno of this thread.
pub(crate) fn errno() -> c_int {
    // SAFETY: glibc's errno location is valid for the thread's life.
    unsafe { *libc::__errno_location() }
}

/// A read into one buffer that gives nothing beside the bytes.
pub(crate) fn read_bytes(
    fd: c_int,
    index: u32,
    conn: &Conn,
    buffer: iovec,
    flags: c_int,
    call: impl FnMut(&[iovec]) -> isize,
) -> isize {
    // Smaller than most heads: in two steps it would be looked at twice.
    let direct = flags & !libc::MSG_DONTWAIT == 0
        && buffer.iov_len >= LEAST_DIRECT
        && conn.is_alone()
        && !conn.has_layer();
    read_into(fd, index, conn, &[buffer], flags, direct, call)
}

/// A read into `pieces`; `call` is the real one, for as many pieces as it is given.
pub(crate) fn read(
    fd: c_int,
    index: u32,
    conn: &Conn,
    pieces: &[iovec],
    flags: c_int,
    call: impl FnMut(&[iovec]) -> isize,
) -> isize {
    read_into(fd, index, conn, pieces, flags, false, call)
}

/// `direct`: the next request may be looked at where the server wants it, and then be dropped from the socket, which
/// saves the second copy. Only for a connection that nobody else reads: what is dropped must be what was looked at.
fn read_into(
    fd: c_int,
    index: u32,
    conn: &Conn,
    pieces: &[iovec],
    flags: c_int,
    direct: bool,
    mut call: impl FnMut(&[iovec]) -> isize,
) -> isize {
    let want: usize = pieces.iter().map(|p| p.iov_len).fold(0, usize::saturating_add);
    let nonblocking = flags & libc::MSG_DONTWAIT != 0 || conn.mode.is_nonblocking(fd);
    let layer = conn.layer();
    if let Some(layer) = &layer
        && let Some(result) = tls::home::reading(fd, index, layer, pieces, flags)
    {
        return result;
    }
    let mut call = |pieces: &[iovec]| match &layer {
        Some(layer) if flags & libc::MSG_ERRQUEUE == 0 => layer.read(fd, pieces, flags, nonblocking),
        _ => call(pieces),
    };
    if want == 0 || flags & BESIDE != 0 {
        return call(pieces);
    }
    let peeking = flags & libc::MSG_PEEK != 0;
    let Some(mut half) = conn.read() else {
        conn.abandon(Reason::Shared);
        fence(Ordering::SeqCst);
        return await_other(fd, index, conn, nonblocking).unwrap_or_else(|| call(pieces));
    };
    if half.tls.is_some() {
        return read_records(fd, index, conn, &mut half, pieces, flags, &mut call);
    }
    let (mut alone, mut there) = (false, 0);
    let outcome = boundary::verdict(fd, conn, index, &mut half, nonblocking).or_else(|| {
        if half.tracker.at_boundary() && !peeking && conn.kind() == Kind::Tracked {
            let buffer = pieces.first().copied().filter(|_| direct);
            return match boundary::look(fd, conn, index, &mut half, nonblocking, buffer) {
                Outcome::Read { alone: a, there: t } => {
                    (alone, there) = (a, t);
                    None
                }
                other => Some(other),
            };
        }
        None
    });
    match outcome {
        Some(Outcome::End) => return 0,
        Some(Outcome::Error(errno)) => {
            set_errno(errno);
            return -1;
        }
        Some(Outcome::Read { .. }) | None => {}
    }
    if conn.kind() != Kind::Tracked {
        return call(pieces);
    }
    if half.tls.is_some() {
        // It has just begun.
        return read_records(fd, index, conn, &mut half, pieces, flags, &mut call);
    }
    let allowed = match allowance(fd, conn, &half, want, nonblocking) {
        Ok(n) => n,
        Err(result) => return result,
    };
    if flags & libc::MSG_TRUNC != 0 && !peeking || flags & libc::MSG_WAITALL != 0 && allowed < want {
        // Bytes thrown away unseen, or more demanded than the request has.
        conn.abandon(Reason::AmbiguousFraming);
        return call(pieces);
    }
    let n = match pieces {
        _ if there > 0 => discard(fd, there.min(allowed)),
        _ if allowed >= want && pieces.len() <= MAX_PIECES => call(pieces),
        [one] => call(&[iovec { iov_base: one.iov_base, iov_len: allowed }]),
        _ => shortened(pieces, allowed, &mut call),
    };
    if n > 0 && !peeking {
        account(conn, &mut half, pieces, n as usize);
        if half.tracker.at_boundary() {
            half.stays = false;
        }
        // Edge-triggered servers take a short read for an empty socket and wait for an edge that has come already: raise
        // another. Reads are cut at the end of a request, of a chunked one's head, and of the part of its body looked at.
        let cut = allowed < want && n as usize == allowed;
        let more = || layer.as_ref().map_or_else(|| raw::readable_bytes(fd) > 0, |l| l.has_more(fd));
        if cut && !alone && nonblocking && more() {
            let _ = tcp_repair::poke(fd);
        }
    }
    n
}

/// A read of a connection with TLS.
#[inline(never)]
fn read_records(
    fd: c_int,
    index: u32,
    conn: &Conn,
    half: &mut ReadHalf,
    pieces: &[iovec],
    flags: c_int,
    call: &mut impl FnMut(&[iovec]) -> isize,
) -> isize {
    if flags & (libc::MSG_TRUNC | libc::MSG_WAITALL) != 0 {
        conn.abandon(Reason::AmbiguousFraming);
    }
    let nonblocking = flags & libc::MSG_DONTWAIT != 0 || conn.mode.is_nonblocking(fd);
    if flags & libc::MSG_PEEK == 0 {
        return tls::read(fd, index, conn, half, pieces, nonblocking, call);
    }
    match boundary::verdict(fd, conn, index, half, nonblocking) {
        Some(Outcome::End) => 0,
        Some(Outcome::Error(errno)) => {
            set_errno(errno);
            -1
        }
        Some(Outcome::Read { .. }) | None => call(pieces),
    }
}

/// Drops from the socket what the server has already; the result of its read.
fn discard(fd: c_int, n: usize) -> isize {
    match raw::discard(fd, n) {
        Ok(n) => n as isize,
        Err(e) => {
            set_errno(e.raw_os_error().unwrap_or(libc::EIO));
            -1
        }
    }
}

/// Somebody else reads at this moment. If it has asked for a hand-off, nothing may be read before the verdict; `Some`
/// is what to return.
fn await_other(fd: c_int, index: u32, conn: &Conn, nonblocking: bool) -> Option<isize> {
    if !conn.asked.load(Ordering::SeqCst) {
        return None;
    }
    let state = match conn.slot_state(index) {
        PENDING if !nonblocking => boundary::await_verdict(index, raw::receive_timeout(fd)),
        state => state,
    };
    match state {
        GONE => Some(0),
        PENDING => {
            set_errno(libc::EAGAIN);
            Some(-1)
        }
        _ => None,
    }
}

/// Looks at what the server would read next; how many bytes there are now, 0 at the end, or an errno.
pub(crate) fn peek(fd: c_int, conn: &Conn, buffer: &mut [u8], nonblocking: bool) -> Result<usize, i32> {
    // SAFETY: the buffer's own address and length.
    unsafe { peek_at(fd, conn, buffer.as_mut_ptr(), buffer.len(), nonblocking) }
}

/// As [`peek`].
///
/// # Safety
/// `size` bytes at `at` may be overwritten.
pub(crate) unsafe fn peek_at(
    fd: c_int,
    conn: &Conn,
    at: *mut u8,
    size: usize,
    nonblocking: bool,
) -> Result<usize, i32> {
    if let Some(layer) = conn.layer() {
        // SAFETY: the caller's promise.
        return unsafe { layer.peek(fd, at, size, nonblocking) };
    }
    let flags = if nonblocking { libc::MSG_DONTWAIT } else { 0 };
    // SAFETY: the caller's promise.
    let n = unsafe { raw::peek_at(fd, at, size, flags) };
    n.map(|n| n.min(size)).map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))
}

/// How many bytes may be read without crossing the request's end.
fn allowance(
    fd: c_int,
    conn: &Conn,
    half: &ReadHalf,
    want: usize,
    nonblocking: bool,
) -> Result<usize, isize> {
    match half.tracker.allowed() {
        Limit::Bytes(n) => Ok(want.min(usize::try_from(n).unwrap_or(usize::MAX))),
        // At a boundary only for a peek, or when the client has closed.
        Limit::Peek if half.tracker.at_boundary() => Ok(want),
        Limit::Peek => {
            let mut buffer = [0; PEEK];
            let window = buffer.get_mut(..want.min(PEEK)).unwrap_or_default();
            match peek(fd, conn, window, nonblocking) {
                Ok(0) => Ok(want),
                Ok(n) => Ok(half.tracker.limit(window.get(..n).unwrap_or_default()).min(want)),
                Err(errno) => {
                    set_errno(errno);
                    Err(-1)
                }
            }
        }
    }
}

fn account(conn: &Conn, half: &mut ReadHalf, pieces: &[iovec], n: usize) {
    if let Limit::Bytes(_) = half.tracker.allowed() {
        half.tracker.consumed_unseen(n as u64);
    } else {
        for_each_piece(pieces, n, |bytes| half.tracker.consumed(bytes));
    }
    if half.tracker.is_lost() {
        conn.abandon(Reason::AmbiguousFraming);
    }
}

/// The call with no more than `allowed` bytes' worth of pieces, and no more of them than are followed.
#[cold]
pub(crate) fn shortened(
    pieces: &[iovec],
    mut allowed: usize,
    call: &mut impl FnMut(&[iovec]) -> isize,
) -> isize {
    let mut list = [iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_PIECES];
    let mut count = 0;
    for (to, from) in list.iter_mut().zip(pieces) {
        if allowed == 0 {
            break;
        }
        let len = from.iov_len.min(allowed);
        *to = iovec { iov_base: from.iov_base, iov_len: len };
        allowed -= len;
        count += 1;
    }
    call(list.get(..count).unwrap_or_default())
}

/// The first `n` bytes of these, piece by piece.
pub(crate) fn for_each_piece(pieces: &[iovec], mut n: usize, mut each: impl FnMut(&[u8])) {
    for piece in pieces {
        let len = piece.iov_len.min(n);
        if len == 0 {
            continue;
        }
        // SAFETY: the kernel has just read or written these bytes at this address.
        each(unsafe { std::slice::from_raw_parts(piece.iov_base.cast::<u8>(), len) });
        n -= len;
    }
}

/// A read whose bytes never reach memory (splice); `call` takes the length.
pub(crate) fn read_unseen(
    fd: c_int,
    index: u32,
    conn: &Conn,
    want: usize,
    call: impl Fn(usize) -> isize,
) -> isize {
    if conn.has_layer() {
        // As where the kernel cannot: the server reads instead.
        set_errno(libc::EINVAL);
        return -1;
    }
    if conn.read().is_some_and(|half| half.tls.is_some()) {
        conn.abandon(Reason::TlsKernel);
        return call(want);
    }
    let piece = iovec { iov_base: std::ptr::null_mut(), iov_len: want };
    if matches!(conn.read().map(|h| h.tracker.allowed()), Some(Limit::Peek))
        && conn.read().is_some_and(|h| !h.tracker.at_boundary())
    {
        // The end of a chunked body would pass by unseen.
        conn.abandon(Reason::AmbiguousFraming);
        return call(want);
    }
    read(fd, index, conn, &[piece], 0, |pieces| call(pieces.first().map_or(0, |p| p.iov_len)))
}

/// While a verdict is out nothing may be written; `Some` is what to return.
fn hold_writing(fd: c_int, index: u32, conn: &Conn, flags: c_int) -> Option<isize> {
    if !conn.asked.load(Ordering::Acquire) {
        return None;
    }
    let mut state = conn.slot_state(index);
    if state == PENDING {
        if flags & libc::MSG_DONTWAIT != 0 || conn.mode.is_nonblocking(fd) {
            set_errno(libc::EAGAIN);
            return Some(-1);
        }
        state = boundary::await_verdict(index, None);
    }
    if state == GONE {
        // What an emptied socket answers; this one may not be emptied yet.
        set_errno(libc::EPIPE);
        return Some(-1);
    }
    None
}

/// A write of `pieces`; `call` is the real one.
pub(crate) fn write(
    fd: c_int,
    index: u32,
    conn: &Conn,
    pieces: &[iovec],
    flags: c_int,
    call: impl FnOnce() -> isize,
) -> isize {
    let n = match conn.layer() {
        Some(_) if tls::home::is_openssl() => {
            set_errno(libc::EPIPE);
            return -1;
        }
        None => match hold_writing(fd, index, conn, flags) {
            Some(result) => return result,
            None => call(),
        },
        Some(layer) => match through(fd, index, conn, flags, |asked| layer.write(fd, pieces, flags, asked)) {
            Ok(n) => n,
            Err(result) => return result,
        },
    };
    if n > 0 {
        wrote(conn, pieces, n as usize);
    }
    n
}

/// A write through a record layer, when there may be one. `Err` is what to return.
fn through(
    fd: c_int,
    index: u32,
    conn: &Conn,
    flags: c_int,
    mut write: impl FnMut(&dyn Fn() -> bool) -> Result<isize, Asked>,
) -> Result<isize, isize> {
    loop {
        if let Some(result) = hold_writing(fd, index, conn, flags) {
            return Err(result);
        }
        if let Ok(n) = write(&|| conn.may_be_elsewhere(index)) {
            return Ok(n);
        }
    }
}

/// A write whose bytes we do not see (splice).
pub(crate) fn write_unseen(fd: c_int, index: u32, conn: &Conn, call: impl FnOnce() -> isize) -> isize {
    if conn.has_layer() {
        // As where the kernel cannot: the server writes instead.
        set_errno(libc::EINVAL);
        return -1;
    }
    if let Some(result) = hold_writing(fd, index, conn, 0) {
        return result;
    }
    let n = call();
    if n > 0 {
        match conn.write() {
            None => conn.abandon(Reason::Shared),
            Some(half) if half.tls.is_some() => tls::wrote_unseen(conn),
            Some(half) => respond(conn, half, |r| r.wrote_unseen(n as u64)),
        }
    }
    n
}

/// sendfile(2); `call` is the real one.
pub(crate) fn send_file(
    fd: c_int,
    index: u32,
    conn: &Conn,
    (from, mut offset, count): (c_int, Option<&mut i64>, usize),
    call: impl FnOnce() -> isize,
) -> isize {
    let Some(layer) = conn.layer() else { return write_unseen(fd, index, conn, call) };
    let result =
        through(fd, index, conn, 0, |asked| layer.send_file(fd, from, offset.as_deref_mut(), count, asked));
    match result {
        Ok(n) => {
            if n > 0 && conn.kind() == Kind::Tracked {
                follow_responses(conn, |r| r.wrote_unseen(n as u64));
            }
            n
        }
        Err(result) => result,
    }
}

/// Bytes of a response, or of records that carry one.
fn wrote(conn: &Conn, pieces: &[iovec], n: usize) {
    if conn.kind() != Kind::Tracked {
        return;
    }
    let Some(mut half) = conn.write() else {
        return conn.abandon(Reason::Shared);
    };
    if half.tls.is_some() {
        return tls::wrote(conn, &mut half, |each| for_each_piece(pieces, n, each));
    }
    respond(conn, half, |r| for_each_piece(pieces, n, |bytes| r.wrote(bytes)));
}

/// The server has written something of its responses.
pub(crate) fn follow_responses(conn: &Conn, follow: impl FnOnce(&mut Responses)) {
    match conn.write() {
        Some(half) => respond(conn, half, follow),
        None => conn.abandon(Reason::Shared),
    }
}

fn respond(conn: &Conn, mut half: Claim<'_, WriteHalf>, follow: impl FnOnce(&mut Responses)) {
    follow(&mut half.responses);
    match half.responses.progress() {
        Progress::Unknown => conn.abandon(Reason::UnknownResponse),
        Progress::Upgraded => conn.abandon(Reason::Upgraded),
        Progress::Clean if conn.awaits_clean.load(Ordering::Relaxed) => {
            drop(half);
            boundary::responses_are_out(conn);
        }
        Progress::Clean | Progress::InProgress | Progress::UntilClose => {}
    }
}
