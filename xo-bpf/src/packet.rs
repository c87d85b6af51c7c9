//! Finding a packet's flow, and rewriting an address, a port, and the time to live.

use aya_ebpf::bindings::{__sk_buff, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM};
use aya_ebpf::helpers::generated::{bpf_csum_diff, bpf_l4_csum_replace, bpf_skb_store_bytes};
use aya_ebpf::programs::TcContext;
use xo_bpf_abi::FlowKey;

const ETH_HEADER: usize = 14;
const VLAN_TAG: usize = 4;
/// EtherTypes.
pub const ETH_P_IPV4: u16 = 0x0800;
/// See [`ETH_P_IPV4`].
pub const ETH_P_IPV6: u16 = 0x86dd;
const ETH_P_VLAN: u16 = 0x8100;
const ETH_P_QINQ: u16 = 0x88a8;
/// Numbers of protocols.
pub const PROTOCOL_ICMP: u8 = 1;
/// See [`PROTOCOL_ICMP`].
pub const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_ICMP6: u8 = 58;
/// Without options.
const IPV4_HEADER: usize = 20;
/// Extension headers are not looked at.
pub const IPV6_HEADER: usize = 40;
/// Third word of an IPv4 address in IPv6 clothes.
const MAPPED: u32 = 0xffff_u32.to_be();
/// Where fields are. With the time to live begins what a rewrite changes.
pub const IPV4_TTL: usize = 8;
/// See [`IPV4_TTL`].
pub const IPV4_SUM: usize = 10;
/// See [`IPV4_TTL`].
pub const IPV4_SOURCE: usize = 12;
const IPV6_HOPS: usize = 7;
/// See [`IPV4_TTL`].
pub const IPV6_SOURCE: usize = 8;
const IPV6_DESTINATION: usize = 24;

/// See [`IPV4_TTL`].
pub const TCP_CHECKSUM: usize = 16;

/// FIN, SYN, RST, ACK as in the TCP header.
pub const FIN: u8 = 1;
/// See [`FIN`].
pub const SYN: u8 = 2;
/// See [`FIN`].
pub const RST: u8 = 4;
/// See [`FIN`].
pub const ACK: u8 = 16;

/// Which end of a packet is the client.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Its source (ingress).
    FromClient,
    /// Its destination (egress).
    ToClient,
}

/// A TCP packet's place and flow.
pub struct Packet {
    /// Offset of the IP header.
    pub ip: usize,
    /// Offset of the TCP header.
    pub tcp: usize,
    /// IPv6, else IPv4.
    pub v6: bool,
    /// TCP flags.
    pub flags: u8,
    /// IPv4 time to live or IPv6 hop limit.
    pub hops: u8,
    /// The IPv4 header's checksum as it is in the packet.
    sum: u16,
    /// Its flow.
    pub key: FlowKey,
}

/// Why a packet has no flow.
pub enum NoFlow {
    /// Neither TCP nor ICMP over IP, or under more than one VLAN tag.
    Foreign,
    /// ICMP or ICMPv6, with its IP header at this offset: it may be about a flow.
    Icmp(usize),
    /// A fragment, truncated, or malformed.
    Unparsed,
}

/// Parses Ethernet, one VLAN tag, IPv4 with options or IPv6, and TCP. The kernel takes the outer tag out of what
/// comes in: a tag in the frame is then the second one, and `bpf_redirect_neigh` would drop such a packet.
#[inline(always)]
pub fn parse(ctx: &TcContext, direction: Direction) -> Result<Packet, NoFlow> {
    let unparsed = |_| NoFlow::Unparsed;
    let mut ip = ETH_HEADER;
    let mut protocol = u16::from_be(ctx.load(12).map_err(unparsed)?);
    if protocol == ETH_P_VLAN || protocol == ETH_P_QINQ {
        // SAFETY: a field of the program's own context.
        if unsafe { (*ctx.skb.skb).vlan_present } != 0 {
            return Err(NoFlow::Foreign);
        }
        protocol = u16::from_be(ctx.load(16).map_err(unparsed)?);
        ip += VLAN_TAG;
    }
    match protocol {
        ETH_P_IPV4 => parse_v4(ctx, ip, direction),
        ETH_P_IPV6 => parse_v6(ctx, ip, direction),
        _ => Err(NoFlow::Foreign),
    }
}

/// The IPv4 header as words: the programs copy words, not bytes.
#[repr(C)]
pub struct V4 {
    version_length: u8,
    _tos: u8,
    _length: u16,
    _id: u16,
    fragment: u16,
    pub ttl: u8,
    pub protocol: u8,
    pub checksum: u16,
    pub source: u32,
    pub destination: u32,
}

