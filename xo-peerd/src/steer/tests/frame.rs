//! Frames as text, outermost layer first:
//!
//! ```text
//! eth | vlan 5 | v4 192.0.2.7 > 10.2.0.2 | tcp 40000 > 80 PA seq=9 | "GET / HTTP/1.1" | pad 6
//! ```
//!
//! Lengths and checksums are made from the bytes here, never taken over from another frame: a frame built
//! for comparison checks the programs' incremental arithmetic.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMP6: u8 = 58;

/// Ethernet addresses of a way.
pub(super) const NEIGHBOUR: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// See [`NEIGHBOUR`].
pub(super) const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// Builds a frame. Layers:
///
/// - `eth`, `eth on` (between the addresses of the way that it goes on by), `vlan ID` (802.1Q), `qinq ID` (802.1ad), `ethertype HEX`
/// - `v4 FROM > TO`, with `ttl=`, `id=`, `options=HEX`, `fragment=HEX` (flags and offset; 4000 if absent), and
///   `version=`, `ihl=`, `length=` to say something untrue
/// - `v6 FROM > TO`, with `hops=`, `label=`, `version=`, `length=`; `hop` and `fragment OFFSET` are extension headers
/// - `tcp FROM > TO FLAGS`, with `seq=`, `ack=`, `window=`, `options=HEX`, `sum=partial` (of the pseudo-header only, as
///   a sender leaves it to its NIC) or `sum=bad`
/// - `udp FROM > TO`; `icmp` and `icmp6`, an echo request, or of type and code `TYPE CODE` with `mtu=`
/// - `cut LENGTH`: of what is inside, lengths and checksums of which are made, only so many bytes are there
/// - `"text"`, `fill LENGTH`, `hex BYTES`, and `pad LENGTH`, which no length field counts
pub(super) fn frame(text: &str) -> Vec<u8> {
    let mut built = Built::default();
    for layer in text.split(" | ").collect::<Vec<_>>().into_iter().rev() {
        built.below(layer.trim());
    }
    built.bytes.extend_from_slice(&built.padding);
    built.bytes
}

/// Bytes from hexadecimal digits; blanks are for the reader.
pub(super) fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text
        .chars()
        .filter(|c| !c.is_whitespace())
        .map(|c| c.to_digit(16).unwrap_or_else(|| panic!("`{c}` in {text}")) as u8)
        .collect();
    assert_eq!(digits.len() % 2, 0, "half a byte in {text}");
    digits.chunks(2).map(|d| d[0] << 4 | d[1]).collect()
}

/// A receiver's check of a TCP packet, from its network header on: header checksum and TCP checksum are right.
pub(super) fn valid(packet: &[u8]) -> bool {
    if packet[0] >> 4 == 4 {
        let tcp = usize::from(packet[0] & 15) * 4;
        sum(&packet[..tcp]) == 0xffff && pseudo_sum(&packet[12..20], TCP, &packet[tcp..]) == 0xffff
    } else {
        pseudo_sum(&packet[8..40], TCP, &packet[40..]) == 0xffff
    }
}

/// A receiver's check of an ICMP error, from its network header on: its own checksums, those of its IP header, and of the
/// quoted one.
pub(super) fn valid_error(packet: &[u8]) -> bool {
    if packet[0] >> 4 == 4 {
        sum(&packet[..20]) == 0xffff && sum(&packet[20..]) == 0xffff && sum(&packet[28..48]) == 0xffff
    } else {
        pseudo_sum(&packet[8..40], ICMP6, &packet[40..]) == 0xffff
    }
}

/// Whether the TCP checksum is one that the NIC shall complete, and the header checksum right.
pub(super) fn left_to_nic(packet: &[u8]) -> bool {
    let (tcp, addresses) = if packet[0] >> 4 == 4 {
        (usize::from(packet[0] & 15) * 4, &packet[12..20])
    } else {
        (40, &packet[8..40])
    };
    let expected = sum(&pseudo_header(addresses, TCP, packet.len() - tcp));
    packet[tcp + 16..tcp + 18] == expected.to_be_bytes()
        && (packet[0] >> 4 == 6 || sum(&packet[..tcp]) == 0xffff)
}

