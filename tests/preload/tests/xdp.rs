//! Steering by XDP: the fast path carries what clients send to where their connections are, and nobody notices anything else.
//!
//! Between virtual interfaces checksums are partial, which is not the fast path's business: the client is made to send whole
//! ones, as they come from a NIC.

use std::process::Command;
use std::time::Duration;

use xo_tests::counters::Counters;
use xo_tests::ethtool::{Offload, switch};
use xo_tests::program::{Program, wait_for};
use xo_tests::servers::{PeerdOptions, address, address6};
use xo_tests::{Bed, Connection, content};

/// Of each connection: to each machine in turn.
const ROUNDS: usize = 12;
const UPLOAD: usize = 1 << 20;
/// As many segments as an upload has at least.
const SEGMENTS: u64 = (UPLOAD / 1460) as u64;

/// A bed whose client sends whole checksums; `native`: what the servers' interfaces send by XDP is taken.
fn bed(native: bool) -> Bed {
    let bed = Bed::up(2, 1);
    bed.on("client", || switch("eth0", Offload::SentChecksums, false));
    if native {
        // The router's ends of the links to host, t1 and t2.
        bed.on("router", || ["r2", "r3", "r4"].map(|r| switch(r, Offload::Receive, true)));
    }
    bed
}

fn options(bed: &Bed, mode: &str) -> PeerdOptions {
    let mut options = bed.sharded_options("");
    options.sections += &format!("\n[steering]\nmode = \"{mode}\"\n");
    options
}

fn mode(bed: &Bed, node: &str) -> String {
    bed.try_status(node).expect("a status")["steering"]["mode"].as_str().unwrap_or_default().to_owned()
}

fn packets(bed: &Bed, node: &str, path: &str) -> u64 {
    bed.status(node, &format!("/steering/packets/{path}"))
}

/// Does the kernel say that the node's interface has a program for XDP?
fn is_attached(bed: &Bed, node: &str) -> bool {
    bed.run(node, Command::new("ip").args(["link", "show", "dev", "eth0"])).contains("xdp")
}

/// A connection that visits all machines: reads of all sizes, two uploads at each, what was stored compared.
fn wander(bed: &Bed, host: String, number: usize, rounds: usize) {
    let nodes = bed.servers();
    let uploads = bed.on("client", move || {
        let mut c = Connection::to(&host, 80).expect("connect");
        let mut uploads = Vec::new();
        for round in 0..rounds {
            let place = &nodes[(number + round) % nodes.len()];
            for (name, _) in &content::SIZES[..5] {
                let response = c.get(&format!("/img/{place}/{name}")).expect("a body");
                assert_eq!(response.node(), place, "round {round}: {name}");
            }
            for i in 0..2 {
                let path = format!("/up/{place}/{number}-{round}-{i}");
                let response = c.put(&path, &content::of(&path, UPLOAD)).expect("an upload");
                assert_eq!(response.node(), place, "round {round}: {path}");
                uploads.push((place.clone(), path));
            }
        }
        uploads
    });
    for (node, path) in uploads {
        let stored = std::fs::read(bed.root(&node).join(&path[1..])).expect("a file");
        assert!(stored == content::of(&path, UPLOAD), "{path} is not what was sent");
    }
}

fn nothing_went_wrong(bed: &Bed, before: &Counters) {
    let counted = Counters::of(bed).since(before);
    println!("{}", counted.troubles());
    counted.no_reset(bed);
    for node in bed.servers() {
        let status = bed.try_status(&node).expect("a status");
        println!("{node}: {}", status["steering"]["packets"]);
        assert_eq!(status["failed_total"], 0, "{node}: {}", status["failed_by_reason"]);
    }
}

fn connections_move_to_and_fro(native: bool) {
    let bed = bed(native);
    let options = options(&bed, "xdp");
    let nodes = bed.servers();
    let _daemons: Vec<_> = nodes.iter().map(|n| bed.peerd(n, &options)).collect();
    let _servers = bed.sharded_servers(false);
    for node in &nodes {
        assert_eq!(mode(&bed, node), if native { "xdp-native" } else { "xdp-generic" }, "{node}");
        assert!(is_attached(&bed, node), "{node}");
    }
    let before = Counters::of(&bed);
    for (number, host) in [address("host"), address6("host")].into_iter().enumerate() {
        wander(&bed, host, number, ROUNDS);
    }
    nothing_went_wrong(&bed, &before);
    // Two of three uploads were for other machines; the second one at each begins when the connection is there.
    let (fast, at_tc) = (packets(&bed, "host", "xdp_redirected"), packets(&bed, "host", "redirected"));
    let least = 2 * (2 * ROUNDS as u64 / 3) * SEGMENTS;
    assert!(fast >= least, "the fast path carried {fast} packets, of at least {least}");
    assert!(at_tc < fast / 4, "{at_tc} packets went by tc, {fast} by XDP");
    bed.wait_idle(&["host", "t1", "t2"]);
}

