//! Our descriptor among the server's: closing loops must not hit it, and a dup2 onto its number must not be
//! refused.

use libc::c_int;
use xo_sys::raw;

use crate::daemon;

/// Is this descriptor ours?
pub(crate) fn is_ours(fd: c_int) -> bool {
    fd >= 0 && fd == daemon::fd()
}

/// The server wants this number for itself: move out of its way.
pub(crate) fn make_way(fd: c_int) {
    if is_ours(fd)
        && let Ok(elsewhere) = raw::duplicate_from(fd, fd.saturating_add(1)).or_else(|_| raw::duplicate_from(fd, 3))
    {
        daemon::replace_fd(elsewhere.into_raw());
        raw::close(fd);
    }
}

/// The parts of a range of numbers that do not hold our descriptor.
pub(crate) fn around(first: u32, last: u32) -> [Option<(u32, u32)>; 2] {
    match u32::try_from(daemon::fd()) {
        Ok(ours) if (first..=last).contains(&ours) => {
            let below = ours.checked_sub(1).filter(|end| *end >= first).map(|end| (first, end));
            let above = ours.checked_add(1).filter(|begin| *begin <= last).map(|begin| (begin, last));
            [below, above]
        }
        _ => [Some((first, last)), None],
    }
}
