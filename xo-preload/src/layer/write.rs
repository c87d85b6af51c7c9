//! Writing: data is sealed and given to the kernel; what the kernel has not taken whole has not been written.

use std::sync::atomic::Ordering;

use libc::{c_int, iovec};
use xo_proto::tls::{MAX_PLAINTEXT, Outgoing};
use xo_sys::raw;
use zeroize::Zeroize;

use super::Layer;
use super::common::Direction;
use crate::io::set_errno;

/// So much data is sealed at a time, bytes: four records.
const PORTION: usize = 4 * MAX_PLAINTEXT;
/// Flags of a send that are the kernel's business with records as with anything.
const KEPT: c_int = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL | libc::MSG_MORE;
const SO_ZEROCOPY: c_int = 60;

/// What is not written yet because the connection may be elsewhere.
pub(crate) struct Asked;

impl Layer {
    /// A write of `pieces`, as sendmsg(2) without control data. `asked`: the daemon has been asked to move the connection.
    pub(crate) fn write(
        &self,
        fd: c_int,
        pieces: &[iovec],
        flags: c_int,
        asked: impl Fn() -> bool,
    ) -> Result<isize, Asked> {
        if flags & libc::MSG_OOB != 0 {
            return Ok(failed(libc::EOPNOTSUPP));
        }
        if flags & libc::MSG_ZEROCOPY != 0 && is_zero_copy(fd) {
            // What the kernel would send is ours, and used again: it says so when it has no room for a notice.
            return Ok(failed(libc::ENOBUFS));
        }
        let len = pieces.iter().map(|p| p.iov_len).fold(0, usize::saturating_add);
        if len == 0 {
            return Ok(0);
        }
        let mut gathered = Vec::new();
        self.send(fd, flags & KEPT, asked, len, |at, outgoing| {
            let result = match pieces {
                [one] => {
                    let n = (one.iov_len - at).min(PORTION);
                    // SAFETY: the server's own arguments of a write.
                    let data = unsafe { std::slice::from_raw_parts(one.iov_base.cast::<u8>().add(at), n) };
                    outgoing.data(data)
                }
                _ => {
                    gather(pieces, at, &mut gathered);
                    let result = outgoing.data(&gathered);
                    gathered.as_mut_slice().zeroize();
                    gathered.clear();
                    result
                }
            };
            result.map(|()| true).map_err(|_| libc::EIO)
        })
    }

    /// sendfile(2): `count` bytes of a file, from `offset` on, or from where the file stands, which is then moved.
    pub(crate) fn send_file(
        &self,
        fd: c_int,
        from: c_int,
        offset: Option<&mut i64>,
        count: usize,
        asked: impl Fn() -> bool,
    ) -> Result<isize, Asked> {
        let start = match &offset {
            Some(offset) => **offset,
            None => match raw::seek(from, 0, libc::SEEK_CUR) {
                Ok(at) => at,
                // Not a file: the server falls back to reading and writing.
                Err(_) => return Ok(failed(libc::EINVAL)),
            },
        };
        if start < 0 {
            return Ok(failed(libc::EINVAL));
        }
        if count == 0 {
            return Ok(0);
        }
        // As much as the kernel sends in one call.
        let count = count.min(0x7fff_f000);
        let mut buffer = Vec::new();
        let result = self.send(fd, 0, asked, count, |at, outgoing| {
            buffer.resize((count - at).min(PORTION), 0);
            let read = raw::read_at(from, &mut buffer, start.saturating_add_unsigned(at as u64));
            let n = read.map_err(|e| match e.raw_os_error() {
                Some(libc::ESPIPE) | None => libc::EINVAL,
                Some(errno) => errno,
            })?;
            let data = buffer.get(..n).unwrap_or_default();
            outgoing.data(data).map(|()| n > 0).map_err(|_| libc::EIO)
        })?;
        if let Ok(sent @ 1..) = i64::try_from(result) {
            match offset {
                Some(offset) => *offset = start + sent,
                None => {
                    let _ = raw::seek(from, start + sent, libc::SEEK_SET);
                }
            }
        }
        Ok(result)
    }

