//! Finished TCP segments out of a packet that was held: with another destination, cut to size, checksums
//! made anew (those of a held packet may be partial, RFC 1071 arithmetic left to the NIC).

use std::net::{IpAddr, SocketAddr};

use crate::conn::ConnRecord;

const PROTOCOL_TCP: u8 = 6;
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
/// TTL of segments of our own.
const HOPS: u8 = 64;
const CWR: u8 = 0x80;
const TCP_MIN: usize = 20;

/// Why a packet cannot be sent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PacketError {
    /// Shorter than its headers say.
    #[error("truncated packet")]
    Truncated,
    /// Not TCP, a fragment, or with IPv6 extension headers.
    #[error("not a plain TCP packet")]
    NotTcp,
    /// The new destination is of the other IP version.
    #[error("the destination is of the other IP version")]
    Version,
    /// It may not go one hop further.
    #[error("no time to live left")]
    Expired,
    /// The MTU does not hold the headers and a byte of data.
    #[error("MTU too small")]
    Mtu,
}

/// Makes the segments of `packet` (from its IP header on) and gives each to `out`. Aggregates (`gso_size`
/// payload bytes a segment) and packets longer than `mtu` are cut. `to` replaces the destination, one hop further
/// on. Returns the number of segments.
///
/// # Errors
/// See [`PacketError`]; nothing has been given out then.
pub fn segments(
    packet: &[u8],
    gso_size: u16,
    to: Option<SocketAddr>,
    mtu: usize,
    out: &mut dyn FnMut(&[u8]),
) -> Result<usize, PacketError> {
    let layout = Layout::of(packet)?;
    let mut headers = packet.get(..layout.payload).ok_or(PacketError::Truncated)?.to_vec();
    if let Some(to) = to {
        layout.redirect(&mut headers, to)?;
    }
    let payload = packet.get(layout.payload..layout.end).ok_or(PacketError::Truncated)?;
    let room = mtu.checked_sub(layout.payload).filter(|n| *n > 0).ok_or(PacketError::Mtu)?;
    let size = if gso_size > 0 { room.min(gso_size.into()) } else { room };
    let pieces: Vec<&[u8]> = if payload.is_empty() { vec![payload] } else { payload.chunks(size).collect() };
    let last = pieces.len() - 1;
    let mut segment = Vec::with_capacity(layout.payload + size);
    for (i, piece) in pieces.iter().enumerate() {
        segment.clear();
        segment.extend_from_slice(&headers);
        segment.extend_from_slice(piece);
        layout.finish(&mut segment, i, i * size, i == 0, i == last);
        out(&segment);
    }
    Ok(pieces.len())
}

/// Acknowledgement number of a TCP packet, if it is one and carries one.
#[must_use]
pub fn acknowledgement(packet: &[u8]) -> Option<u32> {
    let layout = Layout::of(packet).ok()?;
    let flags = packet.get(layout.tcp + 13)?;
    let number = packet.get(layout.tcp + 8..layout.tcp + 12)?.try_into().ok()?;
    (flags & ACK != 0).then(|| u32::from_be_bytes(number))
}

/// What reached a socket after its state had been read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Late {
    /// Data.
    pub data: Vec<u8>,
    /// The peer has closed its direction.
    pub fin: bool,
}

