//! Raw system calls: no libc symbol, so that no hook of ours and no cancellation point is in the way.

use std::io;

/// Makes a system call with six arguments; returns the kernel's result, negative errno on failure.
///
/// # Safety
/// As the call `nr` demands of its arguments.
#[cfg(target_arch = "x86_64")]
#[inline]
#[must_use]
pub unsafe fn syscall6(nr: i64, a: usize, b: usize, c: usize, d: usize, e: usize, f: usize) -> isize {
    let ret: isize;
    // SAFETY: the x86-64 syscall ABI clobbers rcx and r11 only; memory effects are the caller's promise.
    unsafe {
        core::arch::asm!("syscall", inlateout("rax") nr as isize => ret,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    ret
}

/// Makes a system call with six arguments; returns the kernel's result, negative errno on failure.
///
/// # Safety
/// As the call `nr` demands of its arguments.
#[cfg(target_arch = "aarch64")]
#[inline]
#[must_use]
pub unsafe fn syscall6(nr: i64, a: usize, b: usize, c: usize, d: usize, e: usize, f: usize) -> isize {
    let ret: isize;
    // SAFETY: the arm64 syscall ABI preserves all but x0; memory effects are the caller's promise.
    unsafe {
        core::arch::asm!("svc 0", in("x8") nr, inlateout("x0") a as isize => ret,
            in("x1") b, in("x2") c, in("x3") d, in("x4") e, in("x5") f, options(nostack));
    }
    ret
}

/// Turns a raw result into a `Result`.
///
/// # Errors
/// The kernel's errno.
#[inline]
pub fn check(ret: isize) -> io::Result<usize> {
    if ret < 0 { Err(io::Error::from_raw_os_error(-ret as i32)) } else { Ok(ret as usize) }
}
