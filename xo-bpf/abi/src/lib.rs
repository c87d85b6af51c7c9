//! Types shared by the eBPF programs and user space.
//!
//! Everything here is plain old data with a fixed layout: the sizes are asserted below, because the
//! built object (`xo-bpf/obj/xo.bpf.o`) and the daemon are compiled apart.
#![no_std]

/// Name of the map that holds [`FlowEntry`] by [`FlowKey`]: consulted on ingress.
pub const FLOWS_MAP: &str = "FLOWS";
/// Name of the map that holds [`RewriteEntry`] by [`FlowKey`]: consulted on egress.
pub const REWRITES_MAP: &str = "REWRITES";
/// Name of the ring buffer that carries [`HeldHeader`] followed by the packet, from its network header on.
pub const HELD_MAP: &str = "HELD";
/// Name of the map that holds [`NextHop`] by address, v4-mapped for IPv4.
pub const HOPS_MAP: &str = "HOPS";
/// Entries of [`HOPS_MAP`].
pub const MAX_HOPS: u32 = 256;
/// Name of the per-CPU array of `u64` counters, indexed by [`Path`].
pub const COUNTERS_MAP: &str = "COUNTERS";
/// Name of the ingress program.
pub const INGRESS_PROGRAM: &str = "xo_ingress";
/// Name of the ingress program's fast path, which may run before it, at the driver.
pub const XDP_PROGRAM: &str = "xo_xdp";
/// Name of the egress program.
pub const EGRESS_PROGRAM: &str = "xo_egress";

/// Name of the program that gives restored sockets their congestion window.
pub const CARRY_PROGRAM: &str = "xo_carry";
/// What a socket's priority has in its upper half when the lower one is a congestion window, segments.
pub const CARRY_PRIORITY: u32 = 0x584f_0000;
/// The upper half.
pub const CARRY_MASK: u32 = 0xffff_0000;

/// One direction-free TCP flow as this machine sees it. IPv4 addresses are v4-mapped (`::ffff:a.b.c.d`).
/// Ports and addresses are in network byte order, addresses as four words: the programs handle words, not
/// bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The client's address.
    pub remote: [u32; 4],
    /// This machine's address.
    pub local: [u32; 4],
    /// The client's port, network byte order.
    pub remote_port: u16,
    /// This machine's port, network byte order.
    pub local_port: u16,
}

/// What ingress does with a flow's packets.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The paper's BLOCK: the packet never reaches the local stack. It is copied to [`HELD_MAP`] so that
    /// user space can replay it once the flow has found its place.
    Hold = 0,
    /// Rewrite the destination to `to_addr:to_port` and send it on.
    Redirect = 1,
    /// Rewrite the destination to `to_addr:to_port`, which is this machine's, and pass it to the local stack: the last
    /// part of the detour of a connection that has come home.
    Deliver = 2,
}

/// [`FlowEntry::flags`]: the client has sent a FIN.
pub const FLAG_CLIENT_FIN: u32 = 1;
/// [`FlowEntry::flags`]: the client has sent a RST.
pub const FLAG_CLIENT_RST: u32 = 2;
/// [`FlowEntry::flags`], set by user space: a flow rule may have the flow's packets too. Until it is gone, the entry is not given up.
pub const FLAG_RULE: u32 = 4;
/// [`FlowEntry::flags`], set by user space: a rule of the kernel's, behind this hook, has the flow's packets, except those that begin or end
/// a connection.
pub const FLAG_PASS: u32 = 8;

/// Value of [`FLOWS_MAP`]. User space writes it whole; the program updates `flags`, `packets`, `bytes`, `last_ns`,
/// `ordered_until_ns`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowEntry {
    /// Identity of the hand-off that owns the entry; user space removes an entry only if it still owns it.
    pub flow_id: u64,
    /// Packets seen in this state.
    pub packets: u64,
    /// Bytes seen in this state, from the network header on.
    pub bytes: u64,
    /// Time of the last packet, `CLOCK_MONOTONIC` nanoseconds (`bpf_ktime_get_ns`).
    pub last_ns: u64,
    /// An [`Action`].
    pub action: u32,
    /// `FLAG_*`.
    pub flags: u32,
    /// New destination address, v4-mapped for IPv4.
    pub to_addr: [u32; 4],
    /// New destination port, network byte order.
    pub to_port: u16,
    /// Lower half of the number of the move that the entry is owed to. For DELIVER: 0 once the connection is home for
    /// sure. For user space only, as is `peer`.
    pub hop: u16,
    /// The target, by its number in the daemon's list of names. For user space only: a restarted daemon finds its flows
    /// again in the pinned map.
    pub peer: u32,
    /// REDIRECT, until this time (`CLOCK_MONOTONIC` nanoseconds): while user space has not sent on all that [`HELD_MAP`] holds, packets
    /// queue there too, so that none overtakes those before it. The program clears it when the ring is empty; 0: packets go their way.
    pub ordered_until_ns: u64,
}

/// Value of [`HOPS_MAP`]: the way to an address. User space writes it whole, again and again.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// Not to be believed after this, `CLOCK_MONOTONIC` nanoseconds: routes may have changed while there was no daemon.
    pub until_ns: u64,
    /// Index of the interface.
    pub interface: u32,
    /// Family of the neighbour's address, `AF_INET` or `AF_INET6`.
    pub family: u32,
    /// The neighbour's address, in network byte order; an IPv4 one is the first word.
    pub address: [u32; 4],
    /// Longest packet that the XDP program sends this way by itself, bytes from the network header on; 0: none.
    pub xdp_longest: u16,
    /// Not 0: what has come in by the interface may be sent back by it at once (`XDP_TX`), not only as from another one.
    pub xdp_back: u16,
    /// What the XDP program begins a frame with: the Ethernet addresses of neighbour and interface.
    pub ethernet: [u16; 6],
}

