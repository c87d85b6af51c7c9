//! Where a request goes: the policy's choice, with what this process knows of the machines.

use std::sync::atomic::{AtomicU64, Ordering};

use xo_proto::http::RequestHead;
use xo_proto::ipc::Destination;
use xo_proto::policy::{Candidate, Choice, Decision, Here, Pick, Policy, View};
use xo_proto::reason::Reason;
use xo_proto::slot::Counter;

use crate::conn::Conn;
use crate::daemon;

/// Rules that take turns each for itself; later ones share.
const RULES: usize = 64;

/// How often each rule has been asked by this process.
static TURNS: [AtomicU64; RULES] = [const { AtomicU64::new(0) }; RULES];
/// See [`random`].
static SEED: AtomicU64 = AtomicU64::new(0);

/// Where the request is to go, and to which handler there. Else the number of the counter that says why it is served here.
pub(crate) fn destination<'p>(
    policy: &'p Policy,
    conn: &Conn,
    head: &RequestHead<'_>,
) -> Result<(Destination, &'p str), usize> {
    let guest = conn.guest.load(Ordering::Relaxed);
    let here =
        Here { node: daemon::node(), guest, placed: conn.placed.load(Ordering::Relaxed), recalled: false };
    let Decision::Choose(choice) = policy.decide(head) else { return Err(Counter::Local as usize) };
    match choice.pick(&here, &Seen) {
        Pick::To(Candidate { name, address: Some(address), .. }) => {
            Ok((Destination::Target { node: name.clone(), address: *address }, choice.handler))
        }
        Pick::Home => Ok((Destination::Home, "")),
        Pick::Here | Pick::To(_) => {
            if is_choice(&choice) {
                conn.placed.store(true, Ordering::Relaxed);
            }
            Err(Counter::Local as usize)
        }
        Pick::Nowhere => Err(Reason::NoTarget as usize),
    }
}

/// Could it have been another?
fn is_choice(choice: &Choice<'_>) -> bool {
    choice.candidates.len() > 1
}

/// What is known here.
struct Seen;

impl View for Seen {
    fn is_open(&self, _: &Candidate) -> bool {
        true
    }

    fn load(&self, _: &Candidate) -> u32 {
        0
    }

    fn turn(&self, rule: usize) -> u64 {
        TURNS.get(rule % RULES).map_or(0, |t| t.fetch_add(1, Ordering::Relaxed))
    }

    fn random(&self) -> u64 {
        random()
    }
}

/// Good enough to choose by (splitmix64), and different in each process.
fn random() -> u64 {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut z = SEED.fetch_add(STEP, Ordering::Relaxed).wrapping_add(u64::from(daemon::process()) << 32);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
