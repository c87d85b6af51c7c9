//! Handler mode `pool`: long-lived processes that are passed restored connections over a Unix socket (docs/HANDLERS.md).
//! `xo_proto::pool` has the messages; who starts the processes, and starts them again, is in `pool/posts.rs`.

pub(crate) mod posts;

use std::cell::Cell;
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use log::Level;
use mio::Interest;
use mio::unix::SourceFd;
use slab::Slab;
use socket2::Socket;
use xo_proto::pool::{self, Book, FromWorker, MAX_MESSAGE, Said, ToWorker};
use xo_proto::reason::Reason;
use xo_sys::tcp_repair::Repaired;
use xo_sys::{fdpass, raw};

use crate::config::{Config, HandlerMode};
use crate::engine::{self, Engine, ServedKey};
use crate::pool::posts::Post;
use crate::records::Layer;
use crate::target::{allow_reuse, empty, live};
use crate::timers::Timer;

/// Everyone may connect; who may take connections is decided by peer credentials.
const SOCKET_MODE: u32 = 0o666;
/// How long a worker may take to say hello.
const HELLO_PATIENCE: Duration = Duration::from_secs(10);
/// Messages of a worker that are read before others have their turn, and when it has its next.
const AT_ONCE: usize = 64;
const NEXT_TURN: Duration = Duration::from_millis(1);

/// All pools of this machine.
#[derive(Default)]
pub(crate) struct Pools {
    all: Vec<Pool>,
    workers: Slab<Worker>,
    /// Numbers given to connections.
    numbers: u64,
}

/// The workers of one handler.
struct Pool {
    handler: String,
    socket: Option<(PathBuf, Socket)>,
    command: Vec<String>,
    posts: Vec<Post>,
    /// Workers that have said hello.
    hellos: u64,
    /// Channels closed because of what a worker said, or did not say.
    broken: u64,
}

/// A worker's channel.
struct Worker {
    /// Distinguishes workers that had the same index one after the other.
    serial: u64,
    pool: usize,
    /// Of those that the daemon starts: which.
    post: Option<usize>,
    /// 0 until its process has been started.
    pid: u32,
    channel: OwnedFd,
    since: Instant,
    book: Book<ServedKey>,
    /// Connections that are being restored for it.
    reserved: Rc<Cell<u32>>,
    /// What its socket had no room for, by number.
    outbox: VecDeque<(u64, Vec<u8>, OwnedFd)>,
    taken: u64,
}

impl Worker {
    fn load(&self) -> u32 {
        self.book.connections().saturating_add(self.reserved.get())
    }

    fn has_room(&self) -> bool {
        self.load() < self.book.capacity()
    }

    fn send(&self, message: &ToWorker) -> io::Result<()> {
        fdpass::send(self.channel.as_raw_fd(), &pool::encode(message), &[], libc::MSG_DONTWAIT)
    }

    /// Passes a connection, now or when there is room. A descriptor more is needed only in the latter case.
    fn pass(&mut self, number: u64, packet: &[u8], socket: &OwnedFd) -> io::Result<()> {
        if self.outbox.is_empty() {
            let fds = [socket.as_raw_fd()];
            match fdpass::send(self.channel.as_raw_fd(), packet, &fds, libc::MSG_DONTWAIT) {
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
        self.outbox.push_back((number, packet.to_vec(), socket.try_clone()?));
        Ok(())
    }

    /// Sends what there is room for.
    fn flush(&mut self) -> io::Result<()> {
        while let Some((_, packet, socket)) = self.outbox.front() {
            let fds = [socket.as_raw_fd()];
            match fdpass::send(self.channel.as_raw_fd(), packet, &fds, libc::MSG_DONTWAIT) {
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                other => other?,
            }
            self.outbox.pop_front();
        }
        Ok(())
    }
}

/// A worker's room for a connection that is being restored.
pub(crate) struct Seat {
    worker: (usize, u64),
    reserved: Rc<Cell<u32>>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.reserved.set(self.reserved.get().saturating_sub(1));
    }
}

/// A pool, for `status`.
#[derive(Clone, Debug, Default)]
pub(crate) struct PoolView {
    /// Name of the handler.
    pub(crate) handler: String,
    /// Those that are there.
    pub(crate) workers: Vec<WorkerView>,
    /// Workers that have said hello so far.
    pub(crate) hellos: u64,
    /// Channels closed because of a broken message.
    pub(crate) broken: u64,
}

/// A worker, for `status`.
#[derive(Clone, Debug, Default)]
pub(crate) struct WorkerView {
    /// Process.
    pub(crate) pid: u32,
    /// It has said hello.
    pub(crate) ready: bool,
    /// Connections that it has.
    pub(crate) connections: u32,
    /// Connections that it can hold.
    pub(crate) capacity: u32,
    /// Connections that it has been given so far.
    pub(crate) taken: u64,
}

/// Why a worker's channel is closed.
enum Gone {
    /// It closed it, or has ended.
    Ended,
    /// By us; it is told why.
    Broken(String),
}

impl Pools {
    /// Opens the sockets of all pools.
    ///
    /// # Errors
    /// With the handler's name.
    pub(crate) fn open(config: &Config) -> Result<Pools, String> {
        let mut pools = Pools::default();
        for handler in &config.handlers {
            let HandlerMode::Pool { command, workers, socket } = &handler.mode else { continue };
            let listen = |path: &PathBuf| {
                let fd = fdpass::listen(path, SOCKET_MODE)
                    .map_err(|e| format!("handler `{}`: socket {}: {e}", handler.name, path.display()))?;
                Ok::<_, String>((path.clone(), Socket::from(OwnedFd::from(fd))))
            };
            pools.all.push(Pool {
                handler: handler.name.clone(),
                socket: socket.as_ref().map(listen).transpose()?,
                command: command.clone(),
                posts: (0..*workers).map(|_| Post::new()).collect(),
                hellos: 0,
                broken: 0,
            });
        }
        Ok(pools)
    }