/// The segment from the client that brings `late` to the connection's new socket at `to`: from its IP header on, of any
/// length, checksums left to [`segments`].
#[must_use]
pub fn late_segment(record: &ConnRecord, to: SocketAddr, late: &Late) -> Vec<u8> {
    let tcp = &record.tcp;
    let length = TCP_MIN + late.data.len();
    let mut p = Vec::with_capacity(40 + length);
    match (record.client.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let total = u16::try_from(20 + length).unwrap_or(u16::MAX).to_be_bytes();
            p.extend([0x45, 0, total[0], total[1], 0, 0, 0x40, 0, HOPS, PROTOCOL_TCP, 0, 0]);
            p.extend(from.octets());
            p.extend(to.octets());
        }
        (from, to) => {
            let six = |ip| match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            let payload = u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes();
            p.extend([0x60, 0, 0, 0, payload[0], payload[1], PROTOCOL_TCP, HOPS]);
            p.extend(six(from));
            p.extend(six(to));
        }
    }
    p.extend(record.client.port().to_be_bytes());
    p.extend(to.port().to_be_bytes());
    p.extend(tcp.rcv_seq.to_be_bytes());
    let unacknowledged = (tcp.sent.len() + tcp.unsent.len()) as u32;
    p.extend(tcp.snd_seq.wrapping_sub(unacknowledged).to_be_bytes());
    let flags = ACK | PSH | if late.fin { FIN } else { 0 };
    let window = tcp.window.snd_wnd >> tcp.wscale.map_or(0, |(theirs, _)| theirs.min(14));
    p.extend([0x50, flags]);
    p.extend(u16::try_from(window).unwrap_or(u16::MAX).to_be_bytes());
    p.extend([0; 4]);
    p.extend(&late.data);
    p
}

/// Where things are in a packet.
#[derive(Clone, Copy)]
struct Layout {
    v6: bool,
    tcp: usize,
    payload: usize,
    end: usize,
}

impl Layout {
    fn of(packet: &[u8]) -> Result<Layout, PacketError> {
        let byte = |at: usize| packet.get(at).copied().ok_or(PacketError::Truncated);
        let word = |at: usize| Ok(usize::from(u16::from_be_bytes([byte(at)?, byte(at + 1)?])));
        let v6 = match byte(0)? >> 4 {
            4 => false,
            6 => true,
            _ => return Err(PacketError::NotTcp),
        };
        let (tcp, protocol, length, fragment) = if v6 {
            (40, byte(6)?, 40 + word(4)?, 0)
        } else {
            (usize::from(byte(0)? & 15) * 4, byte(9)?, word(2)?, word(6)? & 0x3fff)
        };
        if protocol != PROTOCOL_TCP || fragment != 0 || (!v6 && tcp < 20) {
            return Err(PacketError::NotTcp);
        }
        let payload = tcp + usize::from(byte(tcp + 12)? >> 4) * 4;
        // An aggregate may be longer than its length field can say; padding may follow a short packet.
        let end =
            if length == packet.len() || length < payload { packet.len() } else { length.min(packet.len()) };
        if payload < tcp + TCP_MIN || payload > packet.len() {
            return Err(PacketError::Truncated);
        }
        Ok(Layout { v6, tcp, payload, end })
    }

    fn redirect(&self, headers: &mut [u8], to: SocketAddr) -> Result<(), PacketError> {
        match to.ip() {
            IpAddr::V4(ip) if !self.v6 => put(headers, 16, &ip.octets()),
            IpAddr::V6(ip) if self.v6 => put(headers, 24, &ip.octets()),
            _ => return Err(PacketError::Version),
        }
        put(headers, self.tcp + 2, &to.port().to_be_bytes());
        // The time to live or hop limit: as at any router, so that nothing can circle for ever.
        let hops = headers.get_mut(if self.v6 { 7 } else { 8 }).ok_or(PacketError::Truncated)?;
        *hops = hops.checked_sub(1).filter(|left| *left > 0).ok_or(PacketError::Expired)?;
        Ok(())
    }

