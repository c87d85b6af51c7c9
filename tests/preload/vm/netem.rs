//! Hand-offs over a network that loses, repeats and reorders packets, between client and router: every body is right, and
//! no connection is reset.

use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use xo_tests::counters::Counters;
use xo_tests::servers::{address, address6};
use xo_tests::{Bed, Connection, content};

/// Both ends of the client's cable: what it sends, and what it gets.
const CABLE: [(&str, &str); 2] = [("client", "eth0"), ("router", "r1")];
const CONNECTIONS: usize = 3;
const REQUESTS: usize = 20;

/// Runs tc on a node; its words are separated by spaces.
fn tc(bed: &Bed, node: &str, arguments: &str) -> String {
    bed.run(node, Command::new("tc").args(arguments.split(' ')))
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

/// A connection whose every request belongs to another node than the one before; reads and uploads of all sizes. Every node has
/// everything: on a machine as slow as an emulated one a move may be refused, and the request is served where it is.
fn travel(nodes: &[String], fault: usize, number: usize) -> std::io::Result<()> {
    let host = if number.is_multiple_of(2) { address("host") } else { address6("host") };
    let mut c = Connection::to(&host, 80)?;
    for i in 0..REQUESTS {
        let place = &nodes[(number + i) % nodes.len()];
        // Each size occurs on each node.
        let (name, size) = content::SIZES[(number + i + i / 4) % 4];
        if i % 4 == 3 {
            let path = format!("/up/{place}/{fault}-{number}-{i}-{name}");
            c.put(&path, &content::of(&path, size))?;
        } else {
            c.get(&format!("/img/{place}/{name}"))?;
        }
    }
    Ok(())
}

/// Connections that travel while the cable has this fault, in both directions; what the kernels counted.
fn travel_over(bed: &Bed, fault: &str, number: usize) -> Counters {
    for (node, device) in CABLE {
        tc(bed, node, &format!("qdisc add dev {device} root netem {fault}"));
    }
    let before = Counters::of(bed);
    let start = || (0..CONNECTIONS).map(|i| (i, bed.servers()));
    let travellers: Vec<_> =
        start().map(|(i, nodes)| bed.spawn("client", move || travel(&nodes, number, i))).collect();
    for (i, traveller) in travellers.into_iter().enumerate() {
        traveller.join().expect("no panic").unwrap_or_else(|e| panic!("{fault}, connection {i}: {e}"));
    }
    let counted = Counters::of(bed).since(&before);
    let (packets, drops) = carried(bed);
    println!("{fault}: {packets} packets, {drops} dropped; {}", counted.troubles());
    assert!(packets > 500 && drops > 0, "{drops} of {packets} packets lost");
    assert!(counted.retransmissions() > 0, "{}", counted.troubles());
    // A packet that comes late or twice to a server that has finished with its connection is answered with a reset, moved or
    // not; the client has finished with it then.
    assert_eq!(counted.get_on("client", "EstabResets"), 0, "{}", counted.troubles());
    for (node, device) in CABLE {
        tc(bed, node, &format!("qdisc del dev {device} root"));
    }
    counted
}

#[test]
#[ignore = "needs a kernel with netem: scripts/vm"]
fn connections_move_to_and_fro_over_a_bad_cable() {
    let bed = Bed::up(2, 1);
    let options = bed.sharded_options("");
    let mut programs: Vec<_> = bed.servers().iter().map(|n| bed.peerd(n, &options)).collect();
    programs.extend(bed.sharded_servers(true));
    for (node, device) in CABLE {
        // Segments one by one, or a loss would be one of many at a time.
        bed.run(node, Command::new("ip").args(["link", "set", device, "gso_max_segs", "1"]));
    }
    travel_over(&bed, "loss 2%", 0);
    let counted = travel_over(&bed, "delay 2ms reorder 75% duplicate 2% loss 1%", 1);
    assert!(counted.get("TCPOFOQueue") > 0, "nothing came out of order: {}", counted.troubles());
    assert!(counted.get("TCPDSACKRecv") > 0, "nothing came twice: {}", counted.troubles());
    bed.wait_idle_for(Duration::from_secs(60), &["host", "t1", "t2"]);
    let mut moved = 0;
    for node in bed.servers() {
        let status = bed.try_status(&node).expect("a status");
        println!("{node}: {} refused, {} failed", status["refused_by_reason"], status["failed_by_reason"]);
        assert_eq!(status["failed_total"], 0, "{node}: {}", status["failed_by_reason"]);
        let moves = ["offloads_total", "onward_total", "sent_home_total"];
        moved += moves.iter().filter_map(|m| status[*m].as_u64()).sum::<u64>();
    }
    let asked = (CONNECTIONS * (REQUESTS - 1) * 2) as u64;
    println!("{moved} moves for {asked} changes of place");
    assert!(moved >= asked / 2, "{moved} moves for {asked} changes of place");
}