    /// The sockets that workers connect to, with their pools' numbers.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = (usize, &Socket)> {
        self.all.iter().enumerate().filter_map(|(i, p)| p.socket.as_ref().map(|(_, s)| (i, s)))
    }

    /// Can a pool take a connection?
    pub(crate) fn has_room(&self, handler: &str) -> bool {
        self.of(handler).any(|(_, w)| w.has_room())
    }

    fn of(&self, handler: &str) -> impl Iterator<Item = (usize, &Worker)> {
        let number = self.all.iter().position(|p| p.handler == handler);
        self.workers.iter().filter(move |(_, w)| Some(w.pool) == number)
    }

    /// The least loaded worker with room, for its capacity.
    fn least_loaded(&self, handler: &str) -> Option<(usize, &Worker)> {
        let share = |w: &Worker| u64::from(w.load()) * 1_000_000 / u64::from(w.book.capacity().max(1));
        self.of(handler).filter(|(_, w)| w.has_room()).min_by_key(|(_, w)| (share(w), w.taken))
    }

    /// Room for one connection at a worker of this handler, kept until it is given or dropped.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) fn take_seat(&self, handler: &str) -> Result<Seat, (Reason, String)> {
        if let Some((index, worker)) = self.least_loaded(handler) {
            worker.reserved.set(worker.reserved.get() + 1);
            let reserved = Rc::clone(&worker.reserved);
            return Ok(Seat { worker: (index, worker.serial), reserved });
        }
        let ready = self.of(handler).filter(|(_, w)| w.book.is_greeted()).count();
        Err(if ready == 0 {
            (Reason::NoWorker, format!("no worker of '{handler}' is there"))
        } else {
            (Reason::PoolFull, format!("the {ready} workers of '{handler}' have no room"))
        })
    }

    /// For `status`.
    pub(crate) fn views(&self) -> Vec<PoolView> {
        let worker = |(_, w): (usize, &Worker)| WorkerView {
            pid: w.pid,
            ready: w.book.is_greeted(),
            connections: w.book.connections(),
            capacity: w.book.capacity(),
            taken: w.taken,
        };
        let view = |p: &Pool| PoolView {
            handler: p.handler.clone(),
            workers: self.of(&p.handler).map(worker).collect(),
            hellos: p.hellos,
            broken: p.broken,
        };
        self.all.iter().map(view).collect()
    }
}

impl Engine {
    /// Workers have connected to a pool's socket.
    pub(crate) fn accept_workers(&mut self, number: usize, failure: Level) {
        while let Some(Some((path, socket))) = self.pools.all.get(number).map(|p| p.socket.as_ref()) {
            match socket.accept() {
                Ok((channel, _)) => self.add_stranger(number, OwnedFd::from(channel)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) => {
                    log::log!(failure, "accepting a worker on {}: {e}", path.display());
                    self.accept_again = true;
                    return;
                }
            }
        }
    }

    /// A worker that an operator has started.
    fn add_stranger(&mut self, pool: usize, channel: OwnedFd) {
        let who = match fdpass::peer_credentials(channel.as_raw_fd()) {
            Ok(who) => who,
            Err(e) => return log::warn!("a worker's connection: {e}"),
        };
        match self.add_worker(pool, channel, who.pid, None) {
            Ok((index, _)) if !self.trusts_user(who.uid) => {
                let why = format!("user {} is not in `users` of the daemon's configuration", who.uid);
                self.worker_gone(index, &Gone::Broken(why));
            }
            Ok(_) => {}
            Err(e) => log::error!("registering a worker's socket: {e}"),
        }
    }

