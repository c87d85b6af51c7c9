//! The host's side of a hand-off: carries out what `xo_proto::handoff::Host` decides.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use xo_bpf_abi::FlowKey;
use xo_proto::conn::{ConnRecord, SockOptions};
use xo_proto::handoff::{Host, HostAction, HostEvent, HostState, LIMITS, TargetEvent};
use xo_proto::ipc::{Destination, Offload};
use xo_proto::reason::Reason;
use xo_proto::slot;
use xo_proto::tls::TlsState;
use xo_proto::wire::{Handed, HandoffId, Home, HostReady, PeerMessage, Query, Refuse, TargetReady};
use xo_proto::worth::Worth;
use xo_sys::slots::SlotTable;
use xo_sys::tcp_repair::{self, Ends};

mod actions;
mod sweep;

use self::actions::{dump, stay, vacate};
use crate::clock::now_ns;
use crate::config::Order;
use crate::engine::{Engine, ServedKey};
use crate::flower::Then;
use crate::held::HeldPacket;
use crate::metrics::Kind;
use crate::steer::flow_key;
use crate::timers::Timer;
use crate::times::{Times, steps};

/// Longest queues that travel, bytes; the rest of `MAX_PEER_MESSAGE` is for everything else.
const MAX_QUEUES: usize = 15 << 20;
/// Most `QUERY`s about one hand-off.
const MOST_QUESTIONS: u32 = 5;
/// How long a target that serves a connection, but whose daemon is away, is waited for; and how long the library of a
/// connection that was found is.
pub(crate) const RESTART_PATIENCE: Duration = Duration::from_secs(5);
/// Packets that were sent to this machine before their home redirected them have arrived after so long.
const LINGER: Duration = Duration::from_secs(1);
/// Where a verdict is to be written: table, slot, generation.
type Verdict = (Rc<SlotTable>, u32, u32);

fn decide((slots, index, generation): &Verdict, state: u32) {
    slots.decide(*index, *generation, state);
}

/// One connection offloaded from here, or about to be.
pub(crate) struct HostFlow {
    machine: Host,
    /// The server's socket, until it is emptied.
    socket: Option<OwnedFd>,
    verdict: Option<Verdict>,
    ends: Ends,
    options: Option<SockOptions>,
    /// The client.
    pub(crate) client: SocketAddr,
    /// This machine's address of the connection.
    pub(crate) local: SocketAddr,
    /// Its key in the flow table.
    pub(crate) key: FlowKey,
    /// The target's node name.
    pub(crate) target: String,
    /// Peer address of the target's daemon; `None`: it is a home, which dials itself.
    pub(crate) address: Option<SocketAddr>,
    handler: String,
    /// The policy's word on when it is worth a flow rule; a daemon that has found the connection does not know it.
    pub(crate) worth: Option<Worth>,
    /// Its TLS, if it has any.
    tls: Option<TlsState>,
    /// How much of the record that its receive queue begins with its server has read, bytes.
    used: usize,
    /// For a guest that moves on or goes home: what it is here, and whose.
    pub(crate) guest: Option<(ServedKey, Home)>,
    /// The address that the client talks to, in its home.
    public: SocketAddr,
    /// Moves on behalf of the request at hand, this one included.
    moves: u8,
    /// The last move that its entry is owed to; 1 is the first.
    pub(crate) hop: u32,
    record: Option<Box<ConnRecord>>,
    /// When the target was last asked: `BEGIN_OFFLOAD` or `QUERY`.
    asked: Option<Instant>,
    /// How often it was asked by `QUERY`.
    pub(crate) questions: u32,
    /// When this daemon got to know it.
    pub(crate) since: Instant,
    /// Found, and its library may still have its socket: nothing is settled before that is known.
    pub(crate) unseen: bool,
    /// An answer was put off because of that.
    pub(crate) put_off: bool,
    /// Packets held for it, in order of arrival.
    pub(crate) held: Vec<HeldPacket>,
    /// It gets no flow rule before.
    pub(crate) rest_until: Option<Instant>,
    /// Where its packets go, once redirected.
    pub(crate) to: Option<SocketAddr>,
    times: Times,
    /// Its offload is in the metrics.
    counted: bool,
}

