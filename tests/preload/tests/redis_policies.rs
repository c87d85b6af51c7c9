//! Which Redis server gets a command, by policies that hash, drain and change, while clients go on.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use xo_proto::policy::{Decision, Here, Idle, Pick, Policy};
use xo_proto::resp::{Command, Requests};
use xo_tests::Bed;
use xo_tests::pool::{peerd_says, target};
use xo_tests::program::{Program, wait_for};
use xo_tests::redis::{Redis, Reply};
use xo_tests::servers::{PEER_PORT, address};

const HASHED: &str = "[[rule]]\nslots = [\"0-16383\"]\nto = [\"local\", \"t1\", \"t2\"]\nbalance = \"hash\"\nkey = \"slot\"\n\
                      handler = \"redis\"\n";

/// A policy of these rules for port 6379.
fn policy(protocol: &str, rules: &str) -> String {
    let target = |t: &str| format!("{t} = \"{}:{PEER_PORT}\"\n", address(t));
    format!(
        "listen = [{{ port = 6379, protocol = \"{protocol}\" }}]\n[targets]\n{}{}{rules}",
        target("t1"),
        target("t2")
    )
}

/// Redis on the host and two targets, with a policy file for all of them.
struct Shards {
    bed: Bed,
    /// Daemons, then servers.
    programs: Vec<Program>,
    file: PathBuf,
}

impl Shards {
    fn up() -> Shards {
        let bed = Bed::up(2, 1);
        let programs = bed.redis_servers(&[]);
        let file = bed.directory().join("slots.toml");
        Shards { bed, programs, file }
    }

    /// Puts another policy in the place of this one, in one step.
    fn write(&self, text: &str) {
        let new = self.bed.file("new.toml", text);
        std::fs::rename(new, &self.file).expect("in its place");
    }

    fn reload(&self) {
        for node in self.bed.servers() {
            let output = peerd_says(&self.bed, &node, &["reload"]);
            assert_eq!(output.status.code(), Some(0), "{output:?}");
        }
    }

    fn epochs(&self) -> Vec<u64> {
        self.bed.servers().iter().map(|n| self.bed.status(n, "/policy_epoch")).collect()
    }

    /// Commands on one connection, each with its reply.
    fn calls(&self, commands: Vec<Vec<String>>) -> Vec<Reply> {
        self.bed.on("client", move || {
            let mut c = Redis::to(&address("host")).expect("connect");
            commands.iter().map(|arguments| c.call(arguments).expect("a reply")).collect()
        })
    }

    /// The nodes that hold a key, straight from them.
    fn holders(&self) -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        for node in self.bed.servers() {
            let own = address(&node);
            let keys = self.bed.on(&node, move || Redis::to(&own)?.call(&["KEYS", "*"]));
            let Ok(Reply::Array(keys)) = keys else { panic!("{keys:?}") };
            for key in keys {
                let Reply::Bulk(key) = key else { panic!("{key:?}") };
                let key = String::from_utf8(key).expect("text");
                let other = all.insert(key.clone(), node.clone());
                assert_eq!(other, None, "{key} is on {node}, too");
            }
        }
        all
    }

    fn moves(&self) -> u64 {
        let all = ["/offloads_total", "/onward_total", "/sent_home_total"];
        self.bed.servers().iter().flat_map(|n| all.map(|pointer| self.bed.status(n, pointer))).sum()
    }
}

/// The node that a policy names for a key.
fn named(policy: &Policy, key: &str) -> String {
    let mut found = None;
    let look = |c: &Command| {
        let Decision::Choose(choice) = policy.decide(c) else { panic!("no rule for {key}") };
        found = Some(match choice.pick(&Here { node: "host", ..Here::default() }, &Idle) {
            Pick::To(c) => c.name.clone(),
            _ => "host".into(),
        });
        false
    };
    let _ = Requests::default().look(format!("GET {key}\r\n").as_bytes(), false, look, |_| ());
    found.expect("a command")
}

fn set(key: &str) -> Vec<String> {
    vec!["SET".into(), key.into(), format!("value of {key}")]
}

/// Clients that set and get keys of their own until told to stop; each opens a new connection now and then.
struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<Result<(), String>>>,
}

impl Load {
    fn start(bed: &Bed, clients: usize, on_one: usize) -> Load {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let client = |number: usize| {
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            bed.spawn("client", move || {
                let mut turn = 0;
                while !stop.load(Ordering::Relaxed) {
                    let mut c = Redis::to(&address("host")).map_err(|e| e.to_string())?;
                    for i in 0..on_one {
                        let key = format!("load:{number}:{}", turn % 97);
                        turn += 1;
                        let (command, wanted) = if i % 2 == 0 {
                            (set(&key), vec![Reply::ok()])
                        } else {
                            // It may have been set elsewhere, by another policy.
                            (
                                vec!["GET".into(), key.clone()],
                                vec![Reply::Null, Reply::bulk(&format!("value of {key}"))],
                            )
                        };
                        let got = c
                            .call(&command)
                            .map_err(|e| format!("{command:?}, {i} on this connection: {e}"))?;
                        if !wanted.contains(&got) {
                            return Err(format!("{command:?}: {got:?}"));
                        }
                        answered.fetch_add(1, Ordering::Relaxed);
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                        std::thread::sleep(Duration::from_millis(3));
                    }
                }
                Ok(())
            })
        };
        let threads = (0..clients).map(client).collect();
        Load { stop, answered, threads }
    }

