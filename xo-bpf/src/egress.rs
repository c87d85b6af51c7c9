//! Packets that go out: those of a restored connection carry the host's address as their source.

use aya_ebpf::bindings::{BPF_F_NO_PREALLOC, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::HashMap;
use aya_ebpf::programs::TcContext;
use xo_bpf_abi::{Action, FlowKey, Path, RewriteEntry};

use crate::count::{add, count};
use crate::ingress::FLOWS;
use crate::packet::{Direction, NoFlow, Packet, RST, parse, rewrite};

#[map]
static REWRITES: HashMap<FlowKey, RewriteEntry> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);

/// Has the connection left? A packet that was between the hook and the socket when that was emptied would be answered
/// by a RST, which is not the connection's.
#[inline(always)]
fn is_elsewhere(packet: &Packet) -> bool {
    let redirect = Action::Redirect as u32;
    // SAFETY: map values live while the program runs.
    FLOWS.get_ptr(&packet.key).is_some_and(|flow| unsafe { (*flow).action == redirect })
}

#[classifier]
pub fn xo_egress(ctx: TcContext) -> i32 {
    let packet = match parse(&ctx, Direction::ToClient) {
        Ok(packet) => packet,
        Err(NoFlow::Unparsed) => {
            count(Path::Unparsed);
            return TC_ACT_UNSPEC;
        }
        Err(NoFlow::Foreign | NoFlow::Icmp(_)) => return TC_ACT_UNSPEC,
    };
    let Some(entry) = REWRITES.get_ptr_mut(&packet.key) else {
        if packet.flags & RST != 0 && is_elsewhere(&packet) {
            count(Path::Muted);
            return TC_ACT_SHOT;
        }
        count(Path::EgressMiss);
        return TC_ACT_UNSPEC;
    };
    // SAFETY: map values live while the program runs.
    let entry = unsafe { &mut *entry };
    if packet.flags & RST != 0 && (entry.left != 0 || is_elsewhere(&packet)) {
        count(Path::Muted);
        return TC_ACT_SHOT;
    }
    let (from, port) = (entry.from_addr, entry.from_port);
    let length = (ctx.len() as usize).saturating_sub(packet.ip) as u64;
    // SAFETY: aligned fields of a live map value.
    unsafe {
        add(&raw mut entry.packets, 1);
        add(&raw mut entry.bytes, length);
        entry.last_ns = bpf_ktime_get_ns();
    }
    if rewrite(&ctx, &packet, Direction::ToClient, &from, port, packet.hops).is_err() {
        count(Path::RewriteFailed);
        return TC_ACT_SHOT;
    }
    count(Path::Rewritten);
    TC_ACT_UNSPEC
}
