//! Full tables: what finds no place is served where it is, is counted, and moves again when there is room.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use xo_proto::slot::SLOTS;
use xo_tests::counters::Counters;
use xo_tests::pool::wait_target;
use xo_tests::program::{Program, wait_for};
use xo_tests::servers::{PEER_PORT, PeerdOptions, WEB, address};
use xo_tests::{Bed, Connection};

/// Connections beyond what a table holds.
const SURPLUS: usize = 50;

/// So many connections with one request each; and how many of these each node answered.
fn connections(bed: &Bed, count: usize, path: &'static str) -> (Vec<Connection>, Vec<String>) {
    bed.on("client", move || {
        let get = |_| {
            let mut c = Connection::to(&address("host"), 80).expect("connect");
            let node = c.get(path).expect(path).node().to_owned();
            (c, node)
        };
        (0..count).map(get).unzip()
    })
}

/// Requests that stayed because of a full table: the machine was asked, or left alone because it had refused just now.
fn full(bed: &Bed) -> u64 {
    let asked = bed.status("host", "/refused_by_reason/table_full");
    assert!(asked > 0, "{:?}", bed.try_status("host"));
    asked + bed.status("host", "/library/no_target")
}

/// Daemons of which one has room for four flows, and servers.
fn steering_table(small: &str, order: &str) {
    let bed = Bed::up(1, 1);
    let options = |node| {
        let room = if node == small { 4 } else { 64 };
        PeerdOptions {
            head: format!("insecure = true\nhandoff = \"{order}\""),
            sections: format!("{WEB}[steering]\nmax_flows = {room}\n"),
        }
    };
    let _daemons = ["host", "t1"].map(|n| bed.peerd(n, &options(n)));
    let _servers = ["host", "t1"].map(|n| bed.nginx(n));
    bed.wait_acceptors("t1", "web", 4);
    let before = Counters::of(&bed);
    let (mut away, nodes) = connections(&bed, 4, "/img/1k");
    assert_eq!(nodes, ["t1"; 4]);
    let (stay, nodes) = connections(&bed, 3, "/img/64k");
    assert_eq!(nodes, ["host"; 3], "{small}'s table is full");
    assert_eq!(full(&bed), 3);
    // Nothing of those that were refused is left, and those that had moved do not notice.
    assert_eq!(bed.status("host", "/steering/flow_entries"), 4);
    away = bed.on("client", move || {
        for c in &mut away {
            assert_eq!(c.get("/img/64k").expect("moved").node(), "t1");
        }
        away
    });
    away.truncate(2);
    let room = wait_for(Duration::from_secs(10), || {
        bed.status("host", "/flows_hosted") == 2 && bed.status("t1", "/flows_served") == 2
    });
    assert!(room, "{:?}", bed.try_status("host"));
    wait_target(&bed, "host", "t1", "up");
    // The connection that was refused asks again, too.
    let (_, nodes) = connections(&bed, 1, "/img/1m");
    assert_eq!(nodes, ["t1"], "two have ended");
    let node = bed.on("client", move || {
        let [mut c, ..] = <[Connection; 3]>::try_from(stay).expect("three");
        c.get("/img/1k").expect("a refused one").node().to_owned()
    });
    assert_eq!(node, "t1");
    drop(away);
    bed.wait_idle(&["host", "t1"]);
    let counted = Counters::of(&bed).since(&before);
    counted.no_reset(&bed);
}

#[test]
fn the_flow_table_of_the_host() {
    for order in ["early", "strict"] {
        steering_table("host", order);
    }
}

#[test]
fn the_rewrite_table_of_the_target() {
    for order in ["early", "strict"] {
        steering_table("t1", order);
    }
}

/// nginx with one worker that can hold more connections than the library.
fn roomy_nginx(bed: &Bed, node: &str) -> Program {
    let text = fs::read_to_string(bed.nginx_config(node, 1)).expect("nginx's configuration");
    let text = text.replace("worker_connections 8192", "worker_connections 19900");
    let config: PathBuf = bed.file(&format!("{node}-roomy.conf"), &text);
    let mut command = bed.preloaded(node, "nginx");
    // Where no rule leads away from a machine its connections are not followed, and take no slots.
    let targets = format!("t1={}:{PEER_PORT},far=10.99.0.2:{PEER_PORT}", address("t1"));
    command.env("XO_TARGETS", targets).env("XO_RULES", "/img/ => t1 @web; /far/ => far");
    bed.nginx_configured(node, command, &config)
}

/// Daemons, and such a server on both nodes.
/// A connection has moved, so that all is open that stays open.
fn roomy() -> (Bed, [Program; 2], [Program; 2]) {
    let bed = Bed::up(1, 1);
    let daemons = ["host", "t1"].map(|n| bed.peerd(n, &PeerdOptions::default()));
    let servers = ["host", "t1"].map(|n| roomy_nginx(&bed, n));
    bed.wait_acceptors("t1", "web", 2);
    assert_eq!(connections(&bed, 1, "/img/1k").1, ["t1"]);
    bed.wait_idle(&["host", "t1"]);
    (bed, daemons, servers)
}

