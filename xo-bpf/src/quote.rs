//! ICMP errors about packets of an offloaded connection. Its target sends with this machine's address, so what a router has
//! to say (the packet is too big, the client cannot be reached) comes here. It is made to look as if the target had been
//! told, in what it quotes too: the target's kernel finds the socket by the quoted addresses and ports. Its source is then
//! this machine: a router that sees a packet with an address of its own come in takes it for a forgery.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::{
    bpf_csum_diff, bpf_ktime_get_ns, bpf_l3_csum_replace, bpf_skb_store_bytes,
};
use aya_ebpf::programs::TcContext;
use xo_bpf_abi::{Action, FlowKey, Path};

use crate::count::count;
use crate::ingress::{FLOWS, hops_left, send_on};
use crate::packet::{
    IPV4_SOURCE, IPV4_SUM, IPV4_TTL, IPV6_HEADER, IPV6_SOURCE, PROTOCOL_ICMP, PROTOCOL_TCP, TCP_CHECKSUM, V4,
    V6, mapped, store_hops, v4_word,
};

/// Of the ICMP header, the same in both versions.
const ICMP_HEADER: usize = 8;
const ICMP_CHECKSUM: usize = 2;

/// An ICMP error about a TCP packet that this machine is said to have sent.
struct Quote {
    /// Offset of the IP header.
    ip: usize,
    /// Offset of the ICMP header.
    icmp: usize,
    /// Offset of the quoted IP header.
    quoted: usize,
    /// Offset of the quoted TCP header, of which at least eight bytes are there.
    tcp: usize,
    v6: bool,
    hops: u8,
    /// Who says it.
    from: [u32; 4],
    /// The IPv4 header's checksum.
    sum: u16,
    /// The flow that it is about.
    key: FlowKey,
}

/// What tells a connection that something is wrong: unreachable, "fragmentation needed" among it; time exceeded; parameter
/// problem (RFC 792). Not redirects, which are about this machine's routes.
#[inline(always)]
fn is_error_v4(kind: u8) -> bool {
    matches!(kind, 3 | 11 | 12)
}

/// Unreachable, packet too big, time exceeded, parameter problem (RFC 4443).
#[inline(always)]
fn is_error_v6(kind: u8) -> bool {
    matches!(kind, 1..=4)
}

/// Sends an error about an offloaded connection to where that is; everything else passes.
#[inline(always)]
pub fn steer(ctx: &TcContext, ip: usize) -> i32 {
    let Ok(version) = ctx.load::<u8>(ip) else { return TC_ACT_UNSPEC };
    let quote = if version >> 4 == 4 { parse_v4(ctx, ip) } else { parse_v6(ctx, ip) };
    let Some(quote) = quote else { return TC_ACT_UNSPEC };
    let Some(entry) = FLOWS.get_ptr(&quote.key) else { return TC_ACT_UNSPEC };
    // SAFETY: map values live while the program runs, and user space writes them as a whole.
    let (action, to, port) = unsafe { ((*entry).action, (*entry).to_addr, (*entry).to_port) };
    if action == Action::Hold as u32 {
        count(Path::QuotePassed);
        return TC_ACT_UNSPEC;
    }
    let away = action == Action::Redirect as u32;
    let Some(hops) = hops_left(quote.hops, away) else {
        count(Path::Expired);
        return TC_ACT_SHOT;
    };
    let source = if away { quote.key.local } else { quote.from };
    let skb = ctx.skb.skb;
    // SAFETY: helpers check offsets themselves.
    let done = unsafe {
        let ip = if quote.v6 {
            rewrite_v6(skb, &quote, &source, &to, hops)
        } else {
            rewrite_v4(skb, &quote, source[3], to[3], hops)
        };
        ip && rewrite_tcp(ctx, &quote, &to, port)
    };
    if !done {
        count(Path::RedirectFailed);
        return TC_ACT_SHOT;
    }
    count(Path::QuoteSteered);
    // SAFETY: no arguments.
    if away { send_on(ctx, &to, unsafe { bpf_ktime_get_ns() }) } else { TC_ACT_UNSPEC }
}

#[inline(always)]
fn parse_v4(ctx: &TcContext, ip: usize) -> Option<Quote> {
    let header: V4 = ctx.load(ip).ok()?;
    let icmp = ip + header.length()?;
    if !is_error_v4(ctx.load(icmp).ok()?) {
        return None;
    }
    let quoted = icmp + ICMP_HEADER;
    let inner: V4 = ctx.load(quoted).ok()?;
    let tcp = quoted + inner.length()?;
    // What is about somebody else's packet is for somebody else.
    if inner.protocol != PROTOCOL_TCP || inner.source != header.destination {
        return None;
    }
    let key = key(ctx, tcp, mapped(inner.source), mapped(inner.destination))?;
    let (hops, from, sum) = (header.ttl, mapped(header.source), header.checksum);
    Some(Quote { ip, icmp, quoted, tcp, v6: false, hops, from, sum, key })
}

