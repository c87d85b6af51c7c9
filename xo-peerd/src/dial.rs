//! Warm connections to targets: opened at the first request, kept, reopened with a growing pause.

use std::fmt::Display;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use log::Level;
use mio::net::TcpStream;
use xo_proto::handoff::{HostEvent, HostState};
use xo_proto::reason::Reason;
use xo_proto::wire::HandoffId;

use crate::engine::Engine;
use crate::peer::{Peer, PeerError};
use crate::target::Served;
use crate::timers::Timer;
use crate::tls::Tls;

/// First pause after a failed connection; doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What is known about the way to one target.
pub(crate) struct Dial {
    /// Address of the target's daemon, from the policy.
    pub(crate) address: SocketAddr,
    /// The connection, also while it is being made.
    pub(crate) index: Option<usize>,
    /// Hand-offs that wait for it.
    parked: Vec<HandoffId>,
    /// When the attempt under way is given up.
    give_up: Option<Instant>,
    /// Not before this time.
    not_before: Instant,
    pause: Duration,
    /// The last attempt has failed, or the connection.
    failed: bool,
    /// Since when it has been said that the target cannot be reached: not again with each attempt.
    said: Option<Instant>,
}

impl Dial {
    fn new(address: SocketAddr, now: Instant) -> Dial {
        Dial {
            address,
            index: None,
            parked: Vec::new(),
            give_up: None,
            not_before: now,
            pause: FIRST_PAUSE,
            failed: false,
            said: None,
        }
    }

    /// Is that node known to be away?
    pub(crate) fn has_failed(&self) -> bool {
        self.failed
    }
}

impl Engine {
    /// Starts a hand-off at once if its target is connected; otherwise parks it while the connection is
    /// made, or refuses while the target is known to be away.
    pub(crate) fn start_when_connected(&mut self, id: HandoffId) {
        let Some(flow) = self.hosted.get(&id) else { return };
        let node = flow.target.clone();
        if let Some(index) = self.connection_to(&node) {
            self.begin_on(id, index);
            return;
        }
        let now = Instant::now();
        let Some(address) = self.hosted.get(&id).and_then(|f| f.address) else {
            return self.host_event(id, HostEvent::Hopeless(Reason::PeerUnreachable));
        };
        let dial = self.dials.entry(node.clone()).or_insert_with(|| Dial::new(address, now));
        if dial.index.is_none() {
            if now < dial.not_before {
                self.host_event(id, HostEvent::Hopeless(Reason::PeerUnreachable));
                return;
            }
            dial.address = address;
        }
        dial.parked.push(id);
        if dial.index.is_none() {
            self.dial(&node);
        }
    }

    /// Connects to the policy's targets, so that the first connection that goes there does not wait, and so that they can
    /// tell us where our connections move on to.
    pub(crate) fn dial_targets(&mut self) {
        for (node, address) in self.targets.of_policy() {
            if node == self.config.node {
                continue;
            }
            match self.dials.get_mut(&node) {
                // A new address counts from the next attempt on.
                Some(dial) => dial.address = address,
                None => self.want(&node, address),
            }
            if self.dials.get(&node).is_some_and(|d| d.index.is_none()) && self.connection_to(&node).is_none()
            {
                self.dial(&node);
            }
        }
    }

    fn is_needed(&self, node: &str) -> bool {
        self.targets.keeps(node) || self.hosted.values().any(|f| f.target == node)
    }

    /// Closes connections that we have opened and that nobody needs any more.
    pub(crate) fn drop_unneeded(&mut self) {
        let unneeded = |(node, dial): (&String, &Dial)| {
            let in_use = self.is_needed(node) || !dial.parked.is_empty();
            let serves = |s: &Served| *s.origin.node == **node;
            (!in_use && !self.served.values().any(|s| serves(s))).then(|| node.clone())
        };
        let nodes: Vec<_> = self.dials.iter().filter_map(unneeded).collect();
        for node in nodes {
            let Some(index) = self.dials.remove(&node).and_then(|d| d.index) else { continue };
            if let Some(mut peer) = self.peers.try_remove(index) {
                let _ = self.poll.registry().deregister(peer.stream());
                log::info!("peer {node}: not needed any more");
            }
        }
        let hosted = &self.hosted;
        self.targets.forget_unused(|node| hosted.values().any(|f| f.target == *node));
    }

