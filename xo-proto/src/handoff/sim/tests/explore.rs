//! Breadth first through everything that can happen.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, BuildHasherDefault, Hasher};

use super::*;

/// What was found.
#[derive(Debug)]
pub(super) struct Outcome {
    /// Different states.
    pub(super) states: usize,
    /// In how many of them nothing more happens by itself.
    pub(super) quiet: usize,
    /// The first violation, and the shortest way to it.
    pub(super) found: Option<(Violation, Vec<Move>)>,
}

/// Goes through all states that can be reached, until something is wrong; only in this way, if one is named. Where
/// connections move on, also: whatever has happened, it can come to rest without anything else going wrong.
pub(super) fn explore(world: World, wanted: Option<Violation>) -> Outcome {
    let counts = |found: Violation| wanted.is_none_or(|wanted| wanted == found);
    let hasher = BuildHasherDefault::<Quick>::default();
    let guests = world.setup.guests;
    let first = hasher.hash_one(&world);
    let mut seen = HashMap::<u64, u32, BuildHasherDefault<Quick>>::from_iter([(first, 0)]);
    // Where each state came from, and which follow by themselves.
    let mut ways: Vec<(usize, Move)> = vec![(0, Move::Tick)];
    let mut follows: Vec<(u32, u32)> = Vec::new();
    let mut at_rest: Vec<u32> = Vec::new();
    let mut next = VecDeque::from([(0, first, world)]);
    let mut quiet = 0;
    while let Some((from, own, world)) = next.pop_front() {
        let mut is_quiet = true;
        for what in world.moves() {
            let mut after = world.clone();
            after.step(what);
            let hash = hasher.hash_one(&after);
            let by_itself = matches!(what.class(), Class::Time | Class::Due);
            is_quiet &= hash == own || !by_itself;
            let new = ways.len() as u32;
            let at = *seen.entry(hash).or_insert(new);
            if guests && by_itself {
                follows.push((at, from as u32));
            }
            if at != new {
                continue;
            }
            ways.push((from, what));
            match after.violation() {
                None => next.push_back((at as usize, hash, after)),
                Some(found) if counts(found) => {
                    let way = way(&ways, at as usize);
                    return Outcome { states: seen.len(), quiet, found: Some((found, way)) };
                }
                Some(_) => at_rest.push(at),
            }
        }
        if is_quiet {
            quiet += 1;
            at_rest.push(from as u32);
            let mut last = world;
            last.check_quiet();
            if let Some(found) = last.violation().filter(|&found| counts(found)) {
                return Outcome { states: seen.len(), quiet, found: Some((found, way(&ways, from))) };
            }
        }
    }
    let endless = if guests { endless(ways.len(), follows, at_rest) } else { None };
    let found = endless.filter(|_| counts(NEVER_ENDS)).map(|at| (NEVER_ENDS, way(&ways, at)));
    Outcome { states: seen.len(), quiet, found }
}

/// The first state from which nothing leads to rest.
fn endless(states: usize, mut follows: Vec<(u32, u32)>, at_rest: Vec<u32>) -> Option<usize> {
    follows.sort_unstable();
    follows.dedup();
    let mut ends = vec![false; states];
    let mut next = at_rest;
    while let Some(at) = next.pop() {
        if std::mem::replace(&mut ends[at as usize], true) {
            continue;
        }
        let start = follows.partition_point(|(to, _)| *to < at);
        next.extend(follows[start..].iter().take_while(|(to, _)| *to == at).map(|(_, from)| *from));
    }
    ends.iter().position(|ends| !ends)
}

/// The moves that led to a state.
fn way(ways: &[(usize, Move)], mut at: usize) -> Vec<Move> {
    let mut moves = Vec::new();
    while at != 0 {
        moves.push(ways[at].1);
        at = ways[at].0;
    }
    moves.reverse();
    moves
}

/// States are told apart by 64 bits each: with ten million of them, two share theirs with a probability of one in 400,000.
#[derive(Default)]
struct Quick(u64);

impl Hasher for Quick {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u8(&mut self, n: u8) {
        self.write_u64(n.into());
    }

    fn write_u16(&mut self, n: u16) {
        self.write_u64(n.into());
    }

    fn write_u64(&mut self, n: u64) {
        let mixed = u128::from(self.0 ^ n ^ 0x9e37_79b9_7f4a_7c15) * 0xd6e8_feb8_6659_fd93;
        self.0 = (mixed as u64) ^ ((mixed >> 64) as u64);
    }

    fn write_usize(&mut self, n: usize) {
        self.write_u64(n as u64);
    }

    fn write_isize(&mut self, n: isize) {
        self.write_u64(n as u64);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
