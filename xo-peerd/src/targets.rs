//! What is known of the machines that connections go to, for the board: who is there, who is busy, who is to be left
//! alone.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};
use std::{fs, io};

use xo_proto::board::{AVOIDED, DOWN, UP, handler_id, node_id};
use xo_proto::policy::{Policy, suggestion};
use xo_proto::reason::Reason;
use xo_proto::wire::{HandlerLoad, Load, PeerMessage};
use xo_sys::board::Keeper;

use crate::config::{Handler, HandlerMode};
use crate::engine::Engine;
use crate::onward::Origin;

/// How often peers are told how busy this machine is.
const REPORT_EVERY: Duration = Duration::from_millis(95);
/// A machine that has not been heard of for so long gets no connections.
const SILENCE: Duration = Duration::from_millis(1200);
/// How long a machine that refused is left alone the first time, and at most.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A machine that only a library's own policy names is kept connected for so long after its last connection.
const WANTED: Duration = Duration::from_secs(60);
/// Time over which processor use is averaged.
const CPU_SPAN: Duration = Duration::from_millis(500);

/// All machines that connections may go to, and the board.
pub(crate) struct Targets {
    board: Keeper,
    memory: OwnedFd,
    known: BTreeMap<String, Known>,
    /// By home: the machines that its connections are to leave.
    recalls: HashMap<String, Vec<String>>,
    cpu: Cpu,
    reported: Instant,
}

/// One machine.
struct Known {
    address: SocketAddr,
    /// The daemon's policy names it.
    in_policy: bool,
    /// A library last wanted it.
    wanted: Instant,
    /// Handlers there that have refused because nobody was there to take a connection.
    deserted: BTreeSet<String>,
    load: Load,
    /// It refuses; not before this time.
    out_until: Option<Instant>,
    pause: Duration,
}

/// A machine, for `status`.
#[derive(Clone, Debug)]
pub(crate) struct TargetView {
    /// Node name.
    pub(crate) name: String,
    /// Peer address.
    pub(crate) address: String,
    /// "up", "draining" or "down".
    pub(crate) state: &'static str,
    /// Connections of this machine that are there or on their way.
    pub(crate) connections: u64,
    /// What it says of itself.
    pub(crate) load: Load,
}

impl Targets {
    /// With an empty board.
    pub(crate) fn new() -> io::Result<Targets> {
        let (board, memory) = Keeper::create()?;
        let now = Instant::now();
        Ok(Targets {
            board,
            memory,
            known: BTreeMap::new(),
            recalls: HashMap::new(),
            cpu: Cpu::default(),
            reported: now,
        })
    }

    /// The board, for a library.
    pub(crate) fn memory(&self) -> &OwnedFd {
        &self.memory
    }

    /// Puts a new policy on the board. Its targets are to be connected, others only while they are in use.
    pub(crate) fn set_policy(&mut self, text: &str, policy: &Policy) {
        self.board.set_policy(text);
        for (name, known) in &mut self.known {
            known.in_policy = policy.targets.iter().any(|t| t.name == *name);
        }
        for target in &policy.targets {
            let known = self.learn(&target.name, target.address);
            known.in_policy = true;
            known.address = target.address;
        }
    }

    fn learn(&mut self, node: &str, address: SocketAddr) -> &mut Known {
        self.known.entry(node.to_owned()).or_insert_with(|| Known {
            address,
            in_policy: false,
            wanted: Instant::now(),
            deserted: BTreeSet::new(),
            load: Load::default(),
            out_until: None,
            pause: FIRST_PAUSE,
        })
    }

    /// A connection is to go there.
    pub(crate) fn wanted(&mut self, node: &str, address: SocketAddr) {
        match self.known.get_mut(node) {
            Some(known) => known.wanted = Instant::now(),
            None => self.learn(node, address).wanted = Instant::now(),
        }
    }

    /// A connection leaves this machine. Its processes must know at once how many are left, or all would send away what is
    /// too much for the machine.
    pub(crate) fn one_leaves(&self, own: &str) {
        self.board.one_leaves(node_id(own));
    }

    /// Is the machine one of the daemon's policy?
    pub(crate) fn is_in_policy(&self, node: &str) -> bool {
        self.known.get(node).is_some_and(|k| k.in_policy)
    }

    /// Is a connection to its daemon to be kept?
    pub(crate) fn keeps(&self, node: &str) -> bool {
        self.known.get(node).is_some_and(|k| k.in_policy || k.wanted.elapsed() < WANTED)
    }

    /// A machine's daemon is there again: what it refused before says nothing now.
    fn begins_anew(&mut self, node: &str) {
        let Some(known) = self.known.get_mut(node) else { return };
        for handler in std::mem::take(&mut known.deserted) {
            self.board.set_state(handler_id(node, &handler), UP);
        }
        known.out_until = None;
        known.pause = FIRST_PAUSE;
    }

