//! The congestion window of a connection that has moved. No option of TCP_REPAIR sets it; a restored socket would begin like a
//! new one, while its client waits for a long response.
//!
//! The daemon writes the window into the socket's priority, which nothing looks at while the socket is in repair mode, and
//! connects it: that is when the kernel sets the first window (`tcp_init_transfer`) and asks this program.

use core::ffi::c_void;

use aya_ebpf::bindings::BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB;
use aya_ebpf::helpers::generated::bpf_setsockopt;
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;
use xo_bpf_abi::{CARRY_MASK, CARRY_PRIORITY};

const SOL_TCP: i32 = 6;
/// linux/bpf.h.
const TCP_BPF_IW: i32 = 1001;
/// Nothing to refuse.
const DONE: u32 = 1;

#[sock_ops]
pub fn xo_carry(ctx: SockOpsContext) -> u32 {
    if ctx.op() != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB {
        return DONE;
    }
    // SAFETY: fields of the program's own context and of the socket in it, which may be missing.
    let priority = unsafe {
        let socket = (*ctx.ops).__bindgen_anon_2.sk;
        if socket.is_null() {
            return DONE;
        }
        (*socket).priority
    };
    if priority & CARRY_MASK == CARRY_PRIORITY {
        let mut window = priority & !CARRY_MASK;
        // SAFETY: a local of this length. The kernel refuses 0.
        unsafe { bpf_setsockopt(ctx.ops.cast::<c_void>(), SOL_TCP, TCP_BPF_IW, (&raw mut window).cast(), 4) };
    }
    DONE
}
