//! nginx to nginx: nothing is lost and the client notices nothing.

use std::time::Duration;

use xo_tests::counters::Counters;
use xo_tests::load::{self, Load};
use xo_tests::program::{stay_on_one_processor, wait_for};
use xo_tests::servers::{address, address6};
use xo_tests::{Bed, Connection, content};

#[test]
fn one_connection_at_a_time_moves_without_any_retransmission() {
    stay_on_one_processor();
    let bed = Bed::up(2, 1);
    let _programs = bed.everything();
    let (mut moved, mut repeated) = (0, Vec::new());
    for host in [address("host"), address6("host")] {
        for (name, size) in content::SIZES {
            for upload in [false, true] {
                let path = if upload { format!("/up/{name}-{}", host.len()) } else { format!("/img/{name}") };
                // When the machine is busy with other things, the kernel sends a tail loss probe now and then, wherever
                // the connection is served. One that the hand-off caused would come every time.
                for attempt in 1.. {
                    let counted = one_move(&bed, &host, &path, size, upload);
                    moved += 1;
                    let about = format!("{path}, upload {upload}: {}", counted.troubles());
                    counted.no_reset(&bed);
                    assert_eq!(counted.losses(), 0, "{about}");
                    // On a long transfer there are some in any case, when the client is slow to read.
                    if counted.retransmissions() == 0 || size > 1 << 20 {
                        break;
                    }
                    assert!(attempt < 4, "every time: {about}");
                    repeated.push(about);
                }
            }
        }
    }
    println!("repeated: {repeated:#?}");
    assert!(repeated.len() <= 8, "{repeated:#?}");
    assert_eq!(bed.status("host", "/offloads_total"), moved);
    bed.wait_idle(&["host", "t1", "t2"]);
}

/// One connection that moves with its second request; what the kernel counted meanwhile.
fn one_move(bed: &Bed, host: &str, path: &str, size: usize, upload: bool) -> Counters {
    let before = Counters::of(bed);
    let (host, path) = (host.to_owned(), path.to_owned());
    let (nodes, sizes) = bed.on("client", move || {
        let mut c = Connection::to(&host, 80).expect("connect");
        let here = c.get("/loc/64k").expect("local");
        let before = c.segment_sizes();
        let response = if upload { c.put(&path, &content::of(&path, size)) } else { c.get(&path) };
        let there = response.unwrap_or_else(|e| panic!("{path}: {e}"));
        let after = c.get("/loc/64k").expect("on the target");
        let nodes = [here, there, after].map(|r| r.node().to_owned());
        (nodes, [before, c.segment_sizes()])
    });
    assert_eq!(nodes[0], "host");
    assert!(nodes[1].starts_with('t'), "{nodes:?}");
    assert_eq!(nodes[1], nodes[2]);
    assert_eq!(sizes[0], sizes[1], "segment sizes");
    Counters::of(bed).since(&before)
}

#[test]
fn hundreds_of_connections_lose_nothing() {
    stay_on_one_processor();
    let bed = Bed::up(2, 1);
    let _programs = bed.everything();
    let load = Load { connections: 300, requests: 20, moving: false };
    let start = Counters::of(&bed);
    let local = load::run(&bed, load);
    let middle = Counters::of(&bed);
    let moved = load::run(&bed, Load { moving: true, ..load });
    let (moved_counts, local_counts) = (Counters::of(&bed).since(&middle), middle.since(&start));
    println!("served where it arrived: {:?}; {}", local.by_node, local_counts.troubles());
    println!("moved: {:?}; {}", moved.by_node, moved_counts.troubles());
    assert!(local.errors.is_empty(), "{:#?}", local.errors);
    assert!(moved.errors.is_empty(), "{:#?}", moved.errors);
    assert_eq!(local.by_node.keys().collect::<Vec<_>>(), ["host"]);
    assert_eq!(moved.by_node.values().sum::<u32>(), load.connections * load.requests);
    // Before it moves, a connection has 0 to 4 requests.
    assert_eq!(moved.by_node["host"], load.connections * 2);
    assert_eq!(bed.status("host", "/offloads_total"), u64::from(load.connections));
    moved_counts.no_reset(&bed);
    let allowed = local_counts.losses() + i64::from(load.connections) / 3;
    assert!(moved_counts.losses() <= allowed, "{}", moved_counts.troubles());
    bed.wait_idle(&["host", "t1", "t2"]);
}

#[test]
fn thousands_of_connections_leave_nothing_behind() {
    let bed = Bed::up(2, 1);
    let programs = bed.everything();
    let round = |connections| {
        let load = Load { connections, requests: 6, moving: true };
        let outcome = load::run_sizes(&bed, load, 1 << 10);
        assert!(outcome.errors.is_empty(), "{:#?}", outcome.errors);
        bed.wait_idle(&["host", "t1", "t2"]);
    };
    round(100);
    let count = || programs.iter().map(|p| p.descriptors()).collect::<Vec<_>>();
    let before = count();
    for _ in 0..10 {
        round(200);
    }
    // A closed connection's descriptor goes a moment after its end has been seen.
    let mut after = count();
    wait_for(Duration::from_secs(10), || {
        after = count();
        after == before
    });
    assert_eq!(after, before, "descriptors of xo-peerd on host, t1, t2 and nginx on host, t1, t2");
    assert_eq!(bed.status("host", "/offloads_total"), 100 + 10 * 200);
}

#[test]
fn stopping_takes_everything_down() {
    let bed = Bed::up(1, 1);
    let mut programs = bed.everything();
    let node = bed.on("client", || {
        Connection::to(&address("host"), 80)
            .and_then(|mut c| c.get("/img/1k"))
            .expect("a response")
            .node()
            .to_owned()
    });
    assert_eq!(node, "t1");
    bed.wait_idle(&["host", "t1"]);
    for program in programs.iter_mut().rev() {
        assert_eq!(program.stop(), Some(0), "{}", program.output());
    }
    for node in ["host", "t1"] {
        bed.nothing_left(node);
    }
}