    /// Machines that nobody names any more and that none of these connections is at.
    pub(crate) fn forget_unused(&mut self, in_use: impl Fn(&str) -> bool) {
        let board = &self.board;
        self.known.retain(|node, k| {
            let keep = k.in_policy || k.wanted.elapsed() < WANTED || in_use(node);
            if !keep {
                board.set_state(node_id(node), UP);
            }
            keep
        });
    }

    /// Machines that the policy names, with the addresses of their daemons.
    pub(crate) fn of_policy(&self) -> Vec<(String, SocketAddr)> {
        let named = self.known.iter().filter(|(_, k)| k.in_policy);
        named.map(|(name, k)| (name.clone(), k.address)).collect()
    }

    /// Which of the policies that the daemon has had is in force; 0 for none.
    pub(crate) fn policy_epoch(&self) -> u32 {
        self.board.board().policy_epoch()
    }

    fn set_avoided(&self, home: &str, nodes: &[String]) {
        let numbers: Vec<_> = nodes.iter().map(|n| node_id(n)).collect();
        self.board.set_avoided(node_id(home), &numbers);
    }
}

impl Engine {
    /// A machine has refused a connection. (One that does not answer is silent, too, which is seen to elsewhere.)
    pub(crate) fn refused_by(&mut self, node: &str, handler: &str, reason: Reason) {
        use Reason as R;
        let Some(known) = self.targets.known.get_mut(node) else { return };
        match reason {
            // Its next report says whether somebody is there again.
            R::NoHandler | R::NoWorker | R::PoolFull => {
                known.deserted.insert(handler.to_owned());
                self.targets.board.set_state(handler_id(node, handler), DOWN);
            }
            R::TargetUnwilling | R::TableFull | R::Stopping | R::NotSteered | R::PeerIncompatible => {
                // Several that were under way are refused together: that is one refusal.
                if known.out_until.is_some() {
                    return;
                }
                known.out_until = Some(Instant::now() + known.pause);
                log::info!("{node} gets no connections for {:?}: {reason}", known.pause);
                known.pause = (known.pause * 2).min(LONGEST_PAUSE);
                self.targets.board.set_state(node_id(node), DOWN);
            }
            _ => {}
        }
    }

    /// A machine has taken a connection.
    pub(crate) fn taken_by(&mut self, node: &str) {
        if let Some(known) = self.targets.known.get_mut(node) {
            known.pause = FIRST_PAUSE;
        }
    }

    /// `LOAD`.
    pub(crate) fn on_load(&mut self, index: usize, load: Load) {
        let Some(node) = self.node_of(index) else { return };
        let board = &self.targets.board;
        board.set_load(node_id(&node), load.connections, load.cpu_permille.into());
        let Some(known) = self.targets.known.get_mut(&*node) else { return };
        known.deserted.retain(|handler| {
            let present = load.handlers.iter().any(|h| h.name == *handler);
            if present {
                board.set_state(handler_id(&node, handler), UP);
            }
            !present
        });
        known.load = load;
    }

    /// `RECALL`.
    pub(crate) fn on_recall(&mut self, index: usize, nodes: Vec<String>) {
        let Some(home) = self.node_of(index) else { return };
        self.targets.set_avoided(&home, &nodes);
        self.targets.recalls.insert(home.to_string(), nodes);
    }

    /// Does this connection's home want it not to be here?
    pub(crate) fn is_recalled(&self, origin: &Origin) -> bool {
        let recalls = self.targets.recalls.get(&*origin.node);
        !origin.here && recalls.is_some_and(|nodes| nodes.contains(&self.config.node))
    }

    /// Every tick.
    pub(crate) fn look_at_targets(&mut self, now: Instant) {
        let names: Vec<_> = self.targets.known.keys().cloned().collect();
        for node in names {
            self.look_at_target(&node, now);
        }
        if now.duration_since(self.targets.reported) >= REPORT_EVERY {
            self.report(now);
        }
    }

    /// Puts what is known of a machine on the board.
    pub(crate) fn look_at_target(&mut self, node: &str, now: Instant) {
        let up = *node == self.config.node || self.is_there(node);
        let Some(known) = self.targets.known.get_mut(node) else { return };
        known.out_until = known.out_until.filter(|when| now < *when);
        let state = if up && known.out_until.is_none() { UP } else { DOWN };
        self.targets.board.set_state(node_id(node), state);
    }

    /// Is its daemon connected, or has nobody tried?
    fn is_there(&self, node: &str) -> bool {
        let connection = self.connection_to(node).and_then(|index| self.peers.get(index));
        match connection {
            Some(peer) => peer.silence() < SILENCE,
            None => self.dials.get(node).is_none_or(|d| !d.has_failed()),
        }
    }

