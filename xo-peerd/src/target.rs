//! The target's side of a hand-off: carries out what `xo_proto::handoff::Target` decides.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use xo_proto::board::node_id;
use xo_proto::handoff::{
    LIMITS, Shortcut, ShortcutEvent, ShortcutState, Target, TargetAction, TargetEvent, TargetState,
};
use xo_proto::ipc::Deliver;
use xo_proto::reason::Reason;
use xo_proto::tls::TlsState;
use xo_proto::wire::{BeginOffload, Handed, HandoffId, HostReady, PeerMessage, Query, Refuse, TargetReady};
use xo_sys::tcp_repair::{self, Repaired};

use crate::acceptor::Place;
use crate::clock::now_ns;
use crate::config::HandlerMode;
use crate::engine::{Engine, ServedKey, is_fresh};
use crate::exec::Reserve;
use crate::onward::Origin;
use crate::pool::Seat;
use crate::records::Layer;
use crate::restore::Entry;
use crate::timers::Timer;

/// How long a restored socket waits for `HOST_READY`, and a finished flow for `CLOSED_ACK`.
const PATIENCE: Duration = Duration::from_secs(2);
const CLOSED_PATIENCE: Duration = Duration::from_secs(60);

/// One connection of another host, served here or about to be.
pub(crate) struct Served {
    machine: Target,
    /// Whose it is.
    pub(crate) origin: Origin,
    /// How its packets get here.
    pub(crate) shortcut: Shortcut,
    /// Moves that its server has asked for before it was confirmed that the connection is here.
    pub(crate) parked: Vec<HandoffId>,
    /// Moves on behalf of the request that waits in it.
    pub(crate) moves: u8,
    pub(crate) begin: Option<Box<BeginOffload>>,
    /// Its TLS, if it has any, until it is sent to the process that accepts the connection.
    pub(crate) tls: Option<TlsState>,
    /// Who does its records, if its handler is a program of its own.
    pub(crate) layer: Option<Layer>,
    /// It has TLS, and so has the port whose server gets it: that begins with a handshake.
    pub(crate) handshake: bool,
    pub(crate) restored: Option<Repaired>,
    /// Early order: a duplicate of the live socket, until the host has confirmed.
    kept: Option<OwnedFd>,
    /// Questions about it answered with "started".
    answers: u32,
    /// Name of the handler.
    pub(crate) handler: String,
    pub(crate) mode: Option<HandlerMode>,
    /// What starting its process takes, for mode `exec`.
    pub(crate) reserve: Option<Reserve>,
    pub(crate) acceptor: Option<usize>,
    /// A worker's room for it, for mode `pool`, until the worker has it.
    pub(crate) seat: Option<Seat>,
    /// The client.
    pub(crate) client: SocketAddr,
    /// Our address of the connection.
    pub(crate) local: SocketAddr,
    /// Where its packets come in: the same, unless it has come home.
    pub(crate) entrance: SocketAddr,
    /// The address that its client knows.
    pub(crate) host: SocketAddr,
    /// Its entry in a steering table, once it has one.
    pub(crate) entry: Option<Entry>,
    /// Who has it.
    pub(crate) place: Place,
    /// Its handler has done with it; the kernel may know it for another minute (TIME-WAIT).
    pub(crate) over: bool,
    /// When it is looked next whether the kernel has forgotten it, and the pause after that.
    pub(crate) ending: Option<(Instant, Duration)>,
    pub(crate) ready: Option<TargetReady>,
    pub(crate) begun_ns: u64,
    /// How much longer than usual `BEGIN_OFFLOAD` was under way.
    pub(crate) late: Duration,
    host_ready_ns: u64,
    started_ns: Option<u64>,
    /// It is in the metrics, and its way was told about.
    pub(crate) counted: bool,
    /// From dump to `HOST_READY`.
    elapsed: Duration,
    pub(crate) refusal: String,
}

impl Served {
    /// A connection about which nothing has been done; `host` is its address at home.
    pub(crate) fn new(
        machine: Target,
        origin: Origin,
        handler: &str,
        client: SocketAddr,
        host: SocketAddr,
    ) -> Served {
        Served {
            machine,
            shortcut: Shortcut::new(origin.is_detour()),
            origin,
            parked: Vec::new(),
            moves: 0,
            begin: None,
            tls: None,
            layer: None,
            handshake: false,
            restored: None,
            kept: None,
            answers: 0,
            handler: handler.to_owned(),
            mode: None,
            reserve: None,
            acceptor: None,
            seat: None,
            client,
            local: host,
            entrance: host,
            host,
            entry: None,
            place: Place::None,
            over: false,
            ending: None,
            ready: None,
            begun_ns: 0,
            late: Duration::ZERO,
            host_ready_ns: 0,
            started_ns: None,
            counted: false,
            elapsed: Duration::ZERO,
            refusal: String::new(),
        }
    }

