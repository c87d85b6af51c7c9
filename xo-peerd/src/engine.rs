//! The daemon's event loop: one thread that owns every connection to libraries and peers and every
//! hand-off. What a message means stands in `host.rs`, `target.rs`, `ipc.rs`; this file only moves bytes
//! and time.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use foldhash::HashMap;
use log::Level;
use mio::event::Event;
use mio::net::TcpListener;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use slab::Slab;
use socket2::Socket;
use xo_bpf_abi::FlowKey;
use xo_proto::fresh::Freshness;
use xo_proto::handoff::{HostEvent, LIMITS};
use xo_proto::slot::COUNTERS;
use xo_proto::wire::{HandoffId, Hello};
use xo_sys::replay::RawSender;
use xo_sys::sock_diag::TcpLookup;
use xo_sys::tcp_repair::SpareSockets;

use crate::acceptor::{Acceptor, Place, Waiting, WakeLater};
use crate::config::Config;
use crate::dial::Dial;
use crate::exec::Spawner;
use crate::flower::Flower;
use crate::host::HostFlow;
use crate::ipc::Library;
use crate::ktls::Farewell;
use crate::metrics::Metrics;
use crate::metrics_http::Published;
use crate::onward::Visit;
use crate::peer::Peer;
use crate::pool::Pools;
use crate::recent::Recent;
use crate::records::RecordLayers;
use crate::reload::PolicyFile;
use crate::restore::Entry;
use crate::spin::Spin;
use crate::state::State;
use crate::steer::Steer;
use crate::target::Served;
use crate::targets::Targets;
use crate::timers::{Timer, Timers};
use crate::tls::Tls;
use crate::unflushed::Unflushed;

const IPC_LISTENER: Token = Token(0);
const PEER_LISTENER: Token = Token(1 << KIND_BITS);
const SIGNALS: Token = Token(2 << KIND_BITS);
const WAKER: Token = Token(3 << KIND_BITS);
const ROUTES: Token = Token(4 << KIND_BITS);
const HELD: Token = Token(5 << KIND_BITS);
/// The lowest bits of a token: what it is. The others: which.
const KIND_BITS: u32 = 3;
const KINDS: usize = (1 << KIND_BITS) - 1;
const KIND_LIBRARY: usize = 1;
const KIND_PEER: usize = 2;
const KIND_ACCEPTOR: usize = 3;
const KIND_WORKER: usize = 4;
const KIND_POOL: usize = 5;

/// Sockets of each family that are made in advance.
const SPARE_SOCKETS: usize = 8;
/// How often closed connections are looked for.
const TICK: Duration = Duration::from_millis(50);
/// How often peers are probed.
const PROBE_EVERY: Duration = Duration::from_secs(1);
/// An embedded daemon ends when it has served nobody for this long.
const EMBEDDED_IDLE: Duration = Duration::from_secs(5);

/// Key of a hand-off on the target: the host's node name and its number there.
pub(crate) type ServedKey = (Rc<str>, HandoffId);

const fn token(kind: usize, index: usize) -> Token {
    Token(index << KIND_BITS | kind)
}

/// For the channel of a peer.
pub(crate) fn peer_token(index: usize) -> Token {
    token(KIND_PEER, index)
}

/// For a worker's channel.
pub(crate) fn worker_token(index: usize) -> Token {
    token(KIND_WORKER, index)
}

/// A message that was late by this is not older than what may start a connection, or keep it.
pub(crate) fn is_fresh(late: Option<Duration>) -> bool {
    late.is_some_and(|late| late < LIMITS.fresh)
}