/// Value of [`REWRITES_MAP`]: the source that a target's packets must carry.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RewriteEntry {
    /// Identity of the hand-off that owns the entry, given by the machine that the connection came from.
    pub flow_id: u64,
    /// Packets rewritten.
    pub packets: u64,
    /// Bytes rewritten, from the network header on.
    pub bytes: u64,
    /// Time of the last packet, `CLOCK_MONOTONIC` nanoseconds.
    pub last_ns: u64,
    /// The host's address, v4-mapped for IPv4.
    pub from_addr: [u32; 4],
    /// The host's port, network byte order.
    pub from_port: u16,
    /// The handler, by its number in the daemon's list of names; for user space only.
    pub handler: u16,
    /// The machine that the connection came from, likewise.
    pub peer: u32,
    /// Identity of the hand-off with which the connection left its home; equal to `flow_id` if it came from there.
    pub home_id: u64,
    /// The home, by its number in the daemon's list of names.
    pub home_peer: u32,
    /// How often the connection has moved since it was at home; 1 if it came from there.
    pub hop: u32,
    /// Not 0: the connection has left this machine, which says nothing more about it. The four before are for user space
    /// only.
    pub left: u32,
    /// Zero.
    pub pad: u32,
}

/// Precedes each packet in [`HELD_MAP`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldHeader {
    /// The flow the packet belongs to.
    pub key: FlowKey,
    /// Bytes of packet that follow, from the network header on.
    pub len: u32,
    /// [`FlowEntry::flow_id`] of the entry that held it.
    pub flow_id: u64,
    /// `gso_size` of the skb: payload bytes per segment of an aggregate, 0 for a single packet.
    pub gso_size: u32,
    /// 4 or 6.
    pub ip_version: u32,
}

/// Index into [`COUNTERS_MAP`]: the path a packet took. Programs count every packet of a known flow.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// Ingress: no entry; passed to the local stack.
    IngressMiss = 0,
    /// Ingress: held for replay.
    Held = 1,
    /// Ingress: to be held, but the ring was full or the packet too long; dropped (TCP recovers).
    HoldDropped = 2,
    /// Ingress: rewritten and redirected.
    Redirected = 3,
    /// Ingress: of a redirected flow, but a rewrite helper failed; dropped.
    RedirectFailed = 4,
    /// Ingress: a SYN for a flow whose client had closed: entry removed, packet passed to the local stack.
    Reused = 5,
    /// Either hook: a fragment, or a truncated or malformed header; passed.
    Unparsed = 6,
    /// Egress: no entry; passed.
    EgressMiss = 7,
    /// Egress: source rewritten.
    Rewritten = 8,
    /// Egress: of a known flow, but a rewrite helper failed; dropped.
    RewriteFailed = 9,
    /// Ingress: of a connection that has come home by a detour; rewritten and passed to the local stack.
    Delivered = 10,
    /// Egress: a RST for a connection that has left this machine; dropped.
    Muted = 11,
    /// Ingress: of a redirected flow, but without time to live for one more hop; dropped.
    Expired = 12,
    /// Ingress: an ICMP error about a packet of a redirected or delivered flow; rewritten, and sent or passed to where the
    /// connection is.
    QuoteSteered = 13,
    /// Ingress: an ICMP error about a packet of a held flow; passed to the local stack, where the connection still is.
    QuotePassed = 14,
    /// Ingress: of a redirected flow that has a rule in the kernel; passed to it.
    LeftToRule = 15,
    /// Ingress: a SYN for a flow whose client had closed, but which a flow rule may have still; dropped: it comes again.
    ReuseDropped = 16,
    /// XDP: rewritten and sent on; nothing behind it sees the packet.
    XdpRedirected = 17,
    /// XDP: of a redirected flow, but not as plain as the fast path wants it, or its way is not known; passed to the ingress
    /// program, which counts it once more.
    XdpLeft = 18,
}

/// Number of [`Path`] variants.
pub const PATHS: u32 = 19;

/// Name of each [`Path`], by index, for metrics.
pub const PATH_NAMES: [&str; PATHS as usize] = [
    "ingress_miss",
    "held",
    "hold_dropped",
    "redirected",
    "redirect_failed",
    "reused",
    "unparsed",
    "egress_miss",
    "rewritten",
    "rewrite_failed",
    "delivered",
    "muted",
    "expired",
    "quote_steered",
    "quote_passed",
    "left_to_rule",
    "reuse_dropped",
    "xdp_redirected",
    "xdp_left",
];

const _: () = assert!(size_of::<FlowKey>() == 36);
const _: () = assert!(size_of::<FlowEntry>() == 72);
const _: () = assert!(size_of::<NextHop>() == 48);
const _: () = assert!(size_of::<RewriteEntry>() == 80);
const _: () = assert!(size_of::<HeldHeader>() == 56);

#[cfg(feature = "user")]
mod user {
    // SAFETY: repr(C), no implicit padding (sizes asserted above), any bit pattern is valid.
    unsafe impl aya::Pod for super::FlowKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::FlowEntry {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::RewriteEntry {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::NextHop {}
}
