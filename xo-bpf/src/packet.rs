//! Finding a packet's flow, and rewriting an address and a port.

use aya_ebpf::bindings::{__sk_buff, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::generated::{
    bpf_csum_diff, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_store_bytes,
};
use aya_ebpf::programs::TcContext;
use xo_bpf_abi::FlowKey;

const ETH_HEADER: usize = 14;
const VLAN_TAG: usize = 4;
const ETH_P_IPV4: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const ETH_P_VLAN: u16 = 0x8100;
const ETH_P_QINQ: u16 = 0x88a8;
const PROTOCOL_TCP: u8 = 6;
/// Without options.
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
/// Third word of an IPv4 address in IPv6 clothes.
const MAPPED: u32 = 0xffff_u32.to_be();

const TCP_CHECKSUM: usize = 16;

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
    /// Its flow.
    pub key: FlowKey,
}

/// Why a packet has no flow.
pub enum NoFlow {
    /// Not TCP over IP, or under more than one VLAN tag.
    Foreign,
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
struct V4 {
    version_length: u8,
    _tos: u8,
    _length: u16,
    _id: u16,
    fragment: u16,
    _ttl: u8,
    protocol: u8,
    _checksum: u16,
    source: u32,
    destination: u32,
}

#[repr(C)]
struct V6 {
    version_flow: u32,
    _length: u16,
    protocol: u8,
    _hops: u8,
    source: [u32; 4],
    destination: [u32; 4],
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
    if header.protocol != PROTOCOL_TCP {
        return Err(NoFlow::Foreign);
    }
    let length = (header.version_length & 15) as usize * 4;
    if header.version_length >> 4 != 4 || length < IPV4_HEADER {
        return Err(NoFlow::Unparsed);
    }
    // More fragments, or an offset.
    if header.fragment & 0x3fff_u16.to_be() != 0 {
        return Err(NoFlow::Unparsed);
    }
    let tcp = ip + length;
    let (source, destination) = ([0, 0, MAPPED, header.source], [0, 0, MAPPED, header.destination]);
    finish(ctx, ip, tcp, false, source, destination, direction)
}

#[inline(always)]
fn parse_v6(ctx: &TcContext, ip: usize, direction: Direction) -> Result<Packet, NoFlow> {
    let header: V6 = ctx.load(ip).map_err(|_| NoFlow::Unparsed)?;
    // Extension headers are not steered: such packets pass, as those of another flow would.
    if header.protocol != PROTOCOL_TCP {
        return Err(NoFlow::Foreign);
    }
    // A mapped address has no place on the wire, and must not be taken for the IPv4 flow of the same name.
    let mapped = |a: &[u32; 4]| (a[0] | a[1]) == 0 && a[2] == MAPPED;
    if u32::from_be(header.version_flow) >> 28 != 6 || mapped(&header.source) || mapped(&header.destination) {
        return Err(NoFlow::Unparsed);
    }
    finish(ctx, ip, ip + IPV6_HEADER, true, header.source, header.destination, direction)
}

#[inline(always)]
fn finish(
    ctx: &TcContext,
    ip: usize,
    tcp: usize,
    v6: bool,
    source: [u32; 4],
    destination: [u32; 4],
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
    Ok(Packet { ip, tcp, v6, flags: header.flags, key })
}

/// Replaces this machine's end of the packet: the destination of what comes from the client, the source of
/// what goes to it. The checksum helpers know partial checksums and GSO; plain arithmetic does not.
#[inline(always)]
pub fn rewrite(
    ctx: &TcContext,
    packet: &Packet,
    direction: Direction,
    to: &[u32; 4],
    port: u16,
) -> Result<(), ()> {
    let skb = ctx.skb.skb;
    let checksum = (packet.tcp + TCP_CHECKSUM) as u32;
    let (v4_at, v6_at, port_at) = match direction {
        Direction::FromClient => (16, 24, 2),
        Direction::ToClient => (12, 8, 0),
    };
    let from_port = u64::from(packet.key.local_port);
    // SAFETY: helpers check offsets themselves; pointers are to locals of the given lengths.
    let done = unsafe {
        let address = if packet.v6 {
            rewrite_v6(skb, checksum, packet, to, (packet.ip + v6_at) as u32)
        } else {
            rewrite_v4(skb, checksum, packet, to, (packet.ip + v4_at) as u32)
        };
        address
            && bpf_l4_csum_replace(skb, checksum, from_port, u64::from(port), 2) == 0
            && bpf_skb_store_bytes(skb, (packet.tcp + port_at) as u32, (&raw const port).cast(), 2, 0) == 0
    };
    if done { Ok(()) } else { Err(()) }
}

#[inline(always)]
unsafe fn rewrite_v4(skb: *mut __sk_buff, checksum: u32, packet: &Packet, to: &[u32; 4], at: u32) -> bool {
    let (old, new) = (packet.key.local[3], to[3]);
    let pseudo = u64::from(BPF_F_PSEUDO_HDR) | 4;
    // SAFETY: as in the caller.
    unsafe {
        bpf_l4_csum_replace(skb, checksum, old.into(), new.into(), pseudo) == 0
            && bpf_l3_csum_replace(skb, packet.ip as u32 + 10, old.into(), new.into(), 4) == 0
            && bpf_skb_store_bytes(skb, at, (&raw const new).cast(), 4, 0) == 0
    }
}

#[inline(always)]
unsafe fn rewrite_v6(skb: *mut __sk_buff, checksum: u32, packet: &Packet, to: &[u32; 4], at: u32) -> bool {
    let (mut old, mut new) = (packet.key.local, *to);
    // SAFETY: as in the caller.
    unsafe {
        let difference = bpf_csum_diff(old.as_mut_ptr(), 16, new.as_mut_ptr(), 16, 0);
        difference >= 0
            && bpf_l4_csum_replace(skb, checksum, 0, difference as u64, BPF_F_PSEUDO_HDR.into()) == 0
            && bpf_skb_store_bytes(skb, at, new.as_ptr().cast(), 16, 0) == 0
    }
}
