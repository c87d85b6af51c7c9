//! Packets that come in: those of an offloaded connection go on to its target, those of a connection that
//! is being moved are kept for replay.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{BPF_F_NO_PREALLOC, BPF_RB_AVAIL_DATA, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::{
    bpf_get_smp_processor_id, bpf_ktime_get_ns, bpf_redirect_neigh, bpf_skb_load_bytes,
};
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::{Array, HashMap, RingBuf};
use aya_ebpf::programs::TcContext;
use xo_bpf_abi::{
    Action, FLAG_CLIENT_FIN, FLAG_CLIENT_RST, FLAG_PASS, FLAG_RULE, FlowEntry, FlowKey, HeldHeader, MAX_HOPS,
    NextHop, Path,
};

use crate::count::{add, count};
use crate::mend::mend;
use crate::packet::{ACK, Direction, FIN, NoFlow, Packet, RST, SYN, parse, rewrite};
use crate::quote;

/// Longest packet that is held, bytes from the network header on: a full aggregate. A power of two, so that
/// a mask can prove the bound to the verifier.
const MAX_HELD: u32 = 65_536;
const HEADER: usize = size_of::<HeldHeader>();

/// Sizes of maps are set by the daemon at load.
#[map]
pub static FLOWS: HashMap<FlowKey, FlowEntry> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);
#[map]
static HELD: RingBuf = RingBuf::with_byte_size(4 << 20, 0);

/// Where a packet is put together for the ring; one for each CPU, chosen by its number (a per-CPU map's
/// value may not be this long).
#[repr(C, align(8))]
struct Scratch {
    header: HeldHeader,
    packet: [u8; MAX_HELD as usize],
}

#[map]
static SCRATCH: Array<Scratch> = Array::with_max_entries(1, 0);

#[classifier]
pub fn xo_ingress(ctx: TcContext) -> i32 {
    mend(&ctx);
    match parse(&ctx, Direction::FromClient) {
        Ok(packet) => steer(&ctx, &packet),
        Err(NoFlow::Unparsed) => {
            count(Path::Unparsed);
            TC_ACT_UNSPEC
        }
        Err(NoFlow::Icmp(ip)) => quote::steer(&ctx, ip),
        Err(NoFlow::Foreign) => TC_ACT_UNSPEC,
    }
}

#[inline(always)]
fn steer(ctx: &TcContext, packet: &Packet) -> i32 {
    let Some(entry) = FLOWS.get_ptr_mut(&packet.key) else {
        count(Path::IngressMiss);
        return TC_ACT_UNSPEC;
    };
    // SAFETY: map values live while the program runs; `action`, `to_*` and `flow_id` are written by user
    // space as a whole, and only read here.
    let entry = unsafe { &mut *entry };
    if packet.flags & SYN != 0
        && packet.flags & ACK == 0
        && entry.flags & (FLAG_CLIENT_FIN | FLAG_CLIENT_RST) != 0
    {
        if entry.flags & FLAG_RULE != 0 {
            // The rule would take what follows.
            count(Path::ReuseDropped);
            return TC_ACT_SHOT;
        }
        // The client has closed that connection and uses its port again: a new connection, for the host.
        // Counted where it was done, so that user space can tell how many entries are left.
        count(if FLOWS.remove(&packet.key).is_ok() { Path::Reused } else { Path::IngressMiss });
        return TC_ACT_UNSPEC;
    }
    if entry.flags & FLAG_PASS != 0
        && entry.action == Action::Redirect as u32
        && packet.flags & (SYN | FIN | RST) == 0
    {
        count(Path::LeftToRule);
        return TC_ACT_UNSPEC;
    }
    let closing = if packet.flags & FIN != 0 { FLAG_CLIENT_FIN } else { 0 }
        | if packet.flags & RST != 0 { FLAG_CLIENT_RST } else { 0 };
    let length = (ctx.len() as usize).saturating_sub(packet.ip) as u32;
    // SAFETY: no arguments.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    // SAFETY: aligned fields of a live map value.
    unsafe {
        if closing != 0 {
            entry.flags |= closing;
        }
        add(&raw mut entry.packets, 1);
        add(&raw mut entry.bytes, length.into());
        entry.last_ns = now_ns;
    }
    let has_no_place = entry.action == Action::Hold as u32;
    if has_no_place || queues(entry, now_ns) {
        if hold(ctx, packet, entry.flow_id, length) {
            count(Path::Held);
            return TC_ACT_SHOT;
        }
        if has_no_place {
            count(Path::HoldDropped);
            return TC_ACT_SHOT;
        }
        // No room to queue: better out of order than lost.
    }
    let (to, port) = (entry.to_addr, entry.to_port);
    let away = entry.action == Action::Redirect as u32;
    let Some(hops) = hops_left(packet.hops, away) else {
        count(Path::Expired);
        return TC_ACT_SHOT;
    };
    if rewrite(ctx, packet, Direction::FromClient, &to, port, hops).is_err() {
        count(Path::RedirectFailed);
        return TC_ACT_SHOT;
    }
    if !away {
        count(Path::Delivered);
        return TC_ACT_UNSPEC;
    }
    count(Path::Redirected);
    send_on(ctx, &to, now_ns)
}

