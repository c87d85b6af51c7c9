//! What a table of single frames cannot show: each length, many addresses, a full ring.

use super::super::*;
use super::bench::{Bench, Hook, Verdict, owner};
use super::frame::{frame, valid, valid_error};

/// A frame's layers below and above the addresses, and the length of its headers.
const SHAPES: [(&str, &str, &str, usize); 7] = [
    ("eth", "4", "", 54),
    ("eth", "4", "options=94040000", 58),
    ("eth | vlan 5", "4", "", 58),
    ("eth | qinq 5", "4", "options=94040000", 62),
    ("eth", "6", "", 74),
    ("eth | vlan 5", "6", "", 78),
    ("eth | qinq 5", "6", "", 78),
];

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap_or_else(|_| panic!("{text}"))
}

/// Client, this machine, the other machine.
fn ends(version: &str) -> [&'static str; 3] {
    if version == "4" {
        ["192.0.2.7", "10.2.0.2", "10.3.0.2"]
    } else {
        ["2001:db8::7", "fd00:2::2", "fd00:3::2"]
    }
}

fn socket(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap_or_else(|_| panic!("{ip}")), port)
}

/// A frame that is cut anywhere before the end of its TCP header passes as it is, and no entry sees it.
#[test]
fn a_truncated_frame_passes_at_every_length() {
    let mut runs = 0;
    for (link, version, options, headers) in SHAPES {
        let [client, local, other] = ends(version);
        let key = flow_key(socket(client, 40000), socket(local, 80));
        for (hook, addresses, ports) in [
            (Hook::Ingress, format!("{client} > {local}"), "40000 > 80"),
            (Hook::Egress, format!("{local} > {client}"), "80 > 40000"),
        ] {
            let mut bench = Bench::new();
            bench.steer.hold(&key, 7, 0).expect("an entry");
            bench.steer.redirect(&key, 7, (0, 1), socket(other, 8080)).expect("an entry");
            bench.steer.rewrite(&key, &owner(7), socket(other, 8080)).expect("an entry");
            let whole = frame(&format!("{link} | v{version} {addresses} {options} | tcp {ports} A"));
            assert_eq!(whole.len(), headers, "{link} v{version} {options}");
            // The kernel's test run takes no IP packet that is shorter than an IP header: live.rs does.
            let shortest = match (link, version) {
                ("eth", "4") => 34,
                ("eth", _) => 54,
                _ => 14,
            };
            for (n, length) in (1..).zip(shortest..headers) {
                let (verdict, after) = bench.run(hook, &whole[..length]);
                assert_eq!(
                    (verdict, &after[..]),
                    (Verdict::Pass, &whole[..length]),
                    "{link} v{version} {length}"
                );
                assert_eq!(bench.paths(), [("unparsed", n)], "{link} v{version} {length}");
                runs += 1;
            }
            let (flow, rewrite) = (bench.steer.flow(&key), bench.steer.rewrite_entry(&key));
            assert_eq!((flow.map(|e| e.packets), rewrite.map(|e| e.packets)), (Some(0), Some(0)));
            let (verdict, after) = bench.run(hook, &whole);
            let expected = if matches!(hook, Hook::Ingress) { Verdict::Redirect } else { Verdict::Pass };
            assert_eq!(verdict, expected, "the whole frame is one of the flow");
            assert_ne!(after, whole);
        }
    }
    assert_eq!(runs, 2 * (20 + 24 + 44 + 48 + 20 + 64 + 64));
}

/// xorshift64: the same numbers each time.
pub(super) struct Numbers(pub(super) u64);

impl Numbers {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// All zeroes and all ones, which one's complement arithmetic may confuse, are frequent.
    pub(super) fn word(&mut self) -> u16 {
        match self.next() % 8 {
            0 => 0,
            1 => 0xffff,
            _ => (self.next() >> 40) as u16,
        }
    }

    pub(super) fn ip(&mut self, v6: bool) -> IpAddr {
        let words: [u16; 8] = std::array::from_fn(|_| self.word());
        if v6 {
            // Never a mapped one.
            IpAddr::from([0x2001, words[1], words[2], words[3], words[4], words[5], words[6], words[7]])
        } else {
            let (a, b) = (words[0].to_be_bytes(), words[1].to_be_bytes());
            IpAddr::from([a[0], a[1], b[0], b[1]])
        }
    }
}

