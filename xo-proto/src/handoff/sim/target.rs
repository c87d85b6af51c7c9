//! The target's driver: what `xo-peerd` does in `target.rs` and `recover.rs`.

use super::super::{Target, TargetAction, TargetEvent, TargetState};
use super::{
    ConnIndex, Flaw, HandlerMode, Handoff, HandoffIndex, Message, NodeIndex, Rewrite, Socket, Step, Ticks,
    World,
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
    /// Timers: what is left.
    pub(crate) deadline: Option<Ticks>,
    pub(crate) fence: Option<Ticks>,
}

impl Served {
    fn new(machine: Target) -> Served {
        Served { machine, spawning: false, kept: false, deadline: None, fence: None }
    }

    pub(crate) fn state(&self) -> TargetState {
        self.machine.state()
    }
}

impl World {
    fn served(&mut self, node: NodeIndex, handoff: HandoffIndex) -> Option<&mut Served> {
        self.daemon(node)?.served.get_mut(&handoff)
    }

    pub(crate) fn served_state(&self, node: NodeIndex, handoff: HandoffIndex) -> Option<TargetState> {
        Some(self.nodes[node].daemon.as_ref()?.served.get(&handoff)?.state())
    }

    pub(crate) fn on_begin(&mut self, node: NodeIndex, handoff: HandoffIndex, start: bool, fresh: bool) {
        let attach = self.setup.handler == HandlerMode::Attach;
        let early = start && (fresh || self.is_flawed(Flaw::StartsStale)) && attach;
        let forgets = self.is_flawed(Flaw::ForgetsRefusals);
        let Some(daemon) = self.daemon(node) else { return };
        if daemon.refused.contains(&handoff) && !forgets {
            return;
        }
        match daemon.served.get(&handoff) {
            None => _ = daemon.served.insert(handoff, Served::new(Target::new(early))),
            // A repeated one keeps nothing alive when it is old.
            Some(_) if !fresh => return,
            Some(_) => {}
        }
        self.target_event(node, handoff, TargetEvent::Begin);
    }

    pub(crate) fn on_host_ready(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        if self.served(node, handoff).is_some() {
            self.target_event(node, handoff, TargetEvent::HostReady);
        } else {
            self.refuse(node, handoff, Reason::PeerLost);
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
        self.target_event(node, handoff, TargetEvent::ClosedAck);
    }

    /// A handler process runs, or not.
    pub(crate) fn on_spawned(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        let conn = self.handoffs[handoff].conn;
        if let Some(served) = self.served(node, handoff) {
            served.spawning = false;
        }
        let works = self.works(node, Step::Start);
        if works {
            self.nodes[node].kernel.passed[conn] = true;
        } else {
            self.ends(node, conn);
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
                let conn = self.handoffs[handoff].conn;
                if let Some(served) = self.served(node, handoff) {
                    let deadline = served.deadline.take_if(|left| *left == 0);
                    let fence = served.fence.take_if(|left| *left == 0);
                    let kept = served.kept;
                    if deadline.is_some() {
                        self.target_event(node, handoff, TargetEvent::Deadline);
                    }
                    if fence.is_some() && !self.is_flawed(Flaw::NoFence) {
                        let acknowledged = kept && self.nodes[node].kernel.acknowledged[conn];
                        self.target_event(node, handoff, TargetEvent::Fence { acknowledged });
                    }
                }
            }
        }
    }

    /// `CLOSED` may have been lost with a channel.
    pub(crate) fn closed_again(&mut self, node: NodeIndex, host: NodeIndex) {
        let Some(daemon) = &self.nodes[node].daemon else { return };
        let waits = |s: &Served| s.state() == TargetState::Closing;
        let its = |(h, s): &(&HandoffIndex, &Served)| self.handoffs[**h].host == host && waits(s);
        let handoffs: Vec<_> = daemon.served.iter().filter(its).map(|(h, _)| *h).collect();
        for handoff in handoffs {
            self.target_event(node, handoff, TargetEvent::PeerBack);
        }
    }

    /// A host is connected again: what ended while there was no daemon here is not its any more.
    pub(crate) fn tell_gone(&mut self, node: NodeIndex, host: NodeIndex) {
        let handoffs = self.handoffs.clone();
        let Some(daemon) = self.daemon(node) else { return };
        let its: Vec<_> = daemon.gone.extract_if(.., |h| handoffs[*h].host == host).collect();
        for handoff in its {
            self.refuse(node, handoff, Reason::PeerLost);
            self.nodes[node].kernel.remove_rewrite(handoffs[handoff].conn, handoff);
        }
    }

