//! accept: new connections are followed, restored ones come out of it.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};

use libc::{c_int, sockaddr, socklen_t};
use xo_proto::ipc::Deliver;
use xo_proto::reason::Reason;
use xo_proto::slot::Counter;
use xo_sys::raw::{self, Fd};

use crate::conn::{self, Kind};
use crate::fdtable::{self, Entry};
use crate::{daemon, init, poll};

/// Deliveries taken from the channel for other listening sockets of this process. Servers with more than
/// one tracked port in one process are rare; a handful of places is enough, and a full shelf leaves
/// messages in the socket.
const SHELF: usize = 8;

static SHELF_USED: AtomicU32 = AtomicU32::new(0);
static SHELVES: [Shelf; SHELF] = [const { Shelf::new() }; SHELF];

/// One delivery, packed into atomics: port | delivery, descriptor, client.
struct Shelf {
    state: AtomicU32,
    fd: AtomicU32,
    delivery: AtomicU32,
    port: AtomicU32,
    client: [AtomicU32; 5],
}

const EMPTY: u32 = 0;
const BUSY: u32 = 1;
const FULL: u32 = 2;

impl Shelf {
    const fn new() -> Shelf {
        Shelf {
            state: AtomicU32::new(EMPTY),
            fd: AtomicU32::new(0),
            delivery: AtomicU32::new(0),
            port: AtomicU32::new(0),
            client: [const { AtomicU32::new(0) }; 5],
        }
    }
}

/// The port of a tracked listening socket; looks a descriptor up that was never seen in listen() (inherited
/// over exec, or passed).
pub(crate) fn tracked_port(fd: c_int) -> Option<u16> {
    match fdtable::get(fd) {
        Entry::Listener(port) => Some(port),
        Entry::Other | Entry::Connection(_) => None,
        Entry::None => {
            init::active_policy()?;
            let port = raw::local_address(fd).ok().map(|(a, _)| a.port()).filter(|p| init::tracks(*p));
            fdtable::set(fd, port.map_or(Entry::Other, Entry::Listener));
            port
        }
    }
}

/// As [`tracked_port`], for a descriptor that may be no listening socket at all.
pub(crate) fn tracked_port_if_listening(fd: c_int) -> Option<u16> {
    match fdtable::get(fd) {
        Entry::None if init::active_policy().is_some() && raw::is_listening(fd) => tracked_port(fd),
        Entry::Listener(port) => Some(port),
        _ => None,
    }
}

/// accept or accept4 on a tracked port; `call` is the real one. `flags` as for accept4.
pub(crate) fn accept(
    fd: c_int,
    port: u16,
    address: *mut sockaddr,
    len: *mut socklen_t,
    flags: c_int,
    call: impl Fn() -> c_int,
) -> c_int {
    if let Some((deliver, socket)) = delivery_for(port) {
        return hand_out(fd, &deliver, socket, address, len, flags);
    }
    loop {
        if !raw::is_nonblocking(fd) {
            poll::register_waker(fd);
        }
        let accepted = call();
        if accepted < 0 {
            return accepted;
        }
        conn::forget(accepted);
        let Ok((client, _)) = raw::peer_address(accepted) else { return accepted };
        if daemon::is_wake_port(client.port()) && is_own_address(accepted, client.ip()) {
            raw::close(accepted);
            match daemon::take(client.port()) {
                Some((deliver, socket)) => return hand_out(fd, &deliver, socket, address, len, flags),
                // Somebody else has it. A blocking server waits on.
                None if raw::is_nonblocking(fd) => {
                    crate::io::set_errno(libc::EAGAIN);
                    return -1;
                }
                None => continue,
            }
        }
        if client.ip().is_loopback() {
            // Nothing on the way of a loopback connection can be steered.
            return accepted;
        }
        if conn::track(accepted, Kind::Tracked, 0).is_none() {
            daemon::count(Reason::SlotsFull as usize);
        }
        daemon::count(Counter::Accepted as usize);
        return accepted;
    }
}

fn is_own_address(accepted: c_int, peer: IpAddr) -> bool {
    peer.is_loopback() || raw::local_address(accepted).is_ok_and(|(a, _)| a.ip() == peer)
}

/// A restored connection for this listening port, if one waits.
fn delivery_for(port: u16) -> Option<(Deliver, Fd)> {
    if let Some(found) = unshelve(port) {
        return Some(found);
    }
    while (SHELF_USED.load(Ordering::Relaxed) as usize) < SHELF {
        let (deliver, fd) = daemon::delivery()?;
        if deliver.listen_port == port {
            return Some((deliver, fd));
        }
        shelve(deliver, fd);
    }
    None
}

fn shelve(deliver: Deliver, fd: Fd) {
    for shelf in &SHELVES {
        if shelf.state.compare_exchange(EMPTY, BUSY, Ordering::Acquire, Ordering::Relaxed).is_ok() {
            let octets = match deliver.client.ip() {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            let (words, _) = octets.as_chunks::<4>();
            for (to, from) in shelf.client.iter().zip(words) {
                to.store(u32::from_ne_bytes(*from), Ordering::Relaxed);
            }
            if let Some(last) = shelf.client.last() {
                last.store(deliver.client.port().into(), Ordering::Relaxed);
            }
            shelf.delivery.store(deliver.delivery, Ordering::Relaxed);
            shelf.port.store(deliver.listen_port.into(), Ordering::Relaxed);
            shelf.fd.store(fd.into_raw() as u32, Ordering::Relaxed);
            SHELF_USED.fetch_add(1, Ordering::Relaxed);
            shelf.state.store(FULL, Ordering::Release);
            return;
        }
    }
}

fn unshelve(port: u16) -> Option<(Deliver, Fd)> {
    if SHELF_USED.load(Ordering::Relaxed) == 0 {
        return None;
    }
    SHELVES.iter().find_map(|shelf| {
        if shelf.port.load(Ordering::Relaxed) != u32::from(port)
            || shelf.state.compare_exchange(FULL, BUSY, Ordering::Acquire, Ordering::Relaxed).is_err()
        {
            return None;
        }
        let mut octets = [0; 16];
        let (words, _) = octets.as_chunks_mut::<4>();
        for (to, from) in words.iter_mut().zip(&shelf.client) {
            *to = from.load(Ordering::Relaxed).to_ne_bytes();
        }
        let client_port = shelf.client.last().map_or(0, |p| p.load(Ordering::Relaxed) as u16);
        let client = SocketAddr::new(IpAddr::from(octets).to_canonical(), client_port);
        let deliver = Deliver { delivery: shelf.delivery.load(Ordering::Relaxed), client, listen_port: port };
        let fd = Fd::new(shelf.fd.load(Ordering::Relaxed) as i32);
        SHELF_USED.fetch_sub(1, Ordering::Relaxed);
        shelf.state.store(EMPTY, Ordering::Release);
        Some((deliver, fd))
    })
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
    let _ = raw::set_cloexec(fd, flags & libc::SOCK_CLOEXEC != 0);
    // The lowest free number, as accept gives: servers size tables by it, and select() is limited by it.
    let low = raw::duplicate_low(fd, flags & libc::SOCK_CLOEXEC != 0).unwrap_or(socket);
    let fd = low.into_raw();
    if !address.is_null() && !len.is_null() {
        raw::write_address(deliver.client, v6_listener, address, len);
    }
    if conn::track(fd, Kind::Restored, deliver.delivery).is_none() {
        daemon::count(Reason::SlotsFull as usize);
    }
    daemon::count(Counter::Delivered as usize);
    fd
}
