//! The target's driver: what `xo-peerd` does in `target.rs` and `recover.rs`.

use super::super::{Shortcut, ShortcutEvent, ShortcutState, Target, TargetAction, TargetEvent, TargetState};
use super::{
    ConnIndex, End, Flaw, Flow, FlowAction, HandlerMode, Handoff, HandoffIndex, Message, NodeIndex, Port,
    Rewrite, Socket, Step, Ticks, Verdict, World,
};
use crate::reason::Reason;

/// A connection of another host, served here or about to be.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Served {
    machine: Target,
    /// A handler process is being started.
    pub(crate) spawning: bool,
    /// There is a duplicate of the live socket.
    kept: bool,
    /// How its packets get here.
    pub(crate) shortcut: Shortcut,
    /// Moves that its server has asked for before it was confirmed that the connection is here.
    pub(crate) parked: Vec<HandoffIndex>,
    /// It is known by its address; not any more when it is home for sure.
    pub(crate) named: bool,
    /// It is certain that it is here.
    pub(crate) confirmed: bool,
    /// Timers: what is left.
    pub(crate) deadline: Option<Ticks>,
    pub(crate) fence: Option<Ticks>,
    pub(crate) detour: Option<Ticks>,
}

impl Served {
    pub(crate) fn new(machine: Target, detour: bool) -> Served {
        Served {
            machine,
            spawning: false,
            kept: false,
            shortcut: Shortcut::new(detour),
            parked: Vec::new(),
            named: false,
            confirmed: false,
            deadline: None,
            fence: None,
            detour: None,
        }
    }

    pub(crate) fn state(&self) -> TargetState {
        self.machine.state()
    }
}

impl World {
    pub(crate) fn served(&mut self, node: NodeIndex, handoff: HandoffIndex) -> Option<&mut Served> {
        self.daemon(node)?.served.get_mut(&handoff)
    }

    pub(crate) fn served_state(&self, node: NodeIndex, handoff: HandoffIndex) -> Option<TargetState> {
        Some(self.nodes[node].daemon.as_ref()?.served.get(&handoff)?.state())
    }

    pub(crate) fn on_begin(&mut self, node: NodeIndex, handoff: HandoffIndex, start: bool, fresh: bool) {
        let attach = self.setup.handler == HandlerMode::Attach || self.is_inbound(handoff);
        let detour = self.handoffs[handoff].hop > 1;
        let early = start && (fresh || self.is_flawed(Flaw::StartsStale)) && attach;
        let forgets = self.is_flawed(Flaw::ForgetsRefusals);
        let Some(daemon) = self.daemon(node) else { return };
        if daemon.refused.contains(&handoff) && !forgets {
            return;
        }
        match daemon.served.get(&handoff) {
            None => _ = daemon.served.insert(handoff, Served::new(Target::new(early), detour)),
            // A repeated one keeps nothing alive when it is old.
            Some(_) if !fresh => return,
            Some(_) => {}
        }
        self.target_event(node, handoff, TargetEvent::Begin);
    }

    pub(crate) fn on_host_ready(&mut self, node: NodeIndex, peer: NodeIndex, asked: HandoffIndex, hop: u8) {
        let Some(handoff) = self.last_known(node, asked, hop) else {
            return self.send(node, peer, Message::Refuse { handoff: asked, reason: Reason::PeerLost });
        };
        let state = self.served_state(node, handoff);
        if handoff != asked && state == Some(TargetState::Closing) {
            self.target_event(node, handoff, TargetEvent::PeerBack);
        } else if handoff != asked || state == Some(TargetState::Done) {
            self.send(node, peer, Message::Handed { handoff: asked });
        } else {
            self.target_event(node, handoff, TargetEvent::HostReady);
        }
        if handoff == asked {
            let given_up = |s: &Served| s.shortcut.state() == ShortcutState::Done;
            let flawed = self.is_flawed(Flaw::GivesDetoursUp);
            if state != Some(TargetState::Closing)
                && !flawed
                && self.served(node, handoff).is_some_and(|s| given_up(s))
            {
                self.send(node, peer, Message::Closed { handoff });
            }
            self.shortcut_event(node, handoff, ShortcutEvent::ViaBack);
        }
    }

