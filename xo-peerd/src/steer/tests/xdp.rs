//! The fast path beyond a table of frames: every length, many addresses, marks; how it is attached, and what an interface
//! really sends.

use std::time::Duration;

use xo_bpf_abi::{FLAG_PASS, FLAG_RULE};

use super::super::*;
use super::bench::{Bench, Hook, INGRESS, Verdict, paths, redirect_unordered};
use super::frame::{NEIGHBOUR, OWN, frame, left_to_nic, valid};
use super::sweep::{Numbers, with_zero_checksum, without_checksums};
use super::tap::{Tap, alone};
use super::veth::{PacketSocket, Sender, Veth, ip, receive_offload};

const FLOW: u64 = 7;
const FOR_EVER: u64 = u64::MAX;
/// For what must come, and for what must not.
const PATIENCE: Duration = Duration::from_secs(5);
const QUIET: Duration = Duration::from_millis(100);

fn socket(text: &str) -> SocketAddr {
    text.parse().unwrap_or_else(|_| panic!("{text}"))
}

fn v4() -> FlowKey {
    flow_key(socket("192.0.2.7:40000"), socket("10.2.0.2:80"))
}

fn redirect(steer: &mut Steer, key: &FlowKey, to: SocketAddr) {
    redirect_unordered(steer, key, FLOW, to);
}

/// Until the ingress program has seen that nothing is held any more.
#[test]
fn a_flow_that_was_held_is_left_to_the_ingress_program_at_first() {
    let mut bench = Bench::new();
    let to = socket("10.3.0.2:8080");
    bench.steer.hold(&v4(), FLOW, 0).expect("an entry");
    bench.steer.redirect(&v4(), FLOW, (0, 1), to).expect("the flip");
    bench.way(to.ip(), INGRESS, 1500, FOR_EVER);
    let sent = frame("eth | v4 192.0.2.7 > 10.2.0.2 | tcp 40000 > 80 A");
    assert_eq!(bench.run(Hook::Xdp, &sent).0, Verdict::Pass);
    assert_eq!(bench.run(Hook::Ingress, &sent).0, Verdict::Redirect);
    assert_eq!(bench.run(Hook::Xdp, &sent).0, Verdict::Back);
    assert_eq!(bench.paths(), [("redirected", 1), ("xdp_redirected", 1), ("xdp_left", 1)]);
}

#[test]
fn a_truncated_frame_is_passed_up_at_every_length() {
    for (ip, client, local, other) in [
        ("v4 192.0.2.7 > 10.2.0.2", "192.0.2.7:40000", "10.2.0.2:80", "10.3.0.2:8080"),
        ("v6 2001:db8::7 > fd00:2::2", "[2001:db8::7]:40000", "[fd00:2::2]:80", "[fd00:3::2]:8080"),
    ] {
        let mut bench = Bench::new();
        redirect(&mut bench.steer, &flow_key(socket(client), socket(local)), socket(other));
        bench.way(socket(other).ip(), INGRESS, 1500, FOR_EVER);
        let whole = frame(&format!("eth | {ip} | tcp 40000 > 80 A | \"hello\""));
        for length in 14..whole.len() {
            let cut = &whole[..length];
            let (verdict, after) = bench.run(Hook::Xdp, cut);
            assert_eq!((verdict, &after[..]), (Verdict::Pass, cut), "{ip}: {length}");
        }
        assert_eq!(bench.paths(), []);
        assert_eq!(bench.run(Hook::Xdp, &whole).0, Verdict::Back, "the whole frame is one of the flow");
    }
}

/// Incremental arithmetic gives what a receiver accepts, whatever addresses, ports and checksums are; and what cannot be told from
/// a partial sum is passed up.
#[test]
fn checksums_are_right_for_all_addresses() {
    let mut bench = Bench::new();
    let mut numbers = Numbers(0x853c_49e6_748f_ea9b);
    let mut partial = 0;
    for round in 0..3000_u32 {
        let v6 = round % 2 == 1;
        let (client, local, other) = (numbers.ip(v6), numbers.ip(v6), numbers.ip(v6));
        let (client_port, local_port, port) = (numbers.word(), numbers.word(), numbers.word());
        let hops = 2 + numbers.next() % 254;
        let tcp = format!("A seq={} ack={}", numbers.next() as u32, numbers.next() as u32);
        let layers = |eth: &str, end: IpAddr, end_port: u16, hops: u64| {
            let (version, hops) =
                if v6 { ("v6", format!("hops={hops}")) } else { ("v4", format!("ttl={hops}")) };
            format!("{eth} | {version} {client} > {end} {hops} | tcp {client_port} > {end_port} {tcp}")
        };
        let mut before = layers("eth", local, local_port, hops);
        let mut after = layers("eth on", other, port, hops - 1);
        match round % 12 {
            // The same window, or the frames would differ in it.
            0..4 => {
                let zero = with_zero_checksum(&before, v6);
                after = format!("{after} {}", zero.rsplit(' ').next().expect("the window"));
                before = zero;
            }
            4..8 => {
                let zero = with_zero_checksum(&after, v6);
                before = format!("{before} {}", zero.rsplit(' ').next().expect("the window"));
                after = zero;
            }
            _ => {}
        }
        let key = flow_key(SocketAddr::new(client, client_port), SocketAddr::new(local, local_port));
        redirect(&mut bench.steer, &key, SocketAddr::new(other, port));
        bench.way(other, INGRESS, 1500, FOR_EVER);
        let sent = frame(&before);
        let (verdict, got) = bench.run(Hook::Xdp, &sent);
        if left_to_nic(&sent[14..]) {
            assert_eq!((verdict, &got), (Verdict::Pass, &sent), "{before}");
            partial += 1;
        } else {
            assert_eq!(verdict, Verdict::Back, "{before}");
            assert!(valid(&got[14..]), "{before} -> {got:02x?}");
            assert_eq!(without_checksums(&got, v6), without_checksums(&frame(&after), v6), "{before}");
        }
        let halfway = frame(&format!("{before} sum=partial"));
        assert_eq!(bench.run(Hook::Xdp, &halfway), (Verdict::Pass, halfway.clone()), "{before}, partial");
        assert!(bench.steer.remove_flow(&key, FLOW).expect("the map"), "{before}");
        bench.steer.ways.withdraw(other);
    }
    assert_eq!(bench.paths(), [("xdp_redirected", 3000 - partial), ("xdp_left", 3000 + partial)]);
}

