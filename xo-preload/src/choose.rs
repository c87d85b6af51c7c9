//! Where a request goes: the policy's choice, with what this process knows of the machines.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

use xo_proto::board::{ROWS, UP};
use xo_proto::ipc::Destination;
use xo_proto::policy::{Candidate, Choice, Decision, Here, Pick, Policy, View};
use xo_proto::protocol::Request;
use xo_proto::reason::Reason;
use xo_proto::slot::Counter;
use xo_proto::worth::Worth;
use xo_sys::board::Board;

use crate::conn::Conn;
use crate::daemon;

/// Rules that take turns each for itself; later ones share.
const RULES: usize = 64;

/// How often each rule has been asked by this process.
static TURNS: [AtomicU64; RULES] = [const { AtomicU64::new(0) }; RULES];
/// For each row of the board, the last report seen (upper half) and the connections sent there since; for this machine's, those
/// sent away.
static SENT: [AtomicU64; ROWS] = [const { AtomicU64::new(0) }; ROWS];
/// See [`random`].
static SEED: AtomicU64 = AtomicU64::new(0);

/// Where a request is to go.
pub(crate) struct Chosen<'p> {
    pub(crate) to: Destination,
    /// Handler there.
    pub(crate) handler: &'p str,
    /// What the rule says of flow rules.
    pub(crate) flower_after: Option<Worth>,
    /// The machine's number on the board.
    id: u64,
    /// The rule whose turn it was.
    rule: Option<usize>,
}

impl Chosen<'_> {
    /// It goes there: what this process knows about turns and machines includes it.
    pub(crate) fn count(&self, conn: &Conn) {
        took_turn(self.rule);
        let seen = Seen::by(conn);
        seen.sent_to(self.id);
        seen.sent_to(daemon::node_number());
    }
}

/// Where the request is to go, if it goes at once. Else the number of the counter that says why it is served here.
pub(crate) fn destination<'p>(
    policy: &'p Policy,
    conn: &Conn,
    request: Request<'_>,
) -> Result<Chosen<'p>, usize> {
    let chosen = ahead(policy, conn, request)?;
    chosen.count(conn);
    Ok(chosen)
}

/// As [`destination`], for a request that may be decided about again before it goes: nothing is counted before
/// [`Chosen::count`]. One that is served here is.
pub(crate) fn ahead<'p>(policy: &'p Policy, conn: &Conn, request: Request<'_>) -> Result<Chosen<'p>, usize> {
    let seen = Seen::by(conn);
    let recalled = seen.is_recalled();
    let home = |rule| Chosen { to: Destination::Home, handler: "", flower_after: None, id: seen.home, rule };
    let Decision::Choose(choice) = policy.decide(request) else {
        return if recalled { Ok(home(None)) } else { Err(Counter::Local as usize) };
    };
    let placed = conn.placed.load(Ordering::Relaxed);
    let pick = choice.pick(&Here { node: daemon::node(), guest: seen.guest, placed, recalled }, &seen);
    let rule = seen.asked.get();
    match pick {
        Pick::To(Candidate { name, address: Some(address), id, .. }) => {
            let to = Destination::Target { node: name.clone(), address: *address };
            let Choice { handler, flower_after, .. } = choice;
            Ok(Chosen { to, handler, flower_after, id: *id, rule })
        }
        Pick::Home => Ok(home(rule)),
        Pick::Here | Pick::To(_) => {
            took_turn(rule);
            // It could have been another.
            if choice.candidates.len() > 1 && !placed {
                conn.placed.store(true, Ordering::Relaxed);
            }
            Err(Counter::Local as usize)
        }
        Pick::Nowhere => Err(Reason::NoTarget as usize),
    }
}

fn took_turn(rule: Option<usize>) {
    if let Some(turns) = rule.and_then(|r| TURNS.get(r % RULES)) {
        turns.fetch_add(1, Ordering::Relaxed);
    }
}

/// What is known here for the good of one connection.
struct Seen {
    board: Option<&'static Board>,
    guest: bool,
    /// Number of the machine that accepted it.
    home: u64,
    /// The rule whose turns the choice has asked for.
    asked: Cell<Option<usize>>,
}

impl Seen {
    fn by(conn: &Conn) -> Seen {
        let guest = conn.guest.load(Ordering::Relaxed);
        let home = if guest { conn.home.load(Ordering::Relaxed) } else { daemon::node_number() };
        Seen { board: daemon::board(), guest, home, asked: Cell::new(None) }
    }

    /// Is it to leave this machine?
    fn is_recalled(&self) -> bool {
        self.guest && self.board.is_some_and(|b| b.avoids(self.home, daemon::node_number()))
    }

    /// A connection goes to this machine, or leaves this one: it counts until the machine's own report tells of it.
    fn sent_to(&self, id: u64) {
        let Some((board, row)) = self.board.and_then(|b| Some((b, b.row(id)?))) else { return };
        let reports = u64::from(board.load(row).reports) << 32;
        if let Some(sent) = SENT.get(row) {
            let count = |known: u64| {
                Some(if known & !u64::from(u32::MAX) == reports {
                    known.wrapping_add(1)
                } else {
                    reports | 1
                })
            };
            let _ = sent.fetch_update(Ordering::Relaxed, Ordering::Relaxed, count);
        }
    }
}

impl View for Seen {
    fn is_open(&self, candidate: &Candidate) -> bool {
        self.board.is_none_or(|b| {
            b.state(candidate.id) == UP
                && b.state(candidate.handler_id) == UP
                && !b.avoids(self.home, candidate.id)
        })
    }

    fn load(&self, candidate: &Candidate) -> u32 {
        let id = if candidate.is_local() { self.home } else { candidate.id };
        let Some((board, row)) = self.board.and_then(|b| Some((b, b.row(id)?))) else { return 0 };
        let load = board.load(row);
        let sent = SENT.get(row).map_or(0, |s| s.load(Ordering::Relaxed));
        let since = if sent >> 32 == u64::from(load.reports) { sent as u32 } else { 0 };
        // The daemon counts down what leaves, but only as it gets to it; that some are counted twice until the next report is no
        // harm, and that many leave at a time would be.
        if id == daemon::node_number() {
            load.connections.saturating_sub(since)
        } else {
            load.connections.saturating_add(since)
        }
    }

    fn turn(&self, rule: usize) -> u64 {
        self.asked.set(Some(rule));
        TURNS.get(rule % RULES).map_or(0, |t| t.load(Ordering::Relaxed))
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
