//! Several machines that can all serve everything, under one policy that may change; and clients that never stop asking.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::bed::{Bed, built};
use crate::client::Connection;
use crate::program::{Program, wait_for};
use crate::servers::{PEER_PORT, PeerdOptions, WEB, address};

/// Daemons and servers by node.
#[derive(Debug)]
pub struct Pool {
    /// The policy file of all of them.
    pub policy: PathBuf,
    options: PeerdOptions,
    /// xo-peerd.
    pub daemons: BTreeMap<String, Program>,
    /// nginx.
    pub servers: BTreeMap<String, Program>,
}

/// A policy of these rules, with all targets of a bed.
#[must_use]
pub fn policy(bed: &Bed, rules: &str) -> String {
    let targets = bed.servers().into_iter().filter(|n| n != "host");
    let lines = targets.map(|t| format!("{t} = \"{}:{PEER_PORT}\"\n", address(&t)));
    format!("listen = [80]\n[targets]\n{}{rules}", lines.collect::<String>())
}

impl Pool {
    /// Raises daemons and nginx on the host and all targets, and waits until they know each other.
    ///
    /// # Panics
    /// When they do not come up.
    #[must_use]
    pub fn up(bed: &Bed, rules: &str) -> Pool {
        let policy = bed.file("pool.toml", &policy(bed, rules));
        let head = format!("insecure = true\npolicy = \"{}\"", policy.display());
        let options = PeerdOptions { head, sections: WEB.into() };
        let mut pool = Pool { policy, options, daemons: BTreeMap::new(), servers: BTreeMap::new() };
        for node in bed.servers() {
            pool.start_daemon(bed, &node);
        }
        for node in bed.servers() {
            pool.start_server(bed, &node);
        }
        bed.wait_connected(&bed.servers());
        pool
    }

    /// Starts a node's daemon.
    pub fn start_daemon(&mut self, bed: &Bed, node: &str) {
        self.daemons.insert(node.into(), bed.peerd(node, &self.options));
    }

    /// Starts a node's nginx and waits until its daemon knows it.
    pub fn start_server(&mut self, bed: &Bed, node: &str) {
        let mut command = bed.preloaded(node, "nginx");
        command.env("XO_POLICY", &self.policy);
        self.servers.insert(node.into(), bed.nginx_with(node, command));
        if node != "host" {
            // Two workers, each with an IPv4 and an IPv6 socket.
            bed.wait_acceptors(node, "web", 4);
        }
    }

    /// Kills a node's daemon.
    pub fn kill_daemon(&mut self, node: &str) {
        if let Some(daemon) = self.daemons.remove(node) {
            daemon.signal(libc::SIGKILL);
        }
    }

    /// Puts another policy file in the place of this one, in one step.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn write(&self, text: &str) {
        let new = self.policy.with_extension("new");
        fs::write(&new, text).expect("a policy");
        fs::rename(new, &self.policy).expect("in its place");
    }
}

/// Runs `xo-peerd` with these arguments on a node.
///
/// # Panics
/// When it cannot be started.
#[must_use]
pub fn peerd_says(bed: &Bed, node: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(built("xo-peerd"));
    command.args(arguments).arg("--socket").arg(bed.socket(node));
    command.output().expect("xo-peerd")
}

/// The state of a target as a node's daemon shows it, and the connections of that node there.
#[must_use]
pub fn target(bed: &Bed, node: &str, target: &str) -> Option<(String, u64)> {
    let status = bed.try_status(node)?;
    let its = status["targets"].as_array()?.iter().find(|t| t["node"] == target)?;
    Some((its["state"].as_str()?.to_owned(), its["connections"].as_u64()?))
}

/// Waits until a node's daemon shows a target in this state.
///
/// # Panics
/// When it does not.
pub fn wait_target(bed: &Bed, node: &str, name: &str, state: &str) {
    let is = || target(bed, node, name).is_some_and(|t| t.0 == state);
    assert!(wait_for(Duration::from_secs(20), is), "{name} is not {state}: {:?}", bed.try_status(node));
}

