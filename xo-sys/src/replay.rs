//! Sending finished IP packets whose source is somebody else: the packets that were held while their
//! connection moved.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};

use crate::raw::{self, Fd, sys};
use crate::tcp_repair::RawAddress;

const IPV6_HDRINCL: i32 = 36;

/// Raw sockets for both families. The kernel routes by the packet's destination, to another machine or to a
/// local socket.
pub struct RawSender {
    v4: Fd,
    v6: Option<Fd>,
}

impl RawSender {
    /// Opens the sockets (CAP_NET_RAW). A machine without IPv6 sends IPv4 only.
    ///
    /// # Errors
    /// Of socket(2) and setsockopt(2).
    pub fn new() -> io::Result<RawSender> {
        let v4 = socket(libc::AF_INET)?;
        raw::setsockopt(v4.as_raw_fd(), libc::IPPROTO_IP, libc::IP_HDRINCL, &1_i32)?;
        let v6 = socket(libc::AF_INET6)
            .ok()
            .filter(|fd| raw::setsockopt(fd.as_raw_fd(), libc::IPPROTO_IPV6, IPV6_HDRINCL, &1_i32).is_ok());
        Ok(RawSender { v4, v6 })
    }

    /// Sends a packet, complete from its IP header on, checksums included.
    ///
    /// # Errors
    /// `InvalidInput` for what is no IP packet; else of sendto(2): EMSGSIZE when longer than the MTU ...
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        let array = |at: usize| packet.get(at..at + 16).and_then(|b| <[u8; 16]>::try_from(b).ok());
        let (fd, ip) = match packet.first().map(|b| b >> 4) {
            Some(4) => {
                let octets = packet.get(16..20).and_then(|b| <[u8; 4]>::try_from(b).ok());
                (Some(&self.v4), octets.map(IpAddr::from))
            }
            Some(6) => (self.v6.as_ref(), array(24).map(IpAddr::from)),
            _ => (None, None),
        };
        let (Some(fd), Some(ip)) = (fd, ip) else { return Err(io::ErrorKind::InvalidInput.into()) };
        // The port must be 0 for IPv6 raw sockets.
        let (address, len) = RawAddress::new(SocketAddr::new(ip, 0), ip.is_ipv6());
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: packet and address live through the call; the kernel only reads.
        sys!(libc::SYS_sendto, fd.as_raw_fd(), packet.as_ptr(), packet.len(), flags, &raw const address, len)
            .map(drop)
    }
}

fn socket(family: i32) -> io::Result<Fd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: numbers only.
    sys!(libc::SYS_socket, family, kind, libc::IPPROTO_RAW).map(|fd| Fd::new(fd as RawFd))
}
