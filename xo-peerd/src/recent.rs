//! The most recent of something, found quickly.

use std::collections::VecDeque;
use std::hash::Hash;

use foldhash::HashSet;

/// As many are remembered.
const MOST: usize = 4096;

/// A set that forgets what was added first.
#[derive(Debug)]
pub(crate) struct Recent<T> {
    order: VecDeque<T>,
    all: HashSet<T>,
}

impl<T> Default for Recent<T> {
    fn default() -> Self {
        Recent { order: VecDeque::new(), all: HashSet::default() }
    }
}

impl<T: Clone + Eq + Hash> Recent<T> {
    /// Remembers one.
    pub(crate) fn add(&mut self, one: T) {
        if self.all.insert(one.clone()) {
            self.order.push_back(one);
        }
        if self.order.len() > MOST
            && let Some(first) = self.order.pop_front()
        {
            self.all.remove(&first);
        }
    }

    /// Was it added of late?
    pub(crate) fn contains(&self, one: &T) -> bool {
        self.all.contains(one)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_are_forgotten() {
        let mut recent = Recent::default();
        for n in 0..=MOST {
            recent.add(n);
            recent.add(n);
        }
        assert!(!recent.contains(&0) && recent.contains(&1) && recent.contains(&MOST));
    }
}