/// Clients that make requests on connections of their own until they are told to stop; each opens a new connection now and
/// then.
#[derive(Debug)]
pub struct Crowd {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

impl Crowd {
    /// So many clients, each asking for these in turn, with a pause after each, `on_one` of them on one connection.
    #[must_use]
    pub fn start(bed: &Bed, clients: usize, paths: &'static [&'static str], on_one: usize) -> Crowd {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let client = |number: usize| {
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            bed.spawn("client", move || {
                while !stop.load(Ordering::Relaxed) {
                    let mut c = Connection::to(&address("host"), 80)?;
                    for i in 0..on_one {
                        let path = paths[(number + i) % paths.len()];
                        c.get(path).map_err(|e| io::Error::other(format!("{path}, request {i}: {e}")))?;
                        answered.fetch_add(1, Ordering::Relaxed);
                        std::thread::sleep(Duration::from_millis(3));
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                    }
                }
                Ok(())
            })
        };
        let threads = (0..clients).map(client).collect();
        Crowd { stop, answered, threads }
    }

    /// Requests answered so far.
    #[must_use]
    pub fn answered(&self) -> usize {
        self.answered.load(Ordering::Relaxed)
    }

    /// Waits for so many answers more.
    ///
    /// # Panics
    /// When they do not come.
    pub fn go_on(&self, more: usize) {
        let end = self.answered() + more;
        let failed = || self.threads.iter().any(JoinHandle::is_finished);
        let went_on = wait_for(Duration::from_secs(30), || self.answered() >= end || failed());
        assert!(went_on, "clients are stuck");
    }

    /// Ends it: how many requests were answered.
    ///
    /// # Panics
    /// When one of them was not.
    pub fn end(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        let errors: Vec<_> =
            self.threads.into_iter().filter_map(|t| t.join().expect("no panic").err()).collect();
        assert!(errors.is_empty(), "{} clients failed: {errors:#?}", errors.len());
        self.answered.load(Ordering::Relaxed)
    }
}

/// Clients with one connection each, on which they ask again and again until they are told to leave.
#[derive(Debug)]
pub struct Regulars {
    all: Vec<Arc<Regular>>,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

#[derive(Debug, Default)]
struct Regular {
    /// The node that served last.
    node: Mutex<String>,
    answered: AtomicUsize,
    leaves: AtomicBool,
}

impl Regulars {
    /// So many clients, with a pause after each answer.
    #[must_use]
    pub fn start(bed: &Bed, clients: usize) -> Regulars {
        let all: Vec<_> = (0..clients).map(|_| Arc::new(Regular::default())).collect();
        let client = |one: &Arc<Regular>| {
            let one = Arc::clone(one);
            bed.spawn("client", move || one.ask())
        };
        let threads = all.iter().map(client).collect();
        Regulars { all, threads }
    }

    /// Those that were last served by this node leave; how many.
    #[must_use]
    pub fn leave(&self, node: &str) -> usize {
        let is_there = |c: &&Arc<Regular>| *c.node.lock().unwrap_or_else(PoisonError::into_inner) == node;
        let there: Vec<_> = self.all.iter().filter(is_there).collect();
        there.iter().for_each(|c| c.leaves.store(true, Ordering::Relaxed));
        there.len()
    }

    /// Each that is left gets so many answers more.
    ///
    /// # Panics
    /// When they do not come.
    pub fn go_on(&self, more: usize) {
        let staying: Vec<_> = self.all.iter().filter(|c| !c.leaves.load(Ordering::Relaxed)).collect();
        let answered = |c: &Arc<Regular>| c.answered.load(Ordering::Relaxed);
        let before: Vec<_> = staying.iter().map(|c| answered(c)).collect();
        let went_on = || staying.iter().zip(&before).all(|(c, n)| answered(c) >= n + more);
        assert!(wait_for(Duration::from_secs(30), went_on), "clients are stuck");
    }

    /// Ends it.
    ///
    /// # Panics
    /// When one of them was not answered.
    pub fn end(self) {
        self.all.iter().for_each(|c| c.leaves.store(true, Ordering::Relaxed));
        let ended = self.threads.into_iter().map(|t| t.join().expect("no panic"));
        let errors: Vec<_> = ended.filter_map(Result::err).collect();
        assert!(errors.is_empty(), "{} clients failed: {errors:#?}", errors.len());
    }
}

impl Regular {
    fn ask(&self) -> io::Result<()> {
        let mut c = Connection::to(&address("host"), 80)?;
        while !self.leaves.load(Ordering::Relaxed) {
            let node = c.get("/img/1k")?.node().to_owned();
            *self.node.lock().unwrap_or_else(PoisonError::into_inner) = node;
            self.answered.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}
