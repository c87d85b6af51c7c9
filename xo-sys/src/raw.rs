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
        // SAFETY: the comment at each use says why its arguments are valid.
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
    map_file(fd, size, libc::PROT_READ | libc::PROT_WRITE)
}

/// As [`map_shared`], to read only.
///
/// # Errors
/// Of mmap(2).
pub fn map_shared_readonly(fd: RawFd, size: usize) -> io::Result<*mut u8> {
    map_file(fd, size, libc::PROT_READ)
}

fn map_file(fd: RawFd, size: usize, protection: i32) -> io::Result<*mut u8> {
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    sys!(libc::SYS_mmap, 0, size, protection, libc::MAP_SHARED, fd, 0).map(|a| a as *mut u8)
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

/// Anonymous private memory of zeroes; pages are made when touched.
///
/// # Errors
/// Of mmap(2).
pub fn map_private(size: usize) -> io::Result<*mut u8> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    sys!(libc::SYS_mmap, 0, size, libc::PROT_READ | libc::PROT_WRITE, flags, -1_isize, 0)
        .map(|a| a as *mut u8)
}

/// A page of zeroes that a process has in common with its children.
///
/// # Errors
/// Of mmap(2).
pub fn map_common() -> io::Result<*mut u8> {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    sys!(libc::SYS_mmap, 0, 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1_isize, 0)
        .map(|a| a as *mut u8)
}

/// A page that reads as zero in a child after fork (`MADV_WIPEONFORK`, Linux 4.14).
///
/// # Errors
/// Of mmap(2) and madvise(2).
pub fn map_wiped_on_fork() -> io::Result<*mut u8> {
    const PAGE: usize = 4096;
    let page = map_private(PAGE)?;
    // SAFETY: our own mapping.
    sys!(libc::SYS_madvise, page, PAGE, libc::MADV_WIPEONFORK)?;
    Ok(page)
}

/// write(2); what cannot be written is lost.
pub fn write(fd: RawFd, bytes: &[u8]) {
    // SAFETY: pointer and length describe `bytes`.
    let _ = sys!(libc::SYS_write, fd, bytes.as_ptr(), bytes.len());
}

/// Is the descriptor in non-blocking mode?
#[must_use]
pub fn is_nonblocking(fd: RawFd) -> bool {
    // SAFETY: numbers only.
    sys!(libc::SYS_fcntl, fd, libc::F_GETFL).is_ok_and(|flags| flags & libc::O_NONBLOCK as usize != 0)
}

/// Sets or clears O_NONBLOCK.
///
/// # Errors
/// Of fcntl(2).
pub fn set_nonblocking(fd: RawFd, on: bool) -> io::Result<()> {
    // SAFETY: numbers only.
    let flags = sys!(libc::SYS_fcntl, fd, libc::F_GETFL)?;
    let flag = libc::O_NONBLOCK as usize;
    // SAFETY: numbers only.
    sys!(libc::SYS_fcntl, fd, libc::F_SETFL, if on { flags | flag } else { flags & !flag }).map(drop)
}

/// Sets FD_CLOEXEC to `on`.
///
/// # Errors
/// Of fcntl(2).
pub fn set_cloexec(fd: RawFd, on: bool) -> io::Result<()> {
    let flag = if on { libc::FD_CLOEXEC } else { 0 };
    // SAFETY: numbers only.
    sys!(libc::SYS_fcntl, fd, libc::F_SETFD, flag).map(drop)
}

/// A close-on-exec duplicate with a number of at least `least`.
///
/// # Errors
/// Of fcntl(2).
pub fn duplicate_from(fd: RawFd, least: RawFd) -> io::Result<Fd> {
    // SAFETY: numbers only.
    sys!(libc::SYS_fcntl, fd, libc::F_DUPFD_CLOEXEC, least).map(|fd| Fd::new(fd as RawFd))
}

/// recv(2) with MSG_PEEK added.
///
/// # Errors
/// The kernel's.
pub fn peek(fd: RawFd, buffer: &mut [u8], flags: i32) -> io::Result<usize> {
    let flags = flags | libc::MSG_PEEK;
    // SAFETY: pointer and length describe `buffer`.
    sys!(libc::SYS_recvfrom, fd, buffer.as_mut_ptr(), buffer.len(), flags, 0, 0)
}

