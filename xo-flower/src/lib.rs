//! Rules of tc-flower that steer one connection (paper 4.2): match its addresses and ports, rewrite them, put the checksums
//! right, send the packet out. A NIC that takes such a rule does all that without the machine's processors.
//!
//! [`rule`] says what a rule is and makes the requests; [`channel`] exchanges them with the kernel. [`queue`](mod@queue) is where
//! commands wait for a flow table, [`nic`] what stands behind it.
//!
//! In software (`skip_hw`) a rule does the same, for tests: but `act_csum` leaves aggregates (GSO) as they are, whose checksums are
//! then wrong when addresses were rewritten. The eBPF programs are what steers in software.
#![forbid(unsafe_code)]

mod actions;
pub mod channel;
pub mod nic;
pub mod queue;
pub mod rule;

pub use channel::{Channel, Error, Link, Taken};
pub use nic::{FlowRules, Kernel, Nic, Simulated, Speed};
pub use queue::{Queue, Removal, Report, Ticket, Worker, queue};
pub use rule::{ANCHOR, Hook, Place, Rewrite, Rule};
