//! A frame without a beginning. Generic XDP copies a packet that has too little room before it (`skb_pp_cow_data`, Linux 6.9 and
//! later), and the copy does not know how long its Ethernet header is: what is passed up then seems to begin with the IP header
//! to the programs at tc, and a redirect would cut off the first bytes of that.

use aya_ebpf::bindings::bpf_hdr_start_off::BPF_HDR_START_MAC;
use aya_ebpf::helpers::generated::{
    bpf_skb_change_head, bpf_skb_load_bytes_relative, bpf_skb_store_bytes,
};
use aya_ebpf::programs::TcContext;

use crate::packet::{ETH_P_IPV4, ETH_P_IPV6};

const ETH_HEADER: usize = 14;

/// Gives the packet its Ethernet header back, if it lacks it.
#[inline(always)]
pub fn mend(ctx: &TcContext) {
    // SAFETY: a field of the program's own context.
    let version = match u16::from_be(unsafe { (*ctx.skb.skb).protocol } as u16) {
        ETH_P_IPV4 => 4,
        ETH_P_IPV6 => 6,
        _ => return,
    };
    let start = ctx.data();
    // SAFETY: as many bytes are there.
    if start + ETH_HEADER > ctx.data_end() || unsafe { *(start as *const u8) } >> 4 != version {
        return;
    }
    // An IP header, or an interface whose address begins like one.
    mend_suspect(ctx);
}

#[inline(always)]
fn mend_suspect(ctx: &TcContext) {
    let skb = ctx.skb.skb;
    let mut header = [0_u16; ETH_HEADER / 2];
    let Ok(start) = ctx.load::<[u16; ETH_HEADER / 2]>(0) else { return };
    // SAFETY: helpers check offsets themselves; the pointer is to a local of the given length.
    unsafe {
        let to = header.as_mut_ptr().cast();
        if bpf_skb_load_bytes_relative(skb.cast(), 0, to, ETH_HEADER as u32, BPF_HDR_START_MAC) != 0
            || header == start
            || u32::from(header[ETH_HEADER / 2 - 1]) != (*skb).protocol
        {
            return;
        }
        if bpf_skb_change_head(skb, ETH_HEADER as u32, 0) == 0 {
            bpf_skb_store_bytes(skb, 0, header.as_ptr().cast(), ETH_HEADER as u32, 0);
        }
    }
}
