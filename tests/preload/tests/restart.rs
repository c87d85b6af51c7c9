//! Daemons come and go; connections do not notice.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use xo_tests::counters::Counters;
use xo_tests::program::{Program, wait_for};
use xo_tests::servers::{PeerdOptions, address};
use xo_tests::{Bed, Connection};

/// Connections of the client, each with one request served where it was sent.
fn offloaded(bed: &Bed, count: u32, path: &'static str) -> Vec<Connection> {
    bed.on("client", move || {
        (0..count)
            .map(|_| {
                let mut c = Connection::to(&address("host"), 80).expect("connect");
                assert_eq!(c.get(path).expect(path).node(), "t1");
                c
            })
            .collect()
    })
}

/// One request on each connection; all are answered by the target.
fn used(bed: &Bed, mut connections: Vec<Connection>) -> Vec<Connection> {
    bed.on("client", move || {
        for c in &mut connections {
            assert_eq!(c.get("/img/64k").expect("an answer").node(), "t1");
        }
        connections
    })
}

/// The client has seen no reset. (Daemons that die reset their own channels, so others' counters say nothing.)
fn no_reset(bed: &Bed, before: &Counters) {
    let counted = Counters::of(bed).since(before);
    assert_eq!(counted.get_on("client", "EstabResets"), 0, "{}", counted.troubles());
    assert_eq!(counted.get_on("client", "OutRsts"), 0, "{}", counted.troubles());
}

fn kill(daemon: Program) {
    daemon.signal(libc::SIGKILL);
    drop(daemon);
}

#[test]
fn offloaded_connections_run_on_without_daemons() {
    let bed = Bed::up(1, 1);
    let options = PeerdOptions::default();
    let mut daemons = ["host", "t1"].map(|n| Some(bed.peerd(n, &options)));
    let _servers = ["host", "t1"].map(|n| bed.nginx(n));
    bed.wait_acceptors("t1", "web", 4);
    let mut connections = offloaded(&bed, 10, "/img/1k");
    let before = Counters::of(&bed);
    for (i, node) in ["host", "t1"].into_iter().enumerate() {
        for signal in [libc::SIGKILL, libc::SIGTERM] {
            let mut daemon = daemons[i].take().expect("a daemon");
            if signal == libc::SIGKILL {
                kill(daemon);
            } else {
                assert_eq!(daemon.stop(), Some(0), "{}", daemon.output());
            }
            connections = used(&bed, connections);
            daemons[i] = Some(bed.peerd(node, &options));
            let pointer = if node == "host" { "/flows_hosted" } else { "/flows_served" };
            assert!(
                wait_for(Duration::from_secs(10), || bed.status(node, pointer) == 10),
                "{:?}",
                bed.try_status(node)
            );
            connections = used(&bed, connections);
        }
    }
    no_reset(&bed, &before);
    bed.wait_acceptors("t1", "web", 4);
    drop(connections);
    bed.wait_idle(&["host", "t1"]);
    // New connections move again, through the libraries that were there before.
    drop(offloaded(&bed, 3, "/img/1k"));
    bed.wait_idle(&["host", "t1"]);
}

/// One request that hangs in the middle of its hand-off because the target's daemon is stopped.
fn hanging(bed: &Bed) -> std::thread::JoinHandle<(String, Duration)> {
    let asked = bed.status("host", "/library/asked");
    let thread = bed.spawn("client", || {
        let begun = Instant::now();
        let mut c = Connection::to(&address("host"), 80).expect("connect");
        let node = c.get("/img/64k").expect("an answer").node().to_owned();
        (node, begun.elapsed())
    });
    assert!(wait_for(Duration::from_secs(10), || bed.status("host", "/library/asked") > asked));
    thread
}

/// A bed with daemons that use this order, and servers; connections have moved, so the channel is up, and known to be
/// quick.
fn moving(order: &str) -> (Bed, PeerdOptions, Program, Program, [Program; 2]) {
    let bed = Bed::up(1, 1);
    let head = format!("insecure = true\nhandoff = \"{order}\"");
    let options = PeerdOptions { head, ..PeerdOptions::default() };
    let (target, host) = (bed.peerd("t1", &options), bed.peerd("host", &options));
    let servers = ["host", "t1"].map(|n| bed.nginx(n));
    bed.wait_acceptors("t1", "web", 4);
    drop(offloaded(&bed, 2, "/img/1k"));
    bed.wait_idle(&["host", "t1"]);
    (bed, options, host, target, servers)
}

