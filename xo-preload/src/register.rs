//! Listening sockets tell the daemon that restored connections are welcome.
//!
//! A server that waits with epoll gets one more socket in its epoll, under the listening socket's data: it
//! takes an event there for one on the listening socket, and calls accept. Other servers are woken by a
//! loopback connection, whose place the restored one takes.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};

use libc::{c_int, epoll_event};
use xo_proto::ipc::Deliver;
use xo_sys::fdpass;
use xo_sys::raw::{self, Fd, epoll_ctl};

use crate::fdtable::{self, Entry};
use crate::{accept, daemon};

/// Most pairs of an epoll instance and a listening socket in it that one process has.
pub(crate) const REGISTRATIONS: usize = 64;

/// A listening socket in an epoll instance.
struct Registration {
    epoll: AtomicI32,
    listener: AtomicI32,
    events: AtomicU32,
    data: AtomicU64,
    /// Our end of the pair on which the daemon delivers, in that epoll; -1 while there is no daemon.
    channel: AtomicI32,
}

static REGISTERED: [Registration; REGISTRATIONS] = [const {
    Registration {
        epoll: AtomicI32::new(-1),
        listener: AtomicI32::new(-1),
        events: AtomicU32::new(0),
        data: AtomicU64::new(0),
        channel: AtomicI32::new(-1),
    }
}; REGISTRATIONS];
/// Registrations from here on have never been used.
static USED: AtomicU32 = AtomicU32::new(0);

/// Listening socket that this process waits for without epoll, once the daemon knows.
static WAKER: AtomicI32 = AtomicI32::new(-1);

fn used() -> impl Iterator<Item = &'static Registration> {
    REGISTERED.iter().take(USED.load(Ordering::Acquire) as usize)
}

/// The server has changed what it waits for; called after the real epoll_ctl has worked.
pub(crate) fn epoll_changed(epoll: c_int, operation: c_int, fd: c_int, event: Option<&epoll_event>) {
    if accept::tracked_port_if_listening(fd).is_none() {
        return;
    }
    // First, because a child forgets its parent's registrations when it opens its own channel.
    daemon::open();
    let is_it = |r: &&Registration| {
        r.epoll.load(Ordering::Relaxed) == epoll && r.listener.load(Ordering::Relaxed) == fd
    };
    let known = used().find(is_it);
    match (operation, event) {
        (libc::EPOLL_CTL_ADD | libc::EPOLL_CTL_MOD, Some(event)) => {
            let Some(r) = known.or_else(|| claim(fd)) else { return };
            r.epoll.store(epoll, Ordering::Relaxed);
            r.events.store(event.events, Ordering::Relaxed);
            r.data.store(event.u64, Ordering::Relaxed);
            r.announce();
        }
        (libc::EPOLL_CTL_DEL, _) => known.into_iter().for_each(Registration::pause),
        _ => {}
    }
}

fn claim(listener: c_int) -> Option<&'static Registration> {
    let index = REGISTERED.iter().position(|r| {
        r.listener.compare_exchange(-1, listener, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    })?;
    USED.fetch_max(u32::try_from(index).ok()? + 1, Ordering::AcqRel);
    REGISTERED.get(index)
}

impl Registration {
    /// Makes the pair and tells the daemon; with a pair, follows what the server waits for.
    fn announce(&self) {
        let wanted = self.events.load(Ordering::Relaxed);
        let input = if wanted & libc::EPOLLIN as u32 != 0 { libc::EPOLLIN as u32 } else { 0 };
        let event = epoll_event { events: input, u64: self.data.load(Ordering::Relaxed) };
        let epoll = self.epoll.load(Ordering::Relaxed);
        let known = self.channel.load(Ordering::Acquire);
        if known >= 0 {
            if epoll_ctl(epoll, libc::EPOLL_CTL_MOD, known, &event).is_err() {
                let _ = epoll_ctl(epoll, libc::EPOLL_CTL_ADD, known, &event);
            }
            return;
        }
        let Ok((ours, theirs)) = fdpass::pair() else { return };
        let Some(ours) = daemon::out_of_the_way(ours) else { return };
        let listener = self.listener.load(Ordering::Relaxed);
        let passed = [listener, theirs.as_raw_fd(), ours.as_raw_fd()];
        if epoll_ctl(epoll, libc::EPOLL_CTL_ADD, ours.as_raw_fd(), &event).is_ok()
            && daemon::register(&passed, true)
        {
            self.channel.store(ours.into_raw(), Ordering::Release);
        }
    }