    /// A connection to this node is needed, though no hand-off waits for it.
    pub(crate) fn want(&mut self, node: &str, address: SocketAddr) {
        if self.connection_to(node).is_none() && !self.dials.contains_key(node) {
            self.dials.insert(node.to_owned(), Dial::new(address, Instant::now()));
            self.dial(node);
        }
    }

    fn dial(&mut self, node: &str) {
        let Some(address) = self.dials.get(node).map(|d| d.address) else { return };
        let deadline = Instant::now() + self.config.handoff.connect_timeout;
        let result = TcpStream::connect(address).map_err(PeerError::from).and_then(|stream| {
            let tls = self.tls.as_ref().map(|t: &Tls| t.connect(node)).transpose();
            let tls = tls.map_err(|e| PeerError::Hello(e.to_string()))?;
            Peer::new(stream, tls, Some((node.to_owned(), address)), &self.hello)
        });
        match result.and_then(|peer| Ok(self.add_peer(peer)?)) {
            Ok(index) => {
                if let Some(dial) = self.dials.get_mut(node) {
                    dial.index = Some(index);
                    dial.give_up = Some(deadline);
                }
                self.at(deadline, Timer::Dial(node.to_owned()));
            }
            Err(e) => {
                self.say_away(node, &e);
                self.dial_failed(node);
            }
        }
    }

    /// The attempt took too long, or a pause is over and that node is still needed.
    pub(crate) fn dial_timer(&mut self, node: &str) {
        let Some(dial) = self.dials.get(node) else { return };
        let (index, give_up, now) = (dial.index, dial.give_up, Instant::now());
        match (index, give_up) {
            (Some(index), Some(when)) if now >= when && !self.peers.get(index).is_some_and(Peer::usable) => {
                self.say_away(node, &"no answer in time");
                if let Some(mut peer) = self.peers.try_remove(index) {
                    let _ = self.poll.registry().deregister(peer.stream());
                }
                self.dial_failed(node);
            }
            (None, _) if now >= dial.not_before && self.is_needed(node) => {
                self.dial(node);
            }
            _ => {}
        }
    }

    /// An attempt has failed. Said once for each outage, however long it lasts.
    pub(crate) fn say_away(&mut self, node: &str, why: &dyn Display) {
        let Some(dial) = self.dials.get_mut(node) else { return };
        let level = if dial.said.is_some() { Level::Debug } else { Level::Warn };
        log::log!(level, "peer {node} at {}: {why}", dial.address);
        dial.said.get_or_insert_with(Instant::now);
    }

    /// A connection that we had opened, or tried to, is gone.
    pub(crate) fn dial_failed(&mut self, node: &str) {
        // While a connection waits for what that node knows, there is no time to lose.
        let urgent = self.hosted.values().any(|f| f.target == node && f.state() == HostState::Doubt);
        let Some(dial) = self.dials.get_mut(node) else { return };
        dial.index = None;
        dial.give_up = None;
        dial.failed = true;
        dial.not_before = Instant::now() + dial.pause;
        dial.pause = if urgent { FIRST_PAUSE } else { (dial.pause * 2).min(LONGEST_PAUSE) };
        let (parked, again) = (std::mem::take(&mut dial.parked), dial.not_before);
        for id in parked {
            self.host_event(id, HostEvent::Hopeless(Reason::PeerUnreachable));
        }
        self.at(again, Timer::Dial(node.to_owned()));
    }

    /// A peer has said hello.
    pub(crate) fn peer_up(&mut self, index: usize) {
        let Some(node) = self.node_of(index) else { return };
        match self.dials.get_mut(&*node).and_then(|d| d.said.take()) {
            Some(since) => log::info!("peer {node}: connected again after {:.1?}", since.elapsed()),
            None => log::info!("peer {node}: connected"),
        }
        if let Some(probe) = self.peers.get_mut(index).and_then(Peer::next_probe) {
            self.send_to(index, &probe);
        }
        if let Some(dial) = self.dials.get_mut(&*node).filter(|d| d.index == Some(index)) {
            dial.give_up = None;
            dial.failed = false;
            dial.pause = FIRST_PAUSE;
            for id in std::mem::take(&mut dial.parked) {
                self.begin_on(id, index);
            }
        }
        self.tell_peer(index, &node);
        self.tell_gone(&node);
        self.peer_back(&node);
    }
}
