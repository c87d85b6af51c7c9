//! What the kernel keeps for the daemons, and the client's view of it.

use std::collections::BTreeMap;

use super::{ConnIndex, HandoffIndex, NodeIndex, Place, Port, Ticks, World};
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

/// A connection's end on a machine, at one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct End {
    pub(crate) socket: Socket,
    /// A process other than the daemon has it.
    pub(crate) passed: bool,
    /// The client has acknowledged something of this socket.
    pub(crate) acknowledged: bool,
    /// The daemon's verdict, as the library sees it.
    pub(crate) slot: Verdict,
    /// The hand-off about which that was asked.
    pub(crate) asked: Option<HandoffIndex>,
    /// The hand-off that brought it.
    pub(crate) by: Option<HandoffIndex>,
}

impl End {
    /// Accepted from its client.
    pub(crate) fn own() -> End {
        End { socket: Socket::Live, passed: true, by: None, ..End::restored(0) }
    }

    /// By this hand-off.
    pub(crate) fn restored(by: HandoffIndex) -> End {
        End {
            socket: Socket::Repair,
            passed: false,
            acknowledged: false,
            slot: Verdict::None,
            asked: None,
            by: Some(by),
        }
    }
}

/// What becomes of a connection's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FlowAction {
    /// Kept in the ring.
    Hold,
    /// Kept in the ring; what is there is on its way to the target.
    Committed(Place),
    /// Sent on.
    Redirect(Place),
    /// Given to the local stack under the address that the client knows; `waits`: it is not certain that the connection
    /// is home.
    Deliver {
        /// See above.
        waits: bool,
    },
}

/// An entry of the flow table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    /// Whose entry it is.
    pub handoff: HandoffIndex,
    /// The other machine that is concerned.
    pub peer: NodeIndex,
    /// The last move that it is owed to.
    pub hop: u8,
    /// What becomes of packets.
    pub action: FlowAction,
}

/// An entry of the rewrite table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rewrite {
    /// Whose entry it is.
    pub handoff: HandoffIndex,
    /// The connection is not confirmed; with [`super::Rules::kernel_fence`], silent when nothing is left.
    pub mute_in: Option<Ticks>,
    /// The connection has moved on: a reset of the local stack says nothing about it.
    pub left: bool,
}

/// A packet of the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Packet {
    /// Which of its data; none in a bare acknowledgement.
    pub number: Option<u8>,
    /// The last hand-off of whose target it acknowledges something.
    pub acknowledges: Option<HandoffIndex>,
}

/// What outlives the daemon on one machine, by connection and address.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Kernel {
    pub(crate) ends: BTreeMap<(ConnIndex, Port), End>,
    pub(crate) flows: BTreeMap<(ConnIndex, Port), Flow>,
    pub(crate) rewrites: BTreeMap<(ConnIndex, Port), Rewrite>,
    pub(crate) ring: Vec<(HandoffIndex, Packet)>,
}

impl Kernel {
    /// Its owner alone removes an entry.
    pub(crate) fn remove_flow(&mut self, conn: ConnIndex, port: Port, handoff: HandoffIndex) {
        if self.flows.get(&(conn, port)).is_some_and(|f| f.handoff == handoff) {
            self.flows.remove(&(conn, port));
        }
    }

    pub(crate) fn remove_rewrite(&mut self, conn: ConnIndex, port: Port, handoff: HandoffIndex) {
        if self.rewrites.get(&(conn, port)).is_some_and(|r| r.handoff == handoff) {
            self.rewrites.remove(&(conn, port));
        }
    }

    /// State of the socket at an address.
    pub(crate) fn socket(&self, conn: ConnIndex, port: Port) -> Socket {
        self.ends.get(&(conn, port)).map_or(Socket::None, |e| e.socket)
    }

    /// The socket is in service and its packets get out.
    pub(crate) fn is_live(&self, conn: ConnIndex, port: Port, kernel_fence: bool) -> bool {
        let muted = kernel_fence && self.rewrites.get(&(conn, port)).is_some_and(|r| r.mute_in == Some(0));
        self.socket(conn, port) == Socket::Live && !muted
    }