    fn add_worker(
        &mut self,
        pool: usize,
        channel: OwnedFd,
        pid: u32,
        post: Option<usize>,
    ) -> io::Result<(usize, u64)> {
        let (fd, serial) = (channel.as_raw_fd(), self.next_serial());
        let index = self.pools.workers.insert(Worker {
            serial,
            pool,
            post,
            pid,
            channel,
            since: Instant::now(),
            book: Book::default(),
            reserved: Rc::default(),
            outbox: VecDeque::new(),
            taken: 0,
        });
        let interest = Interest::READABLE | Interest::WRITABLE;
        let token = engine::worker_token(index);
        let watched = self.poll.registry().register(&mut SourceFd(&fd), token, interest);
        watched.inspect_err(|_| drop(self.pools.workers.remove(index)))?;
        Ok((index, serial))
    }

    /// A worker's channel has something for us, or room again.
    pub(crate) fn worker_ready(&mut self, index: usize) {
        let Some(worker) = self.pools.workers.get_mut(index) else { return };
        if let Err(e) = worker.flush() {
            log::debug!("worker {}: {e}", worker.pid);
            return self.worker_gone(index, &Gone::Ended);
        }
        let serial = worker.serial;
        for _ in 0..AT_ONCE {
            let Some(worker) = self.pools.workers.get(index).filter(|w| w.serial == serial) else { return };
            let mut buffer = [0; MAX_MESSAGE];
            let gone = match fdpass::recv(worker.channel.as_raw_fd(), &mut buffer, libc::MSG_DONTWAIT) {
                Ok((0, _)) => Gone::Ended,
                Ok((_, [Some(_), ..])) => Gone::Broken("a descriptor came with a message".into()),
                Ok((n, _)) => match self.on_worker_message(index, &buffer[..n]) {
                    Ok(()) => continue,
                    Err(why) => Gone::Broken(why),
                },
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == ErrorKind::InvalidData => {
                    Gone::Broken(format!("a message of more than {MAX_MESSAGE} bytes, or with descriptors"))
                }
                Err(_) => Gone::Ended,
            };
            return self.worker_gone(index, &gone);
        }
        self.at(Instant::now() + NEXT_TURN, Timer::Worker(index));
    }

    fn on_worker_message(&mut self, index: usize, packet: &[u8]) -> Result<(), String> {
        let message: FromWorker = pool::decode(packet).map_err(|e| e.to_string())?;
        let Some(worker) = self.pools.workers.get_mut(index) else { return Ok(()) };
        match worker.book.on(&message).map_err(|e| e.to_string())? {
            Said::Hello => self.welcome(index),
            Said::Capacity => Ok(()),
            Said::Done(key) => {
                self.say_goodbye(&key);
                self.expect_end(&key);
                Ok(())
            }
        }
    }

    fn welcome(&mut self, index: usize) -> Result<(), String> {
        let pools = &mut self.pools;
        let Some(worker) = pools.workers.get(index) else { return Ok(()) };
        let pool = &mut pools.all[worker.pool];
        pool.hellos += 1;
        let (node, handler) = (self.config.node.clone(), pool.handler.clone());
        log::info!("handler {handler}: worker {} takes {} connections", worker.pid, worker.book.capacity());
        let welcome = ToWorker::Welcome { version: pool::VERSION, node, handler };
        worker.send(&welcome).map_err(|e| e.to_string())?;
        // Those that it was reported to have nobody for may send connections again.
        self.report(Instant::now());
        Ok(())
    }

    /// Makes a connection live and gives it to the worker that it was restored for, or to another.
    ///
    /// Live first: a worker knows nothing of repair mode, and would get errors from it.
    pub(crate) fn start_pooled(
        &mut self,
        key: &ServedKey,
        restored: Repaired,
        elapsed: Duration,
    ) -> Result<OwnedFd, Reason> {
        let served = self.served.get_mut(key).ok_or(Reason::Closed)?;
        let (client, seat) = (served.client, served.seat.take());
        let socket = live(restored, elapsed, client)?;
        allow_reuse(&socket, client);
        let instead = self.served.get_mut(key).and_then(|s| s.layer.as_mut()).and_then(Layer::take_end);
        let given = self.give(key, seat, instead.as_ref().unwrap_or(&socket));
        if let Err((reason, detail)) = given {
            log::warn!("handing the connection of {client} over: {detail}");
            let layer = self.served.get_mut(key).and_then(|s| s.layer.take());
            // Silently: its host may still have it. Nothing empties a socket that has the kernel's TLS; its host has let go of it.
            if !layer.is_some_and(|l| l.is_kernel()) {
                empty(&socket, client);
            }
            return Err(reason);
        }
        if let Some(layer) = self.served.get_mut(key).and_then(|s| s.layer.as_mut()) {
            layer.begin();
        }
        Ok(socket)
    }

