//! At a request's boundary: look at the head without taking it, and decide.

use std::mem::MaybeUninit;
use std::sync::atomic::Ordering;
use std::time::Duration;

use libc::iovec;
use xo_proto::http::{Head, MAX_HEAD, Method, RequestTracker, parse_head};
use xo_proto::ipc::Offload;
use xo_proto::policy::Policy;
use xo_proto::protocol::{Progress, Request, Requests, Responses};
use xo_proto::reason::Reason;
use xo_proto::slot::{Counter, FREE, GONE, PENDING, stay_reason};
use xo_proto::tls::TlsState;
use xo_sys::{raw, tcp_repair};

use crate::choose::{self, Chosen};
use crate::conn::{Conn, Kind, ReadHalf};
use crate::{daemon, init, io, policy, poll, redis, tls};

/// Most HTTP heads are shorter: looked at on the stack.
const SMALL: usize = 4096;
/// As much as Redis reads: commands come many at a time.
const COMMANDS: usize = 16 << 10;
pub(crate) const ESTABLISHED: u8 = 1;
/// A request moves so often at most: machines with different policies would send it around for ever.
const MOST_MOVES: u8 = 3;
/// After this long without a verdict, is the daemon still there? Its own limits are below.
const VERDICT: Duration = Duration::from_secs(5);

/// What a read at a boundary comes to.
pub(crate) enum Outcome {
    /// Read on; the rest of the queue after this request is known to be empty if `alone`.
    Read {
        /// Nothing waits behind this request.
        alone: bool,
        /// So many bytes are in the server's buffer already, and still in the socket.
        there: usize,
    },
    /// The connection is elsewhere: end of file.
    End,
    /// This errno.
    Error(i32),
}

/// Waits for the verdict; it can only stay PENDING when there is a time limit. FREE when there is no daemon any more
/// that could give one.
pub(crate) fn await_verdict(index: u32, limit: Option<Duration>) -> u32 {
    let end = limit.map(|l| raw::monotonic() + l);
    loop {
        let left = end.map_or(VERDICT, |e| e.saturating_sub(raw::monotonic()).min(VERDICT));
        let state = daemon::wait_slot(index, left);
        if state != PENDING || end.is_some_and(|e| raw::monotonic() >= e) {
            return state;
        }
        if !daemon::is_open() {
            return FREE;
        }
    }
}

/// What the last request to the daemon has come to, if one is out. `None`: read on.
pub(crate) fn verdict(
    fd: i32,
    conn: &Conn,
    index: u32,
    half: &mut ReadHalf,
    nonblocking: bool,
) -> Option<Outcome> {
    if !conn.asked.load(Ordering::Acquire) {
        return None;
    }
    let state = match conn.slot_state(index) {
        PENDING if nonblocking => {
            daemon::check();
            match conn.slot_state(index) {
                PENDING => return Some(Outcome::Error(libc::EAGAIN)),
                state => state,
            }
        }
        PENDING => match await_verdict(index, raw::receive_timeout(fd)) {
            PENDING => return Some(Outcome::Error(libc::EAGAIN)),
            state => state,
        },
        state => state,
    };
    if state == GONE {
        return Some(Outcome::End);
    }
    if let Some(reason) = stay_reason(state) {
        log::debug!("a connection stays: {reason}");
    }
    conn.asked.store(false, Ordering::Release);
    daemon::clear_slot(index);
    half.stays = true;
    None
}

/// Looks at what waits in the socket and decides about the request that begins there. `buffer` is where the server wants
/// it, if it may be put there before it is known whether the server gets it.
pub(crate) fn look(
    fd: i32,
    conn: &Conn,
    index: u32,
    half: &mut ReadHalf,
    nonblocking: bool,
    buffer: Option<iovec>,
) -> Outcome {
    match half.tracker {
        Requests::Http(_) => look_into::<SMALL>(fd, conn, index, half, nonblocking, buffer),
        Requests::Redis(_) => look_into::<COMMANDS>(fd, conn, index, half, nonblocking, buffer),
    }
}