/// One pattern in 65,536 of a whole checksum is that of a partial one: the ingress program can tell, and is asked.
#[test]
fn what_may_be_a_partial_sum_is_passed_up_and_steered_there() {
    let mut bench = Bench::new();
    redirect(&mut bench.steer, &v4(), socket("10.3.0.2:8080"));
    bench.way(socket("10.3.0.2:8080").ip(), INGRESS, 1500, FOR_EVER);
    // The sequence number makes up for the checksum.
    let alike = (0..=u16::MAX).find_map(|seq| {
        let text = format!("eth | v4 192.0.2.7 > 10.2.0.2 | tcp 40000 > 80 A seq={seq}");
        let sent = frame(&text);
        left_to_nic(&sent[14..]).then_some(sent)
    });
    let alike = alike.expect("one of all checksums");
    assert!(valid(&alike[14..]), "whole nevertheless");
    assert_eq!(bench.run(Hook::Xdp, &alike), (Verdict::Pass, alike.clone()));
    let (verdict, after) = bench.run(Hook::Ingress, &alike);
    assert_eq!(verdict, Verdict::Redirect);
    assert!(valid(&after[14..]));
    assert_eq!(bench.paths(), [("redirected", 1), ("xdp_left", 1)]);
}

#[test]
fn a_flow_with_a_mark_is_the_ingress_programs() {
    let mut bench = Bench::new();
    redirect(&mut bench.steer, &v4(), socket("10.3.0.2:8080"));
    bench.way(socket("10.3.0.2:8080").ip(), INGRESS, 1500, FOR_EVER);
    let sent = frame("eth | v4 192.0.2.7 > 10.2.0.2 | tcp 40000 > 80 A");
    // All that there is, and what there may be once.
    for marks in [FLAG_RULE, FLAG_PASS, FLAG_RULE | FLAG_PASS] {
        bench.steer.mark_rule(&v4(), FLOW, marks).expect("an entry");
        assert_eq!(bench.run(Hook::Xdp, &sent), (Verdict::Pass, sent.clone()), "{marks}");
    }
    for bit in 0..32 {
        let entry = bench.steer.flow(&v4()).expect("an entry");
        bench.steer.flows.insert(v4(), FlowEntry { flags: 1 << bit, ..entry }, EXIST).expect("the map");
        assert_eq!(bench.run(Hook::Xdp, &sent), (Verdict::Pass, sent.clone()), "bit {bit}");
    }
    bench.steer.redirect(&v4(), FLOW, (0, 1), socket("10.3.0.2:8080")).expect("an entry");
    let entry = bench.steer.flow(&v4()).expect("an entry");
    bench.steer.flows.insert(v4(), FlowEntry { flags: 0, ..entry }, EXIST).expect("the map");
    assert_eq!(bench.run(Hook::Xdp, &sent).0, Verdict::Back);
    assert_eq!(bench.paths(), [("xdp_redirected", 1), ("xdp_left", 35)]);
}

/// What `vb` sends on comes out of `va`, with the neighbour's address before it.
fn comes_back(veth: &Veth, out: &PacketSocket, text: &str, to: &str) {
    let sent = frame(&format!("eth | {text}"));
    Sender::new(&sent).send_one();
    let got = out.tcp(PATIENCE).unwrap_or_else(|| panic!("{text}: nothing; {:?}", paths(&veth.steer)));
    assert_eq!(got, frame(&format!("eth on | {to}")), "{text}");
}