    /// What is said with it to the process that accepts it. Its secrets go with that, and do not stay here.
    pub(crate) fn deliver(&mut self, delivery: u32) -> Deliver {
        let home = node_id(&self.origin.node);
        Deliver {
            delivery,
            client: self.client,
            guest: !self.origin.here,
            home,
            moves: self.moves,
            tls: self.tls.take(),
            handshake: self.handshake,
        }
    }

    /// Where the hand-off stands.
    pub(crate) fn state(&self) -> TargetState {
        self.machine.state()
    }
}

impl Engine {
    /// `BEGIN_OFFLOAD`.
    pub(crate) fn on_begin(&mut self, index: usize, begin: Box<BeginOffload>) {
        let begun_ns = now_ns();
        let Some(node) = self.node_of(index) else { return };
        let key = (node, begin.id);
        let late = self.lateness(index, begin.sent_ns);
        let fresh = is_fresh(late);
        if self.refused.contains(&key) {
            // The host has asked about it before it came, on another channel: it is not begun any more.
            return;
        }
        if !self.served.contains_key(&key) {
            let origin = Origin::of(&key, begin.home.as_ref(), &self.config.node);
            // A process is started for each connection of an `exec` handler: the host does not wait for that.
            let mode = self.config.handlers.iter().find(|h| h.name == begin.handler).map(|h| &h.mode);
            // What has the kernel's TLS cannot be taken away from a worker again.
            let quick = origin.here
                || match mode {
                    Some(HandlerMode::Attach { .. }) => true,
                    Some(HandlerMode::Pool { .. }) => {
                        begin.record.tls.as_ref().is_none_or(|tls| !self.records.is_kernel(tls))
                    }
                    Some(HandlerMode::Exec { .. }) | None => false,
                };
            let machine = Target::new(begin.start && fresh && quick);
            let mut served =
                Served::new(machine, origin, &begin.handler, begin.record.client, begin.record.local);
            served.begun_ns = begun_ns;
            served.late = late.unwrap_or_default();
            served.moves = begin.moves;
            served.begin = Some(begin);
            self.insert_served(key.clone(), served);
        } else if !fresh {
            // A repeated one; if it is old, it must not keep the connection alive either.
            return;
        }
        self.target_event(&key, &TargetEvent::Begin);
    }

    /// `HOST_READY`.
    pub(crate) fn on_host_ready(&mut self, index: usize, message: &HostReady) {
        let id = message.id;
        let Some(node) = self.node_of(index) else { return };
        let asked = (node, id);
        let Some(key) = self.last_known(&asked, message.hop) else {
            // Restored here once, given up since (time limit, restart): the host must tell the client.
            let detail = "no such hand-off".into();
            return self
                .send_to(index, &PeerMessage::Refuse(Refuse { id, reason: Reason::PeerLost, detail }));
        };
        let Some(served) = self.served.get_mut(&key) else { return };
        let state = served.state();
        if key != asked && state == TargetState::Closing {
            self.target_event(&key, &TargetEvent::PeerBack);
        } else if key != asked || state == TargetState::Done {
            // It has been here, or is, by a way that the sender need not know.
            self.send_to(index, &PeerMessage::Handed(Handed { id, hand_ns: 0, at_ns: now_ns() }));
        } else {
            served.host_ready_ns = now_ns();
            served.elapsed = Duration::from_nanos(message.elapsed_ns);
            let live = served.restored.as_ref().map(AsRawFd::as_raw_fd);
            if let (Some(fd), Some(options)) =
                (live.or(served.kept.as_ref().map(AsRawFd::as_raw_fd)), &message.options)
            {
                tcp_repair::apply_options(fd, options);
            }
            self.target_event(&key, &TargetEvent::HostReady);
        }
        if key == asked {
            // Who still asks has not taken `CLOSED`, or an earlier daemon of it has; or it was given up.
            let given_up = |s: &Served| s.shortcut.state() == ShortcutState::Done;
            if state != TargetState::Closing && self.served.get(&key).is_some_and(|s| given_up(s)) {
                self.send_to_host(&key, &PeerMessage::Closed(id));
            }
            self.shortcut_event(&key, ShortcutEvent::ViaBack);
        }
    }

