//! Reading: records are looked at in the socket, opened here, and dropped when their data has been used up.

use std::sync::atomic::Ordering;
use std::time::Duration;

use libc::{c_int, iovec};
use xo_proto::tls::{Control, Incoming, MAX_RECORD};
use xo_sys::{raw, tcp_repair};
use zeroize::Zeroize;

use super::Layer;
use super::common::Direction;
use crate::boundary::ESTABLISHED;
use crate::io::set_errno;

/// So much data is opened at a time, bytes.
const PORTION: usize = 64 << 10;

/// What there is to read.
enum Filled {
    Data,
    /// Nothing yet.
    Nothing,
    /// The client has closed.
    End,
}

impl Layer {
    /// A read into `pieces`, as recvmsg(2) without control data; `flags` may hold MSG_PEEK, MSG_TRUNC, MSG_WAITALL.
    pub(crate) fn read(&self, fd: c_int, pieces: &[iovec], flags: c_int, nonblocking: bool) -> isize {
        let want = pieces.iter().map(|p| p.iov_len).fold(0, usize::saturating_add);
        if flags & libc::MSG_OOB != 0 {
            // There is no urgent data in TLS; so the kernel says that none waits.
            return failed(libc::EINVAL);
        }
        let peeking = flags & libc::MSG_PEEK != 0;
        let discarding = flags & libc::MSG_TRUNC != 0;
        let whole = flags & libc::MSG_WAITALL != 0 && !peeking;
        let mut done = 0;
        let mut end = None;
        while done < want {
            let mut incoming = self.receive.lock();
            // What is there beyond the first portion must be looked for: a short read means that nothing is.
            let filled =
                self.fill(fd, &mut incoming, if peeking { want } else { (want - done).min(PORTION) });
            match filled {
                Ok(Filled::Data) => {
                    let data = incoming.data();
                    let n = data.len().min(want - done);
                    if !discarding || peeking {
                        scatter(data.get(..n).unwrap_or_default(), pieces, done);
                    }
                    done += n;
                    if peeking {
                        break;
                    }
                    if let Err(errno) = self.use_up(fd, &mut incoming, n) {
                        return if done > 0 { done as isize } else { failed(errno) };
                    }
                }
                Ok(Filled::End) => break,
                Ok(Filled::Nothing) if done > 0 && !whole => break,
                Ok(Filled::Nothing) if nonblocking => return or_failed(done, libc::EAGAIN),
                Ok(Filled::Nothing) => {
                    let taken = self.take(fd, &mut incoming);
                    drop(incoming);
                    if let Err(errno) = taken.and_then(|()| wait(fd, &mut end)) {
                        return or_failed(done, errno);
                    }
                }
                Err(errno) => return or_failed(done, errno),
            }
        }
        done as isize
    }