impl V4 {
    /// Its length, if a whole transport header may follow: no fragment, no wrong version or length.
    #[inline(always)]
    pub fn length(&self) -> Option<usize> {
        let length = (self.version_length & 15) as usize * 4;
        // More fragments, or an offset.
        let fragment = self.fragment & 0x3fff_u16.to_be() != 0;
        (self.version_length >> 4 == 4 && length >= IPV4_HEADER && !fragment).then_some(length)
    }
}

#[repr(C)]
pub struct V6 {
    version_flow: u32,
    _length: u16,
    pub protocol: u8,
    pub hops: u8,
    pub source: [u32; 4],
    pub destination: [u32; 4],
}

impl V6 {
    /// Is it of version 6, and between addresses that are not mapped ones? Those have no place on the wire, and must not be
    /// taken for the IPv4 flow of the same name.
    #[inline(always)]
    pub fn is_valid(&self) -> bool {
        let version = u32::from_be(self.version_flow) >> 28;
        version == 6 && !is_mapped(&self.source) && !is_mapped(&self.destination)
    }
}

/// Is it an IPv4 address in IPv6 clothes?
#[inline(always)]
pub fn is_mapped(a: &[u32; 4]) -> bool {
    (a[0] | a[1]) == 0 && a[2] == MAPPED
}

/// An IPv4 address in IPv6 clothes.
#[inline(always)]
pub fn mapped(address: u32) -> [u32; 4] {
    [0, 0, MAPPED, address]
}

/// All of it, though the checksum is not looked at: a packet without it could not be rewritten.
#[repr(C)]
struct Tcp {
    source: u16,
    destination: u16,
    _seq: u32,
    _ack: u32,
    _offset: u8,
    flags: u8,
    _window: u16,
    _checksum: u16,
    _urgent: u16,
}

#[inline(always)]
fn parse_v4(ctx: &TcContext, ip: usize, direction: Direction) -> Result<Packet, NoFlow> {
    let header: V4 = ctx.load(ip).map_err(|_| NoFlow::Unparsed)?;
    match header.protocol {
        PROTOCOL_TCP => {}
        PROTOCOL_ICMP => return Err(NoFlow::Icmp(ip)),
        _ => return Err(NoFlow::Foreign),
    }
    let length = header.length().ok_or(NoFlow::Unparsed)?;
    let ends = (mapped(header.source), mapped(header.destination));
    let packet = finish(ctx, ip, ip + length, ends, direction)?;
    Ok(Packet { hops: header.ttl, sum: header.checksum, ..packet })
}

#[inline(always)]
fn parse_v6(ctx: &TcContext, ip: usize, direction: Direction) -> Result<Packet, NoFlow> {
    let header: V6 = ctx.load(ip).map_err(|_| NoFlow::Unparsed)?;
    match header.protocol {
        PROTOCOL_TCP => {}
        PROTOCOL_ICMP6 => return Err(NoFlow::Icmp(ip)),
        // Extension headers are not steered: such packets pass, as those of another flow would.
        _ => return Err(NoFlow::Foreign),
    }
    if !header.is_valid() {
        return Err(NoFlow::Unparsed);
    }
    let packet = finish(ctx, ip, ip + IPV6_HEADER, (header.source, header.destination), direction)?;
    Ok(Packet { v6: true, hops: header.hops, ..packet })
}

#[inline(always)]
fn finish(
    ctx: &TcContext,
    ip: usize,
    tcp: usize,
    (source, destination): ([u32; 4], [u32; 4]),
    direction: Direction,
) -> Result<Packet, NoFlow> {
    let header: Tcp = ctx.load(tcp).map_err(|_| NoFlow::Unparsed)?;
    let key = match direction {
        Direction::FromClient => FlowKey {
            remote: source,
            local: destination,
            remote_port: header.source,
            local_port: header.destination,
        },
        Direction::ToClient => FlowKey {
            remote: destination,
            local: source,
            remote_port: header.destination,
            local_port: header.source,
        },
    };
    Ok(Packet { ip, tcp, v6: false, flags: header.flags, hops: 0, sum: 0, key })
}

