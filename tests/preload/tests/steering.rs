//! What routers have to say about an offloaded connection reaches the machine that serves it, and what the connection has
//! learnt about its path.

use std::process::Command;
use std::time::{Duration, Instant};

use xo_proto::conn::window_after_idle;
use xo_tests::program::wait_for;
use xo_tests::servers::{PeerdOptions, WEB, address, address6};
use xo_tests::{Bed, Connection};

/// Of the link to the client. All links have 1500 at first.
const NARROW: u32 = 1400;
/// The kernel's TCP_RTO_MIN.
const SHORTEST_TIMEOUT_US: u32 = 200_000;

fn set_mtu(bed: &Bed, mtu: u32) {
    bed.run("router", Command::new("ip").args(["link", "set", "r1", "mtu", &mtu.to_string()]));
}

/// The router drops what is too long for the link to the client, and tells the sender, who by the packet's source is the
/// host. Without that message the target would send the same segments again and again.
#[test]
fn a_download_goes_on_when_a_link_gets_narrow() {
    let bed = Bed::up(1, 1);
    let _programs = bed.everything();
    for (n, host, client) in
        [(1, address("host"), address("client")), (2, address6("host"), address6("client"))]
    {
        let quoted = || bed.status("host", "/steering/packets/quote_steered");
        let before = quoted();
        let mut c = bed.on("client", move || {
            let mut c = Connection::to(&host, 80).expect("connect");
            assert_eq!(c.get("/img/1k").expect("a small one").node(), "t1");
            c.send(b"GET /img/20m HTTP/1.1\r\nHost: xo.test\r\n\r\n").expect("send");
            // It has begun. The client reads nothing: its window closes long before the end.
            c.stream().peek(&mut [0]).expect("the beginning");
            c
        });
        assert_eq!(quoted(), before, "nothing was too long yet");
        set_mtu(&bed, NARROW);
        let node = c.object("/img/20m").unwrap_or_else(|e| panic!("{client}: {e}")).node().to_owned();
        assert_eq!(node, "t1");
        assert!(quoted() > before, "the host steered no message");
        let route = bed.run("t1", Command::new("ip").args(["route", "get", &client]));
        assert!(route.contains(&format!("mtu {NARROW}")), "t1 was not told: {route}");
        let there = bed.run("host", Command::new("ip").args(["route", "get", &client]));
        assert!(!there.contains("mtu"), "what t1 sent is none of the host's business: {there}");
        assert_eq!(c.get("/img/64k").expect("the next").node(), "t1");
        assert_eq!(bed.status("host", "/offloads_total"), n, "one move for each connection");
        set_mtu(&bed, 1500);
    }
    bed.wait_idle(&["host", "t1"]);
}

/// That the client cannot be reached any more is no reason to end (RFC 1122, 4.2.3.9), but it must not be the host's
/// stack that is told: it has no such connection.
#[test]
fn a_client_that_cannot_be_reached_for_a_while_is_served_afterwards() {
    let bed = Bed::up(1, 1);
    let _programs = bed.everything();
    let mut c = bed.on("client", || {
        let mut c = Connection::to(&address("host"), 80).expect("connect");
        assert_eq!(c.get("/img/1k").expect("a small one").node(), "t1");
        c.send(b"GET /img/20m HTTP/1.1\r\nHost: xo.test\r\n\r\n").expect("send");
        c.stream().peek(&mut [0]).expect("the beginning");
        c
    });
    let client = format!("{}/32", address("client"));
    bed.run("router", Command::new("ip").args(["route", "add", "unreachable", &client]));
    let reader = std::thread::spawn(move || c.object("/img/20m").map(|r| r.node().to_owned()));
    let told =
        wait_for(Duration::from_secs(20), || bed.status("host", "/steering/packets/quote_steered") > 0);
    bed.run("router", Command::new("ip").args(["route", "del", "unreachable", &client]));
    assert!(told, "no message was steered");
    assert_eq!(reader.join().expect("the reader").expect("the rest"), "t1");
    bed.wait_idle(&["host", "t1"]);
}

/// The congestion window of the only connection to port 80 of a node, segments.
fn window(bed: &Bed, node: &str) -> u32 {
    let state =
        bed.run(node, Command::new("ss").args(["-tinH", "state", "established", "sport", "=", ":80"]));
    let words: Vec<_> = state.split_whitespace().filter_map(|w| w.strip_prefix("cwnd:")).collect();
    let [window] = words.as_slice() else { panic!("one connection on {node}: {state}") };
    window.parse().expect("a number")
}

/// What a connection has learnt about its path goes with it, up to the limits (without one up to 256 segments at least, for the path is
/// short); without that it begins like a new one.
#[test]
fn the_congestion_window_goes_with_the_connection() {
    for (limits, sure, limit) in [("", 256, 4096), ("max_cwnd = 20", 20, 20), ("carry_cwnd = false", 10, 10)]
    {
        let bed = Bed::up(1, 1);
        for node in ["host", "t1"] {
            // Its window does not depend on how fast this machine is at the moment.
            bed.run(node, Command::new("sysctl").args(["-qw", "net.ipv4.tcp_congestion_control=reno"]));
        }
        let sections = format!("{WEB}\n[limits]\n{limits}\n");
        let _programs = bed.everything_with(&PeerdOptions { sections, ..PeerdOptions::default() });
        let mut c = bed.on("client", || Connection::to(&address("host"), 80).expect("connect"));
        let mut idle_since = Instant::now();
        for _ in 0..4 {
            idle_since = Instant::now();
            assert_eq!(c.get("/loc/1m").expect("a large one").node(), "host");
        }
        let before = window(&bed, "host");
        assert!(before > 20, "the window has not grown: {before}");
        // So short that the window stays what it is.
        assert_eq!(c.get("/img/1").expect("a small one").node(), "t1");
        let idle_us = u64::try_from(idle_since.elapsed().as_micros()).expect("not for ever");
        let after = window(&bed, "t1");
        println!("{limits}: {before} before, {after} after");
        // A machine that takes its time lets the window age.
        let least = window_after_idle(before, idle_us, SHORTEST_TIMEOUT_US).min(sure);
        assert!((least..=before.min(limit)).contains(&after), "{limits}: {before} before, {after} after");
    }
}