/// Whether the driver does it depends on the peer: without NAPI there, what is sent back is lost.
#[test]
fn a_virtual_interface_is_native_only_where_its_peer_polls() {
    let ours = "v4 192.0.2.7 > 10.2.0.2 | tcp 40000 > 80 PA | \"hello\"";
    let theirs = "v4 192.0.2.7 > 10.3.0.2 ttl=63 | tcp 40000 > 8080 PA | \"hello\"";
    for (polls, mode) in [(false, "xdp-generic"), (true, "xdp-native")] {
        alone(|| {
            let mut veth = Veth::up();
            let out = PacketSocket::on("va");
            receive_offload("va", polls);
            redirect(&mut veth.steer, &v4(), socket("10.3.0.2:8080"));
            comes_back(&veth, &out, ours, theirs);
            veth.steer.attach_xdp(&["vb".into()]);
            assert_eq!(veth.steer.mode(), mode);
            comes_back(&veth, &out, ours, theirs);
            assert_eq!(paths(&veth.steer), [("redirected", 1), ("egress_miss", 1), ("xdp_redirected", 1)]);
            // The peer stops polling: the driver says so, and tc does all within a second.
            receive_offload("va", false);
            veth.steer.refresh_ways();
            comes_back(&veth, &out, ours, theirs);
            let at_tc = veth.steer.counters()[Path::Redirected as usize];
            assert_eq!(at_tc, if polls { 2 } else { 1 }, "{mode}");
            // What is for the ingress program gets there.
            veth.steer.mark_rule(&v4(), FLOW, FLAG_RULE).expect("an entry");
            comes_back(&veth, &out, ours, theirs);
            assert_eq!(veth.steer.counters()[Path::Redirected as usize], at_tc + 1, "{mode}");
            Sender::new(&frame("eth | v4 192.0.2.7 > 10.2.0.2 | tcp 40000 > 80 FA")).send_one();
            assert!(out.tcp(PATIENCE).is_some(), "{mode}: a FIN");
            assert_eq!(veth.steer.counters()[Path::Redirected as usize], at_tc + 2, "{mode}");
        });
    }
}

/// The kernel learns where the neighbour is without a packet through it, and the fast path is told.
#[test]
fn a_neighbour_that_moves_is_followed() {
    alone(|| {
        let mut veth = Veth::up();
        let out = PacketSocket::on("va");
        veth.steer.attach_xdp(&["vb".into()]);
        redirect(&mut veth.steer, &v4(), socket("10.3.0.2:8080"));
        let sent = frame("eth | v4 192.0.2.7 > 10.2.0.2 | tcp 40000 > 80 A");
        for neighbour in [NEIGHBOUR, [2, 0, 0, 0, 0, 0x17], NEIGHBOUR] {
            let text = neighbour.map(|b| format!("{b:02x}")).join(":");
            ip(&format!("neigh replace 10.2.0.1 lladdr {text} dev vb"));
            veth.steer.refresh_ways();
            Sender::new(&sent).send_one();
            let got = out.tcp(PATIENCE).expect("the packet");
            assert_eq!(got[..12], [neighbour, OWN].concat());
        }
        assert_eq!(paths(&veth.steer), [("xdp_redirected", 3)]);
        // Not known any more: tc waits for it, and so does the packet.
        ip("neigh del 10.2.0.1 dev vb");
        veth.steer.refresh_ways();
        Sender::new(&sent).send_one();
        assert_eq!(out.tcp(QUIET), None);
        assert_eq!(veth.steer.counters()[Path::XdpLeft as usize], 1);
    });
}

/// Aggregates and partial checksums, as virtual interfaces have them: steered as without XDP, by the program behind it.
#[test]
fn offloads_are_the_ingress_programs_business() {
    alone(|| {
        let mut tap = Tap::up();
        tap.steer.attach_xdp(&["tap0".into()]);
        println!("{}", tap.steer.mode());
        redirect(&mut tap.steer, &v4(), socket("10.3.0.2:8080"));
        for (sum, data, gso_size, expected) in [
            ("", 500, None, [("redirected", 0), ("xdp_redirected", 1)]),
            ("sum=partial", 500, Some(0), [("redirected", 1), ("xdp_redirected", 1)]),
            ("sum=partial", 30_000, Some(1400), [("redirected", 2), ("xdp_redirected", 1)]),
            ("sum=partial", 1000, Some(500), [("redirected", 3), ("xdp_redirected", 1)]),
        ] {
            let layers = |ip: &str, port: u16| {
                frame(&format!("eth | v4 192.0.2.7 > {ip} | tcp 40000 > {port} PA {sum} | fill {data}"))
            };
            let sent = layers("10.2.0.2", 80);
            match gso_size {
                Some(gso_size) => tap.send_offloaded(&sent, gso_size),
                None => tap.send(&sent),
            }
            let (_, got) = tap.receive(PATIENCE).unwrap_or_else(|| panic!("{sum} {data}: nothing"));
            assert_eq!(got[14..], layers("10.3.0.2 ttl=63", 8080)[14..], "{sum} {data}");
            let counted = tap.paths();
            for (path, n) in expected {
                let found = counted.iter().find(|(name, _)| *name == path).map_or(0, |(_, n)| *n);
                assert_eq!(found, n, "{sum} {data}: {path} {counted:?}");
            }
        }
    });
}
