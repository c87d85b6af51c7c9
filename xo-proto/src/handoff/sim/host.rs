//! The host's driver: what `xo-peerd` does in `host.rs` and `recover.rs`.

use super::super::{Host, HostAction, HostEvent, HostState};
use super::onward::{address, place};
use super::{
    ConnIndex, Flaw, Flow, FlowAction, Handoff, HandoffIndex, Message, NodeIndex, Place, Port, Socket, Step,
    Ticks, Verdict, World,
};
use crate::reason::Reason;

/// A connection offloaded from here, or about to be.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct HostFlow {
    machine: Host,
    /// Where the connection is, or is to be; changes when it moves on.
    pub(crate) target: NodeIndex,
    /// The last move that its entry is owed to.
    pub(crate) hop: u8,
    /// For a guest that moves on: the hand-off that brought it here.
    pub(crate) guest: Option<HandoffIndex>,
    /// The server's socket and the slot for the verdict are at hand.
    shown: bool,
    /// An earlier daemon's, and its library may still have its socket: nothing is settled before that is known.
    unseen: bool,
    /// An answer was put off because of that.
    put_off: bool,
    /// The connection record is: a reset can be sent, and acknowledgements be judged.
    record: bool,
    /// Since the last question.
    pub(crate) asked: Option<Ticks>,
    questions: u8,
    /// Since this daemon found it, or began it.
    pub(crate) since: Ticks,
    /// Where its packets go.
    pub(crate) to: Option<Place>,
    /// Timers: what is left.
    pub(crate) deadline: Option<Ticks>,
    pub(crate) doubt: Option<Ticks>,
    pub(crate) linger: Option<Ticks>,
}

impl HostFlow {
    pub(crate) fn new(machine: Host, shown: bool, target: NodeIndex) -> HostFlow {
        HostFlow {
            machine,
            target,
            hop: 1,
            guest: None,
            shown,
            unseen: false,
            put_off: false,
            record: false,
            asked: None,
            questions: 0,
            since: 0,
            to: None,
            deadline: None,
            doubt: None,
            linger: None,
        }
    }

    /// It becomes the hand-off of a guest.
    pub(crate) fn of_guest(&mut self, brought_by: HandoffIndex) {
        self.machine = self.machine.clone().of_guest();
        self.guest = Some(brought_by);
    }

    /// In this order, from the beginning.
    pub(crate) fn begins(&mut self, early: bool) {
        let machine = Host::new(early);
        self.machine = if self.guest.is_some() { machine.of_guest() } else { machine };
    }

    /// Is the connection's place known to be elsewhere?
    pub(crate) fn is_away(&self) -> bool {
        matches!(self.state(), HostState::Redirected | HostState::Offloaded)
    }

    pub(crate) fn state(&self) -> HostState {
        self.machine.state()
    }

    /// What no decision depends on any more is the same in all states.
    pub(crate) fn forget(&mut self, old: Ticks) {
        if !matches!(self.state(), HostState::Begun | HostState::Doubt) {
            (self.asked, self.questions, self.deadline) = (None, 0, None);
            if !self.unseen {
                (self.since, self.doubt) = (old, None);
            }
        }
    }
}

impl World {
    pub(crate) fn hosted(&mut self, node: NodeIndex, handoff: HandoffIndex) -> Option<&mut HostFlow> {
        self.daemon(node)?.hosted.get_mut(&handoff)
    }

    pub(crate) fn hosted_state(&self, node: NodeIndex, handoff: HandoffIndex) -> Option<HostState> {
        Some(self.nodes[node].daemon.as_ref()?.hosted.get(&handoff)?.state())
    }

