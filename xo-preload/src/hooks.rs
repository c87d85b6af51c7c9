//! THE table: every function that is interposed. A hook marshals; the decision is in the file that it
//! names. Untracked descriptors cost one load and one branch.

#![expect(
    clippy::undocumented_unsafe_blocks,
    reason = "each calls the original with the server's own arguments: whoever calls the hook has promised what the \
              original demands"
)]

use std::time::Duration;

use libc::{
    c_int, c_long, c_uint, c_ulong, c_void, epoll_event, fd_set, iovec, mmsghdr, msghdr, nfds_t, off_t,
    off64_t, pollfd, sigset_t, size_t, sockaddr, socklen_t, ssize_t, timespec, timeval,
};
use xo_proto::reason::Reason;

use crate::interpose::{hooks, optional_hooks};
use crate::{accept as accepting, fdtable, hide, init, io, lifecycle, mode, poll as polling, register};

/// Looks all originals up; at load.
pub(crate) fn resolve() {
    resolve_mandatory();
    resolve_optional();
}

fn one(buffer: *const c_void, len: size_t) -> iovec {
    iovec { iov_base: buffer.cast_mut(), iov_len: len }
}

/// One buffer as a list.
fn piece(buffer: *const c_void, len: size_t) -> [iovec; 1] {
    [one(buffer, len)]
}

/// The application's list of buffers.
///
/// # Safety
/// `count` pieces at `pieces`, as readv(2) demands.
unsafe fn list<'a>(pieces: *const iovec, count: usize) -> &'a [iovec] {
    if pieces.is_null() {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(pieces, count) }
}

fn first_len(pieces: &[iovec]) -> size_t {
    pieces.first().map_or(0, |p| p.iov_len)
}

fn milliseconds(timeout: c_int) -> Option<Duration> {
    u64::try_from(timeout).ok().map(Duration::from_millis)
}

fn to_milliseconds(timeout: Option<Duration>) -> c_int {
    timeout.map_or(-1, |t| c_int::try_from(t.as_millis()).unwrap_or(c_int::MAX))
}

/// # Safety
/// Null or a valid time.
unsafe fn from_timespec(t: *const timespec) -> Option<Duration> {
    // SAFETY: the caller's promise.
    unsafe { t.as_ref() }
        .map(|t| Duration::new(t.tv_sec.max(0) as u64, t.tv_nsec.clamp(0, 999_999_999) as u32))
}

fn to_timespec(t: Duration) -> timespec {
    timespec { tv_sec: t.as_secs() as i64, tv_nsec: t.subsec_nanos().into() }
}

/// # Safety
/// `count` entries at `fds`, as poll(2) demands.
unsafe fn polled<'a>(fds: *const pollfd, count: nfds_t) -> impl Iterator<Item = c_int> + 'a {
    let all: &[pollfd] = if fds.is_null() {
        &[]
    } else {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(fds, count as usize) }
    };
    all.iter().filter(|p| p.events & libc::POLLIN != 0).map(|p| p.fd)
}

/// # Safety
/// Null or a valid set.
unsafe fn selected<'a>(count: c_int, set: *const fd_set) -> impl Iterator<Item = c_int> + 'a {
    let end = if set.is_null() { 0 } else { count.min(libc::FD_SETSIZE as c_int) };
    // SAFETY: the caller's promise; numbers are below FD_SETSIZE.
    (0..end).filter(move |fd| unsafe { libc::FD_ISSET(*fd, set) })
}

