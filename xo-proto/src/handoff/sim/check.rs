//! What must hold.

use super::super::{HostState, TargetState};
use super::{Class, ConnIndex, FlowAction, HandoffIndex, Move, NodeIndex, Place, Socket, Verdict, World};

/// What was violated, in words.
pub type Violation = &'static str;

/// It goes on for ever.
pub const NEVER_ENDS: Violation = "it never ends";

/// Quiet has come long before.
const MOST_STEPS: usize = 100_000;

impl World {
    /// Notes a violation; the first one counts.
    pub(crate) fn must(&mut self, holds: bool, violation: Violation) {
        if !holds && self.violation.is_none() {
            self.violation = Some(violation);
        }
    }

    /// What holds after every single action.
    pub(crate) fn check(&mut self) {
        for conn in 0..self.clients.len() {
            self.must(self.live_ends(conn).count() <= 1, "two live ends");
        }
    }

    /// Where the connection is in service.
    pub(crate) fn live_ends(&self, conn: ConnIndex) -> impl Iterator<Item = Place> {
        let fence = self.setup.rules.kernel_fence;
        self.nodes.iter().enumerate().flat_map(move |(node, machine)| {
            let its = machine.kernel.ends.keys().filter(move |(c, _)| *c == conn);
            let live = its.filter(move |(_, port)| machine.kernel.is_live(conn, *port, fence));
            live.map(move |(_, port)| (node, *port))
        })
    }

    /// A server goes on with a connection that was asked to be moved by this hand-off.
    pub(crate) fn check_taken_back(&mut self, conn: ConnIndex, asked: Option<HandoffIndex>) {
        let client = &self.clients[conn];
        let holds = client.saw < asked || client.told || client.evidence_lost;
        self.must(holds, "the client has seen another answer already");
        self.must(!self.clients[conn].finished, "goes on after its end");
    }

    /// Nothing more goes wrong; what must happen happens, until nothing more does. Then every connection that has moved is
    /// closed, and what was kept about it must go. Returns what happened, as far as the first violation.
    pub fn settle(&mut self) -> Vec<Move> {
        let mut moves = Vec::new();
        self.faults = 0;
        self.run_down(&mut moves);
        while let Some(end) = self.moves().into_iter().find(|m| matches!(m, Move::Finish { .. })) {
            moves.push(end);
            self.step(end);
        }
        self.run_down(&mut moves);
        moves
    }

    fn run_down(&mut self, moves: &mut Vec<Move>) {
        for _ in 0..MOST_STEPS {
            if self.violation.is_some() {
                return;
            }
            let due = self.moves().into_iter().find(|m| m.class() == Class::Due);
            let before = due.is_none().then(|| self.clone());
            let next = due.unwrap_or(Move::Tick);
            self.step(next);
            if before.is_some_and(|before| before == *self) {
                return self.check_quiet();
            }
            moves.push(next);
        }
        self.must(false, NEVER_ENDS);
    }

    /// What holds when nothing more happens by itself.
    pub fn check_quiet(&mut self) {
        for conn in 0..self.clients.len() {
            self.check_place(conn);
            self.check_entries(conn);
            let mut ends = self.nodes.iter().flat_map(|n| &n.kernel.ends);
            let waits = ends.any(|((c, _), e)| *c == conn && e.slot == Verdict::Pending);
            self.must(!waits, "no verdict");
            let client = self.clients[conn].clone();
            let missing = ((1_u16 << client.sent) - 1) & !client.received & !client.excused;
            // Where there is no end, the client sends again and is answered by a reset.
            let ended = client.told || self.live_ends(conn).next().is_none();
            self.must(ended || missing == 0, "a packet is lost");
            // What the target has given up after the client saw some of it, nobody can go on with.
            let needed = client.finished || client.saw_too_much || self.broken || self.slow;
            self.must(!client.told || needed, "reset without need");
        }
        if self.setup.guests {
            self.check_memory();
        }
    }

    /// The connection has an end that the client's packets reach, or the client was told that there is none.
    fn check_place(&mut self, conn: ConnIndex) {
        let Some((node, port)) = self.destination(conn) else {
            return self.must(false, "held for ever, or sent around");
        };
        let reached = self.nodes[node].kernel.socket(conn, port) == Socket::Live;
        let client = &self.clients[conn];
        // A daemon that has not dumped the socket itself cannot send a reset; the kernel answers the next packet by one.
        let will_be_told = client.daemon_lost && node == self.home(conn);
        self.must(reached || client.told || will_be_told, "nowhere, and the client does not know");
        let forgotten = self.live_ends(conn).any(|at| at != (node, port));
        self.must(!forgotten || self.clients[conn].told, "an end that nobody reaches");
    }

    /// Each entry has an owner who will remove it.
    fn check_entries(&mut self, conn: ConnIndex) {
        for node in 0..self.nodes.len() {
            let kernel = self.nodes[node].kernel.clone();
            for (_, flow) in kernel.flows.iter().filter(|((c, _), _)| *c == conn) {
                let hosted = self.hosted_state(node, flow.handoff);
                let owned = matches!(hosted, Some(HostState::Redirected | HostState::Offloaded));
                let served = match flow.action {
                    FlowAction::Redirect((to, _)) => self.is_served(to, flow.handoff),
                    _ => false,
                };
                self.must(owned && served, "a flow entry without an owner");
                self.must(node == self.home(conn), "a detour that nobody needs");
            }
            for (_, rewrite) in kernel.rewrites.iter().filter(|((c, _), _)| *c == conn) {
                let daemon = self.nodes[node].daemon.as_ref();
                // It goes when its host connects, which has nothing to ask for now.
                let gone = daemon.is_some_and(|d| d.gone.iter().any(|(.., owner)| *owner == rewrite.handoff));
                let served = self.served_state(node, rewrite.handoff) == Some(TargetState::Served);
                self.must(served || gone && !self.setup.guests, "a rewrite without an owner");
            }
        }
    }

    /// Has this machine the connection that left its home by this hand-off?
    fn is_served(&self, node: NodeIndex, first: HandoffIndex) -> bool {
        let Some(daemon) = &self.nodes[node].daemon else { return false };
        let mut its = daemon.served.iter().filter(|(h, _)| self.handoffs[**h].first == first);
        its.any(|(_, s)| s.state() == TargetState::Served)
    }

    /// No daemon remembers what is over.
    fn check_memory(&mut self) {
        for node in 0..self.nodes.len() {
            let Some(daemon) = &self.nodes[node].daemon else { continue };
            let hosts = daemon.hosted.values().all(|f| f.is_away() && f.guest.is_none());
            let here = |h: &HandoffIndex| self.is_inbound(*h);
            let serves = daemon.served.iter().all(|(h, s)| {
                s.state() == TargetState::Served && !s.shortcut.is_open() && s.parked.is_empty() && !here(h)
            });
            let none_gone = daemon.gone.is_empty();
            self.must(hosts && serves && none_gone, "a daemon remembers what is over");
        }
    }
}