    /// The library asks for a hand-off.
    pub(crate) fn on_offload(&mut self, conn: ConnIndex, (node, port): Place, target: NodeIndex) {
        let handoff = self.handoffs.len();
        self.clients[conn].asks += 1;
        let Some(end) = self.nodes[node].kernel.ends.get_mut(&(conn, port)) else { return };
        (end.slot, end.asked) = (Verdict::Pending, Some(handoff));
        let before = end.by.filter(|_| port != Port::Public).map(|by| self.handoffs[by]);
        let (first, hop) = before.map_or((handoff, 1), |b| (b.first, b.hop + 1));
        self.handoffs.push(Handoff { conn, host: node, port, target, first, hop });
        let Some(daemon) = self.daemon(node) else { return };
        daemon.hosted.insert(handoff, HostFlow::new(Host::new(false), true, target));
        self.start_when_settled(node, handoff);
    }

    /// A library has a connection whose hand-off an earlier daemon did not finish.
    pub(crate) fn on_recover(&mut self, node: NodeIndex, conn: ConnIndex, port: Port) {
        let entry = self.nodes[node].kernel.flows.get(&(conn, port)).copied();
        let known = entry.filter(|flow| self.hosted(node, flow.handoff).is_some());
        let Some(Flow { handoff, .. }) = known else {
            self.resume((node, port), conn);
            return self.decide((node, port), conn, Verdict::Stay);
        };
        let Some(flow) = self.hosted(node, handoff) else { return };
        (flow.shown, flow.record) = (true, true);
        if flow.to.is_some() {
            self.vacate(node, handoff);
        }
        self.seen(node, handoff);
    }

    /// The socket has been shown, or never will be: asks for the answers that were put off.
    fn seen(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        let Some(target) = self.hosted(node, handoff).map(|f| f.target) else { return };
        let connected = self.connection_to(node, target).is_some();
        let rules = self.setup.rules;
        let (old, doubt) = (rules.old(), rules.ticks(rules.limits.doubt));
        let Some(flow) = self.hosted(node, handoff) else { return };
        (flow.unseen, flow.questions) = (false, 0);
        if flow.state() == HostState::Doubt {
            flow.doubt = Some(doubt);
        }
        flow.forget(old);
        if std::mem::take(&mut flow.put_off) && connected {
            self.host_event(node, handoff, HostEvent::PeerBack);
        }
    }

    /// An answer came: is it too early to act upon it?
    fn puts_off(&mut self, node: NodeIndex, handoff: HandoffIndex) -> bool {
        let flawed = self.is_flawed(Flaw::SettlesUnseen);
        let answer = self.setup.rules.ticks(self.setup.rules.limits.answer);
        let Some(flow) = self.hosted(node, handoff).filter(|f| f.unseen && !flawed) else { return false };
        flow.put_off = true;
        if flow.state() == HostState::Doubt {
            flow.doubt = flow.doubt.map(|left| left.min(answer));
        }
        true
    }

    /// Is the library still waited for? Meanwhile the target is asked again and again, so that it does not give up what it
    /// has started.
    fn waits_for_library(&mut self, node: NodeIndex, handoff: HandoffIndex) -> bool {
        let patience = self.setup.rules.ticks(self.setup.rules.restart);
        let flawed = self.is_flawed(Flaw::SettlesUnseen);
        let Some(flow) = self.hosted(node, handoff).filter(|f| f.unseen && !flawed) else { return false };
        let redirected = flow.to.is_some();
        if flow.since >= patience {
            if redirected {
                self.seen(node, handoff);
            }
            return redirected;
        }
        flow.doubt = Some(patience - flow.since);
        if flow.put_off && !redirected {
            (flow.put_off, flow.questions) = (false, 0);
            self.host_event(node, handoff, HostEvent::PeerBack);
        }
        true
    }