impl HostFlow {
    /// A connection about which nothing has been done.
    pub(crate) fn new(machine: Host, ends: Ends, target: String, address: Option<SocketAddr>) -> HostFlow {
        HostFlow {
            machine,
            socket: None,
            verdict: None,
            ends,
            options: None,
            client: ends.client,
            local: ends.local,
            key: flow_key(ends.client, ends.local),
            target,
            address,
            handler: String::new(),
            worth: None,
            tls: None,
            used: 0,
            guest: None,
            public: ends.local,
            moves: 0,
            hop: 1,
            record: None,
            asked: None,
            questions: 0,
            since: Instant::now(),
            unseen: false,
            put_off: false,
            held: Vec::new(),
            rest_until: None,
            to: None,
            times: Times::default(),
            counted: false,
        }
    }

    /// Makes it the hand-off of a guest.
    pub(crate) fn of_guest(&mut self, key: ServedKey, home: Home, public: SocketAddr) {
        self.machine = self.machine.clone().of_guest();
        self.guest = Some((key, home));
        self.public = public;
    }

    /// Is the connection's place known to be elsewhere?
    pub(crate) fn is_away(&self) -> bool {
        matches!(self.state(), HostState::Redirected | HostState::Offloaded)
    }

    /// Where the hand-off stands.
    pub(crate) fn state(&self) -> HostState {
        self.machine.state()
    }

    /// The client has acknowledged bytes that this host never sent: the target's.
    fn is_served(&self) -> bool {
        self.record.as_ref().is_some_and(|r| self.held.iter().any(|p| p.acknowledges(r.tcp.snd_seq)))
    }
}

impl Engine {
    /// The library asks for a hand-off.
    pub(crate) fn on_offload(&mut self, index: usize, offload: Offload, socket: OwnedFd) {
        let received = now_ns();
        let Some(slots) = self.libraries.get(index).and_then(|l| l.slots.clone()) else { return };
        let Ok(ends) = tcp_repair::ends(socket.as_raw_fd()) else {
            slots.decide(offload.slot, offload.generation, slot::stay(Reason::NotEstablished));
            let _ = tcp_repair::poke(socket.as_raw_fd());
            return self.metrics.refused(Reason::NotEstablished);
        };
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        let (target, address) = match offload.to {
            Destination::Target { node, address } => {
                self.targets.wanted(&node, address);
                (node, Some(address))
            }
            Destination::Home => (String::new(), None),
        };
        let mut flow = HostFlow::new(Host::new(false), ends, target, address);
        flow.handler = offload.handler;
        flow.worth = offload.flower_after;
        flow.tls = offload.tls;
        flow.used = offload.used as usize;
        flow.moves = offload.moves.saturating_add(1);
        flow.socket = Some(socket);
        flow.verdict = Some((slots, offload.slot, offload.generation));
        flow.times = Times { decided: offload.decided_ns, received, ..Times::default() };
        self.hosted.insert(id, Box::new(flow));
        if self.is_stopping() {
            return self.host_event(id, HostEvent::Hopeless(Reason::Stopping));
        }
        self.targets.one_leaves(&self.config.node);
        self.start_when_settled(id);
    }

    /// A library has a connection whose hand-off an earlier daemon did not finish.
    pub(crate) fn on_recover(&mut self, index: usize, slot: u32, generation: u32, socket: OwnedFd) {
        let Some(slots) = self.libraries.get(index).and_then(|l| l.slots.clone()) else { return };
        let verdict = (slots, slot, generation);
        let fd = socket.as_raw_fd();
        let known = tcp_repair::ends(fd).ok().and_then(|ends| {
            let id = self.steer.flow(&flow_key(ends.client, ends.local))?.flow_id;
            self.hosted.get_mut(&id).map(|flow| (id, ends, flow))
        });
        match known {
            Some((id, ends, flow)) => {
                flow.ends = ends;
                // For a reset, should the target have lost it.
                flow.record = tcp_repair::dump(fd, &ends, MAX_QUEUES).ok().map(Box::new);
                if let Some(record) = &mut flow.record {
                    record.local = flow.public;
                }
                flow.socket = Some(socket);
                flow.verdict = Some(verdict);
                if flow.to.is_some() {
                    vacate(flow);
                }
                self.seen(id);
            }
            None => {
                // Settled, or never begun.
                if let Err(e) = tcp_repair::resume(fd) {
                    log::error!("taking a connection back: {e}");
                }
                decide(&verdict, slot::stay(Reason::DaemonLost));
                let _ = tcp_repair::poke(fd);
                self.metrics.refused(Reason::DaemonLost);
            }
        }
    }

