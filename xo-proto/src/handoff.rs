//! The outbound transfer (paper 4.1.1) as two state machines: (state, event) -> actions.
//!
//! A machine never acts itself: its driver carries the actions out in order, and tells the outcome of those
//! that can fail as the next event. Time comes in as events; the driver arms a limit where an action says
//! so. `docs/PROTOCOL.md` has the same tables in words.
//!
//! Two orders:
//! - *strict*, the paper's: the target starts the socket when `HOST_READY` says that the flow is redirected.
//! - *early*: the target starts the socket at once; one message is on the critical path. The client's packets are held
//!   at the host until it has redirected the flow, so none is lost and none meets a machine without the socket.
//!
//! What must hold whatever is lost, late or repeated:
//! - the host's socket and the target's are never out of repair mode at the same time;
//! - in the strict order the host can take everything back until it has redirected the flow. In the early order it can
//!   when the target has refused, or when it is certain that the target has given the connection up: a target
//!   that is not confirmed within [`Limits::fence`] empties its socket without a packet, unless the client's
//!   acknowledgements prove that the host did redirect;
//! - after the redirect, the target either serves the connection, or says `Refuse` and the host resets it: the client is told.

mod host;
mod shortcut;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
mod target;

use std::time::Duration;

pub use host::{GuestEvent, Host, HostAction, HostEvent, HostState};
pub use shortcut::{Shortcut, ShortcutAction, ShortcutEvent, ShortcutState};
pub use target::{Target, TargetAction, TargetEvent, TargetState};

/// Time limits that both ends must agree on; each measures them on its own clock, of which only the rate matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// A message that was longer under way than this, compared with the fastest one of late, is too old to start or
    /// to keep a connection.
    pub fresh: Duration,
    /// A round trip of a probe must be shorter than this to count as a sample of "the fastest", and a host begins early
    /// only where it had such a sample of late.
    pub sample: Duration,
    /// The host believes an answer for so long after its question.
    pub answer: Duration,
    /// The target keeps an unconfirmed connection for so long after it started it or was last asked about it.
    pub fence: Duration,
    /// The host, left in doubt, takes the connection back so long after its first question.
    pub doubt: Duration,
}

/// The limits in force.
pub const LIMITS: Limits = Limits {
    fresh: Duration::from_millis(50),
    sample: Duration::from_millis(50),
    answer: Duration::from_millis(150),
    fence: Duration::from_millis(300),
    doubt: Duration::from_millis(600),
};

// An answer that is believed leaves the target time to hear of it; doubt outlasts every fence.
const UNDER_WAY_MS: u128 = LIMITS.fresh.as_millis() + LIMITS.sample.as_millis();
const _: () = assert!(LIMITS.answer.as_millis() + UNDER_WAY_MS < LIMITS.fence.as_millis());
const _: () = assert!(UNDER_WAY_MS + LIMITS.fence.as_millis() < LIMITS.doubt.as_millis());

#[cfg(test)]
mod tests;
