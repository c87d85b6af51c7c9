//! Which machine gets a request: by key, by load, by what state the machines are in, and by policies that change.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use xo_proto::http::{Head, parse_head};
use xo_proto::policy::{Decision, Here, Idle, Pick, Policy};
use xo_tests::counters::Counters;
use xo_tests::pool::{self, Crowd, Pool, Regulars, peerd_says, wait_target};
use xo_tests::program::wait_for;
use xo_tests::servers::address;
use xo_tests::{Bed, Connection};

fn keyed(key: usize) -> String {
    format!("GET /img/1k HTTP/1.1\r\nHost: xo.test\r\nX-Key: key-{key}\r\n\r\n")
}

/// The node that a policy names for this key.
fn named(policy: &Policy, key: usize) -> String {
    let request = keyed(key);
    let Head::Complete(head) = parse_head(request.as_bytes()) else { panic!("{request}") };
    let Decision::Choose(choice) = policy.decide(&head) else { panic!("no rule for {request}") };
    match choice.pick(&Here { node: "host", ..Here::default() }, &Idle) {
        Pick::To(c) => c.name.clone(),
        _ => "host".into(),
    }
}

/// The nodes that have served so many keys, asked for over some connections at the same time.
fn served(bed: &Bed, keys: usize, connections: usize) -> Vec<String> {
    let client = |first: usize| {
        bed.spawn("client", move || {
            let mut c = Connection::to(&address("host"), 80).expect("connect");
            let ask = |key: usize| {
                c.send(keyed(key).as_bytes()).expect("send");
                (key, c.object("/img/1k").unwrap_or_else(|e| panic!("key {key}: {e}")).node().to_owned())
            };
            (first..keys).step_by(connections).map(ask).collect::<Vec<_>>()
        })
    };
    let threads: Vec<_> = (0..connections).map(client).collect();
    let all: BTreeMap<_, _> = threads.into_iter().flat_map(|t| t.join().expect("no panic")).collect();
    all.into_values().collect()
}

#[test]
fn a_key_is_served_where_the_hash_says() {
    const KEYS: usize = 400;
    let bed = Bed::up(3, 1);
    let rule = "[[rule]]\npath_prefix = \"/img/\"\nto = [\"local\", \"t1\", \"t2\"]\n\
                balance = \"hash\"\nkey = \"header:x-key\"\nhandler = \"web\"\n";
    let (before, after) =
        (pool::policy(&bed, rule), pool::policy(&bed, &rule.replace("\"t2\"]", "\"t2\", \"t3\"]")));
    let pool = Pool::up(&bed, rule);
    let expected = |text: &str| {
        let policy = Policy::parse(text).expect("a policy");
        (0..KEYS).map(|key| named(&policy, key)).collect::<Vec<_>>()
    };
    assert_eq!(served(&bed, KEYS, 8), expected(&before));
    pool.write(&after);
    for node in bed.servers() {
        // The file is looked at once a second.
        let new = || bed.status(&node, "/policy_epoch") == 2;
        assert!(wait_for(Duration::from_secs(10), new), "{:?}", bed.try_status(&node));
    }
    let all = served(&bed, KEYS, 8);
    assert_eq!(all, expected(&after));
    let moved = all.iter().zip(expected(&before)).filter(|(now, then)| *now != then);
    let moved: Vec<_> = moved.map(|(now, _)| now.as_str()).collect();
    assert!(moved.iter().all(|node| *node == "t3"), "{moved:?}");
    println!("{} of {KEYS} keys moved to the new target", moved.len());
    // A quarter, within five standard deviations.
    assert!((57..=143).contains(&moved.len()), "{}", moved.len());
    for node in bed.servers() {
        let status = bed.try_status(&node).expect("a status");
        println!("{node}: {} {}", status["refused_by_reason"], status["library"]);
    }
}

/// So many connections, each with one request served.
fn open(bed: &Bed, count: usize) -> Vec<(String, Connection)> {
    bed.on("client", move || {
        let one = || {
            let mut c = Connection::to(&address("host"), 80).expect("connect");
            let node = c.get("/img/1k").expect("an answer").node().to_owned();
            (node, c)
        };
        (0..count).map(|_| one()).collect()
    })
}

fn count(connections: &[(String, Connection)]) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    for (node, _) in connections {
        *counts.entry(node.as_str()).or_default() += 1;
    }
    counts
}

