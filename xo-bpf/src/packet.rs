//! Finding a packet's flow, and rewriting an address and a port.

use aya_ebpf::bindings::{BPF_F_PSEUDO_HDR, __sk_buff};
use aya_ebpf::helpers::generated::{bpf_csum_diff, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_store_bytes};
use aya_ebpf::programs::TcContext;
use xo_bpf_abi::FlowKey;

const ETH_HEADER: usize = 14;
const VLAN_TAG: usize = 4;
const ETH_P_IPV4: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const ETH_P_VLAN: u16 = 0x8100;
const ETH_P_QINQ: u16 = 0x88a8;
const PROTOCOL_TCP: u8 = 6;
const IPV6_HEADER: usize = 40;
/// Prefix of an IPv4 address in IPv6 clothes.
const MAPPED: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

const TCP_PORTS: usize = 0;
const TCP_FLAGS: usize = 13;
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
    /// Not TCP over IP.
    Foreign,
    /// A fragment, or truncated.
    Unparsed,
}

/// Parses Ethernet, one VLAN tag, IPv4 with options or IPv6, and TCP.
#[inline(always)]
pub fn parse(ctx: &TcContext, direction: Direction) -> Result<Packet, NoFlow> {
    let unparsed = |_| NoFlow::Unparsed;
    let mut ip = ETH_HEADER;
    let mut protocol = u16::from_be(ctx.load(12).map_err(unparsed)?);
    if protocol == ETH_P_VLAN || protocol == ETH_P_QINQ {
        protocol = u16::from_be(ctx.load(16).map_err(unparsed)?);
        ip += VLAN_TAG;
    }
    match protocol {
        ETH_P_IPV4 => parse_v4(ctx, ip, direction),
        ETH_P_IPV6 => parse_v6(ctx, ip, direction),
        _ => Err(NoFlow::Foreign),
    }
}

#[inline(always)]
fn parse_v4(ctx: &TcContext, ip: usize, direction: Direction) -> Result<Packet, NoFlow> {
    let header: [u8; 20] = ctx.load(ip).map_err(|_| NoFlow::Unparsed)?;
    if header[9] != PROTOCOL_TCP {
        return Err(NoFlow::Foreign);
    }
    // More fragments, or an offset.
    if u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0 {
        return Err(NoFlow::Unparsed);
    }
    let tcp = ip + (header[0] & 15) as usize * 4;
    let (source, destination) = (mapped(&header, 12), mapped(&header, 16));
    finish(ctx, ip, tcp, false, source, destination, direction)
}

#[inline(always)]
fn parse_v6(ctx: &TcContext, ip: usize, direction: Direction) -> Result<Packet, NoFlow> {
    let header: [u8; IPV6_HEADER] = ctx.load(ip).map_err(|_| NoFlow::Unparsed)?;
    // Extension headers are not steered: such packets pass, as those of another flow would.
    if header[6] != PROTOCOL_TCP {
        return Err(NoFlow::Foreign);
    }
    let (mut source, mut destination) = ([0; 16], [0; 16]);
    source.copy_from_slice(&header[8..24]);
    destination.copy_from_slice(&header[24..40]);
    finish(ctx, ip, ip + IPV6_HEADER, true, source, destination, direction)
}

#[inline(always)]
fn finish(
    ctx: &TcContext,
    ip: usize,
    tcp: usize,
    v6: bool,
    source: [u8; 16],
    destination: [u8; 16],
    direction: Direction,
) -> Result<Packet, NoFlow> {
    let header: [u8; 14] = ctx.load(tcp + TCP_PORTS).map_err(|_| NoFlow::Unparsed)?;
    let source_port = u16::from_ne_bytes([header[0], header[1]]);
    let destination_port = u16::from_ne_bytes([header[2], header[3]]);
    let key = match direction {
        Direction::FromClient => FlowKey {
            remote: source,
            local: destination,
            remote_port: source_port,
            local_port: destination_port,
        },
        Direction::ToClient => FlowKey {
            remote: destination,
            local: source,
            remote_port: destination_port,
            local_port: source_port,
        },
    };
    Ok(Packet { ip, tcp, v6, flags: header[TCP_FLAGS], key })
}

#[inline(always)]
fn mapped(header: &[u8; 20], at: usize) -> [u8; 16] {
    let mut address = [0; 16];
    address[..12].copy_from_slice(&MAPPED);
    address[12..].copy_from_slice(&header[at..at + 4]);
    address
}

/// Replaces this machine's end of the packet: the destination of what comes from the client, the source of
/// what goes to it. The checksum helpers know partial checksums and GSO; plain arithmetic does not.
#[inline(always)]
pub fn rewrite(ctx: &TcContext, packet: &Packet, direction: Direction, to: &[u8; 16], port: u16) -> Result<(), ()> {
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
unsafe fn rewrite_v4(skb: *mut __sk_buff, checksum: u32, packet: &Packet, to: &[u8; 16], at: u32) -> bool {
    let k = &packet.key.local;
    let old = u32::from_ne_bytes([k[12], k[13], k[14], k[15]]);
    let new = u32::from_ne_bytes([to[12], to[13], to[14], to[15]]);
    let pseudo = u64::from(BPF_F_PSEUDO_HDR) | 4;
    // SAFETY: as in the caller.
    unsafe {
        bpf_l4_csum_replace(skb, checksum, old.into(), new.into(), pseudo) == 0
            && bpf_l3_csum_replace(skb, packet.ip as u32 + 10, old.into(), new.into(), 4) == 0
            && bpf_skb_store_bytes(skb, at, (&raw const new).cast(), 4, 0) == 0
    }
}

#[inline(always)]
unsafe fn rewrite_v6(skb: *mut __sk_buff, checksum: u32, packet: &Packet, to: &[u8; 16], at: u32) -> bool {
    let mut old = words(&packet.key.local);
    let mut new = words(to);
    // SAFETY: as in the caller.
    unsafe {
        let difference = bpf_csum_diff(old.as_mut_ptr(), 16, new.as_mut_ptr(), 16, 0);
        difference >= 0
            && bpf_l4_csum_replace(skb, checksum, 0, difference as u64, BPF_F_PSEUDO_HDR.into()) == 0
            && bpf_skb_store_bytes(skb, at, new.as_ptr().cast(), 16, 0) == 0
    }
}

#[inline(always)]
fn words(a: &[u8; 16]) -> [u32; 4] {
    [
        u32::from_ne_bytes([a[0], a[1], a[2], a[3]]),
        u32::from_ne_bytes([a[4], a[5], a[6], a[7]]),
        u32::from_ne_bytes([a[8], a[9], a[10], a[11]]),
        u32::from_ne_bytes([a[12], a[13], a[14], a[15]]),
    ]
}
