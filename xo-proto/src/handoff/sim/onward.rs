//! Moving on and coming home: what `xo-peerd` does in `onward.rs`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::super::{
    GuestEvent, HostEvent, ShortcutAction, ShortcutEvent, ShortcutState, Target, TargetEvent, TargetState,
};
use super::target::Served;
use super::{
    ConnIndex, Flaw, Flow, FlowAction, Handoff, HandoffIndex, Message, NodeIndex, Place, Port, Socket, World,
};
use crate::reason::Reason;

/// A place as the machines know it.
pub(crate) fn address((node, port): Place) -> SocketAddr {
    let number = match port {
        Port::Public => 0,
        Port::Guest(handoff) => 2 * handoff + 1,
        Port::Entrance(handoff) => 2 * handoff + 2,
    };
    SocketAddr::from((Ipv4Addr::from(node as u32), number as u16))
}

/// What [`address`] has made of it.
pub(crate) fn place(address: SocketAddr) -> Place {
    let IpAddr::V4(node) = address.ip() else { return (0, Port::Public) };
    let number = usize::from(address.port());
    let port = match number.checked_sub(1) {
        None => Port::Public,
        Some(n) if n % 2 == 0 => Port::Guest(n / 2),
        Some(n) => Port::Entrance(n / 2),
    };
    (u32::from(node) as usize, port)
}

impl World {
    pub(crate) fn is_inbound(&self, handoff: HandoffIndex) -> bool {
        let Handoff { conn, target, .. } = self.handoffs[handoff];
        target == self.home(conn)
    }

    /// Address of the socket that a hand-off restores.
    pub(crate) fn arrival(&self, handoff: HandoffIndex) -> Port {
        if self.is_inbound(handoff) { Port::Public } else { Port::Guest(handoff) }
    }

    /// Where packets are to be sent for it.
    pub(crate) fn entrance(&self, handoff: HandoffIndex) -> Place {
        let target = self.handoffs[handoff].target;
        (target, if self.is_inbound(handoff) { Port::Entrance(handoff) } else { Port::Guest(handoff) })
    }

    /// What is served under this address.
    pub(crate) fn known_by(&self, node: NodeIndex, conn: ConnIndex, port: Port) -> Option<HandoffIndex> {
        let daemon = self.nodes[node].daemon.as_ref()?;
        let is_it = |h: HandoffIndex| self.handoffs[h].conn == conn && self.arrival(h) == port;
        daemon.served.iter().find(|(h, s)| s.named && is_it(**h)).map(|(h, _)| *h)
    }

    /// Begins a hand-off, at once or when it is settled that the connection is here.
    pub(crate) fn start_when_settled(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        let Handoff { conn, port, target, .. } = self.handoffs[handoff];
        if let Some(key) = self.known_by(node, conn, port) {
            let here = self.is_inbound(key);
            let Some(served) = self.served(node, key) else { return };
            match served.state() {
                TargetState::Served if !here => {}
                TargetState::Started | TargetState::Unconfirmed => return served.parked.push(handoff),
                _ => return self.hopeless(node, vec![handoff]),
            }
            if let Some(flow) = self.hosted(node, handoff) {
                flow.of_guest(key);
            }
        }
        let Some((channel, end)) = self.connection_to(node, target) else {
            return self.host_event(node, handoff, HostEvent::Hopeless(Reason::PeerUnreachable));
        };
        let early = self.setup.early && self.channels[channel].ends[end].proven;
        if let Some(flow) = self.hosted(node, handoff) {
            flow.begins(early);
        }
        self.host_event(node, handoff, HostEvent::Start);
    }

    /// It is settled that a connection is here: moves that its server has asked for meanwhile.
    pub(crate) fn start_parked(&mut self, node: NodeIndex, key: HandoffIndex) {
        let Some(served) = self.served(node, key) else { return };
        for handoff in std::mem::take(&mut served.parked) {
            self.start_when_settled(node, handoff);
        }
    }

    /// Hand-offs that cannot take place.
    pub(crate) fn hopeless(&mut self, node: NodeIndex, handoffs: Vec<HandoffIndex>) {
        for handoff in handoffs {
            self.host_event(node, handoff, HostEvent::Hopeless(Reason::Closed));
        }
    }

    /// Nothing more is to be done about a connection.
    pub(crate) fn forget_served(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        let patience = self.setup.rules.ticks(self.setup.rules.closed);
        let Some(served) = self.served(node, handoff).filter(|s| s.state() == TargetState::Done) else {
            return;
        };
        if served.shortcut.is_open() {
            served.detour.get_or_insert(patience);
            return;
        }
        let parked = std::mem::take(&mut served.parked);
        if !self.is_flawed(Flaw::LeavesRewrite) {
            self.remove_place(node, handoff);
        }
        if let Some(daemon) = self.daemon(node) {
            daemon.served.remove(&handoff);
            daemon.refused.insert(handoff);
        }
        self.hopeless(node, parked);
    }

