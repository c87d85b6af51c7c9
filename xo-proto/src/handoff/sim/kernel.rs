//! What the kernel keeps for the daemons, and the client's view of it.

use super::{ConnIndex, HandoffIndex, NodeIndex, Ticks, World};
use crate::reason::Reason;

/// A socket of a connection on one machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Socket {
    /// There is none.
    None,
    /// In service.
    Live,
    /// In repair mode: it sends nothing, and closes without a packet.
    Repair,
}

/// What becomes of a held or redirected connection's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FlowAction {
    /// Kept in the ring.
    Hold,
    /// Kept in the ring; what is there is on its way to the target.
    Committed(NodeIndex),
    /// Sent on.
    Redirect(NodeIndex),
}

/// An entry of the rewrite table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rewrite {
    /// Whose entry it is.
    pub handoff: HandoffIndex,
    /// The connection is not confirmed; with [`super::Rules::kernel_fence`], silent when nothing is left.
    pub mute_in: Option<Ticks>,
}

/// A packet of the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Packet {
    /// Which of its data; none in a bare acknowledgement.
    pub number: Option<u8>,
    /// It acknowledges bytes of the target's.
    pub acknowledges: bool,
}

/// What outlives the daemon on one machine, by connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    pub(crate) sockets: Vec<Socket>,
    /// A process other than the daemon has the socket.
    pub(crate) passed: Vec<bool>,
    /// The client has acknowledged something of this socket.
    pub(crate) acknowledged: Vec<bool>,
    pub(crate) flows: Vec<Option<(HandoffIndex, FlowAction)>>,
    pub(crate) rewrites: Vec<Option<Rewrite>>,
    pub(crate) ring: Vec<(HandoffIndex, Packet)>,
}

impl Kernel {
    pub(crate) fn new(conns: usize) -> Kernel {
        Kernel {
            sockets: vec![Socket::None; conns],
            passed: vec![false; conns],
            acknowledged: vec![false; conns],
            flows: vec![None; conns],
            rewrites: vec![None; conns],
            ring: Vec::new(),
        }
    }

    /// Its owner alone removes an entry.
    pub(crate) fn remove_flow(&mut self, conn: ConnIndex, handoff: HandoffIndex) {
        self.flows[conn].take_if(|(owner, _)| *owner == handoff);
    }

    pub(crate) fn remove_rewrite(&mut self, conn: ConnIndex, handoff: HandoffIndex) {
        self.rewrites[conn].take_if(|r| r.handoff == handoff);
    }

    /// The socket is in service and its packets get out.
    pub(crate) fn is_live(&self, conn: ConnIndex, kernel_fence: bool) -> bool {
        let muted = kernel_fence && self.rewrites[conn].is_some_and(|r| r.mute_in == Some(0));
        self.sockets[conn] == Socket::Live && !muted
    }

    pub(crate) fn remove_socket(&mut self, conn: ConnIndex) {
        self.sockets[conn] = Socket::None;
        self.passed[conn] = false;
        self.acknowledged[conn] = false;
    }
}

/// A verdict of the host's daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Nobody has asked.
    None,
    /// Asked.
    Pending,
    /// The server serves the request.
    Stay,
    /// The server sees the end of the connection.
    Gone,
}

/// The client's end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Client {
    /// It was told that the connection is lost, or that it is over.
    pub told: bool,
    /// The connection came to its end as the client wanted it to.
    pub finished: bool,
    /// It has seen bytes of the target's.
    pub saw_target: bool,
    /// Packets it has sent.
    pub sent: u8,
    /// A bit for each one that reached a socket.
    pub received: u16,
    /// A bit for each one that died with a daemon: TCP recovers.
    pub excused: u16,
    /// Hand-offs that the library asked for.
    pub asks: u8,
    /// A host's daemon died while it was being handed off.
    pub daemon_lost: bool,
    /// So did what the client's acknowledgements had shown.
    pub evidence_lost: bool,
}

impl Client {
    pub(crate) fn excuse(&mut self, packet: Packet) {
        self.excused |= packet.number.map_or(0, |n| 1 << n);
    }
}

impl World {
    /// A packet of the client arrives at its connection's home.
    pub(crate) fn client_sends(&mut self, conn: ConnIndex, packet: Packet) {
        let home = self.home(conn);
        match self.nodes[home].kernel.flows[conn] {
            None => self.arrives(home, conn, packet),
            Some((handoff, FlowAction::Hold | FlowAction::Committed(_))) => {
                self.nodes[home].kernel.ring.push((handoff, packet))
            }
            Some((_, FlowAction::Redirect(to))) => self.arrives(to, conn, packet),
        }
    }

