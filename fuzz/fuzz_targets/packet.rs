//! Packets that were held, and those made of late data: every segment is within the MTU and has right checksums,
//! together they are the packet's payload in order, and cutting a finished segment again changes nothing.
//!
//! Input: two bytes GSO size, two bytes MTU, one for the new destination and whether what follows is late data or a packet
//! from its IP header on.
#![no_main]

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use libfuzzer_sys::{Corpus, fuzz_target};
use xo_proto::conn::{Buffers, ConnRecord, TcpState};
use xo_proto::packet::{Late, acknowledgement, late_segment, segments};

/// RFC 1071: the folded sum of what includes its own checksum is all ones.
fn sums_up(parts: &[&[u8]], more: usize) -> bool {
    let mut sum = more as u64;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |b| u64::from(*b));
        }
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum == 0xffff
}

/// Offsets of the TCP header and of the payload in a finished segment.
fn layout(s: &[u8]) -> (usize, usize) {
    let tcp = if s[0] >> 4 == 6 { 40 } else { usize::from(s[0] & 15) * 4 };
    (tcp, tcp + usize::from(s[tcp + 12] >> 4) * 4)
}

fn check(s: &[u8], mtu: usize) {
    assert!(s.len() <= mtu);
    let (tcp, _) = layout(s);
    let six = s[0] >> 4 == 6;
    let addresses = if six { &s[8..40] } else { &s[12..20] };
    assert!(sums_up(&[addresses, &s[tcp..]], 6 + s.len() - tcp), "TCP checksum");
    let length = |at: usize| usize::from(u16::from_be_bytes([s[at], s[at + 1]]));
    if six {
        assert_eq!(length(4), s.len() - 40);
    } else {
        assert!(sums_up(&[&s[..tcp]], 0), "IP checksum");
        assert_eq!(length(2), s.len());
    }
}

/// The segment that brings late data, of a client with the destination's kind of address.
fn late(to: SocketAddr, data: &[u8]) -> Vec<u8> {
    let client = match to {
        SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::new(10, 1, 0, 2), 40000)),
        SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 40000)),
    };
    let tcp = TcpState { snd_seq: 7, rcv_seq: u32::MAX - 5, sent: vec![0; 9], ..TcpState::default() };
    let record = ConnRecord { client, local: to, tcp, buffers: Buffers::default(), tls: None };
    let (fin, data) = data.split_first().map_or((false, data), |(first, rest)| (first & 1 == 1, rest));
    let packet = late_segment(&record, to, &Late { data: data.to_vec(), fin });
    assert_eq!(acknowledgement(&packet), Some(u32::MAX - 1));
    assert!(packet.ends_with(data));
    packet
}

fuzz_target!(|data: &[u8]| -> Corpus {
    let Some((&[g0, g1, m0, m1, kind], bytes)) = data.split_first_chunk::<5>() else { return Corpus::Reject };
    let (gso, mtu) = (u16::from_be_bytes([g0, g1]), usize::from(u16::from_be_bytes([m0, m1])));
    let to = match kind % 3 {
        0 => None,
        1 => Some(SocketAddr::from((Ipv4Addr::new(10, 3, 0, 2), 8080))),
        _ => Some(SocketAddr::from((Ipv6Addr::LOCALHOST, 8080))),
    };
    let made = to.filter(|_| kind > 200).map(|to| late(to, bytes));
    let packet = made.as_deref().unwrap_or(bytes);
    let mut all = Vec::new();
    let result = segments(packet, gso, to, mtu, &mut |s| all.push(s.to_vec()));
    // Read before it is known whether the packet is one.
    let acknowledged = acknowledgement(packet);
    let Ok(count) = result else {
        assert!(all.is_empty(), "refused, and given out");
        return Corpus::Keep;
    };
    assert!(count == all.len() && count > 0);
    let (tcp, start) = layout(packet);
    let seq = |s: &[u8]| u32::from_be_bytes([s[tcp + 4], s[tcp + 5], s[tcp + 6], s[tcp + 7]]);
    let mut next = seq(packet);
    let mut payload = Vec::new();
    for s in &all {
        check(s, mtu);
        assert_eq!(acknowledgement(s), acknowledged);
        assert_eq!(seq(s), next);
        next = next.wrapping_add((s.len() - start) as u32);
        payload.extend_from_slice(&s[start..]);
        let mut again = Vec::new();
        segments(s, gso, None, mtu, &mut |s| again.push(s.to_vec())).expect("a finished segment");
        assert!(again.len() == 1 && again[0] == *s, "cut again");
        if let Some(to) = to {
            assert_eq!(s[tcp + 2..tcp + 4], to.port().to_be_bytes());
        }
    }
    assert!(packet[start..].starts_with(&payload), "other bytes");
    Corpus::Keep
});
