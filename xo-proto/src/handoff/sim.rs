//! Both state machines under a fake network, kernel and clock: what two or more daemons do to a connection when messages
//! are lost, late or repeated, when any daemon dies between any two actions, and when steps fail.
//!
//! The machines are the real ones. Their drivers ([`host`], [`target`]) do what `xo-peerd` does, with a [`kernel`] that is a
//! few enums: a socket is live or in repair mode, a flow entry holds or redirects. A [`link`] is a TCP connection: what
//! it carries stays in order and can be late; each end learns of its end by itself; a new one overtakes an old one.
//! Time is counted in ticks.
//!
//! [`World::moves`] says what can happen next, [`World::step`] lets it happen, [`check`] looks at the outcome. Tests walk
//! through all of it ([`World`] is small and can be hashed), or at random; the fuzz target picks moves by its input.
//!
//! Every node can be host and target at the same time, of any number of connections; with [`Setup::guests`] a target hands
//! connections on, to other targets and back home ([`onward`]). A new kind of transfer is a message in [`link`], its driver
//! beside the others, and what survives a daemon in [`kernel`].

mod check;
mod host;
mod kernel;
mod link;
mod moves;
mod onward;
mod rules;
mod target;

use std::collections::{BTreeMap, BTreeSet};

pub use check::{NEVER_ENDS, Violation};
pub use kernel::{Client, End, Flow, FlowAction, Kernel, Packet, Rewrite, Socket, Verdict};
pub use link::{Channel, Message};
pub use moves::{Class, Move};
pub use rules::{Flaw, Gap, HandlerMode, Rules, Setup, Ticks};

use host::HostFlow;
use target::Served;

/// A machine with a daemon.
pub type NodeIndex = usize;
/// A client's connection.
pub type ConnIndex = usize;
/// A hand-off: its place in [`World::handoffs`].
pub type HandoffIndex = usize;

/// An address of a connection on a machine. Each restored socket has its own, as on machines where entries linger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Port {
    /// The one that its client knows.
    Public,
    /// Where this hand-off has restored it.
    Guest(HandoffIndex),
    /// Where its packets come in while this hand-off brings it home.
    Entrance(HandoffIndex),
}

/// Where packets go.
pub type Place = (NodeIndex, Port);

/// One attempt to move a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Handoff {
    /// What is moved.
    pub conn: ConnIndex,
    /// From here.
    pub host: NodeIndex,
    /// From this address there.
    pub port: Port,
    /// To here.
    pub target: NodeIndex,
    /// The hand-off with which it left its home.
    pub first: HandoffIndex,
    /// How often it has moved since.
    pub hop: u8,
}

/// What dies with a daemon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Daemon {
    hosted: BTreeMap<HandoffIndex, HostFlow>,
    served: BTreeMap<HandoffIndex, Served>,
    /// Not to be begun any more.
    refused: BTreeSet<HandoffIndex>,
    /// Found in the tables without a socket: who is to be told, by which name, of which hand-off's entry.
    gone: BTreeSet<(NodeIndex, HandoffIndex, HandoffIndex)>,
    /// The fastest message of each peer.
    fastest: BTreeMap<NodeIndex, Ticks>,
    /// Until a lost channel may be dialled again.
    pause: BTreeMap<NodeIndex, Ticks>,
    /// Held packets taken out of the ring.
    collected: Vec<(HandoffIndex, Packet)>,
}

/// A machine: its kernel, its server with the library, its daemon while that runs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Node {
    kernel: Kernel,
    /// The library is connected to the daemon that runs now.
    library: bool,
    daemon: Option<Daemon>,
    /// The daemon dies after so many more actions.
    fuse: Option<u8>,
    /// The next such step fails.
    fails: Option<Step>,
}

/// Steps that can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Step {
    /// The flow table is full.
    Hold,
    /// The socket cannot be dumped.
    Dump,
    /// The flow entry is not there any more.
    Redirect,
    /// The socket cannot be restored.
    Restore,
    /// The handler does not take it.
    Start,
}