    pub(crate) fn recover_served(&mut self, node: NodeIndex, conn: ConnIndex) {
        let rules = self.setup.rules;
        let machine = &mut self.nodes[node];
        let Some(Rewrite { handoff, mute_in }) = machine.kernel.rewrites[conn] else { return };
        if rules.kernel_fence && mute_in.is_some() {
            // Behind a silenced rewrite the socket can be destroyed, whoever has it.
            machine.kernel.remove_socket(conn);
            return machine.kernel.remove_rewrite(conn, handoff);
        }
        let known = machine.kernel.sockets[conn] != Socket::None;
        let Some(daemon) = &mut machine.daemon else { return };
        if known {
            daemon.served.insert(handoff, Served::new(Target::recovered()));
        } else {
            daemon.gone.insert(handoff);
        }
    }

    /// Feeds the state machine and carries out what it says.
    fn target_event(&mut self, node: NodeIndex, handoff: HandoffIndex, event: TargetEvent) {
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
        if let Some(daemon) = self.daemon(node)
            && daemon.served.get(&handoff).is_some_and(|s| s.state() == TargetState::Done)
        {
            daemon.served.remove(&handoff);
            daemon.refused.insert(handoff);
        }
    }

    fn target_action(
        &mut self,
        node: NodeIndex,
        handoff: HandoffIndex,
        action: TargetAction,
    ) -> Option<TargetEvent> {
        let Handoff { conn, host, .. } = self.handoffs[handoff];
        let rules = self.setup.rules;
        match action {
            TargetAction::NoteLeft | TargetAction::Confirmed => {}
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
                self.must(self.nodes[node].kernel.sockets[conn] != Socket::Live, "a live socket is closed");
                self.nodes[node].kernel.remove_socket(conn);
                if !self.is_flawed(Flaw::LeavesRewrite) {
                    self.nodes[node].kernel.remove_rewrite(conn, handoff);
                }
            }
            TargetAction::Withdraw => {
                let kept = self.served(node, handoff)?.kept;
                self.must(kept, "withdrawn without a duplicate");
                self.nodes[node].kernel.remove_socket(conn);
                if self.goes_on(node) {
                    self.nodes[node].kernel.remove_rewrite(conn, handoff);
                }
            }
            TargetAction::SendClosed => {
                self.must(self.nodes[node].kernel.sockets[conn] == Socket::None, "closed, but open");
                self.send(node, host, Message::Closed { handoff });
                self.served(node, handoff)?.deadline = Some(rules.ticks(rules.closed));
            }
            TargetAction::RemoveRewrite => self.nodes[node].kernel.remove_rewrite(conn, handoff),
        }
        None
    }

    fn refuse(&mut self, node: NodeIndex, handoff: HandoffIndex, reason: Reason) {
        let host = self.handoffs[handoff].host;
        self.send(node, host, Message::Refuse { handoff, reason });
    }

    fn own_rewrite(&mut self, node: NodeIndex, handoff: HandoffIndex) -> Option<&mut Rewrite> {
        let conn = self.handoffs[handoff].conn;
        self.nodes[node].kernel.rewrites[conn].as_mut().filter(|r| r.handoff == handoff)
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
        let conn = self.handoffs[handoff].conn;
        let kernel = &self.nodes[node].kernel;
        let free = kernel.sockets[conn] == Socket::None && kernel.rewrites[conn].is_none();
        if !self.works(node, Step::Restore) || !free {
            return Err(Reason::RestoreFailed);
        }
        self.nodes[node].kernel.sockets[conn] = Socket::Repair;
        if self.goes_on(node) {
            self.nodes[node].kernel.rewrites[conn] = Some(Rewrite { handoff, mute_in: None });
        }
        Ok(())
    }

    /// First into the handler's hands, then live.
    fn start(&mut self, node: NodeIndex, handoff: HandoffIndex) -> Option<Result<(), Reason>> {
        let conn = self.handoffs[handoff].conn;
        if self.setup.handler == HandlerMode::Exec {
            self.nodes[node].kernel.sockets[conn] = Socket::Live;
            self.served(node, handoff)?.spawning = true;
            return None;
        }
        if !self.works(node, Step::Start) {
            return Some(Err(Reason::NoHandler));
        }
        self.nodes[node].kernel.passed[conn] = true;
        if self.goes_on(node) {
            let early = self.served(node, handoff)?.machine.early();
            if early {
                self.unconfirmed(node, handoff);
            }
            self.must(self.nodes[node].kernel.sockets[conn] == Socket::Repair, "a zombie");
            self.nodes[node].kernel.sockets[conn] = Socket::Live;
            self.served(node, handoff)?.kept = early;
        }
        Some(Ok(()))
    }
}
