//! What can happen next.

use super::super::TargetState;
use super::{
    Channel, ConnIndex, End, Gap, HandoffIndex, NodeIndex, Packet, Place, Socket, Step, Verdict, World,
};

/// One thing that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "fields say whom it happens to")]
pub enum Move {
    /// Time passes.
    Tick,
    /// The next message arrives at this end of a channel, or the news that there are no more.
    Deliver { channel: usize, end: usize },
    /// What was stalled goes on.
    Resume { channel: usize, end: usize },
    /// A host dials a target.
    Dial { from: NodeIndex, to: NodeIndex },
    /// A daemon is started.
    Restart { node: NodeIndex },
    /// A server's library finds the new daemon.
    LibraryReturns { node: NodeIndex },
    /// A handler closes what its daemon has left in repair mode.
    HandlerDrops { at: Place, conn: ConnIndex },
    /// A daemon sees that the kernel has forgotten a connection.
    Look { node: NodeIndex, handoff: HandoffIndex },
    /// A handler process runs.
    Spawned { node: NodeIndex, handoff: HandoffIndex },
    /// A packet arrives at the next machine.
    Arrives { packet: usize },
    /// A library asks for a hand-off.
    Ask { conn: ConnIndex, from: Place, target: NodeIndex },
    /// A client sends data.
    ClientSends { conn: ConnIndex },
    /// A handler sends a part of its answer, and the client acknowledges it.
    HandlerSends { at: Place, conn: ConnIndex },
    /// Client and handler close the connection.
    Finish { at: Place, conn: ConnIndex },
    /// An end of a channel fails; what that end had sent is lost with it, or not.
    Break { channel: usize, end: usize, lost: bool },
    /// Nothing arrives at this end for a while.
    Stall { channel: usize, end: usize },
    /// The next message arrives twice, the second time after all others.
    Duplicate { channel: usize, end: usize },
    /// A daemon dies after so many more actions.
    Kill { node: NodeIndex, after: u8 },
    /// The next such step fails.
    Fail { node: NodeIndex, step: Step },
}

/// Kinds of moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Time.
    Time,
    /// Will happen sooner or later.
    Due,
    /// Happens if somebody wants it.
    Wanted,
    /// Ought not to happen.
    Fault,
}

/// A daemon dies at any of the actions that one event can cause.
const FUSES: u8 = 6;

impl Move {
    /// What kind of move it is.
    #[must_use]
    pub fn class(self) -> Class {
        match self {
            Move::Tick => Class::Time,
            Move::Ask { .. } | Move::ClientSends { .. } | Move::HandlerSends { .. } | Move::Finish { .. } => {
                Class::Wanted
            }
            Move::Break { .. }
            | Move::Stall { .. }
            | Move::Duplicate { .. }
            | Move::Kill { .. }
            | Move::Fail { .. } => Class::Fault,
            _ => Class::Due,
        }
    }
}

impl World {
    /// All that can happen next.
    #[must_use]
    pub fn moves(&self) -> Vec<Move> {
        let mut moves = Vec::new();
        self.channel_moves(&mut moves);
        self.daemon_moves(&mut moves);
        if self.setup.swift
            && let Some(first) = moves.iter().find(|m| self.is_swift(**m))
        {
            return vec![*first];
        }
        self.conn_moves(&mut moves);
        // What is on its way arrives first, unless something holds it up.
        let arrives = moves.iter().any(|m| matches!(m, Move::Deliver { .. }));
        let slow = self.setup.rules.ticks(self.setup.rules.flight);
        let lands = self.wire.iter().any(|(.., age)| *age >= slow);
        if !arrives && !lands && !(0..self.nodes.len()).any(|node| self.library_is_due(node)) {
            moves.push(Move::Tick);
        }
        moves.extend((0..self.wire.len()).map(|packet| Move::Arrives { packet }));
        if self.faults > 0 {
            self.fault_moves(&mut moves);
        }
        moves
    }

    /// Greetings, probes, and what leads to them.
    fn is_swift(&self, what: Move) -> bool {
        match what {
            Move::Dial { .. } => true,
            Move::Deliver { channel, end } => {
                let next = self.channels[channel].ends[end].inbox.front();
                next.is_some_and(|(_, message)| !message.is_about_a_handoff())
            }
            _ => false,
        }
    }