    /// The server does not wait for it now. It may again in a moment (nginx takes its listening sockets out and puts
    /// them back, to be last in the queue), so deliveries wait meanwhile, as connections do in the backlog.
    fn pause(&self) {
        let nothing = epoll_event { events: 0, u64: 0 };
        let channel = self.channel.load(Ordering::Acquire);
        let _ = epoll_ctl(self.epoll.load(Ordering::Relaxed), libc::EPOLL_CTL_DEL, channel, &nothing);
    }

    /// The pair is of no more use. What is in it goes back to the daemon.
    fn hang_up(&self) {
        // The daemon has a duplicate, so closing alone would leave it in the epoll.
        self.pause();
        let fd = self.channel.swap(-1, Ordering::AcqRel);
        if fd >= 0 {
            fdpass::shut(fd);
            raw::close(fd);
        }
    }

    fn end(&self) {
        self.hang_up();
        self.epoll.store(-1, Ordering::Relaxed);
        self.listener.store(-1, Ordering::Release);
    }
}

/// A restored connection that waits to come out of this listening socket.
pub(crate) fn delivery(listener: c_int) -> Option<(Deliver, Fd)> {
    if !daemon::is_ours() {
        return None;
    }
    for r in used().filter(|r| r.listener.load(Ordering::Acquire) == listener) {
        let channel = r.channel.load(Ordering::Acquire);
        if channel < 0 {
            continue;
        }
        match daemon::receive_delivery(channel) {
            daemon::Delivery::One(deliver, fd) => return Some((deliver, fd)),
            daemon::Delivery::Nothing => {}
            daemon::Delivery::End => r.hang_up(),
        }
    }
    None
}

/// A descriptor is being closed: what was registered with it ends.
pub(crate) fn closing(fd: c_int) {
    if USED.load(Ordering::Relaxed) == 0 || !daemon::is_ours() {
        return;
    }
    for r in used() {
        if r.listener.load(Ordering::Acquire) == fd || r.epoll.load(Ordering::Relaxed) == fd {
            r.end();
        }
    }
    let _ = WAKER.compare_exchange(fd, -1, Ordering::AcqRel, Ordering::Relaxed);
}

/// Our descriptors in servers' epolls; -1 for none.
pub(crate) fn descriptors() -> impl Iterator<Item = c_int> {
    used().map(|r| r.channel.load(Ordering::Relaxed))
}

/// A new channel to the daemon: tell it again what this process waits for.
pub(crate) fn announce_again() {
    for r in used() {
        if r.listener.load(Ordering::Acquire) >= 0 && r.epoll.load(Ordering::Relaxed) >= 0 {
            r.announce();
        }
    }
    let waker = WAKER.load(Ordering::Acquire);
    if waker >= 0 {
        daemon::register(&[waker], false);
    }
}

/// In a child: its parent's registrations are not its own, only copies of their descriptors.
pub(crate) fn forget() {
    for r in used() {
        raw::close(r.channel.swap(-1, Ordering::Relaxed));
        r.epoll.store(-1, Ordering::Relaxed);
        r.listener.store(-1, Ordering::Release);
    }
    WAKER.store(-1, Ordering::Release);
}

/// The server is about to wait for a tracked listening socket without epoll.
pub(crate) fn waker(listener: c_int) {
    let known = || WAKER.load(Ordering::Acquire) == listener && daemon::is_open();
    let by_epoll = || used().any(|r| r.listener.load(Ordering::Relaxed) == listener);
    if !known() && daemon::open() && !by_epoll() && WAKER.swap(listener, Ordering::AcqRel) != listener {
        daemon::register(&[listener], false);
    }
}

/// Before poll or select: is a tracked listening socket among these?
pub(crate) fn about_to_wait(fds: impl Iterator<Item = c_int>) {
    for fd in fds {
        if let Entry::Listener(_) = fdtable::get(fd) {
            waker(fd);
        }
    }
}