/// Leaves alone the connections whose descriptors the message carries: another process may use them, too. `true` when one
/// of them has a record layer here, without which it is of no use.
///
/// # Safety
/// Null or a valid message.
unsafe fn passing(message: *const msghdr) -> bool {
    let mut layered = false;
    // SAFETY: the caller's promise; the CMSG functions check the length of the control data, and SCM_RIGHTS data is
    // descriptors.
    unsafe {
        let mut next =
            if message.is_null() { std::ptr::null() } else { libc::CMSG_FIRSTHDR(message).cast_const() };
        while let Some(header) = next.as_ref() {
            if header.cmsg_level == libc::SOL_SOCKET && header.cmsg_type == libc::SCM_RIGHTS {
                let length = header.cmsg_len.saturating_sub(libc::CMSG_LEN(0) as size_t);
                let passed = libc::CMSG_DATA(header).cast::<c_int>();
                (0..length / size_of::<c_int>()).for_each(|i| {
                    let fd = passed.add(i).read_unaligned();
                    layered |= has_layer(fd);
                    abandon(fd, Reason::Shared);
                });
            }
            next = libc::CMSG_NXTHDR(message, header);
        }
    }
    layered
}

/// Has what is behind this descriptor a record layer?
fn has_layer(fd: c_int) -> bool {
    io::followed(fd).is_some_and(|(_, conn)| conn.has_layer())
}

/// A connection with a record layer cannot be passed to another process.
fn refused() -> ssize_t {
    io::set_errno(libc::EBADF);
    -1
}

fn abandon(fd: c_int, reason: Reason) {
    if let Some((_, conn)) = io::followed(fd) {
        conn.abandon(reason);
    }
}