/// As [`look`], at up to `SIZE` bytes at first.
#[inline(never)]
fn look_into<const SIZE: usize>(
    fd: i32,
    conn: &Conn,
    index: u32,
    half: &mut ReadHalf,
    nonblocking: bool,
    mut buffer: Option<iovec>,
) -> Outcome {
    let mut small = [MaybeUninit::<u8>::uninit(); SIZE];
    let mut end = None;
    loop {
        let (at, size) = match buffer {
            Some(b) => (b.iov_base.cast(), b.iov_len.min(SIZE)),
            None => (small.as_mut_ptr().cast(), SIZE),
        };
        // What is held back is there already; SO_RCVLOWAT would make the kernel wait for more.
        let at_once = nonblocking || end.is_some();
        // SAFETY: ours, or the server's own arguments of a read.
        let n = match unsafe { io::peek_at(fd, conn, at, size, at_once) } {
            Ok(n) => n,
            Err(errno) => return Outcome::Error(errno),
        };
        if n == 0 {
            // The client has closed; the real call says so.
            return Outcome::Read { alone: true, there: 0 };
        }
        // SAFETY: these bytes have just been written, and no other thread is there to change a server's buffer.
        let bytes = unsafe { std::slice::from_raw_parts(at, n) };
        let seen = match judge(fd, conn, index, half, bytes, n < size, nonblocking) {
            Seen::Cut if buffer.is_some() => {
                buffer = None;
                continue;
            }
            Seen::Cut => look_far(fd, conn, index, half, nonblocking),
            seen => seen,
        };
        match seen {
            Seen::Outcome(Outcome::Read { alone, .. }) => {
                // More than was looked at may be there and wanted.
                let whole = buffer.is_some_and(|b| n < size || size == b.iov_len);
                return Outcome::Read { alone, there: if whole { n } else { 0 } };
            }
            Seen::Outcome(outcome) => return outcome,
            Seen::Cut => return Outcome::Read { alone: true, there: 0 },
            Seen::Asked | Seen::HeldBack if nonblocking => return Outcome::Error(libc::EAGAIN),
            Seen::Asked => match verdict(fd, conn, index, half, false) {
                Some(outcome) => return outcome,
                None => continue,
            },
            Seen::HeldBack => {
                let end = *end.get_or_insert_with(|| raw::receive_timeout(fd).map(|t| raw::monotonic() + t));
                let left = end.map_or(Duration::MAX, |e: Duration| e.saturating_sub(raw::monotonic()));
                if left.is_zero() {
                    return Outcome::Error(libc::EAGAIN);
                }
                raw::wait_readable(fd, left.min(until(conn)));
            }
        }
    }
}

/// As [`look`], for a head that does not fit on the stack.
fn look_far(fd: i32, conn: &Conn, index: u32, half: &mut ReadHalf, nonblocking: bool) -> Seen {
    let mut large = vec![0; MAX_HEAD + 1];
    match io::peek(fd, conn, &mut large, true) {
        Ok(n) => {
            let bytes = large.get(..n).unwrap_or_default();
            match judge(fd, conn, index, half, bytes, n <= MAX_HEAD, nonblocking) {
                // No protocol asks for more.
                Seen::Cut => leave(fd, conn, half, Reason::HeadTooLong),
                seen => seen,
            }
        }
        Err(errno) => Seen::Outcome(Outcome::Error(errno)),
    }
}

/// What a look comes to.
pub(crate) enum Seen {
    /// This.
    Outcome(Outcome),
    /// The daemon has been asked.
    Asked,
    /// The server does not get it yet.
    HeldBack,
    /// Too little, and more is there.
    Cut,
}

/// `all` of the queue is in `bytes`.
fn judge(
    fd: i32,
    conn: &Conn,
    index: u32,
    half: &mut ReadHalf,
    bytes: &[u8],
    all: bool,
    nonblocking: bool,
) -> Seen {
    match half.tracker {
        Requests::Http(tracker) => {
            if conn.layer().is_some_and(|l| l.has_ssl()) && answers_first(fd, conn, half, nonblocking) {
                return Seen::HeldBack;
            }
            let queue = Queue { length: bytes.len(), whole: all };
            judge_http(fd, conn, index, half, tracker, bytes, queue)
        }
        Requests::Redis(requests) => {
            redis::judge(fd, conn, index, half, requests, &redis::Waiting { bytes, all, nonblocking })
        }
    }
}