    /// Sequence number, flags, lengths and checksums of one segment.
    fn finish(&self, s: &mut [u8], index: usize, offset: usize, first: bool, last: bool) {
        let get = |s: &[u8], at: usize| s.get(at).copied().unwrap_or(0);
        let tcp = self.tcp;
        let seq = u32::from_be_bytes([get(s, tcp + 4), get(s, tcp + 5), get(s, tcp + 6), get(s, tcp + 7)]);
        put(s, tcp + 4, &seq.wrapping_add(offset as u32).to_be_bytes());
        let mut flags = get(s, tcp + 13);
        if !last {
            flags &= !(FIN | PSH);
        }
        if !first {
            flags &= !CWR;
        }
        put(s, tcp + 13, &[flags]);
        let length = s.len();
        if self.v6 {
            put(s, 4, &((length - 40) as u16).to_be_bytes());
        } else {
            put(s, 2, &(length as u16).to_be_bytes());
            let id = u16::from_be_bytes([get(s, 4), get(s, 5)]).wrapping_add(index as u16);
            put(s, 4, &id.to_be_bytes());
            put(s, 10, &[0, 0]);
            let sum = !fold(sum(s.get(..tcp).unwrap_or_default()));
            put(s, 10, &sum.to_be_bytes());
        }
        put(s, tcp + 16, &[0, 0]);
        let addresses = if self.v6 { s.get(8..40) } else { s.get(12..20) };
        let pseudo = sum(addresses.unwrap_or_default()) + u64::from(PROTOCOL_TCP) + (length - tcp) as u64;
        let total = !fold(pseudo + sum(s.get(tcp..).unwrap_or_default()));
        put(s, tcp + 16, &total.to_be_bytes());
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    for (to, from) in bytes.iter_mut().skip(at).zip(value) {
        *to = *from;
    }
}

/// Sum of 16-bit words, RFC 1071.
fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<2>();
    let tail = rest.first().map_or(0, |b| u64::from(*b) << 8);
    words.iter().map(|w| u64::from(u16::from_be_bytes(*w))).sum::<u64>() + tail
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A real segment: 10.1.0.2:40000 to 10.2.0.2:80, "hello", with timestamps; checksums as captured from
    /// a Linux sender's wire format, computed by hand below.
    fn v4(payload: &[u8], flags: u8) -> Vec<u8> {
        let mut p = vec![0x45, 0, 0, 0, 0x12, 0x34, 0x40, 0, 64, 6, 0xaa, 0xbb, 10, 1, 0, 2, 10, 2, 0, 2];
        p.extend([0x9c, 0x40, 0, 80, 0, 0, 0, 100, 0, 0, 0, 1, 0x80, flags, 1, 0, 0xcc, 0xdd, 0, 0]);
        p.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
        p.extend(payload);
        let len = p.len() as u16;
        put(&mut p, 2, &len.to_be_bytes());
        p
    }