/// All state of the daemon.
pub(crate) struct Engine {
    pub(crate) config: Config,
    pub(crate) poll: Poll,
    pub(crate) metrics: Metrics,
    pub(crate) published: Published,
    pub(crate) steer: Steer,
    pub(crate) flower: Flower,
    pub(crate) raw: RawSender,
    pub(crate) diag: TcpLookup,
    pub(crate) tls: Option<Tls>,
    pub(crate) records: RecordLayers,
    pub(crate) hello: Hello,
    pub(crate) state: State,
    pub(crate) targets: Targets,
    pub(crate) policy: Option<PolicyFile>,
    pub(crate) mtu: usize,
    pub(crate) libraries: Slab<Library>,
    pub(crate) peers: Slab<Peer>,
    /// Peers for which messages are queued until the end of this turn, or a moment longer.
    pub(crate) unflushed: Unflushed,
    pub(crate) dials: HashMap<String, Dial>,
    /// How long each node's messages are under way, by name and boot. Not by channel: on a new one all may be late alike.
    pub(crate) freshness: HashMap<(Rc<str>, [u8; 16]), Freshness>,
    pub(crate) hosted: HashMap<HandoffId, Box<HostFlow>>,
    /// Boxed, as the hosted ones are: many come and go, and the tables have room for several times as many.
    pub(crate) served: HashMap<ServedKey, Box<Served>>,
    /// Connections served here by their keys in the steering tables, as this machine's sockets know them.
    pub(crate) by_flow: HashMap<FlowKey, ServedKey>,
    /// Connections that came by a detour, by the names that their homes have for them.
    pub(crate) at_home: HashMap<ServedKey, Vec<Visit>>,
    /// Hand-offs that are not begun (any more): asked about before they came, or over.
    pub(crate) refused: Recent<ServedKey>,
    /// Connections served here that ended while there was no daemon; their hosts do not know.
    pub(crate) gone: Vec<(ServedKey, Entry, HandoffId)>,
    /// Deliveries of connections that were withdrawn or have left, until their processes close them.
    pub(crate) abandoned: Vec<Place>,
    /// Connections whose handlers have done with them, and whose clients are still to be told.
    pub(crate) farewells: Vec<Farewell>,
    pub(crate) acceptors: Slab<Acceptor>,
    pub(crate) next_acceptor: usize,
    pub(crate) waiting: HashMap<u16, Waiting>,
    pub(crate) wake_later: VecDeque<WakeLater>,
    pub(crate) pools: Pools,
    pub(crate) spawner: Spawner,
    pub(crate) spare: SpareSockets,
    pub(crate) next_id: HandoffId,
    serials: u64,
    /// A hand-off has got further in this turn of the loop: the next message is due at once.
    pub(crate) got_further: bool,
    pub(crate) embedded: bool,
    /// Counters of processes that are gone.
    pub(crate) past_counters: [u64; COUNTERS],
    timers: Timers,
    /// Connections wait that could not be accepted: no descriptor was left. Nothing tells when there is one.
    pub(crate) accept_again: bool,
    ipc_listener: Socket,
    pub(crate) peer_listener: Option<TcpListener>,
    signals: UnixStream,
    hangups: UnixStream,
    children: UnixStream,
    /// Told to stop: by then at the latest.
    pub(crate) stop_by: Option<Instant>,
    idle_since: Instant,
    last_sweep: Instant,
    last_published: Instant,
    last_probe: Instant,
}

/// What the daemon is made of; see `daemon.rs`.
pub(crate) struct Parts {
    pub(crate) config: Config,
    pub(crate) embedded: bool,
    pub(crate) poll: Poll,
    pub(crate) metrics: Metrics,
    pub(crate) published: Published,
    pub(crate) steer: Steer,
    pub(crate) flower: Flower,
    pub(crate) raw: RawSender,
    pub(crate) diag: TcpLookup,
    pub(crate) tls: Option<Tls>,
    pub(crate) hello: Hello,
    pub(crate) state: State,
    pub(crate) targets: Targets,
    pub(crate) pools: Pools,
    pub(crate) first_id: HandoffId,
    pub(crate) mtu: usize,
    pub(crate) ipc_listener: Socket,
    pub(crate) peer_listener: Option<TcpListener>,
    /// A byte for each SIGTERM and SIGINT.
    pub(crate) signals: UnixStream,
    /// A byte for each SIGHUP.
    pub(crate) hangups: UnixStream,
    /// For SIGCHLD.
    pub(crate) children: UnixStream,
}

