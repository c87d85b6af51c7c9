//! What must hold.

use super::super::{HostState, TargetState};
use super::{Class, ConnIndex, FlowAction, Move, NodeIndex, Socket, Verdict, World};

/// What was violated, in words.
pub type Violation = &'static str;

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

    fn live_ends(&self, conn: ConnIndex) -> impl Iterator<Item = NodeIndex> {
        let fence = self.setup.rules.kernel_fence;
        (0..self.nodes.len()).filter(move |n| self.nodes[*n].kernel.is_live(conn, fence))
    }

    /// The host's server goes on with a connection.
    pub(crate) fn check_taken_back(&mut self, conn: ConnIndex) {
        let client = &self.clients[conn];
        let holds = !client.saw_target || client.told || client.evidence_lost;
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
        self.must(false, "it never ends");
    }

    /// What holds when nothing more happens by itself.
    pub fn check_quiet(&mut self) {
        for conn in 0..self.clients.len() {
            self.check_place(conn);
            self.check_entries(conn);
            let home = self.home(conn);
            self.must(self.nodes[home].slots[conn] != Verdict::Pending, "no verdict");
            let client = self.clients[conn].clone();
            let missing = ((1_u16 << client.sent) - 1) & !client.received & !client.excused;
            // Where there is no end, the client sends again and is answered by a reset.
            let ended = client.told || self.live_ends(conn).next().is_none();
            self.must(ended || missing == 0, "a packet is lost");
            // What the target has given up after the client saw some of it, nobody can go on with.
            let needed = client.finished || client.saw_target || self.broken || self.slow;
            self.must(!client.told || needed, "reset without need");
        }
    }

    /// The connection has an end that the client's packets reach, or the client was told that there is none.
    fn check_place(&mut self, conn: ConnIndex) {
        let home = self.home(conn);
        let place = match self.nodes[home].kernel.flows[conn] {
            None => home,
            Some((_, FlowAction::Redirect(to))) => to,
            Some(_) => return self.must(false, "held for ever"),
        };
        let reached = self.nodes[place].kernel.sockets[conn] == Socket::Live;
        let client = &self.clients[conn];
        // A daemon that has not dumped the socket itself cannot send a reset; the kernel answers the next packet by one.
        let will_be_told = client.daemon_lost && place == home;
        self.must(reached || client.told || will_be_told, "nowhere, and the client does not know");
        let forgotten = self.live_ends(conn).any(|node| node != place);
        self.must(!forgotten || self.clients[conn].told, "an end that nobody reaches");
    }

    /// Each entry has an owner who will remove it.
    fn check_entries(&mut self, conn: ConnIndex) {
        for node in 0..self.nodes.len() {
            if let Some((handoff, _)) = self.nodes[node].kernel.flows[conn] {
                let target = self.handoffs[handoff].target;
                let owned = matches!(
                    self.hosted_state(node, handoff),
                    Some(HostState::Redirected | HostState::Offloaded)
                );
                let told = self.served_state(target, handoff) == Some(TargetState::Served);
                self.must(owned && told, "a flow entry without an owner");
            }
            if let Some(rewrite) = self.nodes[node].kernel.rewrites[conn] {
                let daemon = self.nodes[node].daemon.as_ref();
                // It goes when its host connects, which has nothing to ask for now.
                let gone = daemon.is_some_and(|d| d.gone.contains(&rewrite.handoff));
                let owned = gone || self.served_state(node, rewrite.handoff) == Some(TargetState::Served);
                self.must(owned, "a rewrite without an owner");
            }
        }
    }
}