    /// What its library still waits for stays known.
    pub(crate) fn remove_socket(&mut self, conn: ConnIndex, port: Port) {
        if let Some(end) = self.ends.get_mut(&(conn, port)) {
            (end.socket, end.acknowledged) = (Socket::None, false);
            if end.slot != Verdict::Pending {
                self.ends.remove(&(conn, port));
            }
        }
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
    /// The last hand-off of whose target it has seen bytes.
    pub saw: Option<HandoffIndex>,
    /// It was reset because it had seen what nobody could go on with.
    pub saw_too_much: bool,
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

/// Machines that a packet passes, at the most.
const MOST_HOPS: usize = 16;

impl World {
    /// A packet of the client arrives at its connection's home.
    pub(crate) fn client_sends(&mut self, conn: ConnIndex, packet: Packet) {
        self.comes_in((self.home(conn), Port::Public), conn, packet, 0);
    }

    /// A packet comes to a machine, before its stack.
    pub(crate) fn comes_in(&mut self, (node, port): Place, conn: ConnIndex, packet: Packet, hops: usize) {
        let Some(flow) = self.nodes[node].kernel.flows.get(&(conn, port)).copied() else {
            return self.arrives((node, port), conn, packet);
        };
        match flow.action {
            FlowAction::Hold | FlowAction::Committed(_) => {
                self.nodes[node].kernel.ring.push((flow.handoff, packet));
            }
            FlowAction::Redirect(to) => self.sent_on(to, conn, packet, hops + 1),
            FlowAction::Deliver { .. } => self.arrives((node, Port::Public), conn, packet),
        }
    }

    /// A packet is sent from one machine to another; with slow packets it arrives in its own time.
    pub(crate) fn sent_on(&mut self, to: Place, conn: ConnIndex, packet: Packet, hops: usize) {
        if hops > MOST_HOPS {
            self.must(false, "packets go around");
        } else if self.setup.slow_packets {
            self.wire.push((conn, to, packet, 0));
        } else {
            self.comes_in(to, conn, packet, hops);
        }
    }

    /// A packet meets a machine's stack.
    pub(crate) fn arrives(&mut self, (node, port): Place, conn: ConnIndex, packet: Packet) {
        let home = self.home(conn);
        let alive = self.live_ends(conn).next().is_some() && !self.clients[conn].told;
        let kernel = &mut self.nodes[node].kernel;
        let rewrite = kernel.rewrites.get(&(conn, port)).copied();
        if let Some(end) = kernel.ends.get_mut(&(conn, port)).filter(|e| e.socket != Socket::None) {
            let acknowledges = packet.acknowledges.is_some_and(|h| end.by.is_some_and(|by| h >= by));
            end.acknowledged |= acknowledges;
            self.clients[conn].received |= packet.number.map_or(0, |n| 1 << n);
            return;
        }
        let flow = kernel.flows.get(&(conn, port)).map(|f| f.action);
        if rewrite.is_some_and(|r| r.left) || matches!(flow, Some(FlowAction::Redirect(_))) {
            // The program drops what the stack says to it. The client sends it again.
            return self.clients[conn].excuse(packet);
        }
        // A dead daemon may have removed an entry in order to send a reset.
        self.must(!alive || self.clients[conn].daemon_lost, "a packet meets a machine without the socket");
        if node == home || rewrite.is_some() {
            // A reset; from another address than the client's peer has, it would mean nothing.
            self.clients[conn].told = true;
        } else {
            // Not answered: the client sends it again.
            self.clients[conn].excuse(packet);
        }
    }

    /// The handler sends a part of its answer.
    pub(crate) fn handler_sends(&mut self, (node, port): Place, conn: ConnIndex) {
        let kernel = &self.nodes[node].kernel;
        if kernel.is_live(conn, port, self.setup.rules.kernel_fence) {
            let by = kernel.ends.get(&(conn, port)).and_then(|e| e.by);
            let client = &mut self.clients[conn];
            client.saw = client.saw.max(by);
            let acknowledges = client.saw;
            self.client_sends(conn, Packet { number: None, acknowledges });
        }
    }

    /// A socket comes to its end as TCP connections do.
    pub(crate) fn ends(&mut self, (node, port): Place, conn: ConnIndex) {
        self.nodes[node].kernel.remove_socket(conn, port);
        self.clients[conn].told = true;
    }

    /// Descriptors that only the dead daemon had.
    pub(crate) fn close_descriptors(&mut self, node: NodeIndex) {
        let ends = &self.nodes[node].kernel.ends;
        let its: Vec<_> = ends.iter().filter(|(_, e)| !e.passed).map(|(at, e)| (*at, e.socket)).collect();
        for ((conn, port), socket) in its {
            match socket {
                Socket::Live => self.ends((node, port), conn),
                Socket::Repair => self.nodes[node].kernel.remove_socket(conn, port),
                Socket::None => {}
            }
        }
    }

    /// Where the client's packets go in the end; `None` while they are held on the way.
    pub(crate) fn destination(&self, conn: ConnIndex) -> Option<Place> {
        let mut at = (self.home(conn), Port::Public);
        for _ in 0..MOST_HOPS {
            match self.nodes[at.0].kernel.flows.get(&(conn, at.1)).map(|f| f.action) {
                None => return Some(at),
                Some(FlowAction::Redirect(to)) => at = to,
                Some(FlowAction::Deliver { .. }) => return Some((at.0, Port::Public)),
                Some(_) => return None,
            }
        }
        None
    }

    /// A connection here has an end that its host may not know.
    pub(crate) fn leaves_unconfirmed(&self, node: NodeIndex) -> bool {
        let mut ends = self.nodes[node].kernel.ends.iter();
        ends.any(|((conn, port), e)| {
            e.by.is_some() && e.socket == Socket::Live && self.destination(*conn) != Some((node, *port))
        })
    }

    /// The library sees that its daemon is gone.
    pub(crate) fn library_loses_daemon(&mut self, node: NodeIndex) {
        let alone = self.is_flawed(super::Flaw::ResumesAlone);
        let machine = &mut self.nodes[node];
        machine.library = false;
        for end in machine.kernel.ends.values_mut() {
            match (end.slot, end.socket) {
                (Verdict::Pending, Socket::Repair) if !alone => {}
                (Verdict::Pending, Socket::None) => end.slot = Verdict::Stay,
                (Verdict::Pending, _) => (end.slot, end.socket) = (Verdict::Stay, Socket::Live),
                // The server closes what it takes for ended.
                (Verdict::Gone, Socket::Repair) => end.socket = Socket::None,
                _ => {}
            }
        }
        machine.kernel.ends.retain(|_, e| e.socket != Socket::None);
    }

    /// The library finds the new daemon, and shows it what the old one has left.
    pub(crate) fn library_returns(&mut self, node: NodeIndex) {
        self.nodes[node].library = true;
        let ends = &self.nodes[node].kernel.ends;
        let waiting: Vec<_> =
            ends.iter().filter(|(_, e)| e.slot == Verdict::Pending).map(|(at, _)| *at).collect();
        for (conn, port) in waiting {
            if self.nodes[node].daemon.is_some() {
                self.on_recover(node, conn, port);
            }
        }
    }

    pub(crate) fn decide(&mut self, (node, port): Place, conn: ConnIndex, verdict: Verdict) {
        let Some(end) = self.nodes[node].kernel.ends.get_mut(&(conn, port)) else {
            return self.must(false, "a verdict for nobody");
        };
        let pending = end.slot == Verdict::Pending;
        end.slot = verdict;
        if end.socket == Socket::None {
            self.nodes[node].kernel.ends.remove(&(conn, port));
        }
        self.must(pending, "a second verdict");
    }

    /// A held packet's flow, when packets are taken out of the ring.
    pub(crate) fn collect_held(&mut self, node: NodeIndex) {
        let machine = &mut self.nodes[node];
        if let Some(daemon) = &mut machine.daemon {
            daemon.collected.append(&mut machine.kernel.ring);
        }
    }

    /// Sends the held packets of a hand-off on; without a place, to the local stack.
    pub(crate) fn replay_held(&mut self, node: NodeIndex, handoff: HandoffIndex, to: Option<Place>) {
        self.collect_held(node);
        let forgets = self.is_flawed(super::Flaw::ForgetsHeld);
        let super::Handoff { conn, port, .. } = self.handoffs[handoff];
        let Some(daemon) = self.daemon(node) else { return };
        let its: Vec<_> = daemon.collected.extract_if(.., |(h, _)| *h == handoff).collect();
        for (_, packet) in its.into_iter().filter(|_| !forgets) {
            match to {
                Some(to) => self.sent_on(to, conn, packet, 0),
                None => self.arrives((node, port), conn, packet),
            }
        }
    }

    /// Steps that fail say why.
    pub(crate) fn outcome(works: bool, reason: Reason) -> Result<(), Reason> {
        if works { Ok(()) } else { Err(reason) }
    }
}
