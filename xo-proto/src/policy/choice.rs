//! Which of a rule's candidates gets a request. What is known about the machines at the moment, and chance, come in
//! through [`View`].

use std::net::SocketAddr;

use super::LOCAL;
use super::key::mixed;
use crate::worth::Worth;

/// How a rule chooses among its candidates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Balance {
    /// By turns, each as often as its weight says.
    #[default]
    RoundRobin,
    /// The one with the fewest connections for its weight.
    LeastLoaded,
    /// The less loaded of two that chance picks: next to as even, and machines that decide at the same moment do not all
    /// pick the same.
    RandomTwo,
    /// By the request's key: the same key goes to the same machine, and when a machine comes or goes only the keys move
    /// that it gets or had (weighted rendezvous hashing).
    Hash,
}

impl Balance {
    /// All, with the names that policies use.
    pub const NAMES: [(&str, Balance); 4] = [
        ("round_robin", Balance::RoundRobin),
        ("least_loaded", Balance::LeastLoaded),
        ("random_two", Balance::RandomTwo),
        ("hash", Balance::Hash),
    ];

    /// By name.
    #[must_use]
    pub fn named(name: &str) -> Option<Balance> {
        Self::NAMES.iter().find(|(n, _)| *n == name).map(|(_, b)| *b)
    }
}

/// Does a connection that has been placed stay while the rule allows its place?
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sticky {
    /// No: each request is chosen for anew.
    Never,
    /// Yes.
    #[default]
    Always,
    /// Until its machine has more connections for its weight than the least loaded one, by more than so many per cent.
    Balanced(u32),
}

/// A machine that a rule names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Node name, or [`LOCAL`].
    pub name: String,
    /// Peer address of its daemon; `None`: the machine that accepted the connection from its client.
    pub address: Option<SocketAddr>,
    /// Its share; at least 1.
    pub weight: u32,
    /// See [`crate::board::node_id`].
    pub id: u64,
    /// See [`crate::board::handler_id`].
    pub handler_id: u64,
}

impl Candidate {
    /// Is it the machine that accepted the connection?
    #[must_use]
    pub fn is_local(&self) -> bool {
        self.address.is_none()
    }
}

/// The connection that the request came by.
#[derive(Clone, Copy, Debug, Default)]
pub struct Here<'a> {
    /// This machine's node name; empty while it is not known.
    pub node: &'a str,
    /// Another machine has accepted the connection from its client.
    pub guest: bool,
    /// An earlier choice has brought it here, or left it here.
    pub placed: bool,
    /// It is to leave this machine.
    pub recalled: bool,
}

/// What is known at the moment.
pub trait View {
    /// May the candidate be given a connection that it does not have?
    fn is_open(&self, candidate: &Candidate) -> bool;
    /// Connections at the candidate.
    fn load(&self, candidate: &Candidate) -> u32;
    /// How often this has been asked for the rule.
    fn turn(&self, rule: usize) -> u64;
    /// Any number.
    fn random(&self) -> u64;
}

/// Everything is there and idle, and nothing has been asked before.
#[derive(Clone, Copy, Debug, Default)]
pub struct Idle;

impl View for Idle {
    fn is_open(&self, _: &Candidate) -> bool {
        true
    }

    fn load(&self, _: &Candidate) -> u32 {
        0
    }

    fn turn(&self, _: usize) -> u64 {
        0
    }

    fn random(&self) -> u64 {
        0
    }
}

/// Where a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pick<'p> {
    /// It is served here.
    Here,
    /// To the machine that accepted the connection.
    Home,
    /// To another.
    To(&'p Candidate),
    /// None of the rule's machines may be used now.
    Nowhere,
}

/// The candidates of a request, and how to choose.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'p> {
    /// Number of the rule, from 0.
    pub rule: usize,
    /// At least one.
    pub candidates: &'p [Candidate],
    /// Handler at the target.
    pub handler: &'p str,
    /// Never `Hash` without a `key`.
    pub balance: Balance,
    /// Says nothing with `Hash`.
    pub sticky: Sticky,
    /// Connections that it moves are worth a flow rule then; `None`: as their home's configuration says.
    pub flower_after: Option<Worth>,
    /// Hash of the request's key.
    pub key: Option<u64>,
}

