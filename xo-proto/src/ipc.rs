//! Messages between the library and its machine's daemon, over a `SOCK_SEQPACKET` Unix socket: one message
//! per packet, descriptors with it where stated.

use std::net::SocketAddr;

use bincode::{Decode, Encode};

use crate::reason::Reason;
use crate::tls::TlsState;
use crate::worth::Worth;

/// Version of this interface; library and daemon of different versions part at once.
pub const VERSION: u16 = 7;

/// Proof that a process descends from one that the daemon trusts: a server's master opens the socket as
/// root, its workers inherit the ticket and show it when they have dropped their privileges.
pub type Ticket = [u8; 16];

/// Library to daemon.
#[expect(
    clippy::large_enum_variant,
    reason = "it lives on the stack from the socket to its handling; a box would be an allocation for each"
)]
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum ToDaemon {
    /// First message.
    Hello {
        /// [`VERSION`].
        version: u16,
        /// The ticket that a parent process was given.
        ticket: Option<Ticket>,
    },
    /// Hand this connection over. Carries the connection's descriptor. The verdict comes in the slot.
    Offload(Offload),
    /// A hand-off that an earlier daemon did not finish, or whose end this process did not see. Carries the connection's
    /// descriptor. The verdict comes in the slot.
    Recover {
        /// Index into the slot table.
        slot: u32,
        /// The slot's generation.
        generation: u32,
    },
    /// This process accepts connections from the listening socket that this message carries as its first
    /// descriptor.
    Register {
        /// It waits for the listening socket with epoll and has added one end of a `SOCK_SEQPACKET` pair
        /// there, on which it receives `Deliver`: the message carries the daemon's end and a duplicate of the
        /// process's own (what is left in it when the process goes is delivered elsewhere). Otherwise the
        /// daemon wakes it with a loopback connection.
        epoll: bool,
        /// It can serve a connection that comes with TLS.
        tls: bool,
    },
    /// Blocking request: the connection just accepted from this local port is a wake-up; which restored
    /// connection is it for? Answered by `Deliver` or `Nothing`.
    Take {
        /// Source port of the wake-up connection.
        wake_port: u16,
    },
    /// An operator's question; answered by packets of JSON text, then the end of the connection.
    Query(Query),
}

impl ToDaemon {
    /// Must its bytes be overwritten once they have been used?
    #[must_use]
    pub fn has_secrets(&self) -> bool {
        matches!(self, ToDaemon::Offload(offload) if offload.tls.is_some())
    }
}

/// What an operator may ask.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Query {
    /// Counters and times.
    Status,
    /// One entry for each connection offloaded from here or served here.
    Flows,
    /// Give a target no more connections, and have those that it has leave it at their next request; or no longer so.
    Drain {
        /// Its node name.
        node: String,
        /// Whether to.
        on: bool,
    },
    /// Read the policy file again.
    Reload,
}

/// A request to move a connection.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Offload {
    /// Index into the slot table.
    pub slot: u32,
    /// The slot's generation.
    pub generation: u32,
    /// Where to.
    pub to: Destination,
    /// Handler at the target.
    pub handler: String,
    /// Moves so far on behalf of the request at hand.
    pub moves: u8,
    /// The connection's TLS, if it has any: it stands before the record that the receive queue begins with.
    pub tls: Option<TlsState>,
    /// Of that record, how much data the server has read, bytes: the next request begins in it.
    pub used: u32,
    /// `CLOCK_MONOTONIC` when the policy had decided, ns.
    pub decided_ns: u64,
    /// It is worth a flow rule then; `None`: as the daemon's configuration says.
    pub flower_after: Option<Worth>,
}

/// Where a connection is to go.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Destination {
    /// To another machine.
    Target {
        /// Its node name.
        node: String,
        /// Peer address of its daemon.
        address: SocketAddr,
    },
    /// To the machine that accepted it from its client.
    Home,
}

/// Daemon to library.
#[expect(
    clippy::large_enum_variant,
    reason = "it lives on the stack from the socket to its handling; a box would be an allocation for each"
)]
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum FromDaemon {
    /// Answer to `Hello`. Carries the slot table and the board (memfds).
    Welcome {
        /// [`VERSION`].
        version: u16,
        /// This machine's node name.
        node: String,
        /// For the process's children.
        ticket: Ticket,
    },
    /// Answer to `Hello` from a process that may not use the daemon.
    Denied {
        /// What is wrong, for the log.
        detail: String,
    },
    /// A restored connection. Carries its descriptor.
    Deliver(Deliver),
    /// Answer to `Take`: nothing waits under that port.
    Nothing,
}

impl FromDaemon {
    /// Must its bytes be overwritten once they have been used?
    #[must_use]
    pub fn has_secrets(&self) -> bool {
        matches!(self, FromDaemon::Deliver(deliver) if deliver.tls.is_some())
    }
}

/// A connection for this process to accept.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Deliver {
    /// Index into the slot table's deliveries, where the library says when it has closed the connection.
    pub delivery: u32,
    /// The client, for `accept`'s address argument.
    pub client: SocketAddr,
    /// The connection is another machine's, and can go home to it.
    pub guest: bool,
    /// For a guest, the number of its home on the board.
    pub home: u64,
    /// Moves so far on behalf of the request that waits in it.
    pub moves: u8,
    /// Its TLS, if it has any: what can be read from the descriptor is records.
    pub tls: Option<TlsState>,
    /// With `tls`: the server speaks TLS itself on that port, and will begin with the handshake, which is long over.
    pub handshake: bool,
}

/// Outcome of an [`Offload`], kept in the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not decided yet.
    Pending,
    /// The connection is elsewhere: it has ended for this process.
    Gone,
    /// The connection stays; the request is in its receive queue.
    Stay(Reason),
}