    /// Sends what `seal` gives for the data from a place on, up to `len`; how much of it the kernel has taken, in whole records.
    /// `seal` says whether there is any.
    fn send(
        &self,
        fd: c_int,
        flags: c_int,
        asked: impl Fn() -> bool,
        len: usize,
        mut seal: impl FnMut(usize, &mut Outgoing) -> Result<bool, c_int>,
    ) -> Result<isize, Asked> {
        let mut outgoing = self.send.lock();
        // Whoever asks takes this lock before it says where the records stand.
        if asked() {
            return Err(Asked);
        }
        let broken = self.broken.load(Ordering::Acquire);
        if broken != 0 {
            return Ok(failed(broken));
        }
        if !self.common.claim(Direction::Send) {
            return Ok(failed(self.fail(libc::EIO)));
        }
        let mut done = 0;
        loop {
            done += outgoing.told(len - done);
            if done == len {
                return Ok(done as isize);
            }
            if outgoing.pending().is_empty() {
                if self.owes_update.swap(false, Ordering::AcqRel) {
                    let _ = outgoing.key_update();
                }
                match seal(done, &mut outgoing) {
                    Ok(true) => {}
                    Ok(false) => return Ok(done as isize),
                    Err(errno) if done == 0 => return Ok(failed(errno)),
                    Err(_) => return Ok(done as isize),
                }
            }
            match raw::send(fd, outgoing.pending(), flags) {
                Ok(n) => outgoing.taken(n),
                Err(_) if done > 0 => return Ok(done as isize),
                Err(e) => return Ok(failed(e.raw_os_error().unwrap_or(libc::EIO))),
            }
        }
    }

    /// The client wants the server's next key: now if nothing is on its way out, else before the next data.
    pub(super) fn owe_update(&self, fd: c_int) {
        self.owes_update.store(true, Ordering::Release);
        if let Some(mut outgoing) = self.send.try_lock() {
            self.pay_update(fd, &mut outgoing);
        }
    }

    pub(super) fn pay_update(&self, fd: c_int, outgoing: &mut Outgoing) {
        if outgoing.state().is_some()
            && self.owes_update.swap(false, Ordering::AcqRel)
            && self.common.claim(Direction::Send)
            && outgoing.key_update().is_ok()
        {
            push(fd, outgoing);
        }
    }

    /// There is no second handshake here.
    pub(super) fn refuse_renegotiation(&self, fd: c_int) {
        if let Some(mut outgoing) = self.send.try_lock()
            && outgoing.pending().is_empty()
            && self.common.claim(Direction::Send)
            && outgoing.alert(false, xo_proto::tls::alert::NO_RENEGOTIATION).is_ok()
        {
            push(fd, &mut outgoing);
        }
    }
}

/// Gives the kernel what it takes at once.
pub(super) fn push(fd: c_int, outgoing: &mut Outgoing) {
    if let Ok(n) = raw::send(fd, outgoing.pending(), libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) {
        outgoing.taken(n);
    }
}

fn is_zero_copy(fd: c_int) -> bool {
    let mut on = 0_i32;
    raw::getsockopt(fd, libc::SOL_SOCKET, SO_ZEROCOPY, &mut on).is_ok() && on != 0
}

fn failed(errno: c_int) -> isize {
    set_errno(errno);
    -1
}

/// A portion of the pieces, from `at` bytes into them on.
fn gather(pieces: &[iovec], mut at: usize, out: &mut Vec<u8>) {
    for piece in pieces {
        if at >= piece.iov_len {
            at -= piece.iov_len;
            continue;
        }
        let n = (piece.iov_len - at).min(PORTION - out.len());
        // SAFETY: the server's own arguments of a write.
        out.extend_from_slice(unsafe { std::slice::from_raw_parts(piece.iov_base.cast::<u8>().add(at), n) });
        at = 0;
        if out.len() == PORTION {
            return;
        }
    }
}
