//! Which way do packets to an address go? Asked of the kernel over NETLINK_ROUTE (rtnetlink(7)), and told when that changes.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, RawFd};

use crate::raw::{Fd, sys};

const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const RTN_UNICAST: u8 = 1;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_VIA: u16 = 18;
/// `struct nlmsghdr` and `struct rtmsg`.
const HEADERS: usize = 16 + 12;
/// Links, routes and rules of both versions (RTMGRP_*, RTNLGRP_IPV6_RULE), next hops (RTNLGRP_NEXTHOP).
const GROUPS: u32 = 1 | 0x40 | 0x80 | 0x400 | 1 << 18 | 1 << 31;

/// The first step to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// Index of the interface.
    pub interface: u32,
    /// The router, or the address itself where it is on the link.
    pub neighbour: IpAddr,
}

/// A netlink socket for look-ups.
pub struct RouteLookup {
    fd: Fd,
    seq: u32,
}

impl RouteLookup {
    /// Opens the socket, in the caller's network namespace.
    ///
    /// # Errors
    /// Of socket(2).
    pub fn new() -> io::Result<RouteLookup> {
        Ok(RouteLookup { fd: netlink(0)?, seq: 0 })
    }

    /// The way to an address; `None` where there is none, or the address is this machine's. Of several equal routes the
    /// kernel chooses one.
    ///
    /// # Errors
    /// Of the netlink exchange.
    pub fn way(&mut self, to: IpAddr) -> io::Result<Option<Way>> {
        self.seq = self.seq.wrapping_add(1);
        let request = request(to, self.seq);
        let fd = self.fd.as_raw_fd();
        // SAFETY: pointer and length describe `request`.
        sys!(libc::SYS_sendto, fd, request.as_ptr(), request.len(), 0, 0, 0)?;
        let mut answer = [0_u8; 4096];
        loop {
            // SAFETY: pointer and length describe `answer`.
            let n = sys!(libc::SYS_recvfrom, fd, answer.as_mut_ptr(), answer.len(), 0, 0, 0)?;
            let answer = answer.get(..n).unwrap_or_default();
            if word(answer, 8) != Some(self.seq) {
                continue;
            }
            return match half(answer, 4) {
                Some(RTM_NEWROUTE) => Ok(parse(answer, to)),
                // What it says when there is no route: ENETUNREACH, or what the route itself prescribes.
                Some(NLMSG_ERROR) => Ok(None),
                _ => Err(io::ErrorKind::InvalidData.into()),
            };
        }
    }
}

/// Becomes readable when links, routes or rules change.
pub struct RouteWatch(Fd);

impl RouteWatch {
    /// Opens the socket, in the caller's network namespace.
    ///
    /// # Errors
    /// Of socket(2) and bind(2).
    pub fn new() -> io::Result<RouteWatch> {
        let fd = netlink(libc::SOCK_NONBLOCK)?;
        // SAFETY: all zeroes is a valid sockaddr_nl.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as u16;
        address.nl_groups = GROUPS;
        // SAFETY: the address lives through the call.
        sys!(libc::SYS_bind, fd.as_raw_fd(), &raw const address, size_of::<libc::sockaddr_nl>())?;
        Ok(RouteWatch(fd))
    }

    /// Has anything changed since the last call? What, is left to look-ups.
    pub fn changed(&mut self) -> bool {
        let mut room = [0_u8; 4096];
        let mut any = false;
        loop {
            // SAFETY: pointer and length describe `room`; what does not fit is not wanted.
            match sys!(libc::SYS_recvfrom, self.0.as_raw_fd(), room.as_mut_ptr(), room.len(), 0, 0, 0) {
                Ok(_) => any = true,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return any,
                // ENOBUFS: more has changed than the socket could hold.
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => any = true,
                Err(_) => return any,
            }
        }
    }
}

impl AsRawFd for RouteWatch {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn netlink(flags: i32) -> io::Result<Fd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | flags;
    // SAFETY: numbers only.
    let fd = sys!(libc::SYS_socket, libc::AF_NETLINK, kind, libc::NETLINK_ROUTE)?;
    Ok(Fd::new(fd as RawFd))
}

