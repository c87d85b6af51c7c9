//! Listening sockets tell the daemon that restored connections are welcome.
//!
//! A server that waits with epoll gets one more socket in its epoll, under the listening socket's data: it
//! takes an event there for one on the listening socket, and calls accept. Other servers are woken by a
//! loopback connection, whose place the restored one takes.
//!
//! An epoll that holds nothing but listening sockets is that of a server with one process for each connection
//! (Apache prefork): while a process serves one it does not wait, so a delivery to it would wait with it. A wake-up
//! is accepted by whichever process is idle. Event-driven servers always have something else in their epoll, at the
//! latest the first connection.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};

use libc::{c_int, epoll_event};
use xo_proto::ipc::Deliver;
use xo_sys::fdpass;
use xo_sys::raw::{self, Fd, epoll_ctl};

use crate::fdtable::{self, Entry};
use crate::{accept, daemon, init, poll};

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

/// Listening sockets that this process is to be woken for, once the daemon knows; -1 for none.
static WAKERS: [AtomicI32; 16] = [const { AtomicI32::new(-1) }; 16];
/// Some registration has neither a channel nor a waker.
static UNSETTLED: AtomicBool = AtomicBool::new(false);

fn used() -> impl Iterator<Item = &'static Registration> {
    REGISTERED.iter().take(USED.load(Ordering::Acquire) as usize)
}

/// The server has changed what it waits for; called after the real epoll_ctl has worked.
pub(crate) fn epoll_changed(epoll: c_int, operation: c_int, fd: c_int, event: Option<&epoll_event>) {
    if accept::tracked_port_if_listening(fd).is_none() {
        if operation == libc::EPOLL_CTL_ADD && matches!(fdtable::get(epoll), Entry::None | Entry::Other) {
            holds_others(epoll, fd);
        }
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
            r.settle();
        }
        (libc::EPOLL_CTL_DEL, _) => known.into_iter().for_each(Registration::pause),
        _ => {}
    }
}

/// The server waits in this epoll for something that may be no listening socket.
fn holds_others(epoll: c_int, fd: c_int) {
    if init::active_policy().is_none() || raw::is_listening(fd) {
        return;
    }
    fdtable::set(epoll, Entry::Epoll);
    for r in used().filter(|r| r.epoll.load(Ordering::Relaxed) == epoll) {
        r.settle();
    }
}

/// Before a wait with this epoll: is there a listening socket in it for which the process is to be woken?
#[inline]
pub(crate) fn about_to_wait_with(epoll: c_int) {
    if UNSETTLED.load(Ordering::Relaxed) {
        settle_with(epoll);
    }
}