/// send(2).
///
/// # Errors
/// The kernel's.
pub fn send(fd: RawFd, bytes: &[u8], flags: i32) -> io::Result<usize> {
    // SAFETY: pointer and length describe `bytes`.
    sys!(libc::SYS_sendto, fd, bytes.as_ptr(), bytes.len(), flags, 0, 0)
}

/// pread(2).
///
/// # Errors
/// The kernel's.
pub fn read_at(fd: RawFd, buffer: &mut [u8], offset: i64) -> io::Result<usize> {
    // SAFETY: pointer and length describe `buffer`.
    sys!(libc::SYS_pread64, fd, buffer.as_mut_ptr(), buffer.len(), offset)
}

/// lseek(2).
///
/// # Errors
/// The kernel's.
pub fn seek(fd: RawFd, offset: i64, whence: i32) -> io::Result<i64> {
    // SAFETY: numbers only.
    sys!(libc::SYS_lseek, fd, offset, whence).map(|n| n as i64)
}

/// sched_yield(2).
pub fn yield_processor() {
    // SAFETY: no arguments.
    let _ = sys!(libc::SYS_sched_yield);
}

/// As [`peek`], to an address that the kernel is to check; how many bytes are there now.
///
/// # Errors
/// The kernel's.
///
/// # Safety
/// Whatever is mapped at the `len` bytes from `address` on may be overwritten.
pub unsafe fn peek_at(fd: RawFd, address: *mut u8, len: usize, flags: i32) -> io::Result<usize> {
    let flags = flags | libc::MSG_PEEK;
    // SAFETY: the caller's promise; the kernel answers EFAULT for what is not mapped.
    sys!(libc::SYS_recvfrom, fd, address, len, flags, 0, 0)
}

/// Takes `len` bytes out of a TCP socket's queue without copying them (MSG_TRUNC): they were looked at already.
///
/// # Errors
/// The kernel's.
pub fn discard(fd: RawFd, len: usize) -> io::Result<usize> {
    // SAFETY: the kernel writes nothing.
    sys!(libc::SYS_recvfrom, fd, 0, len, libc::MSG_TRUNC | libc::MSG_DONTWAIT, 0, 0)
}

/// Reads what is there, up to a few bytes, and forgets it; closing a socket with unread data would reset it.
pub fn drain(fd: RawFd) {
    let mut buffer = [0_u8; 16];
    // SAFETY: pointer and length describe `buffer`.
    let _ = sys!(libc::SYS_recvfrom, fd, buffer.as_mut_ptr(), buffer.len(), libc::MSG_DONTWAIT, 0, 0);
}

/// Bytes that wait in the receive queue (FIONREAD).
#[must_use]
pub fn readable_bytes(fd: RawFd) -> usize {
    let mut n = 0_i32;
    // SAFETY: the number lives through the call and may be written.
    let _ = sys!(libc::SYS_ioctl, fd, libc::FIONREAD, &raw mut n);
    n.max(0) as usize
}

/// Bytes of a TCP socket that the other side has not acknowledged (SIOCOUTQ).
#[must_use]
pub fn unacknowledged_bytes(fd: RawFd) -> usize {
    let mut n = 0_i32;
    // SAFETY: the number lives through the call and may be written.
    let _ = sys!(libc::SYS_ioctl, fd, libc::TIOCOUTQ, &raw mut n);
    n.max(0) as usize
}

/// How long a blocking read waits at most (SO_RCVTIMEO); `None`: for ever.
#[must_use]
pub fn receive_timeout(fd: RawFd) -> Option<Duration> {
    let mut t = libc::timeval { tv_sec: 0, tv_usec: 0 };
    getsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &mut t).ok()?;
    let timeout = Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
    (!timeout.is_zero()).then_some(timeout)
}

/// Is the other end of a socket gone (end of file waits, or an error)?
#[must_use]
pub fn is_hung_up(fd: RawFd) -> bool {
    match peek(fd, &mut [0], libc::MSG_DONTWAIT) {
        Ok(n) => n == 0,
        Err(e) => e.kind() != io::ErrorKind::WouldBlock,
    }
}

/// Waits until the descriptor is readable, or the time is over.
pub fn wait_readable(fd: RawFd, timeout: Duration) {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let t = libc::timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
    // SAFETY: one pollfd and a time that live through the call; no signal mask.
    let _ = sys!(libc::SYS_ppoll, &raw mut poll, 1, &raw const t, 0, 8);
}

