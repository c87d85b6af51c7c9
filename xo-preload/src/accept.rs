//! accept: new connections are followed, restored ones come out of it.

use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use libc::{c_int, sockaddr, socklen_t};
use xo_proto::ipc::Deliver;
use xo_proto::protocol::Protocol;
use xo_proto::reason::Reason;
use xo_proto::slot::Counter;
use xo_sys::raw::{self, Fd};
use xo_sys::tcp_repair;

use crate::conn;
use crate::fdtable::{self, Entry};
use crate::{daemon, init, lifecycle, policy, register};

/// A connection that was passed on leaves repair mode in a moment: yield, then pause, then give up.
const SPIN: Duration = Duration::from_millis(1);
const PAUSE: Duration = Duration::from_millis(1);
const PATIENCE: Duration = Duration::from_secs(2);

/// The port of a tracked listening socket; looks a descriptor up that was never seen in listen() (inherited
/// over exec, or passed).
pub(crate) fn tracked_port(fd: c_int) -> Option<u16> {
    policy::refresh();
    match fdtable::get(fd) {
        Entry::Listener(port) => Some(port),
        Entry::Other | Entry::Connection(_) => None,
        Entry::None | Entry::Epoll => {
            init::active_policy()?;
            let port = raw::local_address(fd).ok().map(|(a, _)| a.port()).filter(|p| policy::names(*p));
            fdtable::set(fd, port.map_or(Entry::Other, Entry::Listener));
            port
        }
    }
}

/// As [`tracked_port`], for a descriptor that may be no listening socket at all.
pub(crate) fn tracked_port_if_listening(fd: c_int) -> Option<u16> {
    match fdtable::get(fd) {
        Entry::None if init::active_policy().is_some() => {
            if raw::is_listening(fd) {
                return tracked_port(fd);
            }
            // Not asked again before it is closed or listens.
            fdtable::set(fd, Entry::Other);
            None
        }
        Entry::Listener(port) => Some(port),
        _ => None,
    }
}

/// accept or accept4 on a tracked port; `call` is the real one. `flags` as for accept4.
pub(crate) fn accept(
    fd: c_int,
    address: *mut sockaddr,
    len: *mut socklen_t,
    flags: c_int,
    call: impl Fn() -> c_int,
) -> c_int {
    loop {
        let (deliver, socket) = match register::delivery(fd) {
            Ok(Some(delivery)) => delivery,
            Ok(None) => break,
            Err(errno) => {
                crate::io::set_errno(errno);
                return -1;
            }
        };
        if is_live(&socket) {
            return hand_out(fd, &deliver, socket, address, len, flags);
        }
        // Closed in repair mode, without a packet; its host serves it.
        log::warn!("a connection that was not brought to life is left");
    }
    loop {
        // One that blocks in accept does not wait with the epoll that it may also have.
        if !register::is_registered(fd) || (register::may_be_woken(fd) && !raw::is_nonblocking(fd)) {
            register::waker(fd);
        }
        let accepted = call();
        if accepted < 0 {
            return accepted;
        }
        conn::forget(accepted);
        let Ok((client, _)) = raw::peer_address(accepted) else { return accepted };
        let announced = daemon::is_wake_port(client.port());
        if (announced || register::may_be_woken(fd)) && is_own_address(accepted, client.ip()) {
            if announced {
                // First, for it may have the last descriptor, and the restored one needs it.
                discard(accepted);
            }
            match daemon::take(client.port()) {
                Some((deliver, socket)) => {
                    if announced {
                        return hand_out(fd, &deliver, socket, address, len, flags);
                    }
                    discard(accepted);
                    // It had the lowest free number, which accept gives: servers size tables by it, and select() is limited by it.
                    let low = raw::duplicate_low(socket.as_raw_fd(), true).unwrap_or(socket);
                    return hand_out(fd, &deliver, low, address, len, flags);
                }
                // Somebody else has it. A blocking server waits on.
                None if announced => {
                    if raw::is_nonblocking(fd) {
                        crate::io::set_errno(libc::EAGAIN);
                        return -1;
                    }
                    continue;
                }
                None => {}
            }
        }
        // Nothing on the way of a loopback connection can be steered.
        if client.ip().is_loopback() || !is_followed(fd) {
            return accepted;
        }
        daemon::count(Counter::Accepted as usize);
        // No rule names another machine, as seen from this one (a target's, often): nothing to follow.
        if !init::active_policy().is_some_and(|p| p.leads_away_from(daemon::node())) {
            return accepted;
        }
        if conn::track(accepted, None, flags & libc::SOCK_NONBLOCK != 0, protocol(fd)).is_none() {
            daemon::count(Reason::SlotsFull as usize);
        }
        lifecycle::tracking();
        return accepted;
    }
}

