//! Hybrid steering (paper 4.2.2): a connection that was moved is redirected by the eBPF program at once, and, if it is worth it, by a rule
//! in the NIC's flow table (or the kernel's) a little later. docs/ARCHITECTURE.md, "Flow rules", has the order and why no packet comes to
//! a dead end.
//!
//! Only the home's redirects get rules. The event loop never waits for one: what must come after a removal is kept, and done when the
//! queue's thread reports it.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::Waker;
use xo_bpf_abi::{FLAG_CLIENT_FIN, FLAG_CLIENT_RST, FLAG_PASS, FLAG_RULE, FlowEntry};
use xo_flower::{FlowRules, Removal, Report, Ticket};
use xo_proto::handoff::{HostEvent, HostState};
use xo_proto::wire::{HandoffId, Moved};
use xo_proto::worth::Worth;

use crate::config::{Config, FlowerMode};
use crate::engine::{Engine, ServedKey};
use crate::host::HostFlow;
use crate::steer::Steer;

mod table;

use self::table::{Hop, Table};

/// Flows that are looked at in one tick.
const LOOKS: usize = 512;
/// A flow whose rule was taken out, or refused, gets none for so long.
const REST: Duration = Duration::from_secs(5);

/// What waits until a flow's rule is gone.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Then {
    /// An event after which the redirect changes.
    Event(HostEvent),
    /// A `MOVED` of this machine.
    Moved(Rc<str>, Moved),
    /// The connection is home for sure.
    Home(ServedKey),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Entering,
    Up,
    Leaving,
    /// The removal has failed, and is tried again.
    Stuck,
}

struct Ruled {
    ticket: Ticket<FlowRules>,
    handle: u32,
    stage: Stage,
    to: IpAddr,
    hop: Hop,
    then: Vec<Then>,
}

/// For `status` and metrics.
#[derive(Clone, Debug, Default)]
pub(crate) struct FlowerView {
    /// "hardware", "software" or "off".
    pub(crate) mode: &'static str,
    /// What takes rules, or why nothing does.
    pub(crate) about: String,
    /// The NIC takes rules.
    pub(crate) hardware: bool,
    /// Flows that have a rule.
    pub(crate) rules: u64,
    /// Commands that wait.
    pub(crate) depth: u64,
    /// Insertions that were cancelled.
    pub(crate) cancelled: u64,
    /// Flows for which the queue had no room.
    pub(crate) full: u64,
    /// Rules that were not taken.
    pub(crate) refused: u64,
    /// Rules that were put in so far.
    pub(crate) inserted: u64,
}

/// All flow rules of this machine.
pub(crate) struct Flower {
    mode: FlowerMode,
    worth: Worth,
    table: Result<Table, String>,
    ruled: HashMap<HandoffId, Ruled>,
    /// Flows to look at, in turn.
    looks: VecDeque<HandoffId>,
    inserted: u64,
    refused: u64,
}

impl Flower {
    /// Finds out whether rules are taken, and says so once.
    pub(crate) fn open(config: &Config, steer: &mut Steer) -> Flower {
        let steering = &config.steering;
        let table = Table::open(steering, &config.interfaces, steer);
        match &table {
            Ok(table) => log::info!("flow rules: {}", table.interfaces()),
            Err(_) if steering.flower == FlowerMode::Off => {}
            Err(why) => log::info!("flow rules: {why}: connections are steered by eBPF alone"),
        }
        Flower {
            mode: steering.flower,
            worth: steering.flower_after,
            table,
            ruled: HashMap::new(),
            looks: VecDeque::new(),
            inserted: 0,
            refused: 0,
        }
    }

    /// Starts the thread that puts rules in, if there will be any.
    pub(crate) fn start(&mut self, waker: Arc<Waker>) -> io::Result<()> {
        self.table.as_mut().map_or(Ok(()), |table| table.start(waker))
    }

    /// A connection has left its home.
    pub(crate) fn watch(&mut self, id: HandoffId) {
        if self.table.is_ok() {
            self.looks.push_back(id);
        }
    }

