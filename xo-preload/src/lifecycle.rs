//! listen, close, shutdown, dup.

use std::sync::atomic::{AtomicBool, Ordering};

use libc::c_int;
use xo_proto::slot::{Counter, GONE, PENDING};
use xo_sys::raw;

use crate::fdtable::{self, Entry};
use crate::{boundary, conn, daemon, hide, init, io, policy, register, spawn};

/// It has been said that there is no daemon.
static MISSING_SAID: AtomicBool = AtomicBool::new(false);
/// The process has made an io_uring.
static RING: AtomicBool = AtomicBool::new(false);
/// It has been said.
static RING_SAID: AtomicBool = AtomicBool::new(false);

/// After a successful listen(): on a tracked port there should be a daemon.
pub(crate) fn listening(fd: c_int) {
    if init::active_policy().is_none() {
        return;
    }
    let Ok((address, _)) = raw::local_address(fd) else { return };
    if !policy::names(address.port()) {
        return;
    }
    fdtable::set(fd, Entry::Listener(address.port()));
    if !daemon::open() && spawn::start_daemon() {
        daemon::open_now();
    }
    // nginx alone says listen twice for each of its sockets.
    if daemon::fd() < 0 && !MISSING_SAID.swap(true, Ordering::AcqRel) {
        log::warn!("no xo-peerd: connections stay here");
    }
}

/// Before a descriptor is closed. `true`: it is ours, leave it.
pub(crate) fn closing(fd: c_int) -> bool {
    if hide::is_ours(fd) {
        return true;
    }
    gone(fd);
    false
}

/// Before the numbers from `first` to `last` are closed.
pub(crate) fn closing_range(first: u32, last: u32) {
    // No process has as many descriptors as the table has places; the kernel's limit bounds the walk.
    let end = last.min(raw::descriptor_limit());
    for fd in first..=end {
        gone(fd as c_int);
    }
}

fn gone(fd: c_int) {
    let entry = fdtable::get(fd);
    // Most descriptors are nothing to us. An epoll instance may have no entry.
    if (entry == Entry::None && !register::knows(fd)) || daemon::is_borrowed() {
        return;
    }
    match entry {
        Entry::Connection(index) => {
            if let Some(conn) = conn::get(index).filter(|c| c.has_layer() && c.is_last_descriptor())
                && let Some(layer) = conn.layer().filter(|_| !conn.may_be_elsewhere(index))
            {
                layer.close(fd);
            }
        }
        _ => register::closing(fd),
    }
    conn::forget(fd);
}

/// Before a shutdown. `true`: the connection is elsewhere, leave the socket alone. It may not be emptied yet, and a
/// FIN from it would end the connection under the target's hands.
pub(crate) fn shutting_down(fd: c_int, how: c_int) -> bool {
    let Some((index, conn)) = io::followed(fd) else { return false };
    if conn.asked.load(Ordering::Acquire) {
        let gone = match conn.slot_state(index) {
            PENDING => boundary::await_verdict(index, None) == GONE,
            state => state == GONE,
        };
        if gone {
            return true;
        }
    }
    if how != libc::SHUT_RD
        && let Some(layer) = conn.layer()
    {
        layer.say_goodbye(fd);
    }
    false
}

/// After a successful dup.
pub(crate) fn duplicated(old: c_int, new: c_int) {
    let concerns = || fdtable::get(old) != Entry::None || fdtable::get(new) != Entry::None;
    if new >= 0 && old != new && concerns() && !daemon::is_borrowed() {
        conn::share(old, new);
        keep_from_others(new);
    }
}

/// Another program would read and write records: it does not get a connection that has a record layer here.
pub(crate) fn keep_from_others(fd: c_int) {
    if let Entry::Connection(index) = fdtable::get(fd)
        && conn::get(index).is_some_and(conn::Conn::has_layer)
    {
        let _ = raw::set_cloexec(fd, true);
    }
}

/// The process has made an io_uring: what it does through it is seen by nobody.
pub(crate) fn ring_made() {
    RING.store(true, Ordering::Relaxed);
    if conn::all().next().is_some() {
        tracking();
    }
}

/// Does it?
pub(crate) fn has_ring() -> bool {
    RING.load(Ordering::Relaxed)
}

/// The process has a followed connection.
#[inline]
pub(crate) fn tracking() {
    if RING.load(Ordering::Relaxed) && !RING_SAID.swap(true, Ordering::AcqRel) {
        log::warn!("this process uses io_uring: what it reads and writes through it cannot be followed");
        daemon::count(Counter::IoUring as usize);
    }
}
