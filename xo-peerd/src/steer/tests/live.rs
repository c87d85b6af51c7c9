//! What BPF_PROG_TEST_RUN cannot give: aggregates of real size, checksums left to the NIC, tags that the kernel
//! has taken out of the frame, and where a redirected packet really goes.

use std::time::Duration;

use socket2::{Domain, Socket, Type};
use xo_proto::packet::segments;

use super::super::*;
use super::bench::owner;
use super::frame::{frame, left_to_nic, valid};
use super::tap::{NEEDS_CSUM, Tap, alone, offloaded};
use super::veth::{PacketSocket, ip};

/// The interface, and the neighbour behind it.
const TAP: [u8; 6] = [2, 0, 0, 0, 0, 1];
const NEXT_HOP: [u8; 6] = [2, 0, 0, 0, 0, 2];
const RST_ACK: u8 = 0x14;

/// For what must come, and for what must not.
const PATIENCE: Duration = Duration::from_secs(5);
const QUIET: Duration = Duration::from_millis(100);

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap_or_else(|_| panic!("{text}"))
}

fn v4() -> FlowKey {
    flow_key(address("192.0.2.7:40000"), address("10.2.0.2:80"))
}

fn v6() -> FlowKey {
    flow_key(address("[2001:db8::7]:40000"), address("[fd00:2::2]:80"))
}

#[test]
fn aggregates_are_held_whole_and_replayed_in_pieces() {
    alone(|| {
        let mut tap = Tap::up();
        for (id, key, ip) in [(4, v4(), "v4 192.0.2.7 > 10.2.0.2"), (6, v6(), "v6 2001:db8::7 > fd00:2::2")] {
            tap.steer.hold(&key, id, 0).expect("an entry");
            let sent = frame(&format!("eth | {ip} | tcp 40000 > 80 PA sum=partial | fill 60000"));
            tap.send_offloaded(&sent, 1400);
            let held = tap.held();
            let [(header, packet)] = held.as_slice() else { panic!("{} packets", held.len()) };
            assert_eq!(packet, &sent[14..]);
            let len = packet.len() as u32;
            let expected = HeldHeader { key, len, flow_id: id, gso_size: 1400, ip_version: id as u32 };
            assert_eq!(*header, expected);
            let (mut payload, mut pieces) = (Vec::new(), 0);
            segments(packet, 1400, None, 1500, &mut |s| {
                assert!(valid(s), "{s:02x?}");
                let headers = packet.len() - 60000;
                payload.extend_from_slice(&s[headers..]);
                pieces += 1;
            })
            .expect("segments");
            assert_eq!((pieces, &payload[..]), (43, &packet[packet.len() - 60000..]));
        }
        assert_eq!(tap.paths(), [("held", 2)]);
    });
}

/// 64 KiB from the network header on is the longest packet that the ring takes.
#[test]
fn a_packet_too_long_for_the_ring_is_dropped_and_counted() {
    alone(|| {
        let mut tap = Tap::up();
        tap.steer.hold(&v4(), 7, 0).expect("an entry");
        let long = |n: usize| {
            let data = n - 40;
            frame(&format!("eth | v4 192.0.2.7 > 10.2.0.2 length=0 | tcp 40000 > 80 A | fill {data}"))
        };
        for length in [65_535, 65_536] {
            tap.send_offloaded(&long(length), 1448);
            let held = tap.held();
            assert_eq!(
                held.iter().map(|(h, p)| (h.len as usize, p.len())).collect::<Vec<_>>(),
                [(length, length)]
            );
            assert_eq!(held[0].1, long(length)[14..]);
        }
        assert_eq!(tap.paths(), [("held", 2)]);
        for length in [65_537, 65_538, 100_000, 131_072] {
            tap.send_offloaded(&long(length), 1448);
        }
        assert_eq!(tap.held().len(), 0);
        assert_eq!(tap.paths(), [("held", 2), ("hold_dropped", 4)]);
        let entry = tap.steer.flow(&v4()).expect("the entry");
        assert_eq!(entry.packets, 6);
        assert_eq!(entry.bytes, 65_535 + 65_536 + 65_537 + 65_538 + 100_000 + 131_072);
        assert_eq!(tap.receive(QUIET), None, "nothing reached the stack");
    });
}