    /// A packet meets a machine's stack.
    pub(crate) fn arrives(&mut self, node: NodeIndex, conn: ConnIndex, packet: Packet) {
        let kernel = &mut self.nodes[node].kernel;
        if kernel.sockets[conn] != Socket::None {
            kernel.acknowledged[conn] |= packet.acknowledges;
            self.clients[conn].received |= packet.number.map_or(0, |n| 1 << n);
        } else if node == self.home(conn) || self.nodes[node].kernel.rewrites[conn].is_some() {
            // A reset; from another address than the client's peer has, it would mean nothing.
            self.clients[conn].told = true;
        } else {
            // Not answered: the client sends it again.
            self.clients[conn].excuse(packet);
        }
    }

    /// The handler sends a part of its answer.
    pub(crate) fn handler_sends(&mut self, node: NodeIndex, conn: ConnIndex) {
        if self.nodes[node].kernel.is_live(conn, self.setup.rules.kernel_fence) {
            self.clients[conn].saw_target = true;
            self.client_sends(conn, Packet { number: None, acknowledges: true });
        }
    }

    /// A socket comes to its end as TCP connections do.
    pub(crate) fn ends(&mut self, node: NodeIndex, conn: ConnIndex) {
        self.nodes[node].kernel.remove_socket(conn);
        self.clients[conn].told = true;
    }

    /// Descriptors that only the dead daemon had.
    pub(crate) fn close_descriptors(&mut self, node: NodeIndex) {
        for conn in 0..self.clients.len() {
            let kernel = &self.nodes[node].kernel;
            if node == self.home(conn) || kernel.passed[conn] {
                continue;
            }
            match kernel.sockets[conn] {
                Socket::Live => self.ends(node, conn),
                Socket::Repair => self.nodes[node].kernel.remove_socket(conn),
                Socket::None => {}
            }
        }
    }

    /// A connection here has an end that its host may not know.
    pub(crate) fn leaves_unconfirmed(&self, node: NodeIndex) -> bool {
        (0..self.clients.len()).any(|conn| {
            let home = self.home(conn);
            let flow = self.nodes[home].kernel.flows[conn];
            let redirected = flow.is_some_and(|(_, action)| action == FlowAction::Redirect(node));
            node != home && !redirected && self.nodes[node].kernel.sockets[conn] == Socket::Live
        })
    }

    /// The library sees that its daemon is gone.
    pub(crate) fn library_loses_daemon(&mut self, node: NodeIndex) {
        let alone = self.is_flawed(super::Flaw::ResumesAlone);
        let machine = &mut self.nodes[node];
        machine.library = false;
        for (slot, socket) in machine.slots.iter_mut().zip(&mut machine.kernel.sockets) {
            match (*slot, *socket) {
                (Verdict::Pending, Socket::Repair) if !alone => {}
                (Verdict::Pending, _) => (*slot, *socket) = (Verdict::Stay, Socket::Live),
                // The server closes what it takes for ended.
                (Verdict::Gone, Socket::Repair) => *socket = Socket::None,
                _ => {}
            }
        }
    }

    /// The library finds the new daemon, and shows it what the old one has left.
    pub(crate) fn library_returns(&mut self, node: NodeIndex) {
        self.nodes[node].library = true;
        for conn in 0..self.clients.len() {
            if self.nodes[node].slots[conn] == Verdict::Pending && self.nodes[node].daemon.is_some() {
                self.on_recover(node, conn);
            }
        }
    }

    pub(crate) fn decide(&mut self, node: NodeIndex, conn: ConnIndex, verdict: Verdict) {
        self.must(self.nodes[node].slots[conn] == Verdict::Pending, "a second verdict");
        self.nodes[node].slots[conn] = verdict;
    }

    /// A held packet's flow, when packets are taken out of the ring.
    pub(crate) fn collect_held(&mut self, node: NodeIndex) {
        let machine = &mut self.nodes[node];
        if let Some(daemon) = &mut machine.daemon {
            daemon.collected.append(&mut machine.kernel.ring);
        }
    }

    /// Sends the held packets of a hand-off on.
    pub(crate) fn replay_held(&mut self, node: NodeIndex, handoff: HandoffIndex, to: NodeIndex) {
        self.collect_held(node);
        let forgets = self.is_flawed(super::Flaw::ForgetsHeld);
        let conn = self.handoffs[handoff].conn;
        let Some(daemon) = self.daemon(node) else { return };
        let its: Vec<_> = daemon.collected.extract_if(.., |(h, _)| *h == handoff).collect();
        for (_, packet) in its {
            if !forgets {
                self.arrives(to, conn, packet);
            }
        }
    }

    /// Steps that fail say why.
    pub(crate) fn outcome(works: bool, reason: Reason) -> Result<(), Reason> {
        if works { Ok(()) } else { Err(reason) }
    }
}