    /// What is known here of a connection that another machine asks about by its own name for it: of several stays the
    /// last. Nothing, if that is an earlier one than what is asked about: the connection was lost here since.
    fn last_known(&self, asked: &ServedKey, hop: u16) -> Option<ServedKey> {
        let since = |at: u32| (at as u16).wrapping_sub(hop) as i16;
        let detours =
            self.at_home.get(asked).into_iter().flatten().map(|visit| (since(visit.hop), &visit.key));
        let direct = self.served.get(asked).map(|served| (since(served.origin.hop), asked));
        let known = detours.chain(direct).max_by_key(|(since, _)| *since);
        known.filter(|(since, _)| *since >= 0).map(|(_, key)| key.clone())
    }

    /// `QUERY`.
    pub(crate) fn on_query(&mut self, index: usize, query: Query) {
        let fresh = is_fresh(self.lateness(index, query.sent_ns));
        let Some(node) = self.node_of(index) else { return };
        let key = (node, query.id);
        if self.served.contains_key(&key) {
            // An old question must not keep a connection alive that the host may have taken back since.
            if fresh {
                self.target_event(&key, &TargetEvent::Query);
            }
            return;
        }
        self.not_again(key);
        let detail = "no such hand-off".into();
        self.send_to(
            index,
            &PeerMessage::Refuse(Refuse { id: query.id, reason: Reason::PeerTimeout, detail }),
        );
    }

    /// Early order: was it confirmed?
    pub(crate) fn target_fence(&mut self, key: &ServedKey, number: u32) {
        let Some(served) = self.served.get(key).filter(|s| s.answers == number) else { return };
        let kept = served.kept.as_ref();
        let acknowledged =
            kept.is_some_and(|fd| tcp_repair::acknowledged(fd.as_raw_fd()).is_ok_and(|bytes| bytes > 0));
        self.target_event(key, &TargetEvent::Fence { acknowledged });
    }

    /// `ABORT`.
    pub(crate) fn on_abort(&mut self, index: usize, id: HandoffId) {
        if let Some(node) = self.node_of(index) {
            self.target_event(&(node, id), &TargetEvent::Abort);
        }
    }

    /// `CLOSED_ACK`.
    pub(crate) fn on_closed_ack(&mut self, index: usize, id: HandoffId) {
        let Some(node) = self.node_of(index) else { return };
        let name = (node, id);
        if self.served.get(&name).is_some_and(|s| s.shortcut.is_open()) {
            return self.shortcut_event(&name, ShortcutEvent::Released);
        }
        for key in self.named_at_home(&name, |_| true) {
            self.target_event(&key, &TargetEvent::ClosedAck);
        }
    }

    /// A time limit of the target's side ran out.
    pub(crate) fn target_deadline(&mut self, key: &ServedKey) {
        self.target_event(key, &TargetEvent::Deadline);
    }

    /// `CLOSED` may have been lost with a channel: says it again, to one host or to all.
    pub(crate) fn closed_again(&mut self, node: Option<&str>) {
        let waits = |s: &Served| s.state() == TargetState::Closing || s.shortcut.is_open();
        let is_its = |host: &str| node.is_none_or(|n| n == host);
        let all = self.served.iter().filter(|(_, s)| waits(s));
        let keys: Vec<_> = all.map(|(k, s)| (k.clone(), is_its(&k.0), is_its(&s.origin.node))).collect();
        for (key, via, home) in keys {
            // In this order: the home takes `CLOSED` from the connection's place only.
            if home {
                self.shortcut_event(&key, ShortcutEvent::HomeBack);
                self.target_event(&key, &TargetEvent::PeerBack);
            }
            if via {
                self.shortcut_event(&key, ShortcutEvent::ViaBack);
            }
        }
    }

    /// Feeds the state machine and carries out what it says.
    pub(crate) fn target_event(&mut self, key: &ServedKey, event: &TargetEvent) {
        let mut next = Some(event.clone());
        let mut actions = Vec::with_capacity(4);
        while let Some(event) = next.take() {
            let Some(served) = self.served.get_mut(key) else { return };
            served.machine.on(&event, &mut actions);
            log::trace!("{} {} {:x}: {event:?}: {:?}", served.client, key.0, key.1, served.state());
            self.got_further = true;
            for action in actions.drain(..) {
                next = self.target_action(key, action);
                if next.is_some() {
                    break;
                }
            }
        }
        self.forget_served(key);
    }

    /// The hand-off is not begun any more, should `BEGIN_OFFLOAD` come (again).
    pub(crate) fn not_again(&mut self, key: ServedKey) {
        self.refused.add(key);
    }

