//! `libxo_preload.so`: lets an unmodified server hand live connections to other machines.
//!
//! `hooks.rs` is the table of what is interposed; the other files decide. What never happens here: a thread
//! is started, a lock is held across a real call, a panic, a changed result of a call that is not ours to
//! answer. Our own system calls are made directly (`xo_sys::raw`), so no hook is ever entered from a hook.
//!
//! Not hooked on purpose: `fork` (a page that the kernel wipes tells a child that it is one), stdio (glibc does not
//! go through the PLT; a stream over a socket is seen by nobody and the connection never offloaded). Of `fcntl` and
//! `ioctl` only what duplicates a descriptor or sets whether it blocks is looked at (`mode.rs`). What a process does
//! through io_uring is seen by nobody either; making a ring through libc's `syscall` is noticed, and said once.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "it lives in other people's processes"
)]

mod accept;
mod alone;
mod boundary;
mod choose;
mod conn;
mod daemon;
mod fdtable;
mod hide;
mod hooks;
mod init;
mod interpose;
mod io;
mod layer;
mod lifecycle;
mod lock;
mod log;
mod mode;
mod policy;
mod poll;
mod redis;
mod register;
mod spawn;
mod tls;
