//! Raw system calls: no libc symbol, so that no hook of ours and no cancellation point is in the way.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::AtomicU32;
use std::time::Duration;

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

/// Makes a system call whose arguments are numbers or pointers that outlive it.
macro_rules! sys {
    ($nr:expr $(, $arg:expr)* $(,)?) => {
        $crate::raw::sys!(@ $nr; $($arg as usize,)* 0_usize, 0_usize, 0_usize, 0_usize, 0_usize, 0_usize)
    };
    (@ $nr:expr; $a:expr, $b:expr, $c:expr, $d:expr, $e:expr, $f:expr $(, $rest:expr)*) => {
        $crate::raw::check(unsafe { $crate::raw::syscall6($nr, $a, $b, $c, $d, $e, $f) })
    };
}
pub(crate) use sys;

/// A descriptor that is ours; closed by the system call, not by libc's (hooked) `close`.
#[derive(Debug)]
pub struct Fd(RawFd);

impl Fd {
    /// Takes ownership of a descriptor.
    #[must_use]
    pub fn new(fd: RawFd) -> Fd {
        Fd(fd)
    }

    /// Gives ownership away.
    #[must_use]
    pub fn into_raw(self) -> RawFd {
        let fd = self.0;
        std::mem::forget(self);
        fd
    }
}

impl AsRawFd for Fd {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        close(self.0);
    }
}

impl From<Fd> for OwnedFd {
    fn from(fd: Fd) -> OwnedFd {
        // SAFETY: the descriptor is open and ours; ownership passes on.
        unsafe { OwnedFd::from_raw_fd(fd.into_raw()) }
    }
}

/// close(2).
pub fn close(fd: RawFd) {
    // SAFETY: a number; closing a foreign descriptor is the caller's fault, not unsoundness.
    let _ = sys!(libc::SYS_close, fd);
}

/// Size of a file, bytes.
///
/// # Errors
/// Of lseek(2).
pub fn file_size(fd: RawFd) -> io::Result<u64> {
    // SAFETY: numbers only.
    sys!(libc::SYS_lseek, fd, 0, libc::SEEK_END).map(|n| n as u64)
}

/// Maps `size` bytes of a file, shared, readable and writable.
///
/// # Errors
/// Of mmap(2).
pub fn map_shared(fd: RawFd, size: usize) -> io::Result<*mut u8> {
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    sys!(libc::SYS_mmap, 0, size, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd, 0)
        .map(|a| a as *mut u8)
}

/// munmap(2) of a mapping that [`map_shared`] made.
pub fn unmap(address: *mut u8, size: usize) {
    // SAFETY: the owner of the mapping gives it up (`SlotTable::drop`).
    let _ = sys!(libc::SYS_munmap, address, size);
}

/// Sleeps while `word` is `expected`, at most `timeout`, or shorter. The word may be in shared memory.
pub fn futex_wait(word: &AtomicU32, expected: u32, timeout: Duration) {
    let t = libc::timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
    // SAFETY: word and time live through the call.
    let _ = sys!(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, expected, &raw const t);
}

/// Wakes all who wait for `word`.
pub fn futex_wake(word: &AtomicU32) {
    // SAFETY: the word lives through the call.
    let _ = sys!(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX);
}

/// `CLOCK_MONOTONIC`.
#[must_use]
pub fn monotonic() -> Duration {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: valid for writing; through the vDSO, and no hook of ours.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut t) };
    Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
}

/// setsockopt(2) with an option of any plain type.
///
/// # Errors
/// The kernel's.
pub fn setsockopt<T: Copy>(fd: RawFd, level: i32, name: i32, value: &T) -> io::Result<()> {
    // SAFETY: pointer and length describe `value`, which the kernel reads.
    sys!(libc::SYS_setsockopt, fd, level, name, std::ptr::from_ref(value), size_of::<T>()).map(drop)
}

/// getsockopt(2) into `value`, of any plain type for which all bit patterns are valid; returns how many
/// bytes the kernel wrote.
///
/// # Errors
/// The kernel's.
pub fn getsockopt<T: Copy>(fd: RawFd, level: i32, name: i32, value: &mut T) -> io::Result<usize> {
    let mut len = size_of::<T>() as u32;
    // SAFETY: pointer and length describe `value`, which the kernel writes.
    sys!(libc::SYS_getsockopt, fd, level, name, std::ptr::from_mut(value), &raw mut len)?;
    Ok(len as usize)
}