hooks! {
    fn listen(fd: c_int, backlog: c_int) -> c_int {
        let result = unsafe { real()(fd, backlog) };
        if result == 0 {
            lifecycle::listening(fd);
        }
        result
    }

    fn accept(fd: c_int, address: *mut sockaddr, len: *mut socklen_t) -> c_int {
        let call = || unsafe { real()(fd, address, len) };
        match accepting::tracked_port(fd) {
            Some(_) => accepting::accept(fd, address, len, 0, call),
            None => fresh(call()),
        }
    }

    fn accept4(fd: c_int, address: *mut sockaddr, len: *mut socklen_t, flags: c_int) -> c_int {
        let call = || unsafe { real()(fd, address, len, flags) };
        match accepting::tracked_port(fd) {
            Some(_) => accepting::accept(fd, address, len, flags, call),
            None => fresh(call()),
        }
    }

    fn read(fd: c_int, buffer: *mut c_void, len: size_t) -> ssize_t {
        match io::followed(fd) {
            None => unsafe { real()(fd, buffer, len) },
            Some((index, conn)) => io::read_bytes(fd, index, conn, one(buffer, len), 0, |p| unsafe {
                real()(fd, buffer, first_len(p))
            }),
        }
    }

    fn readv(fd: c_int, pieces: *const iovec, count: c_int) -> ssize_t {
        match io::followed(fd) {
            None => unsafe { real()(fd, pieces, count) },
            Some((index, conn)) => {
                let all = unsafe { list(pieces, usize::try_from(count).unwrap_or(0)) };
                io::read(fd, index, conn, all, 0, |p| unsafe { real()(fd, p.as_ptr(), p.len() as c_int) })
            }
        }
    }

    fn recv(fd: c_int, buffer: *mut c_void, len: size_t, flags: c_int) -> ssize_t {
        match io::followed(fd) {
            None => unsafe { real()(fd, buffer, len, flags) },
            Some((index, conn)) => io::read_bytes(fd, index, conn, one(buffer, len), flags, |p| unsafe {
                real()(fd, buffer, first_len(p), flags)
            }),
        }
    }

    fn recvfrom(fd: c_int, buffer: *mut c_void, len: size_t, flags: c_int, address: *mut sockaddr,
                address_len: *mut socklen_t) -> ssize_t {
        match io::followed(fd) {
            None => unsafe { real()(fd, buffer, len, flags, address, address_len) },
            Some((index, conn)) => {
                if conn.has_layer() && let Some(len) = unsafe { address_len.as_mut() } {
                    // As TCP has it.
                    *len = 0;
                }
                io::read(fd, index, conn, &piece(buffer, len), flags, |p| unsafe {
                    real()(fd, buffer, first_len(p), flags, address, address_len)
                })
            }
        }
    }

    fn recvmsg(fd: c_int, message: *mut msghdr, flags: c_int) -> ssize_t {
        match (io::followed(fd), unsafe { message.as_mut() }) {
            (Some((index, conn)), Some(message)) => {
                let (base, count) = (message.msg_iov, message.msg_iovlen);
                let all = unsafe { list(base, count) };
                let result = io::read(fd, index, conn, all, flags, |p| {
                    message.msg_iov = p.as_ptr().cast_mut();
                    message.msg_iovlen = p.len();
                    unsafe { real()(fd, message, flags) }
                });
                message.msg_iov = base;
                message.msg_iovlen = count;
                if conn.has_layer() && flags & libc::MSG_ERRQUEUE == 0 && result >= 0 {
                    message.msg_namelen = 0;
                    message.msg_controllen = 0;
                    message.msg_flags = 0;
                }
                result
            }
            _ => unsafe { real()(fd, message, flags) },
        }
    }

    fn recvmmsg(fd: c_int, messages: *mut mmsghdr, count: c_uint, flags: c_int, timeout: *mut timespec) -> c_int {
        // Several messages of a stream at once: nobody does it; not worth following.
        if has_layer(fd) {
            let Some(first) = (unsafe { messages.as_mut() }).filter(|_| count > 0) else { return 0 };
            let n = unsafe { recvmsg::hooked(fd, &raw mut first.msg_hdr, flags & !libc::MSG_WAITFORONE) };
            first.msg_len = c_uint::try_from(n).unwrap_or(0);
            return if n < 0 { -1 } else { 1 };
        }
        abandon(fd, Reason::Shared);
        unsafe { real()(fd, messages, count, flags, timeout) }
    }

    fn write(fd: c_int, buffer: *const c_void, len: size_t) -> ssize_t {
        let call = || unsafe { real()(fd, buffer, len) };
        match io::followed(fd) {
            None => call(),
            Some((index, conn)) => io::write(fd, index, conn, &piece(buffer, len), 0, call),
        }
    }

    fn writev(fd: c_int, pieces: *const iovec, count: c_int) -> ssize_t {
        let call = || unsafe { real()(fd, pieces, count) };
        match io::followed(fd) {
            None => call(),
            Some((index, conn)) => {
                let all = unsafe { list(pieces, usize::try_from(count).unwrap_or(0)) };
                io::write(fd, index, conn, all, 0, call)
            }
        }
    }

    fn send(fd: c_int, buffer: *const c_void, len: size_t, flags: c_int) -> ssize_t {
        let call = || unsafe { real()(fd, buffer, len, flags) };
        match io::followed(fd) {
            None => call(),
            Some((index, conn)) => io::write(fd, index, conn, &piece(buffer, len), flags, call),
        }
    }

    fn sendto(fd: c_int, buffer: *const c_void, len: size_t, flags: c_int, address: *const sockaddr,
              address_len: socklen_t) -> ssize_t {
        let call = || unsafe { real()(fd, buffer, len, flags, address, address_len) };
        match io::followed(fd) {
            None => call(),
            Some((index, conn)) => io::write(fd, index, conn, &piece(buffer, len), flags, call),
        }
    }

    fn sendmsg(fd: c_int, message: *const msghdr, flags: c_int) -> ssize_t {
        if unsafe { passing(message) } {
            return refused();
        }
        let call = || unsafe { real()(fd, message, flags) };
        match (io::followed(fd), unsafe { message.as_ref() }) {
            (Some((index, conn)), Some(message)) => {
                let all = unsafe { list(message.msg_iov, message.msg_iovlen) };
                io::write(fd, index, conn, all, flags, call)
            }
            _ => call(),
        }
    }

    fn sendmmsg(fd: c_int, messages: *mut mmsghdr, count: c_uint, flags: c_int) -> c_int {
        let all = 0..if messages.is_null() { 0 } else { count as usize };
        if has_layer(fd) {
            let Some(first) = (unsafe { messages.as_mut() }).filter(|_| count > 0) else { return 0 };
            let n = unsafe { sendmsg::hooked(fd, &raw const first.msg_hdr, flags) };
            first.msg_len = c_uint::try_from(n).unwrap_or(0);
            return if n < 0 { -1 } else { 1 };
        }
        abandon(fd, Reason::Shared);
        for i in all {
            if unsafe { passing(&raw const (*messages.add(i)).msg_hdr) } {
                return refused() as c_int;
            }
        }
        unsafe { real()(fd, messages, count, flags) }
    }

    fn sendfile(to: c_int, from: c_int, offset: *mut off_t, count: size_t) -> ssize_t {
        let call = || unsafe { real()(to, from, offset, count) };
        match io::followed(to) {
            None => call(),
            Some((index, conn)) => {
                io::send_file(to, index, conn, (from, unsafe { offset.as_mut() }, count), call)
            }
        }
    }

    fn sendfile64(to: c_int, from: c_int, offset: *mut off64_t, count: size_t) -> ssize_t {
        let call = || unsafe { real()(to, from, offset, count) };
        match io::followed(to) {
            None => call(),
            Some((index, conn)) => {
                io::send_file(to, index, conn, (from, unsafe { offset.as_mut() }, count), call)
            }
        }
    }

    fn splice(from: c_int, from_at: *mut off64_t, to: c_int, to_at: *mut off64_t, len: size_t,
              flags: c_uint) -> ssize_t {
        let call = |len| unsafe { real()(from, from_at, to, to_at, len, flags) };
        match (io::followed(from), io::followed(to)) {
            (Some((index, conn)), _) => io::read_unseen(from, index, conn, len, call),
            (None, Some((index, conn))) => io::write_unseen(to, index, conn, || call(len)),
            (None, None) => call(len),
        }
    }

    fn close(fd: c_int) -> c_int {
        if lifecycle::closing(fd) {
            // Ours: to the server it is a number that it never opened.
            io::set_errno(libc::EBADF);
            return -1;
        }
        unsafe { real()(fd) }
    }

    fn getsockname(fd: c_int, address: *mut sockaddr, len: *mut socklen_t) -> c_int {
        let result = unsafe { real()(fd, address, len) };
        if result == 0 {
            unsafe { accepting::name_port(fd, address, *len) };
        }
        result
    }

    fn shutdown(fd: c_int, how: c_int) -> c_int {
        if lifecycle::shutting_down(fd, how) {
            // What an emptied socket answers.
            io::set_errno(libc::ENOTCONN);
            return -1;
        }
        unsafe { real()(fd, how) }
    }

    fn dup(fd: c_int) -> c_int {
        let new = unsafe { real()(fd) };
        lifecycle::duplicated(fd, new);
        new
    }

    fn dup2(old: c_int, new: c_int) -> c_int {
        hide::make_way(new);
        let result = unsafe { real()(old, new) };
        lifecycle::duplicated(old, result);
        result
    }

    fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int {
        hide::make_way(new);
        let result = unsafe { real()(old, new, flags) };
        lifecycle::duplicated(old, result);
        result
    }

    fn epoll_ctl(epoll: c_int, operation: c_int, fd: c_int, event: *mut epoll_event) -> c_int {
        let result = unsafe { real()(epoll, operation, fd, event) };
        if result == 0 {
            register::epoll_changed(epoll, operation, fd, unsafe { event.as_ref() });
        }
        result
    }

    fn epoll_wait(epoll: c_int, events: *mut epoll_event, count: c_int, timeout: c_int) -> c_int {
        register::about_to_wait_with(epoll);
        polling::wait(milliseconds(timeout), |t| unsafe { real()(epoll, events, count, to_milliseconds(t)) })
    }

    fn epoll_pwait(epoll: c_int, events: *mut epoll_event, count: c_int, timeout: c_int,
                   mask: *const sigset_t) -> c_int {
        register::about_to_wait_with(epoll);
        polling::wait(milliseconds(timeout), |t| unsafe {
            real()(epoll, events, count, to_milliseconds(t), mask)
        })
    }

    fn poll(fds: *mut pollfd, count: nfds_t, timeout: c_int) -> c_int {
        register::about_to_wait(unsafe { polled(fds, count) });
        polling::wait(milliseconds(timeout), |t| unsafe { real()(fds, count, to_milliseconds(t)) })
    }

    fn ppoll(fds: *mut pollfd, count: nfds_t, timeout: *const timespec, mask: *const sigset_t) -> c_int {
        register::about_to_wait(unsafe { polled(fds, count) });
        polling::wait(unsafe { from_timespec(timeout) }, |t| {
            let t = t.map(to_timespec);
            unsafe { real()(fds, count, t.as_ref().map_or(std::ptr::null(), std::ptr::from_ref), mask) }
        })
    }

    fn select(count: c_int, read: *mut fd_set, write: *mut fd_set, except: *mut fd_set,
              timeout: *mut timeval) -> c_int {
        // Not bounded by deadlines: select overwrites its sets, so it could not be repeated.
        register::about_to_wait(unsafe { selected(count, read) });
        unsafe { real()(count, read, write, except, timeout) }
    }

    fn pselect(count: c_int, read: *mut fd_set, write: *mut fd_set, except: *mut fd_set,
               timeout: *const timespec, mask: *const sigset_t) -> c_int {
        register::about_to_wait(unsafe { selected(count, read) });
        unsafe { real()(count, read, write, except, timeout, mask) }
    }
}

