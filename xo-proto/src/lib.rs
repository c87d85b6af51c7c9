//! XO's logic, without I/O.
//!
//! Nothing here makes a system call, reads a clock or looks at the environment: bytes, events and times
//! come in as arguments, decisions come out as values. That is what lets the state machines be simulated,
//! the parsers be fuzzed, and the same code run inside other people's servers and in the daemon.
#![forbid(unsafe_code)]

pub mod board;
pub mod conn;
pub mod frame;
pub mod fresh;
pub mod handoff;
pub mod http;
pub mod ipc;
pub mod packet;
pub mod policy;
#[cfg(any(feature = "pool", test))]
pub mod pool;
pub mod protocol;
pub mod reason;
pub mod resp;
pub mod slot;
pub mod tls;
pub mod wire;
pub mod worth;