/// Has the descriptor room for more to be written, or an error to tell?
#[must_use]
pub fn is_writable(fd: RawFd) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLOUT, revents: 0 };
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: one pollfd and a time that live through the call; no signal mask.
    matches!(sys!(libc::SYS_ppoll, &raw mut poll, 1, &raw const now, 0, 8), Ok(1..))
}

/// Is a connection closed in both directions (POLLHUP)? So is a Unix socket whose other end is closed.
#[must_use]
pub fn is_closed_both_ways(fd: RawFd) -> bool {
    let mut poll = libc::pollfd { fd, events: 0, revents: 0 };
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: one pollfd and a time that live through the call; no signal mask.
    let _ = sys!(libc::SYS_ppoll, &raw mut poll, 1, &raw const now, 0, 8);
    poll.revents & libc::POLLHUP != 0
}

/// epoll_ctl(2).
///
/// # Errors
/// The kernel's.
pub fn epoll_ctl(epoll: RawFd, operation: i32, fd: RawFd, event: &libc::epoll_event) -> io::Result<()> {
    // SAFETY: the event lives through the call; the kernel only reads it.
    sys!(libc::SYS_epoll_ctl, epoll, operation, fd, std::ptr::from_ref(event)).map(drop)
}

/// TCP state of a socket (`tcpi_state`; TCP_ESTABLISHED = 1, TCP_CLOSE_WAIT = 8).
///
/// # Errors
/// Of getsockopt(2).
pub fn tcp_state(fd: RawFd) -> io::Result<u8> {
    let mut state = 0_u8;
    getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut state)?;
    Ok(state)
}

/// getsockname(2) for TCP sockets; v4-mapped addresses as IPv4, with whether the socket is AF_INET6.
///
/// # Errors
/// The kernel's; `Unsupported` for other families.
pub fn local_address(fd: RawFd) -> io::Result<(std::net::SocketAddr, bool)> {
    crate::tcp_repair::address_of(fd, libc::SYS_getsockname)
}

/// getpeername(2), likewise.
///
/// # Errors
/// As [`local_address`].
pub fn peer_address(fd: RawFd) -> io::Result<(std::net::SocketAddr, bool)> {
    crate::tcp_repair::address_of(fd, libc::SYS_getpeername)
}

/// getpid(2).
#[must_use]
pub fn process() -> u32 {
    // SAFETY: no arguments.
    sys!(libc::SYS_getpid).map_or(0, |id| id as u32)
}

/// geteuid(2).
#[must_use]
pub fn effective_user() -> u32 {
    // SAFETY: no arguments.
    sys!(libc::SYS_geteuid).map_or(u32::MAX, |id| id as u32)
}

/// A duplicate with the lowest free number.
///
/// # Errors
/// Of fcntl(2).
pub fn duplicate_low(fd: RawFd, cloexec: bool) -> io::Result<Fd> {
    let command = if cloexec { libc::F_DUPFD_CLOEXEC } else { libc::F_DUPFD };
    // SAFETY: numbers only.
    sys!(libc::SYS_fcntl, fd, command, 0).map(|fd| Fd::new(fd as RawFd))
}

/// Writes an address as accept(2) does: truncated to `*len`, which then says how long it really is.
///
/// # Safety
/// `*len` bytes at `to` may be written, and so may `len`.
pub unsafe fn write_address(
    address: std::net::SocketAddr,
    v6_socket: bool,
    to: *mut libc::sockaddr,
    len: *mut libc::socklen_t,
) {
    let (raw, size) = crate::tcp_repair::RawAddress::new(address, v6_socket || address.is_ipv6());
    // SAFETY: the caller's promise.
    unsafe {
        let room = *len as usize;
        std::ptr::copy_nonoverlapping((&raw const raw).cast::<u8>(), to.cast::<u8>(), room.min(size));
        *len = size as libc::socklen_t;
    }
}

/// Is this a listening socket (SO_ACCEPTCONN)?
#[must_use]
pub fn is_listening(fd: RawFd) -> bool {
    let mut on = 0_i32;
    getsockopt(fd, libc::SOL_SOCKET, libc::SO_ACCEPTCONN, &mut on).is_ok() && on != 0
}

/// One more than the highest number a descriptor may have now (RLIMIT_NOFILE).
#[must_use]
pub fn descriptor_limit() -> u32 {
    let mut limit = libc::rlimit { rlim_cur: 1024, rlim_max: 1024 };
    // SAFETY: the limit lives through the call and may be written.
    let _ = sys!(libc::SYS_prlimit64, 0, libc::RLIMIT_NOFILE, 0, &raw mut limit);
    u32::try_from(limit.rlim_cur).unwrap_or(1 << 20).min(1 << 20)
}