    /// Looks at up to `size` bytes of data, copied to `at`; how many there are, or an errno.
    ///
    /// # Safety
    /// `size` bytes at `at` may be overwritten.
    pub(crate) unsafe fn peek(
        &self,
        fd: c_int,
        at: *mut u8,
        size: usize,
        nonblocking: bool,
    ) -> Result<usize, i32> {
        let mut end = None;
        loop {
            let mut incoming = self.receive.lock();
            match self.fill(fd, &mut incoming, size)? {
                Filled::Data => {
                    let data = incoming.data();
                    let n = data.len().min(size);
                    // SAFETY: the caller's promise; the two do not overlap, one is ours.
                    unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), at, n) };
                    return Ok(n);
                }
                Filled::End => return Ok(0),
                Filled::Nothing if nonblocking => return Err(libc::EAGAIN),
                Filled::Nothing => {
                    self.take(fd, &mut incoming)?;
                    drop(incoming);
                    wait(fd, &mut end)?;
                }
            }
        }
    }

    /// Data that can be read at once, bytes (FIONREAD).
    pub(crate) fn readable(&self, fd: c_int) -> usize {
        let mut incoming = self.receive.lock();
        match self.fill(fd, &mut incoming, usize::MAX) {
            Ok(_) => incoming.data().len(),
            Err(_) => 0,
        }
    }

    /// Is more in the socket than what has been used up, complete or not?
    pub(crate) fn has_more(&self, fd: c_int) -> bool {
        let incoming = self.receive.lock();
        incoming.end().is_some() || !incoming.data().is_empty() || raw::readable_bytes(fd) >= incoming.need()
    }

    /// SO_RCVLOWAT with which waiting stays quiet until there is more data than now.
    pub(crate) fn low_water(&self, fd: c_int) -> usize {
        let incoming = self.receive.lock();
        incoming.need().max(raw::readable_bytes(fd) + 1)
    }

    /// Opens records until there are `enough` bytes of data, or no complete record is left.
    fn fill(&self, fd: c_int, incoming: &mut Incoming, enough: usize) -> Result<Filled, i32> {
        let broken = self.broken.load(Ordering::Acquire);
        if broken != 0 {
            return Err(broken);
        }
        if !self.common.claim(Direction::Receive) {
            return Err(self.fail(libc::EIO));
        }
        while incoming.data().len() < enough && incoming.end().is_none() {
            let room = incoming.opened() + MAX_RECORD;
            let mut queue = vec![0; room];
            let n = match raw::peek(fd, &mut queue, libc::MSG_DONTWAIT) {
                Ok(n) => n,
                Err(e) => match e.raw_os_error().unwrap_or(libc::EIO) {
                    libc::EAGAIN => break,
                    _ if !incoming.data().is_empty() => break,
                    errno => return Err(errno),
                },
            };
            let before = incoming.opened();
            incoming.open(queue.get_mut(..n).unwrap_or_default(), enough);
            queue.as_mut_slice().zeroize();
            let opened = incoming.opened() - before;
            self.settle(fd, incoming)?;
            if opened == 0 || (n < room && !incoming.data().is_empty()) {
                return self.incomplete(fd, incoming, n);
            }
        }
        self.settle(fd, incoming)?;
        if !incoming.data().is_empty() {
            self.quiet(fd, None);
            return Ok(Filled::Data);
        }
        match incoming.end() {
            None => Ok(Filled::Nothing),
            Some(Some(alert)) => Err(self.give_up(fd, alert)),
            Some(None) if incoming.control() == Some(Control::Alert) => Err(self.fail(libc::ECONNRESET)),
            Some(None) => Ok(Filled::End),
        }
    }

    /// Of `n` bytes in the socket there is no further complete record.
    fn incomplete(&self, fd: c_int, incoming: &mut Incoming, n: usize) -> Result<Filled, i32> {
        match incoming.end() {
            Some(Some(alert)) if incoming.data().is_empty() => return Err(self.give_up(fd, alert)),
            _ if !incoming.data().is_empty() => {
                self.quiet(fd, None);
                return Ok(Filled::Data);
            }
            // Its client has closed in the middle of a record.
            _ if n == 0 && incoming.has_taken() => return Err(self.fail(libc::ECONNRESET)),
            _ if n == 0 => return Ok(Filled::End),
            _ => {}
        }
        if raw::tcp_state(fd).is_ok_and(|s| s != ESTABLISHED) && raw::readable_bytes(fd) < incoming.need() {
            // Its client has closed in the middle of a record.
            return Err(self.fail(libc::ECONNRESET));
        }
        // Not even that keeps the kernel from waking the server when the client may not send more, and then it never will.
        let again = self.raised.load(Ordering::Acquire) == incoming.need();
        if again || tcp_repair::receive_memory(fd).is_ok_and(|(used, limit)| used > limit / 3) {
            self.take(fd, incoming)?;
        }
        self.quiet(fd, Some(incoming.need()));
        Ok(Filled::Nothing)
    }

    /// Takes the beginning of a record out of the socket. The kernel keeps a segment, which may be as large as its buffer, until
    /// the last byte of it has been read; so a few bytes can leave no room for the rest of their record.
    fn take(&self, fd: c_int, incoming: &mut Incoming) -> Result<(), i32> {
        if incoming.opened() > 0 {
            return Ok(());
        }
        let mut queue = vec![0; incoming.need()];
        match raw::peek(fd, &mut queue, libc::MSG_DONTWAIT) {
            // Complete by now: the next look opens it.
            Ok(n) if n < queue.len() => {
                incoming.take(queue.get(..n).unwrap_or_default());
                self.drop_records(fd, n)
            }
            _ => Ok(()),
        }
    }

    /// Level-triggered waiting stays quiet until so many bytes are in the socket; `None`: as usual.
    fn quiet(&self, fd: c_int, until: Option<usize>) {
        let raised = self.raised.swap(until.unwrap_or_default(), Ordering::AcqRel);
        if raised != 0 || until.is_some() {
            let low = until.map_or(1, |n| i32::try_from(n).unwrap_or(i32::MAX));
            let _ = raw::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, &low);
        }
    }

    /// `n` bytes of data have been used up.
    fn use_up(&self, fd: c_int, incoming: &mut Incoming, mut n: usize) -> Result<(), i32> {
        while n > 0 {
            let (dropped, left) = incoming.used(n);
            self.drop_records(fd, dropped)?;
            self.settle(fd, incoming)?;
            if left == n {
                return Err(self.fail(libc::EIO));
            }
            n = left;
        }
        Ok(())
    }

    /// Records at the front that are not data.
    fn settle(&self, fd: c_int, incoming: &mut Incoming) -> Result<(), i32> {
        while let Some(control) = incoming.control() {
            match control {
                // They stay: the end is to be seen by whoever waits.
                Control::Close | Control::Alert => return Ok(()),
                Control::Nothing | Control::KeyUpdate { answer: false } => {}
                Control::KeyUpdate { answer: true } => self.owe_update(fd),
                Control::Renegotiation => self.refuse_renegotiation(fd),
            }
            let dropped = incoming.done();
            self.drop_records(fd, dropped)?;
        }
        Ok(())
    }

    pub(super) fn drop_records(&self, fd: c_int, mut n: usize) -> Result<(), i32> {
        while n > 0 {
            match raw::discard(fd, n) {
                Ok(0) | Err(_) => return Err(self.fail(libc::EIO)),
                Ok(dropped) => n = n.saturating_sub(dropped),
            }
        }
        Ok(())
    }
}

