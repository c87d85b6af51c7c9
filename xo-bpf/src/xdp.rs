//! The fast path: before the kernel has made a socket buffer of a frame, plain segments of redirected flows are rewritten and
//! sent on. All else goes up to `xo_ingress` (tc), which stays attached behind this program and decides it, so that what
//! is done with a packet is written down in one place.
//!
//! What "plain" means: one buffer, no tag, no IP options, no fragment, ACK without SYN, FIN or RST, an entry without flags and without
//! anything to queue behind, time to live left, a checksum that is whole, and a way whose Ethernet addresses the daemon has told. No packet is changed before
//! all of that is known: what is passed up is as it came.

use aya_ebpf::bindings::xdp_action::{XDP_PASS, XDP_TX};
use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_redirect};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use xo_bpf_abi::{Action, FlowKey, NextHop, Path};

use crate::count::{add, count};
use crate::ingress::{FLOWS, HOPS};
use crate::packet::{
    ACK, ETH_P_IPV4, ETH_P_IPV6, FIN, IPV6_HEADER, PROTOCOL_TCP, RST, SYN, is_mapped, mapped, v4_word,
};

/// Without options.
const V4_FIRST_BYTE: u8 = 0x45;
const TCP_HEADER: u32 = 20;

/// Headers as they are in a frame: begun at an even address, so that a word of theirs is two halves to the compiler.
#[repr(C)]
struct Ethernet {
    addresses: [u16; 6],
    protocol: u16,
}

#[repr(C, packed(2))]
struct V4 {
    first: u8,
    _tos: u8,
    length: u16,
    _id: u16,
    fragment: u16,
    ttl: u8,
    protocol: u8,
    checksum: u16,
    source: u32,
    destination: u32,
}

#[repr(C, packed(2))]
struct V6 {
    first: u8,
    _flow: [u8; 3],
    length: u16,
    protocol: u8,
    hops: u8,
    source: [u32; 4],
    destination: [u32; 4],
}

#[repr(C, packed(2))]
struct Tcp {
    source: u16,
    destination: u16,
    _seq: u32,
    _ack: u32,
    _offset: u8,
    flags: u8,
    _window: u16,
    checksum: u16,
    _urgent: u16,
}

/// A frame with its IP header.
#[repr(C, packed(2))]
struct Frame<Ip> {
    ethernet: Ethernet,
    ip: Ip,
    tcp: Tcp,
}

/// Where a packet goes.
struct Found<'m> {
    to: [u32; 4],
    port: u16,
    hop: &'m NextHop,
}

/// `frags`: on an interface whose frames may be longer than a buffer, too; of those only what is in one buffer is looked at.
#[xdp(frags)]
pub fn xo_xdp(ctx: XdpContext) -> u32 {
    let Some(ethernet) = at::<Ethernet>(&ctx) else { return XDP_PASS };
    // SAFETY: `at` has checked that it is there.
    let sent = match u16::from_be(unsafe { (*ethernet).protocol }) {
        ETH_P_IPV4 => carry_v4(&ctx),
        ETH_P_IPV6 => carry_v6(&ctx),
        _ => None,
    };
    sent.unwrap_or(XDP_PASS)
}

/// The beginning of the frame, if so much of it is in the first buffer.
#[inline(always)]
fn at<T>(ctx: &XdpContext) -> Option<*mut T> {
    let start = ctx.data();
    (start + size_of::<T>() <= ctx.data_end()).then_some(start as *mut T)
}

/// Is all of the packet in the first buffer? And has it room for a TCP header behind its other ones?
#[inline(always)]
fn is_whole(ctx: &XdpContext, length: u32, headers: u32) -> bool {
    let there = (ctx.data_end() - ctx.data()) as u32;
    length >= headers + TCP_HEADER && length + size_of::<Ethernet>() as u32 <= there
}

#[inline(always)]
fn carry_v4(ctx: &XdpContext) -> Option<u32> {
    // SAFETY: it is there, and nobody else has it.
    let frame = unsafe { &mut *at::<Frame<V4>>(ctx)? };
    let length = u16::from_be(frame.ip.length).into();
    let is_fragment = frame.ip.fragment & 0x3fff_u16.to_be() != 0;
    if frame.ip.first != V4_FIRST_BYTE || frame.ip.protocol != PROTOCOL_TCP || is_fragment {
        return None;
    }
    if !is_whole(ctx, length, size_of::<V4>() as u32) {
        return None;
    }
    let (source, old) = (frame.ip.source, frame.ip.destination);
    let key = key(&frame.tcp, mapped(source), mapped(old));
    let pseudo = halves(source) + halves(old) + pseudo(length - size_of::<V4>() as u32);
    let ttl = frame.ip.ttl;
    let found = find(&frame.tcp, &key, length, ttl, pseudo)?;
    let new = found.to[3];
    let word = v4_word(PROTOCOL_TCP, frame.ip.checksum, (ttl, ttl - 1), (old, new)).to_ne_bytes();
    frame.ip.ttl = word[0];
    frame.ip.checksum = u16::from_ne_bytes([word[2], word[3]]);
    frame.ip.destination = new;
    redirect_segment(&mut frame.tcp, &found, halves(!old) + halves(new));
    Some(send_on(ctx, &mut frame.ethernet, found.hop))
}

