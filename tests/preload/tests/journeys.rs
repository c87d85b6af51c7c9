//! Connections that move on and home where a machine is dead or stands still, where tables are small, where two clients have the
//! same port, and long after they have moved.

use std::time::Duration;

use xo_tests::client::bound;
use xo_tests::counters::Counters;
use xo_tests::program::{Program, wait_for};
use xo_tests::servers::{PeerdOptions, address};
use xo_tests::{Bed, Connection};

const NODES: [&str; 3] = ["host", "t1", "t2"];

/// Three nodes, each with all objects: who refuses can serve. Daemons first.
fn up(sections: &str) -> (Bed, Vec<Program>, Vec<Program>) {
    let bed = Bed::up(2, 1);
    let options = options(&bed, sections);
    let daemons = NODES.map(|n| bed.peerd(n, &options));
    let servers = bed.sharded_servers(true);
    (bed, daemons.into(), servers)
}

fn options(bed: &Bed, sections: &str) -> PeerdOptions {
    let usual = bed.sharded_options("");
    PeerdOptions { sections: format!("{}{sections}", usual.sections), ..usual }
}

/// Who answers requests for these places, one after the other.
fn ask(mut c: Connection, places: &[&str]) -> (Connection, Vec<String>) {
    let nodes = places.iter().enumerate().map(|(i, place)| {
        let path = format!("/img/{place}/{}", if i % 2 == 0 { "1k" } else { "64k" });
        c.get(&path).unwrap_or_else(|e| panic!("{path}: {e}")).node().to_owned()
    });
    let nodes = nodes.collect();
    (c, nodes)
}

fn visit(bed: &Bed, c: Connection, places: &'static [&'static str]) -> (Connection, Vec<String>) {
    bed.on("client", move || ask(c, places))
}

fn connect(bed: &Bed) -> Connection {
    bed.on("client", || Connection::to(&address("host"), 80).expect("connect"))
}

/// `trouble` comes over the daemon of `NODES[victim]` while connections are at t1: requests for `places` are served there. Then it
/// is over, and connections go there again.
fn meanwhile(
    victim: usize,
    places: &'static [&'static str],
    trouble: impl Fn(&Bed, &mut Vec<Program>),
    over: impl Fn(&Bed, &mut Vec<Program>),
) {
    let name = NODES[victim];
    let (bed, mut daemons, servers) = up("");
    let connections: Vec<_> = (0..6).map(|_| visit(&bed, connect(&bed), &["t2", "host", "t1"]).0).collect();
    let before = Counters::of(&bed);
    trouble(&bed, &mut daemons);
    let clients = connections.into_iter().map(|c| {
        let work = move || ask(c, places);
        bed.spawn("client", work)
    });
    let clients: Vec<_> = clients.collect();
    let mut connections = Vec::new();
    for client in clients {
        let (c, nodes) = client.join().expect("no panic");
        assert!(nodes.iter().all(|n| n == "t1"), "{name} is in trouble, {places:?} answered by {nodes:?}");
        connections.push(c);
    }
    over(&bed, &mut daemons);
    bed.wait_connected(&NODES.map(String::from));
    for c in connections {
        // Who did not answer is left alone for a while.
        let mut at_hand = Some(c);
        let mut nodes = Vec::new();
        let everywhere = ["t1", "t2", "host", "t1"];
        let there = wait_for(Duration::from_secs(20), || {
            let (c, answered) =
                visit(&bed, at_hand.take().expect("it was put back"), &["t1", "t2", "host", "t1"]);
            (at_hand, nodes) = (Some(c), answered);
            nodes == everywhere
        });
        assert!(
            there,
            "{name} is well again, {everywhere:?} answered by {nodes:?}: {:?}",
            bed.try_status("t1")
        );
    }
    let counted = Counters::of(&bed).since(&before);
    assert_eq!(counted.get_on("client", "EstabResets"), 0, "{}", counted.troubles());
    bed.wait_idle(&NODES);
    drop(servers);
}

fn dead(victim: usize, places: &'static [&'static str]) {
    let kill = |_: &Bed, daemons: &mut Vec<Program>| {
        let killed = daemons.remove(victim);
        killed.signal(libc::SIGKILL);
        drop(killed);
    };
    meanwhile(victim, places, kill, |bed, daemons| {
        daemons.insert(victim, bed.peerd(NODES[victim], &options(bed, "")));
    });
}

fn standing_still(victim: usize, places: &'static [&'static str]) {
    let send = |signal| move |_: &Bed, daemons: &mut Vec<Program>| daemons[victim].signal(signal);
    meanwhile(victim, places, send(libc::SIGSTOP), send(libc::SIGCONT));
}

#[test]
fn the_next_target_is_dead() {
    dead(2, &["t2", "t2"]);
}

#[test]
fn the_next_target_stands_still() {
    standing_still(2, &["t2", "t2"]);
}

/// Nor does a connection go anywhere else then: its home could not be told.
#[test]
fn the_home_is_dead() {
    dead(0, &["host", "t2"]);
}

