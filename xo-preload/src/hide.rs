//! Our descriptor among the server's: closing loops must not hit it, and a dup2 onto its number must not be
//! refused.

use libc::c_int;
use xo_sys::raw;

use crate::{daemon, register};

/// Is this descriptor ours?
pub(crate) fn is_ours(fd: c_int) -> bool {
    fd >= 0 && (fd == daemon::fd() || register::descriptors().any(|ours| ours == fd))
}

/// The server wants this number for itself: move out of its way. (dup2 onto one that is in an
/// epoll only ends its service; the daemon then delivers elsewhere.)
pub(crate) fn make_way(fd: c_int) {
    if fd == daemon::fd()
        && fd >= 0
        && !daemon::is_borrowed()
        && let Ok(elsewhere) =
            raw::duplicate_from(fd, fd.saturating_add(1)).or_else(|_| raw::duplicate_from(fd, 3))
    {
        daemon::replace_fd(elsewhere.into_raw());
        raw::close(fd);
    }
}

/// Calls `each` for the parts of a range of numbers that do not hold our descriptors.
pub(crate) fn around(first: u32, last: u32, mut each: impl FnMut(u32, u32)) {
    let mut begin = first;
    let mut ours: [u32; register::REGISTRATIONS + 1] = [u32::MAX; register::REGISTRATIONS + 1];
    let numbers = register::descriptors().chain([daemon::fd()]).filter_map(|fd| u32::try_from(fd).ok());
    for (place, fd) in ours.iter_mut().zip(numbers) {
        *place = fd;
    }
    ours.sort_unstable();
    for fd in ours.into_iter().filter(|fd| (first..=last).contains(fd) && *fd != u32::MAX) {
        if fd > begin {
            each(begin, fd - 1);
        }
        begin = fd.saturating_add(1);
    }
    if begin <= last {
        each(begin, last);
    }
}