    pub(crate) fn recover_hosted(&mut self, node: NodeIndex, conn: ConnIndex, port: Port) {
        let Some(&entry) = self.nodes[node].kernel.flows.get(&(conn, port)) else { return };
        let rules = self.setup.rules;
        let handoff = entry.handoff;
        let to = match entry.action {
            FlowAction::Committed(_) if self.is_flawed(Flaw::ForgetsCommitment) => None,
            FlowAction::Redirect(to) | FlowAction::Committed(to) => Some(to),
            FlowAction::Hold | FlowAction::Deliver { .. } => None,
        };
        let mut flow = HostFlow::new(Host::recovered(to.is_some()), false, entry.peer);
        flow.hop = entry.hop;
        if let Some(guest) = self.known_by(node, conn, port) {
            flow.of_guest(guest);
            if to.is_some() {
                self.guest_left(node, guest);
            }
        }
        if let Some(to) = to {
            let action = FlowAction::Redirect(to);
            self.nodes[node].kernel.flows.insert((conn, port), Flow { action, ..entry });
        }
        (flow.to, flow.unseen) = (to, true);
        flow.doubt = Some(rules.ticks(if to.is_some() { rules.restart } else { rules.limits.doubt }));
        if let Some(daemon) = self.daemon(node) {
            daemon.hosted.insert(handoff, flow);
        }
        if to.is_some() {
            self.replay_held(node, handoff, to);
        }
    }

    /// The hand-off, if this peer is its target.
    pub(crate) fn told_by_its_target(
        &mut self,
        node: NodeIndex,
        peer: NodeIndex,
        handoff: HandoffIndex,
    ) -> Option<&mut HostFlow> {
        self.hosted(node, handoff).filter(|f| f.target == peer)
    }

    pub(crate) fn on_target_ready(
        &mut self,
        (node, peer): (NodeIndex, NodeIndex),
        handoff: HandoffIndex,
        started: bool,
        age: Ticks,
    ) {
        let answer = self.setup.rules.ticks(self.setup.rules.limits.answer);
        if self.puts_off(node, handoff) {
            return;
        }
        if self.hosted(node, handoff).is_none() {
            return self.send(node, peer, Message::Abort { handoff });
        }
        let Some(flow) = self.told_by_its_target(node, peer, handoff) else { return };
        let asked = flow.asked;
        let timely = asked.is_some_and(|asked| asked <= answer);
        // The answer to an earlier question passes for one to the last: a reset that need not be.
        self.slow |= started && timely && asked.is_some_and(|asked| asked < age);
        let local = address(self.entrance(handoff));
        self.host_event(node, handoff, HostEvent::TargetReady { local, started, timely });
    }

    pub(crate) fn on_refuse(
        &mut self,
        node: NodeIndex,
        peer: NodeIndex,
        handoff: HandoffIndex,
        reason: Reason,
    ) {
        if self.puts_off(node, handoff) || self.told_by_its_target(node, peer, handoff).is_none() {
            return;
        }
        let doubt = self.hosted_state(node, handoff) == Some(HostState::Doubt);
        let event = if doubt && self.has_served(node, handoff) {
            HostEvent::DoubtOver { served: true }
        } else {
            HostEvent::Refused(reason)
        };
        self.host_event(node, handoff, event);
    }

    pub(crate) fn on_handed(&mut self, node: NodeIndex, peer: NodeIndex, handoff: HandoffIndex) {
        let Some(flow) = self.told_by_its_target(node, peer, handoff) else { return };
        flow.record &= flow.state() != HostState::Redirected;
        self.host_event(node, handoff, HostEvent::Handed);
    }

    pub(crate) fn on_closed(&mut self, node: NodeIndex, peer: NodeIndex, handoff: HandoffIndex) {
        if self.puts_off(node, handoff) {
            return;
        }
        if self.hosted(node, handoff).is_none() {
            self.send(node, peer, Message::ClosedAck { handoff });
        } else if self.told_by_its_target(node, peer, handoff).is_some() {
            self.host_event(node, handoff, HostEvent::Closed);
        }
    }

