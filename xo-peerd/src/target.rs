//! The target's side of a hand-off: carries out what `xo_proto::handoff::Target` decides.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use xo_bpf_abi::FlowKey;
use xo_proto::handoff::{LIMITS, Target, TargetAction, TargetEvent, TargetState};
use xo_proto::reason::Reason;
use xo_proto::wire::{BeginOffload, Handed, HandoffId, HostReady, PeerMessage, Query, Refuse, TargetReady};
use xo_sys::tcp_repair::{self, Repaired};

use crate::acceptor::Place;
use crate::clock::now_ns;
use crate::config::HandlerMode;
use crate::engine::{Engine, ServedKey, Timer};
use crate::steer::{SteerError, flow_key};

/// How long a restored socket waits for `HOST_READY`, and a finished flow for `CLOSED_ACK`.
const PATIENCE: Duration = Duration::from_secs(2);
const CLOSED_PATIENCE: Duration = Duration::from_secs(60);
/// Hand-offs remembered as refused or over.
const MOST_REFUSED: usize = 4096;
/// First and longest pause between two looks whether the kernel has forgotten a closed connection.
const FIRST_LOOK: Duration = Duration::from_millis(10);
const LONGEST_LOOK: Duration = Duration::from_secs(1);

/// One connection of another host, served here or about to be.
pub(crate) struct Served {
    machine: Target,
    begin: Option<Box<BeginOffload>>,
    restored: Option<Repaired>,
    /// Early order: a duplicate of the live socket, until the host has confirmed.
    kept: Option<OwnedFd>,
    /// Questions about it answered with "started".
    answers: u32,
    /// Name of the handler.
    pub(crate) handler: String,
    mode: Option<HandlerMode>,
    acceptor: Option<usize>,
    /// The client.
    pub(crate) client: SocketAddr,
    /// Our address of the connection.
    pub(crate) local: SocketAddr,
    /// The host's address of the connection.
    pub(crate) host: SocketAddr,
    /// Its key in the rewrite table, once it has an entry there.
    pub(crate) rewrite: Option<FlowKey>,
    /// Who has it.
    pub(crate) place: Place,
    ending: Option<(Instant, Duration)>,
    ready: Option<TargetReady>,
    begun_ns: u64,
    host_ready_ns: u64,
    started_ns: Option<u64>,
    /// It is in the metrics.
    counted: bool,
    /// From dump to `HOST_READY`.
    elapsed: Duration,
    refusal: String,
}

impl Served {
    /// A connection about which nothing has been done; `host` is its address there.
    pub(crate) fn new(machine: Target, handler: &str, client: SocketAddr, host: SocketAddr) -> Served {
        Served {
            machine,
            begin: None,
            restored: None,
            kept: None,
            answers: 0,
            handler: handler.to_owned(),
            mode: None,
            acceptor: None,
            client,
            local: host,
            host,
            rewrite: None,
            place: Place::None,
            ending: None,
            ready: None,
            begun_ns: 0,
            host_ready_ns: 0,
            started_ns: None,
            counted: false,
            elapsed: Duration::ZERO,
            refusal: String::new(),
        }
    }

    /// Looks from now on whether the kernel still knows it: nobody will say when it is closed.
    pub(crate) fn watch(&mut self) {
        self.ending = Some((Instant::now(), LONGEST_LOOK));
    }

    /// Where the hand-off stands.
    pub(crate) fn state(&self) -> TargetState {
        self.machine.state()
    }
}