/// Everything there is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub(crate) setup: Setup,
    pub(crate) nodes: Vec<Node>,
    /// Oldest first.
    pub(crate) channels: Vec<Channel>,
    pub(crate) clients: Vec<Client>,
    /// Every hand-off so far.
    pub(crate) handoffs: Vec<Handoff>,
    /// Packets under way between machines, with their age.
    pub(crate) wire: Vec<(ConnIndex, Place, Packet, Ticks)>,
    /// Mishaps still allowed.
    pub(crate) faults: u8,
    /// A channel broke, or a daemon died.
    pub(crate) broken: bool,
    /// A question or `HOST_READY` was slower than what counts as fresh.
    pub(crate) slow: bool,
    pub(crate) violation: Option<Violation>,
}

impl World {
    /// All daemons run; each pair of host and target has a channel that is known to be quick.
    #[must_use]
    pub fn new(setup: Setup) -> World {
        let conns = setup.hosts * setup.conns_per_host;
        let nodes = setup.hosts + setup.targets;
        let mut world = World {
            nodes: vec![Node::new(); nodes],
            channels: Vec::new(),
            clients: vec![Client::default(); conns],
            handoffs: Vec::new(),
            wire: Vec::new(),
            faults: setup.faults,
            broken: false,
            slow: false,
            violation: None,
            setup,
        };
        for conn in 0..conns {
            let home = world.home(conn);
            world.nodes[home].kernel.ends.insert((conn, Port::Public), End::own());
        }
        for to in world.setup.hosts..nodes {
            for from in (0..to).filter(|from| *from < world.setup.hosts || world.setup.guests) {
                world.channels.push(Channel::proven(from, to));
                let ends = [(from, to), (to, from)];
                for (node, peer) in ends.into_iter().filter(|(node, _)| *node == to || world.setup.guests) {
                    if let Some(daemon) = &mut world.nodes[node].daemon {
                        daemon.fastest.insert(peer, 0);
                    }
                }
            }
        }
        world
    }

    /// The same, and each connection has moved to the first target and is settled there.
    #[must_use]
    pub fn offloaded(setup: Setup) -> World {
        let mut world = World::new(Setup { faults: 0, ..setup });
        for conn in 0..world.clients.len() {
            world.step(Move::Ask { conn, from: (world.home(conn), Port::Public), target: setup.hosts });
            while let Some(due) = world.moves().into_iter().find(|m| m.class() == Class::Due) {
                world.step(due);
            }
            world.clients[conn].asks = 0;
        }
        (world.faults, world.setup) = (setup.faults, setup);
        world
    }

    /// Where the client thinks that its connection is.
    #[must_use]
    pub fn home(&self, conn: ConnIndex) -> NodeIndex {
        conn / self.setup.conns_per_host
    }

    /// What has gone wrong, if anything has.
    #[must_use]
    pub fn violation(&self) -> Option<Violation> {
        self.violation
    }

    pub(crate) fn daemon(&mut self, node: NodeIndex) -> Option<&mut Daemon> {
        self.nodes[node].daemon.as_mut()
    }

    pub(crate) fn is_flawed(&self, flaw: Flaw) -> bool {
        self.setup.rules.flaw == Some(flaw)
    }

    /// The daemon is about to take another step; `false` when it dies instead.
    pub(crate) fn goes_on(&mut self, node: NodeIndex) -> bool {
        match &mut self.nodes[node].fuse {
            Some(0) => self.kill(node),
            Some(left) => *left -= 1,
            None => {}
        }
        self.nodes[node].daemon.is_some()
    }

    /// The step is tried; `false` when it fails.
    pub(crate) fn works(&mut self, node: NodeIndex, step: Step) -> bool {
        self.nodes[node].fails.take_if(|s| *s == step).is_none()
    }

    /// The daemon is gone in the middle of whatever it did.
    pub(crate) fn kill(&mut self, node: NodeIndex) {
        let rules = self.setup.rules;
        if !rules.kernel_fence && rules.gap != Some(Gap::DiesUnconfirmed) && self.leaves_unconfirmed(node) {
            // A little later.
            self.nodes[node].fuse = Some(0);
            return;
        }
        let Some(daemon) = self.nodes[node].daemon.take() else { return };
        self.nodes[node].fuse = None;
        self.nodes[node].fails = None;
        self.broken = true;
        for (handoff, packet) in daemon.collected {
            let client = &mut self.clients[self.handoffs[handoff].conn];
            client.excuse(packet);
            client.evidence_lost |= packet.acknowledges >= Some(handoff);
        }
        for handoff in daemon.hosted.keys() {
            self.clients[self.handoffs[*handoff].conn].daemon_lost = true;
        }
        for channel in &mut self.channels {
            channel.close(node);
        }
        self.close_descriptors(node);
        self.library_loses_daemon(node);
        self.drop_dead_channels();
    }

