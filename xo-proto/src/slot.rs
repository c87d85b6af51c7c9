//! Layout of the slot table: memory shared between one process under the library and the daemon.
//!
//! The daemon makes one table for each process that says hello. A slot belongs to a tracked connection of
//! that process (allocated by the library), a delivery to a restored connection given to it (allocated by
//! the daemon). `xo-sys` maps it; the meaning of its words stands here.

use crate::reason::{ALL, Reason};

/// First word of the table.
pub const MAGIC: u32 = 0x584f_5331;
/// Slots for connections that may be offloaded.
pub const SLOTS: usize = 16_384;
/// Deliveries: restored connections that one process can hold.
pub const DELIVERIES: usize = 16_384;
/// Counters that the library keeps and the daemon adds up: one for each [`Reason`], then [`Counter`]s.
pub const COUNTERS: usize = 64;
/// Source ports of wake-up connections under way, 0 for none.
pub const WAKE_PORTS: usize = 16;

/// Library counters beyond the reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Counter {
    /// Connections accepted on a tracked port.
    Accepted = crate::reason::REASONS,
    /// Requests whose policy decision was to serve them here.
    Local,
    /// Hand-offs asked of the daemon.
    Asked,
    /// Restored connections that came out of `accept`.
    Delivered,
    /// Processes that use io_uring, through which connections cannot be followed.
    IoUring,
}

/// State word of a slot: not in use.
pub const FREE: u32 = 0;
/// State word of a slot: the daemon has been asked and has not answered.
pub const PENDING: u32 = 1;
/// State word of a slot: the connection is elsewhere.
pub const GONE: u32 = 2;
/// State word of a slot: the connection stays; the reason's number is added.
pub const STAY: u32 = 0x100;

/// State word of a delivery: not in use.
pub const DELIVERY_FREE: u32 = 0;
/// State word of a delivery: the process has the connection.
pub const DELIVERY_OPEN: u32 = 1;
/// State word of a delivery: the process has closed its last descriptor of the connection.
pub const DELIVERY_CLOSED: u32 = 2;

/// The state word for "stays because of `reason`".
#[must_use]
pub fn stay(reason: Reason) -> u32 {
    STAY + reason as u32
}

/// The reason in a state word, if it says that the connection stays.
#[must_use]
pub fn stay_reason(word: u32) -> Option<Reason> {
    ALL.get(word.checked_sub(STAY)? as usize).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_survive_the_state_word() {
        for r in ALL {
            assert_eq!(stay_reason(stay(r)), Some(r));
        }
        for w in [FREE, PENDING, GONE, STAY + ALL.len() as u32] {
            assert_eq!(stay_reason(w), None);
        }
        const { assert!((Counter::IoUring as usize) < COUNTERS) };
    }
}