/// After an fcntl.
fn controlled(fd: c_int, command: c_int, argument: usize, result: c_int) {
    match command {
        libc::F_DUPFD | libc::F_DUPFD_CLOEXEC => lifecycle::duplicated(fd, result),
        libc::F_SETFD if result == 0 => lifecycle::keep_from_others(fd),
        libc::F_SETFL if result == 0 => mode::changed(fd, argument & libc::O_NONBLOCK as usize != 0),
        _ => {}
    }
}

/// A connection that is nothing to us: whatever its number meant before is over.
fn fresh(fd: c_int) -> c_int {
    if fd >= 0 && init::active_policy().is_some() {
        crate::conn::forget(fd);
        fdtable::set(fd, fdtable::Entry::Other);
    }
    fd
}

/// What a function does that this libc does not have.
fn missing<T: From<i8>>() -> T {
    io::set_errno(libc::ENOSYS);
    T::from(-1)
}

optional_hooks! {
    fn __read_chk(fd: c_int, buffer: *mut c_void, len: size_t, room: size_t) -> ssize_t {
        match (real(), io::followed(fd)) {
            (Some(real), None) => unsafe { real(fd, buffer, len, room) },
            (None, None) => missing(),
            (_, Some(_)) => unsafe { read::hooked(fd, buffer, len.min(room)) },
        }
    }

    fn __recv_chk(fd: c_int, buffer: *mut c_void, len: size_t, room: size_t, flags: c_int) -> ssize_t {
        match (real(), io::followed(fd)) {
            (Some(real), None) => unsafe { real(fd, buffer, len, room, flags) },
            (None, None) => missing(),
            (_, Some(_)) => unsafe { recv::hooked(fd, buffer, len.min(room), flags) },
        }
    }

    fn __recvfrom_chk(fd: c_int, buffer: *mut c_void, len: size_t, room: size_t, flags: c_int,
                      address: *mut sockaddr, address_len: *mut socklen_t) -> ssize_t {
        match (real(), io::followed(fd)) {
            (Some(real), None) => unsafe { real(fd, buffer, len, room, flags, address, address_len) },
            (None, None) => missing(),
            (_, Some(_)) => unsafe {
                recvfrom::hooked(fd, buffer, len.min(room), flags, address, address_len)
            },
        }
    }

    fn __poll_chk(fds: *mut pollfd, count: nfds_t, timeout: c_int, room: size_t) -> c_int {
        register::about_to_wait(unsafe { polled(fds, count) });
        let Some(real) = real() else { return missing() };
        polling::wait(milliseconds(timeout), |t| unsafe { real(fds, count, to_milliseconds(t), room) })
    }

    fn __ppoll_chk(fds: *mut pollfd, count: nfds_t, timeout: *const timespec, mask: *const sigset_t,
                   room: size_t) -> c_int {
        register::about_to_wait(unsafe { polled(fds, count) });
        let Some(real) = real() else { return missing() };
        polling::wait(unsafe { from_timespec(timeout) }, |t| {
            let t = t.map(to_timespec);
            unsafe { real(fds, count, t.as_ref().map_or(std::ptr::null(), std::ptr::from_ref), mask, room) }
        })
    }

    fn epoll_pwait2(epoll: c_int, events: *mut epoll_event, count: c_int, timeout: *const timespec,
                    mask: *const sigset_t) -> c_int {
        let Some(real) = real() else { return missing() };
        register::about_to_wait_with(epoll);
        polling::wait(unsafe { from_timespec(timeout) }, |t| {
            let t = t.map(to_timespec);
            unsafe { real(epoll, events, count, t.as_ref().map_or(std::ptr::null(), std::ptr::from_ref), mask) }
        })
    }

    fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
        let Some(real) = real() else { return missing() };
        if flags & libc::CLOSE_RANGE_CLOEXEC as c_int != 0 {
            return unsafe { real(first, last, flags) };
        }
        lifecycle::closing_range(first, last);
        let mut result = 0;
        hide::around(first, last, |first, last| result |= unsafe { real(first, last, flags) });
        result
    }

    fn closefrom(first: c_int) -> () {
        let first = c_uint::try_from(first).unwrap_or(0);
        lifecycle::closing_range(first, c_uint::MAX);
        hide::around(first, c_uint::MAX, xo_sys::raw::close_range);
    }

    fn fcntl(fd: c_int, command: c_int, argument: *mut c_void) -> c_int {
        let Some(real) = real() else { return missing() };
        let result = unsafe { real(fd, command, argument) };
        controlled(fd, command, argument.addr(), result);
        result
    }

    fn fcntl64(fd: c_int, command: c_int, argument: *mut c_void) -> c_int {
        let Some(real) = real() else { return missing() };
        let result = unsafe { real(fd, command, argument) };
        controlled(fd, command, argument.addr(), result);
        result
    }

    fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
        let Some(real) = real() else { return missing() };
        let result = unsafe { real(fd, request, argument) };
        if request == libc::FIONREAD && result == 0 && let Some((_, conn)) = io::followed(fd)
            && let Some(layer) = conn.layer()
        {
            let n = c_int::try_from(layer.readable(fd)).unwrap_or(c_int::MAX);
            unsafe { argument.cast::<c_int>().write_unaligned(n) };
        }
        if request == libc::FIONCLEX && result == 0 {
            lifecycle::keep_from_others(fd);
        }
        if request == libc::FIONBIO && result == 0 {
            mode::changed(fd, unsafe { argument.cast::<c_int>().read_unaligned() } != 0);
        }
        result
    }

    fn syscall(number: c_long, a: c_ulong, b: c_ulong, c: c_ulong, d: c_ulong, e: c_ulong,
               f: c_ulong) -> c_long {
        if number == libc::SYS_close && lifecycle::closing(a as c_int) {
            io::set_errno(libc::EBADF);
            return -1;
        }
        let Some(real) = real() else { return missing::<i8>().into() };
        let result = unsafe { real(number, a, b, c, d, e, f) };
        match number {
            libc::SYS_fcntl => controlled(a as c_int, b as c_int, c as usize, result as c_int),
            libc::SYS_ioctl if b == libc::FIONBIO && result == 0 => {
                mode::changed(a as c_int, unsafe { (c as *const c_int).read_unaligned() } != 0);
            }
            libc::SYS_io_uring_setup if result >= 0 => lifecycle::ring_made(),
            _ => {}
        }
        result
    }
}