    pub(crate) fn on_query(&mut self, node: NodeIndex, handoff: HandoffIndex, fresh: bool) {
        let believes = self.is_flawed(Flaw::BelievesOldQuestions);
        let Some(daemon) = self.daemon(node) else { return };
        if daemon.served.contains_key(&handoff) {
            if fresh || believes {
                self.target_event(node, handoff, TargetEvent::Query);
            }
            return;
        }
        daemon.refused.insert(handoff);
        self.refuse(node, handoff, Reason::PeerTimeout);
    }

    pub(crate) fn on_abort(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        self.target_event(node, handoff, TargetEvent::Abort);
    }

    pub(crate) fn on_closed_ack(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        if self.served(node, handoff).is_some_and(|s| s.shortcut.is_open()) {
            return self.shortcut_event(node, handoff, ShortcutEvent::Released);
        }
        for handoff in self.named_at_home(node, handoff) {
            self.target_event(node, handoff, TargetEvent::ClosedAck);
        }
    }

    /// A handler process runs, or not.
    pub(crate) fn on_spawned(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        let conn = self.handoffs[handoff].conn;
        let port = self.arrival(handoff);
        if let Some(served) = self.served(node, handoff) {
            served.spawning = false;
        }
        let works = self.works(node, Step::Start);
        match self.nodes[node].kernel.ends.get_mut(&(conn, port)) {
            Some(end) if works => end.passed = true,
            _ => self.ends((node, port), conn),
        }
        self.target_event(node, handoff, TargetEvent::Handed(World::outcome(works, Reason::NoHandler)));
    }

    /// The kernel does not know the connection any more.
    pub(crate) fn on_socket_gone(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        self.target_event(node, handoff, TargetEvent::SocketGone);
    }

    pub(crate) fn run_target_timers(&mut self) {
        for node in 0..self.nodes.len() {
            for handoff in 0..self.handoffs.len() {
                let at = (self.handoffs[handoff].conn, self.arrival(handoff));
                if let Some(served) = self.served(node, handoff) {
                    let deadline = served.deadline.take_if(|left| *left == 0);
                    let fence = served.fence.take_if(|left| *left == 0);
                    let detour = served.detour.take_if(|left| *left == 0);
                    let kept = served.kept;
                    if detour.is_some() {
                        self.detour_deadline(node, handoff);
                    }
                    if deadline.is_some() {
                        self.target_event(node, handoff, TargetEvent::Deadline);
                    }
                    if fence.is_some() && !self.is_flawed(Flaw::NoFence) {
                        let end = self.nodes[node].kernel.ends.get(&at);
                        let acknowledged = kept && end.is_some_and(|e| e.acknowledged);
                        self.target_event(node, handoff, TargetEvent::Fence { acknowledged });
                    }
                }
            }
        }
    }

    /// `CLOSED` may have been lost with a channel: says it again, to one machine or to all.
    pub(crate) fn closed_again(&mut self, node: NodeIndex, peer: Option<NodeIndex>) {
        let Some(daemon) = &self.nodes[node].daemon else { return };
        let waits = |s: &Served| s.state() == TargetState::Closing || s.shortcut.is_open();
        let all: Vec<_> = daemon.served.iter().filter(|(_, s)| waits(s)).map(|(h, _)| *h).collect();
        for handoff in all {
            let Handoff { conn, host, .. } = self.handoffs[handoff];
            let is_its = |node| peer.is_none_or(|peer| peer == node);
            if is_its(self.home(conn)) {
                self.shortcut_event(node, handoff, ShortcutEvent::HomeBack);
                self.target_event(node, handoff, TargetEvent::PeerBack);
            }
            if is_its(host) {
                self.shortcut_event(node, handoff, ShortcutEvent::ViaBack);
            }
        }
    }

    /// A host is connected again: what ended while there was no daemon here is not its any more.
    pub(crate) fn tell_gone(&mut self, node: NodeIndex, host: NodeIndex) {
        let Some(daemon) = self.daemon(node) else { return };
        let its: Vec<_> = daemon.gone.extract_if(.., |(peer, ..)| *peer == host).collect();
        for (_, name, owner) in its {
            self.send(node, host, Message::Refuse { handoff: name, reason: Reason::PeerLost });
            self.remove_place(node, owner);
        }
    }