    /// May a rule have this flow's packets?
    pub(crate) fn has(&self, id: HandoffId) -> bool {
        self.ruled.contains_key(&id)
    }

    /// How far a flow's rule is, for `xo-peerd flows`.
    pub(crate) fn stage(&self, id: HandoffId) -> Option<&'static str> {
        Some(match self.ruled.get(&id)?.stage {
            Stage::Entering => "entering",
            Stage::Up => "in",
            Stage::Leaving => "leaving",
            Stage::Stuck => "stuck",
        })
    }

    /// For `status` and metrics.
    pub(crate) fn view(&self) -> FlowerView {
        let counts = self.table.as_ref().map(Table::counts).unwrap_or_default();
        FlowerView {
            mode: match self.mode {
                FlowerMode::Hardware => "hardware",
                FlowerMode::Software => "software",
                FlowerMode::Off => "off",
            },
            about: self.table.as_ref().map_or_else(Clone::clone, Table::interfaces),
            hardware: self.mode == FlowerMode::Hardware && self.table.is_ok(),
            rules: self.ruled.values().filter(|r| r.stage != Stage::Entering).count() as u64,
            depth: counts.depth,
            cancelled: counts.cancelled,
            full: counts.full,
            refused: self.refused,
            inserted: self.inserted,
        }
    }

    /// The last thing.
    pub(crate) fn close(&mut self, stay: bool) {
        if let Ok(table) = &mut self.table {
            table.close(stay);
        }
    }

    fn is_worth(&self, flow: &HostFlow, entry: &FlowEntry) -> bool {
        let age = u64::try_from(flow.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        flow.worth.unwrap_or(self.worth).is_met(entry.bytes, age)
    }
}

impl Engine {
    /// Every tick: gives rules to flows that are worth it, and takes them from those that end.
    pub(crate) fn look_at_flower(&mut self, now: Instant) {
        for _ in 0..self.flower.looks.len().min(LOOKS) {
            let Some(id) = self.flower.looks.pop_front() else { return };
            if self.look_at_flow(id, now) {
                self.flower.looks.push_back(id);
            }
        }
    }

    /// Is it to be looked at again?
    fn look_at_flow(&mut self, id: HandoffId, now: Instant) -> bool {
        let Some(flow) = self.hosted.get(&id).filter(|f| f.is_away()) else { return false };
        let Some(entry) = self.steer.flow(&flow.key) else { return true };
        // The program sees the end of a connection. From then on it must see everything: whether it is idle, whether its port is used
        // again. Likewise when nobody would tell that it is over.
        let ends = entry.flags & (FLAG_CLIENT_FIN | FLAG_CLIENT_RST) != 0;
        let alone = self.connection_to(&flow.target).is_none();
        if self.flower.has(id) {
            if ends || alone {
                self.lower(id);
            }
        } else if ends {
            return false;
        } else if flow.state() == HostState::Offloaded
            && !alone
            && flow.rest_until.is_none_or(|until| until <= now)
            && self.flower.is_worth(flow, &entry)
        {
            self.raise(id, now);
        }
        true
    }

    /// Asks for a flow's rule.
    fn raise(&mut self, id: HandoffId, now: Instant) {
        let (Ok(table), Some(flow)) = (&mut self.flower.table, self.hosted.get_mut(&id)) else { return };
        let Some(to) = flow.to else { return };
        flow.rest_until = Some(now + REST);
        let Some(hop) = table.hop(to.ip()) else { return };
        // Before there can be one: the entry is not given up from now on.
        if let Err(e) = self.steer.mark_rule(&flow.key, id, FLAG_RULE) {
            return log::debug!("no rule for {}: {e}", flow.client);
        }
        match table.insert(id, (flow.client, flow.local), to, hop) {
            Some((ticket, handle)) => {
                let ruled =
                    Ruled { ticket, handle, stage: Stage::Entering, to: to.ip(), hop, then: Vec::new() };
                self.flower.ruled.insert(id, ruled);
            }
            // The flow stays in eBPF.
            None => self.unmark(id),
        }
    }