/// The two checksums, zeroed: there are two zeroes in one's complement, and both are right.
pub(super) fn without_checksums(frame: &[u8], v6: bool) -> Vec<u8> {
    let mut frame = frame.to_vec();
    let sums: &[usize] = if v6 { &[70] } else { &[24, 50] };
    for at in sums {
        frame[*at..at + 2].fill(0);
    }
    frame
}

/// The same frame with a TCP checksum of zero: the window makes up for it.
pub(super) fn with_zero_checksum(text: &str, v6: bool) -> String {
    let built = frame(&format!("{text} window=1"));
    let at = if v6 { 70 } else { 50 };
    let sum = u32::from(u16::from_be_bytes([built[at], built[at + 1]])) + 1;
    let window = (sum & 0xffff) + (sum >> 16);
    let text = format!("{text} window={window}");
    assert_eq!(frame(&text)[at..at + 2], [0, 0], "{text}");
    text
}

/// Incremental arithmetic gives what a receiver accepts, whatever the addresses, ports and checksums are.
#[test]
fn checksums_are_right_for_all_addresses() {
    let mut bench = Bench::new();
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    for round in 0..3000 {
        let v6 = round % 2 == 1;
        let (client, local, other) = (numbers.ip(v6), numbers.ip(v6), numbers.ip(v6));
        let (client_port, local_port, port) = (numbers.word(), numbers.word(), numbers.word());
        let version = if v6 { "v6" } else { "v4" };
        let tcp = format!("A seq={} ack={}", numbers.next() as u32, numbers.next() as u32);
        let ingress = round % 4 < 2;
        // Whole words of the header change by it. What goes out keeps it.
        let hops = 2 + numbers.next() % 254;
        let layers = |end: IpAddr, end_port: u16, hops: u64| {
            let hops = format!("{}={hops}", if v6 { "hops" } else { "ttl" });
            if ingress {
                format!("eth | {version} {client} > {end} {hops} | tcp {client_port} > {end_port} {tcp}")
            } else {
                format!("eth | {version} {end} > {client} {hops} | tcp {end_port} > {client_port} {tcp}")
            }
        };
        let (mut before, mut after) =
            (layers(local, local_port, hops), layers(other, port, hops - u64::from(ingress)));
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
        let to = SocketAddr::new(other, port);
        let hook = if ingress {
            bench.steer.hold(&key, round, 0).expect("an entry");
            bench.steer.redirect(&key, round, (0, 1), to).expect("an entry");
            Hook::Ingress
        } else {
            bench.steer.rewrite(&key, &owner(round), to).expect("an entry");
            Hook::Egress
        };
        let (verdict, rewritten) = bench.run(hook, &frame(&before));
        assert_eq!(verdict, if ingress { Verdict::Redirect } else { Verdict::Pass }, "{before}");
        assert!(valid(&rewritten[14..]), "{before} -> {rewritten:02x?}");
        assert_eq!(without_checksums(&rewritten, v6), without_checksums(&frame(&after), v6), "{before}");
        let removed = if ingress {
            bench.steer.remove_flow(&key, round)
        } else {
            bench.steer.remove_rewrite(&key, round)
        };
        assert!(removed.expect("the map"), "{before}");
    }
    assert_eq!(bench.paths(), [("redirected", 1500), ("rewritten", 1500)]);
}