#[test]
fn a_redirected_packet_leaves_for_the_next_hop_with_its_offloads() {
    alone(|| {
        let mut tap = Tap::up();
        tap.steer.hold(&v4(), 4, 0).expect("an entry");
        tap.steer.redirect(&v4(), 4, (0, 1), address("10.3.0.2:8080")).expect("the flip");
        tap.steer.hold(&v6(), 6, 0).expect("an entry");
        tap.steer.redirect(&v6(), 6, (0, 1), address("[fd00:3::2]:8080")).expect("the flip");
        let ips = [
            ("v4 192.0.2.7 > 10.2.0.2 ttl=9", "v4 192.0.2.7 > 10.3.0.2 ttl=8"),
            ("v6 2001:db8::7 > fd00:2::2 hops=9", "v6 2001:db8::7 > fd00:3::2 hops=8"),
        ];
        for (before, after) in ips {
            // Whole checksum; checksum left to the NIC; aggregate.
            for (sum, data, gso_size) in
                [("", 500, None), ("sum=partial", 500, Some(0)), ("sum=partial", 30_000, Some(1400))]
            {
                let sent = frame(&format!("eth | {before} | tcp 40000 > 80 PA {sum} | fill {data}"));
                let expected = frame(&format!("eth | {after} | tcp 40000 > 8080 PA {sum} | fill {data}"));
                match gso_size {
                    Some(gso_size) => tap.send_offloaded(&sent, gso_size),
                    None => tap.send(&sent),
                }
                let (header, got) =
                    tap.receive(PATIENCE).unwrap_or_else(|| panic!("{before} {data}: nothing"));
                assert_eq!(got[..12], [&NEXT_HOP[..], &TAP[..]].concat(), "{before}");
                assert_eq!(got[12..], expected[12..], "{before}");
                let offload = gso_size.map_or([0; 2], |gso_size| {
                    let header = offloaded(&sent, gso_size);
                    [header[0], header[1]]
                });
                assert_eq!(header[..2], offload, "{before} {data}");
                assert_eq!(header[4..6], gso_size.unwrap_or(0).to_ne_bytes(), "{before} {data}");
                match gso_size {
                    Some(_) => assert!(left_to_nic(&got[14..])),
                    None => assert!(valid(&got[14..])),
                }
            }
        }
        // They pass the egress program on their way, which does not know them.
        assert_eq!(tap.paths(), [("redirected", 6), ("egress_miss", 6)]);
    });
}

/// The lengths that the kernel's test run refuses, down to a bare Ethernet header.
#[test]
fn a_truncated_packet_passes_at_every_length() {
    alone(|| {
        let mut tap = Tap::up();
        tap.steer.hold(&v4(), 4, 0).expect("an entry");
        tap.steer.hold(&v6(), 6, 0).expect("an entry");
        let mut sent = 0;
        for ip in ["v4 192.0.2.7 > 10.2.0.2", "v6 2001:db8::7 > fd00:2::2"] {
            let whole = frame(&format!("eth | {ip} | tcp 40000 > 80 A"));
            for length in 14..whole.len() {
                tap.send(&whole[..length]);
                sent += 1;
                assert_eq!(tap.paths(), [("unparsed", sent)], "{ip}, {length} bytes");
            }
        }
        assert_eq!((sent, tap.held().len()), (40 + 60, 0));
        for key in [v4(), v6()] {
            assert_eq!(tap.steer.flow(&key).map(|e| (e.packets, e.bytes)), Some((0, 0)));
        }
    });
}