    /// Removes the entry in a steering table.
    pub(crate) fn remove_place(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        let Handoff { conn, .. } = self.handoffs[handoff];
        let kernel = &mut self.nodes[node].kernel;
        kernel.remove_flow(conn, Port::Entrance(handoff), handoff);
        kernel.remove_rewrite(conn, Port::Guest(handoff), handoff);
        if let Some(served) = self.served(node, handoff) {
            served.named = false;
        }
    }

    /// Connections that came by a detour, by the name that their home has for them.
    fn at_home(&self, node: NodeIndex, first: HandoffIndex) -> Vec<HandoffIndex> {
        let Some(daemon) = &self.nodes[node].daemon else { return Vec::new() };
        let is_it = |h: &HandoffIndex| self.handoffs[*h].first == first && self.handoffs[*h].hop > 1;
        daemon.served.keys().copied().filter(is_it).collect()
    }

    pub(crate) fn named_at_home(&self, node: NodeIndex, name: HandoffIndex) -> Vec<HandoffIndex> {
        let all = self.at_home(node, name);
        if all.is_empty() { vec![name] } else { all }
    }

    /// What is known here of a connection that is asked about; of several stays the last.
    pub(crate) fn last_known(&self, node: NodeIndex, asked: HandoffIndex, hop: u8) -> Option<HandoffIndex> {
        let daemon = self.nodes[node].daemon.as_ref()?;
        let all = self.at_home(node, asked).into_iter().chain([asked]);
        let known = all.filter(|h| daemon.served.contains_key(h));
        let last = known.max_by_key(|h| self.handoffs[*h].hop)?;
        let knows_old = self.is_flawed(Flaw::AnswersOfOldVisits);
        (self.handoffs[last].hop >= hop || knows_old).then_some(last)
    }

    /// Feeds the shortcut of a connection and carries out what it says.
    pub(crate) fn shortcut_event(&mut self, node: NodeIndex, handoff: HandoffIndex, event: ShortcutEvent) {
        let Handoff { conn, host, first, hop, .. } = self.handoffs[handoff];
        let here = self.is_inbound(handoff);
        let patience = self.setup.rules.ticks(self.setup.rules.closed);
        let Some(served) = self.served(node, handoff) else { return };
        let over = served.state() == TargetState::Closing;
        let Some(action) = served.shortcut.on(event) else { return };
        if !self.goes_on(node) {
            return;
        }
        match action {
            ShortcutAction::SendMoved if here => {
                self.come_home(node, handoff);
                self.shortcut_event(node, handoff, ShortcutEvent::MovedAck);
            }
            ShortcutAction::SendMoved => {
                let at = self.entrance(handoff);
                self.send(node, self.home(conn), Message::Moved { first, hop, at });
            }
            ShortcutAction::SendClosed => {
                self.send(node, host, Message::Closed { handoff });
                if event == ShortcutEvent::MovedAck {
                    if let Some(served) = self.served(node, handoff) {
                        served.detour = Some(patience);
                    }
                    if over {
                        self.target_event(node, handoff, TargetEvent::PeerBack);
                    }
                }
            }
            ShortcutAction::Close => {
                if here {
                    self.target_event(node, handoff, TargetEvent::Home);
                }
                self.forget_served(node, handoff);
            }
        }
    }

    /// Who is to be told about a connection's way has been silent for long.
    pub(crate) fn detour_deadline(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        let Some(served) = self.served(node, handoff) else { return };
        let telling = served.shortcut.state() == ShortcutState::Telling;
        if !telling || served.state() == TargetState::Done {
            self.shortcut_event(node, handoff, ShortcutEvent::GiveUp);
        }
    }

    /// The redirect goes first: what a daemon finds that dies in between is as before, or all but over.
    fn come_home(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        let first = self.handoffs[handoff].first;
        if let Some(served) = self.served(node, handoff) {
            served.named = false;
        }
        if self.is_flawed(Flaw::NotesHomeFirst) {
            self.note_home(node, handoff);
            if !self.goes_on(node) {
                return;
            }
        }
        self.host_event(node, first, HostEvent::Returned);
        if self.goes_on(node) {
            self.note_home(node, handoff);
        }
    }

    fn note_home(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        let at = (self.handoffs[handoff].conn, Port::Entrance(handoff));
        let entry = self.nodes[node].kernel.flows.get_mut(&at);
        if let Some(entry) = entry.filter(|f| f.handoff == handoff) {
            entry.action = FlowAction::Deliver { waits: false };
        }
    }

