//! What can happen next.

use super::super::TargetState;
use super::{
    Channel, ConnIndex, FlowAction, Gap, HandoffIndex, NodeIndex, Packet, Socket, Step, Verdict, World,
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
    HandlerDrops { node: NodeIndex, conn: ConnIndex },
    /// A daemon sees that the kernel has forgotten a connection.
    Look { node: NodeIndex, handoff: HandoffIndex },
    /// A handler process runs.
    Spawned { node: NodeIndex, handoff: HandoffIndex },
    /// A library asks for a hand-off.
    Ask { conn: ConnIndex, target: NodeIndex },
    /// A client sends data.
    ClientSends { conn: ConnIndex },
    /// A handler sends a part of its answer, and the client acknowledges it.
    HandlerSends { node: NodeIndex, conn: ConnIndex },
    /// Client and handler close the connection.
    Finish { node: NodeIndex, conn: ConnIndex },
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
        self.conn_moves(&mut moves);
        // What is on its way arrives first, unless something holds it up.
        let arrives = moves.iter().any(|m| matches!(m, Move::Deliver { .. }));
        if !arrives && !(0..self.nodes.len()).any(|node| self.library_is_due(node)) {
            moves.push(Move::Tick);
        }
        if self.faults > 0 {
            self.fault_moves(&mut moves);
        }
        moves
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
                let dropped = !(0..self.clients.len())
                    .any(|conn| node != self.home(conn) && machine.kernel.sockets[conn] == Socket::Repair);
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
                let gone = machine.kernel.sockets[self.handoffs[handoff].conn] == Socket::None;
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
            let home = self.home(conn);
            if self.may_ask(conn) {
                moves.extend((self.setup.hosts..self.nodes.len()).map(|target| Move::Ask { conn, target }));
            }
            if client.sent < self.setup.packets && !client.told {
                moves.push(Move::ClientSends { conn });
            }
            for node in (0..self.nodes.len()).filter(|n| *n != home) {
                self.handler_moves(node, conn, moves);
            }
        }
    }

    fn handler_moves(&self, node: NodeIndex, conn: ConnIndex, moves: &mut Vec<Move>) {
        let kernel = &self.nodes[node].kernel;
        if !kernel.passed[conn] {
            return;
        }
        let flow = self.nodes[self.home(conn)].kernel.flows[conn];
        let redirected = flow.is_some_and(|(_, action)| action == FlowAction::Redirect(node));
        match kernel.sockets[conn] {
            Socket::Live => {
                if !self.clients[conn].saw_target && !self.clients[conn].told {
                    moves.push(Move::HandlerSends { node, conn });
                }
                if redirected {
                    moves.push(Move::Finish { node, conn });
                }
            }
            Socket::Repair => moves.push(Move::HandlerDrops { node, conn }),
            Socket::None => {}
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
                let steps = if node < self.setup.hosts { host } else { &[Step::Restore, Step::Start] };
                moves.extend(steps.iter().map(|&step| Move::Fail { node, step }));
            }
        }
    }

    /// A message or a timer is due at the daemon, or its library may ask.
    fn is_about_to_act(&self, node: NodeIndex) -> bool {
        let due = |c: &Channel| (0..2).any(|end| c.ends[end].node == node && c.is_due(end));
        let asks = |conn| self.home(conn) == node && self.may_ask(conn);
        self.channels.iter().any(due)
            || (0..self.clients.len()).any(asks)
            || self.nodes[node].timers().any(|left| left <= 1)
    }

    fn may_ask(&self, conn: ConnIndex) -> bool {
        let machine = &self.nodes[self.home(conn)];
        machine.daemon.is_some()
            && machine.library
            && machine.kernel.sockets[conn] == Socket::Live
            && machine.slots[conn] != Verdict::Pending
            && self.clients[conn].asks < self.setup.asks
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
            Move::HandlerDrops { node, conn } => self.nodes[node].kernel.remove_socket(conn),
            Move::Look { node, handoff } => self.on_socket_gone(node, handoff),
            Move::Spawned { node, handoff } => self.on_spawned(node, handoff),
            Move::Ask { conn, target } => self.on_offload(conn, target),
            Move::ClientSends { conn } => {
                let client = &mut self.clients[conn];
                let packet = Packet { number: Some(client.sent), acknowledges: client.saw_target };
                client.sent += 1;
                self.client_sends(conn, packet);
            }
            Move::HandlerSends { node, conn } => self.handler_sends(node, conn),
            Move::Finish { node, conn } => {
                self.clients[conn].finished = true;
                self.ends(node, conn);
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