/// Idle connections that fill the library's table in a node's server.
fn fill(bed: &Bed, node: &'static str) -> Vec<Connection> {
    let connect = move || Connection::to(&address(node), 80).expect("connect");
    let idle = bed.on("client", move || (0..SLOTS).map(|_| connect()).collect::<Vec<_>>());
    let full = || bed.status(node, "/library/accepted") >= SLOTS as u64;
    assert!(wait_for(Duration::from_secs(30), full), "{:?}", bed.try_status(node));
    idle
}

#[test]
fn more_connections_than_slots_on_the_host() {
    let (bed, daemons, servers) = roomy();
    let processes = servers[0].processes();
    let before = servers[0].descriptors() + daemons[0].descriptors();
    let mut idle = fill(&bed, "host");
    let (beyond, nodes) = connections(&bed, SURPLUS, "/img/1k");
    assert_eq!(nodes, ["host"; SURPLUS]);
    assert_eq!(bed.status("host", "/library/slots_full"), SURPLUS as u64);
    // Connections that have a slot move, from the first to the last.
    let idle = bed.on("client", move || {
        for i in [0, 1, SLOTS / 2, SLOTS - 1] {
            assert_eq!(idle[i].get("/img/1k").expect("followed").node(), "t1", "connection {i}");
        }
        idle
    });
    drop(idle);
    let free = wait_for(Duration::from_secs(30), || servers[0].descriptors() < before + 2 * SURPLUS);
    assert!(free, "{} descriptors", servers[0].descriptors());
    let (moved, nodes) = connections(&bed, SURPLUS, "/img/1k");
    assert_eq!(nodes, ["t1"; SURPLUS]);
    drop((beyond, moved));
    bed.wait_idle(&["host", "t1"]);
    let none_left = || servers[0].descriptors() + daemons[0].descriptors() == before;
    assert!(wait_for(Duration::from_secs(10), none_left), "{before} before");
    assert_eq!(servers[0].processes(), processes, "no worker has crashed");
}

#[test]
fn more_connections_than_slots_on_the_target() {
    let (bed, daemons, servers) = roomy();
    let processes = servers[1].processes();
    let before = servers[1].descriptors() + daemons[1].descriptors();
    let idle = fill(&bed, "t1");
    // They are served there all the same; that they have ended is found out by asking the kernel.
    let (beyond, nodes) = connections(&bed, SURPLUS, "/img/1k");
    assert_eq!(nodes, ["t1"; SURPLUS]);
    assert_eq!(bed.status("t1", "/library/slots_full"), SURPLUS as u64);
    drop(beyond);
    bed.wait_idle(&["host", "t1"]);
    drop(idle);
    let none_left = || servers[1].descriptors() + daemons[1].descriptors() == before;
    assert!(wait_for(Duration::from_secs(30), none_left), "{before} before, {}", servers[1].descriptors());
    assert_eq!(servers[1].processes(), processes, "no worker has crashed");
}

#[test]
fn more_moved_connections_than_a_process_can_hold() {
    let (bed, daemons, servers) = roomy();
    let before = servers[1].descriptors() + daemons[1].descriptors();
    let (away, nodes) = connections(&bed, SLOTS, "/img/1");
    assert!(nodes.iter().all(|n| n == "t1"), "{:?}", bed.try_status("host"));
    let (_stay, nodes) = connections(&bed, SURPLUS, "/img/1k");
    assert_eq!(nodes, ["host"; SURPLUS]);
    assert_eq!(full(&bed), SURPLUS as u64, "{:?}", bed.try_status("host"));
    drop(away);
    bed.wait_idle(&["host", "t1"]);
    wait_target(&bed, "host", "t1", "up");
    let (_, nodes) = connections(&bed, SURPLUS, "/img/1k");
    assert_eq!(nodes, ["t1"; SURPLUS]);
    bed.wait_idle(&["host", "t1"]);
    let none_left = || servers[1].descriptors() + daemons[1].descriptors() == before;
    assert!(wait_for(Duration::from_secs(10), none_left), "{before} before");
}

/// The kernel knows a connection that its server has closed first for another minute. The process has room for others meanwhile.
#[test]
fn more_closed_connections_than_a_process_can_hold() {
    let (bed, _daemons, _servers) = roomy();
    let nodes = bed.on("client", || {
        let get = |_| {
            let mut c = Connection::to(&address("host"), 80).expect("connect");
            c.send(b"GET /img/1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("a request");
            let node = c.response(false).expect("a response").node().to_owned();
            assert!(c.rest().expect("the end").is_empty());
            node
        };
        (0..SLOTS + SURPLUS).map(get).collect::<Vec<_>>()
    });
    let elsewhere = nodes.iter().filter(|n| *n != "t1").count();
    assert_eq!(elsewhere, 0, "{:?}", bed.try_status("host"));
    let known = bed.status("t1", "/flows_served");
    println!("{known} of {} are known yet", nodes.len());
    let in_service = || bed.status("host", "/targets/0/serves");
    assert!(wait_for(Duration::from_secs(5), || in_service() == 0), "{} are in service", in_service());
}
