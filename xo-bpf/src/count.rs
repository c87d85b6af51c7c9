//! Every packet is counted under the path it took.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuArray;
use xo_bpf_abi::{PATHS, Path};

#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(PATHS, 0);

/// Adds one to the path's counter.
#[inline(always)]
pub fn count(path: Path) {
    if let Some(counter) = COUNTERS.get_ptr_mut(path as u32) {
        // SAFETY: the slot is this CPU's own.
        unsafe { *counter += 1 };
    }
}

/// Adds to a counter in a map value that other CPUs may update too.
///
/// # Safety
/// The pointer is into a live map value.
#[inline(always)]
pub unsafe fn add(counter: *mut u64, n: u64) {
    // SAFETY: the caller's promise; core's atomics have no read-modify-write on this target.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, n) };
}