    /// The target's daemon is connected: go.
    pub(crate) fn begin_on(&mut self, id: HandoffId, peer: usize) {
        let Some(flow) = self.hosted.get_mut(&id).filter(|f| f.state() == HostState::Asked) else { return };
        let theirs = self.peers.get_mut(peer);
        let hello = theirs.as_ref().and_then(|p| p.hello.as_ref());
        if hello.is_none_or(|h| h.usec_timestamps != self.hello.usec_timestamps) {
            return self.host_event(id, HostEvent::Hopeless(Reason::PeerIncompatible));
        }
        // Whoever has the secrets can read all that was ever said under them.
        let is_home = || flow.guest.as_ref().is_some_and(|(_, home)| home.node == flow.target);
        let is_named = || self.policy.is_none() || self.targets.is_in_policy(&flow.target);
        let is_secure = theirs.as_ref().is_some_and(|p| p.is_secure());
        if flow.tls.is_some() && !(is_secure && (is_home() || is_named())) {
            return self.host_event(id, HostEvent::Hopeless(Reason::TlsInsecure));
        }
        let mut early = self.config.handoff.order == Order::Early;
        if let Some(peer) = theirs.filter(|p| early && !p.is_proven()) {
            if peer.is_on_trial() {
                // The strict order takes a round trip more too, and is lost with the target's daemon in the middle of it.
                peer.waiting.push(id);
                return self.at(Instant::now() + LIMITS.sample, Timer::Settled(id));
            }
            early = false;
        }
        let machine = Host::new(early);
        flow.machine = if flow.guest.is_some() { machine.of_guest() } else { machine };
        self.host_event(id, HostEvent::Start);
    }

    /// `TARGET_READY`.
    pub(crate) fn on_target_ready(&mut self, index: usize, ready: &TargetReady) {
        let now = now_ns();
        if self.puts_off(ready.id) {
            return;
        }
        let Some(flow) = self.hosted.get_mut(&ready.id) else {
            // Taken back, or reset: nobody must serve it there.
            return self.send_to(index, &PeerMessage::Abort(ready.id));
        };
        if !self.peers.get(index).is_some_and(|p| p.is_node(&flow.target)) {
            return;
        }
        flow.times.ready = now;
        flow.times.restore = ready.restore_ns;
        flow.times.rewrite = ready.rewrite_ns;
        flow.times.at_target = ready.total_ns;
        flow.times.started = ready.started_ns;
        let event = HostEvent::TargetReady {
            local: ready.local,
            started: ready.started_ns.is_some(),
            timely: flow.asked.is_some_and(|asked| asked.elapsed() < LIMITS.answer),
        };
        self.host_event(ready.id, event);
        // In the early order `HANDED` has no news.
        if ready.started_ns.is_some() {
            self.count_offload(index, ready.id, None);
        }
    }

    /// A hand-off is done.
    fn count_offload(&mut self, index: usize, id: HandoffId, handed: Option<&Handed>) {
        let Some(flow) = self.hosted.get_mut(&id).filter(|f| f.state() == HostState::Redirected) else {
            return;
        };
        if std::mem::replace(&mut flow.counted, true) {
            return;
        }
        let kind = match &flow.guest {
            None => Kind::Outbound,
            Some((_, home)) if home.node == flow.target => Kind::Inbound,
            Some(_) => Kind::Onward,
        };
        let times = std::mem::take(&mut flow.times);
        let boot = self.peers.get(index).and_then(|p| p.hello.as_ref()).map(|h| h.boot_id);
        self.metrics.offload(kind, &steps(&times, handed, boot == Some(self.hello.boot_id)));
        if let Some(node) = self.node_of(index) {
            self.taken_by(&node);
        }
    }

