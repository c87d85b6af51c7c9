//! Connections move on from one target to another, and come home.
//!
//! A guest that leaves is handed over as any connection is (`host.rs`), by the machine that has it: packets that its home
//! sends here are held, and then sent on (the detour). Beside that, its new place tells its home to redirect them straight
//! there (`xo_proto::handoff::Shortcut`), and then this machine that the detour is not needed any more.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use xo_bpf_abi::FlowKey;
use xo_proto::handoff::{HostEvent, ShortcutAction, ShortcutEvent, ShortcutState, TargetEvent, TargetState};
use xo_proto::reason::Reason;
use xo_proto::wire::{HandoffId, Home, Moved, MovedAck, PeerMessage};

use crate::engine::{Engine, ServedKey};
use crate::flower::Then;
use crate::restore::Entry;
use crate::steer::flow_key;
use crate::target::Served;
use crate::timers::Timer;

/// How long a machine that a connection came from may be silent before its detour is given up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Whose a connection is that is served here.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    /// The machine that accepted it from its client.
    pub(crate) node: Rc<str>,
    /// The hand-off with which it left there.
    pub(crate) id: HandoffId,
    /// How often it has moved since.
    pub(crate) hop: u32,
    /// Peer address of this machine's daemon, as that which it came from has it.
    address: Option<SocketAddr>,
    /// That machine is this one.
    pub(crate) here: bool,
}

/// A stay of a connection that came by a detour. One that moves all the time has many that are not over yet.
#[derive(Debug)]
pub(crate) struct Visit {
    /// How often it had moved then.
    pub(crate) hop: u32,
    pub(crate) key: ServedKey,
}

impl Origin {
    /// From what the machine that hands it over says.
    pub(crate) fn of(key: &ServedKey, home: Option<&Home>, own: &str) -> Origin {
        match home {
            None => Origin { node: key.0.clone(), id: key.1, hop: 1, address: None, here: false },
            Some(h) => Origin {
                node: Rc::from(h.node.as_str()),
                id: h.id,
                hop: h.hop,
                address: h.address,
                here: h.node == own,
            },
        }
    }

    /// Does it come from another machine than its home?
    pub(crate) fn is_detour(&self) -> bool {
        self.hop > 1
    }

    /// As an earlier daemon has left it.
    pub(crate) fn recovered(home: &str, id: HandoffId, hop: u32, here: bool) -> Origin {
        Origin { node: Rc::from(home), id, hop, address: None, here }
    }

    /// For the machine that it moves on to, whose daemon has this address.
    pub(crate) fn next(&self, address: Option<SocketAddr>) -> Home {
        Home { node: self.node.to_string(), id: self.id, hop: self.hop + 1, address }
    }

    /// Its name there.
    pub(crate) fn name(&self) -> ServedKey {
        (self.node.clone(), self.id)
    }
}

impl Engine {
    /// Begins a hand-off, at once or when it is settled that the connection is here.
    pub(crate) fn start_when_settled(&mut self, id: HandoffId) {
        let Some(flow) = self.hosted.get_mut(&id) else { return };
        let served = self.by_flow.get(&flow.key).and_then(|key| Some((key, self.served.get_mut(key)?)));
        let Some((key, served)) = served else {
            if flow.target.is_empty() {
                // At home already.
                return self.host_event(id, HostEvent::Hopeless(Reason::NoTarget));
            }
            return self.start_when_connected(id);
        };
        match served.state() {
            TargetState::Served if !served.origin.here => {}
            // At home in a moment.
            TargetState::Served if served.shortcut.state() == ShortcutState::Telling => {
                return served.parked.push(id);
            }
            TargetState::Started | TargetState::Unconfirmed => return served.parked.push(id),
            _ => return self.host_event(id, HostEvent::Hopeless(Reason::Closed)),
        }
        let origin = &served.origin;
        if flow.target.is_empty() || *flow.target == *origin.node {
            flow.target = origin.node.to_string();
            // It has dialled us, as it must have to move the connection here.
            flow.address = None;
        }
        flow.of_guest(key.clone(), origin.next(flow.address), served.host);
        self.start_when_connected(id);
    }