#[test]
fn the_home_stands_still() {
    standing_still(0, &["host", "host"]);
}

/// How a connection ends: by its client, or by the server that has it.
#[derive(Clone, Copy)]
enum End {
    Client,
    Server,
}

fn end(mut c: Connection, place: &str, end: End) {
    if let End::Server = end {
        let path = format!("/img/{place}/64k");
        c.send(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes())
            .expect("send");
        assert_eq!(c.object(&path).expect("the last").node(), place);
        assert_eq!(c.rest().expect("an end"), b"");
    }
}

/// More connections than the tables have room for, one crowd after the other: each leaves its entries on all machines, which must
/// go when it ends, wherever it is then and whoever ends it.
#[test]
fn the_end_of_a_connection_frees_its_entries_everywhere() {
    const CROWD: usize = 12;
    const ROOM: usize = 32;
    const PATHS: [&[&str]; 3] = [&["t1", "t2"], &["t1", "t2", "host"], &["t2", "t1", "host", "t1"]];
    let (bed, daemons, servers) = up(&format!("[steering]\nmax_flows = {ROOM}\n"));
    for node in NODES {
        // A socket that its server has closed first is remembered for a minute, and with it its entries.
        bed.run(node, std::process::Command::new("sysctl").args(["-qw", "net.ipv4.tcp_max_tw_buckets=0"]));
    }
    for places in PATHS {
        for by in [End::Client, End::Server] {
            let clients: Vec<_> = (0..CROWD)
                .map(|_| {
                    bed.spawn("client", move || {
                        let (c, nodes) = ask(Connection::to(&address("host"), 80).expect("connect"), places);
                        assert_eq!(nodes, places);
                        end(c, places.last().expect("some"), by);
                    })
                })
                .collect();
            clients.into_iter().for_each(|c| c.join().expect("all as it should be"));
            bed.wait_idle(&NODES);
        }
    }
    const { assert!(CROWD * PATHS.len() * 2 > 2 * ROOM) };
    bed.nothing_refused(&NODES);
    drop((daemons, servers));
}

/// The artifact knows clients by their port only.
#[test]
fn clients_with_the_same_port() {
    let (bed, daemons, servers) = up("");
    let nodes = bed.on("client", || {
        let client = |ip: &str, port| {
            let socket = bound(ip, port, &address("host"), 80).expect("connect");
            Connection::over(socket).expect("options")
        };
        let mut nodes = Vec::new();
        for port in [22_001, 22_002, 22_003] {
            let mut three = ["10.1.0.2", "10.1.0.3", "10.1.0.4"].map(|ip| client(ip, port));
            for i in 0..12 {
                for (n, c) in three.iter_mut().enumerate() {
                    let place = NODES[(i * (1 + i / NODES.len()) + n) % NODES.len()];
                    let response =
                        c.get(&format!("/img/{place}/64k")).unwrap_or_else(|e| panic!("{n}, {i}: {e}"));
                    nodes.push((response.node().to_owned(), place.to_owned()));
                }
            }
        }
        nodes
    });
    assert!(nodes.iter().all(|(node, place)| node == place), "{nodes:?}");
    bed.wait_idle(&NODES);
    drop((daemons, servers));
}

/// Entries of a detour are gone: what its packets met on their way before, they must not need any more.
#[test]
fn long_after_the_move() {
    let (bed, daemons, servers) = up("");
    let entries = |node: &str| bed.status(node, "/steering/flow_entries");
    // Where the connection goes, and the entries that then are left on host, t1 and t2: away from home a redirect and a rewrite.
    let journey: [(&'static [&'static str], [u64; 3]); 5] = [
        (&["t1", "t2"], [1, 0, 1]),
        (&["t2", "host"], [0, 0, 0]),
        (&["host", "t1"], [1, 1, 0]),
        (&["t1", "t2", "t1", "host", "t2", "t1"], [1, 1, 0]),
        (&["t1", "host"], [0, 0, 0]),
    ];
    let before = Counters::of(&bed);
    let mut c = connect(&bed);
    for (places, left) in journey {
        let nodes;
        (c, nodes) = visit(&bed, c, places);
        assert_eq!(nodes, places);
        let over = wait_for(Duration::from_secs(20), || NODES.map(entries) == left);
        assert!(over, "{places:?}: {:?} entries instead of {left:?}", NODES.map(entries));
        // Still there, and served without a further move.
        let moves = || NODES.map(|n| bed.status(n, "/onward_total") + bed.status(n, "/offloads_total"));
        let so_far = moves();
        (c, _) = visit(&bed, c, &places[places.len() - 1..]);
        assert_eq!(moves(), so_far);
    }
    drop(c);
    bed.wait_idle(&NODES);
    let counted = Counters::of(&bed).since(&before);
    counted.no_reset(&bed);
    assert_eq!(counted.losses(), 0, "{}", counted.troubles());
    drop((daemons, servers));
}