/// Replaces this machine's end of the packet: the destination of what comes from the client, the source of what goes to
/// it; and its time to live by `hops`. The checksum helpers know partial checksums and GSO, plain arithmetic does not: it is
/// for IPv4's header, whose checksum is always whole.
#[inline(always)]
pub fn rewrite(
    ctx: &TcContext,
    packet: &Packet,
    direction: Direction,
    to: &[u32; 4],
    port: u16,
    hops: u8,
) -> Result<(), ()> {
    let skb = ctx.skb.skb;
    let checksum = (packet.tcp + TCP_CHECKSUM) as u32;
    let (v6_at, port_at) = match direction {
        Direction::FromClient => (IPV6_DESTINATION, 2),
        Direction::ToClient => (IPV6_SOURCE, 0),
    };
    let from_port = packet.key.local_port;
    // SAFETY: helpers check offsets themselves; pointers are to locals of the given lengths.
    let done = unsafe {
        let address = if packet.v6 {
            rewrite_v6(skb, checksum, packet, to, (packet.ip + v6_at) as u32, hops)
        } else {
            rewrite_v4(skb, checksum, packet, direction, to[3], hops)
        };
        address
            && (port == from_port
                || rewrite_port(skb, checksum, from_port, port, (packet.tcp + port_at) as u32))
    };
    if done { Ok(()) } else { Err(()) }
}

#[inline(always)]
unsafe fn rewrite_port(skb: *mut __sk_buff, checksum: u32, old: u16, new: u16, at: u32) -> bool {
    // SAFETY: as in the caller.
    unsafe {
        bpf_l4_csum_replace(skb, checksum, old.into(), new.into(), 2) == 0
            && bpf_skb_store_bytes(skb, at, (&raw const new).cast(), 2, 0) == 0
    }
}

#[inline(always)]
unsafe fn rewrite_v4(
    skb: *mut __sk_buff,
    checksum: u32,
    packet: &Packet,
    direction: Direction,
    new: u32,
    hops: u8,
) -> bool {
    let old = packet.key.local[3];
    let first = v4_word(PROTOCOL_TCP, packet.sum, (packet.hops, hops), (old, new));
    let words = match direction {
        Direction::FromClient => [first, packet.key.remote[3], new],
        Direction::ToClient => [first, new, packet.key.remote[3]],
    };
    let pseudo = u64::from(BPF_F_PSEUDO_HDR) | 4;
    // SAFETY: as in the caller.
    unsafe {
        bpf_l4_csum_replace(skb, checksum, old.into(), new.into(), pseudo) == 0
            && bpf_skb_store_bytes(skb, (packet.ip + IPV4_TTL) as u32, words.as_ptr().cast(), 12, 0) == 0
    }
}

/// The word of an IPv4 header that holds time to live, protocol and checksum, after a change of the first and of an
/// address (RFC 1624, equation 3).
#[inline(always)]
pub fn v4_word(protocol: u8, sum: u16, (old_hops, hops): (u8, u8), (old, new): (u32, u32)) -> u32 {
    let halves = |word: u32| (word & 0xffff) + (word >> 16);
    let half = |hops| u16::from_ne_bytes([hops, protocol]);
    let sum =
        u32::from(!sum) + u32::from(!half(old_hops)) + u32::from(half(hops)) + halves(!old) + halves(new);
    let sum = (!halves(halves(sum)) as u16).to_ne_bytes();
    u32::from_ne_bytes([hops, protocol, sum[0], sum[1]])
}

#[inline(always)]
unsafe fn rewrite_v6(
    skb: *mut __sk_buff,
    checksum: u32,
    packet: &Packet,
    to: &[u32; 4],
    at: u32,
    hops: u8,
) -> bool {
    let (mut old, mut new) = (packet.key.local, *to);
    // SAFETY: as in the caller.
    unsafe {
        let difference = bpf_csum_diff(old.as_mut_ptr(), 16, new.as_mut_ptr(), 16, 0);
        difference >= 0
            && bpf_l4_csum_replace(skb, checksum, 0, difference as u64, BPF_F_PSEUDO_HDR.into()) == 0
            && bpf_skb_store_bytes(skb, at, new.as_ptr().cast(), 16, 0) == 0
            && (hops == packet.hops || store_hops(skb, packet.ip, hops))
    }
}

/// Replaces an IPv6 hop limit. Nothing in the packet makes up for it, so that a sum of the whole that the NIC has made changes.
///
/// # Safety
/// The context's own `skb`.
#[inline(always)]
pub unsafe fn store_hops(skb: *mut __sk_buff, ip: usize, hops: u8) -> bool {
    let at = (ip + IPV6_HOPS) as u32;
    // SAFETY: the helper checks the offset; the pointer is to a local byte.
    unsafe { bpf_skb_store_bytes(skb, at, (&raw const hops).cast(), 1, BPF_F_RECOMPUTE_CSUM.into()) == 0 }
}
