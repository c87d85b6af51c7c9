//! The kernel of scripts/vm has what the other tests there are for, so that none of them passes for want of it.

use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::Command;

use serde_json::Value;
use xo_sys::ktls::{self, Suite, Version};
use xo_sys::tcp_repair;
use xo_tests::Bed;
use xo_tests::servers::{PeerdOptions, address};

/// Runs a command on a node; its words are separated by spaces.
fn run(bed: &Bed, node: &str, command: &str) -> String {
    let mut words = command.split(' ');
    bed.run(node, Command::new(words.next().unwrap_or_default()).args(words))
}

/// Sends so many echo requests from the client to the host; how many were answered.
fn answered(bed: &Bed, count: u32) -> u64 {
    let host = address("host");
    let output = bed.on("client", move || {
        let count = count.to_string();
        // Its exit code says whether any was.
        Command::new("ping").args(["-q", "-i", "0.01", "-W", "1", "-c", &count, &host]).output()
    });
    let output = String::from_utf8_lossy(&output.expect("ping").stdout).into_owned();
    let number = output.split(", ").find_map(|part| part.strip_suffix(" received"));
    number.and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("{output}"))
}

#[test]
#[ignore = "needs a kernel with TLS: scripts/vm"]
fn every_suite_can_be_had_in_kernel_tls() {
    let support = ktls::probe().expect("kernel TLS");
    for version in Version::ALL {
        for suite in Suite::ALL {
            assert!(support.has(version, suite), "{version:?} {suite:?}: {support:?}");
        }
    }
    println!("keys can be changed: {}", support.rekey);
}

#[test]
#[ignore = "needs a kernel with cls_flower and netem: scripts/vm"]
fn netem_loses_packets_and_flower_drops_them_and_the_daemon_attaches_by_tcx() {
    let bed = Bed::up(1, 1);
    assert_eq!(answered(&bed, 20), 20);

    run(&bed, "router", "tc qdisc add dev r2 root netem loss 50%");
    let half = answered(&bed, 100);
    assert!((5..95).contains(&half), "{half} of 100 with 50 % loss");
    run(&bed, "router", "tc qdisc del dev r2 root");

    run(&bed, "host", "tc qdisc add dev eth0 clsact");
    let filter = "flower skip_hw src_ip 10.1.0.2 dst_ip 10.2.0.2 ip_proto icmp action drop";
    run(&bed, "host", &format!("tc filter add dev eth0 ingress protocol ip pref 1 {filter}"));
    assert_eq!(answered(&bed, 20), 0);
    let shown = run(&bed, "host", "tc -s -j filter show dev eth0 ingress");
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    let packets = shown
        .as_array()
        .into_iter()
        .flatten()
        .find_map(|filter| filter.pointer("/options/actions/0/stats/packets").and_then(Value::as_u64));
    assert_eq!(packets, Some(20), "{shown:#}");
    run(&bed, "host", "tc filter del dev eth0 ingress");
    assert_eq!(answered(&bed, 20), 20);

    let _peerd = bed.peerd("t1", &PeerdOptions::default());
    let status = bed.try_status("t1").expect("a status");
    assert_eq!(status["steering"]["mode"], "tcx", "{}", status["steering"]);
}

#[test]
#[ignore = "for the kernel of scripts/vm; elsewhere the unit tests of xo-sys show it"]
fn tcp_repair_is_there() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let client = TcpStream::connect(listener.local_addr().expect("an address")).expect("connect");
    let ends = tcp_repair::ends(client.as_raw_fd()).expect("ends");
    tcp_repair::dump(client.as_raw_fd(), &ends, 1 << 20).expect("dump");
    assert!(tcp_repair::in_repair(client.as_raw_fd()));
    tcp_repair::resume(client.as_raw_fd()).expect("resume");
}