/// Sum of 16-bit words in one's complement (RFC 1071), not inverted.
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | w.get(1).map_or(0, |b| u32::from(*b)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn pseudo_sum(addresses: &[u8], protocol: u8, segment: &[u8]) -> u16 {
    let mut all = pseudo_header(addresses, protocol, segment.len());
    all.extend_from_slice(segment);
    sum(&all)
}

/// The sum does not depend on the order of its words, so one form serves both versions.
fn pseudo_header(addresses: &[u8], protocol: u8, length: usize) -> Vec<u8> {
    let mut all = addresses.to_vec();
    all.extend_from_slice(&(length as u32).to_be_bytes());
    all.extend_from_slice(&[0, protocol]);
    all
}

/// What a frame has so far, from the end.
#[derive(Default)]
struct Built {
    bytes: Vec<u8>,
    padding: Vec<u8>,
    /// What the layer below names the outermost one so far: IP protocol or EtherType.
    names: u16,
    transport: Option<Transport>,
}

/// A header whose checksum needs the addresses of the layer below.
struct Transport {
    protocol: u8,
    length: usize,
    checksum_at: usize,
    partial: bool,
    /// By how much the checksum is wrong: arithmetic on it keeps that.
    wrong: u16,
}

impl Built {
    /// Puts a layer before what there is.
    fn below(&mut self, text: &str) {
        if let Some(data) = text.strip_prefix('"') {
            let data = data.strip_suffix('"').unwrap_or_else(|| panic!("no closing quote: {text}"));
            return self.put(data.as_bytes(), 0);
        }
        let mut layer = Layer::new(text);
        match layer.kind {
            "eth" => {
                let mut header = match layer.words.pop() {
                    None => hex("02 00 00 00 00 01  02 00 00 00 00 02"),
                    Some("on") => [NEIGHBOUR, OWN].concat(),
                    Some(other) => panic!("eth {other}"),
                };
                header.extend(self.names.to_be_bytes());
                self.put(&header, 0);
            }
            "ethertype" => self.put(&[], u16::from_str_radix(layer.word(), 16).expect("hexadecimal")),
            "vlan" => self.tag(&mut layer, 0x8100),
            "qinq" => self.tag(&mut layer, 0x88a8),
            "v4" => self.v4(&mut layer),
            "v6" => self.v6(&mut layer),
            "hop" => self.put(&[self.names as u8, 0, 1, 4, 0, 0, 0, 0], 0),
            "fragment" => {
                let offset = layer.number::<u16>().to_be_bytes();
                self.put(&[self.names as u8, 0, offset[0], offset[1], 0, 0, 0, 1], 44);
            }
            "tcp" => self.tcp(&mut layer),
            "udp" => {
                let ports = layer.ends::<u16>();
                let length = (8 + self.bytes.len()) as u16;
                let header = [ports.0, ports.1, length, 0].map(u16::to_be_bytes).concat();
                self.transport(UDP, &header, 6, "");
            }
            "icmp" => {
                let mut header = layer.icmp(8);
                let message = [&header[..], &self.bytes].concat();
                header[2..4].copy_from_slice(&(!sum(&message)).to_be_bytes());
                self.put(&header, ICMP.into());
            }
            "icmp6" => {
                let header = layer.icmp(128);
                self.transport(ICMP6, &header, 2, "");
            }
            "cut" => self.bytes.truncate(layer.number()),
            "fill" => {
                let data: Vec<u8> =
                    (0..layer.number::<u32>()).map(|i| (i.wrapping_mul(31) >> 2) as u8).collect();
                self.put(&data, 0);
            }
            "hex" => {
                let data = hex(&layer.words.concat());
                layer.words.clear();
                self.put(&data, 0);
            }
            "pad" => self.padding = vec![0; layer.number()],
            other => panic!("no layer `{other}`: {text}"),
        }
        layer.done(text);
    }

    fn put(&mut self, header: &[u8], names: u16) {
        self.bytes.splice(0..0, header.iter().copied());
        self.names = names;
    }

    fn tag(&mut self, layer: &mut Layer<'_>, ethertype: u16) {
        let header = [layer.number(), self.names].map(u16::to_be_bytes).concat();
        self.put(&header, ethertype);
    }

    fn tcp(&mut self, layer: &mut Layer<'_>) {
        let ports = layer.ends::<u16>();
        let flags = layer.word().chars().fold(0, |flags, letter| {
            let bit = "FSRPAUEC".find(letter).unwrap_or_else(|| panic!("no TCP flag `{letter}`"));
            flags | 1 << bit
        });
        let options = layer.option("options").map(hex).unwrap_or_default();
        let mut header = [ports.0, ports.1].map(u16::to_be_bytes).concat();
        header.extend(layer.value("seq").unwrap_or(1000_u32).to_be_bytes());
        header.extend(layer.value("ack").unwrap_or(2000_u32).to_be_bytes());
        header.extend([((20 + options.len()) / 4) as u8 * 16, flags]);
        header.extend(layer.value("window").unwrap_or(256_u16).to_be_bytes());
        header.extend([0; 4]);
        header.extend(options);
        let how = layer.option("sum").unwrap_or_default();
        self.transport(TCP, &header, 16, how);
    }

    fn transport(&mut self, protocol: u8, header: &[u8], checksum_at: usize, how: &str) {
        let length = header.len() + self.bytes.len();
        let (partial, wrong) = match how {
            "" => (false, 0),
            "partial" => (true, 0),
            "bad" => (false, 0x0100),
            other => panic!("no checksum `{other}`"),
        };
        self.transport = Some(Transport { protocol, length, checksum_at, partial, wrong });
        self.put(header, protocol.into());
    }

    /// Makes the transport header's checksum, now that the addresses are known.
    fn finish(&mut self, addresses: &[u8]) {
        let Some(t) = self.transport.take() else { return };
        let start = self.bytes.len() - t.length;
        let segment = &mut self.bytes[start..];
        let checksum = if t.partial {
            sum(&pseudo_header(addresses, t.protocol, t.length))
        } else {
            sum(&[!pseudo_sum(addresses, t.protocol, segment), t.wrong].map(u16::to_be_bytes).concat())
        };
        segment[t.checksum_at..t.checksum_at + 2].copy_from_slice(&checksum.to_be_bytes());
    }

    fn v4(&mut self, layer: &mut Layer<'_>) {
        let (from, to) = layer.ends::<Ipv4Addr>();
        let addresses = [from.octets(), to.octets()].concat();
        self.finish(&addresses);
        let options = layer.option("options").map(hex).unwrap_or_default();
        let length = 20 + options.len();
        let version: u8 = layer.value("version").unwrap_or(4);
        let ihl = layer.value("ihl").unwrap_or((length / 4) as u8);
        let total = layer.value("length").unwrap_or((length + self.bytes.len()) as u16).to_be_bytes();
        let fragment = layer.option("fragment").map_or(0x4000, |f| u16::from_str_radix(f, 16).expect("hex"));
        let fragment = fragment.to_be_bytes();
        let ttl = layer.value("ttl").unwrap_or(64);
        let id = layer.value("id").unwrap_or(0x1234_u16).to_be_bytes();
        let mut header =
            vec![version << 4 | ihl, 0, total[0], total[1], id[0], id[1], fragment[0], fragment[1]];
        header.extend([ttl, self.names as u8, 0, 0]);
        header.extend(addresses);
        header.extend(options);
        let checksum = (!sum(&header)).to_be_bytes();
        header[10..12].copy_from_slice(&checksum);
        self.put(&header, 0x0800);
    }

    fn v6(&mut self, layer: &mut Layer<'_>) {
        let (from, to) = layer.ends::<Ipv6Addr>();
        let addresses = [from.octets(), to.octets()].concat();
        self.finish(&addresses);
        let version: u8 = layer.value("version").unwrap_or(6);
        let length = layer.value("length").unwrap_or(self.bytes.len() as u16).to_be_bytes();
        let hops = layer.value("hops").unwrap_or(64);
        let label = layer.value("label").unwrap_or(0_u32).to_be_bytes();
        let mut header = vec![version << 4, label[1], label[2], label[3], length[0], length[1]];
        header.extend([self.names as u8, hops]);
        header.extend(addresses);
        self.put(&header, 0x86dd);
    }
}

/// `KIND WORD ... NAME=VALUE ...`
struct Layer<'t> {
    kind: &'t str,
    words: Vec<&'t str>,
    options: Vec<(&'t str, &'t str)>,
}