    /// `REFUSE`.
    pub(crate) fn on_refuse(&mut self, index: usize, refuse: &Refuse) {
        if self.puts_off(refuse.id) {
            return;
        }
        self.drain_held();
        if let Some(flow) = self.told_by_its_target(index, refuse.id) {
            log::debug!("{} refuses {}: {} {}", flow.target, flow.client, refuse.reason, refuse.detail);
            // Given up there after the client saw a part of the answer: nobody can go on with that.
            let event = if flow.state() == HostState::Doubt && flow.is_served() {
                HostEvent::DoubtOver { served: true }
            } else {
                HostEvent::Refused(refuse.reason)
            };
            let (target, handler) = (flow.target.clone(), flow.handler.clone());
            self.refused_by(&target, &handler, refuse.reason);
            self.host_event(refuse.id, event);
        }
    }

    /// `HANDED`.
    pub(crate) fn on_handed(&mut self, index: usize, handed: &Handed) {
        let Some(flow) = self.told_by_its_target(index, handed.id) else { return };
        if flow.state() == HostState::Redirected {
            flow.record = None;
            if flow.guest.is_none() {
                self.flower.watch(handed.id);
            }
            self.count_offload(index, handed.id, Some(handed));
        }
        self.host_event(handed.id, HostEvent::Handed);
    }

    /// `CLOSED`. A repeated one is acknowledged all the same.
    pub(crate) fn on_closed(&mut self, index: usize, id: HandoffId) {
        if self.puts_off(id) {
            return;
        }
        if !self.hosted.contains_key(&id) {
            self.send_to(index, &PeerMessage::ClosedAck(id));
        } else if self.told_by_its_target(index, id).is_some() {
            self.host_event(id, HostEvent::Closed);
        }
        // Else the connection has moved on to the sender, and `MOVED` is still to come.
    }

    /// The hand-off, if this peer is its target.
    pub(crate) fn told_by_its_target(&mut self, index: usize, id: HandoffId) -> Option<&mut HostFlow> {
        let peer = self.peers.get(index)?;
        self.hosted.get_mut(&id).map(Box::as_mut).filter(|flow| peer.is_node(&flow.target))
    }

    /// The time limit of a `BEGIN_OFFLOAD`.
    pub(crate) fn host_deadline(&mut self, id: HandoffId) {
        if self.hosted.contains_key(&id) {
            self.host_event(id, HostEvent::Deadline);
        }
    }

    /// The target has certainly given up what it was not confirmed, unless the client's packets say otherwise.
    pub(crate) fn host_doubt_over(&mut self, id: HandoffId) {
        self.drain_held();
        if self.waits_for_library(id) {
            return;
        }
        let Some(flow) = self.hosted.get(&id) else { return };
        // What counts is the last question: the target may have kept the connection because of it.
        if let Some(left) = flow.asked.and_then(|asked| LIMITS.doubt.checked_sub(asked.elapsed()))
            && !left.is_zero()
        {
            return self.at(Instant::now() + left, Timer::HostDoubt(id));
        }
        let served = flow.is_served();
        if served && flow.since.elapsed() < RESTART_PATIENCE {
            // The client's packets are kept meanwhile, and a daemon that was restarted tells where they are to go.
            return self.at(Instant::now() + LIMITS.answer, Timer::HostDoubt(id));
        }
        self.host_event(id, HostEvent::DoubtOver { served });
    }

    /// The channel to a node broke.
    pub(crate) fn peer_lost(&mut self, node: &str) {
        let ids: Vec<_> = self.hosted.iter().filter(|(_, f)| f.target == node).map(|(id, _)| *id).collect();
        for id in ids {
            self.host_event(id, HostEvent::PeerLost);
        }
    }

