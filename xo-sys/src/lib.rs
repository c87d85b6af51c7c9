//! The system calls that are XO's own.
//!
//! Everything goes to the kernel directly (see [`raw`]): this crate is linked into the preload library,
//! where a call through libc's `recvmsg` would end in our own hook.
pub mod board;
pub mod fdpass;
pub mod ktls;
pub mod netdev;
pub mod probe;
pub mod raw;
pub mod replay;
pub mod route;
pub mod slots;
pub mod sock_diag;
pub mod tcp_repair;
