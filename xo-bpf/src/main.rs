//! XO's eBPF programs: ingress steering on the host, with a fast path for XDP; source rewrite on the target; the restored socket's
//! window. All but the fast path are attached on every machine; which of them finds something to do is the daemon's business.
#![feature(core_intrinsics)]
#![expect(internal_features, reason = "atomic addition, which core does not offer on this target")]
#![no_std]
#![no_main]

mod carry;
mod count;
mod egress;
mod ingress;
mod mend;
mod packet;
mod quote;
mod xdp;

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