fn request(to: IpAddr, seq: u32) -> Vec<u8> {
    let (family, octets) = match to {
        IpAddr::V4(ip) => (libc::AF_INET, ip.octets().to_vec()),
        IpAddr::V6(ip) => (libc::AF_INET6, ip.octets().to_vec()),
    };
    let length = HEADERS + 4 + octets.len();
    let mut r = Vec::with_capacity(length);
    r.extend((length as u32).to_ne_bytes());
    r.extend(RTM_GETROUTE.to_ne_bytes());
    r.extend(NLM_F_REQUEST.to_ne_bytes());
    r.extend(seq.to_ne_bytes());
    r.extend([0; 4]);
    r.extend([family as u8, (octets.len() * 8) as u8]);
    r.extend([0; 10]);
    r.extend(((4 + octets.len()) as u16).to_ne_bytes());
    r.extend(RTA_DST.to_ne_bytes());
    r.extend(octets);
    r
}

/// The way in an RTM_NEWROUTE message about an address.
fn parse(message: &[u8], to: IpAddr) -> Option<Way> {
    if message.get(16 + 7) != Some(&RTN_UNICAST) {
        return None;
    }
    let (mut interface, mut neighbour) = (0, to);
    let mut rest = message.get(HEADERS..)?;
    while let (Some(length), Some(kind)) = (half(rest, 0), half(rest, 2)) {
        let length = usize::from(length);
        let value = rest.get(4..length)?;
        match kind {
            RTA_OIF => interface = word(value, 0)?,
            RTA_GATEWAY => neighbour = address(value)?,
            // A family, then an address of it.
            RTA_VIA => neighbour = address(value.get(2..)?)?,
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    (interface != 0).then_some(Way { interface, neighbour })
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into()),
        16 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()),
        _ => None,
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message of this type with these attributes.
    fn message(kind: u8, attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut m = vec![0; HEADERS];
        m[16 + 7] = kind;
        for (kind, value) in attributes {
            m.extend(((4 + value.len()) as u16).to_ne_bytes());
            m.extend(kind.to_ne_bytes());
            m.extend(*value);
            m.resize(m.len().next_multiple_of(4), 0);
        }
        m
    }

    #[test]
    fn what_the_kernel_says_is_understood() {
        let to: IpAddr = "10.3.0.2".parse().expect("an address");
        let interface = 7_u32.to_ne_bytes();
        let way =
            |neighbour: &str| Some(Way { interface: 7, neighbour: neighbour.parse().expect("an address") });
        let v6: Ipv6Addr = "fe80::1".parse().expect("an address");
        let via = [&10_u16.to_ne_bytes()[..], &v6.octets()].concat();
        for (attributes, expected) in [
            (vec![(RTA_OIF, &interface[..])], way("10.3.0.2")),
            (vec![(RTA_GATEWAY, &[10, 2, 0, 1][..]), (RTA_OIF, &interface)], way("10.2.0.1")),
            (vec![(99, &[1][..]), (RTA_VIA, &via), (RTA_OIF, &interface)], way("fe80::1")),
            (vec![(RTA_GATEWAY, &[10, 2, 0][..]), (RTA_OIF, &interface)], None),
            (vec![(RTA_GATEWAY, &[10, 2, 0, 1][..])], None),
        ] {
            assert_eq!(parse(&message(RTN_UNICAST, &attributes), to), expected, "{attributes:?}");
            assert_eq!(parse(&message(2, &attributes), to), None, "a local route");
        }
        let whole = message(RTN_UNICAST, &[(RTA_OIF, &interface), (RTA_GATEWAY, &[10, 2, 0, 1])]);
        for n in 0..whole.len() {
            let cut = parse(&whole[..n], to);
            assert!(cut.is_none() || cut == way("10.3.0.2") && n >= HEADERS + 8, "{n}: {cut:?}");
        }
    }

    #[test]
    fn this_machine_is_no_way() {
        let mut lookup = RouteLookup::new().expect("netlink");
        for own in ["127.0.0.1", "::1"] {
            assert_eq!(lookup.way(own.parse().expect("an address")).expect("an answer"), None, "{own}");
        }
        assert!(!RouteWatch::new().expect("netlink").changed(), "nothing has happened");
    }
}
