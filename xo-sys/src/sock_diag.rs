//! Does the kernel still know this connection? Exact look-ups over NETLINK_SOCK_DIAG (sock_diag(7)), which
//! also see TIME_WAIT.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};

use crate::raw::{Fd, sys};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const ALL_STATES: u32 = u32::MAX;
/// include/net/tcp_states.h.
const TCP_LISTEN: u8 = 10;
const NO_COOKIE: u32 = u32::MAX;

/// `struct inet_diag_sockid`; ports and addresses in network byte order.
#[repr(C)]
struct SocketId {
    sport: u16,
    dport: u16,
    src: [u8; 16],
    dst: [u8; 16],
    interface: u32,
    cookie: [u32; 2],
}

/// `struct nlmsghdr` and `struct inet_diag_req_v2`.
#[repr(C)]
struct Request {
    len: u32,
    kind: u16,
    flags: u16,
    seq: u32,
    pid: u32,
    family: u8,
    protocol: u8,
    extensions: u8,
    pad: u8,
    states: u32,
    id: SocketId,
}

/// A netlink socket for look-ups.
pub struct TcpLookup {
    fd: Fd,
    seq: u32,
}

impl TcpLookup {
    /// Opens the socket, in the caller's network namespace.
    ///
    /// # Errors
    /// Of socket(2).
    pub fn new() -> io::Result<TcpLookup> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: numbers only.
        let fd = sys!(libc::SYS_socket, libc::AF_NETLINK, kind, libc::NETLINK_SOCK_DIAG)?;
        Ok(TcpLookup { fd: Fd::new(fd as RawFd), seq: 0 })
    }

    /// State of the connection (TCP_ESTABLISHED = 1 ... as in `include/net/tcp_states.h`), or `None` when
    /// the kernel knows no such socket, not even in TIME_WAIT.
    ///
    /// # Errors
    /// Of the netlink exchange.
    pub fn state(&mut self, local: SocketAddr, remote: SocketAddr) -> io::Result<Option<u8>> {
        // The kernel answers an AF_INET question also for a v4-mapped AF_INET6 socket.
        let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        self.seq = self.seq.wrapping_add(1);
        let request = Request {
            len: size_of::<Request>() as u32,
            kind: SOCK_DIAG_BY_FAMILY,
            flags: NLM_F_REQUEST,
            seq: self.seq,
            pid: 0,
            family: family as u8,
            protocol: libc::IPPROTO_TCP as u8,
            extensions: 0,
            pad: 0,
            states: ALL_STATES,
            id: SocketId {
                sport: local.port().to_be(),
                dport: remote.port().to_be(),
                src: octets(local.ip()),
                dst: octets(remote.ip()),
                interface: 0,
                cookie: [NO_COOKIE; 2],
            },
        };
        let fd = self.fd.as_raw_fd();
        // SAFETY: the request lives through the call.
        sys!(libc::SYS_sendto, fd, &raw const request, size_of::<Request>(), 0, 0, 0)?;
        let mut answer = [0_u8; 1024];
        loop {
            // SAFETY: pointer and length describe `answer`.
            let n = sys!(libc::SYS_recvfrom, fd, answer.as_mut_ptr(), answer.len(), 0, 0, 0)?;
            let Some(answer) = answer.get(..n).filter(|a| a.len() >= 20) else {
                return Err(io::ErrorKind::InvalidData.into());
            };
            let word = |at: usize| {
                let bytes = answer.get(at..at + 4).and_then(|b| b.try_into().ok()).unwrap_or_default();
                u32::from_ne_bytes(bytes)
            };
            if word(8) != self.seq {
                continue;
            }
            let kind = u16::from_ne_bytes([answer[4], answer[5]]);
            return match kind {
                // struct inet_diag_msg: family, state, ...
                // Where there is no connection any more, the kernel shows the listener that a SYN would reach.
                SOCK_DIAG_BY_FAMILY => Ok(answer.get(17).copied().filter(|state| *state != TCP_LISTEN)),
                NLMSG_ERROR => match -(word(16) as i32) {
                    libc::ENOENT => Ok(None),
                    0 => Err(io::ErrorKind::InvalidData.into()),
                    errno => Err(io::Error::from_raw_os_error(errno)),
                },
                _ => Err(io::ErrorKind::InvalidData.into()),
            };
        }
    }
}

fn octets(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => {
            let mut all = [0; 16];
            for (to, from) in all.iter_mut().zip(ip.octets()) {
                *to = from;
            }
            all
        }
        IpAddr::V6(ip) => ip.octets(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};

    const TIME_WAIT: u8 = 6;

    fn check(address: &str) {
        let mut lookup = TcpLookup::new().expect("netlink");
        let listener = TcpListener::bind(address).expect("listen");
        let mut client = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
        let (server, _) = listener.accept().expect("accept");
        let (local, remote) = (server.local_addr().expect("address"), server.peer_addr().expect("address"));
        assert_eq!(lookup.state(local, remote).expect("lookup"), Some(1));
        drop(server);
        client.read_to_end(&mut Vec::new()).expect("the end");
        drop(client);
        assert_eq!(lookup.state(local, remote).expect("lookup"), Some(TIME_WAIT), "the server closed first");
        assert_eq!(lookup.state(remote, local).expect("lookup"), None, "the client is gone");

        let mut client = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
        let (mut server, remote) = listener.accept().expect("accept");
        client.shutdown(std::net::Shutdown::Write).expect("shutdown");
        server.read_to_end(&mut Vec::new()).expect("the end");
        drop(server);
        client.read_to_end(&mut Vec::new()).expect("the end");
        assert_eq!(lookup.state(local, remote).expect("lookup"), None, "the listener is no connection");
    }

    #[test]
    fn sees_a_connection_until_the_kernel_forgets_it() {
        check("127.0.0.1:0");
        check("[::1]:0");
    }
}