impl Engine {
    /// Registers the listening sockets.
    pub(crate) fn new(mut parts: Parts) -> io::Result<Engine> {
        let registry = parts.poll.registry();
        registry.register(
            &mut SourceFd(&parts.ipc_listener.as_raw_fd()),
            IPC_LISTENER,
            Interest::READABLE,
        )?;
        for (number, socket) in parts.pools.sockets() {
            let source = &mut SourceFd(&socket.as_raw_fd());
            registry.register(source, token(KIND_POOL, number), Interest::READABLE)?;
        }
        registry.register(&mut SourceFd(&parts.signals.as_raw_fd()), SIGNALS, Interest::READABLE)?;
        for signals in [&parts.hangups, &parts.children] {
            registry.register(&mut SourceFd(&signals.as_raw_fd()), SIGNALS, Interest::READABLE)?;
        }
        registry.register(&mut SourceFd(&parts.steer.routes_fd()), ROUTES, Interest::READABLE)?;
        registry.register(&mut SourceFd(&parts.steer.held_fd()), HELD, Interest::READABLE)?;
        if let Some(l) = &mut parts.peer_listener {
            registry.register(l, PEER_LISTENER, Interest::READABLE)?;
        }
        let waker = Arc::new(Waker::new(registry, WAKER)?);
        parts.flower.start(Arc::clone(&waker))?;
        let now = Instant::now();
        let records = RecordLayers::start(&parts.config, &waker)?;
        let policy = parts.config.policy.take().map(PolicyFile::new);
        Ok(Engine {
            config: parts.config,
            poll: parts.poll,
            metrics: parts.metrics,
            published: parts.published,
            steer: parts.steer,
            flower: parts.flower,
            raw: parts.raw,
            diag: parts.diag,
            tls: parts.tls,
            records,
            hello: parts.hello,
            state: parts.state,
            targets: parts.targets,
            policy,
            mtu: parts.mtu,
            libraries: Slab::new(),
            peers: Slab::new(),
            unflushed: Unflushed::default(),
            dials: HashMap::default(),
            freshness: HashMap::default(),
            hosted: HashMap::default(),
            served: HashMap::default(),
            by_flow: HashMap::default(),
            at_home: HashMap::default(),
            refused: Recent::default(),
            gone: Vec::new(),
            abandoned: Vec::new(),
            farewells: Vec::new(),
            acceptors: Slab::new(),
            next_acceptor: 0,
            waiting: HashMap::default(),
            wake_later: VecDeque::new(),
            pools: parts.pools,
            spawner: Spawner::start(waker)?,
            spare: SpareSockets::default(),
            next_id: parts.first_id,
            serials: 0,
            got_further: false,
            embedded: parts.embedded,
            past_counters: [0; COUNTERS],
            timers: Timers::default(),
            accept_again: false,
            ipc_listener: parts.ipc_listener,
            peer_listener: parts.peer_listener,
            signals: parts.signals,
            hangups: parts.hangups,
            children: parts.children,
            stop_by: None,
            idle_since: now,
            last_sweep: now,
            last_published: now,
            last_probe: now,
        })
    }

    /// Runs until SIGTERM or SIGINT, or until an embedded daemon has nobody left to serve.
    pub(crate) fn run(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(256);
        let mut spin = Spin::new(self.config.handoff.spin, Instant::now());
        self.publish_draining();
        self.publish_policy();
        self.recover();
        self.dial_targets();
        self.at(Instant::now() + TICK, Timer::Tick);
        while !self.may_stop() {
            let now = Instant::now();
            let spinning = spin.wanted(now);
            if !spinning {
                self.refill();
            }
            let next = [self.timers.until_next(), self.unflushed.until_next()].into_iter().flatten().min();
            let timeout = if spinning { Some(Duration::ZERO) } else { next };
            match self.poll.poll(&mut events, timeout) {
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                other => other?,
            }
            if events.is_empty() && spinning {
                self.refill();
                std::thread::yield_now();
                spin.offered(now, Instant::now());
                continue;
            }
            for event in &events {
                self.dispatch(event);
            }
            self.run_timers();
            self.flush_peers(false);
            if std::mem::take(&mut self.got_further) {
                spin.busy(Instant::now());
            }
        }
        self.leave();
        self.flush_peers(true);
        Ok(())
    }

    /// Sockets for connections to come, made while nobody waits.
    fn refill(&mut self) {
        if self.peer_listener.is_some() && self.spawner.is_idle() {
            self.spare.refill(SPARE_SOCKETS);
        }
    }

    /// A number that no earlier process on a library's socket has had.
    pub(crate) fn next_serial(&mut self) -> u64 {
        self.serials += 1;
        self.serials
    }

    fn dispatch(&mut self, event: &Event) {
        match event.token() {
            IPC_LISTENER => self.accept_libraries(Level::Error),
            PEER_LISTENER => self.accept_peers(Level::Error),
            SIGNALS => self.on_signal(),
            WAKER => {
                self.on_spawned();
                self.on_relay();
                self.on_flower();
            }
            HELD => {
                self.drain_held();
            }
            ROUTES => {
                self.steer.routes_changed();
                self.renew_rules();
            }
            Token(t) => {
                let index = t >> KIND_BITS;
                match t & KINDS {
                    KIND_LIBRARY => self.library_ready(index),
                    KIND_PEER => self.peer_ready(index, event.is_writable(), event.is_read_closed()),
                    KIND_ACCEPTOR => self.acceptor_ready(index, event.is_read_closed()),
                    KIND_WORKER => self.worker_ready(index),
                    KIND_POOL => self.accept_workers(index, Level::Error),
                    _ => {}
                }
            }
        }
    }

    /// Each signal is a byte on its own socket; SIGHUP and SIGCHLD may come together with others.
    fn on_signal(&mut self) {
        let mut buffer = [0; 16];
        if matches!(self.hangups.read(&mut buffer), Ok(1..)) {
            self.reload_now();
        }
        let mut ended = false;
        while matches!(self.children.read(&mut buffer), Ok(1..)) {
            ended = true;
        }
        if ended {
            self.reap_children();
        }
        if matches!(self.signals.read(&mut buffer), Ok(1..)) {
            self.begin_stop();
        }
    }