impl Engine {
    /// `BEGIN_OFFLOAD`.
    pub(crate) fn on_begin(&mut self, index: usize, begin: BeginOffload) {
        let begun_ns = now_ns();
        let Some(node) = self.node_of(index) else { return };
        let key = (node, begin.id);
        let fresh = self.is_fresh(index, begin.sent_ns);
        if self.refused.contains(&key) {
            // The host has asked about it before it came, on another channel: it is not begun any more.
            return;
        }
        if !self.served.contains_key(&key) {
            // A process is started for each connection of an `exec` handler: the host does not wait for that.
            let mode = self.config.handlers.iter().find(|h| h.name == begin.handler).map(|h| &h.mode);
            let early = begin.start && fresh && matches!(mode, Some(HandlerMode::Attach { .. }));
            let mut served =
                Served::new(Target::new(early), &begin.handler, begin.record.client, begin.record.local);
            served.begun_ns = begun_ns;
            served.begin = Some(Box::new(begin));
            self.served.insert(key.clone(), served);
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
        let key = (node, id);
        if let Some(served) = self.served.get_mut(&key) {
            served.host_ready_ns = now_ns();
            served.elapsed = Duration::from_nanos(message.elapsed_ns);
            let live = served.restored.as_ref().map(AsRawFd::as_raw_fd);
            if let (Some(fd), Some(options)) =
                (live.or(served.kept.as_ref().map(AsRawFd::as_raw_fd)), &message.options)
            {
                tcp_repair::apply_options(fd, options);
            }
            self.target_event(&key, &TargetEvent::HostReady);
        } else {
            // Restored here once, given up since (time limit, restart): the host must tell the client.
            let detail = "no such hand-off".into();
            self.send_to(index, &PeerMessage::Refuse(Refuse { id, reason: Reason::PeerLost, detail }));
        }
    }

    /// `QUERY`.
    pub(crate) fn on_query(&mut self, index: usize, query: Query) {
        let fresh = self.is_fresh(index, query.sent_ns);
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
        if let Some(node) = self.node_of(index) {
            self.target_event(&(node, id), &TargetEvent::ClosedAck);
        }
    }

    /// A time limit of the target's side ran out.
    pub(crate) fn target_deadline(&mut self, key: &ServedKey) {
        self.target_event(key, &TargetEvent::Deadline);
    }

    /// `CLOSED` may have been lost with a channel: says it again, to one host or to all.
    pub(crate) fn closed_again(&mut self, node: Option<&str>) {
        let waits = |s: &Served| s.state() == TargetState::Closing;
        let is_its = |host: &str| node.is_none_or(|n| n == host);
        let keys: Vec<_> =
            self.served.iter().filter(|(k, s)| is_its(&k.0) && waits(s)).map(|(k, _)| k.clone()).collect();
        for key in keys {
            self.target_event(&key, &TargetEvent::PeerBack);
        }
    }

    /// Feeds the state machine and carries out what it says.
    pub(crate) fn target_event(&mut self, key: &ServedKey, event: &TargetEvent) {
        let mut next = Some(event.clone());
        let mut actions = Vec::with_capacity(4);
        while let Some(event) = next.take() {
            let Some(served) = self.served.get_mut(key) else { return };
            let before = served.state();
            served.machine.on(&event, &mut actions);
            if (before == TargetState::Ready) != (served.state() == TargetState::Ready) {
                if before == TargetState::Ready { self.in_flight -= 1 } else { self.in_flight += 1 }
            }
            for action in actions.drain(..) {
                next = self.target_action(key, action);
                if next.is_some() {
                    break;
                }
            }
        }
        if self.served.get(key).is_some_and(|s| s.state() == TargetState::Done) {
            self.served.remove(key);
            self.not_again(key.clone());
        }
    }

    /// The hand-off is not begun any more, should `BEGIN_OFFLOAD` come (again).
    fn not_again(&mut self, key: ServedKey) {
        self.refused.push_back(key);
        if self.refused.len() > MOST_REFUSED {
            self.refused.pop_front();
        }
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
                self.confirmed(key);
            }
            TargetAction::Withdraw => self.withdraw(key),
            TargetAction::Discard => {
                if let Some(served) = self.served.get_mut(key) {
                    served.restored = None;
                }
                self.remove_rewrite(key);
            }
            TargetAction::SendClosed => {
                self.send_to_host(key, &PeerMessage::Closed(key.1));
                self.at(Instant::now() + CLOSED_PATIENCE, Timer::TargetDeadline(key.clone()));
            }
            TargetAction::RemoveRewrite => self.remove_rewrite(key),
        }
        None
    }

    fn send_to_host(&mut self, key: &ServedKey, message: &PeerMessage) {
        if let Some(index) = self.connection_to(&key.0) {
            self.send_to(index, message);
        }
    }

    fn restore(&mut self, key: &ServedKey) -> Result<(), Reason> {
        let stopping = self.is_stopping();
        let served = self.served.get_mut(key).ok_or(Reason::Closed)?;
        if stopping {
            return Err(Reason::Stopping);
        }
        let begin = served.begin.take().ok_or(Reason::Closed)?;
        let handler = self.config.handlers.iter().find(|h| h.name == begin.handler);
        let mode = handler.map(|h| h.mode.clone()).ok_or_else(|| {
            served.refusal = format!("no handler '{}' in the configuration", begin.handler);
            Reason::NoHandler
        })?;
        let (bind, v6_socket, acceptor) = match &mode {
            HandlerMode::Attach { port } => {
                let found = self.pick_acceptor(*port, begin.record.client);
                let Some((number, listener)) = found else {
                    if let Some(served) = self.served.get_mut(key) {
                        served.refusal = format!("no process under the library listens on port {port}");
                    }
                    return Err(Reason::NoHandler);
                };
                let ip = specific(listener.ip(), begin.record.client, &self.config.addresses);
                (ip.map(|ip| SocketAddr::new(ip, *port)), listener.is_ipv6(), Some(number))
            }
            HandlerMode::Exec { .. } => {
                let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
                let ip = specific(any, begin.record.client, &self.config.addresses);
                (ip.map(|ip| SocketAddr::new(ip, begin.record.local.port())), false, None)
            }
        };
        let v6_socket = v6_socket && begin.record.client.is_ipv4();
        let served = self.served.get_mut(key).ok_or(Reason::Closed)?;
        let Some(bind) = bind else {
            served.refusal = "no address of the client's family in `addresses`".into();
            return Err(Reason::TargetUnwilling);
        };
        let t0 = now_ns();
        let elapsed = Duration::from_nanos(begin.elapsed_ns + t0.saturating_sub(served.begun_ns));
        let restored = tcp_repair::restore(&begin.record, bind, v6_socket, elapsed, &mut self.spare)
            .map_err(|e| {
                served.refusal = e.to_string();
                Reason::RestoreFailed
            })?;
        let t1 = now_ns();
        let local = restored.local();
        let rewrite = flow_key(begin.record.client, local);
        let names = (self.state.number(&key.0, None), self.state.number(&begin.handler, None) as u16);
        self.steer.rewrite(&rewrite, key.1, names, begin.record.local).map_err(|e| {
            served.refusal = e.to_string();
            match e {
                SteerError::Full | SteerError::Exists => Reason::TableFull,
                _ => Reason::RestoreFailed,
            }
        })?;
        let t2 = now_ns();
        let ready = TargetReady {
            id: key.1,
            local,
            restore_ns: t1 - t0,
            rewrite_ns: t2 - t1,
            total_ns: t2.saturating_sub(served.begun_ns),
            started_ns: None,
        };
        served.restored = Some(restored);
        served.rewrite = Some(rewrite);
        served.local = local;
        served.mode = Some(mode);
        served.acceptor = acceptor;
        served.ready = Some(ready);
        Ok(())
    }

    /// Hands the socket over and leaves repair mode. `None` while a handler process is being started.
    fn start(&mut self, key: &ServedKey) -> Option<Result<(), Reason>> {
        let served = self.served.get_mut(key)?;
        let Some(restored) = served.restored.take() else { return Some(Err(Reason::Closed)) };
        let (client, mode, acceptor) = (served.client, served.mode.take(), served.acceptor.take());
        let (elapsed, early) = (served.elapsed, served.machine.early());
        let live = |restored: Repaired| {
            // A response follows at once, so no window probe is needed.
            restored.start(false, elapsed).map(OwnedFd::from).map_err(|e| {
                log::error!("starting the connection of {client}: {e}");
                Reason::RestoreFailed
            })
        };
        match mode {
            Some(HandlerMode::Attach { port }) => {
                // First into the handler's hands, where it is mute while in repair mode, then live: if this daemon
                // died in between the other way round, the client would get a reset.
                let passed = match restored.try_clone() {
                    Ok(passed) => passed,
                    Err(e) => {
                        log::error!("passing the connection of {client} on: {e}");
                        return Some(Err(Reason::RestoreFailed));
                    }
                };
                if let Err(e) = self.attach(key, port, acceptor, client, passed) {
                    log::warn!("handing the connection of {client} over: {e}");
                    return Some(Err(Reason::NoHandler));
                }
                let socket = match live(restored) {
                    Ok(socket) => socket,
                    Err(reason) => return Some(Err(reason)),
                };
                let served = self.served.get_mut(key)?;
                served.started_ns = Some(now_ns());
                allow_reuse(&socket, client);
                served.kept = early.then_some(socket);
                Some(Ok(()))
            }
            Some(HandlerMode::Exec { command }) => match live(restored) {
                Ok(socket) => {
                    allow_reuse(&socket, client);
                    self.exec(key, command, socket);
                    None
                }
                Err(reason) => Some(Err(reason)),
            },
            None => Some(Err(Reason::NoHandler)),
        }
    }

    /// `TARGET_READY` of the early order.
    fn send_started(&mut self, key: &ServedKey) {
        let Some(served) = self.served.get_mut(key) else { return };
        let (id, local) = (key.1, served.local);
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
            let place = std::mem::replace(&mut served.place, Place::None);
            self.abandoned.push(place);
        }
        self.remove_rewrite(key);
    }

    /// The connection stays here.
    fn confirmed(&mut self, key: &ServedKey) {
        if let Some(served) = self.served.get_mut(key).filter(|s| !s.counted) {
            served.counted = true;
            self.metrics.accepted();
        }
    }

    fn send_handed(&mut self, key: &ServedKey) {
        let at_ns = now_ns();
        let Some(served) = self.served.get_mut(key) else { return };
        let hand_ns = at_ns.saturating_sub(served.host_ready_ns);
        self.confirmed(key);
        self.send_to_host(key, &PeerMessage::Handed(Handed { id: key.1, hand_ns, at_ns }));
    }

    fn remove_rewrite(&mut self, key: &ServedKey) {
        let Some(rewrite) = self.served.get_mut(key).and_then(|s| s.rewrite.take()) else { return };
        if let Err(e) = self.steer.remove_rewrite(&rewrite, key.1) {
            log::error!("removing a source rewrite: {e}");
        }
    }

    /// Starts to look whether the kernel has forgotten the connection.
    pub(crate) fn expect_end(&mut self, key: &ServedKey) {
        if let Some(served) = self.served.get_mut(key)
            && served.ending.is_none()
        {
            served.ending = Some((Instant::now(), FIRST_LOOK));
        }
    }

    /// Every tick: connections whose handler has closed them, and those that are closing.
    pub(crate) fn look_for_ends(&mut self, now: Instant) {
        self.reap_children();
        let over = self.abandoned.extract_if(.., |place| place.closed(&self.libraries)).collect::<Vec<_>>();
        over.into_iter().for_each(|place| place.free(&mut self.libraries));
        let mut gone = Vec::new();
        for (key, served) in &mut self.served {
            if served.state() != TargetState::Served {
                continue;
            }
            if served.ending.is_none() && served.place.closed(&self.libraries) {
                served.ending = Some((now, FIRST_LOOK));
            }
            let Some((when, pause)) = served.ending else { continue };
            if now < when {
                continue;
            }
            match self.diag.state(served.local, served.client) {
                Ok(None) => gone.push(key.clone()),
                Ok(Some(_)) => served.ending = Some((now + pause, (pause * 2).min(LONGEST_LOOK))),
                Err(e) => {
                    log::error!("sock_diag: {e}");
                    served.ending = Some((now + LONGEST_LOOK, LONGEST_LOOK));
                }
            }
        }
        for key in gone {
            self.ended(&key);
        }
    }

    /// Now and then: connections whose end nobody reported.
    pub(crate) fn sweep_served(&mut self, now: Instant) {
        self.closed_again(None);
        for served in self.served.values_mut() {
            if served.state() == TargetState::Served
                && served.ending.is_none()
                && matches!(self.diag.state(served.local, served.client), Ok(None))
            {
                served.ending = Some((now, FIRST_LOOK));
            }
        }
    }

    fn ended(&mut self, key: &ServedKey) {
        if let Some(served) = self.served.get_mut(key) {
            let place: Place = std::mem::replace(&mut served.place, Place::None);
            place.free(&mut self.libraries);
        }
        self.target_event(key, &TargetEvent::SocketGone);
    }
}

/// A server that is restarted must be able to bind the port of connections that it had.
fn allow_reuse(socket: &OwnedFd, client: SocketAddr) {
    if let Err(e) = tcp_repair::reuse_address(socket.as_raw_fd()) {
        log::warn!("SO_REUSEADDR for the connection of {client}: {e}");
    }
}

/// Empties a live socket in place, without a packet.
fn empty(socket: &OwnedFd, client: SocketAddr) {
    if let Err(e) = tcp_repair::withdraw(socket.as_raw_fd()) {
        log::error!("withdrawing the connection of {client}: {e}");
    }
}

/// The address to restore on: the listener's own if it has one, else ours of the client's family.
fn specific(listener: IpAddr, client: SocketAddr, addresses: &[IpAddr]) -> Option<IpAddr> {
    let listener = listener.to_canonical();
    let wildcard =
        listener == IpAddr::V4(Ipv4Addr::UNSPECIFIED) || listener == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    if wildcard {
        addresses.iter().copied().find(|a| a.is_ipv4() == client.is_ipv4())
    } else {
        Some(listener)
    }
}
