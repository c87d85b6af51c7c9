//! Moments of a hand-off, and the steps between them.

use xo_proto::wire::Handed;

use crate::metrics::Steps;

/// Moments of a hand-off, `CLOCK_MONOTONIC` ns, and what the target reported.
#[derive(Default)]
pub(crate) struct Times {
    pub(crate) decided: u64,
    pub(crate) received: u64,
    pub(crate) held: u64,
    pub(crate) dumped: u64,
    pub(crate) ready: u64,
    pub(crate) redirected: u64,
    pub(crate) sent_ready: u64,
    pub(crate) restore: u64,
    pub(crate) rewrite: u64,
    pub(crate) at_target: u64,
    pub(crate) started: Option<u64>,
}

/// The steps; `handed`: of the strict order; `same_clock`: both machines share `CLOCK_MONOTONIC`.
pub(crate) fn steps(t: &Times, handed: Option<&Handed>, same_clock: bool) -> Steps {
    let round_trip = t.ready.saturating_sub(t.dumped);
    let one_way = round_trip.saturating_sub(t.at_target) / 2;
    let (handed_at, ready_ns) = match (t.started, handed) {
        // Early: the handler had it before the answer was sent.
        (Some(at), _) => {
            let at = if same_clock { at } else { t.ready - one_way };
            (at, 0)
        }
        (None, None) => (t.redirected, 0),
        (None, Some(handed)) => {
            let at = if same_clock { handed.at_ns } else { t.sent_ready + one_way + handed.hand_ns };
            (at, at.saturating_sub(t.redirected))
        }
    };
    Steps {
        queue_ns: t.received.saturating_sub(t.decided),
        block_ns: t.held.saturating_sub(t.received),
        dump_ns: t.dumped.saturating_sub(t.held),
        transfer_ns: round_trip,
        restore_ns: t.restore,
        rewrite_ns: t.rewrite,
        redirect_ns: t.redirected.saturating_sub(t.ready),
        ready_ns,
        total_ns: handed_at.saturating_sub(t.decided),
    }
}
