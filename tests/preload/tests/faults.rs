//! Whatever is wrong elsewhere, the client is served by the host.

use std::time::Duration;

use xo_tests::counters::Counters;
use xo_tests::program::wait_for;
use xo_tests::servers::{PeerdOptions, address};
use xo_tests::{Bed, Connection};

/// Three requests that the policy sends away, on one connection; the nodes that answered.
fn three_requests(bed: &Bed) -> Vec<String> {
    bed.on("client", || {
        let mut c = Connection::to(&address("host"), 80).expect("connect");
        ["/img/1k", "/img/64k", "/img/1m"].map(|p| c.get(p).expect(p).node().to_owned()).into()
    })
}

#[test]
fn without_a_daemon_on_the_host() {
    let bed = Bed::up(1, 1);
    let mut command = bed.preloaded("host", "nginx");
    // Starting one is not possible either.
    command.env("XO_PEERD", "/nonexistent");
    let _nginx = bed.nginx_with("host", command);
    assert_eq!(three_requests(&bed), ["host"; 3]);
}

#[test]
fn without_a_daemon_on_the_target() {
    let bed = Bed::up(1, 1);
    let _host = bed.peerd("host", &PeerdOptions::default());
    let _nginx = bed.nginx("host");
    let before = Counters::of(&bed);
    assert_eq!(three_requests(&bed), ["host"; 3]);
    let counted = Counters::of(&bed).since(&before);
    assert_eq!(counted.losses(), 0, "{}", counted.troubles());
    assert!(bed.status("host", "/refused_by_reason/peer_unreachable") > 0, "{:?}", bed.try_status("host"));
    assert_eq!(bed.status("host", "/flows_active"), 0);
}

/// A target that cannot be reached is tried again and again, and spoken of once; and once more when it is there.
#[test]
fn an_outage_is_said_once() {
    let bed = Bed::up(1, 1);
    let head = format!("insecure = true\npolicy = \"{}\"", bed.usual_policy().display());
    let host = bed.peerd("host", &PeerdOptions { head, ..PeerdOptions::default() });
    let failures = || bed.on("host", Counters::here).get("AttemptFails");
    let said = |what: &str| {
        host.output()
            .lines()
            .filter(|l| l.contains("INFO") || l.contains("WARN"))
            .filter(|l| l.contains(what))
            .count()
    };
    for outage in 1..=2 {
        // Pauses of 100 ms, 200 ms and so on.
        let before = failures();
        assert!(wait_for(Duration::from_secs(20), || failures() >= before + 4), "{}", host.output());
        assert_eq!(said("peer t1 at 10.3.0.2:7400: "), outage, "{}", host.output());
        assert_eq!(said("Connection refused"), outage, "{}", host.output());
        let target = bed.peerd("t1", &PeerdOptions::default());
        let back = || said("peer t1: connected again after") == outage;
        assert!(wait_for(Duration::from_secs(20), back), "{}", host.output());
        drop(target);
    }
}

#[test]
fn a_target_that_refuses() {
    let bed = Bed::up(1, 1);
    let _host = bed.peerd("host", &PeerdOptions::default());
    let other = "[[handler]]\nname = \"other\"\nmode = \"attach\"\nport = 80\n";
    let without = bed.peerd("t1", &PeerdOptions { sections: other.into(), ..PeerdOptions::default() });
    let _nginx = bed.nginx("host");
    let before = Counters::of(&bed);
    assert_eq!(three_requests(&bed), ["host"; 3], "no such handler on the target");
    // Who has refused is not asked again at once.
    assert!(bed.status("host", "/refused_by_reason/no_handler") >= 1);
    let not_asked = bed.status("host", "/library/no_target");
    assert_eq!(bed.status("host", "/refused_by_reason/no_handler") + not_asked, 3);
    drop(without);
    let refused = bed.status("host", "/refused_by_reason/no_handler");

    let _target = bed.peerd("t1", &PeerdOptions::default());
    let mut third = three_requests(&bed);
    // The daemon looks for a peer that went away once a second.
    wait_for(Duration::from_secs(10), || {
        let asked = bed.status("host", "/refused_by_reason/no_handler") > refused;
        if !asked {
            third = three_requests(&bed);
        }
        asked
    });
    assert_eq!(third, ["host"; 3], "nobody listens behind the handler");
    assert!(bed.status("host", "/refused_by_reason/no_handler") > refused, "{:?}", bed.try_status("host"));
    let counted = Counters::of(&bed).since(&before);
    assert_eq!(counted.losses(), counted.get("TCPSynRetrans"), "{}", counted.troubles());
    bed.wait_idle(&["host", "t1"]);

    // And when there is a server, which the target reports at once, requests move.
    let _server = bed.nginx("t1");
    bed.wait_acceptors("t1", "web", 4);
    let mut nodes = Vec::new();
    wait_for(Duration::from_secs(10), || {
        nodes = three_requests(&bed);
        nodes == ["t1"; 3]
    });
    assert_eq!(nodes, ["t1"; 3]);
}

#[test]
fn several_hosts_with_the_same_client_ports() {
    let bed = Bed::up(1, 2);
    let _daemons = ["host", "host2", "t1"].map(|n| bed.peerd(n, &PeerdOptions::default()));
    let _servers = ["host", "host2", "t1"].map(|n| bed.nginx(n));
    bed.wait_acceptors("t1", "web", 4);
    let nodes = bed.on("client", || {
        // Bound to the same port for both hosts, so that the target sees one client address twice.
        let connect = |host: &str, port: u16| {
            let socket = xo_tests::client::bound("10.1.0.3", port, &address(host), 80).expect("connect");
            Connection::over(socket).expect("options")
        };
        let mut nodes = Vec::new();
        for port in [21_001, 21_002, 21_003] {
            let mut pair = [connect("host", port), connect("host2", port)];
            for path in ["/img/1k", "/img/1m", "/img/64k"] {
                for c in &mut pair {
                    nodes.push(c.get(path).expect(path).node().to_owned());
                }
            }
        }
        nodes
    });
    assert_eq!(nodes, ["t1"; 18]);
    for host in ["host", "host2"] {
        assert_eq!(bed.status(host, "/offloads_total"), 3);
    }
    bed.wait_idle(&["host", "host2", "t1"]);
}
