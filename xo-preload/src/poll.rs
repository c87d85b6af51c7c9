//! Waiting: listening sockets tell that restored connections are welcome, and heads that are held back are
//! let through in time.

use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use libc::{c_int, epoll_event};
use xo_sys::raw::{self, epoll_ctl};
use xo_sys::tcp_repair;

use crate::conn::{self, Conn, Kind};
use crate::fdtable::{self, Entry};
use crate::{accept, daemon};

/// Most epoll instances with a listening socket in them that one process has.
const REGISTRATIONS: usize = 64;

/// A listening socket in an epoll instance.
struct Registration {
    epoll: AtomicI32,
    listener: AtomicI32,
    events: AtomicU32,
    data: AtomicU64,
}

static REGISTERED: [Registration; REGISTRATIONS] = [const {
    Registration {
        epoll: AtomicI32::new(-1),
        listener: AtomicI32::new(-1),
        events: AtomicU32::new(0),
        data: AtomicU64::new(0),
    }
}; REGISTRATIONS];

/// Listening socket that this process waits for without epoll, once the daemon knows.
static WAKER: AtomicI32 = AtomicI32::new(-1);
/// The earliest deadline of a head that is held back, ns; 0 for none.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// The server has changed what it waits for; called after the real epoll_ctl has worked.
pub(crate) fn epoll_changed(epoll: c_int, operation: c_int, fd: c_int, event: Option<&epoll_event>) {
    if accept::tracked_port_if_listening(fd).is_none() {
        return;
    }
    let known = REGISTERED.iter().find(|r| {
        r.epoll.load(Ordering::Relaxed) == epoll && r.listener.load(Ordering::Relaxed) == fd
    });
    match (operation, event, known) {
        (libc::EPOLL_CTL_ADD | libc::EPOLL_CTL_MOD, Some(event), known) => {
            let free = || {
                REGISTERED.iter().find(|r| {
                    r.listener.compare_exchange(-1, fd, Ordering::AcqRel, Ordering::Relaxed).is_ok()
                })
            };
            let Some(r) = known.or_else(free) else { return };
            r.epoll.store(epoll, Ordering::Relaxed);
            r.events.store(event.events, Ordering::Relaxed);
            r.data.store(event.u64, Ordering::Relaxed);
            if known.is_none() && daemon::open() {
                daemon::register(fd, true);
            }
            add_channel(r);
        }
        (libc::EPOLL_CTL_DEL, _, Some(r)) => {
            r.epoll.store(-1, Ordering::Relaxed);
            r.listener.store(-1, Ordering::Release);
            let _ = epoll_ctl(epoll, libc::EPOLL_CTL_DEL, daemon::fd(), &epoll_event { events: 0, u64: 0 });
        }
        _ => {}
    }
}

/// Our socket in the server's epoll, under the listening socket's data: the server takes an event on it for
/// one on the listening socket, and calls accept.
fn add_channel(r: &Registration) {
    let channel = daemon::fd();
    if channel < 0 {
        return;
    }
    let wanted = r.events.load(Ordering::Relaxed);
    let input = if wanted & libc::EPOLLIN as u32 != 0 { libc::EPOLLIN as u32 } else { 0 };
    let event = epoll_event { events: input, u64: r.data.load(Ordering::Relaxed) };
    let epoll = r.epoll.load(Ordering::Relaxed);
    if epoll_ctl(epoll, libc::EPOLL_CTL_ADD, channel, &event).is_err() {
        let _ = epoll_ctl(epoll, libc::EPOLL_CTL_MOD, channel, &event);
    }
}

/// A new channel: tell the daemon again what this process waits for.
pub(crate) fn register_again() {
    for r in &REGISTERED {
        let listener = r.listener.load(Ordering::Acquire);
        if listener >= 0 && r.epoll.load(Ordering::Relaxed) >= 0 && daemon::register(listener, true) {
            add_channel(r);
        }
    }
    let waker = WAKER.load(Ordering::Acquire);
    if waker >= 0 {
        daemon::register(waker, false);
    }
}

/// In a child: its parent's registrations are not its own.
pub(crate) fn forget_registrations() {
    for r in &REGISTERED {
        r.epoll.store(-1, Ordering::Relaxed);
        r.listener.store(-1, Ordering::Release);
    }
    WAKER.store(-1, Ordering::Release);
}

/// The server is about to wait for a tracked listening socket without epoll.
pub(crate) fn register_waker(listener: c_int) {
    let fresh = || daemon::fd() < 0 || !daemon::is_ours();
    if (WAKER.load(Ordering::Acquire) != listener || fresh())
        && !REGISTERED.iter().any(|r| r.listener.load(Ordering::Relaxed) == listener)
        && daemon::open()
        && WAKER.swap(listener, Ordering::AcqRel) != listener
    {
        daemon::register(listener, false);
    }
}

/// Before poll or select: is a tracked listening socket among these?
pub(crate) fn about_to_wait(fds: impl Iterator<Item = c_int>) {
    for fd in fds {
        if let Entry::Listener(_) = fdtable::get(fd) {
            register_waker(fd);
        }
    }
}

/// Keeps an incomplete head of `n` bytes from the server: level-triggered waiting stays quiet until more
/// comes, and at the deadline the server gets what there is.
pub(crate) fn hold_back(fd: c_int, conn: &Conn, n: usize, deadline: u64) {
    let low_water = i32::try_from(n + 1).unwrap_or(i32::MAX);
    let _ = raw::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, &low_water);
    conn.fd.store(fd, Ordering::Relaxed);
    if conn.deadline.compare_exchange(0, deadline, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
        NEXT.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |next| {
            (next == 0 || deadline < next).then_some(deadline)
        })
        .ok();
    }
}

/// Waits by `call`, which takes a time limit (`None`: no limit), no longer than heads are held back.
pub(crate) fn wait(timeout: Option<Duration>, call: impl Fn(Option<Duration>) -> c_int) -> c_int {
    if NEXT.load(Ordering::Relaxed) == 0 {
        return call(timeout);
    }
    let end = timeout.map(|t| raw::monotonic() + t);
    loop {
        let now = raw::monotonic();
        let next = NEXT.load(Ordering::Acquire);
        if next != 0 && now >= Duration::from_nanos(next) {
            let_through(now);
            continue;
        }
        let left = end.map(|e| e.saturating_sub(now));
        // A millisecond more: time limits in milliseconds are cut off.
        let until_next = (next != 0).then(|| {
            Duration::from_nanos(next).saturating_sub(now) + Duration::from_millis(1)
        });
        let bounded = [left, until_next].into_iter().flatten().min();
        let result = call(bounded);
        if result != 0 || left.is_some_and(|l| bounded == Some(l)) {
            return result;
        }
    }
}

/// Deadlines that have passed: readiness as usual; the next read finds the head late and lets it through.
fn let_through(now: Duration) {
    let mut next = 0;
    for (_, conn) in conn::all() {
        let deadline = conn.deadline.load(Ordering::Acquire);
        if deadline == 0 || conn.kind() != Kind::Tracked {
            continue;
        }
        if now >= Duration::from_nanos(deadline) {
            let _ = tcp_repair::poke(conn.fd.load(Ordering::Relaxed));
        } else if next == 0 || deadline < next {
            next = deadline;
        }
    }
    NEXT.store(next, Ordering::Release);
}
