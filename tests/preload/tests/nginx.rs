//! nginx to nginx: nothing is lost and the client notices nothing.

use xo_tests::counters::Counters;
use xo_tests::load::{self, Load};
use xo_tests::program::stay_on_one_processor;
use xo_tests::servers::{address, address6};
use xo_tests::{Bed, Connection, content};

#[test]
fn one_connection_at_a_time_moves_without_any_retransmission() {
    stay_on_one_processor();
    let bed = Bed::up(2, 1);
    let _programs = bed.everything();
    for host in [address("host"), address6("host")] {
        for (name, size) in content::SIZES {
            for upload in [false, true] {
                let host = host.clone();
                let before = Counters::of(&bed);
                let path = if upload { format!("/up/{name}-{}", host.len()) } else { format!("/img/{name}") };
                let (nodes, sizes) = bed.on("client", move || {
                    let mut c = Connection::to(&host, 80).expect("connect");
                    let here = c.get("/loc/64k").expect("local");
                    let before = c.segment_sizes();
                    let response =
                        if upload { c.put(&path, &content::of(&path, size)) } else { c.get(&path) };
                    let there = response.unwrap_or_else(|e| panic!("{path}: {e}"));
                    let after = c.get("/loc/64k").expect("on the target");
                    let nodes = [here, there, after].map(|r| r.node().to_owned());
                    (nodes, [before, c.segment_sizes()])
                });
                assert_eq!(nodes[0], "host");
                assert!(nodes[1].starts_with('t'), "{nodes:?}");
                assert_eq!(nodes[1], nodes[2]);
                assert_eq!(sizes[0], sizes[1], "segment sizes");
                let counted = Counters::of(&bed).since(&before);
                let about = format!("{size} bytes, upload {upload}, {nodes:?}: {}", counted.troubles());
                // A tail loss probe is no loss: on a long transfer the kernel sends some by itself, wherever it is
                // served, when the client is slow to read.
                let probes = if size > 1 << 20 { counted.get("TCPLossProbes") } else { 0 };
                assert_eq!(counted.resets(), 0, "{about}");
                assert_eq!(counted.retransmissions() - probes, 0, "{about}");
            }
        }
    }
    assert_eq!(bed.status("host", "/offloads_total"), 24);
    bed.wait_idle(&["host", "t1", "t2"]);
}

#[test]
fn hundreds_of_connections_lose_nothing() {
    let bed = Bed::up(2, 1);
    let _programs = bed.everything();
    let load = Load { connections: 300, requests: 20, moving: false };
    let start = Counters::of(&bed);
    let local = load::run(&bed, load);
    let middle = Counters::of(&bed);
    let moved = load::run(&bed, Load { moving: true, ..load });
    let (moved_counts, local_counts) = (Counters::of(&bed).since(&middle), middle.since(&start));
    println!("local: {:?}, {}", local.by_node, local_counts.troubles());
    println!("moved: {:?}, {}", moved.by_node, moved_counts.troubles());
    println!("ALL {moved_counts:?}");
    for node in ["host", "t1", "t2"] {
        println!("STATUS {node} {}", bed.try_status(node).expect("status"));
    }
    assert!(local.errors.is_empty(), "{:#?}", local.errors);
    assert!(moved.errors.is_empty(), "{:#?}", moved.errors);
    assert_eq!(local.by_node.keys().collect::<Vec<_>>(), ["host"]);
    assert_eq!(moved.by_node.values().sum::<u32>(), load.connections * load.requests);
    assert_eq!(moved_counts.resets(), 0, "{}", moved_counts.troubles());
    bed.wait_idle(&["host", "t1", "t2"]);
}