/// Does the policy in force say that new connections of this listening socket are followed? (It may have been another
/// when the socket was first seen.)
fn is_followed(listener: c_int) -> bool {
    matches!(fdtable::get(listener), Entry::Listener(port) if policy::follows(port))
}

/// The daemon takes a connection out of repair mode right after passing it on, unless it died in between. It may not
/// have got round to it: it lost its processor when it woke us.
fn is_live(socket: &Fd) -> bool {
    let begun = raw::monotonic();
    while tcp_repair::in_repair(socket.as_raw_fd()) {
        let waited = raw::monotonic().saturating_sub(begun);
        if waited < SPIN {
            raw::yield_processor();
        } else if daemon::is_answering() && waited < PATIENCE {
            raw::wait_readable(-1, PAUSE);
        } else {
            return false;
        }
    }
    true
}

/// What is spoken on a tracked listening socket.
fn protocol(listener: c_int) -> Protocol {
    tracked_port(listener).map_or(Protocol::default(), policy::protocol)
}

/// Closes a wake-up connection. The byte on it is for listening sockets that defer accept until there is data.
fn discard(wake: c_int) {
    raw::drain(wake);
    raw::close(wake);
}

fn is_own_address(accepted: c_int, peer: IpAddr) -> bool {
    peer.is_loopback() || raw::local_address(accepted).is_ok_and(|(a, _)| a.ip() == peer)
}

/// Gives a restored connection to the server as if just accepted.
fn hand_out(
    listener: c_int,
    deliver: &Deliver,
    socket: Fd,
    address: *mut sockaddr,
    len: *mut socklen_t,
    flags: c_int,
) -> c_int {
    let fd = socket.as_raw_fd();
    let v6_listener = raw::local_address(listener).is_ok_and(|(_, v6)| v6);
    let _ = raw::set_nonblocking(fd, flags & libc::SOCK_NONBLOCK != 0);
    // Another program would read and write the records of one with TLS.
    let cloexec = flags & libc::SOCK_CLOEXEC != 0 || deliver.tls.is_some();
    let _ = raw::set_cloexec(fd, cloexec);
    let fd = socket.into_raw();
    if !address.is_null() && !len.is_null() {
        // SAFETY: the server's own arguments of accept(): `*len` bytes at `address` may be written.
        unsafe { raw::write_address(deliver.client, v6_listener, address, len) };
    }
    if conn::track(fd, Some(deliver), flags & libc::SOCK_NONBLOCK != 0, protocol(listener)).is_none() {
        daemon::count(Reason::SlotsFull as usize);
        if deliver.tls.is_some() {
            // To the server it would be bytes without sense. It has come and gone.
            daemon::closed_delivery(deliver.delivery, daemon::epoch());
            raw::close(fd);
            crate::io::set_errno(libc::ECONNABORTED);
            return -1;
        }
    }
    if let (Some(conn), Some(port)) = (conn::of(fd), tracked_port(listener)) {
        conn.port.store(port, Ordering::Relaxed);
    }
    daemon::count(Counter::Delivered as usize);
    fd
}

/// After getsockname(2): a restored connection may have had to take another port; to its server it is on the port that it
/// listens on (Apache chooses a virtual host by it).
///
/// # Safety
/// `len` bytes at `address` may be read and written.
pub(crate) unsafe fn name_port(fd: c_int, address: *mut sockaddr, len: socklen_t) {
    let Some(port) = conn::of(fd).map(|c| c.port.load(Ordering::Relaxed)).filter(|p| *p != 0) else { return };
    if (len as usize) < size_of::<libc::sockaddr_in>() {
        return;
    }
    // SAFETY: the caller's promise; `sa_family` is there, and in both families the port stands in the same place.
    unsafe {
        if matches!(c_int::from((*address).sa_family), libc::AF_INET | libc::AF_INET6) {
            (&raw mut (*address.cast::<libc::sockaddr_in>()).sin_port).write_unaligned(port.to_be());
        }
    }
}