#[inline(always)]
fn carry_v6(ctx: &XdpContext) -> Option<u32> {
    // SAFETY: as above.
    let frame = unsafe { &mut *at::<Frame<V6>>(ctx)? };
    if frame.ip.first >> 4 != 6 || frame.ip.protocol != PROTOCOL_TCP {
        return None;
    }
    let headers = IPV6_HEADER as u32;
    let length = u32::from(u16::from_be(frame.ip.length)) + headers;
    if !is_whole(ctx, length, headers) {
        return None;
    }
    let (source, old) = (frame.ip.source, frame.ip.destination);
    if is_mapped(&source) || is_mapped(&old) {
        return None;
    }
    let key = key(&frame.tcp, source, old);
    let pseudo = all_halves(&source) + all_halves(&old) + pseudo(length - headers);
    let found = find(&frame.tcp, &key, length, frame.ip.hops, pseudo)?;
    let new = found.to;
    frame.ip.hops -= 1;
    frame.ip.destination = new;
    let old = [!old[0], !old[1], !old[2], !old[3]];
    redirect_segment(&mut frame.tcp, &found, all_halves(&old) + all_halves(&new));
    Some(send_on(ctx, &mut frame.ethernet, found.hop))
}

#[inline(always)]
fn key(tcp: &Tcp, remote: [u32; 4], local: [u32; 4]) -> FlowKey {
    FlowKey { remote, local, remote_port: tcp.source, local_port: tcp.destination }
}

/// The segment's entry and way, if it is one for the fast path; it is counted then. `pseudo`: sum of its pseudo-header.
#[inline(always)]
fn find<'m>(tcp: &Tcp, key: &FlowKey, length: u32, hops: u8, pseudo: u32) -> Option<Found<'m>> {
    if tcp.flags & (SYN | FIN | RST | ACK) != ACK {
        return None;
    }
    // SAFETY: map values live while the program runs; `action`, `to_*` and `flags` are written by user space as a whole.
    let entry = unsafe { &mut *FLOWS.get_ptr_mut(key)? };
    if entry.action != Action::Redirect as u32 {
        return None;
    }
    // SAFETY: no arguments.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    let to = entry.to_addr;
    // SAFETY: map values live while the program runs; user space writes them whole.
    let hop = HOPS.get_ptr(&to).map(|hop| unsafe { &*hop });
    let hop = hop.filter(|hop| now_ns < hop.until_ns && length <= hop.xdp_longest.into());
    let plain = entry.flags == 0 && entry.ordered_until_ns == 0 && hops > 1 && !may_be_partial(tcp.checksum, pseudo);
    let Some(hop) = hop.filter(|_| plain) else {
        count(Path::XdpLeft);
        return None;
    };
    count(Path::XdpRedirected);
    // SAFETY: aligned fields of a live map value.
    unsafe {
        add(&raw mut entry.packets, 1);
        add(&raw mut entry.bytes, length.into());
    }
    entry.last_ns = now_ns;
    Some(Found { to, port: entry.to_port, hop })
}

/// Is this what a sender leaves in the checksum's place for its NIC to complete: the sum of the pseudo-header? Packets between
/// virtual interfaces are like that, and aggregates that the kernel has made (generic XDP meets them); arithmetic on such a sum is
/// another one, and only socket buffers tell. One in 65,536 whole checksums looks the same.
#[inline(always)]
fn may_be_partial(checksum: u16, pseudo: u32) -> bool {
    // There are two zeroes.
    let one_zero = |sum: u16| if sum == 0xffff { 0 } else { sum };
    one_zero(checksum) == one_zero(fold(pseudo))
}

/// What a pseudo-header has besides addresses.
#[inline(always)]
fn pseudo(length: u32) -> u32 {
    u32::from((length as u16).to_be()) + u32::from(u16::from(PROTOCOL_TCP).to_be())
}

#[inline(always)]
fn halves(word: u32) -> u32 {
    (word & 0xffff) + (word >> 16)
}

#[inline(always)]
fn all_halves(words: &[u32; 4]) -> u32 {
    halves(words[0]) + halves(words[1]) + halves(words[2]) + halves(words[3])
}

#[inline(always)]
fn fold(sum: u32) -> u16 {
    halves(halves(sum)) as u16
}

/// Changes the port, and the checksum for that and for addresses whose change adds `address` (RFC 1624, equation 3).
#[inline(always)]
fn redirect_segment(tcp: &mut Tcp, found: &Found<'_>, address: u32) {
    let ports = u32::from(!tcp.destination) + u32::from(found.port);
    tcp.checksum = !fold(u32::from(!tcp.checksum) + ports + address);
    tcp.destination = found.port;
}

#[inline(always)]
fn send_on(ctx: &XdpContext, ethernet: &mut Ethernet, hop: &NextHop) -> u32 {
    ethernet.addresses = hop.ethernet;
    if hop.xdp_back != 0 && ctx.ingress_ifindex() == hop.interface as usize {
        return XDP_TX;
    }
    // SAFETY: numbers only.
    unsafe { bpf_redirect(hop.interface, 0) as u32 }
}