    /// Asks for the removal of a flow's rule.
    pub(crate) fn lower(&mut self, id: HandoffId) {
        let (Ok(table), Some(ruled)) = (&self.flower.table, self.flower.ruled.get_mut(&id)) else { return };
        if ruled.stage == Stage::Leaving {
            return;
        }
        if ruled.stage == Stage::Up
            && table.is_software()
            && let Some(flow) = self.hosted.get(&id)
            && let Err(e) = self.steer.mark_rule(&flow.key, id, FLAG_RULE)
        {
            log::error!("the entry of {}: {e}", flow.client);
        }
        match table.remove(&ruled.ticket) {
            Removal::Waits => ruled.stage = Stage::Leaving,
            Removal::Done => self.rule_gone(id),
        }
    }

    /// If a rule may have this flow's packets: it goes first, then `then` is done. Else `false`.
    pub(crate) fn rule_goes_first(&mut self, id: HandoffId, then: impl FnOnce() -> Then) -> bool {
        if !self.flower.has(id) {
            return false;
        }
        self.lower(id);
        let Some(ruled) = self.flower.ruled.get_mut(&id) else { return false };
        let then = then();
        // What is said again means the same.
        if !ruled.then.contains(&then) {
            ruled.then.push(then);
        }
        true
    }

    /// The queue's thread has done something.
    pub(crate) fn on_flower(&mut self) {
        while let Some((id, handle, report)) = self.flower.table.as_ref().ok().and_then(Table::news) {
            let Some(ruled) = self.flower.ruled.get_mut(&id).filter(|r| r.handle == handle) else { continue };
            match report {
                Report::Inserted => {
                    self.flower.inserted += 1;
                    if ruled.stage == Stage::Entering {
                        ruled.stage = Stage::Up;
                        self.rule_in(id);
                    }
                }
                Report::Refused(e) => {
                    if self.flower.refused == 0 {
                        log::warn!("a flow rule was not taken: {e}");
                    }
                    self.flower.refused += 1;
                    self.rule_gone(id);
                }
                Report::Removed => self.rule_gone(id),
                Report::Stuck(e) => {
                    log::error!("a flow rule cannot be taken out: {e}");
                    ruled.stage = Stage::Stuck;
                }
            }
        }
    }

    fn rule_in(&mut self, id: HandoffId) {
        let software = self.flower.table.as_ref().is_ok_and(Table::is_software);
        let Some(flow) = self.hosted.get(&id).filter(|_| software) else { return };
        if let Err(e) = self.steer.mark_rule(&flow.key, id, FLAG_RULE | FLAG_PASS) {
            log::error!("the entry of {}: {e}", flow.client);
            self.lower(id);
        }
    }

    /// No rule has this flow's packets any more.
    fn rule_gone(&mut self, id: HandoffId) {
        let Some(ruled) = self.flower.ruled.remove(&id) else { return };
        self.unmark(id);
        if let Some(flow) = self.hosted.get_mut(&id) {
            flow.rest_until = Some(Instant::now() + REST);
        }
        for then in ruled.then {
            match then {
                Then::Event(event) => self.host_event(id, event),
                Then::Moved(node, moved) => self.moved_to(&node, &moved),
                Then::Home(key) => self.home_now(&key),
            }
        }
    }

    fn unmark(&mut self, id: HandoffId) {
        if let Some(flow) = self.hosted.get(&id)
            && let Err(e) = self.steer.mark_rule(&flow.key, id, 0)
        {
            log::debug!("the entry of {}: {e}", flow.client);
        }
    }

    /// Every second, and when routes have changed: rules whose target is reached by another way now are taken out, and those that are stuck
    /// are tried again.
    pub(crate) fn renew_rules(&mut self) {
        let Ok(table) = &mut self.flower.table else { return };
        table.forget_hops();
        let old = |r: &Ruled, table: &mut Table| r.stage == Stage::Stuck || table.hop(r.to) != Some(r.hop);
        let old: Vec<_> =
            self.flower.ruled.iter().filter(|(_, r)| old(r, table)).map(|(id, _)| *id).collect();
        for id in old {
            self.lower(id);
        }
    }
}