    /// The client has acknowledged bytes that this host never sent.
    fn has_served(&mut self, node: NodeIndex, handoff: HandoffIndex) -> bool {
        self.collect_held(node);
        if self.is_flawed(Flaw::IgnoresAcknowledgements) {
            return false;
        }
        let Some(daemon) = self.daemon(node) else { return false };
        let shows = daemon.collected.iter().any(|(h, p)| *h == handoff && p.acknowledges >= Some(handoff));
        shows && daemon.hosted.get(&handoff).is_some_and(|f| f.record)
    }

    /// The library finds a new daemon in that time.
    pub(crate) fn library_is_due(&self, node: NodeIndex) -> bool {
        let patience = self.setup.rules.ticks(self.setup.rules.restart);
        let waits = |f: &HostFlow| f.unseen && f.since + 1 >= patience;
        !self.nodes[node].library && self.nodes[node].daemon.iter().any(|d| d.hosted.values().any(waits))
    }

    pub(crate) fn run_host_timers(&mut self) {
        for node in 0..self.nodes.len() {
            for handoff in 0..self.handoffs.len() {
                if let Some(flow) = self.hosted(node, handoff) {
                    let deadline = flow.deadline.take_if(|left| *left == 0);
                    let doubt = flow.doubt.take_if(|left| *left == 0);
                    let linger = flow.linger.take_if(|left| *left == 0);
                    if linger.is_some() {
                        self.host_event(node, handoff, HostEvent::LingerOver);
                    }
                    if deadline.is_some() {
                        self.host_event(node, handoff, HostEvent::Deadline);
                    }
                    if doubt.is_some() {
                        self.host_doubt_over(node, handoff);
                    }
                }
            }
        }
    }

    fn host_doubt_over(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        let rules = self.setup.rules;
        let (doubt, answer) = (rules.ticks(rules.limits.doubt), rules.ticks(rules.limits.answer));
        let patience = rules.ticks(rules.restart);
        let served = self.has_served(node, handoff);
        if self.waits_for_library(node, handoff) {
            return;
        }
        let Some(flow) = self.hosted(node, handoff) else { return };
        if let Some(left) = flow.asked.and_then(|asked| doubt.checked_sub(asked)).filter(|left| *left > 0) {
            flow.doubt = Some(left);
        } else if served && flow.since < patience {
            flow.doubt = Some(answer);
        } else {
            self.host_event(node, handoff, HostEvent::DoubtOver { served });
        }
    }

    pub(crate) fn peer_lost(&mut self, node: NodeIndex, peer: NodeIndex) {
        for handoff in self.hosted_to(node, peer, |_| true) {
            self.host_event(node, handoff, HostEvent::PeerLost);
        }
    }

    pub(crate) fn peer_back(&mut self, node: NodeIndex, peer: NodeIndex) {
        const UNSURE: [HostState; 3] = [HostState::Redirected, HostState::Offloaded, HostState::Doubt];
        for handoff in self.hosted_to(node, peer, |f| UNSURE.contains(&f.state())) {
            if !self.is_flawed(Flaw::NeverRepeats) {
                self.host_event(node, handoff, HostEvent::PeerBack);
            }
        }
        self.closed_again(node, Some(peer));
    }

    fn hosted_to(&self, node: NodeIndex, peer: NodeIndex, which: fn(&HostFlow) -> bool) -> Vec<HandoffIndex> {
        let Some(daemon) = &self.nodes[node].daemon else { return Vec::new() };
        let its = |(_, f): &(&HandoffIndex, &HostFlow)| f.target == peer && which(f);
        daemon.hosted.iter().filter(its).map(|(h, _)| *h).collect()
    }