/// The same for what ICMP errors quote, however much of it is there.
#[test]
fn checksums_of_errors_are_right_for_all_addresses() {
    let mut bench = Bench::new();
    let mut numbers = Numbers(0x2545_f491_4f6c_dd1d);
    for round in 0..2000 {
        let v6 = round % 2 == 1;
        let (client, local, other, router) = (numbers.ip(v6), numbers.ip(v6), numbers.ip(v6), numbers.ip(v6));
        let (client_port, local_port, port) = (numbers.word(), numbers.word(), numbers.word());
        let (version, icmp, ip_header) = if v6 { ("v6", "icmp6 2 0", 40) } else { ("v4", "icmp 3 4", 20) };
        let cut = ip_header + 8 + numbers.next() % 60;
        let tcp = format!("A seq={} ack={}", numbers.next() as u32, numbers.next() as u32);
        let layers = |from: IpAddr, end: IpAddr, end_port: u16, hops: u32| {
            let hops = format!("{}={hops}", if v6 { "hops" } else { "ttl" });
            format!(
                "eth | {version} {from} > {end} {hops} | {icmp} mtu=1400 | cut {cut} \
                 | {version} {end} > {client} | tcp {end_port} > {client_port} {tcp} | fill 40"
            )
        };
        let key = flow_key(SocketAddr::new(client, client_port), SocketAddr::new(local, local_port));
        bench.steer.hold(&key, round, 0).expect("an entry");
        bench.steer.redirect(&key, round, (0, 1), SocketAddr::new(other, port)).expect("an entry");
        let before = layers(router, local, local_port, 9);
        let (verdict, rewritten) = bench.run(Hook::Ingress, &frame(&before));
        assert_eq!(verdict, Verdict::Redirect, "{before}");
        assert!(valid_error(&rewritten[14..]), "{before} -> {rewritten:02x?}");
        let whole = cut >= ip_header + 18;
        let zeroed = |frame: &[u8]| without_checksums_of_error(frame, v6, whole);
        // Half a TCP checksum stays what it was.
        if whole || cut < ip_header + 17 {
            assert_eq!(zeroed(&rewritten), zeroed(&frame(&layers(local, other, port, 8))), "{before}");
        }
        assert!(bench.steer.remove_flow(&key, round).expect("the map"), "{before}");
    }
    assert_eq!(bench.paths(), [("quote_steered", 2000)]);
}

/// See [`without_checksums`].
pub(super) fn without_checksums_of_error(frame: &[u8], v6: bool, whole: bool) -> Vec<u8> {
    let mut frame = frame.to_vec();
    let sums: &[usize] = if v6 { &[56, 118] } else { &[24, 36, 52, 78] };
    let (tcp, others) = sums.split_last().expect("sums");
    for at in others.iter().chain(whole.then_some(tcp)) {
        frame[*at..at + 2].fill(0);
    }
    frame
}

/// A full ring drops the packet and counts it; what was held before is not harmed, and once it is drained
/// there is room again.
#[test]
fn a_full_ring_drops_and_counts() {
    let key = flow_key(address("192.0.2.7:40000"), address("10.2.0.2:80"));
    let mut bench = Bench::with(64, 4096);
    bench.steer.hold(&key, 7, 0).expect("an entry");
    let packet =
        |seq: u32| frame(&format!("eth | v4 192.0.2.7 > 10.2.0.2 | tcp 40000 > 80 A seq={seq} | fill 1200"));
    for round in 0..10 {
        // A record is 8 bytes longer than header and packet: three do not fit into 4096 bytes, two do.
        for seq in 0..3 {
            assert_eq!(bench.run(Hook::Ingress, &packet(seq)), (Verdict::Drop, packet(seq)));
        }
        // Shorter ones do not find room either: 1440 bytes are left.
        let long = frame("eth | v4 192.0.2.7 > 10.2.0.2 | tcp 40000 > 80 A | fill 1400");
        assert_eq!(bench.run(Hook::Ingress, &long).0, Verdict::Drop);
        assert_eq!(bench.paths(), [("held", 3 * (round + 1)), ("hold_dropped", round + 1)]);
        let held = bench.held();
        assert_eq!(held.iter().map(|(h, _)| h.len).collect::<Vec<_>>(), [1240, 1240, 1240]);
        for (seq, (_, bytes)) in (0..).zip(held) {
            assert_eq!(bytes, &packet(seq)[14..], "oldest first");
        }
    }
    let entry = bench.steer.flow(&key).expect("the entry");
    assert_eq!(
        (entry.packets, entry.bytes),
        (40, 10 * (3 * 1240 + 1440)),
        "dropped ones are counted here too"
    );
}
