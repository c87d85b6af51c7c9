//! Hybrid steering with the kernel's flow rules: daemon, library and nginx; moved connections get a rule, which carries their packets
//! until it is withdrawn.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use xo_flower::{ANCHOR, Channel, Hook, Place, Rewrite, Rule};
use xo_tests::counters::Counters;
use xo_tests::program::wait_for;
use xo_tests::random::setting;
use xo_tests::servers::{address, address6};
use xo_tests::{Bed, Connection, content};

/// Of the daemon's rules.
const PREFERENCE: u16 = 0x584f;
const UPLOAD: usize = 300_000;
const LIMIT: Duration = Duration::from_secs(20);
const CONNECTIONS: usize = 4;
/// Of each connection: to t1, on to t2, and home. XO_ROUND_TRIPS sets another number.
const ROUND_TRIPS: u64 = 250;

/// A rule of the daemon's, by its name.
fn named(interface: u32, handle: u32, v6: bool) -> Rule {
    let any: SocketAddr =
        if v6 { (Ipv6Addr::UNSPECIFIED, 0).into() } else { (Ipv4Addr::UNSPECIFIED, 0).into() };
    Rule {
        interface,
        hook: Hook::Ingress,
        place: Place::Software,
        preference: PREFERENCE,
        handle,
        source: any,
        destination: any,
        ends: false,
        rewrite: Rewrite::default(),
    }
}

fn paths(bed: &Bed, names: [&str; 2]) -> [u64; 2] {
    names.map(|name| bed.status("host", &format!("/steering/packets/{name}")))
}

/// The host's rules, each as one line.
fn filters(bed: &Bed) -> Vec<String> {
    let shown = bed.run("host", Command::new("tc").args(["filter", "show", "dev", "eth0", "ingress"]));
    shown.lines().filter(|line| line.contains("handle")).map(str::to_owned).collect()
}

/// Asks until a node answers. All have everything: a machine as slow as an emulated one may refuse a move, and serves where it is.
fn goes_to(c: &mut Connection, place: &str) {
    let path = format!("/img/{place}/1k");
    let there = wait_for(LIMIT, || c.get(&path).expect("a response").node() == place);
    assert!(there, "the connection does not go to {place}");
}

/// One connection goes away, gets the daemon's rule with this handle, and comes home.
fn a_rule_carries_and_goes(bed: &Bed, channel: &mut Channel, (interface, handle): (u32, u32), to: String) {
    let v6 = to.contains(':');
    let rule = named(interface, handle, v6);
    let before = Counters::of(bed);
    let mut c = bed.on("client", move || Connection::to(&to, 80).expect("connect"));
    goes_to(&mut c, "t1");
    assert!(wait_for(LIMIT, || channel.packets(&rule).is_ok()), "no rule: {}", bed.flows("host"));
    let left = || paths(bed, ["left_to_rule", "redirected"]);
    let begun = left()[0];
    assert!(
        wait_for(LIMIT, || {
            assert_eq!(c.get("/img/t1/1k").expect("a response").node(), "t1");
            left()[0] > begun
        }),
        "nothing is left to the rule"
    );
    let (carried, [passed, redirected]) = (channel.packets(&rule).expect("a rule"), left());
    c.put("/up/t1/upload", &content::of("/up/t1/upload", UPLOAD)).expect("an upload");
    // The last acknowledgement may be on its way.
    let mut seen = Default::default();
    let agrees = wait_for(LIMIT, || {
        seen = (channel.packets(&rule).expect("a rule") - carried, left());
        seen.0 == seen.1[0] - passed
    });
    println!(
        "an upload of {UPLOAD} bytes: {} packets by the rule, {} by eBPF",
        seen.0,
        seen.1[1] - redirected
    );
    assert!(agrees && seen.0 >= UPLOAD as u64 / 1448, "{seen:?}, {carried} and {passed} before");
    assert_eq!(seen.1[1], redirected, "the eBPF entry redirects no more");

    goes_to(&mut c, "host");
    assert!(wait_for(LIMIT, || bed.status("host", "/flows_hosted") == 0), "{}", bed.flows("host"));
    assert!(channel.packets(&rule).is_err(), "the connection is home, the rule is there still");
    c.put("/up/host/upload", &content::of("/up/host/upload", UPLOAD)).expect("an upload");
    assert_eq!(c.get("/img/host/1k").expect("a response").node(), "host");
    Counters::of(bed).since(&before).no_reset(bed);
}

