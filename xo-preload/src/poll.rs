//! Waiting: heads that are held back are let through in time, and a daemon that went away is looked for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use libc::c_int;
use xo_proto::slot::PENDING;
use xo_sys::{raw, tcp_repair};

use crate::conn::{self, Conn, Kind};
use crate::{daemon, register};

/// When the daemon dies its descriptors do not close all at once, ns.
const MOMENT_NS: u64 = 10_000_000;
/// A verdict takes less than this, ns; later it is worth a look whether the daemon is still there.
const VERDICT_NS: u64 = 250_000_000;

/// When something is to be done next, ns: a head let through, a daemon looked for; 0 for never.
static NEXT: AtomicU64 = AtomicU64::new(0);
/// When to look for the daemon; 0 for never.
static RETRY: AtomicU64 = AtomicU64::new(0);
/// When to look whether the daemon is there; 0 for never.
static LOOK: AtomicU64 = AtomicU64::new(0);

fn wake_at(when: u64) {
    let earlier = |next| (next == 0 || when < next).then_some(when);
    NEXT.fetch_update(Ordering::AcqRel, Ordering::Relaxed, earlier).ok();
}

/// The daemon went away: a restarted one is found again, though the server may only wait.
pub(crate) fn look_for_daemon() {
    let when = (raw::monotonic() + daemon::pause()).as_nanos() as u64;
    RETRY.store(when, Ordering::Release);
    wake_at(when);
}

/// The daemon has been asked: if it dies, nothing tells a server that only waits.
pub(crate) fn look_after_daemon() {
    if LOOK.load(Ordering::Relaxed) == 0 {
        look_in(VERDICT_NS);
    }
}

/// One of the daemon's channels has ended: perhaps all have.
pub(crate) fn look_soon() {
    look_in(MOMENT_NS);
}

fn look_in(ns: u64) {
    let when = raw::monotonic().as_nanos() as u64 + ns;
    LOOK.store(when, Ordering::Release);
    wake_at(when);
}

/// Keeps an incomplete head of `n` bytes from the server: level-triggered waiting stays quiet until more
/// comes, and at the deadline the server gets what there is.
pub(crate) fn hold_back(fd: c_int, conn: &Conn, n: usize, deadline: u64) {
    let low_water = conn.layer().map_or(n + 1, |layer| layer.low_water(fd));
    let low_water = i32::try_from(low_water).unwrap_or(i32::MAX);
    let _ = raw::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, &low_water);
    conn.fd.store(fd, Ordering::Relaxed);
    if conn.deadline.compare_exchange(0, deadline, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
        wake_at(deadline);
    }
}

/// Waits by `call`, which takes a time limit (`None`: no limit), no longer than until something is to be done.
pub(crate) fn wait(timeout: Option<Duration>, call: impl Fn(Option<Duration>) -> c_int) -> c_int {
    if NEXT.load(Ordering::Relaxed) == 0 {
        return call(timeout);
    }
    let end = timeout.map(|t| raw::monotonic() + t);
    loop {
        let now = raw::monotonic();
        let next = NEXT.load(Ordering::Acquire);
        if next != 0 && now >= Duration::from_nanos(next) {
            act(now);
            continue;
        }
        let left = end.map(|e| e.saturating_sub(now));
        // A millisecond more: time limits in milliseconds are cut off.
        let until_next =
            (next != 0).then(|| Duration::from_nanos(next).saturating_sub(now) + Duration::from_millis(1));
        let bounded = [left, until_next].into_iter().flatten().min();
        let result = call(bounded);
        if result != 0 || left.is_some_and(|l| bounded == Some(l)) {
            return result;
        }
    }
}

/// Deadlines that have passed: readiness as usual; the next read finds the head late and lets it through.
fn act(now: Duration) {
    NEXT.store(0, Ordering::Release);
    let look = LOOK.load(Ordering::Acquire);
    if look != 0 && now >= Duration::from_nanos(look) {
        LOOK.store(0, Ordering::Release);
        daemon::check();
        if daemon::is_open() {
            register::announce_lost();
        }
        if conn::waiting().any(|(index, _)| daemon::slot_state(index) == PENDING) {
            look_after_daemon();
        }
    } else if look != 0 {
        wake_at(look);
    }
    let retry = RETRY.load(Ordering::Acquire);
    if retry != 0 && now >= Duration::from_nanos(retry) {
        RETRY.store(0, Ordering::Release);
        if !daemon::open() {
            look_for_daemon();
        }
    } else if retry != 0 {
        wake_at(retry);
    }
    for (_, conn) in conn::all() {
        let deadline = conn.deadline.load(Ordering::Acquire);
        if deadline == 0 || conn.kind() != Kind::Tracked {
            continue;
        }
        if now >= Duration::from_nanos(deadline) {
            let _ = tcp_repair::poke(conn.fd.load(Ordering::Relaxed));
        } else {
            wake_at(deadline);
        }
    }
}