#[test]
fn the_hosts_daemon_is_killed_while_the_target_is_asked() {
    for order in ["early", "strict"] {
        let (bed, options, host, target, _servers) = moving(order);
        let before = Counters::of(&bed);
        target.signal(libc::SIGSTOP);
        let request = hanging(&bed);
        kill(host);
        let _host = bed.peerd("host", &options);
        let (node, took) = request.join().expect("served");
        target.signal(libc::SIGCONT);
        assert_eq!(node, "host", "{order}: the next daemon gives the connection back");
        println!("{order}: {took:?} with the host's daemon killed in between");
        no_reset(&bed, &before);
        bed.wait_idle(&["host", "t1"]);
        assert_eq!(used(&bed, offloaded(&bed, 1, "/img/1k")).len(), 1);
    }
}

#[test]
fn the_targets_daemon_is_killed_while_it_is_asked() {
    for order in ["early", "strict"] {
        let (bed, _, _host, target, _servers) = moving(order);
        let before = Counters::of(&bed);
        target.signal(libc::SIGSTOP);
        let request = hanging(&bed);
        kill(target);
        let (node, took) = request.join().expect("served");
        assert_eq!(node, "host", "{order}");
        println!("{order}: {took:?} with the target's daemon killed in between");
        no_reset(&bed, &before);
        bed.wait_idle(&["host"]);
    }
}

#[test]
fn a_target_that_answers_too_late() {
    for order in ["early", "strict"] {
        let (bed, _, _host, target, _servers) = moving(order);
        let before = Counters::of(&bed);
        target.signal(libc::SIGSTOP);
        let (node, took) = hanging(&bed).join().expect("served");
        assert_eq!(node, "host", "{order}");
        println!("{order}: {took:?} with a target that does not answer");
        // It wakes up with an old BEGIN_OFFLOAD in its hands, and must not serve it.
        target.signal(libc::SIGCONT);
        bed.wait_idle(&["host", "t1"]);
        no_reset(&bed, &before);
        assert_eq!(bed.status("t1", "/accepted_total"), 2, "{order}");
        let moves = || {
            bed.on("client", || {
                let mut c = Connection::to(&address("host"), 80).expect("connect");
                c.get("/img/1k").expect("an answer").node() == "t1"
            })
        };
        // It has a second's worth of old messages to get through first.
        assert!(wait_for(Duration::from_secs(10), moves), "{order}: {:?}", bed.try_status("host"));
    }
}

/// Clients that open a connection, make a few requests, close it, again and again; daemons are killed at random moments
/// meanwhile and started again. Every request must be answered.
fn killed_under_load(victim: &str) {
    let bed = Bed::up(1, 1);
    let options = PeerdOptions::default();
    let mut daemons = ["host", "t1"].map(|n| Some(bed.peerd(n, &options)));
    let _servers = ["host", "t1"].map(|n| bed.nginx(n));
    bed.wait_acceptors("t1", "web", 4);
    let stop = Arc::new(AtomicBool::new(false));
    let answered = Arc::new(AtomicU32::new(0));
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            bed.spawn("client", move || {
                while !stop.load(Ordering::Relaxed) {
                    let mut c = Connection::to(&address("host"), 80).expect("connect");
                    for path in ["/loc/1k", "/img/1k", "/img/64k"] {
                        let from = c.stream().local_addr();
                        c.get(path).unwrap_or_else(|e| panic!("{path} from {from:?}: {e}"));
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                }
            })
        })
        .collect();
    let i = if victim == "host" { 0 } else { 1 };
    for round in 0..12_u64 {
        // Connections move again, and are in all stages of it.
        let moved = || bed.status("host", "/offloads_total");
        let before = if victim == "host" && round > 0 { 0 } else { moved() };
        let ok = wait_for(Duration::from_secs(20), || {
            moved() >= before + 5 + round || clients.iter().any(|c| c.is_finished())
        });
        assert!(ok, "round {round}: clients are stuck: {:?}", bed.try_status("host"));
        kill(daemons[i].take().expect("a daemon"));
        daemons[i] = Some(bed.peerd(victim, &options));
    }
    stop.store(true, Ordering::Relaxed);
    let failed: Vec<_> = clients.into_iter().filter_map(|c| c.join().err()).collect();
    assert!(failed.is_empty(), "{} clients failed", failed.len());
    println!("{} requests answered, {victim}'s daemon killed 12 times", answered.load(Ordering::Relaxed));
    bed.wait_idle(&["host", "t1"]);
}

#[test]
fn the_hosts_daemon_is_killed_under_load() {
    killed_under_load("host");
}

#[test]
fn the_targets_daemon_is_killed_under_load() {
    killed_under_load("t1");
}