/// The kernel takes a frame's outer tag out before the hook. What is redirected leaves under it.
#[test]
fn one_tag_is_steered_and_two_are_not() {
    alone(|| {
        let mut tap = Tap::up();
        let tags =
            |tags: &str, to: &str| frame(&format!("eth | {tags} | v4 192.0.2.7 > {to} PA | \"hello\""));
        let (host, target) = ("10.2.0.2 | tcp 40000 > 80", "10.3.0.2 ttl=63 | tcp 40000 > 8080");
        let two = ["vlan 5 | vlan 6", "qinq 5 | vlan 6", "vlan 5 | qinq 6", "qinq 5 | vlan 6 | vlan 7"];
        tap.steer.hold(&v4(), 7, 0).expect("an entry");
        for one in ["vlan 5", "qinq 5"] {
            tap.send(&tags(one, host));
            let held = tap.held();
            assert_eq!(
                held.iter().map(|(_, p)| &p[..]).collect::<Vec<_>>(),
                [&tags(one, host)[18..]],
                "{one}"
            );
        }
        for two in two {
            tap.send(&tags(two, host));
            assert_eq!(tap.held().len(), 0, "{two}");
        }
        assert_eq!(tap.paths(), [("held", 2)]);
        tap.steer.redirect(&v4(), 7, (0, 1), address("10.3.0.2:8080")).expect("the flip");
        for one in ["vlan 5", "qinq 5"] {
            tap.send(&tags(one, host));
            let (_, got) = tap.receive(PATIENCE).unwrap_or_else(|| panic!("{one}: nothing"));
            assert_eq!(got[12..], tags(one, target)[12..], "{one}");
        }
        for two in two {
            tap.send(&tags(two, host));
        }
        assert_eq!(tap.paths(), [("held", 2), ("redirected", 2), ("egress_miss", 2)], "two tags pass");
        assert_eq!(tap.receive(QUIET), None);
    });
}

/// The packet comes in by `tap0` and leaves by `vb`, where its target is: as long as its way is known. By itself the kernel
/// looks for a neighbour where the packet has come from.
#[test]
fn a_target_behind_another_interface_is_reached() {
    alone(|| {
        let mut tap = Tap::up();
        for command in [
            "link add va type veth peer name vb",
            "link set va up",
            "link set vb up",
            "addr add 10.9.0.2/24 dev vb",
            "addr add fd00:9::2/64 dev vb nodad",
            "neigh add 10.9.0.9 lladdr 02:00:00:00:00:09 dev vb",
            "neigh add fd00:9::9 lladdr 02:00:00:00:00:09 dev vb",
            "neigh add 10.9.0.1 lladdr 02:00:00:00:00:09 dev vb",
            "neigh add fd00:9::1 lladdr 02:00:00:00:00:09 dev vb",
        ] {
            ip(command);
        }
        // Far ones, too, and those to which there is no way yet.
        ip("route add 10.8.0.0/24 via 10.9.0.1");
        ip("-6 route add fd00:8::/64 via fd00:9::1");
        let flows = [
            (v4(), "10.9.0.9:8080"),
            (v6(), "[fd00:9::9]:8080"),
            (v4(), "10.8.0.9:8080"),
            (v6(), "[fd00:8::9]:8080"),
        ];
        let filter = PacketSocket::on("va");
        for (id, (key, target)) in (0..).zip(flows) {
            tap.steer.hold(&key, id, 0).expect("an entry");
            tap.steer.redirect(&key, id, (0, 1), address(target)).expect("the flip");
            let layers = if key == v4() { "v4 192.0.2.7 > 10.2.0.2" } else { "v6 2001:db8::7 > fd00:2::2" };
            let sent = frame(&format!("eth | {layers} | tcp 40000 > 80 PA seq={id} | \"hello\""));
            for known in [true, false, true] {
                if known {
                    tap.steer.refresh_ways();
                } else {
                    tap.steer.ways.forget();
                }
                tap.send(&sent);
                let got = filter.tcp(if known { PATIENCE } else { QUIET });
                assert_eq!(got.is_some(), known, "{target}");
                if let Some(got) = got {
                    assert_eq!(got[..6], [2, 0, 0, 0, 0, 9], "{target}: the neighbour");
                    assert!(valid(&got[14..]), "{target}");
                }
            }
            assert!(tap.steer.remove_flow(&key, id).expect("the map"));
        }
        // The route goes: the way is not believed in any more, and back it comes.
        let target = address("10.8.0.9:8080");
        tap.steer.hold(&v4(), 9, 0).expect("an entry");
        tap.steer.redirect(&v4(), 9, (0, 1), target).expect("the flip");
        let sent = frame("eth | v4 192.0.2.7 > 10.2.0.2 | tcp 40000 > 80 PA");
        ip("route del 10.8.0.0/24");
        tap.steer.routes_changed();
        tap.send(&sent);
        let (_, got) = tap.receive(PATIENCE).expect("by the default route");
        assert_eq!(got[..6], NEXT_HOP);
        assert_eq!(filter.tcp(QUIET), None);
        ip("route add 10.8.0.0/24 via 10.9.0.1");
        tap.steer.routes_changed();
        tap.send(&sent);
        assert!(filter.tcp(PATIENCE).is_some(), "by the route that is back");
    });
}

