//! Packets that arrived while their connection was between two sockets.

use std::net::SocketAddr;

use xo_proto::handoff::HostState;
use xo_proto::packet;
use xo_proto::wire::HandoffId;
use xo_sys::replay::RawSender;

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
    /// Takes what the ring holds: packets of flows that have found their place go there, in the order in which they came, the others are
    /// filed under their flows. How many packets that were.
    pub(crate) fn drain_held(&mut self) -> u64 {
        let (hosted, raw, mtu) = (&mut self.hosted, &self.raw, self.mtu);
        let mut packets = 0;
        self.steer.drain_held(&mut |header, bytes| {
            packets += 1;
            let Some(flow) = hosted.get_mut(&header.flow_id) else { return };
            let gso_size = u16::try_from(header.gso_size).unwrap_or(0);
            match flow.to {
                Some(to) => send(raw, flow.client, (bytes, gso_size), Some(to), mtu),
                None => flow.held.push(HeldPacket { bytes: bytes.to_vec(), gso_size }),
            }
        });
        if packets > 0 {
            self.metrics.held(packets);
        }
        packets
    }

    /// Sends on to our own stack until nothing more has come meanwhile: what is held from here on, until the flow entry goes, is
    /// overtaken by the packets after it, which the client's TCP may take for a loss.
    pub(crate) fn replay_all_here(&mut self, id: HandoffId) {
        for _ in 0..REPLAY_ROUNDS {
            let news = self.drain_held();
            self.replay_held(id, None);
            if news == 0 {
                return;
            }
        }
    }

    /// Sends one finished packet on.
    pub(crate) fn send_packet(&self, client: SocketAddr, packet: &[u8]) {
        send(&self.raw, client, (packet, 0), None, self.mtu);
    }

    /// Sends a flow's held packets on: to the target, or to our own stack.
    pub(crate) fn replay_held(&mut self, id: HandoffId, to: Option<SocketAddr>) {
        let Some(flow) = self.hosted.get_mut(&id).filter(|f| f.state() != HostState::Asked) else { return };
        for held in std::mem::take(&mut flow.held) {
            send(&self.raw, flow.client, (&held.bytes, held.gso_size), to, self.mtu);
        }
    }
}

/// Where that fails TCP recovers: the client sends it again.
fn send(
    raw: &RawSender,
    client: SocketAddr,
    (packet, gso_size): (&[u8], u16),
    to: Option<SocketAddr>,
    mtu: usize,
) {
    let mut failed = None;
    let result = packet::segments(packet, gso_size, to, mtu, &mut |segment| {
        failed = raw.send(segment).err().or(failed.take());
    });
    if let Err(e) = result {
        log::warn!("a packet of {client}: {e}");
    }
    if let Some(e) = failed {
        log::warn!("sending on a packet of {client}: {e}");
    }
}
