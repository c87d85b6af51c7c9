//! Workers that the daemon starts by a pool's `command`, and starts again when they end.
//!
//! A worker outlives the daemon: it sees the end of its channel, finishes what it has, and ends.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Child;
use std::time::{Duration, Instant};

use xo_proto::pool::Backoff;
use xo_sys::{fdpass, raw};

use super::Gone;
use crate::engine::Engine;
use crate::exec::{Job, Whose};

/// A worker whose channel is closed may finish what it has for so long.
const LEAVE_PATIENCE: Duration = Duration::from_secs(10);

/// The place of a worker that is to be there always.
pub(super) struct Post {
    state: State,
    backoff: Backoff,
}

enum State {
    /// To be started, not before this time.
    Due(Instant),
    /// Its process is being started; the worker's index and serial.
    Starting(usize, u64),
    Running {
        child: Child,
        since: Instant,
        /// Its channel is closed: by then it has ended, or is killed.
        leave_by: Option<Instant>,
    },
}

impl Post {
    /// To be filled at once.
    pub(super) fn new() -> Post {
        Post { state: State::Due(Instant::now()), backoff: Backoff::default() }
    }

    /// The worker's channel is closed.
    pub(super) fn leave(&mut self, now: Instant) {
        if let State::Running { leave_by, .. } = &mut self.state {
            leave_by.get_or_insert(now + LEAVE_PATIENCE);
        }
    }

    /// The worker has ended, or could not be started; when there will be another.
    fn vacate(&mut self, now: Instant, lived: Duration) -> Duration {
        let pause = self.backoff.after(lived);
        self.state = State::Due(now + pause);
        pause
    }

    /// Why the worker has ended, and how long it lived.
    fn ended(&mut self, now: Instant) -> Option<(u32, String, Duration)> {
        let State::Running { child, since, leave_by } = &mut self.state else { return None };
        let how = match child.try_wait() {
            Ok(None) if leave_by.is_some_and(|by| now >= by) => {
                // It is reaped at a later look.
                *leave_by = None;
                let killed = child.kill();
                log::error!("worker {} does not end: killed ({killed:?})", child.id());
                return None;
            }
            Ok(None) => return None,
            Ok(Some(status)) => status.to_string(),
            Err(e) => e.to_string(),
        };
        Some((child.id(), how, now.duration_since(*since)))
    }
}

impl Engine {
    /// Every tick: starts workers that are to be started, and sees who has ended.
    pub(super) fn look_at_posts(&mut self, now: Instant) {
        let mut due = Vec::new();
        for (number, pool) in self.pools.all.iter_mut().enumerate() {
            for (at, post) in pool.posts.iter_mut().enumerate() {
                if let Some((pid, how, lived)) = post.ended(now) {
                    let pause = post.vacate(now, lived);
                    log::warn!(
                        "handler {}: worker {pid} has ended ({how}), the next in {pause:?}",
                        pool.handler
                    );
                }
                if matches!(post.state, State::Due(when) if now >= when) {
                    due.push((number, at));
                }
            }
        }
        if self.is_stopping() {
            return;
        }
        for (number, at) in due {
            if let Err(e) = self.start_worker(number, at) {
                let pool = &mut self.pools.all[number];
                log::error!("starting a worker of {}: {e}", pool.handler);
                pool.posts[at].vacate(now, Duration::ZERO);
            }
        }
    }

    fn start_worker(&mut self, number: usize, at: usize) -> io::Result<()> {
        let (ours, theirs) = fdpass::pair()?;
        // The worker's end waits, as that of a worker that connects by itself.
        raw::set_nonblocking(theirs.as_raw_fd(), false)?;
        let (index, serial) = self.add_worker(number, OwnedFd::from(ours), 0, Some(at))?;
        let pool = &mut self.pools.all[number];
        let environment =
            vec![("XO_POOL_FD", crate::exec::WORKER_FD.to_string()), ("XO_HANDLER", pool.handler.clone())];
        let job = Job {
            reserve: None,
            whose: Whose::Worker { pool: number, post: at },
            command: pool.command.clone(),
            environment,
            socket: OwnedFd::from(theirs),
        };
        pool.posts[at].state = State::Starting(index, serial);
        if let Err(e) = self.spawner.start_process(job) {
            self.worker_gone(index, &Gone::Ended);
            return Err(e);
        }
        Ok(())
    }

    /// A worker's process has been started, or not.
    pub(crate) fn on_worker_spawned(&mut self, number: usize, at: usize, result: io::Result<Child>) {
        let now = Instant::now();
        let pools = &mut self.pools;
        let Some(pool) = pools.all.get_mut(number) else { return };
        let handler = pool.handler.clone();
        let Some(post) = pool.posts.get_mut(at) else { return };
        let State::Starting(index, serial) = post.state else { return };
        let worker = pools.workers.get_mut(index).filter(|w| w.serial == serial);
        match result {
            Ok(child) => {
                // It may have ended already.
                let leave_by = worker.is_none().then(|| now + LEAVE_PATIENCE);
                if let Some(worker) = worker {
                    worker.pid = child.id();
                    worker.since = now;
                }
                post.state = State::Running { child, since: now, leave_by };
            }
            Err(e) => {
                let pause = post.vacate(now, Duration::ZERO);
                log::error!("starting a worker of {handler}: {e}; again in {pause:?}");
                if worker.is_some() {
                    self.worker_gone(index, &Gone::Ended);
                }
            }
        }
    }

    /// The daemon ends: workers see the end of their channels. One that has not said hello yet does not know what that means.
    pub(crate) fn leave_pools(&mut self) {
        for pool in &mut self.pools.all {
            if let Some((path, _)) = pool.socket.take() {
                let _ = std::fs::remove_file(path);
            }
        }
        let unborn = |w: &super::Worker| (!w.book.is_greeted()).then_some((w.pool, w.post?));
        let unborn: Vec<_> = self.pools.workers.iter().filter_map(|(_, w)| unborn(w)).collect();
        for (pool, at) in unborn {
            if let State::Running { child, .. } = &mut self.pools.all[pool].posts[at].state {
                let _ = child.kill();
            }
        }
    }
}
