//! Whether anybody else could read a connection at this moment: a second thread, or a process that has it in common
//! with this one. If not, what has been looked at is what the next read gives.

use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, Ordering};

/// glibc's `__libc_single_threaded`; null where there is none.
static SINGLE: AtomicPtr<AtomicU8> = AtomicPtr::new(std::ptr::null_mut());
/// Forks that this process has seen, on either side.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// Looks glibc's word up; at load.
pub(crate) fn start() {
    // SAFETY: a C string; dlsym has no other demands.
    let word = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__libc_single_threaded".as_ptr()) };
    SINGLE.store(word.cast(), Ordering::Relaxed);
}

/// In both processes after a fork: what was open before is common to them.
pub(crate) extern "C" fn forked() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// To be remembered with a new connection.
pub(crate) fn forks() -> u32 {
    FORKS.load(Ordering::Relaxed)
}

/// Does only this thread of this process have what was opened when [`forks`] was `then`? A child of vfork counts for
/// nothing: it only begins another program.
#[inline]
pub(crate) fn is_alone(then: u32) -> bool {
    // SAFETY: null, or a byte that lives as long as the libc.
    let single = unsafe { SINGLE.load(Ordering::Relaxed).as_ref() };
    then == forks() && single.is_some_and(|s| s.load(Ordering::Relaxed) != 0)
}
