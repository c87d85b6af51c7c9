//! A TAP device in a network of its own, its frames with their offloads.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use super::super::*;
use super::bench::{held, paths};

/// `struct virtio_net_hdr` precedes each frame.
pub(super) const VNET: usize = 10;
pub(super) const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
/// TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6: the other end of the device (we) takes aggregates and partial checksums.
const OFFLOADS: libc::c_ulong = 1 | 2 | 4;

/// Runs `work` on a thread with a network of its own.
pub(super) fn alone(work: impl FnOnce() + Send) {
    let result = thread::scope(|scope| {
        let own = scope.spawn(|| {
            // SAFETY: a number only; a thread may leave its process's network namespace.
            let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            assert_eq!(result, 0, "unshare: {}", io::Error::last_os_error());
            work();
        });
        own.join()
    });
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

/// The interface `tap0` with the programs attached, and its other end.
pub(super) struct Tap {
    pub(super) file: File,
    pub(super) steer: Steer,
}

impl Tap {
    pub(super) fn up() -> Tap {
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
        let file = file.expect("/dev/net/tun; tests run as root, and need CONFIG_TUN");
        // SAFETY: all zeroes is a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(b"tap0") {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
        // SAFETY: both take what they are given: an ifreq, and a number.
        let done = unsafe {
            (libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) == 0)
                .then(|| libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, OFFLOADS))
        };
        assert_eq!(done, Some(0), "tap0: {}", io::Error::last_os_error());
        for command in [
            "link set lo up",
            "link set tap0 address 02:00:00:00:00:01 addrgenmode none up",
            "addr add 10.2.0.2/24 dev tap0",
            "addr add fd00:2::2/64 dev tap0 nodad",
            "neigh add 10.2.0.1 lladdr 02:00:00:00:00:02 dev tap0",
            "neigh add fd00:2::1 lladdr 02:00:00:00:00:02 dev tap0",
            "route add default via 10.2.0.1",
            "-6 route add default via fd00:2::1",
        ] {
            let status = Command::new("ip").args(command.split(' ')).status().expect("ip of iproute2");
            assert!(status.success(), "ip {command}");
        }
        Tap {
            file,
            steer: Steer::load(&["tap0".into()], Sizes { flows: 64, ring: 1 << 20 }, None)
                .expect("the programs, attached"),
        }
    }

    /// Puts a frame on the wire.
    pub(super) fn send(&mut self, frame: &[u8]) {
        self.send_as([0; VNET], frame);
    }

    /// The same with its checksum left to the receiver, and as an aggregate if `gso_size` is not 0.
    pub(super) fn send_offloaded(&mut self, frame: &[u8], gso_size: u16) {
        self.send_as(offloaded(frame, gso_size), frame);
    }

    fn send_as(&mut self, header: [u8; VNET], frame: &[u8]) {
        let n = self.file.write(&[&header[..], frame].concat());
        assert_eq!(n.expect("a frame is taken"), VNET + frame.len());
    }

    /// The next TCP frame that comes out of the interface, if there is one within `patience`.
    pub(super) fn receive(&mut self, patience: Duration) -> Option<([u8; VNET], Vec<u8>)> {
        let end = Instant::now() + patience;
        let mut room = vec![0; VNET + 128 * 1024];
        loop {
            match self.file.read(&mut room) {
                Ok(n) => {
                    let (header, frame) = room[..n].split_first_chunk().expect("a header");
                    // IPv6 speaks by itself.
                    if is_tcp(frame) {
                        return Some((*header, frame.to_vec()));
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => {
                    thread::sleep(Duration::from_millis(1));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return None,
                Err(e) => panic!("tap0: {e}"),
            }
        }
    }

    pub(super) fn paths(&self) -> Vec<(&'static str, u64)> {
        paths(&self.steer)
    }

    pub(super) fn held(&mut self) -> Vec<(HeldHeader, Vec<u8>)> {
        held(&mut self.steer)
    }
}

/// The header of a TCP frame without tags.
pub(super) fn offloaded(frame: &[u8], gso_size: u16) -> [u8; VNET] {
    let v6 = frame[12..14] == [0x86, 0xdd];
    let tcp = if v6 { 54 } else { 14 + u16::from(frame[14] & 15) * 4 };
    let headers = tcp + u16::from(frame[usize::from(tcp) + 12] >> 4) * 4;
    let gso_type = match (gso_size, v6) {
        (0, _) => 0,
        (_, false) => GSO_TCPV4,
        (_, true) => GSO_TCPV6,
    };
    let mut header = [0; VNET];
    header[..2].copy_from_slice(&[NEEDS_CSUM, gso_type]);
    for (to, value) in header[2..].chunks_mut(2).zip([headers, gso_size, tcp, 16]) {
        to.copy_from_slice(&value.to_ne_bytes());
    }
    header
}

/// Is it a TCP frame, under one tag at the most?
pub(super) fn is_tcp(frame: &[u8]) -> bool {
    let ip = if matches!(frame[12..14], [0x81, 0] | [0x88, 0xa8]) { 18 } else { 14 };
    match frame[ip - 2..ip] {
        [0x08, 0] => frame[ip + 9] == 6,
        [0x86, 0xdd] => frame[ip + 6] == 6,
        _ => false,
    }
}