    fn target_action(&mut self, key: &ServedKey, action: TargetAction) -> Option<TargetEvent> {
        match action {
            TargetAction::Restore => return Some(TargetEvent::Restored(self.restore(key))),
            TargetAction::SendReady => {
                if let Some(ready) = self.served.get(key).and_then(|s| s.ready.clone()) {
                    self.send_to_host(key, &PeerMessage::TargetReady(ready));
                }
                self.at(Instant::now() + PATIENCE, Timer::TargetDeadline(key.clone()));
            }
            TargetAction::Refuse(reason) => {
                let detail = self.served.get_mut(key).map(|s| std::mem::take(&mut s.refusal));
                let detail = detail.unwrap_or_default();
                log::debug!("refusing a connection of {}: {reason} {detail}", key.0);
                self.send_to_host(key, &PeerMessage::Refuse(Refuse { id: key.1, reason, detail }));
            }
            TargetAction::Start => return self.start(key).map(TargetEvent::Handed),
            TargetAction::SendStarted => self.send_started(key),
            TargetAction::SendHanded => self.send_handed(key),
            TargetAction::Keep => {
                if let Some(served) = self.served.get_mut(key) {
                    served.kept = None;
                }
            }
            TargetAction::Confirmed => self.confirmed(key),
            TargetAction::Withdraw => self.withdraw(key),
            TargetAction::Discard => {
                if let Some(served) = self.served.get_mut(key) {
                    served.restored = None;
                    served.layer = None;
                    served.seat = None;
                }
                self.remove_entry(key);
            }
            TargetAction::SendClosed => {
                // Lost where it had moved on to: the next daemon must know that somebody is to be told.
                if let Some(Entry::Rewrite(flow)) = self.served.get(key).and_then(|s| s.entry) {
                    let _ = self.steer.note_left(&flow, key.1, false);
                }
                self.send_closed(key);
                self.at(Instant::now() + CLOSED_PATIENCE, Timer::TargetDeadline(key.clone()));
            }
            TargetAction::RemoveRewrite => {
                if !self.served.get(key).is_some_and(|s| s.shortcut.is_open()) {
                    self.remove_entry(key);
                }
            }
            TargetAction::NoteLeft => {
                self.abandon_place(key);
                if let Some(Entry::Rewrite(flow)) = self.served.get(key).and_then(|s| s.entry)
                    && let Err(e) = self.steer.note_left(&flow, key.1, true)
                {
                    log::error!("noting that a connection of {} has left: {e}", key.0);
                }
            }
        }
        None
    }

    pub(crate) fn send_to_host(&mut self, key: &ServedKey, message: &PeerMessage) {
        if let Some(index) = self.connection_to(&key.0) {
            self.send_to(index, message);
        }
    }

    /// Hands the socket over and leaves repair mode. `None` while a handler process is being started.
    fn start(&mut self, key: &ServedKey) -> Option<Result<(), Reason>> {
        let served = self.served.get_mut(key)?;
        let Some(restored) = served.restored.take() else { return Some(Err(Reason::Closed)) };
        let (client, mode, acceptor) = (served.client, served.mode.take(), served.acceptor.take());
        let elapsed = served.elapsed;
        match mode {
            Some(HandlerMode::Attach { port, .. }) => {
                let started = self.start_attached(key, (port, acceptor), restored, elapsed);
                Some(started.and_then(|socket| self.started(key, socket)))
            }
            Some(HandlerMode::Pool { .. }) => {
                let started = self.start_pooled(key, restored, elapsed);
                Some(started.and_then(|socket| self.started(key, socket)))
            }
            Some(HandlerMode::Exec { command }) => match live(restored, elapsed, client) {
                Ok(socket) => {
                    allow_reuse(&socket, client);
                    let instead = served.layer.as_mut().and_then(|layer| {
                        layer.begin();
                        layer.take_end()
                    });
                    self.exec(key, command, instead.unwrap_or(socket));
                    None
                }
                Err(reason) => Some(Err(reason)),
            },
            None => Some(Err(Reason::NoHandler)),
        }
    }

    /// The handler has it. In the early order it can still be taken away.
    fn started(&mut self, key: &ServedKey, socket: OwnedFd) -> Result<(), Reason> {
        let served = self.served.get_mut(key).ok_or(Reason::Closed)?;
        served.started_ns = Some(now_ns());
        served.kept = served.machine.early().then_some(socket);
        Ok(())
    }