    /// Picks a move by a number: one in sixteen is a fault, if there may be one.
    #[must_use]
    pub fn pick(&self, choice: u16) -> Move {
        let (faults, others): (Vec<_>, Vec<_>) =
            self.moves().into_iter().partition(|m| m.class() == Class::Fault);
        let from = if choice >> 12 == 0 && !faults.is_empty() { &faults } else { &others };
        from.get(usize::from(choice & 0xfff) % from.len().max(1)).copied().unwrap_or(Move::Tick)
    }

    fn channel_moves(&self, moves: &mut Vec<Move>) {
        for (channel, c) in self.channels.iter().enumerate() {
            for end in 0..2 {
                if c.is_due(end) {
                    moves.push(Move::Deliver { channel, end });
                }
                if c.ends[end].open && c.ends[end].stalled {
                    moves.push(Move::Resume { channel, end });
                }
            }
        }
    }

    fn daemon_moves(&self, moves: &mut Vec<Move>) {
        for (node, machine) in self.nodes.iter().enumerate() {
            let Some(daemon) = &machine.daemon else {
                let left = |e: &End| e.socket == Socket::Repair && e.slot != Verdict::Pending;
                let dropped = !machine.kernel.ends.values().any(left);
                if dropped || self.setup.rules.gap == Some(Gap::SlowHandler) {
                    moves.push(Move::Restart { node });
                }
                continue;
            };
            if !machine.library {
                moves.push(Move::LibraryReturns { node });
            }
            for to in 0..self.nodes.len() {
                if self.may_dial(node, to) {
                    moves.push(Move::Dial { from: node, to });
                }
            }
            for (&handoff, served) in &daemon.served {
                let socket = machine.kernel.socket(self.handoffs[handoff].conn, self.arrival(handoff));
                let gone = socket == Socket::None && !self.is_inbound(handoff);
                if served.spawning {
                    moves.push(Move::Spawned { node, handoff });
                } else if served.state() == TargetState::Served && gone {
                    moves.push(Move::Look { node, handoff });
                }
            }
        }
    }

    fn conn_moves(&self, moves: &mut Vec<Move>) {
        for (conn, client) in self.clients.iter().enumerate() {
            if client.sent < self.setup.packets && !client.told {
                moves.push(Move::ClientSends { conn });
            }
        }
        for (node, machine) in self.nodes.iter().enumerate() {
            for (&(conn, port), end) in &machine.kernel.ends {
                if self.may_ask((node, port), conn) {
                    let targets = (0..self.nodes.len()).filter(|t| self.may_go(node, conn, *t));
                    moves.extend(targets.map(|target| Move::Ask { conn, from: (node, port), target }));
                }
                self.handler_moves((node, port), conn, end, moves);
            }
        }
    }

    fn handler_moves(&self, at: Place, conn: ConnIndex, end: &End, moves: &mut Vec<Move>) {
        if !end.passed || end.by.is_none() {
            return;
        }
        match end.socket {
            Socket::Live => {
                if self.clients[conn].saw < end.by && !self.clients[conn].told {
                    moves.push(Move::HandlerSends { at, conn });
                }
                if self.destination(conn) == Some(at) {
                    moves.push(Move::Finish { at, conn });
                }
            }
            Socket::Repair if end.slot != Verdict::Pending => moves.push(Move::HandlerDrops { at, conn }),
            _ => {}
        }
    }

    fn fault_moves(&self, moves: &mut Vec<Move>) {
        for (channel, c) in self.channels.iter().enumerate() {
            for end in 0..2 {
                let (this, other) = (&c.ends[end], &c.ends[1 - end]);
                if !this.open {
                    continue;
                }
                moves.push(Move::Break { channel, end, lost: false });
                if !other.inbox.is_empty() {
                    moves.push(Move::Break { channel, end, lost: true });
                }
                if c.is_due(end) {
                    moves.push(Move::Stall { channel, end });
                }
                if this.inbox.front().is_some_and(|(_, message)| message.is_about_a_handoff()) {
                    moves.push(Move::Duplicate { channel, end });
                }
            }
        }
        for (node, machine) in self.nodes.iter().enumerate() {
            if machine.daemon.is_none() {
                continue;
            }
            if machine.fuse.is_none() {
                let busy = self.is_about_to_act(node);
                moves.extend((0..=FUSES).filter(|n| *n == 0 || busy).map(|after| Move::Kill { node, after }));
            }
            if machine.fails.is_none() {
                let host = [Step::Hold, Step::Dump, Step::Redirect].as_slice();
                let target = [Step::Restore, Step::Start].as_slice();
                let sends = node < self.setup.hosts || self.setup.guests;
                let takes = node >= self.setup.hosts || self.setup.guests;
                let steps = [(sends, host), (takes, target)].into_iter().filter(|(does, _)| *does);
                moves.extend(steps.flat_map(|(_, steps)| steps).map(|&step| Move::Fail { node, step }));
            }
        }
    }

