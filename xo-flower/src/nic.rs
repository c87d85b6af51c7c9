//! What takes rules: the kernel (its own table or a NIC's), and a NIC that is not there.

use std::collections::HashSet;
use std::convert::Infallible;
use std::hash::Hash;
use std::time::{Duration, Instant};

use crate::channel::{Channel, Error};
use crate::rule::{Place, Rule};

/// A flow table. One command at a time, as in the real ones.
pub trait Nic {
    /// All that belongs to one flow.
    type Rule;
    /// Why not.
    type Error;

    /// Puts a rule in; it is in force when this returns.
    ///
    /// # Errors
    /// When it has not been taken; then nothing of it is in.
    fn insert(&mut self, rule: &Self::Rule) -> Result<(), Self::Error>;

    /// Takes a rule out; nothing meets it when this returns. One that is out already is fine.
    ///
    /// # Errors
    /// When it may be in still.
    fn remove(&mut self, rule: &Self::Rule) -> Result<(), Self::Error>;
}

/// A flow's rules, one for each interface that its packets may come in by. All of one place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowRules {
    /// The flow's number with its owner.
    pub id: u64,
    /// At least one.
    pub rules: Vec<Rule>,
}

/// The kernel's tables.
pub struct Kernel {
    channel: Channel,
}

impl Kernel {
    /// Over this channel.
    #[must_use]
    pub fn new(channel: Channel) -> Kernel {
        Kernel { channel }
    }
}

impl Nic for Kernel {
    type Rule = FlowRules;
    type Error = Error;

    fn insert(&mut self, flow: &FlowRules) -> Result<(), Error> {
        for (n, rule) in flow.rules.iter().enumerate() {
            if let Err(e) = self.channel.add(rule) {
                for rule in flow.rules.iter().take(n) {
                    self.channel.remove(rule)?;
                }
                return Err(e);
            }
        }
        Ok(())
    }

    fn remove(&mut self, flow: &FlowRules) -> Result<(), Error> {
        if flow.rules.iter().any(|rule| rule.place == Place::Software) {
            // Packets that the BPF program has let pass to the rule must have met it first.
            xo_sys::raw::rcu_barrier()?;
        }
        flow.rules.iter().try_for_each(|rule| self.channel.remove(rule))
    }
}

/// How long a NIC takes for its commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Speed {
    /// For an insertion.
    pub insert: Duration,
    /// For a removal.
    pub remove: Duration,
}

/// NICs that the paper has measured (Table 2), by name.
pub const SPEEDS: [(&str, Speed); 3] = [
    ("ConnectX-5", Speed { insert: Duration::from_micros(476), remove: Duration::from_micros(404) }),
    ("ConnectX-7", Speed { insert: Duration::from_micros(2143), remove: Duration::from_micros(1134) }),
    ("Agilio", Speed { insert: Duration::from_micros(68), remove: Duration::from_micros(65) }),
];

/// Sleeping is not exact to less than this.
const SLEEP_ERROR: Duration = Duration::from_micros(120);

/// A NIC in name only: it remembers its rules, and takes its time. For tests and benchmarks.
#[derive(Debug)]
pub struct Simulated<R> {
    speed: Speed,
    rules: HashSet<R>,
}

impl<R: Eq + Hash> Simulated<R> {
    /// Empty.
    #[must_use]
    pub fn new(speed: Speed) -> Self {
        Simulated { speed, rules: HashSet::new() }
    }

    /// What is in.
    #[must_use]
    pub fn rules(&self) -> &HashSet<R> {
        &self.rules
    }
}

impl<R: Eq + Hash + Clone> Nic for Simulated<R> {
    type Rule = R;
    type Error = Infallible;

    fn insert(&mut self, rule: &R) -> Result<(), Infallible> {
        spend(self.speed.insert);
        self.rules.insert(rule.clone());
        Ok(())
    }

    fn remove(&mut self, rule: &R) -> Result<(), Infallible> {
        spend(self.speed.remove);
        self.rules.remove(rule);
        Ok(())
    }
}

/// Sleeps for most of it, and is busy for the rest.
fn spend(time: Duration) {
    let end = Instant::now() + time;
    if let Some(most) = time.checked_sub(SLEEP_ERROR) {
        std::thread::sleep(most);
    }
    while Instant::now() < end {
        std::hint::spin_loop();
    }
}
