//! The monotonic clock in nanoseconds: what the library stamps its decisions with, and what two daemons of
//! one boot share.

/// `CLOCK_MONOTONIC`, ns.
pub(crate) fn now_ns() -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is valid for writing a timespec; the call has no other effect.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut t) };
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}
