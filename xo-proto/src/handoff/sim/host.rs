//! The host's driver: what `xo-peerd` does in `host.rs` and `recover.rs`.

use std::net::{Ipv4Addr, SocketAddr};

use super::super::{Host, HostAction, HostEvent, HostState};
use super::{
    ConnIndex, Flaw, FlowAction, Handoff, HandoffIndex, Message, NodeIndex, Socket, Step, Ticks, Verdict,
    World,
};
use crate::reason::Reason;

/// A connection offloaded from here, or about to be.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct HostFlow {
    machine: Host,
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
    to: Option<NodeIndex>,
    /// Timers: what is left.
    pub(crate) deadline: Option<Ticks>,
    pub(crate) doubt: Option<Ticks>,
}

impl HostFlow {
    fn new(machine: Host, shown: bool) -> HostFlow {
        HostFlow {
            machine,
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
        }
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

/// The address of a node, as far as the machine is concerned.
fn address(node: NodeIndex) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, node as u16))
}

impl World {
    fn hosted(&mut self, node: NodeIndex, handoff: HandoffIndex) -> Option<&mut HostFlow> {
        self.daemon(node)?.hosted.get_mut(&handoff)
    }

    pub(crate) fn hosted_state(&self, node: NodeIndex, handoff: HandoffIndex) -> Option<HostState> {
        Some(self.nodes[node].daemon.as_ref()?.hosted.get(&handoff)?.state())
    }

    /// The library asks for a hand-off.
    pub(crate) fn on_offload(&mut self, conn: ConnIndex, target: NodeIndex) {
        let host = self.home(conn);
        let handoff = self.handoffs.len();
        self.handoffs.push(Handoff { conn, host, target });
        self.clients[conn].asks += 1;
        self.nodes[host].slots[conn] = Verdict::Pending;
        let channel = self.connection_to(host, target);
        let proven = channel.is_some_and(|(c, end)| self.channels[c].ends[end].proven);
        let flow = HostFlow::new(Host::new(self.setup.early && proven), true);
        let Some(daemon) = self.daemon(host) else { return };
        daemon.hosted.insert(handoff, flow);
        let event = match channel {
            Some(_) => HostEvent::Start,
            None => HostEvent::Hopeless(Reason::PeerUnreachable),
        };
        self.host_event(host, handoff, event);
    }