    /// Feeds the state machine and carries out what it says.
    pub(crate) fn host_event(&mut self, node: NodeIndex, handoff: HandoffIndex, event: HostEvent) {
        let mut next = Some(event);
        let mut actions = Vec::new();
        while let Some(event) = next.take() {
            let Some(flow) = self.hosted(node, handoff) else { return };
            flow.machine.on(&event, &mut actions);
            for action in actions.drain(..) {
                if !self.goes_on(node) {
                    return;
                }
                next = self.host_action(node, handoff, action);
                self.check();
                if next.is_some() {
                    break;
                }
            }
        }
        if let Some(daemon) = self.daemon(node)
            && daemon.hosted.get(&handoff).is_some_and(|f| f.state() == HostState::Done)
        {
            daemon.hosted.remove(&handoff);
        }
        let old = self.setup.rules.old();
        if let Some(flow) = self.hosted(node, handoff) {
            flow.forget(old);
        }
    }

    fn host_action(
        &mut self,
        node: NodeIndex,
        handoff: HandoffIndex,
        action: HostAction,
    ) -> Option<HostEvent> {
        let Handoff { conn, port, .. } = self.handoffs[handoff];
        let target = self.hosted(node, handoff)?.target;
        let rules = self.setup.rules;
        match action {
            HostAction::Repoint(to) => self.repoint(node, handoff, place(to)),
            HostAction::ArmLinger => self.hosted(node, handoff)?.linger = Some(rules.ticks(rules.linger)),
            HostAction::Guest(event) => {
                if let Some(guest) = self.hosted(node, handoff)?.guest {
                    self.guest_event(node, guest, event);
                }
            }
            HostAction::Hold => return Some(HostEvent::Held(self.hold(node, handoff))),
            HostAction::Dump => return Some(HostEvent::Dumped(self.dump(node, handoff))),
            HostAction::SendBegin => {
                let flow = self.hosted(node, handoff)?;
                (flow.asked, flow.deadline) = (Some(0), Some(rules.ticks(rules.timeout)));
                let start = flow.machine.early();
                self.send(node, target, Message::Begin { handoff, start });
            }
            HostAction::Redirect(to) => return self.redirect(node, handoff, place(to)),
            HostAction::SendHostReady => {
                let hop = self.hosted(node, handoff)?.hop;
                self.send(node, target, Message::HostReady { handoff, hop });
            }
            HostAction::Vacate => self.vacate(node, handoff),
            HostAction::SendQuery => {
                let flow = self.hosted(node, handoff).filter(|f| f.questions < rules.questions)?;
                flow.questions += 1;
                flow.asked = Some(0);
                self.send(node, target, Message::Query { handoff });
            }
            HostAction::ArmDoubt => {
                let flow = self.hosted(node, handoff)?;
                let since = flow.asked.unwrap_or(0);
                flow.doubt = Some(rules.ticks(rules.limits.doubt).saturating_sub(since));
            }
            HostAction::SendAbort => self.send(node, target, Message::Abort { handoff }),
            HostAction::TakeBack => self.take_back(node, handoff),
            HostAction::Unhold | HostAction::RemoveRedirect => {
                self.nodes[node].kernel.remove_flow(conn, port, handoff);
                self.replay_held(node, handoff, None);
            }
            HostAction::Stay(_) => {
                if self.hosted(node, handoff)?.shown {
                    // It may have ended, or been taken away, before the hand-off began.
                    let socket = self.nodes[node].kernel.socket(conn, port);
                    self.must(socket != Socket::Repair, "stays, but not as it was");
                    self.decide((node, port), conn, Verdict::Stay);
                }
            }
            HostAction::Reset => self.reset(node, handoff),
            HostAction::SendClosedAck => self.send(node, target, Message::ClosedAck { handoff }),
        }
        None
    }

    fn hold(&mut self, node: NodeIndex, handoff: HandoffIndex) -> Result<(), Reason> {
        let Handoff { conn, port, target, .. } = self.handoffs[handoff];
        let works = self.works(node, Step::Hold);
        let flows = &mut self.nodes[node].kernel.flows;
        let works = works && !flows.contains_key(&(conn, port));
        if works {
            flows.insert((conn, port), Flow { handoff, peer: target, hop: 0, action: FlowAction::Hold });
        }
        World::outcome(works, Reason::TableFull)
    }

