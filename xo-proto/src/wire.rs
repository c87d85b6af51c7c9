//! Messages between two `xo-peerd` daemons. See docs/PROTOCOL.md for the order and the reasons.

use std::net::SocketAddr;

use bincode::{Decode, Encode};

use crate::conn::{ConnRecord, SockOptions};
use crate::reason::Reason;

/// Version of this protocol; peers of different versions refuse each other's hand-offs.
pub const VERSION: u16 = 5;
/// First field of the first message.
pub const MAGIC: [u8; 4] = *b"XOP1";

/// Identity of one hand-off, unique among those of the node that began it, across its restarts.
pub type HandoffId = u64;

/// A message of the peer channel.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum PeerMessage {
    /// First message in each direction.
    Hello(Hello),
    /// Host to target: here is a connection; restore it and say where (paper 4.1.1, `BEGIN_OFFLOAD`).
    BeginOffload(Box<BeginOffload>),
    /// Target to host: restored, in repair mode, its source rewrite installed (`TARGET_READY`).
    TargetReady(TargetReady),
    /// Target to host: not here; the host serves the request itself.
    Refuse(Refuse),
    /// Host to target: packets come to you from now on; serve the request (`HOST_READY`).
    HostReady(HostReady),
    /// Host to target: forget it; the host has taken the connection back, or reset it.
    Abort(HandoffId),
    /// Host to target: what has become of it? Answered by `TargetReady` or `Refuse`, after which the target does not
    /// begin it any more.
    Query(Query),
    /// Target to host: the handler has the socket.
    Handed(Handed),
    /// Target to host: the connection's TCP close has finished, or its home redirects its packets by itself by now;
    /// remove the redirect.
    Closed(HandoffId),
    /// Host to target: the redirect is gone; remove the source rewrite.
    ClosedAck(HandoffId),
    /// Target to home: the connection has moved on, it is here now; redirect its packets straight to me.
    Moved(Moved),
    /// Home to target: its packets come to you, or to one where it has moved on since.
    MovedAck(MovedAck),
    /// Liveness probe, and a sample of the time that a message is under way; answered by `Pong`.
    Ping(Ping),
    /// Answer to `Ping`, with its number.
    Pong(u64),
    /// To all peers, ten times a second: what the sender has to do.
    Load(Load),
    /// Home to target: my connections are to leave these machines at their next request, and no new ones are to go there.
    /// All of them: one that was named before and is not now may have connections again.
    Recall(Vec<String>),
}

impl PeerMessage {
    /// Must its bytes be overwritten once they have been used?
    #[must_use]
    pub fn has_secrets(&self) -> bool {
        matches!(self, PeerMessage::BeginOffload(begin) if begin.record.tls.is_some())
    }
}

/// Who is speaking.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Hello {
    /// [`MAGIC`].
    pub magic: [u8; 4],
    /// [`VERSION`].
    pub version: u16,
    /// Node name; must be the one in the certificate.
    pub node: String,
    /// `/proc/sys/kernel/random/boot_id`: two daemons with the same one share a monotonic clock.
    pub boot_id: [u8; 16],
    /// The kernel's `TCP_TIMESTAMP` carries the timestamp unit in bit 0.
    pub usec_timestamps: bool,
}

/// How busy a machine is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Load {
    /// Connections that it serves: other machines', and its own as far as they are followed.
    pub connections: u32,
    /// How busy its processors have been of late.
    pub cpu_permille: u16,
    /// Handlers that take connections now.
    pub handlers: Vec<HandlerLoad>,
}

/// How busy a handler is.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct HandlerLoad {
    /// Its name.
    pub name: String,
    /// Other machines' connections that it serves.
    pub connections: u32,
}

/// Liveness probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Ping {
    /// Comes back in the answer.
    pub number: u64,
    /// The sender's `CLOCK_MONOTONIC`, ns.
    pub sent_ns: u64,
}

/// A question about a hand-off whose answer did not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Query {
    /// The hand-off.
    pub id: HandoffId,
    /// The sender's `CLOCK_MONOTONIC`, ns.
    pub sent_ns: u64,
}

/// `BEGIN_OFFLOAD`.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct BeginOffload {
    /// The hand-off.
    pub id: HandoffId,
    /// Handler that is to get the socket.
    pub handler: String,
    /// The connection.
    pub record: ConnRecord,
    /// Time from the dump to this message, ns.
    pub elapsed_ns: u64,
    /// The target may start the connection at once (early order).
    pub start: bool,
    /// The sender's `CLOCK_MONOTONIC`, ns.
    pub sent_ns: u64,
    /// For a connection that moves on or comes home: whose it is. `None`: the sender's.
    pub home: Option<Home>,
    /// Moves so far on behalf of the request that waits in the receive queue, this one included.
    pub moves: u8,
}

/// The machine that accepted a connection from its client and steers its packets.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Home {
    /// Its node name.
    pub node: String,
    /// The hand-off with which the connection left it.
    pub id: HandoffId,
    /// How often the connection has moved since it was there; this move included, so at least 2.
    pub hop: u32,
    /// Peer address of the daemon that this message goes to, as the sender's policy has it; the home is told.
    pub address: Option<SocketAddr>,
}

/// A connection has moved on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Moved {
    /// [`Home::id`].
    pub id: HandoffId,
    /// [`Home::hop`]: of several, the highest is the connection's place.
    pub hop: u32,
    /// Where its packets are to go.
    pub local: SocketAddr,
    /// [`Home::address`].
    pub address: Option<SocketAddr>,
}

/// Answer to [`Moved`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct MovedAck {
    /// [`Moved::id`].
    pub id: HandoffId,
    /// [`Moved::hop`].
    pub hop: u32,
}

/// Packets come to the target from now on.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct HostReady {
    /// The hand-off.
    pub id: HandoffId,
    /// Options that the server had set; `None` when they could not be read.
    pub options: Option<SockOptions>,
    /// [`Home::hop`] of the move that the redirect is owed to, its lower half; 1 is the first.
    pub hop: u16,
    /// Time since the dump, ns. The timestamp clock goes on by as much: the emptied socket may have sent an
    /// acknowledgement meanwhile, and the client drops what looks older (RFC 7323, 5.3).
    pub elapsed_ns: u64,
}

/// `TARGET_READY`.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct TargetReady {
    /// The hand-off.
    pub id: HandoffId,
    /// Where the restored socket listens for the client's packets; the port differs from the host's when
    /// the 4-tuple was taken.
    pub local: SocketAddr,
    /// Time to restore the socket, ns.
    pub restore_ns: u64,
    /// Time to install the source rewrite, ns.
    pub rewrite_ns: u64,
    /// Time from receiving `BEGIN_OFFLOAD` to sending this, ns.
    pub total_ns: u64,
    /// Early order: the handler has had the connection since this moment of the target's `CLOCK_MONOTONIC`, ns.
    pub started_ns: Option<u64>,
}

/// Refusal of a hand-off.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Refuse {
    /// The hand-off.
    pub id: HandoffId,
    /// Why.
    pub reason: Reason,
    /// What the kernel said, for the log.
    pub detail: String,
}

/// The handler has the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Handed {
    /// The hand-off.
    pub id: HandoffId,
    /// Time from receiving `HOST_READY` to the socket being handed over, ns.
    pub hand_ns: u64,
    /// `CLOCK_MONOTONIC` at that moment, ns; comparable when both ends share a boot.
    pub at_ns: u64,
}
