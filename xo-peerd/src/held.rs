//! Packets that arrived while their connection was between two sockets.

use std::net::SocketAddr;

use xo_proto::handoff::HostState;
use xo_proto::packet;
use xo_proto::wire::HandoffId;

use crate::engine::Engine;

/// A client that sends faster than we replay is not waited for longer than this.
const REPLAY_ROUNDS: u32 = 64;

/// A packet from its network header on; an aggregate if `gso_size` is not 0.
pub(crate) struct HeldPacket {
    bytes: Vec<u8>,
    gso_size: u16,
}

impl HeldPacket {
    /// What it acknowledges.
    pub(crate) fn acknowledgement(&self) -> Option<u32> {
        packet::acknowledgement(&self.bytes)
    }

    /// Does it acknowledge more than this sequence number?
    pub(crate) fn acknowledges(&self, seq: u32) -> bool {
        self.acknowledgement().is_some_and(|ack| (ack.wrapping_sub(seq) as i32) > 0)
    }
}

impl Engine {
    /// Takes what the ring holds; packets of flows that have found their place go there at once.
    pub(crate) fn drain_held(&mut self) {
        self.collect_held();
        for id in std::mem::take(&mut self.with_held) {
            match self.hosted.get(&id).map(|f| f.to) {
                Some(Some(to)) => self.replay_held(id, Some(to)),
                Some(None) => self.with_held.push(id),
                None => {}
            }
        }
    }

    /// Files what the ring holds under its flows; how many packets that were.
    pub(crate) fn collect_held(&mut self) -> u64 {
        let (hosted, with_held) = (&mut self.hosted, &mut self.with_held);
        let mut packets = 0;
        self.steer.drain_held(&mut |header, bytes| {
            packets += 1;
            if let Some(flow) = hosted.get_mut(&header.flow_id) {
                let gso_size = u16::try_from(header.gso_size).unwrap_or(0);
                if flow.held.is_empty() {
                    with_held.push(header.flow_id);
                }
                flow.held.push(HeldPacket { bytes: bytes.to_vec(), gso_size });
            }
        });
        if packets > 0 {
            self.metrics.held(packets);
        }
        packets
    }

    /// Replays until nothing more has come meanwhile: what is held from here on, until the flow entry changes, is
    /// overtaken by the packets after it, which the client's TCP may take for a loss.
    pub(crate) fn replay_all_held(&mut self, id: HandoffId, to: Option<SocketAddr>) {
        for _ in 0..REPLAY_ROUNDS {
            let news = self.collect_held();
            self.replay_held(id, to);
            if news == 0 {
                return;
            }
        }
    }

    /// Sends one finished packet on.
    pub(crate) fn send_packet(&self, client: SocketAddr, packet: &[u8]) {
        let mut failed = None;
        let result = packet::segments(packet, 0, None, self.mtu, &mut |segment| {
            failed = self.raw.send(segment).err().or(failed.take());
        });
        if let Err(e) = result {
            log::warn!("a packet of {client}: {e}");
        }
        if let Some(e) = failed {
            log::warn!("sending a packet of {client}: {e}");
        }
    }

    /// Sends a flow's held packets on: to the target, or to our own stack.
    pub(crate) fn replay_held(&mut self, id: HandoffId, to: Option<SocketAddr>) {
        let Some(flow) = self.hosted.get_mut(&id).filter(|f| f.state() != HostState::Asked) else { return };
        for held in std::mem::take(&mut flow.held) {
            let raw = &self.raw;
            let mut failed = None;
            let result = packet::segments(&held.bytes, held.gso_size, to, self.mtu, &mut |segment| {
                if let Err(e) = raw.send(segment) {
                    failed = Some(e);
                }
            });
            if let Err(e) = result {
                log::warn!("a held packet of {}: {e}", flow.client);
            }
            if let Some(e) = failed {
                // TCP recovers: the client retransmits.
                log::warn!("replaying a packet of {}: {e}", flow.client);
            }
        }
    }
}