#[cold]
fn settle_with(epoll: c_int) {
    UNSETTLED.store(false, Ordering::Relaxed);
    for r in used().filter(|r| r.listener.load(Ordering::Acquire) >= 0) {
        if r.channel.load(Ordering::Acquire) >= 0 {
            continue;
        }
        if fdtable::get(r.epoll.load(Ordering::Relaxed)) == Entry::Epoll {
            // Its channel has ended, and a new one is made when there is a daemon.
            continue;
        }
        if r.epoll.load(Ordering::Relaxed) != epoll {
            UNSETTLED.store(true, Ordering::Relaxed);
        } else if !waker(r.listener.load(Ordering::Relaxed)) {
            // No daemon now; when there is one it is told, see `announce_again`.
            poll::look_for_daemon();
        }
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
    /// A channel, if the server also waits for other things here; else a waker, when it comes to wait.
    fn settle(&self) {
        if fdtable::get(self.epoll.load(Ordering::Relaxed)) == Entry::Epoll {
            self.announce();
        } else {
            UNSETTLED.store(true, Ordering::Relaxed);
        }
    }

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
        if !daemon::is_open() {
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

/// A restored connection that waits to come out of this listening socket, or the errno that keeps it from doing so.
pub(crate) fn delivery(listener: c_int) -> Result<Option<(Deliver, Fd)>, i32> {
    if !daemon::is_ours() {
        return Ok(None);
    }
    for r in used().filter(|r| r.listener.load(Ordering::Acquire) == listener) {
        let channel = r.channel.load(Ordering::Acquire);
        if channel < 0 {
            continue;
        }
        match daemon::receive_delivery(channel) {
            daemon::Delivery::One(deliver, fd) => return Ok(Some((deliver, fd))),
            daemon::Delivery::Nothing => {}
            daemon::Delivery::NoRoom(errno) => return Err(errno),
            daemon::Delivery::End => {
                r.hang_up();
                poll::look_soon();
            }
        }
    }
    Ok(None)
}

/// Has the server something registered under this number?
pub(crate) fn knows(fd: c_int) -> bool {
    USED.load(Ordering::Relaxed) != 0
        && used().any(|r| r.listener.load(Ordering::Acquire) == fd || r.epoll.load(Ordering::Relaxed) == fd)
}

/// A descriptor is being closed: what was registered with it ends.
pub(crate) fn closing(fd: c_int) {
    if !daemon::is_ours() {
        return;
    }
    for r in used() {
        if r.listener.load(Ordering::Acquire) == fd || r.epoll.load(Ordering::Relaxed) == fd {
            r.end();
        }
    }
    for w in &WAKERS {
        let _ = w.compare_exchange(fd, -1, Ordering::AcqRel, Ordering::Relaxed);
    }
}

/// Our descriptors in servers' epolls; -1 for none.
pub(crate) fn descriptors() -> impl Iterator<Item = c_int> {
    used().map(|r| r.channel.load(Ordering::Relaxed))
}

/// A new channel to the daemon: tell it again what this process waits for.
pub(crate) fn announce_again() {
    let wakers = WAKERS.iter().map(|w| w.load(Ordering::Acquire)).filter(|fd| *fd >= 0);
    wakers.for_each(|fd| {
        daemon::register(&[fd], false);
    });
    for r in used() {
        if r.listener.load(Ordering::Acquire) >= 0 && r.epoll.load(Ordering::Relaxed) >= 0 {
            r.settle();
            // It may be waiting already, and wait on.
            if r.channel.load(Ordering::Acquire) < 0 {
                waker(r.listener.load(Ordering::Relaxed));
            }
        }
    }
}

/// Registrations whose channel has ended while the daemon has not.
pub(crate) fn announce_lost() {
    let lost =
        |r: &&Registration| r.listener.load(Ordering::Acquire) >= 0 && r.channel.load(Ordering::Acquire) < 0;
    used().filter(lost).for_each(Registration::settle);
}

/// In a child: its parent's registrations are not its own, only copies of their descriptors.
pub(crate) fn forget() {
    for r in used() {
        raw::close(r.channel.swap(-1, Ordering::Relaxed));
        r.epoll.store(-1, Ordering::Relaxed);
        r.listener.store(-1, Ordering::Release);
    }
    WAKERS.iter().for_each(|w| w.store(-1, Ordering::Release));
}

/// Is this listening socket in an epoll that has a channel, or will have one again when there is a daemon?
fn has_channel(listener: c_int) -> bool {
    used().any(|r| {
        r.listener.load(Ordering::Relaxed) == listener
            && (r.channel.load(Ordering::Acquire) >= 0
                || fdtable::get(r.epoll.load(Ordering::Relaxed)) == Entry::Epoll)
    })
}

/// Does the server wait for this listening socket with epoll, as far as we have seen?
pub(crate) fn is_registered(listener: c_int) -> bool {
    used().any(|r| r.listener.load(Ordering::Acquire) == listener)
}

/// The server is about to wait for a tracked listening socket without epoll. `false`: there is no daemon to tell.
pub(crate) fn waker(listener: c_int) -> bool {
    let known = || WAKERS.iter().any(|w| w.load(Ordering::Acquire) == listener);
    if known() && daemon::is_open() {
        return true;
    }
    if !daemon::open() {
        return false;
    }
    if !has_channel(listener) && !known() {
        let claim =
            |w: &AtomicI32| w.compare_exchange(-1, listener, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if WAKERS.iter().any(claim) {
            daemon::register(&[listener], false);
        }
    }
    true
}

/// May a wake-up connection come out of this listening socket? A process without a channel cannot tell from its
/// slot table: the wake-up may be older than its acquaintance with the daemon.
pub(crate) fn may_be_woken(listener: c_int) -> bool {
    !has_channel(listener)
}

/// Before poll or select: is a tracked listening socket among these?
pub(crate) fn about_to_wait(fds: impl Iterator<Item = c_int>) {
    for fd in fds {
        if let Entry::Listener(_) = fdtable::get(fd) {
            waker(fd);
        }
    }
}