/// Waits as a blocking read does, until something is in the socket.
fn wait(fd: c_int, end: &mut Option<Option<Duration>>) -> Result<(), i32> {
    let end = *end.get_or_insert_with(|| raw::receive_timeout(fd).map(|t| raw::monotonic() + t));
    // With the kernel's own time limit, and its own way with signals.
    raw::peek(fd, &mut [0], 0).map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))?;
    if end.is_some_and(|end| raw::monotonic() >= end) { Err(libc::EAGAIN) } else { Ok(()) }
}

fn failed(errno: i32) -> isize {
    set_errno(errno);
    -1
}

fn or_failed(done: usize, errno: i32) -> isize {
    if done > 0 { done as isize } else { failed(errno) }
}

/// Copies `data` into the pieces, beginning `at` bytes into them.
fn scatter(mut data: &[u8], pieces: &[iovec], mut at: usize) {
    for piece in pieces {
        if at >= piece.iov_len {
            at -= piece.iov_len;
            continue;
        }
        let (now, later) = data.split_at(data.len().min(piece.iov_len - at));
        // SAFETY: the server's own arguments of a read: so many bytes may be written there.
        unsafe {
            std::ptr::copy_nonoverlapping(now.as_ptr(), piece.iov_base.cast::<u8>().add(at), now.len())
        };
        (data, at) = (later, 0);
        if data.is_empty() {
            return;
        }
    }
}