impl<'p> Choice<'p> {
    /// Chooses.
    pub fn pick(&self, here: &Here<'_>, view: &impl View) -> Pick<'p> {
        let own = self.candidates.iter().find(|c| is_own(c, here));
        let usable = |c: &Candidate| {
            if is_own(c, here) { !here.recalled } else { c.is_local() || view.is_open(c) }
        };
        let round = Round { all: self.candidates, usable: &usable, own, view };
        let placed = own.filter(|c| !here.recalled && (here.placed || !c.is_local()));
        if let Some(own) = placed.filter(|_| self.balance != Balance::Hash) {
            match self.sticky {
                Sticky::Never => {}
                Sticky::Always => return Pick::Here,
                Sticky::Balanced(percent) => {
                    return match round.relief(own, percent, || view.turn(self.rule)) {
                        Some(c) if c.is_local() => Pick::Home,
                        Some(c) => Pick::To(c),
                        None => Pick::Here,
                    };
                }
            }
        }
        let chosen = match self.balance {
            Balance::RoundRobin => round.by_turns(view.turn(self.rule)),
            Balance::LeastLoaded => round.least_loaded(view.turn(self.rule)),
            Balance::RandomTwo => round.random_two(),
            Balance::Hash => round.by_key(self.key.unwrap_or_default()),
        };
        match chosen {
            Some(c) if is_own(c, here) => Pick::Here,
            Some(c) if c.is_local() => Pick::Home,
            Some(c) => Pick::To(c),
            None if here.recalled => Pick::Home,
            None => Pick::Nowhere,
        }
    }
}

fn is_own(candidate: &Candidate, here: &Here<'_>) -> bool {
    if candidate.is_local() { !here.guest } else { candidate.name == here.node }
}

/// One choice. States may change meanwhile: what was usable when counted may not be when chosen, and then the last one
/// that is will do.
struct Round<'p, 'a, V> {
    all: &'p [Candidate],
    usable: &'a dyn Fn(&Candidate) -> bool,
    own: Option<&'p Candidate>,
    view: &'a V,
}

impl<'p, V: View> Round<'p, '_, V> {
    fn usable(&self) -> impl Iterator<Item = &'p Candidate> {
        self.all.iter().filter(|c| (self.usable)(c))
    }

    fn by_turns(&self, turn: u64) -> Option<&'p Candidate> {
        let weights = || self.usable().map(|c| u64::from(c.weight));
        let (first, total) = (weights().next()?, weights().sum::<u64>());
        if weights().all(|w| w == first) {
            return self.at(turn % (total / first) * first);
        }
        // A golden-ratio walk meets each as often as its weight says, and never long the same.
        let fraction = turn.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.at(part(fraction, total))
    }

    /// The candidate in whose share `position` lies.
    fn at(&self, mut position: u64) -> Option<&'p Candidate> {
        let mut last = None;
        for c in self.usable() {
            last = Some(c);
            match position.checked_sub(u64::from(c.weight)) {
                Some(rest) => position = rest,
                None => break,
            }
        }
        last
    }

    fn least_loaded(&self, turn: u64) -> Option<&'p Candidate> {
        // Equals by turns.
        let start = (turn % self.all.len().max(1) as u64) as usize;
        let (before, from) = self.all.split_at_checked(start)?;
        let usable = from.iter().chain(before).filter(|c| (self.usable)(c));
        usable.reduce(|best, c| if self.is_less(c, best) { c } else { best })
    }

    /// Where a connection goes that leaves `own` because others have less to do, by more than so many per cent; `None`: it
    /// stays. Without it `own` has still its share of all connections, at least: machines that relieve themselves at the
    /// same time, each knowing only what it has sent away itself since the others' reports, do not send away too many.
    fn relief(&self, own: &Candidate, percent: u32, turn: impl FnOnce() -> u64) -> Option<&'p Candidate> {
        let load = |c: &Candidate| u64::from(self.view.load(c));
        let (all, weights) =
            self.usable().fold((0, 0), |(all, w), c| (all + load(c), w + u64::from(c.weight)));
        let (loaded, weight) = (load(own), u64::from(own.weight));
        if loaded.saturating_sub(1) * weights < all * weight {
            return None;
        }
        let best = self.least_loaded(turn())?;
        let with_it = (load(best) + 1) * weight * u64::from(100 + percent);
        (best != own && loaded * u64::from(best.weight) * 100 > with_it).then_some(best)
    }

    /// Would `a` with one connection more have fewer for its weight than `b`?
    fn is_less(&self, a: &Candidate, b: &Candidate) -> bool {
        // This connection is among those of the machine that has it.
        let with_it =
            |c: &Candidate| u64::from(self.view.load(c)) + u64::from(self.own.is_none_or(|own| own != c));
        with_it(a) * u64::from(b.weight) < with_it(b) * u64::from(a.weight)
    }

    fn random_two(&self) -> Option<&'p Candidate> {
        let total = self.usable().map(|c| u64::from(c.weight)).sum::<u64>();
        let draw = |below: u64| part(self.view.random(), below);
        let first = self.at(draw(total))?;
        let others = total.checked_sub(u64::from(first.weight)).filter(|n| *n > 0);
        let Some(others) = others else { return Some(first) };
        let rest = |c: &Candidate| (self.usable)(c) && c != first;
        let second = Round { all: self.all, usable: &rest, own: self.own, view: self.view }.at(draw(others));
        second.filter(|second| self.is_less(second, first)).or(Some(first))
    }

    fn by_key(&self, key: u64) -> Option<&'p Candidate> {
        let scored = self.usable().map(|c| (score(key, c), c));
        scored.reduce(|best, next| if next.0 > best.0 { next } else { best }).map(|(_, c)| c)
    }
}

/// `fraction` as a part of 2^64, of `whole`.
fn part(fraction: u64, whole: u64) -> u64 {
    ((u128::from(fraction) * u128::from(whole)) >> 64) as u64
}

/// Each candidate draws a number from the key alone; the highest wins. The logarithm makes the odds those of the weights.
/// All machines must come to the same result: this may never change.
fn score(key: u64, candidate: &Candidate) -> f64 {
    let drawn = mixed(key ^ mixed(candidate.id));
    // In the middle of one of 2^53 steps between 0 and 1: neither.
    let uniform = ((drawn >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    f64::from(candidate.weight) / -uniform.ln()
}

/// A candidate from a name and an address, if it has one.
pub(super) fn candidate(name: &str, address: Option<SocketAddr>, weight: u32, handler: &str) -> Candidate {
    debug_assert_eq!(name == LOCAL, address.is_none());
    Candidate {
        name: name.to_owned(),
        address,
        weight,
        id: crate::board::node_id(name),
        handler_id: crate::board::handler_id(name, handler),
    }
}

#[cfg(test)]
mod tests;