    fn give(
        &mut self,
        key: &ServedKey,
        seat: Option<Seat>,
        socket: &OwnedFd,
    ) -> Result<(), (Reason, String)> {
        let served = self.served.get(key).ok_or((Reason::Closed, String::new()))?;
        let handler = served.handler.clone();
        self.pools.numbers += 1;
        let number = self.pools.numbers;
        // A blocking descriptor, as a new one is.
        let blocking = raw::set_nonblocking(socket.as_raw_fd(), false);
        blocking.map_err(|e| (Reason::RestoreFailed, e.to_string()))?;
        let packet = pool::encode(&ToWorker::Connection {
            connection: number,
            client: served.client,
            server: served.host,
            handler: handler.clone(),
            waiting: served
                .layer
                .as_ref()
                .map_or_else(|| raw::readable_bytes(socket.as_raw_fd()) as u32, Layer::waiting),
            tls: served.layer.is_some(),
        });
        let mut seat = match seat {
            Some(seat) => seat,
            None => self.pools.take_seat(&handler)?,
        };
        loop {
            let (index, serial) = seat.worker;
            let worker = self.pools.workers.get_mut(index).filter(|w| w.serial == serial);
            let sent = worker.map(|worker| {
                worker.pass(number, &packet, socket)?;
                worker.book.give(number, key.clone());
                worker.taken += 1;
                Ok::<_, io::Error>(())
            });
            drop(seat);
            match sent {
                Some(Ok(())) => return Ok(()),
                Some(Err(e)) if has_ended(&e) => {
                    log::debug!("giving a connection to a worker of {handler}: {e}");
                    self.worker_gone(index, &Gone::Ended);
                }
                // Its channel is fine: no descriptor is left here.
                Some(Err(e)) => return Err((Reason::TargetUnwilling, e.to_string())),
                None => {}
            }
            seat = self.pools.take_seat(&handler)?;
        }
    }

    /// A worker's channel is closed: by us, if it broke the protocol.
    fn worker_gone(&mut self, index: usize, why: &Gone) {
        let Some(worker) = self.pools.workers.try_remove(index) else { return };
        let _ = self.poll.registry().deregister(&mut SourceFd(&worker.channel.as_raw_fd()));
        let pool = &mut self.pools.all[worker.pool];
        match why {
            Gone::Broken(why) => {
                pool.broken += 1;
                log::error!("handler {}: worker {}: {why}; its channel is closed", pool.handler, worker.pid);
                let _ = worker.send(&ToWorker::Error { message: why.clone() });
            }
            Gone::Ended => log::info!(
                "handler {}: worker {} is gone, with {} connections",
                pool.handler,
                worker.pid,
                worker.book.connections()
            ),
        }
        if let Some(post) = worker.post.and_then(|post| pool.posts.get_mut(post)) {
            post.leave(Instant::now());
        }
        let mut given = worker.book.into_given();
        for (number, _, socket) in worker.outbox {
            let Some(key) = given.remove(&number) else { continue };
            if let Err((_, detail)) = self.give(&key, None, &socket) {
                log::warn!("a connection of {} ends: {detail}", key.0);
                self.without_goodbye(&key);
            }
        }
        for key in given.into_values() {
            self.without_goodbye(&key);
        }
    }

    /// The client of a worker that is gone must see that what it has got may not be all.
    fn without_goodbye(&mut self, key: &ServedKey) {
        if let Some(served) = self.served.get_mut(key) {
            served.layer = None;
        }
        self.expect_end(key);
    }

    /// Every tick.
    pub(crate) fn look_at_pools(&mut self, now: Instant) {
        let late = |w: &Worker| !w.book.is_greeted() && w.pid != 0 && now - w.since > HELLO_PATIENCE;
        let late: Vec<_> = self.pools.workers.iter().filter(|(_, w)| late(w)).map(|(i, _)| i).collect();
        for index in late {
            let why = format!("no \"hello\" within {HELLO_PATIENCE:?}");
            self.worker_gone(index, &Gone::Broken(why));
        }
        self.look_at_posts(now);
    }
}

/// Of sending to a worker: nobody is on the other end any more.
fn has_ended(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::NotConnected)
}