/// The part of the socket's queue that was looked at.
#[derive(Clone, Copy)]
pub(crate) struct Queue {
    /// Its length.
    pub(crate) length: usize,
    /// There is no more of what is judged.
    pub(crate) whole: bool,
}

/// Who reads by OpenSSL's functions reads until nothing is there, before he answers what he has: the next request waits for the
/// answer, or it could not move.
fn answers_first(fd: i32, conn: &Conn, half: &mut ReadHalf, nonblocking: bool) -> bool {
    let in_progress = || conn.write().is_some_and(|w| w.responses.progress() == Progress::InProgress);
    if !in_progress() {
        if half.late || half.partial == 0 {
            half.late = false;
            release(fd, conn, half);
        }
        return false;
    }
    let now = raw::monotonic().as_nanos() as u64;
    let deadline = conn.deadline.load(Ordering::Relaxed);
    // One that blocks would wait for its own writing.
    half.late |= !nonblocking || (deadline != 0 && now >= deadline);
    if half.late || raw::tcp_state(fd).is_ok_and(|s| s != ESTABLISHED) {
        return false;
    }
    conn.awaits_clean.store(true, Ordering::SeqCst);
    poll::hold_back(fd, conn, 0, now + init::head_timeout_ns());
    // Another thread may have written the last of it meanwhile.
    in_progress()
}

/// The beginning of a request: more is needed.
pub(crate) fn partial(fd: i32, conn: &Conn, half: &mut ReadHalf, n: usize) -> Seen {
    let now = raw::monotonic().as_nanos() as u64;
    let deadline = conn.deadline.load(Ordering::Relaxed);
    if deadline != 0 && now >= deadline {
        return leave(fd, conn, half, Reason::HeadTooSlow);
    }
    // Nothing new since the last look: has the client stopped sending for good?
    if half.partial == n && raw::tcp_state(fd).is_ok_and(|s| s != ESTABLISHED) {
        return leave(fd, conn, half, Reason::HeadTooSlow);
    }
    half.partial = n;
    poll::hold_back(fd, conn, n, now + init::head_timeout_ns());
    Seen::HeldBack
}

/// Decides about the request that `bytes` begin with: the queue itself, or what its records hold.
#[inline]
pub(crate) fn judge_http(
    fd: i32,
    conn: &Conn,
    index: u32,
    half: &mut ReadHalf,
    mut tracker: RequestTracker,
    bytes: &[u8],
    queue: Queue,
) -> Seen {
    match parse_head(bytes) {
        Head::Partial if !queue.whole => Seen::Cut,
        Head::Partial => partial(fd, conn, half, queue.length),
        Head::TooLong => leave(fd, conn, half, Reason::HeadTooLong),
        Head::Refused(Reason::NotHttp) if tls::begins(bytes) && !half.begun => {
            match tls::begin(conn, index, half) {
                Ok(()) => Seen::Outcome(Outcome::Read { alone: true, there: 0 }),
                Err(reason) => leave(fd, conn, half, reason),
            }
        }
        Head::Refused(reason) => leave(fd, conn, half, reason),
        Head::Complete(head) if head.upgrade => leave(fd, conn, half, Reason::Upgraded),
        Head::Complete(head) => {
            release(fd, conn, half);
            half.begun = true;
            if !half.stays && wants_to_move(fd, conn, index, half.tls.as_deref(), Request::Http(&head)) {
                return Seen::Asked;
            }
            conn.moves.store(0, Ordering::Relaxed);
            tracker.begin(&head);
            half.tracker = Requests::Http(tracker);
            match conn.write().as_deref_mut().map(|half| &mut half.responses) {
                Some(Responses::Http(responses)) => responses.asked(Method::from(head.method)),
                _ => return leave(fd, conn, half, Reason::Shared),
            }
            let alone =
                queue.whole && matches!(tracker, RequestTracker::Left(left) if left >= bytes.len() as u64);
            Seen::Outcome(Outcome::Read { alone, there: 0 })
        }
    }
}