impl<'t> Layer<'t> {
    fn new(text: &'t str) -> Layer<'t> {
        let mut words = text.split_whitespace();
        let kind = words.next().unwrap_or_else(|| panic!("an empty layer"));
        let (options, words): (Vec<_>, _) = words.partition(|w| w.contains('='));
        Layer { kind, words, options: options.iter().filter_map(|o| o.split_once('=')).collect() }
    }

    /// The next word.
    fn word(&mut self) -> &'t str {
        assert!(!self.words.is_empty(), "`{}` needs more words", self.kind);
        self.words.remove(0)
    }

    fn number<T: FromStr>(&mut self) -> T {
        let word = self.word();
        word.parse().unwrap_or_else(|_| panic!("{} {word}", self.kind))
    }

    /// `FROM > TO`
    fn ends<T: FromStr>(&mut self) -> (T, T) {
        let from = self.number();
        assert_eq!(self.word(), ">", "{}", self.kind);
        (from, self.number())
    }

    /// The header of an ICMP message, its checksum 0.
    fn icmp(&mut self, echo: u8) -> [u8; 8] {
        if self.words.is_empty() {
            return [echo, 0, 0, 0, 0, 1, 0, 1];
        }
        let (kind, code) = (self.number(), self.number());
        let mtu = self.value("mtu").unwrap_or(0_u32).to_be_bytes();
        [kind, code, 0, 0, mtu[0], mtu[1], mtu[2], mtu[3]]
    }