    pub(crate) fn recover_served(&mut self, node: NodeIndex, conn: ConnIndex, port: Port) {
        let rules = self.setup.rules;
        let home = self.home(conn);
        let machine = &mut self.nodes[node];
        let Some(&Rewrite { handoff, mute_in, left }) = machine.kernel.rewrites.get(&(conn, port)) else {
            return;
        };
        if rules.kernel_fence && mute_in.is_some() {
            // Behind a silenced rewrite the socket can be destroyed, whoever has it.
            machine.kernel.remove_socket(conn, port);
            return machine.kernel.remove_rewrite(conn, port, handoff);
        }
        let Handoff { host, first, hop, .. } = self.handoffs[handoff];
        let flow = machine.kernel.flows.get(&(conn, port)).map(|f| f.action);
        let has_left = left || matches!(flow, Some(FlowAction::Redirect(_)));
        let Some(daemon) = &mut machine.daemon else { return };
        if !has_left && machine.kernel.socket(conn, port) == Socket::None {
            if hop > 1 {
                daemon.gone.insert((home, first, handoff));
            }
            daemon.gone.insert((host, handoff, handoff));
            return;
        }
        let target = if has_left { Target::recovered_left(flow.is_some()) } else { Target::recovered() };
        let mut served = Served::new(target, hop > 1);
        served.shortcut.on(ShortcutEvent::Confirmed);
        (served.named, served.confirmed) = (true, true);
        daemon.served.insert(handoff, served);
        self.forget_served(node, handoff);
    }

    /// Feeds the state machine and carries out what it says.
    pub(crate) fn target_event(&mut self, node: NodeIndex, handoff: HandoffIndex, event: TargetEvent) {
        let mut next = Some(event);
        let mut actions = Vec::new();
        while let Some(event) = next.take() {
            let Some(served) = self.served(node, handoff) else { return };
            served.machine.on(&event, &mut actions);
            for action in actions.drain(..) {
                if !self.goes_on(node) {
                    return;
                }
                next = self.target_action(node, handoff, action);
                self.check();
                if next.is_some() {
                    break;
                }
            }
        }
        self.forget_served(node, handoff);
    }

    fn target_action(
        &mut self,
        node: NodeIndex,
        handoff: HandoffIndex,
        action: TargetAction,
    ) -> Option<TargetEvent> {
        let Handoff { conn, host, .. } = self.handoffs[handoff];
        let port = self.arrival(handoff);
        let rules = self.setup.rules;
        match action {
            TargetAction::NoteLeft => self.note_left(node, handoff, true),
            TargetAction::Confirmed => self.confirmed(node, handoff),
            TargetAction::Restore => return Some(TargetEvent::Restored(self.restore(node, handoff))),
            TargetAction::SendReady => {
                self.send(node, host, Message::TargetReady { handoff, started: false });
                self.served(node, handoff)?.deadline = Some(rules.ticks(rules.ready));
            }
            TargetAction::SendStarted => {
                self.send(node, host, Message::TargetReady { handoff, started: true });
                self.served(node, handoff)?.fence = Some(rules.ticks(rules.limits.fence + rules.late));
                self.unconfirmed(node, handoff);
            }
            TargetAction::Refuse(reason) => self.refuse(node, handoff, reason),
            TargetAction::Start => return self.start(node, handoff).map(TargetEvent::Handed),
            TargetAction::SendHanded => self.send(node, host, Message::Handed { handoff }),
            TargetAction::Keep => {
                self.served(node, handoff)?.kept = false;
                self.own_rewrite(node, handoff)?.mute_in = None;
            }
            TargetAction::Discard => {
                let live = self.nodes[node].kernel.socket(conn, port) == Socket::Live;
                self.must(!live, "a live socket is closed");
                self.nodes[node].kernel.remove_socket(conn, port);
                if !self.is_flawed(Flaw::LeavesRewrite) {
                    self.remove_place(node, handoff);
                }
            }
            TargetAction::Withdraw => {
                let served = self.served(node, handoff)?;
                let (kept, parked) = (served.kept, std::mem::take(&mut served.parked));
                self.must(kept, "withdrawn without a duplicate");
                self.nodes[node].kernel.remove_socket(conn, port);
                if self.goes_on(node) {
                    self.hopeless(node, parked);
                    self.remove_place(node, handoff);
                }
            }
            TargetAction::SendClosed => {
                let none = self.nodes[node].kernel.socket(conn, port) == Socket::None;
                self.must(none, "closed, but open");
                self.note_left(node, handoff, false);
                self.send_closed(node, handoff);
                self.served(node, handoff)?.deadline = Some(rules.ticks(rules.closed));
            }
            TargetAction::RemoveRewrite => {
                if !self.served(node, handoff)?.shortcut.is_open() {
                    self.remove_place(node, handoff);
                }
            }
        }
        None
    }