/// The server gets what there is, now and from now on.
pub(crate) fn leave(fd: i32, conn: &Conn, half: &mut ReadHalf, reason: Reason) -> Seen {
    release(fd, conn, half);
    conn.abandon(reason);
    Seen::Outcome(Outcome::Read { alone: true, there: 0 })
}

/// A head is complete, or given up on: normal readiness again.
pub(crate) fn release(fd: i32, conn: &Conn, half: &mut ReadHalf) {
    half.partial = 0;
    conn.awaits_clean.store(false, Ordering::Relaxed);
    if conn.deadline.load(Ordering::Acquire) != 0 && conn.deadline.swap(0, Ordering::AcqRel) != 0 {
        let _ = tcp_repair::poke(fd);
    }
}

/// A request that waits for the responses before it may be looked at again.
#[cold]
pub(crate) fn responses_are_out(conn: &Conn) {
    if conn.awaits_clean.swap(false, Ordering::AcqRel) {
        let _ = tcp_repair::poke(conn.fd.load(Ordering::Relaxed));
    }
}

/// How long a head is still held back.
pub(crate) fn until(conn: &Conn) -> Duration {
    let deadline = Duration::from_nanos(conn.deadline.load(Ordering::Relaxed));
    deadline.saturating_sub(raw::monotonic())
}

/// Asks the policy, and if it says so the daemon.
fn wants_to_move(
    fd: i32,
    conn: &Conn,
    index: u32,
    tls: Option<&tls::Received>,
    request: Request<'_>,
) -> bool {
    let Some(policy) = policy_now() else { return false };
    match choose::destination(policy, conn, request) {
        Ok(chosen) => ask(fd, conn, index, tls, &chosen),
        Err(why) => {
            daemon::count(why);
            false
        }
    }
}

/// The policy by which a request that comes now is decided about.
pub(crate) fn policy_now() -> Option<&'static Policy> {
    // Before the first hello the node's name is not known; rules then name other machines only.
    daemon::open();
    policy::refresh();
    init::active_policy()
}

/// The connection's TLS, if it has any. `None`: something is not answered yet, or not all of a record is out.
fn standing(conn: &Conn, received: Option<&tls::Received>) -> Option<Option<TlsState>> {
    let half = conn.write().filter(|half| half.responses.progress() == Progress::Clean)?;
    match (received, &half.tls) {
        (None, None) => Some(None),
        (Some(received), Some(sent)) => received.state(sent).map(Some),
        _ => None,
    }
}

/// Asks the daemon to move the connection; is it on its way to an answer?
pub(crate) fn ask(
    fd: i32,
    conn: &Conn,
    index: u32,
    received: Option<&tls::Received>,
    chosen: &Chosen<'_>,
) -> bool {
    let moves = conn.moves.load(Ordering::Relaxed);
    if moves >= MOST_MOVES {
        daemon::count(Reason::MovedTooOften as usize);
        return false;
    }
    let Some(tls) = standing(conn, received) else {
        daemon::count(Reason::NotClean as usize);
        return false;
    };
    let decided_ns = raw::monotonic().as_nanos() as u64;
    conn.fd.store(fd, Ordering::Relaxed);
    conn.asked.store(true, Ordering::SeqCst);
    let layer = conn.layer();
    // From here on whoever uses the connection waits for the verdict; who has come before has made it passive, or has sent its
    // records before they are counted here.
    let still = || {
        let given = match &layer {
            Some(layer) => layer.state(fd).map(|(tls, used)| (Some(tls), used)).ok_or(Reason::NotClean)?,
            None => (tls, 0),
        };
        if conn.kind() == Kind::Tracked { Ok(given) } else { Err(Reason::Shared) }
    };
    let asked = daemon::offload(fd, index, still, |generation, (tls, used)| Offload {
        slot: index,
        generation,
        to: chosen.to.clone(),
        handler: chosen.handler.to_owned(),
        moves,
        tls,
        used,
        decided_ns,
        flower_after: chosen.flower_after,
    });
    match asked {
        Ok(()) => {
            daemon::count(Counter::Asked as usize);
            true
        }
        Err(reason) => {
            conn.asked.store(false, Ordering::Release);
            daemon::count(reason as usize);
            false
        }
    }
}
