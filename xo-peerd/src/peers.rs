//! The channels to the daemons of other machines: accepted, read, probed, lost. What a message means stands in `host.rs`,
//! `target.rs` and `onward.rs`.

use std::io::{self, ErrorKind};
use std::rc::Rc;
use std::time::Duration;

use log::Level;
use mio::Interest;
use xo_proto::wire::PeerMessage;

use crate::clock::now_ns;
use crate::engine::{Engine, peer_token};
use crate::peer::{Peer, PeerError};
use crate::tls::Tls;
use crate::unflushed::Haste;

/// How long a peer may be silent.
const LONGEST_SILENCE: Duration = Duration::from_secs(3);

impl Engine {
    /// Accepts what waits; `failure`: how loudly to say that it cannot be.
    pub(crate) fn accept_peers(&mut self, failure: Level) {
        while let Some(listener) = &self.peer_listener {
            let (stream, address) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) => {
                    self.accept_again = true;
                    return log::log!(failure, "accepting a peer's connection: {e}");
                }
            };
            let result = stream.set_nodelay(true).map_err(PeerError::from).and_then(|()| {
                let tls = self.tls.as_ref().map(Tls::accept).transpose();
                let tls = tls.map_err(|e| PeerError::Hello(e.to_string()))?;
                Peer::new(stream, tls, None, &self.hello)
            });
            match result.and_then(|peer| Ok(self.add_peer(peer)?)) {
                Ok(index) => {
                    log::debug!("peer connection from {address}");
                    // Without TLS the hello can go at once; with TLS it follows the handshake.
                    self.peer_ready(index, true, false);
                }
                Err(e) => log::warn!("peer connection from {address}: {e}"),
            }
        }
    }

    /// Registers a peer connection; returns its index.
    pub(crate) fn add_peer(&mut self, mut peer: Peer) -> io::Result<usize> {
        peer.serial = self.next_serial();
        let index = self.peers.insert(peer);
        let token = peer_token(index);
        let interest = Interest::READABLE | Interest::WRITABLE;
        if let Err(e) = self.poll.registry().register(self.peers[index].stream(), token, interest) {
            self.peers.remove(index);
            return Err(e);
        }
        Ok(index)
    }

    /// A channel can be read, or written to; or its end is behind what can be read.
    pub(crate) fn peer_ready(&mut self, index: usize, writable: bool, ends: bool) {
        let Some(peer) = self.peers.get_mut(index) else { return };
        let known = peer.usable();
        let mut messages = Vec::new();
        let result = if writable { peer.writable() } else { Ok(()) };
        let result =
            result.and_then(|()| if peer.connected { peer.readable(&mut messages, ends) } else { Ok(()) });
        if !known && peer.usable() {
            self.peer_up(index);
        }
        for message in messages {
            self.on_peer_message(index, message);
        }
        if let Err(e) = result {
            self.peer_failed(index, &e);
        }
    }

    fn on_peer_message(&mut self, index: usize, message: PeerMessage) {
        match message {
            PeerMessage::BeginOffload(begin) => self.on_begin(index, begin),
            PeerMessage::HostReady(ready) => self.on_host_ready(index, &ready),
            PeerMessage::Abort(id) => self.on_abort(index, id),
            PeerMessage::Query(query) => self.on_query(index, query),
            PeerMessage::ClosedAck(id) => self.on_closed_ack(index, id),
            PeerMessage::TargetReady(ready) => self.on_target_ready(index, &ready),
            PeerMessage::Refuse(refuse) => self.on_refuse(index, &refuse),
            PeerMessage::Handed(handed) => self.on_handed(index, &handed),
            PeerMessage::Closed(id) => self.on_closed(index, id),
            PeerMessage::Moved(moved) => self.on_moved(index, &moved),
            PeerMessage::MovedAck(ack) => self.on_moved_ack(index, &ack),
            PeerMessage::Ping(ping) => {
                // A sample; whether it is late does not matter.
                let _ = self.lateness(index, ping.sent_ns);
                self.send_to(index, &PeerMessage::Pong(ping.number));
            }
            PeerMessage::Pong(number) => {
                if let Some(peer) = self.peers.get_mut(index) {
                    peer.probed(number);
                    let waiting = std::mem::take(&mut peer.waiting);
                    for id in waiting {
                        self.start_when_settled(id);
                    }
                }
            }
            PeerMessage::Load(load) => self.on_load(index, load),
            PeerMessage::Recall(nodes) => self.on_recall(index, nodes),
            PeerMessage::Hello(_) => {}
        }
    }

    /// Asks the peers whether they are there.
    pub(crate) fn probe_peers(&mut self) {
        let usable: Vec<usize> = self.peers.iter().filter(|(_, p)| p.usable()).map(|(i, _)| i).collect();
        for index in usable {
            let Some(peer) = self.peers.get_mut(index) else { continue };
            if peer.silence() > LONGEST_SILENCE {
                self.peer_failed(index, &PeerError::Silent);
            } else if let Some(probe) = peer.next_probe() {
                self.send_to(index, &probe);
            }
        }
    }

    /// Sends to a peer, what nobody waits for somewhat later; a broken connection is dealt with.
    pub(crate) fn send_to(&mut self, index: usize, message: &PeerMessage) {
        let Some(peer) = self.peers.get_mut(index) else { return };
        let haste = Haste::of(message);
        let result = if haste == Haste::Now {
            self.unflushed.written(index);
            peer.send(message)
        } else {
            self.unflushed.add(index, haste);
            peer.queue(message)
        };
        if let Err(e) = result {
            self.peer_failed(index, &e);
        }
    }

    /// The end of a turn of the event loop; `all`: the last one.
    pub(crate) fn flush_peers(&mut self, all: bool) {
        while let Some(index) = self.unflushed.next(all) {
            self.unflushed.written(index);
            let Some(peer) = self.peers.get_mut(index) else { continue };
            if let Err(e) = peer.flush() {
                self.peer_failed(index, &e);
            }
        }
    }

    /// The newest connection to a node: an older one may be dead without anybody having noticed.
    pub(crate) fn connection_to(&self, node: &str) -> Option<usize> {
        let is_it = |p: &Peer| p.hello.as_ref().is_some_and(|h| h.node == node);
        self.peers.iter().filter(|(_, p)| is_it(p)).max_by_key(|(_, p)| p.serial).map(|(i, _)| i)
    }

    /// How much longer a message of the peer with this stamp was under way than the fastest of late.
    pub(crate) fn lateness(&mut self, index: usize, sent_ns: u64) -> Option<Duration> {
        let hello = self.peers.get(index)?.hello.as_ref()?;
        let samples = self.freshness.entry((Rc::from(hello.node.as_str()), hello.boot_id)).or_default();
        samples.observe(sent_ns, now_ns())
    }

    /// Node name of a peer that has said hello.
    pub(crate) fn node_of(&self, index: usize) -> Option<Rc<str>> {
        self.peers.get(index)?.hello.as_ref().map(|h| Rc::from(h.node.as_str()))
    }

    fn peer_failed(&mut self, index: usize, error: &PeerError) {
        let Some(mut peer) = self.peers.try_remove(index) else { return };
        let _ = self.poll.registry().deregister(peer.stream());
        peer.discard_unsent();
        match error {
            PeerError::Closed if peer.usable() => log::info!("peer {}: {error}", peer.name()),
            _ if !peer.usable() && peer.dialled.is_some() => self.say_away(&peer.name(), error),
            _ => log::warn!("peer {}: {error}", peer.name()),
        }
        if let Some(hello) = &peer.hello {
            self.peer_lost(&hello.node);
            self.closed_again(Some(&hello.node));
        }
        if let Some((node, _)) = peer.dialled {
            self.dial_failed(&node);
        }
        for id in peer.waiting {
            self.start_when_settled(id);
        }
    }
}