    /// Arms a timer. Timers are not cancelled: their handlers look whether they still mean anything.
    pub(crate) fn at(&mut self, when: Instant, timer: Timer) {
        self.timers.arm(when, timer);
    }

    fn run_timers(&mut self) {
        while let Some((now, timer)) = self.timers.due() {
            match timer {
                Timer::HostDeadline(id) => self.host_deadline(id),
                Timer::HostDoubt(id) => self.host_doubt_over(id),
                Timer::TargetDeadline(key) => self.target_deadline(&key),
                Timer::TargetFence(key, number) => self.target_fence(&key, number),
                Timer::Dial(node) => self.dial_timer(&node),
                Timer::Settled(id) => self.start_when_settled(id),
                Timer::Linger(id) => self.host_event(id, HostEvent::LingerOver),
                Timer::Detour(key) => self.detour_deadline(&key),
                Timer::Waiting(port) => self.waiting_deadline(port),
                Timer::Worker(index) => self.worker_ready(index),
                Timer::Tick => self.tick(now),
            }
        }
    }

    /// Most timers outlive what they were armed for: a connection that moves on leaves some that are due in a minute.
    fn drop_stale_timers(&mut self) {
        let (hosted, served) = (&self.hosted, &self.served);
        self.timers.purge(|timer| match timer {
            Timer::HostDeadline(id) | Timer::HostDoubt(id) | Timer::Settled(id) | Timer::Linger(id) => {
                hosted.contains_key(id)
            }
            Timer::TargetDeadline(key) | Timer::TargetFence(key, _) | Timer::Detour(key) => {
                served.contains_key(key)
            }
            Timer::Dial(_) | Timer::Waiting(_) | Timer::Worker(_) | Timer::Tick => true,
        });
    }

    fn tick(&mut self, now: Instant) {
        self.look_for_ends(now);
        self.look_at_farewells(now);
        self.look_at_hung(now);
        self.look_at_pools(now);
        self.look_at_targets(now);
        self.look_at_policy(now);
        self.look_at_flower(now);
        if std::mem::take(&mut self.accept_again) {
            self.accept_libraries(Level::Debug);
            self.accept_peers(Level::Debug);
            let pools: Vec<_> = self.pools.sockets().map(|(number, _)| number).collect();
            pools.into_iter().for_each(|number| self.accept_workers(number, Level::Debug));
        }
        if now.duration_since(self.last_probe) > PROBE_EVERY {
            self.last_probe = now;
            self.probe_peers();
            self.steer.refresh_ways();
            self.renew_rules();
        }
        if now.duration_since(self.last_sweep) > Duration::from_secs(10) {
            self.last_sweep = now;
            self.sweep_hosted();
            self.sweep_served(now);
            self.drop_unneeded();
        }
        self.drop_stale_timers();
        if self.config.metrics.is_some() && now.duration_since(self.last_published) > Duration::from_secs(1) {
            self.last_published = now;
            let text = self.metrics.prometheus(&self.live());
            *self.published.lock().unwrap_or_else(PoisonError::into_inner) = text;
        }
        if !self.libraries.is_empty() || !self.hosted.is_empty() || !self.served.is_empty() {
            self.idle_since = now;
        } else if self.embedded && now.duration_since(self.idle_since) > EMBEDDED_IDLE {
            log::info!("nobody left to serve: the embedded daemon ends");
            self.stop_by = Some(now);
        }
        self.at(now + TICK, Timer::Tick);
    }

    fn accept_libraries(&mut self, failure: Level) {
        loop {
            match self.ipc_listener.accept() {
                Ok((socket, _)) => {
                    let entry = self.libraries.vacant_entry();
                    let token = token(KIND_LIBRARY, entry.key());
                    match Library::new(OwnedFd::from(socket)) {
                        Ok(library) => {
                            let fd = library.fd();
                            entry.insert(library);
                            let source = &mut SourceFd(&fd);
                            if let Err(e) = self.poll.registry().register(source, token, Interest::READABLE) {
                                log::error!("registering a library's socket: {e}");
                                self.libraries.remove(token.0 >> KIND_BITS);
                            }
                        }
                        Err(e) => log::warn!("a library's connection: {e}"),
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) => {
                    self.accept_again = true;
                    return log::log!(failure, "accepting a library's connection: {e}");
                }
            }
        }
    }

    /// Watches an acceptor's channel for room and for its end.
    pub(crate) fn watch_acceptor(&self, index: usize, fd: RawFd) -> io::Result<()> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll.registry().register(&mut SourceFd(&fd), token(KIND_ACCEPTOR, index), interest)
    }
}