    /// A new daemon finds what the old one has left in the maps.
    pub(crate) fn restart(&mut self, node: NodeIndex) {
        let machine = &mut self.nodes[node];
        machine.daemon = Some(Daemon::default());
        // A library with nothing to show is connected at once.
        machine.library = machine.kernel.ends.values().all(|e| e.slot != Verdict::Pending);
        let rewrites: Vec<_> = machine.kernel.rewrites.keys().copied().collect();
        let flows: Vec<_> = machine.kernel.flows.keys().copied().collect();
        for (conn, port) in rewrites {
            self.recover_served(node, conn, port);
        }
        let (ends, flows): (Vec<_>, Vec<_>) =
            flows.into_iter().partition(|(_, port)| matches!(port, Port::Entrance(_)));
        for (conn, port) in flows {
            self.recover_hosted(node, conn, port);
        }
        for (conn, port) in ends {
            self.recover_returned(node, conn, port);
        }
    }

    /// Time passes: one tick, or more when nothing is due for long.
    pub(crate) fn tick(&mut self) {
        let soonest = self.nodes.iter().flat_map(Node::timers).min();
        let long = self.setup.rules.long();
        let by = soonest.filter(|left| *left > long).map_or(1, |left| left - long);
        self.age(by);
        self.run_host_timers();
        self.run_target_timers();
        if soonest.is_none_or(|left| left > long) && self.setup.guests && self.wire.is_empty() {
            self.sweep();
        }
    }

    fn age(&mut self, by: Ticks) {
        let (old, stale) = (self.setup.rules.old(), self.setup.rules.stale());
        let older = |age: &mut Ticks| *age = old.min(*age + by);
        // What is far off stays so until nothing else is to come: else every way to it would be a world of its own.
        let far = 2 * self.setup.rules.long();
        let runs_down = |left: &mut Ticks| {
            if by > 1 || *left <= far {
                *left = left.saturating_sub(by);
            }
        };
        for channel in &mut self.channels {
            channel.age(by, stale);
            self.slow |= channel.slowest() > self.setup.rules.under_way();
        }
        for (.., age) in &mut self.wire {
            older(age);
        }
        for node in &mut self.nodes {
            for rewrite in node.kernel.rewrites.values_mut() {
                rewrite.mute_in = rewrite.mute_in.map(|t| t.saturating_sub(by));
            }
            let Some(daemon) = &mut node.daemon else { continue };
            daemon.pause.retain(|_, left| {
                *left = left.saturating_sub(by);
                *left > 0
            });
            for flow in daemon.hosted.values_mut() {
                flow.asked.as_mut().map(older);
                older(&mut flow.since);
                let timers = [&mut flow.deadline, &mut flow.doubt, &mut flow.linger];
                timers.into_iter().flatten().for_each(runs_down);
            }
            for served in daemon.served.values_mut() {
                let timers = [&mut served.deadline, &mut served.fence, &mut served.detour];
                timers.into_iter().flatten().for_each(runs_down);
            }
        }
    }
}

impl Node {
    fn new() -> Node {
        Node {
            kernel: Kernel::default(),
            library: true,
            daemon: Some(Daemon::default()),
            fuse: None,
            fails: None,
        }
    }

    /// What is left of each timer that runs.
    pub(crate) fn timers(&self) -> impl Iterator<Item = Ticks> {
        let daemon = self.daemon.iter().flat_map(|d| {
            let hosted = d.hosted.values().flat_map(|f| [f.deadline, f.doubt, f.linger]);
            let served = d.served.values().flat_map(|s| [s.deadline, s.fence, s.detour]);
            hosted.chain(served).flatten().chain(d.pause.values().copied())
        });
        let mutes = self.kernel.rewrites.values().filter_map(|r| r.mute_in.filter(|left| *left > 0));
        daemon.chain(mutes)
    }
}

#[cfg(test)]
mod tests;
