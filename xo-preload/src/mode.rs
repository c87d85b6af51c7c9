//! Whether a connection's descriptor blocks. The kernel knows; asking it costs a system call for each read, so the
//! answer is kept and corrected by the hooks on fcntl and ioctl.
//!
//! The mode belongs to the open file, which a child has in common with its parent: when a process changes it on a
//! connection that it has inherited, all processes of the family ask the kernel again.

use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use libc::c_int;
use xo_sys::raw;

use crate::conn::Conn;
use crate::{daemon, fdtable};

const UNKNOWN: u32 = 0;
const BLOCKING: u32 = 1;
const NONBLOCKING: u32 = 2;
const BITS: u32 = 2;

/// Changes of inherited modes in this family of processes; in memory that parent and children share.
static CHANGES: AtomicPtr<AtomicU32> = AtomicPtr::new(std::ptr::null_mut());

/// What is known about one connection. All zero: nothing.
pub(crate) struct Mode {
    /// The mode, and above it the number of changes when it was learnt.
    known: AtomicU32,
    /// The process that accepted the connection.
    process: AtomicU32,
}

/// Makes the memory; at load.
pub(crate) fn start() -> bool {
    let Ok(page) = raw::map_common() else { return false };
    CHANGES.store(page.cast(), Ordering::Release);
    true
}

fn changes() -> u32 {
    // SAFETY: mapped for good.
    unsafe { CHANGES.load(Ordering::Acquire).as_ref() }.map_or(0, |c| c.load(Ordering::Acquire))
}

impl Mode {
    /// The connection is new in this process.
    pub(crate) fn begin(&self, nonblocking: bool) {
        self.process.store(daemon::process(), Ordering::Relaxed);
        self.learn(nonblocking);
    }

    fn learn(&self, nonblocking: bool) {
        let mode = if nonblocking { NONBLOCKING } else { BLOCKING };
        self.known.store(changes() << BITS | mode, Ordering::Release);
    }

    /// Does a call on this descriptor of the connection return at once?
    #[inline]
    pub(crate) fn is_nonblocking(&self, fd: c_int) -> bool {
        let known = self.known.load(Ordering::Acquire);
        if known >> BITS == changes() & (u32::MAX >> BITS) && known & (NONBLOCKING | BLOCKING) != UNKNOWN {
            return known & NONBLOCKING != 0;
        }
        // Learnt before it is asked: a change that comes between makes it unknown again.
        let nonblocking = raw::is_nonblocking(fd);
        let mode = if nonblocking { NONBLOCKING } else { BLOCKING };
        let new = changes() << BITS | mode;
        if raw::is_nonblocking(fd) == nonblocking {
            let _ = self.known.compare_exchange(known, new, Ordering::AcqRel, Ordering::Relaxed);
        }
        nonblocking
    }
}

/// The server has set a descriptor's mode.
pub(crate) fn changed(fd: c_int, nonblocking: bool) {
    if let fdtable::Entry::Connection(index) = fdtable::get(fd)
        && let Some(conn) = crate::conn::get(index)
    {
        conn_changed(conn, nonblocking);
    }
}

fn conn_changed(conn: &Conn, nonblocking: bool) {
    if conn.mode.process.load(Ordering::Relaxed) != daemon::process() {
        // SAFETY: mapped for good.
        if let Some(changes) = unsafe { CHANGES.load(Ordering::Acquire).as_ref() } {
            changes.fetch_add(1, Ordering::AcqRel);
        }
    }
    conn.mode.learn(nonblocking);
}