#[test]
fn the_least_loaded_gets_the_next() {
    let bed = Bed::up(2, 1);
    let rule = "[[rule]]\npath_prefix = \"/img/\"\nto = [\"t1\", \"t2\"]\nbalance = \"BALANCE\"\nhandler = \"web\"\n";
    for (balance, slack) in [("least_loaded", 4), ("random_two", 8)] {
        let _pool = Pool::up(&bed, &rule.replace("BALANCE", balance));
        let mut connections = open(&bed, 40);
        println!("{balance}: {:?}", count(&connections));
        assert!(count(&connections)["t1"].abs_diff(20) <= slack, "{:?}", count(&connections));
        // All that are on t1 leave.
        connections.retain(|(node, _)| node == "t2");
        let left = connections.len() as u64;
        let noticed = || {
            let status = bed.try_status("host")?;
            let targets = status["targets"].as_array()?;
            let serves = |name: &str| targets.iter().find(|t| t["node"] == name)?["serves"].as_u64();
            Some(serves("t1")? == 0 && serves("t2")? == left)
        };
        assert!(
            wait_for(Duration::from_secs(10), || noticed() == Some(true)),
            "{:?}",
            bed.try_status("host")
        );
        connections.extend(open(&bed, 20));
        let counts = count(&connections);
        println!("{balance}: {counts:?} after those of one have left");
        assert!(counts["t1"].abs_diff(counts["t2"]) <= 2 * slack, "{counts:?}");
        drop(connections);
        bed.wait_idle(&["host", "t1", "t2"]);
    }
}

/// Connections at each target, as the host has them; `None` while they are not so many in all, or no machine would rest:
/// one has more than its share and more than a quarter above the least loaded.
fn balanced(bed: &Bed, all: usize) -> Option<BTreeMap<String, u64>> {
    let targets = bed.servers().into_iter().filter(|n| n != "host");
    let loads = targets.map(|t| Some((t.clone(), pool::target(bed, "host", &t)?.1)));
    let loads = loads.collect::<Option<BTreeMap<_, _>>>()?;
    let (sum, least) = (loads.values().sum::<u64>(), loads.values().min()? + 1);
    let mean = sum.div_ceil(loads.len() as u64);
    let rests = |n: &u64| *n <= mean || *n * 4 <= least * 5;
    (sum == all as u64 && loads.values().all(rests)).then_some(loads)
}

#[test]
fn connections_move_to_a_target_that_has_less_to_do() {
    const CLIENTS: usize = 64;
    let bed = Bed::up(4, 1);
    let rule = "[[rule]]\npath_prefix = \"/img/\"\nto = [\"t1\", \"t2\", \"t3\", \"t4\"]\n\
                balance = \"least_loaded\"\nsticky = \"balanced\"\nhandler = \"web\"\n";
    let _pool = Pool::up(&bed, rule);
    let before = Counters::of(&bed);
    let regulars = Regulars::start(&bed, CLIENTS);
    let moves = || bed.servers().iter().map(|n| bed.status(n, "/onward_total")).sum::<u64>();
    let balance = |all| {
        let mut loads = None;
        let in_time = wait_for(Duration::from_secs(30), || {
            loads = balanced(&bed, all);
            loads.is_some()
        });
        assert!(in_time, "{:?}", bed.try_status("host"));
        // It stays so. A move may be under way still, decided on by the last but one report.
        let at_rest = wait_for(Duration::from_secs(30), || {
            let before = moves();
            regulars.go_on(30);
            moves() == before
        });
        assert!(at_rest, "connections move to and fro: {:?}", bed.try_status("host"));
        println!("{loads:?} after {} moves", moves());
    };
    balance(CLIENTS);
    let so_far = moves();
    let left = CLIENTS - regulars.leave("t1");
    assert!(left < CLIENTS, "nobody was at t1");
    balance(left);
    assert!(moves() > so_far, "nobody has moved");
    let counted = Counters::of(&bed).since(&before);
    assert_eq!(counted.get_on("client", "EstabResets"), 0, "{}", counted.troubles());
    regulars.end();
    bed.wait_idle(&["host", "t1", "t2", "t3", "t4"]);
}

const BY_TURNS: &str = "[[rule]]\npath_prefix = \"/img/\"\nto = [\"t1\", \"t2\"]\nhandler = \"web\"\n\
                        [[rule]]\npath_prefix = \"/loc/\"\nto = [\"t1\"]\nhandler = \"web\"\n";