    /// Waits for so many answers more.
    fn go_on(&self, more: usize) {
        let end = self.answered.load(Ordering::Relaxed) + more;
        let failed = || self.threads.iter().any(JoinHandle::is_finished);
        let went_on =
            wait_for(Duration::from_secs(30), || self.answered.load(Ordering::Relaxed) >= end || failed());
        assert!(went_on, "clients are stuck");
    }

    /// Ends it: how many commands were answered, all of them rightly.
    fn end(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        let errors: Vec<_> =
            self.threads.into_iter().filter_map(|t| t.join().expect("no panic").err()).collect();
        assert!(errors.is_empty(), "{} clients failed: {errors:#?}", errors.len());
        self.answered.load(Ordering::Relaxed)
    }
}

#[test]
fn slots_are_hashed_and_a_target_is_drained() {
    const KEYS: usize = 150;
    let shards = Shards::up();
    let bed = &shards.bed;
    let text = policy("redis", HASHED);
    shards.write(&text);
    shards.reload();
    let parsed = Policy::parse(&text).expect("a policy");
    let keys = |begin: &str| (0..KEYS).map(|i| format!("{begin}:{i}")).collect::<Vec<_>>();
    let first = keys("first");
    assert_eq!(shards.calls(first.iter().map(|k| set(k)).collect()), vec![Reply::ok(); KEYS]);
    let expected: BTreeMap<_, _> = first.iter().map(|k| (k.clone(), named(&parsed, k))).collect();
    assert_eq!(shards.holders(), expected);
    for node in bed.servers() {
        let its = expected.values().filter(|n| **n == node).count();
        println!("{node} has {its} keys");
        assert!(its > KEYS / 10);
    }
    // Each is found again, wherever the connection is.
    let gets = first.iter().rev().map(|k| vec!["GET".into(), k.clone()]).collect();
    let values: Vec<_> = first.iter().rev().map(|k| Reply::bulk(&format!("value of {k}"))).collect();
    assert_eq!(shards.calls(gets), values);

    // Drained under load: all connections leave, what belonged to the target is served by the others.
    let load = Load::start(bed, 8, 200);
    load.go_on(400);
    assert!(target(bed, "host", "t1").is_some_and(|(_, n)| n > 0), "{:?}", bed.try_status("host"));
    let output = peerd_says(bed, "host", &["drain", "t1", "--wait", "--timeout", "20"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    load.go_on(400);
    assert_eq!(target(bed, "host", "t1"), Some(("draining".into(), 0)));
    let second = keys("second");
    assert_eq!(shards.calls(second.iter().map(|k| set(k)).collect()), vec![Reply::ok(); KEYS]);
    println!("{} commands answered", load.end());
    let own = address("t1");
    let strays = bed.on("t1", move || Redis::to(&own)?.call(&["KEYS", "second:*"])).expect("keys");
    assert_eq!(strays, Reply::Array(Vec::new()));
    assert_eq!(peerd_says(bed, "host", &["undrain", "t1"]).status.code(), Some(0));
    // What is its own is there again.
    let at_t1: Vec<_> = first.iter().filter(|k| expected[*k] == "t1").cloned().collect();
    let found = || {
        let values = shards.calls(at_t1.iter().map(|k| vec!["GET".into(), k.clone()]).collect());
        values.iter().zip(&at_t1).all(|(value, k)| *value == Reply::bulk(&format!("value of {k}")))
    };
    assert!(wait_for(Duration::from_secs(10), found), "{:?}", bed.try_status("host"));
    bed.wait_idle(&["host", "t1", "t2"]);
}

#[test]
fn policies_come_and_go_under_load() {
    let shards = Shards::up();
    let bed = &shards.bed;
    let rule = |slots: &str, to: &str| {
        format!("[[rule]]\nslots = [\"{slots}\"]\nto = [{to}]\nhandler = \"redis\"\n")
    };
    let rules = [
        rule("0-5460", "\"local\"") + &rule("5461-10922", "\"t1\"") + &rule("10923-16383", "\"t2\""),
        HASHED.to_owned(),
        rule("0-8000", "\"t2\"") + &rule("8001-16383", "\"t1\", \"local\""),
    ];
    let policies = rules.map(|r| policy("redis", &r));
    let broken = policies[0].replace("10923-16383", "10923-16384");
    let begun = shards.epochs();
    let load = Load::start(bed, 12, 60);
    for round in 1..=100 {
        shards.write(&policies[round % 3]);
        shards.reload();
        // In between, one that is wrong.
        if round % 10 == 0 {
            shards.write(&broken);
            for node in bed.servers() {
                assert_eq!(peerd_says(bed, &node, &["reload"]).status.code(), Some(2));
            }
        }
        load.go_on(20);
    }
    let now: Vec<_> = begun.iter().map(|epoch| epoch + 100).collect();
    assert_eq!(shards.epochs(), now, "each of the hundred, and none that was broken");
    let line = 1 + broken.lines().position(|l| l.contains("16384")).expect("a line");
    let error = format!("{}:{line}:10: `16384` is not a slot", shards.file.display());
    assert!(shards.programs[0].output().contains(&error), "{error}: {}", shards.programs[0].output());
    load.go_on(200);
    println!("{} commands answered, {} moves", load.end(), shards.moves());
    for node in bed.servers() {
        let status = bed.try_status(&node).expect("a status");
        println!("{node}: refused {} failed {}", status["refused_by_reason"], status["failed_by_reason"]);
        assert_eq!(status["failed_total"], 0, "{node}");
        assert!(status["policy_errors_total"].as_u64().is_some_and(|n| n >= 10), "{status}");
    }
    // The one that was right last is in force.
    let parsed = Policy::parse(&policies[100 % 3]).expect("a policy");
    let keys: Vec<_> = (0..60).map(|i| format!("last:{i}")).collect();
    shards.calls(keys.iter().map(|k| set(k)).collect());
    let own: Vec<_> = shards
        .bed
        .servers()
        .into_iter()
        .map(|node| {
            let own = address(&node);
            let keys = shards.bed.on(&node, move || Redis::to(&own)?.call(&["KEYS", "last:*"]));
            (node, keys.expect("keys"))
        })
        .collect();
    for (node, keys) in own {
        let Reply::Array(keys) = keys else { panic!("{keys:?}") };
        for key in keys {
            let Reply::Bulk(key) = key else { panic!("{key:?}") };
            assert_eq!(named(&parsed, &String::from_utf8_lossy(&key)), node);
        }
    }
    bed.wait_idle(&["host", "t1", "t2"]);
}

#[test]
fn a_port_changes_its_protocol() {
    let shards = Shards::up();
    let bed = &shards.bed;
    let redis = bed.slots_policy();
    let http = policy("http", "[[rule]]\npath_prefix = \"/\"\nto = [\"t1\"]\nhandler = \"redis\"\n");
    let on = |protocol: &str| {
        shards.write(if protocol == "http" { &http } else { &redis });
        shards.reload();
    };
    // A key of each server, and one connection that has been at all of them.
    let parsed = Policy::parse(&redis).expect("a policy");
    let nodes = bed.servers();
    let key_of =
        |node: &String| (0..).map(|i| format!("k{i}")).find(|k| named(&parsed, k) == *node).expect("a key");
    let keys: Vec<_> = nodes.iter().map(key_of).collect();
    let values: Vec<_> = keys.iter().map(|k| Reply::bulk(&format!("value of {k}"))).collect();
    let get = |mut c: Redis| {
        let keys = keys.clone();
        bed.on("client", move || {
            let replies: Vec<_> = keys.iter().map(|k| c.call(&["GET", k]).expect("a reply")).collect();
            (c, replies)
        })
    };
    let new = || bed.on("client", || Redis::to(&address("host")).expect("connect"));
    shards.calls(keys.iter().map(|k| set(k)).collect());
    let (old, got) = get(new());
    assert_eq!(got, values);
    on("http");
    // A new connection is taken for HTTP, which it is not: it stays at the host, and is counted.
    let counted = || bed.status("host", "/library/not_http");
    let before = (counted(), shards.moves());
    let (stays, got) = get(new());
    let host = nodes.iter().position(|n| n == "host").expect("the host");
    let only: Vec<_> =
        (0..values.len()).map(|i| if i == host { values[i].clone() } else { Reply::Null }).collect();
    assert_eq!(got, only);
    assert_eq!((counted(), shards.moves()), (before.0 + 1, before.1));
    // The old one is still followed as what it is; no rule is about it any more.
    let (old, got) = get(old);
    assert!(got.iter().zip(&values).all(|(got, value)| got == value || *got == Reply::Null), "{got:?}");
    on("redis");
    let (old, got) = get(old);
    assert_eq!(got, values, "it moves again");
    let (_, got) = get(new());
    assert_eq!(got, values);
    // One that was given up stays given up.
    let (stays, got) = get(stays);
    assert_eq!(got, only);
    drop((old, stays));
    bed.wait_idle(&["host", "t1", "t2"]);
}