/// To and fro; in each place for some requests, so that rules are met at every stage. How often the first of them was answered elsewhere.
fn travel(to: &str, number: usize, rounds: usize) -> std::io::Result<usize> {
    let mut elsewhere = 0;
    let mut c = Connection::to(to, 80)?;
    for round in 0..rounds {
        for (place, stay) in [("t1", (number + round) % 5), ("t2", round % 3), ("host", 0)] {
            let path = format!("/img/{place}/1k");
            elsewhere += usize::from(c.get(&path)?.node() != place);
            for _ in 0..stay * 2 {
                c.get(&path)?;
            }
        }
    }
    Ok(elsewhere)
}

#[test]
#[ignore = "needs a kernel with cls_flower: scripts/vm"]
fn the_kernels_rules_carry_moved_connections_until_they_come_home() {
    let bed = Bed::up(2, 1);
    // act_csum leaves aggregates alone.
    bed.run("client", Command::new("ip").args(["link", "set", "eth0", "gso_max_segs", "1"]));
    // By the daemons' word no connection would be worth a rule, but by the policy's all are.
    let options = bed.sharded_options("steering.flower = \"software\"\nsteering.flower_after = \"1GiB\"");
    bed.file("shards.toml", &bed.sharded_policy().replace("to = [\"t", "flower_after = \"0\"\nto = [\"t"));
    let mut programs: Vec<_> = bed.servers().iter().map(|n| bed.peerd(n, &options)).collect();
    programs.extend(bed.sharded_servers(true));
    let status = bed.try_status("host").expect("a status");
    assert_eq!(status["steering"]["flower_on"], "eth0", "{}", status["steering"]);
    let shown = bed.run("host", Command::new("ip").args(["-j", "link", "show", "eth0"]));
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    let interface = shown[0]["ifindex"].as_u64().and_then(|n| u32::try_from(n).ok()).expect("a number");
    let mut channel = bed.on("host", || Channel::open().expect("netlink"));
    for (handle, to) in [(1, address("host")), (2, address6("host"))] {
        a_rule_carries_and_goes(&bed, &mut channel, (interface, handle), to);
    }

    let rounds = usize::try_from(setting("XO_ROUND_TRIPS", ROUND_TRIPS)).expect("a number");
    let (before, begun) = (Counters::of(&bed), Instant::now());
    let travellers: Vec<_> = (0..CONNECTIONS)
        .map(|n| {
            let to = if n % 2 == 0 { address("host") } else { address6("host") };
            bed.spawn("client", move || travel(&to, n, rounds))
        })
        .collect();
    let mut elsewhere = 0;
    for (n, traveller) in travellers.into_iter().enumerate() {
        elsewhere += traveller.join().expect("no panic").unwrap_or_else(|e| panic!("connection {n}: {e}"));
    }
    bed.wait_idle(&["host", "t1", "t2"]);
    let status = bed.try_status("host").expect("a status");
    let (all, took) = (CONNECTIONS * rounds, begun.elapsed());
    println!("{all} round trips in {took:.1?}, {elsewhere} moves refused: {}", status["steering"]);
    // No packet came to a dead end.
    Counters::of(&bed).since(&before).no_reset(&bed);
    let count = |name: &str| status["steering"][name].as_u64().expect("a count");
    assert!(count("rules_inserted") >= (CONNECTIONS * rounds / 4) as u64, "{}", status["steering"]);
    assert_eq!((count("rules"), count("rules_refused"), count("queue_depth")), (0, 0, 0));
    for node in bed.servers() {
        let status = bed.try_status(&node).expect("a status");
        assert_eq!(status["failed_total"], 0, "{node}: {}", status["failed_by_reason"]);
    }
    assert!(elsewhere <= CONNECTIONS * rounds / 2, "{elsewhere} moves refused");
    let anchor = format!("handle {ANCHOR:#x}");
    let left = filters(&bed);
    assert!(left.len() == 2 && left.iter().all(|f| f.contains(&anchor)), "one for each family: {left:?}");
    for program in &mut programs {
        program.stop();
    }
    assert_eq!(filters(&bed), [""; 0], "after the daemon");
}