    /// First into the handler's hands, where it is mute while in repair mode, then live: if this daemon died in between the
    /// other way round, the client would get a reset.
    fn start_attached(
        &mut self,
        key: &ServedKey,
        (port, acceptor): (u16, Option<usize>),
        restored: Repaired,
        elapsed: Duration,
    ) -> Result<OwnedFd, Reason> {
        let client = self.served.get(key).ok_or(Reason::Closed)?.client;
        let passed = restored.try_clone().map_err(|e| {
            log::error!("passing the connection of {client} on: {e}");
            Reason::RestoreFailed
        })?;
        self.attach(key, port, acceptor, client, passed).map_err(|e| {
            log::warn!("handing the connection of {client} over: {e}");
            if e.kind() == ErrorKind::StorageFull { Reason::TableFull } else { Reason::NoHandler }
        })?;
        let socket = live(restored, elapsed, client)?;
        allow_reuse(&socket, client);
        Ok(socket)
    }

    /// `TARGET_READY` of the early order.
    fn send_started(&mut self, key: &ServedKey) {
        let Some(served) = self.served.get_mut(key) else { return };
        let (id, local) = (key.1, served.entrance);
        // An earlier daemon's has no times.
        let ready = served.ready.get_or_insert(TargetReady {
            id,
            local,
            restore_ns: 0,
            rewrite_ns: 0,
            total_ns: 0,
            started_ns: None,
        });
        ready.started_ns = served.started_ns.or(Some(now_ns()));
        if served.answers == 0 && served.begun_ns != 0 {
            ready.total_ns = now_ns().saturating_sub(served.begun_ns);
        }
        served.answers += 1;
        let (ready, number) = (ready.clone(), served.answers);
        self.send_to_host(key, &PeerMessage::TargetReady(ready));
        self.at(Instant::now() + LIMITS.fence, Timer::TargetFence(key.clone(), number));
    }

    /// Takes a live connection away from its handler, silently: the host serves it.
    fn withdraw(&mut self, key: &ServedKey) {
        if let Some(served) = self.served.get_mut(key) {
            log::warn!("the connection of {} was not confirmed by {}: withdrawn", served.client, key.0);
            if let Some(kept) = served.kept.take() {
                empty(&kept, served.client);
            }
            served.layer = None;
            let parked = std::mem::take(&mut served.parked);
            self.abandon_place(key);
            self.hopeless(parked);
        }
        self.remove_entry(key);
    }

    /// A connection is not its process's any more: its delivery slot is free once the process has closed the emptied socket.
    pub(crate) fn abandon_place(&mut self, key: &ServedKey) {
        let Some(served) = self.served.get_mut(key) else { return };
        if matches!(served.place, Place::Process { .. }) {
            self.abandoned.push(std::mem::replace(&mut served.place, Place::None));
        }
    }

    /// The connection stays here.
    fn confirmed(&mut self, key: &ServedKey) {
        if let Some(served) = self.served.get_mut(key).filter(|s| !s.counted) {
            served.counted = true;
            if served.origin.here {
                self.metrics.returned();
            } else {
                self.metrics.accepted();
            }
            self.shortcut_event(key, ShortcutEvent::Confirmed);
            self.start_parked(key);
        }
    }

    fn send_handed(&mut self, key: &ServedKey) {
        let at_ns = now_ns();
        let Some(served) = self.served.get_mut(key) else { return };
        let hand_ns = at_ns.saturating_sub(served.host_ready_ns);
        self.send_to_host(key, &PeerMessage::Handed(Handed { id: key.1, hand_ns, at_ns }));
    }
}

/// Leaves repair mode.
pub(crate) fn live(restored: Repaired, elapsed: Duration, client: SocketAddr) -> Result<OwnedFd, Reason> {
    // A response follows at once, so no window probe is needed.
    restored.start(false, elapsed).map(OwnedFd::from).map_err(|e| {
        log::error!("starting the connection of {client}: {e}");
        Reason::RestoreFailed
    })
}

/// A server that is restarted must be able to bind the port of connections that it had.
pub(crate) fn allow_reuse(socket: &OwnedFd, client: SocketAddr) {
    if let Err(e) = tcp_repair::reuse_address(socket.as_raw_fd()) {
        log::warn!("SO_REUSEADDR for the connection of {client}: {e}");
    }
}

/// Empties a live socket in place, without a packet.
pub(crate) fn empty(socket: &OwnedFd, client: SocketAddr) {
    if let Err(e) = tcp_repair::withdraw(socket.as_raw_fd()) {
        log::error!("withdrawing the connection of {client}: {e}");
    }
}