    /// A message or a timer is due at the daemon, or its library may ask.
    fn is_about_to_act(&self, node: NodeIndex) -> bool {
        let due = |c: &Channel| (0..2).any(|end| c.ends[end].node == node && c.is_due(end));
        let mut ends = self.nodes[node].kernel.ends.keys();
        self.channels.iter().any(due)
            || ends.any(|(conn, port)| self.may_ask((node, *port), *conn))
            || self.nodes[node].timers().any(|left| left <= 1)
    }

    fn may_ask(&self, (node, port): Place, conn: ConnIndex) -> bool {
        let machine = &self.nodes[node];
        let settled = |e: &End| e.passed && e.socket == Socket::Live && e.slot != Verdict::Pending;
        machine.daemon.is_some()
            && machine.library
            && (node == self.home(conn) || self.setup.guests)
            && machine.kernel.ends.get(&(conn, port)).is_some_and(settled)
            && self.clients[conn].asks < self.setup.asks
    }

    /// Can a connection go from this machine to that?
    fn may_go(&self, node: NodeIndex, conn: ConnIndex, target: NodeIndex) -> bool {
        target != node && (target >= self.setup.hosts || target == self.home(conn))
    }

    /// Lets it happen.
    pub fn step(&mut self, what: Move) {
        if what.class() == Class::Fault {
            self.faults = self.faults.saturating_sub(1);
        }
        match what {
            Move::Tick => self.tick(),
            Move::Deliver { channel, end } => self.deliver(channel, end),
            Move::Resume { channel, end } => self.channels[channel].ends[end].stalled = false,
            Move::Dial { from, to } => self.dial(from, to),
            Move::Restart { node } => self.restart(node),
            Move::LibraryReturns { node } => self.library_returns(node),
            Move::HandlerDrops { at: (node, port), conn } => {
                self.nodes[node].kernel.remove_socket(conn, port)
            }
            Move::Look { node, handoff } => self.on_socket_gone(node, handoff),
            Move::Spawned { node, handoff } => self.on_spawned(node, handoff),
            Move::Arrives { packet } => {
                let (conn, to, packet, _) = self.wire.remove(packet);
                self.comes_in(to, conn, packet, 0);
            }
            Move::Ask { conn, from, target } => self.on_offload(conn, from, target),
            Move::ClientSends { conn } => {
                let client = &mut self.clients[conn];
                let packet = Packet { number: Some(client.sent), acknowledges: client.saw };
                client.sent += 1;
                self.client_sends(conn, packet);
            }
            Move::HandlerSends { at, conn } => self.handler_sends(at, conn),
            Move::Finish { at, conn } => {
                self.clients[conn].finished = true;
                self.ends(at, conn);
            }
            Move::Break { channel, end, lost } => {
                self.broken = true;
                if lost {
                    self.channels[channel].ends[1 - end].inbox.clear();
                }
                self.channel_failed(channel, end);
            }
            Move::Stall { channel, end } => self.channels[channel].ends[end].stalled = true,
            Move::Duplicate { channel, end } => {
                let inbox = &mut self.channels[channel].ends[end].inbox;
                inbox.extend(inbox.front().copied());
            }
            Move::Kill { node, after: 0 } => self.kill(node),
            Move::Kill { node, after } => self.nodes[node].fuse = Some(after - 1),
            Move::Fail { node, step } => {
                self.broken = true;
                self.nodes[node].fails = Some(step);
            }
        }
        self.check();
    }
}