    /// It is settled that a connection is here: moves that its server has asked for meanwhile.
    pub(crate) fn start_parked(&mut self, key: &ServedKey) {
        let Some(served) = self.served.get_mut(key).filter(|s| !s.parked.is_empty()) else { return };
        for id in std::mem::take(&mut served.parked) {
            // After what is being done about this connection just now.
            self.at(Instant::now(), Timer::Settled(id));
        }
    }

    /// Hand-offs that cannot take place.
    pub(crate) fn hopeless(&mut self, ids: Vec<HandoffId>) {
        for id in ids {
            self.host_event(id, HostEvent::Hopeless(Reason::Closed));
        }
    }

    /// A connection of another machine, or one that comes home.
    pub(crate) fn insert_served(&mut self, key: ServedKey, served: Served) {
        if served.origin.is_detour() {
            let visit = Visit { hop: served.origin.hop, key: key.clone() };
            self.at_home.entry(served.origin.name()).or_default().push(visit);
        }
        self.served.insert(key, Box::new(served));
    }

    /// Nothing more is to be done about a connection.
    pub(crate) fn forget_served(&mut self, key: &ServedKey) {
        let Some(served) = self.served.get(key).filter(|s| s.state() == TargetState::Done) else { return };
        if served.shortcut.is_open() {
            return self.at(Instant::now() + PATIENCE, Timer::Detour(key.clone()));
        }
        self.remove_entry(key);
        let Some(served) = self.served.remove(key) else { return };
        self.not_again(key.clone());
        self.hopeless(served.parked);
        let name = served.origin.name();
        if let Some(visits) = self.at_home.get_mut(&name) {
            visits.retain(|v| v.key.1 != key.1 || v.key.0 != key.0);
            if visits.is_empty() {
                self.at_home.remove(&name);
            }
        }
    }

    /// Connections served here, or moved on from here, that their home knows under this name; of several visits these.
    pub(crate) fn named_at_home(&self, name: &ServedKey, which: impl Fn(u32) -> bool) -> Vec<ServedKey> {
        match self.at_home.get(name) {
            Some(visits) => visits.iter().filter(|v| which(v.hop)).map(|v| v.key.clone()).collect(),
            None => vec![name.clone()],
        }
    }

    /// Feeds the shortcut of a connection and carries out what it says.
    pub(crate) fn shortcut_event(&mut self, key: &ServedKey, event: ShortcutEvent) {
        let Some(served) = self.served.get_mut(key) else { return };
        let action = served.shortcut.on(event);
        log::trace!("{} {} {:x}: {event:?}: {action:?}", served.client, key.0, key.1);
        match action {
            Some(ShortcutAction::SendMoved) if served.origin.here => {
                let id = served.origin.id;
                if !self.rule_goes_first(id, || Then::Home(key.clone())) {
                    self.home_now(key);
                }
            }
            Some(ShortcutAction::SendMoved) => {
                let origin = &served.origin;
                let (node, moved) = (
                    origin.node.clone(),
                    Moved { id: origin.id, hop: origin.hop, local: served.entrance, address: origin.address },
                );
                if let Some(index) = self.connection_to(&node) {
                    self.send_to(index, &PeerMessage::Moved(moved));
                }
            }
            Some(ShortcutAction::SendClosed) => {
                let over = served.state() == TargetState::Closing;
                self.send_to_host(key, &PeerMessage::Closed(key.1));
                if event == ShortcutEvent::MovedAck {
                    self.at(Instant::now() + PATIENCE, Timer::Detour(key.clone()));
                    if over {
                        // The home takes `CLOSED` only from where it knows the connection to be.
                        self.target_event(key, &TargetEvent::PeerBack);
                    }
                }
            }
            Some(ShortcutAction::Close) => {
                if served.origin.here {
                    self.target_event(key, &TargetEvent::Home);
                }
                self.forget_served(key);
            }
            None => {}
        }
    }

    /// Who is to be told about a connection's way has been silent for long.
    pub(crate) fn detour_deadline(&mut self, key: &ServedKey) {
        let Some(served) = self.served.get(key) else { return };
        let alive = served.shortcut.state() == ShortcutState::Telling && served.state() != TargetState::Done;
        if !alive {
            self.shortcut_event(key, ShortcutEvent::GiveUp);
        }
    }

