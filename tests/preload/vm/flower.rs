//! Rules of tc-flower in the kernel: a connection whose packets are steered by nothing else, as it would be by a NIC.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use xo_flower::{ANCHOR, Channel, Error, Hook, Place, Rewrite, Rule, Taken, rule};
use xo_tests::servers::{address, address6};
use xo_tests::{Bed, client, content};

const HOST_PORT: u16 = 80;
const TARGET_PORT: u16 = 8080;
const CLIENT_PORT: u16 = 45_678;
const PREFERENCE: u16 = 10;
const UPLOAD: usize = 100_000;
const DOWNLOAD: usize = 300_000;

/// Number and Ethernet address of an interface.
fn link(bed: &Bed, node: &str, device: &str) -> (u32, [u8; 6]) {
    let shown = bed.run(node, Command::new("ip").args(["-j", "link", "show", device]));
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    let number = shown[0]["ifindex"].as_u64().and_then(|n| u32::try_from(n).ok()).expect("a number");
    let text = shown[0]["address"].as_str().expect("an address");
    let octets: Vec<u8> = text.split(':').map(|o| u8::from_str_radix(o, 16).expect("hex")).collect();
    (number, octets.try_into().expect("six octets"))
}

fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse::<IpAddr>().expect("an address"), port)
}

/// A server on t1 that takes one upload and answers with a download.
fn serve(bed: &Bed, ip: &str) -> std::thread::JoinHandle<SocketAddr> {
    let listener = bed.on("t1", {
        let ip = ip.to_owned();
        move || TcpListener::bind((ip, TARGET_PORT)).expect("listen")
    });
    std::thread::spawn(move || {
        let (mut socket, client) = listener.accept().expect("accept");
        socket.set_read_timeout(Some(Duration::from_secs(60))).expect("a time-out");
        let mut body = vec![0; UPLOAD];
        socket.read_exact(&mut body).expect("the upload");
        assert!(body == content::of("upload", UPLOAD), "the upload differs");
        socket.write_all(&content::of("download", DOWNLOAD)).expect("write");
        client
    })
}

/// The connection, from the client's side.
fn talk(bed: &Bed, from: &str, to: &str) {
    let (from, to) = (from.to_owned(), to.to_owned());
    bed.on("client", move || {
        let mut socket = client::bound(&from, CLIENT_PORT, &to, HOST_PORT).expect("connect");
        socket.set_read_timeout(Some(Duration::from_secs(60))).expect("a time-out");
        socket.write_all(&content::of("upload", UPLOAD)).expect("write");
        let mut body = Vec::new();
        socket.read_to_end(&mut body).expect("the download");
        assert!(body == content::of("download", DOWNLOAD), "the download differs");
    });
}

#[test]
#[ignore = "needs a kernel with cls_flower: scripts/vm"]
fn a_flow_is_steered_by_rules_alone_until_they_go() {
    let bed = Bed::up(1, 1);
    for node in ["client", "t1"] {
        // act_csum leaves aggregates alone.
        bed.run(node, Command::new("ip").args(["link", "set", "eth0", "gso_max_segs", "1"]));
    }
    let (on_host, host_ethernet) = link(&bed, "host", "eth0");
    let (_, router_ethernet) = link(&bed, "router", "r2");
    let (on_target, _) = link(&bed, "t1", "eth0");
    let mut host = bed.on("host", || Channel::open().expect("netlink"));
    let mut target = bed.on("t1", || Channel::open().expect("netlink"));
    for (channel, interface) in [(&mut host, on_host), (&mut target, on_target)] {
        let taken = channel.probe(interface).expect("a probe");
        assert_eq!(taken, Taken { software: true, hardware: false }, "a veth pair");
    }
    host.anchor(on_host, Hook::Ingress, Place::Software, PREFERENCE).expect("anchors");
    for of in [address, address6] {
        let (client, server, place) =
            (at(&of("client"), CLIENT_PORT), at(&of("host"), HOST_PORT), at(&of("t1"), TARGET_PORT));
        let redirect = Rule {
            interface: on_host,
            hook: Hook::Ingress,
            place: Place::Software,
            preference: PREFERENCE,
            handle: 77,
            source: client,
            destination: server,
            ends: true,
            rewrite: Rewrite {
                source: None,
                destination: Some(place),
                ethernet: Some((router_ethernet, host_ethernet)),
                out: Some(on_host),
            },
        };
        let rewrite = Rule {
            interface: on_target,
            hook: Hook::Egress,
            source: place,
            destination: client,
            rewrite: Rewrite { source: Some(server), ..Rewrite::default() },
            ..redirect
        };
        host.add(&redirect).expect("the redirect");
        target.add(&rewrite).expect("the source rewrite");
        let twice = host.add(&redirect).expect_err("it is there");
        assert!(matches!(&twice, Error::Refused(e) if e.raw_os_error() == Some(libc::EEXIST)), "{twice}");
        let hardware = host.add(&Rule { place: Place::Hardware, handle: 78, ..redirect });
        assert!(matches!(hardware, Err(Error::Refused(_))), "{hardware:?}");
        assert_eq!(host.packets(&redirect).expect("a count"), 0);

        let serving = serve(&bed, &of("t1"));
        talk(&bed, &of("client"), &of("host"));
        assert_eq!(serving.join().expect("no panic"), client, "who the server saw");
        let counts = [host.packets(&redirect), target.packets(&rewrite)].map(|n| n.expect("a count"));
        println!("{client} to {server}: {counts:?} packets to and from {place}");
        let least = [UPLOAD, DOWNLOAD].map(|n| n as u64 / 1448);
        assert!(counts[0] >= least[0] && counts[1] >= least[1], "{counts:?}, at least {least:?}");

        for (channel, rule) in [(&mut host, &redirect), (&mut target, &rewrite)] {
            channel.remove(rule).expect("a removal");
            channel.remove(rule).expect("a removal of what is gone");
            assert!(matches!(channel.packets(rule), Err(Error::Refused(_))), "it is still there");
        }
        let (from, to) = (of("client"), of("host"));
        let refused = bed.on("client", move || client::bound(&from, CLIENT_PORT, &to, HOST_PORT));
        assert!(refused.is_err(), "nobody listens on the host");
        let anchor = rule::anchor(on_host, Hook::Ingress, Place::Software, PREFERENCE, server.is_ipv6());
        assert_eq!(host.packets(&anchor).expect("an anchor"), 0, "no packet is for it");
    }
    the_anchors_stay_until_they_are_weighed(&bed, &mut host, on_host);
}

/// Rules that come and go leave the classifiers alone, which go with the anchors.
fn the_anchors_stay_until_they_are_weighed(bed: &Bed, host: &mut Channel, on_host: u32) {
    let shown = || {
        let shown = bed.run("host", Command::new("tc").args(["filter", "show", "dev", "eth0", "ingress"]));
        let count = |what: &str| shown.matches(what).count();
        (count("flower"), count(&format!("handle {ANCHOR:#x}")))
    };
    assert_eq!(shown(), (4, 2), "of each family the classifier, and a rule");
    let (hook, place) = (Hook::Ingress, Place::Software);
    let twice = host.anchor(on_host, hook, place, PREFERENCE).expect_err("they are there");
    assert!(matches!(&twice, Error::Refused(e) if e.raw_os_error() == Some(libc::EEXIST)), "{twice}");
    for _ in 0..2 {
        host.weigh_anchor(on_host, hook, place, PREFERENCE).expect("a removal, and one of what is gone");
        assert_eq!(shown(), (0, 0));
    }
}