/// A real socket's packets: their checksums are left to the NIC.
#[test]
fn a_socket_speaks_with_the_hosts_address() {
    alone(|| {
        let mut tap = Tap::up();
        for (local, client, host) in [
            ("10.2.0.2:8080", "192.0.2.7:40000", "10.9.0.2:80"),
            ("[fd00:2::2]:8080", "[2001:db8::7]:40000", "[fd00:9::2]:80"),
        ] {
            let (local, client, host) = (address(local), address(client), address(host));
            let key = flow_key(client, local);
            tap.steer.rewrite(&key, &owner(7), host).expect("an entry");
            let socket = Socket::new(Domain::for_address(local), Type::STREAM, None).expect("a socket");
            socket.set_nonblocking(true).expect("non-blocking");
            socket.bind(&local.into()).expect("bind");
            let connecting = socket.connect(&client.into()).expect_err("nobody answers yet");
            assert_eq!(connecting.raw_os_error(), Some(libc::EINPROGRESS));
            let (header, got) = tap.receive(PATIENCE).expect("a SYN");
            let packet = &got[14..];
            assert_eq!((header[0] & NEEDS_CSUM, left_to_nic(packet)), (NEEDS_CSUM, true));
            let (from, to, tcp) = if local.is_ipv4() {
                (&packet[12..16], &packet[16..20], 20)
            } else {
                (&packet[8..24], &packet[24..40], 40)
            };
            let octets = |a: SocketAddr| match a.ip() {
                IpAddr::V4(ip) => ip.octets().to_vec(),
                IpAddr::V6(ip) => ip.octets().to_vec(),
            };
            assert_eq!((from, to), (&octets(host)[..], &octets(client)[..]));
            assert_eq!(
                packet[tcp..tcp + 4],
                [host.port().to_be_bytes(), client.port().to_be_bytes()].concat()
            );
            let entry = tap.steer.rewrite_entry(&key).expect("the entry");
            assert_eq!((entry.packets, entry.bytes), (1, packet.len() as u64));
        }
        assert_eq!(tap.paths(), [("rewritten", 2)]);
    });
}

/// Without the programs the stack answers; what they hold it never sees.
#[test]
fn a_held_packet_is_kept_from_the_stack_until_the_programs_go() {
    alone(|| {
        let mut tap = Tap::up();
        assert!(["tcx", "clsact"].contains(&tap.steer.mode()));
        // Nobody listens: the stack's answer is RST, whatever the time to live, for it is the packet's end.
        let syn = frame("eth | v4 192.0.2.7 > 10.2.0.2 ttl=1 | tcp 40000 > 80 S");
        tap.send(&syn);
        assert_eq!(tap.receive(PATIENCE).expect("an answer").1[47], RST_ACK, "no entry: passed");
        tap.steer.hold(&v4(), 7, 0).expect("an entry");
        tap.send(&syn);
        assert_eq!(tap.receive(QUIET), None);
        assert_eq!(tap.held().len(), 1);
        assert!(tap.steer.remove_flow(&v4(), 7).expect("the map"));
        tap.send(&syn);
        assert_eq!(tap.receive(PATIENCE).expect("an answer").1[47], RST_ACK, "entry removed: passed");
        tap.steer.hold(&v4(), 8, 0).expect("an entry");
        let Tap { file, steer } = tap;
        drop(steer);
        let mut tap = Tap {
            file,
            steer: Steer::load(&[], Sizes { flows: 64, ring: 4096 }, None)
                .expect("the programs, not attached"),
        };
        tap.send(&syn);
        assert_eq!(tap.receive(PATIENCE).expect("an answer").1[47], RST_ACK, "programs detached: passed");
    });
}
