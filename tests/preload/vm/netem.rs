//! Hand-offs over a network that loses, repeats and reorders packets, between client and router: every body is right, and
//! no connection is reset.

use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use xo_tests::counters::Counters;
use xo_tests::load::{self, Load};
use xo_tests::servers::{address, address6};
use xo_tests::{Bed, Connection, content};

/// Both ends of the client's cable: what it sends, and what it gets.
const CABLE: [(&str, &str); 2] = [("client", "eth0"), ("router", "r1")];

/// Runs tc on a node; its words are separated by spaces.
fn tc(bed: &Bed, node: &str, arguments: &str) -> String {
    bed.run(node, Command::new("tc").args(arguments.split(' ')))
}

/// A cable with this fault, in both directions. Segments are sent one by one, or a loss would be one of many at a time.
fn spoil(bed: &Bed, fault: &str) {
    for (node, device) in CABLE {
        bed.run(node, Command::new("ip").args(["link", "set", device, "gso_max_segs", "1"]));
        tc(bed, node, &format!("qdisc add dev {device} root netem {fault}"));
    }
}

/// Packets that went over the cable, and those that netem dropped.
fn carried(bed: &Bed) -> (u64, u64) {
    let mut sum = (0, 0);
    for (node, device) in CABLE {
        let shown = tc(bed, node, &format!("-s -j qdisc show dev {device}"));
        let shown: Value = serde_json::from_str(&shown).expect("JSON");
        let netem = shown.as_array().into_iter().flatten().find(|q| q["kind"] == "netem").expect("netem");
        sum.0 += netem["packets"].as_u64().expect("a count");
        sum.1 += netem["drops"].as_u64().expect("a count");
    }
    sum
}

/// No connection of the client's was reset. A packet that comes late or twice to a server that has finished with its connection
/// is answered with a reset, moved or not; the client has finished with it too.
fn no_reset(counted: &Counters) {
    assert_eq!(counted.get_on("client", "EstabResets"), 0, "{}", counted.troubles());
}

/// Connections that move once, over a cable with this fault; what the kernels counted.
fn moves_over(fault: &str) -> (Counters, (u64, u64)) {
    let bed = Bed::up(2, 1);
    let _programs = bed.everything();
    spoil(&bed, fault);
    let load = Load { connections: 16, requests: 12, moving: true };
    let before = Counters::of(&bed);
    let outcome = load::run_sizes(&bed, load, 64 << 10);
    let counted = Counters::of(&bed).since(&before);
    let carried = carried(&bed);
    println!("{fault}: {:?}; {carried:?} carried, dropped; {}", outcome.by_node, counted.troubles());
    assert!(outcome.errors.is_empty(), "{:#?}", outcome.errors);
    assert_eq!(outcome.by_node.values().sum::<u32>(), load.connections * load.requests);
    assert_eq!(bed.status("host", "/offloads_total"), u64::from(load.connections));
    no_reset(&counted);
    bed.wait_idle_for(Duration::from_secs(60), &["host", "t1", "t2"]);
    (counted, carried)
}

#[test]
#[ignore = "needs a kernel with netem: scripts/vm"]
fn connections_move_while_packets_are_lost() {
    let (counted, (packets, drops)) = moves_over("loss 2%");
    assert!(packets > 1000 && drops > 0, "{drops} of {packets} packets lost");
    assert!(counted.retransmissions() > 0, "{}", counted.troubles());
}

#[test]
#[ignore = "needs a kernel with netem: scripts/vm"]
fn connections_move_while_packets_overtake_each_other_and_come_twice() {
    let (counted, _) = moves_over("delay 2ms reorder 75% duplicate 2% loss 1%");
    assert!(counted.get("TCPOFOQueue") > 0, "nothing came out of order: {}", counted.troubles());
    assert!(counted.get("TCPDSACKRecv") > 0, "nothing came twice: {}", counted.troubles());
}

#[test]
#[ignore = "needs a kernel with netem: scripts/vm"]
fn connections_move_to_and_fro_over_a_bad_cable() {
    let bed = Bed::up(2, 1);
    let _programs = bed.sharded();
    spoil(&bed, "delay 1ms reorder 80% duplicate 1% loss 1%");
    let nodes = bed.servers();
    let before = Counters::of(&bed);
    let clients: Vec<_> = (0..6)
        .map(|number: usize| {
            let nodes = nodes.clone();
            bed.spawn("client", move || {
                let host = if number.is_multiple_of(2) { address("host") } else { address6("host") };
                let mut c = Connection::to(&host, 80)?;
                for i in 0..30 {
                    let place = &nodes[(number + i) % nodes.len()];
                    let (name, size) = content::SIZES[(number + i) % 4];
                    let response = if i % 5 == 4 {
                        let path = format!("/up/{place}/{number}-{i}-{name}");
                        c.put(&path, &content::of(&path, size))?
                    } else {
                        c.get(&format!("/img/{place}/{name}"))?
                    };
                    assert_eq!(response.node(), place, "connection {number}, request {i}");
                }
                Ok::<_, std::io::Error>(())
            })
        })
        .collect();
    for (number, client) in clients.into_iter().enumerate() {
        client.join().expect("no panic").unwrap_or_else(|e| panic!("connection {number}: {e}"));
    }
    let counted = Counters::of(&bed).since(&before);
    let carried = carried(&bed);
    println!("{carried:?} carried, dropped; {}", counted.troubles());
    assert!(carried.1 > 0, "nothing was lost");
    no_reset(&counted);
    bed.wait_idle_for(Duration::from_secs(60), &["host", "t1", "t2"]);
}