    /// `CLOSED`: to the home; while it does not know this place, to the machine that does.
    pub(crate) fn send_closed(&mut self, node: NodeIndex, handoff: HandoffIndex) {
        let Handoff { conn, host, first, .. } = self.handoffs[handoff];
        let Some(served) = self.served(node, handoff) else { return };
        if served.shortcut.state() == ShortcutState::Waiting {
            self.send(node, host, Message::Closed { handoff });
        } else {
            self.send(node, self.home(conn), Message::Closed { handoff: first });
        }
    }

    pub(crate) fn on_moved(
        &mut self,
        node: NodeIndex,
        peer: NodeIndex,
        first: HandoffIndex,
        hop: u8,
        at: Place,
    ) {
        let any = self.is_flawed(Flaw::FollowsOldMoves);
        if let Some(flow) = self.hosted(node, first) {
            let newer = hop > flow.hop || any;
            if newer && !flow.is_away() {
                return;
            }
            if newer {
                (flow.hop, flow.target) = (hop, peer);
                self.host_event(node, first, HostEvent::Moved(address(at)));
            }
        }
        if !self.is_flawed(Flaw::NeverAcknowledgesMoves) {
            self.send(node, peer, Message::MovedAck { first, hop });
        }
    }

    pub(crate) fn on_moved_ack(&mut self, node: NodeIndex, first: HandoffIndex, hop: u8) {
        for handoff in self.named_at_home(node, first) {
            if self.handoffs[handoff].hop == hop {
                self.shortcut_event(node, handoff, ShortcutEvent::MovedAck);
            }
        }
    }

    /// Points the redirect of a connection of this machine at its new place.
    pub(crate) fn repoint(&mut self, node: NodeIndex, handoff: HandoffIndex, to: Place) {
        let Handoff { conn, port, .. } = self.handoffs[handoff];
        let Some(flow) = self.hosted(node, handoff) else { return };
        flow.to = Some(to);
        let (peer, hop) = (flow.target, flow.hop);
        let entry = self.nodes[node].kernel.flows.get_mut(&(conn, port));
        if let Some(entry) = entry.filter(|f| f.handoff == handoff) {
            *entry = Flow { handoff, peer, hop, action: FlowAction::Redirect(to) };
        }
    }

    /// What became of a guest, for its record here.
    pub(crate) fn guest_event(&mut self, node: NodeIndex, guest: HandoffIndex, event: GuestEvent) {
        self.target_event(node, guest, TargetEvent::Guest(event));
    }

    pub(crate) fn guest_left(&mut self, node: NodeIndex, guest: HandoffIndex) {
        self.guest_event(node, guest, GuestEvent::Left);
    }

    /// Notes in the rewrite whether a connection has left.
    pub(crate) fn note_left(&mut self, node: NodeIndex, handoff: HandoffIndex, left: bool) {
        if left && self.is_flawed(Flaw::ForgetsThatItLeft) {
            return;
        }
        if let Some(rewrite) = self.own_rewrite(node, handoff) {
            rewrite.left = left;
        }
    }

    /// The end of the detour of a connection that has come home, or that was about to.
    pub(crate) fn recover_returned(&mut self, node: NodeIndex, conn: ConnIndex, port: Port) {
        let Some(&Flow { handoff, peer, action, .. }) = self.nodes[node].kernel.flows.get(&(conn, port))
        else {
            return;
        };
        let waits = action == FlowAction::Deliver { waits: true };
        let own = self.nodes[node].kernel.flows.get(&(conn, Port::Public)).filter(|_| waits);
        let own = own.map(|f| f.handoff);
        let away = own.is_some_and(|h| self.hosted(node, h).is_some_and(|f| f.is_away()));
        let none = self.nodes[node].kernel.socket(conn, Port::Public) == Socket::None;
        let patience = self.setup.rules.ticks(self.setup.rules.closed);
        let Some(daemon) = self.daemon(node) else { return };
        if away && none {
            daemon.gone.insert((peer, handoff, handoff));
            return;
        }
        let mut served = Served::new(Target::recovered(), true);
        if !away {
            served.confirmed = true;
            served.shortcut.on(ShortcutEvent::Confirmed);
            served.shortcut.on(ShortcutEvent::MovedAck);
            served.detour = Some(patience);
        }
        daemon.served.insert(handoff, served);
        if !away {
            self.note_home(node, handoff);
        }
    }

    /// Now and then: what nobody may have said.
    pub(crate) fn sweep(&mut self) {
        if self.channels.iter().any(|c| c.ends.iter().any(|e| !e.inbox.is_empty())) {
            return;
        }
        for node in 0..self.nodes.len() {
            let Some(daemon) = &self.nodes[node].daemon else { continue };
            let over = |h: HandoffIndex| self.clients[self.handoffs[h].conn].finished;
            let away = daemon.hosted.iter().filter(|(h, f)| f.is_away() && over(**h));
            for handoff in away.map(|(h, _)| *h).collect::<Vec<_>>() {
                self.host_event(node, handoff, HostEvent::PeerBack);
            }
            self.closed_again(node, None);
        }
    }
}