#[test]
fn a_target_is_drained_under_load() {
    let bed = Bed::up(2, 1);
    let mut pool = Pool::up(&bed, BY_TURNS);
    let crowd = Crowd::start(&bed, 24, &["/img/1k", "/img/64k", "/loc/1k"], 400);
    crowd.go_on(500);
    assert!(pool::target(&bed, "host", "t1").is_some_and(|(_, n)| n > 0), "{:?}", bed.try_status("host"));
    let output = peerd_says(&bed, "host", &["drain", "t1", "--wait", "--timeout", "20"]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("{said}");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(said.ends_with("t1: 0 connections left\n"), "{said}");
    crowd.go_on(500);
    assert_eq!(pool::target(&bed, "host", "t1"), Some(("draining".into(), 0)));
    // The next daemon knows it too.
    pool.kill_daemon("host");
    pool.start_daemon(&bed, "host");
    crowd.go_on(500);
    let now = pool::target(&bed, "host", "t1");
    assert_eq!(now, Some(("draining".into(), 0)), "{:?}", bed.try_status("host"));
    assert_eq!(peerd_says(&bed, "host", &["undrain", "t1"]).status.code(), Some(0));
    let back = || pool::target(&bed, "host", "t1").is_some_and(|(state, n)| state == "up" && n > 0);
    assert!(wait_for(Duration::from_secs(20), back), "{:?}", bed.try_status("host"));
    println!("{} requests answered", crowd.end());
    bed.wait_idle(&["host", "t1", "t2"]);
    // An idle connection stays where it is; waiting for it ends in time.
    // Each of two workers has turns of its own: of three connections one has two.
    let idle = open(&bed, 3);
    assert!(count(&idle).contains_key("t1"), "{:?}", count(&idle));
    let output = peerd_says(&bed, "host", &["drain", "t1", "--wait", "--timeout", "0.5"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    drop(idle);
    let output = peerd_says(&bed, "host", &["drain", "t3"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("unknown target `t3`; did you mean"),
        "{output:?}"
    );
}

/// Opens connections until one is served by this node.
fn served_again(bed: &Bed, node: &str) {
    let again = || open(bed, 4).iter().any(|(n, _)| n == node);
    assert!(wait_for(Duration::from_secs(20), again), "{:?}", bed.try_status("host"));
}

#[test]
fn a_targets_server_is_stopped() {
    let bed = Bed::up(2, 1);
    let mut pool = Pool::up(&bed, BY_TURNS);
    served_again(&bed, "t1");
    pool.servers.remove("t1");
    assert!(wait_for(Duration::from_secs(10), || bed.status("t1", "/acceptors/web") == 0));
    let counts = open(&bed, 100);
    let counts = count(&counts);
    println!("{counts:?}");
    assert!(!counts.contains_key("t1") && counts["t2"] >= 90, "{counts:?}");
    assert!(bed.status("host", "/refused_by_reason/no_handler") <= 10, "{:?}", bed.try_status("host"));
    pool.start_server(&bed, "t1");
    served_again(&bed, "t1");
}

/// An answer, or none, on a connection: when that was opened, and who answered.
type Answers = Vec<(Instant, Result<String, String>)>;

/// Asks until told to stop; a connection that breaks is replaced.
fn persistent(bed: &Bed, stop: &Arc<AtomicBool>, number: usize) -> JoinHandle<Answers> {
    let stop = Arc::clone(stop);
    bed.spawn("client", move || {
        let mut all = Answers::new();
        while !stop.load(Ordering::Relaxed) {
            let opened = Instant::now();
            let mut c = Connection::to(&address("host"), 80).expect("connect");
            for i in 0..20 {
                let path = ["/img/1k", "/img/64k", "/img/1"][(number + i) % 3];
                let answer = c.get(path).map(|r| r.node().to_owned()).map_err(|e| format!("{path}: {e}"));
                let broken = answer.is_err();
                all.push((opened, answer));
                if broken || stop.load(Ordering::Relaxed) {
                    break;
                }
            }
        }
        all
    })
}

/// Its daemon stays: who asks it is told that nobody is there.
#[test]
fn a_targets_server_is_killed_under_load() {
    const CLIENTS: usize = 16;
    let bed = Bed::up(2, 1);
    let mut pool = Pool::up(&bed, BY_TURNS);
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..CLIENTS).map(|number| persistent(&bed, &stop, number)).collect();
    let served_by = |node: &str| bed.status(node, "/accepted_total");
    let both = || served_by("t1") > 50 && served_by("t2") > 50;
    assert!(wait_for(Duration::from_secs(30), both), "{:?}", bed.try_status("host"));
    // Master and workers, by SIGKILL.
    pool.servers.remove("t1");
    let noticed = || bed.status("t1", "/acceptors/web") == 0;
    assert!(wait_for(Duration::from_secs(10), noticed), "{:?}", bed.try_status("t1"));
    let (gone, before) = (Instant::now(), served_by("t2"));
    let went_on = wait_for(Duration::from_secs(30), || served_by("t2") > before + 200);
    stop.store(true, Ordering::Relaxed);
    let all: Vec<_> = clients.into_iter().flat_map(|c| c.join().expect("no panic")).collect();
    assert!(went_on, "{:?}", bed.try_status("host"));
    let (after, earlier): (Answers, Answers) = all.into_iter().partition(|(opened, _)| *opened > gone);
    let errors = |answers: &Answers| answers.iter().filter_map(|(_, a)| a.clone().err()).collect::<Vec<_>>();
    println!(
        "{} answers and {} ends before, {} answers after",
        earlier.len(),
        errors(&earlier).len(),
        after.len()
    );
    assert_eq!(errors(&after), Vec::<String>::new());
    let nodes: BTreeSet<_> = after.iter().flat_map(|(_, a)| a.clone().ok()).collect();
    assert!(nodes.contains("t2") && !nodes.contains("t1"), "{nodes:?}");
    assert!(bed.status("host", "/refused_by_reason/no_handler") > 0, "{:?}", bed.try_status("host"));
    pool.start_server(&bed, "t1");
    served_again(&bed, "t1");
}

#[test]
fn a_targets_daemon_is_killed() {
    let bed = Bed::up(2, 1);
    let mut pool = Pool::up(&bed, BY_TURNS);
    served_again(&bed, "t1");
    pool.kill_daemon("t1");
    wait_target(&bed, "host", "t1", "down");
    let counts = open(&bed, 40);
    let counts = count(&counts);
    assert_eq!((counts.get("t1"), counts.get("t2")), (None, Some(&40)));
    pool.start_daemon(&bed, "t1");
    wait_target(&bed, "host", "t1", "up");
    bed.wait_acceptors("t1", "web", 4);
    served_again(&bed, "t1");
    // With nobody left the host serves, and says why.
    pool.kill_daemon("t1");
    pool.kill_daemon("t2");
    wait_target(&bed, "host", "t1", "down");
    wait_target(&bed, "host", "t2", "down");
    let before = bed.status("host", "/library/no_target");
    assert_eq!(count(&open(&bed, 10)), BTreeMap::from([("host", 10)]));
    assert_eq!(bed.status("host", "/library/no_target") - before, 10);
}

#[test]
fn policies_come_and_go_under_load() {
    let bed = Bed::up(2, 1);
    let pool = Pool::up(&bed, BY_TURNS);
    let hashed = BY_TURNS.replace("handler", "balance = \"hash\"\nkey = \"path\"\nhandler");
    let moved = BY_TURNS.replace("[\"t1\", \"t2\"]", "[\"t2\", \"local\"]").replace("\"/loc/\"", "\"/lo\"");
    let policies = [BY_TURNS, &hashed, &moved].map(|rules| pool::policy(&bed, rules));
    let crowd = Crowd::start(&bed, 16, &["/img/1k", "/loc/1k", "/img/64k", "/loc/1", "/img/1"], 60);
    for round in 1..=100 {
        pool.write(&policies[round % 3]);
        for daemon in pool.daemons.values() {
            daemon.signal(libc::SIGHUP);
        }
        crowd.go_on(20);
    }
    let epochs = || bed.servers().iter().map(|n| bed.status(n, "/policy_epoch")).collect::<Vec<_>>();
    assert_eq!(epochs(), [101; 3]);
    // A broken one changes nothing.
    let broken = policies[0].replace("[\"t1\", \"t2\"]", "[\"t1\", \"t9\"]");
    pool.write(&broken);
    let noticed = || bed.servers().iter().all(|n| bed.status(n, "/policy_errors_total") == 1);
    assert!(wait_for(Duration::from_secs(10), noticed), "{:?}", bed.try_status("host"));
    let line = 1 + broken.lines().position(|l| l.contains("t9")).expect("a line");
    let error = format!("{}:{line}:13: unknown target `t9`; did you mean", pool.policy.display());
    assert!(pool.daemons["host"].output().contains(&error), "{error}");
    assert!(bed.try_status("host").is_some_and(|s| s["policy_error"].to_string().contains("unknown target")));
    crowd.go_on(200);
    let output = peerd_says(&bed, "host", &["reload"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert_eq!(epochs(), [101; 3]);
    // Without its second target, and by hand.
    fs::write(&pool.policy, policies[1].replace(", \"t2\"]", "]").replace("t2 = ", "# ")).expect("written");
    for node in bed.servers() {
        assert_eq!(peerd_says(&bed, &node, &["reload"]).status.code(), Some(0));
    }
    assert_eq!(epochs(), [102; 3]);
    crowd.go_on(200);
    println!("{} requests answered", crowd.end());
    bed.wait_idle(&["host", "t1", "t2"]);
    let gone = || bed.try_status("host").is_some_and(|s| !s["targets"].to_string().contains("\"t2\""));
    assert!(wait_for(Duration::from_secs(90), gone), "{:?}", bed.try_status("host"));
    assert_eq!(count(&open(&bed, 4)), BTreeMap::from([("t1", 4)]));
}