#[inline(always)]
fn parse_v6(ctx: &TcContext, ip: usize) -> Option<Quote> {
    let header: V6 = ctx.load(ip).ok()?;
    let icmp = ip + IPV6_HEADER;
    if !header.is_valid() || !is_error_v6(ctx.load(icmp).ok()?) {
        return None;
    }
    let quoted = icmp + ICMP_HEADER;
    let inner: V6 = ctx.load(quoted).ok()?;
    if !inner.is_valid() || inner.protocol != PROTOCOL_TCP || inner.source != header.destination {
        return None;
    }
    let tcp = quoted + IPV6_HEADER;
    let key = key(ctx, tcp, inner.source, inner.destination)?;
    Some(Quote { ip, icmp, quoted, tcp, v6: true, hops: header.hops, from: header.source, sum: 0, key })
}

/// The flow of a quoted packet, which went from this machine to the client. A router quotes its ports and sequence number at
/// least (RFC 792); the kernel that gets the error wants all of these.
#[inline(always)]
fn key(ctx: &TcContext, tcp: usize, local: [u32; 4], remote: [u32; 4]) -> Option<FlowKey> {
    let start: [u16; 4] = ctx.load(tcp).ok()?;
    Some(FlowKey { remote, local, remote_port: start[1], local_port: start[0] })
}

/// Both IP headers. The quoted one's checksum makes up for its address in the checksum of the whole.
#[inline(always)]
unsafe fn rewrite_v4(skb: *mut __sk_buff, quote: &Quote, source: u32, to: u32, hops: u8) -> bool {
    let local = quote.key.local[3];
    // Of the two addresses, one takes the other's place or stays.
    let gone = if source == local { quote.from[3] } else { local };
    let words = [v4_word(PROTOCOL_ICMP, quote.sum, (quote.hops, hops), (gone, to)), source, to];
    let (sum, quoted) = ((quote.quoted + IPV4_SUM) as u32, (quote.quoted + IPV4_SOURCE) as u32);
    // SAFETY: helpers check offsets themselves; pointers are to locals of the given lengths.
    unsafe {
        bpf_skb_store_bytes(skb, (quote.ip + IPV4_TTL) as u32, words.as_ptr().cast(), 12, 0) == 0
            && bpf_l3_csum_replace(skb, sum, local.into(), to.into(), 4) == 0
            && bpf_skb_store_bytes(skb, quoted, (&raw const to).cast(), 4, 0) == 0
    }
}

/// Both IP headers. Addresses change twice for the checksum of the whole: in the pseudo-header, and in what is quoted.
/// (`bpf_l3_csum_replace` is plain arithmetic, right here: an error's checksum is never left to the NIC.)
#[inline(always)]
unsafe fn rewrite_v6(skb: *mut __sk_buff, quote: &Quote, source: &[u32; 4], to: &[u32; 4], hops: u8) -> bool {
    let mut old = [quote.from, quote.key.local];
    let mut new = [*source, *to];
    let checksum = (quote.icmp + ICMP_CHECKSUM) as u32;
    let (addresses, quoted) = ((quote.ip + IPV6_SOURCE) as u32, (quote.quoted + IPV6_SOURCE) as u32);
    // SAFETY: as above.
    unsafe {
        let outside = bpf_csum_diff(old.as_mut_ptr().cast(), 32, new.as_mut_ptr().cast(), 32, 0);
        let inside = difference(&quote.key.local, to);
        outside >= 0
            && inside >= 0
            && bpf_l3_csum_replace(skb, checksum, 0, outside as u64, 0) == 0
            && bpf_l3_csum_replace(skb, checksum, 0, inside as u64, 0) == 0
            && bpf_skb_store_bytes(skb, addresses, new.as_ptr().cast(), 32, 0) == 0
            && bpf_skb_store_bytes(skb, quoted, to.as_ptr().cast(), 16, 0) == 0
            && (hops == quote.hops || store_hops(skb, quote.ip, hops))
    }
}

/// What one address in the place of another does to a sum; negative if the helper fails.
#[inline(always)]
fn difference(old: &[u32; 4], new: &[u32; 4]) -> i64 {
    let (mut old, mut new) = (*old, *new);
    // SAFETY: pointers to locals of the given lengths.
    unsafe { bpf_csum_diff(old.as_mut_ptr(), 16, new.as_mut_ptr(), 16, 0) }
}

/// The quoted source port, and the quoted TCP checksum where the quote reaches so far.
#[inline(always)]
unsafe fn rewrite_tcp(ctx: &TcContext, quote: &Quote, to: &[u32; 4], port: u16) -> bool {
    let skb = ctx.skb.skb;
    let whole = (quote.icmp + ICMP_CHECKSUM) as u32;
    let old_port = quote.key.local_port;
    // SAFETY: helpers check offsets themselves; pointers are to locals of the given lengths.
    let stored = unsafe {
        bpf_l3_csum_replace(skb, whole, old_port.into(), port.into(), 2) == 0
            && bpf_skb_store_bytes(skb, quote.tcp as u32, (&raw const port).cast(), 2, 0) == 0
    };
    let at = quote.tcp + TCP_CHECKSUM;
    let Ok(old_sum) = ctx.load::<u16>(at) else { return stored };
    let difference = difference(&quote.key.local, to);
    // SAFETY: as above.
    unsafe {
        let replaced = stored
            && difference >= 0
            && bpf_l3_csum_replace(skb, at as u32, 0, difference as u64, 0) == 0
            && bpf_l3_csum_replace(skb, at as u32, old_port.into(), port.into(), 2) == 0;
        let Ok(sum) = ctx.load::<u16>(at) else { return false };
        replaced && bpf_l3_csum_replace(skb, whole, old_sum.into(), sum.into(), 2) == 0
    }
}