    /// No flow rule sends the packets of a connection away that has come home.
    pub(crate) fn home_now(&mut self, key: &ServedKey) {
        if self.served.get(key).is_some_and(|s| s.shortcut.state() == ShortcutState::Telling) {
            self.come_home(key);
            self.start_parked(key);
            self.shortcut_event(key, ShortcutEvent::MovedAck);
        }
    }

    /// It is certain that a connection of this machine is back: its redirect goes, and it is like any other. Only then is that
    /// noted: a daemon that finds the note takes it that no packet comes by the detour any more.
    fn come_home(&mut self, key: &ServedKey) {
        let Some(served) = self.served.get_mut(key) else { return };
        let (id, known_as, entry) = (served.origin.id, flow_key(served.client, served.local), served.entry);
        self.abandon_place(key);
        self.by_flow.remove(&known_as);
        self.host_event(id, HostEvent::Returned);
        if let Some(Entry::Deliver(flow)) = entry {
            self.note_home(&flow, key);
        }
    }

    /// For the next daemon: a connection is home for sure.
    pub(crate) fn note_home(&mut self, flow: &FlowKey, key: &ServedKey) {
        if let Err(e) = self.steer.note_home(flow, key.1) {
            log::error!("noting that a connection from {} is home: {e}", key.0);
        }
    }

    /// `CLOSED`: to the home, which redirects the packets; while it does not know this place, to the machine that does.
    pub(crate) fn send_closed(&mut self, key: &ServedKey) {
        let Some(served) = self.served.get(key) else { return };
        if served.shortcut.state() == ShortcutState::Waiting {
            return self.send_to_host(key, &PeerMessage::Closed(key.1));
        }
        let (node, id) = served.origin.name();
        if let Some(index) = self.connection_to(&node) {
            self.send_to(index, &PeerMessage::Closed(id));
        }
    }

    /// `MOVED`.
    pub(crate) fn on_moved(&mut self, index: usize, moved: &Moved) {
        if let Some(node) = self.node_of(index) {
            self.moved_to(&node, moved);
        }
    }

    /// A connection of this machine is at this node now.
    pub(crate) fn moved_to(&mut self, node: &Rc<str>, moved: &Moved) {
        if let Some(flow) = self.hosted.get(&moved.id) {
            // Only the lower half outlives a daemon.
            let newer = (moved.hop as u16).wrapping_sub(flow.hop as u16) as i16 > 0;
            if newer && !flow.is_away() {
                // It will be told again.
                return;
            }
            if newer && self.rule_goes_first(moved.id, || Then::Moved(node.clone(), *moved)) {
                return;
            }
            if let Some(flow) = self.hosted.get_mut(&moved.id).filter(|_| newer) {
                flow.hop = moved.hop;
                flow.target = node.to_string();
                flow.address = moved.address;
                self.host_event(moved.id, HostEvent::Moved(moved.local));
            }
        }
        if let Some(index) = self.connection_to(node) {
            self.send_to(index, &PeerMessage::MovedAck(MovedAck { id: moved.id, hop: moved.hop }));
        }
    }

    /// `MOVED_ACK`.
    pub(crate) fn on_moved_ack(&mut self, index: usize, ack: &MovedAck) {
        let Some(node) = self.node_of(index) else { return };
        for key in self.named_at_home(&(node, ack.id), |hop| hop == ack.hop) {
            if self.served.get(&key).is_some_and(|s| s.origin.hop == ack.hop) {
                self.shortcut_event(&key, ShortcutEvent::MovedAck);
            }
        }
    }

    /// Points the redirect of a connection of this machine at its new place.
    pub(crate) fn repoint(&mut self, id: HandoffId, to: SocketAddr) {
        let Some(flow) = self.hosted.get_mut(&id) else { return };
        flow.to = Some(to);
        let peer = self.state.number(&flow.target, flow.address);
        // Without an entry its client has closed it and uses its port again.
        if let Err(e) = self.steer.redirect(&flow.key, id, (peer, flow.hop), to) {
            log::debug!("{} moved to {}: {e}", flow.client, flow.target);
        }
    }
}
