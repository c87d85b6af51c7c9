//! What is on the wire: TCP headers of all packets that pass a node's interfaces, in their order.

use std::io::ErrorKind;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use crate::Bed;

/// A TCP segment, or several that the kernel has put together or not yet taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Port that it comes from.
    pub from: u16,
    /// Port that it goes to.
    pub to: u16,
    /// Number of its first byte.
    pub seq: u32,
    /// Number of the byte that is expected.
    pub ack: u32,
    /// Flags as on the wire (RFC 9293, 3.1).
    pub flags: u8,
    /// Unscaled.
    pub window: u16,
    /// Bytes of data.
    pub len: usize,
    /// Value and echo (RFC 7323, 3).
    pub timestamps: Option<(u32, u32)>,
    /// Shift count, in a SYN.
    pub scale: Option<u8>,
}

/// Flags of [`Segment::flags`].
pub const SYN: u8 = 2;
/// As [`SYN`].
pub const RST: u8 = 4;
/// As [`SYN`].
pub const ACK: u8 = 16;

impl Segment {
    /// Of an IP packet that may be cut off after the TCP header; none for one that is something else.
    #[must_use]
    pub fn parse(packet: &[u8]) -> Option<Segment> {
        let short = |at: usize| Some(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?));
        let (header, total, protocol) = match packet.first()? >> 4 {
            4 => (usize::from(packet[0] & 15) * 4, usize::from(short(2)?), *packet.get(9)?),
            6 => (40, 40 + usize::from(short(4)?), *packet.get(6)?),
            _ => return None,
        };
        if i32::from(protocol) != libc::IPPROTO_TCP {
            return None;
        }
        let long = |at: usize| Some(u32::from_be_bytes(packet.get(at..at + 4)?.try_into().ok()?));
        let offset = usize::from(packet.get(header + 12)? >> 4) * 4;
        let mut segment = Segment {
            from: short(header)?,
            to: short(header + 2)?,
            seq: long(header + 4)?,
            ack: long(header + 8)?,
            flags: *packet.get(header + 13)?,
            window: short(header + 14)?,
            len: total.checked_sub(header + offset)?,
            timestamps: None,
            scale: None,
        };
        let mut options = packet.get(header + 20..header + offset)?;
        while let [kind, rest @ ..] = options {
            options = match kind {
                0 => break,
                1 => rest,
                _ => {
                    let len = usize::from(*rest.first()?);
                    let value = options.get(2..len)?;
                    match (kind, value) {
                        (3, [shift]) => segment.scale = Some(*shift),
                        (8, [a, b, c, d, e, f, g, h]) => {
                            let number = |bytes: [&u8; 4]| u32::from_be_bytes(bytes.map(|b| *b));
                            segment.timestamps = Some((number([a, b, c, d]), number([e, f, g, h])));
                        }
                        _ => {}
                    }
                    &options[len..]
                }
            };
        }
        Some(segment)
    }
}

/// Listens on a node's interfaces.
#[derive(Debug)]
pub struct Wire {
    stop: Arc<AtomicBool>,
    listener: JoinHandle<Vec<Segment>>,
}

impl Wire {
    /// From now on.
    ///
    /// # Panics
    /// When there is no such socket.
    #[must_use]
    pub fn listen(bed: &Bed, node: &str) -> Wire {
        let socket = bed.on(node, || {
            let all = i32::from((libc::ETH_P_ALL as u16).to_be());
            let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(Protocol::from(all)));
            socket.expect("a packet socket")
        });
        socket.set_recv_buffer_size(32 << 20).expect("its buffer");
        socket.set_read_timeout(Some(Duration::from_millis(20))).expect("its time limit");
        let stop = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&stop);
        let listener = std::thread::spawn(move || {
            let mut segments = Vec::new();
            let mut buffer = [MaybeUninit::<u8>::uninit(); 160];
            loop {
                match socket.recv(&mut buffer) {
                    Ok(n) => {
                        // SAFETY: the kernel has written the first `n` bytes.
                        let packet: Vec<u8> =
                            buffer[..n].iter().map(|b| unsafe { b.assume_init() }).collect();
                        segments.extend(Segment::parse(&packet));
                    }
                    // Nothing more is on its way once it is quiet.
                    Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                        if over.load(Ordering::Relaxed) {
                            return segments;
                        }
                    }
                    Err(e) => panic!("a packet socket: {e}"),
                }
            }
        });
        Wire { stop, listener }
    }

    /// What passed, in its order.
    ///
    /// # Panics
    /// When the socket has failed.
    #[must_use]
    pub fn stop(self) -> Vec<Segment> {
        self.stop.store(true, Ordering::Relaxed);
        self.listener.join().expect("no panic")
    }
}

#[cfg(test)]
mod tests {
    use super::{ACK, Segment};

    /// A packet as RFC 9293 and RFC 7323 draw it.
    fn packet(head: &[u8]) -> Vec<u8> {
        let mut packet = head.to_vec();
        packet.extend([0, 80, 0x80, 1, 0, 0, 0, 7, 0, 0, 0, 9, 0x80, ACK, 1, 2, 0, 0, 0, 0]);
        packet.extend([1, 1, 8, 10, 0, 0, 1, 0, 0, 0, 2, 0]);
        packet
    }

    #[test]
    fn a_segment_of_either_family() {
        let v4 = packet(&[0x45, 0, 0, 62, 0, 0, 0, 0, 64, 6, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
        let mut head = [0; 40];
        head[..8].copy_from_slice(&[0x60, 0, 0, 0, 0, 42, 6, 64]);
        let wanted = Segment {
            from: 80,
            to: 0x8001,
            seq: 7,
            ack: 9,
            flags: ACK,
            window: 0x102,
            len: 10,
            timestamps: Some((256, 512)),
            scale: None,
        };
        assert_eq!(Segment::parse(&v4), Some(wanted));
        assert_eq!(Segment::parse(&packet(&head)), Some(wanted));
        for cut in 0..v4.len() {
            assert_eq!(Segment::parse(&v4[..cut]), None, "{cut}");
        }
    }
}