    /// It is certain that the connection is here.
    fn confirmed(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        if let Some(served) = self.served(node, handoff).filter(|s| !s.confirmed) {
            served.confirmed = true;
            self.shortcut_event(node, handoff, ShortcutEvent::Confirmed);
            self.start_parked(node, handoff);
        }
    }

    fn refuse(&mut self, node: NodeIndex, handoff: HandoffIndex, reason: Reason) {
        let host = self.handoffs[handoff].host;
        self.send(node, host, Message::Refuse { handoff, reason });
    }

    pub(crate) fn own_rewrite(&mut self, node: NodeIndex, handoff: HandoffIndex) -> Option<&mut Rewrite> {
        let at = (self.handoffs[handoff].conn, self.arrival(handoff));
        self.nodes[node].kernel.rewrites.get_mut(&at).filter(|r| r.handoff == handoff)
    }

    /// The kernel is told until when it may speak.
    fn unconfirmed(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        let rules = self.setup.rules;
        if rules.kernel_fence
            && self.served_state(node, handoff) != Some(TargetState::Served)
            && let Some(rewrite) = self.own_rewrite(node, handoff)
        {
            rewrite.mute_in = Some(rules.ticks(rules.limits.fence));
        }
    }

    fn restore(&mut self, node: NodeIndex, handoff: HandoffIndex) -> Result<(), Reason> {
        let Handoff { conn, host, hop, first, .. } = self.handoffs[handoff];
        let (port, home) = (self.arrival(handoff), self.home(conn));
        if self.is_inbound(handoff) {
            if !self.hosted(node, first).is_some_and(|f| f.is_away()) {
                return Err(Reason::PeerLost);
            }
        } else if hop > 1 && self.connection_to(node, home).is_none() {
            return Err(Reason::PeerUnreachable);
        }
        let kernel = &self.nodes[node].kernel;
        let free = !kernel.ends.contains_key(&(conn, port)) && !kernel.rewrites.contains_key(&(conn, port));
        if !self.works(node, Step::Restore) || !free {
            return Err(Reason::RestoreFailed);
        }
        let kernel = &mut self.nodes[node].kernel;
        kernel.ends.insert((conn, port), End::restored(handoff));
        if self.goes_on(node) {
            let kernel = &mut self.nodes[node].kernel;
            if port == Port::Public {
                let action = FlowAction::Deliver { waits: true };
                let entry = Flow { handoff, peer: host, hop: 0, action };
                kernel.flows.insert((conn, Port::Entrance(handoff)), entry);
            } else {
                kernel.rewrites.insert((conn, port), Rewrite { handoff, mute_in: None, left: false });
            }
            self.served(node, handoff).ok_or(Reason::Closed)?.named = true;
            if self.is_flawed(Flaw::TellsTooEarly) {
                self.shortcut_event(node, handoff, ShortcutEvent::Confirmed);
            }
        }
        Ok(())
    }

    /// First into the handler's hands, then live.
    fn start(&mut self, node: NodeIndex, handoff: HandoffIndex) -> Option<Result<(), Reason>> {
        let at = (self.handoffs[handoff].conn, self.arrival(handoff));
        if self.setup.handler == HandlerMode::Exec && at.1 != Port::Public {
            self.nodes[node].kernel.ends.get_mut(&at)?.socket = Socket::Live;
            self.served(node, handoff)?.spawning = true;
            return None;
        }
        if !self.works(node, Step::Start) {
            return Some(Err(Reason::NoHandler));
        }
        let end = self.nodes[node].kernel.ends.get_mut(&at)?;
        (end.passed, end.slot) = (true, Verdict::None);
        if self.goes_on(node) {
            let early = self.served(node, handoff)?.machine.early();
            if early {
                self.unconfirmed(node, handoff);
            }
            let end = self.nodes[node].kernel.ends.get_mut(&at)?;
            let was = std::mem::replace(&mut end.socket, Socket::Live);
            self.must(was == Socket::Repair, "a zombie");
            self.served(node, handoff)?.kept = early;
        }
        Some(Ok(()))
    }
}