    /// Tells the peers, and the board, how busy this machine is.
    pub(crate) fn report(&mut self, now: Instant) {
        self.targets.reported = now;
        let guests = || self.served.values().filter(|s| s.is_guest());
        let followed = self.libraries.iter().filter_map(|(_, l)| l.slots.as_ref()).map(|s| s.followed());
        let connections = (guests().count() as u32).saturating_add(followed.fold(0, u32::saturating_add));
        let cpu_permille = self.targets.cpu.permille(now);
        let present = |h: &&Handler| match h.mode {
            HandlerMode::Attach { port, .. } => self.acceptors_on(port) > 0,
            HandlerMode::Exec { .. } => true,
            HandlerMode::Pool { .. } => self.pools.has_room(&h.name),
        };
        let load = |h: &Handler| HandlerLoad {
            name: h.name.clone(),
            connections: guests().filter(|s| s.handler == h.name).count() as u32,
        };
        let handlers = self.config.handlers.iter().filter(present).map(load).collect();
        self.targets.board.set_load(node_id(&self.config.node), connections, cpu_permille.into());
        let message = PeerMessage::Load(Load { connections, cpu_permille, handlers });
        self.send_to_all(&message);
    }

    fn send_to_all(&mut self, message: &PeerMessage) {
        let usable: Vec<_> = self.peers.iter().filter(|(_, p)| p.usable()).map(|(i, _)| i).collect();
        for index in usable {
            self.send_to(index, message);
        }
    }

    /// A machine's connections are to leave it, and no new ones are to go there; or no longer so.
    pub(crate) fn set_draining(&mut self, node: &str, on: bool) -> Result<(), String> {
        let mut all = self.state.draining().to_vec();
        let is_known =
            self.targets.known.contains_key(node) || self.hosted.values().any(|f| f.target == node);
        if on && node == self.config.node {
            return Err(format!("`{node}` is this machine"));
        }
        if !all.iter().any(|n| n == node) && !is_known {
            let known = self.targets.known.keys().map(String::as_str);
            return Err(format!("unknown target `{node}`{}", suggestion(node, known)));
        }
        all.retain(|n| n != node);
        if on {
            if all.len() == AVOIDED {
                return Err(format!("no more than {AVOIDED} targets can drain at a time"));
            }
            all.push(node.to_owned());
        }
        self.state.set_draining(all).map_err(|e| format!("the state file: {e}"))?;
        log::info!("{node} {}", if on { "drains" } else { "does not drain any more" });
        self.publish_draining();
        let recall = PeerMessage::Recall(self.state.draining().to_vec());
        self.send_to_all(&recall);
        Ok(())
    }

    /// Puts on the board which machines drain.
    pub(crate) fn publish_draining(&self) {
        self.targets.set_avoided(&self.config.node, self.state.draining());
    }

    /// A peer is there (again): it is told which machines our connections are to leave, and how busy this one is.
    pub(crate) fn tell_peer(&mut self, index: usize, node: &str) {
        self.send_to(index, &PeerMessage::Recall(self.state.draining().to_vec()));
        self.targets.begins_anew(node);
        self.look_at_target(node, Instant::now());
        self.report(Instant::now());
    }

    /// For `status`.
    pub(crate) fn target_views(&self) -> Vec<TargetView> {
        let draining = self.state.draining();
        let view = |(name, known): (&String, &Known)| {
            let state = match self.targets.board.board().state(node_id(name)) {
                _ if draining.contains(name) => "draining",
                UP => "up",
                _ => "down",
            };
            TargetView {
                name: name.clone(),
                address: known.address.to_string(),
                state,
                connections: self.hosted.values().filter(|f| f.target == *name).count() as u64,
                load: known.load.clone(),
            }
        };
        self.targets.known.iter().map(view).collect()
    }
}

/// How busy this machine's processors are, from /proc/stat.
#[derive(Default)]
struct Cpu {
    since: Option<(Instant, u64, u64)>,
    permille: u16,
}

impl Cpu {
    fn permille(&mut self, now: Instant) -> u16 {
        if self.since.is_some_and(|(when, ..)| now.duration_since(when) < CPU_SPAN) {
            return self.permille;
        }
        let text = fs::read_to_string("/proc/stat").unwrap_or_default();
        if let Some((busy, all)) = times(&text) {
            if let Some((_, busy_then, all_then)) = self.since
                && let Some(passed @ 1..) = all.checked_sub(all_then)
            {
                self.permille = (busy.saturating_sub(busy_then) * 1000 / passed).min(1000) as u16;
            }
            self.since = Some((now, busy, all));
        }
        self.permille
    }
}

/// Time spent on something, and all time, from the first line of /proc/stat (proc(5)).
fn times(stat: &str) -> Option<(u64, u64)> {
    let fields = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
    // What guests get is in the user time already.
    let fields: Vec<u64> = fields.take(8).map_while(|f| f.parse().ok()).collect();
    let [_, _, _, idle, waiting, ..] = fields[..] else { return None };
    let all = fields.iter().sum::<u64>();
    Some((all - idle - waiting, all))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_what_is_not_idle() {
        let stat = "cpu  10 1 20 60 9 2 3 4 99 99\ncpu0 1 1 1 1 1 1 1 1 0 0\n";
        assert_eq!(times(stat), Some((40, 109)));
        assert_eq!((times(""), times("cpu  1 2\n")), (None, None));
    }
}