    /// The channel to a node is up (again).
    pub(crate) fn peer_back(&mut self, node: &str) {
        let unsure = [HostState::Redirected, HostState::Offloaded, HostState::Doubt];
        let lost = |f: &HostFlow| f.target == node && unsure.contains(&f.state());
        let ids: Vec<_> = self.hosted.iter().filter(|(_, f)| lost(f)).map(|(id, _)| *id).collect();
        for id in ids {
            self.host_event(id, HostEvent::PeerBack);
        }
        self.closed_again(Some(node));
    }

    /// Feeds the state machine and carries out what it says.
    pub(crate) fn host_event(&mut self, id: HandoffId, event: HostEvent) {
        use HostEvent as E;
        let redirect_changes = matches!(event, E::Closed | E::Refused(_) | E::Moved(_) | E::Returned);
        if redirect_changes && self.rule_goes_first(id, || Then::Event(event.clone())) {
            return;
        }
        let mut next = Some(event);
        let mut actions = Vec::with_capacity(4);
        while let Some(event) = next.take() {
            let Some(flow) = self.hosted.get_mut(&id) else { return };
            flow.machine.on(&event, &mut actions);
            log::trace!("{} {id:x}: {event:?}: {:?}", flow.client, flow.state());
            self.got_further = true;
            for action in actions.drain(..) {
                next = self.host_action(id, action);
                if next.is_some() {
                    break;
                }
            }
        }
        if self.hosted.get(&id).is_some_and(|f| f.state() == HostState::Done) {
            self.hosted.remove(&id);
        }
    }

    fn host_action(&mut self, id: HandoffId, action: HostAction) -> Option<HostEvent> {
        let flow = self.hosted.get_mut(&id)?;
        match action {
            HostAction::Hold => return Some(HostEvent::Held(self.hold(id))),
            HostAction::Dump => return Some(HostEvent::Dumped(dump(flow))),
            HostAction::SendBegin => self.send_begin(id),
            HostAction::Redirect(to) => return self.redirect(id, to),
            HostAction::SendHostReady => {
                let elapsed_ns = now_ns().saturating_sub(flow.times.dumped);
                let (options, hop) = (flow.options.take(), flow.hop as u16);
                self.send_about(id, &PeerMessage::HostReady(HostReady { id, options, hop, elapsed_ns }));
                if let Some(flow) = self.hosted.get_mut(&id) {
                    flow.times.sent_ready = now_ns();
                }
            }
            HostAction::Vacate => vacate(flow),
            // Each question lets the target keep the connection for longer, so there is an end to them.
            HostAction::SendQuery if flow.questions >= MOST_QUESTIONS => {}
            HostAction::SendQuery => {
                flow.questions += 1;
                flow.asked = Some(Instant::now());
                self.send_about(id, &PeerMessage::Query(Query { id, sent_ns: now_ns() }));
            }
            HostAction::ArmDoubt => {
                let since = flow.asked.unwrap_or_else(Instant::now);
                self.at(since + LIMITS.doubt, Timer::HostDoubt(id));
            }
            HostAction::SendAbort => self.send_about(id, &PeerMessage::Abort(id)),
            HostAction::TakeBack => self.take_back(id),
            HostAction::Unhold | HostAction::RemoveRedirect => self.remove_entry_of(id),
            HostAction::Stay(reason) => {
                stay(flow, reason);
                self.metrics.refused(reason);
            }
            HostAction::Reset => self.reset(id),
            HostAction::SendClosedAck => self.send_about(id, &PeerMessage::ClosedAck(id)),
            HostAction::Repoint(to) => self.repoint(id, to),
            HostAction::ArmLinger => self.at(Instant::now() + LINGER, Timer::Linger(id)),
            HostAction::Guest(event) => {
                if let Some((key, _)) = flow.guest.clone() {
                    self.target_event(&key, &TargetEvent::Guest(event));
                }
            }
        }
        None
    }

    pub(crate) fn connection_of(&self, id: HandoffId) -> Option<usize> {
        let flow = self.hosted.get(&id)?;
        self.connection_to(&flow.target)
    }

    fn send_about(&mut self, id: HandoffId, message: &PeerMessage) {
        if let Some(peer) = self.connection_of(id) {
            self.send_to(peer, message);
        }
    }
}