    fn dump(&mut self, node: NodeIndex, handoff: HandoffIndex) -> Result<(), Reason> {
        let Handoff { conn, port, .. } = self.handoffs[handoff];
        let works = self.works(node, Step::Dump);
        let end = self.nodes[node].kernel.ends.get_mut(&(conn, port));
        let live = end.filter(|e| works && e.socket == Socket::Live).map(|e| e.socket = Socket::Repair);
        if let Some(flow) = self.hosted(node, handoff) {
            flow.record = live.is_some();
        }
        live.ok_or(Reason::DumpFailed)
    }

    fn redirect(&mut self, node: NodeIndex, handoff: HandoffIndex, to: Place) -> Option<HostEvent> {
        let Handoff { conn, port, target, .. } = self.handoffs[handoff];
        let at = (conn, port);
        let entry = self.nodes[node].kernel.flows.get(&at).copied();
        let held = entry.is_some_and(|f| f.handoff == handoff && f.action == FlowAction::Hold);
        if !self.works(node, Step::Redirect) || !held {
            return Some(HostEvent::RedirectFailed);
        }
        let hop = self.hosted(node, handoff)?.hop;
        let flow = |action| Flow { handoff, peer: target, hop, action };
        // An acknowledgement that the target gets makes it keep the connection: there is no way back any more.
        self.nodes[node].kernel.flows.insert(at, flow(FlowAction::Committed(to)));
        if !self.goes_on(node) {
            return None;
        }
        self.replay_held(node, handoff, Some(to));
        if !self.goes_on(node) {
            return None;
        }
        self.nodes[node].kernel.flows.insert(at, flow(FlowAction::Redirect(to)));
        self.hosted(node, handoff)?.to = Some(to);
        None
    }

    /// The verdict first: the events that emptying raises must find it.
    fn vacate(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        let Handoff { conn, port, .. } = self.handoffs[handoff];
        let Some(flow) = self.hosted(node, handoff).filter(|f| f.shown) else { return };
        flow.shown = false;
        self.decide((node, port), conn, Verdict::Gone);
        if self.goes_on(node) {
            let repair = self.nodes[node].kernel.socket(conn, port) == Socket::Repair;
            self.must(repair, "a live socket is emptied");
            self.nodes[node].kernel.remove_socket(conn, port);
        }
    }

    fn resume(&mut self, (node, port): Place, conn: ConnIndex) {
        let Some(end) = self.nodes[node].kernel.ends.get_mut(&(conn, port)) else { return };
        let (was, asked) = (end.socket, end.asked);
        end.socket = if was == Socket::Repair { Socket::Live } else { was };
        self.must(was != Socket::Live, "nothing to take back");
        self.check_taken_back(conn, asked);
    }

    fn take_back(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        let Handoff { conn, port, .. } = self.handoffs[handoff];
        let shown = self.hosted(node, handoff).is_some_and(|f| f.shown);
        if shown {
            self.resume((node, port), conn);
        }
        if !self.goes_on(node) {
            return;
        }
        self.replay_held(node, handoff, None);
        if !self.goes_on(node) {
            return;
        }
        self.nodes[node].kernel.remove_flow(conn, port, handoff);
        self.replay_held(node, handoff, None);
    }

    fn reset(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        let Handoff { conn, port, .. } = self.handoffs[handoff];
        self.nodes[node].kernel.remove_flow(conn, port, handoff);
        if self.goes_on(node)
            && let Some(flow) = self.hosted(node, handoff)
        {
            let (record, guest) = (flow.record, flow.guest);
            let client = &mut self.clients[conn];
            client.told |= record;
            client.saw_too_much |= client.saw >= Some(handoff);
            if let Some(guest) = guest.filter(|_| record) {
                // Else the reset has the wrong source, and the client ignores it.
                self.note_left(node, guest, false);
            }
        }
    }
}