    /// A library has a connection whose hand-off an earlier daemon did not finish.
    pub(crate) fn on_recover(&mut self, node: NodeIndex, conn: ConnIndex) {
        let entry = self.nodes[node].kernel.flows[conn];
        let known = entry.filter(|(handoff, _)| self.hosted(node, *handoff).is_some());
        let Some((handoff, _)) = known else {
            self.resume(node, conn);
            return self.decide(node, conn, Verdict::Stay);
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
        let target = self.handoffs[handoff].target;
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

    pub(crate) fn recover_hosted(&mut self, node: NodeIndex, conn: ConnIndex) {
        let Some((handoff, action)) = self.nodes[node].kernel.flows[conn] else { return };
        let rules = self.setup.rules;
        let to = match action {
            FlowAction::Committed(_) if self.is_flawed(Flaw::ForgetsCommitment) => None,
            FlowAction::Redirect(to) | FlowAction::Committed(to) => Some(to),
            FlowAction::Hold => None,
        };
        if let Some(to) = to {
            self.nodes[node].kernel.flows[conn] = Some((handoff, FlowAction::Redirect(to)));
        }
        let mut flow = HostFlow::new(Host::recovered(to.is_some()), false);
        (flow.to, flow.unseen) = (to, true);
        flow.doubt = Some(rules.ticks(if to.is_some() { rules.restart } else { rules.limits.doubt }));
        if let Some(daemon) = self.daemon(node) {
            daemon.hosted.insert(handoff, flow);
        }
        if let Some(to) = to {
            self.replay_held(node, handoff, to);
        }
    }

    pub(crate) fn on_target_ready(
        &mut self,
        node: NodeIndex,
        handoff: HandoffIndex,
        started: bool,
        age: Ticks,
    ) {
        let target = self.handoffs[handoff].target;
        let answer = self.setup.rules.ticks(self.setup.rules.limits.answer);
        if self.puts_off(node, handoff) {
            return;
        }
        let Some(flow) = self.hosted(node, handoff) else {
            return self.send(node, target, Message::Abort { handoff });
        };
        let asked = flow.asked;
        let timely = asked.is_some_and(|asked| asked <= answer);
        // The answer to an earlier question passes for one to the last: a reset that need not be.
        self.slow |= started && timely && asked.is_some_and(|asked| asked < age);
        self.host_event(node, handoff, HostEvent::TargetReady { local: address(target), started, timely });
    }

    pub(crate) fn on_refuse(&mut self, node: NodeIndex, handoff: HandoffIndex, reason: Reason) {
        if self.puts_off(node, handoff) {
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

    pub(crate) fn on_handed(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        if let Some(flow) = self.hosted(node, handoff) {
            flow.record &= flow.state() != HostState::Redirected;
        }
        self.host_event(node, handoff, HostEvent::Handed);
    }

    pub(crate) fn on_closed(&mut self, node: NodeIndex, peer: NodeIndex, handoff: HandoffIndex) {
        if self.puts_off(node, handoff) {
            return;
        }
        if self.hosted(node, handoff).is_some() {
            self.host_event(node, handoff, HostEvent::Closed);
        } else {
            self.send(node, peer, Message::ClosedAck { handoff });
        }
    }

    /// The client has acknowledged bytes that this host never sent.
    fn has_served(&mut self, node: NodeIndex, handoff: HandoffIndex) -> bool {
        self.collect_held(node);
        if self.is_flawed(Flaw::IgnoresAcknowledgements) {
            return false;
        }
        let Some(daemon) = self.daemon(node) else { return false };
        let shows = daemon.collected.iter().any(|(h, p)| *h == handoff && p.acknowledges);
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
        self.closed_again(node, peer);
    }

    fn hosted_to(&self, node: NodeIndex, peer: NodeIndex, which: fn(&HostFlow) -> bool) -> Vec<HandoffIndex> {
        let Some(daemon) = &self.nodes[node].daemon else { return Vec::new() };
        let its = |(h, f): &(&HandoffIndex, &HostFlow)| self.handoffs[**h].target == peer && which(f);
        daemon.hosted.iter().filter(its).map(|(h, _)| *h).collect()
    }

    /// Feeds the state machine and carries out what it says.
    fn host_event(&mut self, node: NodeIndex, handoff: HandoffIndex, event: HostEvent) {
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
        let Handoff { conn, target, .. } = self.handoffs[handoff];
        let rules = self.setup.rules;
        match action {
            // Of guests, which this model has none of.
            HostAction::Repoint(_) | HostAction::ArmLinger | HostAction::Guest(_) => {}
            HostAction::Hold => return Some(HostEvent::Held(self.hold(node, handoff))),
            HostAction::Dump => return Some(HostEvent::Dumped(self.dump(node, handoff))),
            HostAction::SendBegin => {
                let flow = self.hosted(node, handoff)?;
                (flow.asked, flow.deadline) = (Some(0), Some(rules.ticks(rules.timeout)));
                let start = flow.machine.early();
                self.send(node, target, Message::Begin { handoff, start });
            }
            HostAction::Redirect(_) => return self.redirect(node, handoff),
            HostAction::SendHostReady => self.send(node, target, Message::HostReady { handoff }),
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
                self.nodes[node].kernel.remove_flow(conn, handoff);
                self.replay_held(node, handoff, node);
            }
            HostAction::Stay(_) => {
                if self.hosted(node, handoff)?.shown {
                    self.must(
                        self.nodes[node].kernel.sockets[conn] == Socket::Live,
                        "stays, but not as it was",
                    );
                    self.decide(node, conn, Verdict::Stay);
                }
            }
            HostAction::Reset => self.reset(node, handoff),
            HostAction::SendClosedAck => self.send(node, target, Message::ClosedAck { handoff }),
        }
        None
    }

    fn hold(&mut self, node: NodeIndex, handoff: HandoffIndex) -> Result<(), Reason> {
        let conn = self.handoffs[handoff].conn;
        let free = self.nodes[node].kernel.flows[conn].is_none();
        let works = self.works(node, Step::Hold) && free;
        if works {
            self.nodes[node].kernel.flows[conn] = Some((handoff, FlowAction::Hold));
        }
        World::outcome(works, Reason::TableFull)
    }

    fn dump(&mut self, node: NodeIndex, handoff: HandoffIndex) -> Result<(), Reason> {
        let conn = self.handoffs[handoff].conn;
        let works = self.works(node, Step::Dump) && self.nodes[node].kernel.sockets[conn] == Socket::Live;
        if works {
            self.nodes[node].kernel.sockets[conn] = Socket::Repair;
            if let Some(flow) = self.hosted(node, handoff) {
                flow.record = true;
            }
        }
        World::outcome(works, Reason::DumpFailed)
    }

    fn redirect(&mut self, node: NodeIndex, handoff: HandoffIndex) -> Option<HostEvent> {
        let Handoff { conn, target, .. } = self.handoffs[handoff];
        let held = self.nodes[node].kernel.flows[conn] == Some((handoff, FlowAction::Hold));
        if !self.works(node, Step::Redirect) || !held {
            return Some(HostEvent::RedirectFailed);
        }
        // An acknowledgement that the target gets makes it keep the connection: there is no way back any more.
        self.nodes[node].kernel.flows[conn] = Some((handoff, FlowAction::Committed(target)));
        if !self.goes_on(node) {
            return None;
        }
        self.replay_held(node, handoff, target);
        if !self.goes_on(node) {
            return None;
        }
        self.nodes[node].kernel.flows[conn] = Some((handoff, FlowAction::Redirect(target)));
        self.hosted(node, handoff)?.to = Some(target);
        None
    }

    /// The verdict first: the events that emptying raises must find it.
    fn vacate(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        let conn = self.handoffs[handoff].conn;
        let Some(flow) = self.hosted(node, handoff).filter(|f| f.shown) else { return };
        flow.shown = false;
        self.decide(node, conn, Verdict::Gone);
        if self.goes_on(node) {
            self.must(self.nodes[node].kernel.sockets[conn] == Socket::Repair, "a live socket is emptied");
            self.nodes[node].kernel.remove_socket(conn);
        }
    }

    fn resume(&mut self, node: NodeIndex, conn: ConnIndex) {
        self.must(self.nodes[node].kernel.sockets[conn] == Socket::Repair, "nothing to take back");
        self.nodes[node].kernel.sockets[conn] = Socket::Live;
        self.check_taken_back(conn);
    }

    fn take_back(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        let conn = self.handoffs[handoff].conn;
        let shown = self.hosted(node, handoff).is_some_and(|f| f.shown);
        if shown {
            self.resume(node, conn);
        }
        if !self.goes_on(node) {
            return;
        }
        self.replay_held(node, handoff, node);
        if !self.goes_on(node) {
            return;
        }
        self.nodes[node].kernel.remove_flow(conn, handoff);
        self.replay_held(node, handoff, node);
    }

    fn reset(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        let conn = self.handoffs[handoff].conn;
        self.nodes[node].kernel.remove_flow(conn, handoff);
        if self.goes_on(node)
            && let Some(flow) = self.hosted(node, handoff)
        {
            self.clients[conn].told |= flow.record;
        }
    }
}