    fn option(&mut self, name: &str) -> Option<&'t str> {
        let at = self.options.iter().position(|(n, _)| *n == name)?;
        Some(self.options.remove(at).1)
    }

    fn value<T: FromStr>(&mut self, name: &str) -> Option<T> {
        self.option(name).map(|v| v.parse().unwrap_or_else(|_| panic!("{name}={v}")))
    }

    /// A word that nobody has read is a mistake in the fixture.
    fn done(&self, text: &str) {
        assert!(
            self.words.is_empty() && self.options.is_empty(),
            "what is {:?}{:?} in `{text}`?",
            self.words,
            self.options
        );
    }
}

#[test]
fn frames_are_those_of_a_real_sender() {
    // Captured from Linux, with checksum offload off.
    let captured = [
        (
            "eth | v4 192.0.2.7 > 192.0.2.2 id=38913 | tcp 40000 > 80 PA seq=403648005 ack=1159553948 window=63 options=0101080a2a217d1fa5993463 | hex 474554202f20485454502f312e310d0a0d0a",
            "0200000000010200000000020800 450000469801400040061ea7c0000207c0000202 \
             9c400050180f2e05451d639c8018003f071e00000101080a2a217d1fa5993463474554202f20485454502f312e310d0a0d0a",
        ),
        (
            "eth | v4 192.0.2.7 > 192.0.2.2 id=38914 | tcp 40000 > 80 PA seq=403648023 ack=1159553948 window=63 options=0101080a2a217d1fa5993463 | \"odd\"",
            "0200000000010200000000020800 450000379802400040061eb5c0000207c0000202 \
             9c400050180f2e17451d639c8018003f125700000101080a2a217d1fa59934636f6464",
        ),
        (
            "eth | v6 2001:db8::7 > 2001:db8::2 label=482834 | tcp 40000 > 80 S seq=1984617288 ack=0 window=64800 options=020405a00402080a3229ef48000000000103030a",
            "02000000000102000000000286dd 60075e120028064020010db800000000000000000000000720010db8000000000000000000000002 \
             9c400050764adb4800000000a002fd20dfdf0000020405a00402080a3229ef48000000000103030a",
        ),
        (
            "eth | v6 2001:db8::7 > 2001:db8::2 label=788446 | tcp 40000 > 80 PA seq=1984617307 ack=2857545002 window=64 options=0101080a3229f35106ff1492 | \"odd\"",
            "02000000000102000000000286dd 600c07de0023064020010db800000000000000000000000720010db8000000000000000000000002 \
             9c400050764adb5baa52ad2a80180040c0d200000101080a3229f35106ff14926f6464",
        ),
    ];
    for (text, bytes) in captured {
        let bytes = hex(bytes);
        assert_eq!(frame(text), bytes, "{text}");
        assert!(valid(&bytes[14..]), "{text}");
        let mut corrupt = bytes.clone();
        *corrupt.last_mut().expect("a byte") ^= 1;
        assert!(!valid(&corrupt[14..]), "{text}");
    }
}