/// A pipe: reading end, writing end; both close-on-exec.
///
/// # Errors
/// Of pipe2(2).
pub fn pipe() -> io::Result<(Fd, Fd)> {
    let mut ends = [-1_i32; 2];
    // SAFETY: two numbers that live through the call and may be written.
    sys!(libc::SYS_pipe2, &raw mut ends, libc::O_CLOEXEC)?;
    Ok((Fd::new(ends[0]), Fd::new(ends[1])))
}

/// `/dev/null`, close-on-exec.
///
/// # Errors
/// Of openat(2).
pub fn open_null() -> io::Result<Fd> {
    let flags = libc::O_RDWR | libc::O_CLOEXEC;
    // SAFETY: a C string constant.
    sys!(libc::SYS_openat, libc::AT_FDCWD, c"/dev/null".as_ptr(), flags, 0).map(|fd| Fd::new(fd as RawFd))
}

/// Reads one byte; `None` at the end or on an error.
#[must_use]
pub fn read_byte(fd: &Fd) -> Option<u8> {
    let mut byte = 0_u8;
    // SAFETY: one byte that lives through the call and may be written.
    let n = sys!(libc::SYS_read, fd.as_raw_fd(), &raw mut byte, 1).ok()?;
    (n == 1).then_some(byte)
}

/// Starts a program as a child of init, in a session of its own: standard input from `null`, standard
/// output and error as ours, `ready` as descriptor `ready_fd`, all others closed.
///
/// # Errors
/// Of clone(2). Failures in the child show as the end of `ready`'s pipe.
///
/// # Safety
/// `argv` and `envp` end with null and point to C strings; `argv` is not empty.
pub unsafe fn start_detached(
    argv: &[*const libc::c_char],
    envp: &[*const libc::c_char],
    null: &Fd,
    ready: &Fd,
    ready_fd: RawFd,
) -> io::Result<()> {
    // SAFETY: fork without a new stack: the child has a copy of everything.
    let child = sys!(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0)?;
    if child != 0 {
        let mut status = 0_i32;
        // SAFETY: waits for the intermediate child only.
        while matches!(sys!(libc::SYS_wait4, child, &raw mut status, 0, 0),
            Err(e) if e.kind() == io::ErrorKind::Interrupted)
        {}
        return Ok(());
    }
    // In the child: system calls only, on memory that the parent prepared.
    let _ = sys!(libc::SYS_setsid);
    if sys!(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0).is_ok_and(|pid| pid == 0) {
        // Away from the numbers that are about to be set.
        let null = sys!(libc::SYS_fcntl, null.as_raw_fd(), libc::F_DUPFD, ready_fd + 1).unwrap_or(0);
        let ready = sys!(libc::SYS_fcntl, ready.as_raw_fd(), libc::F_DUPFD, ready_fd + 1).unwrap_or(0);
        let _ = sys!(libc::SYS_dup3, null, 0, 0);
        let _ = sys!(libc::SYS_dup3, ready, ready_fd, 0);
        let _ = sys!(libc::SYS_close_range, ready_fd + 1, u32::MAX, 0);
        let program = argv.first().copied().unwrap_or(std::ptr::null());
        let _ = sys!(libc::SYS_execve, program, argv.as_ptr(), envp.as_ptr());
    }
    let _ = sys!(libc::SYS_exit_group, 1);
    Ok(())
}

/// close_range(2).
pub fn close_range(first: u32, last: u32) {
    // SAFETY: numbers; closing them is what the caller was asked to do.
    let _ = sys!(libc::SYS_close_range, first, last, 0);
}

/// Returns when every RCU read-side section of the kernel that runs now is over: packets that are in the middle of a BPF program or of the
/// tc filters are through. Takes milliseconds. `MEMBARRIER_CMD_GLOBAL` is `synchronize_rcu()` (kernel/sched/membarrier.c).
///
/// # Errors
/// ENOSYS, and EINVAL on processors that are kept free of ticks (`nohz_full`).
pub fn rcu_barrier() -> io::Result<()> {
    // SAFETY: numbers only.
    sys!(libc::SYS_membarrier, libc::MEMBARRIER_CMD_GLOBAL, 0, 0).map(drop)
}
