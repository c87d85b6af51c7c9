//! At the boundary of Redis commands: which of those that wait the server may have.

use std::sync::atomic::Ordering;

use xo_proto::protocol::{Progress, Request, Requests, Responses};
use xo_proto::reason::Reason;
use xo_proto::resp::{self, Look, Run};
use xo_proto::slot::Counter;
use xo_sys::raw;

use crate::boundary::{ESTABLISHED, Outcome, Seen, ask, leave, partial, policy_now, release};
use crate::conn::{Conn, ReadHalf};
use crate::{choose, daemon, init, poll};

/// What waits in the socket.
pub(crate) struct Waiting<'b> {
    /// As far as it is looked at.
    pub(crate) bytes: &'b [u8],
    /// There is no more.
    pub(crate) all: bool,
    /// The server does not block.
    pub(crate) nonblocking: bool,
}

/// Decides about the commands that wait: those that are served here go to the server in one read.
pub(crate) fn judge(
    fd: i32,
    conn: &Conn,
    index: u32,
    half: &mut ReadHalf,
    requests: resp::Requests,
    waiting: &Waiting<'_>,
) -> Seen {
    let policy = policy_now();
    let mut stays = half.stays;
    loop {
        let mut chosen = None;
        let away = |command: &resp::Command| {
            let Some(policy) = policy else { return false };
            match choose::ahead(policy, conn, Request::Redis(command)) {
                Ok(to) => chosen = Some(to),
                Err(why) => {
                    chosen = None;
                    // Those that are served here are counted together.
                    if why != Counter::Local as usize {
                        daemon::count(why);
                    }
                }
            }
            chosen.is_some()
        };
        let kept = |reason: Reason| daemon::count(reason as usize);
        match requests.look(waiting.bytes, stays, away, kept) {
            Look::Partial if !waiting.all => return Seen::Cut,
            Look::Partial => return partial(fd, conn, half, waiting.bytes.len()),
            Look::Leave(reason) => return leave(fd, conn, half, reason),
            Look::Here(run) => return serve(fd, conn, half, &run, waiting),
            Look::Away(_) => {
                match replies(fd, conn, half, waiting.nonblocking) {
                    Replies::Waited => return Seen::HeldBack,
                    Replies::Late => {}
                    Replies::Out => {
                        release(fd, conn, half);
                        if let Some(chosen) = chosen {
                            chosen.count(conn);
                            if ask(fd, conn, index, None, &chosen) {
                                return Seen::Asked;
                            }
                        }
                    }
                }
                stays = true;
            }
        }
    }
}

fn serve(fd: i32, conn: &Conn, half: &mut ReadHalf, run: &Run, waiting: &Waiting<'_>) -> Seen {
    release(fd, conn, half);
    conn.moves.store(0, Ordering::Relaxed);
    half.tracker = Requests::Redis(run.next);
    match conn.write().as_deref_mut().map(|half| &mut half.responses) {
        Some(Responses::Redis(replies)) => replies.asked(run.replies, run.blocks),
        _ => return leave(fd, conn, half, Reason::Shared),
    }
    daemon::count_many(Counter::Local as usize, run.replies);
    let alone = waiting.all && run.len >= waiting.bytes.len() as u64;
    Seen::Outcome(Outcome::Read { alone, there: 0 })
}

/// Where the replies are to the commands before one that is to leave.
enum Replies {
    /// All written.
    Out,
    /// Waited for.
    Waited,
    /// Not waited for any longer: the command stays.
    Late,
}

/// A server that has read commands writes their replies before long, unless one of them blocks or the client does not read.
/// Until then the next command waits, where a wrong answer would be the alternative.
fn replies(fd: i32, conn: &Conn, half: &mut ReadHalf, nonblocking: bool) -> Replies {
    let (progress, blocked) = standing(conn);
    if progress == Progress::Clean {
        half.late = false;
        return Replies::Out;
    }
    if !conn.awaits_clean.load(Ordering::Relaxed) {
        release(fd, conn, half);
    }
    let now = raw::monotonic().as_nanos() as u64;
    let deadline = conn.deadline.load(Ordering::Relaxed);
    // One that blocks would wait for its own writing.
    half.late |= !nonblocking || progress != Progress::InProgress || (deadline != 0 && now >= deadline);
    if half.late || raw::tcp_state(fd).is_ok_and(|s| s != ESTABLISHED) {
        daemon::count(if blocked { Reason::Blocking } else { Reason::NotClean } as usize);
        return Replies::Late;
    }
    conn.awaits_clean.store(true, Ordering::SeqCst);
    poll::hold_back(fd, conn, raw::readable_bytes(fd), now + init::head_timeout_ns());
    // Another thread may have written the last of them meanwhile.
    if standing(conn).0 == Progress::Clean { Replies::Out } else { Replies::Waited }
}

fn standing(conn: &Conn) -> (Progress, bool) {
    match conn.write().as_deref().map(|half| &half.responses) {
        Some(Responses::Redis(replies)) => (replies.progress(), replies.blocked()),
        _ => (Progress::Unknown, false),
    }
}