#[test]
fn connections_move_to_and_fro_with_xdp_in_the_driver() {
    connections_move_to_and_fro(true);
}

#[test]
fn connections_move_to_and_fro_with_xdp_in_the_generic_way() {
    connections_move_to_and_fro(false);
}

/// A client on a virtual interface as it comes: the NIC is to make its checksums. The fast path cannot tell, and leaves such
/// packets to tc.
#[test]
fn partial_checksums_are_steered_at_tc() {
    for native in [true, false] {
        let bed = bed(native);
        bed.on("client", || switch("eth0", Offload::SentChecksums, true));
        let options = options(&bed, "xdp");
        let _daemons: Vec<_> = bed.servers().iter().map(|n| bed.peerd(n, &options)).collect();
        let _servers = bed.sharded_servers(false);
        let before = Counters::of(&bed);
        wander(&bed, address("host"), 0, 3);
        wander(&bed, address6("host"), 1, 3);
        nothing_went_wrong(&bed, &before);
        assert!(packets(&bed, "host", "redirected") > 0);
        assert!(packets(&bed, "host", "xdp_left") > packets(&bed, "host", "xdp_redirected"));
        bed.wait_idle(&["host", "t1", "t2"]);
    }
}

/// Requests on each of these connections, served by `t1`.
fn used(bed: &Bed, mut connections: Vec<Connection>) -> Vec<Connection> {
    bed.on("client", move || {
        for (i, c) in connections.iter_mut().enumerate() {
            let path = format!("/up/t1/again-{i}");
            assert_eq!(c.put(&path, &content::of(&path, 100_000)).expect("an upload").node(), "t1");
            assert_eq!(c.get("/img/t1/64k").expect("a body").node(), "t1");
        }
        connections
    })
}

/// Starts the host's daemon anew, which finds its flows again.
fn again(bed: &Bed, daemon: Program, mode: &str, flows: usize) -> Program {
    daemon.signal(libc::SIGKILL);
    drop(daemon);
    let daemon = bed.peerd("host", &options(bed, mode));
    let found = wait_for(Duration::from_secs(10), || bed.status("host", "/flows_hosted") == flows as u64);
    assert!(found, "{:?}", bed.try_status("host"));
    daemon
}

/// The program stays where it is while there is no daemon, and the next one puts its own in its place; with another mode it
/// goes, or comes.
#[test]
fn flows_outlive_the_daemon_and_a_change_of_mode() {
    const FLOWS: usize = 4;
    for native in [true, false] {
        let bed = bed(native);
        let expected = if native { "xdp-native" } else { "xdp-generic" };
        let with_xdp = options(&bed, "xdp");
        let mut host = bed.peerd("host", &with_xdp);
        let _targets = ["t1", "t2"].map(|n| bed.peerd(n, &with_xdp));
        let _servers = bed.sharded_servers(false);
        let connections = bed.on("client", || {
            let connect = |_| Connection::to(&address("host"), 80).expect("connect");
            (0..FLOWS).map(connect).collect::<Vec<_>>()
        });
        let mut connections = used(&bed, connections);
        let before = Counters::of(&bed);
        let mut carried = packets(&bed, "host", "xdp_redirected");
        for signal in [libc::SIGKILL, libc::SIGTERM] {
            if signal == libc::SIGKILL {
                host.signal(signal);
            } else {
                assert_eq!(host.stop(), Some(0), "{}", host.output());
            }
            drop(host);
            assert!(is_attached(&bed, "host"), "without a daemon");
            connections = used(&bed, connections);
            host = bed.peerd("host", &with_xdp);
            assert_eq!(mode(&bed, "host"), expected);
            let now = packets(&bed, "host", "xdp_redirected");
            assert!(now > carried, "{carried} packets by XDP before the daemon went, {now} after");
            carried = now;
        }
        for (wanted, shown) in [("tc", "tcx"), ("xdp", expected)] {
            host = again(&bed, host, wanted, FLOWS);
            assert_eq!(mode(&bed, "host"), shown);
            assert!(wait_for(Duration::from_secs(5), || is_attached(&bed, "host") == (wanted == "xdp")));
            let earlier = packets(&bed, "host", "xdp_redirected");
            connections = used(&bed, connections);
            let by_xdp = packets(&bed, "host", "xdp_redirected") - earlier;
            assert_eq!(by_xdp > 0, wanted == "xdp", "{wanted}: {by_xdp} packets by XDP");
        }
        let counted = Counters::of(&bed).since(&before);
        assert_eq!(counted.get_on("client", "EstabResets"), 0, "{}", counted.troubles());
        assert_eq!(counted.get_on("client", "OutRsts"), 0, "{}", counted.troubles());
        drop(connections);
        bed.wait_idle(&["host", "t1"]);
        assert_eq!(host.stop(), Some(0), "{}", host.output());
        assert!(!is_attached(&bed, "host"), "nothing is left to look after");
        bed.nothing_left("host");
    }
}