    fn v6(payload: &[u8]) -> Vec<u8> {
        let mut p = vec![0x60, 0, 0, 0, 0, 0, 6, 64];
        p.extend("fd00:1::2".parse::<std::net::Ipv6Addr>().expect("address").octets());
        p.extend("fd00:2::2".parse::<std::net::Ipv6Addr>().expect("address").octets());
        p.extend([0x9c, 0x40, 0, 80, 0, 0, 0, 100, 0, 0, 0, 1, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
        p.extend(payload);
        let len = (p.len() - 40) as u16;
        put(&mut p, 4, &len.to_be_bytes());
        p
    }

    /// A receiver's check: the sums over header, and over pseudo-header and segment, are all ones.
    fn valid(p: &[u8]) -> bool {
        let l = Layout::of(p).expect("a packet");
        let (addresses, header_ok) =
            if l.v6 { (&p[8..40], true) } else { (&p[12..20], fold(sum(&p[..l.tcp])) == 0xffff) };
        header_ok && fold(sum(addresses) + 6 + (p.len() - l.tcp) as u64 + sum(&p[l.tcp..])) == 0xffff
    }

    fn all(p: &[u8], gso: u16, to: Option<SocketAddr>, mtu: usize) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        let n = segments(p, gso, to, mtu, &mut |s| out.push(s.to_vec())).expect("segments");
        assert_eq!(n, out.len());
        out
    }

    #[test]
    fn a_single_packet_gets_its_destination_and_checksums() {
        let to: SocketAddr = "10.3.0.2:8080".parse().expect("address");
        let s = all(&v4(b"hello", 0x18), 0, Some(to), 1500);
        assert_eq!(s.len(), 1);
        assert_eq!((&s[0][16..20], &s[0][22..24]), (&[10, 3, 0, 2][..], &8080_u16.to_be_bytes()[..]));
        assert!(valid(&s[0]));
        assert_eq!(&s[0][52..], b"hello");
        // The IPv4 header checksum, by hand: 4500+0039+1234+4000+3f06+0a01+0002+0a03+0002 = ea7b.
        assert_eq!(&s[0][10..12], &(!0xea7b_u16).to_be_bytes());
        assert_eq!(all(&v4(b"", 0x10), 0, None, 1500).len(), 1, "an ACK");
    }

    #[test]
    fn aggregates_are_cut_with_flags_where_they_belong() {
        let body: Vec<u8> = (0..3000).map(|i| i as u8).collect();
        let s = all(&v4(&body, 0x80 | 0x18 | 0x01), 1448, None, 1500);
        let flags: Vec<u8> = s.iter().map(|p| p[33]).collect();
        assert_eq!(flags, [0x90, 0x10, 0x19]);
        let seqs: Vec<u8> = s.iter().map(|p| p[26] & 15).collect();
        assert_eq!(seqs.len(), 3);
        assert_eq!(s.iter().flat_map(|p| p[52..].to_vec()).collect::<Vec<_>>(), body);
        assert_eq!(s.iter().map(|p| p[5]).collect::<Vec<_>>(), [0x34, 0x35, 0x36], "IP identification");
        assert!(s.iter().all(|p| valid(p)));
    }

    #[test]
    fn what_is_not_plain_tcp_is_refused() {
        let fails =
            |p: &[u8], to| segments(p, 0, to, 1500, &mut |_| panic!("a segment")).expect_err("refused");
        let good = v4(b"x", 0x10);
        for n in 0..52 {
            assert!(matches!(fails(&good[..n], None), PacketError::Truncated | PacketError::NotTcp), "{n}");
        }
        let mut fragment = good.clone();
        fragment[6] = 0x20;
        assert_eq!(fails(&fragment, None), PacketError::NotTcp);
        let mut udp = good.clone();
        udp[9] = 17;
        assert_eq!(fails(&udp, None), PacketError::NotTcp);
        assert_eq!(fails(&good, Some("[::1]:1".parse().expect("address"))), PacketError::Version);
        assert_eq!(segments(&good, 0, None, 52, &mut |_| {}), Err(PacketError::Mtu));
        for (mut old, at, to) in [(good, 8, "10.3.0.2:8080"), (v6(b"x"), 7, "[fd00:3::2]:8080")] {
            let to = Some(to.parse().expect("address"));
            for (hops, expected) in
                [(0, Err(PacketError::Expired)), (1, Err(PacketError::Expired)), (2, Ok(1))]
            {
                old[at] = hops;
                assert_eq!(segments(&old, 0, to, 1500, &mut |s| assert_eq!(s[at], 1)), expected);
                assert_eq!(segments(&old, 0, None, 1500, &mut |s| assert_eq!(s[at], hops)), Ok(1));
            }
        }
    }

    proptest! {
        #[test]
        fn pieces_make_the_whole(n in 0_usize..9000, gso in prop::sample::select(vec![0_u16, 536, 1440, 1448]),
                                 six in any::<bool>()) {
            let body: Vec<u8> = (0..n).map(|i| (i * 31) as u8).collect();
            let p = if six { v6(&body) } else { v4(&body, 0x18) };
            let head = p.len() - n;
            let mut next = 100_u32;
            let mut got = Vec::new();
            for s in all(&p, gso, None, 1500) {
                prop_assert!(valid(&s) && s.len() <= 1500);
                let l = Layout::of(&s).expect("a packet");
                let seq = u32::from_be_bytes([s[l.tcp + 4], s[l.tcp + 5], s[l.tcp + 6], s[l.tcp + 7]]);
                prop_assert_eq!(seq, next);
                next += (s.len() - head) as u32;
                got.extend_from_slice(&s[head..]);
            }
            prop_assert_eq!(got, body);
        }

        #[test]
        fn no_packet_panics(bytes in prop::collection::vec(any::<u8>(), 0..120), gso in any::<u16>(), mtu in 0_usize..100) {
            let _ = segments(&bytes, gso, None, mtu, &mut |_| {});
        }
    }
}
