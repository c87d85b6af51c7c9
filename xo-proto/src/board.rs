//! Layout of the board: memory that the daemon writes and all processes under the library read, so that a choice costs no
//! system call. `xo-sys` maps it; the meaning of its words stands here.
//!
//! It has a row for each machine that connections may go to, and for each handler there that rules name. Rows are found by
//! number, a hash of the name: a row's place is the first free one from the number's own on, and it keeps it.

use crate::policy::hashed;

/// First word of the board.
pub const MAGIC: u32 = 0x584f_4232;
/// Rows; a power of two. Machines and handlers beyond have none, and are taken to be there and idle.
pub const ROWS: usize = 1024;
/// Machines whose wishes about their connections are known.
pub const HOMES: usize = 256;
/// Machines that one home wants its connections to leave.
pub const AVOIDED: usize = 16;
/// Longest policy, bytes.
pub const MAX_POLICY: usize = 256 << 10;

/// State of a row: nothing speaks against it.
pub const UP: u32 = 0;
/// State of a row: not now.
pub const DOWN: u32 = 1;

/// The number of a machine. Never 0.
#[must_use]
pub fn node_id(node: &str) -> u64 {
    hashed(node.as_bytes()).max(1)
}

/// The number of a handler of a machine. Never 0.
#[must_use]
pub fn handler_id(node: &str, handler: &str) -> u64 {
    // No node name has an `@`.
    let name = [node, handler].join("@");
    hashed(name.as_bytes()).max(1)
}

/// Where the search for a number begins.
#[must_use]
pub fn place(id: u64, places: usize) -> usize {
    (id % places.max(1) as u64) as usize
}