/// Has a redirected packet to queue behind held ones? Others' count as well: the ring tells only that all have gone.
#[inline(always)]
fn queues(entry: &mut FlowEntry, now_ns: u64) -> bool {
    if entry.ordered_until_ns == 0 {
        return false;
    }
    if now_ns < entry.ordered_until_ns && HELD.query(BPF_RB_AVAIL_DATA.into()) != 0 {
        return true;
    }
    entry.ordered_until_ns = 0;
    false
}

/// The time to live with which a packet goes on: one less if it goes to another machine, as at any router, so that nothing can
/// circle for ever. The local stack would not say "time exceeded" of what is addressed to it: none left, no packet.
#[inline(always)]
pub fn hops_left(hops: u8, away: bool) -> Option<u8> {
    match (away, hops) {
        (false, _) => Some(hops),
        (true, 0 | 1) => None,
        (true, _) => Some(hops - 1),
    }
}

#[map]
pub static HOPS: HashMap<[u32; 4], NextHop> = HashMap::with_max_entries(MAX_HOPS, BPF_F_NO_PREALLOC);

/// `struct bpf_redir_neigh` (linux/bpf.h).
#[repr(C)]
struct Neighbour {
    family: u32,
    address: [u32; 4],
}

/// Sends the packet where its new destination is. Where the daemon has told the way, the kernel need not look for a route, which
/// is the dearest part, and which it does on the interface that the packet has come in by only.
#[inline(always)]
pub fn send_on(ctx: &TcContext, to: &[u32; 4], now_ns: u64) -> i32 {
    let skb = ctx.skb.skb;
    // SAFETY: a field of the program's own context. What has come under a tag leaves under it, by the same interface.
    let untagged = unsafe { (*skb).vlan_present == 0 };
    // SAFETY: map values live while the program runs; user space writes them whole.
    if untagged
        && let Some(hop) = HOPS.get_ptr(to).map(|hop| unsafe { &*hop })
        && now_ns < hop.until_ns
    {
        let mut neighbour = Neighbour { family: hop.family, address: hop.address };
        let size = size_of::<Neighbour>() as i32;
        // SAFETY: a local of this length.
        return unsafe { bpf_redirect_neigh(hop.interface, (&raw mut neighbour).cast(), size, 0) as i32 };
    }
    // SAFETY: no pointer is passed: the kernel resolves route and neighbour from the packet.
    unsafe { bpf_redirect_neigh((*skb).ifindex, core::ptr::null_mut(), 0, 0) as i32 }
}

/// Copies the packet into the ring.
#[inline(always)]
fn hold(ctx: &TcContext, packet: &Packet, flow_id: u64, length: u32) -> bool {
    if length == 0 || length > MAX_HELD {
        return false;
    }
    // SAFETY: no arguments.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let Some(scratch) = SCRATCH.get_ptr_mut(cpu) else { return false };
    let header = HeldHeader {
        key: packet.key,
        len: length,
        flow_id,
        // SAFETY: a field of the program's own context.
        gso_size: unsafe { (*ctx.skb.skb).gso_size },
        ip_version: if packet.v6 { 6 } else { 4 },
    };
    // SAFETY: the scratch is this CPU's; programs on one CPU do not interrupt each other at this hook; it
    // holds header and MAX_HELD bytes. The volatile read keeps the compiler from dropping the mask.
    unsafe {
        let size = ((&raw const length).read_volatile().wrapping_sub(1) & (MAX_HELD - 1)) + 1;
        (&raw mut (*scratch).header).write(header);
        let bytes = (&raw mut (*scratch).packet).cast::<u8>();
        if bpf_skb_load_bytes(ctx.as_ptr(), packet.ip as u32, bytes.cast(), size) != 0 {
            return false;
        }
        let record = core::slice::from_raw_parts(scratch.cast::<u8>(), HEADER + size as usize);
        HELD.output::<[u8]>(record, 0).is_ok()
    }
}
