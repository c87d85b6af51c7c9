//! What can a network device's driver do with XDP? Told by the kernel (6.3 and later) over the generic netlink family "netdev"
//! (Documentation/netlink/specs/netdev.yaml).

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use crate::raw::{Fd, sys};

const CONTROL: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
const DEV_GET: u8 = 1;
const DEV_INDEX: u16 = 1;
const DEV_XDP_FEATURES: u16 = 3;
/// `NETDEV_XDP_ACT_NDO_XMIT`
const CAN_SEND: u64 = 4;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
/// `struct nlmsghdr` and `struct genlmsghdr`.
const HEADERS: usize = 16 + 4;

/// A generic netlink socket for questions about devices.
pub struct XdpFeatures {
    fd: Fd,
    family: u16,
    seq: u32,
}

impl XdpFeatures {
    /// Opens the socket, in the caller's network namespace.
    ///
    /// # Errors
    /// Of socket(2); ENOENT where the kernel has no such family.
    pub fn open() -> io::Result<XdpFeatures> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: numbers only.
        let fd = sys!(libc::SYS_socket, libc::AF_NETLINK, kind, libc::NETLINK_GENERIC)?;
        let mut this = XdpFeatures { fd: Fd::new(fd as RawFd), family: CONTROL, seq: 0 };
        let answer = this.ask(GET_FAMILY, FAMILY_NAME, b"netdev\0")?;
        let id = attribute(&answer, FAMILY_ID).and_then(|v| v.first_chunk()).copied();
        this.family = u16::from_ne_bytes(id.ok_or(io::ErrorKind::InvalidData)?);
        Ok(this)
    }

    /// Does the driver send frames that an XDP program on this or another device has decided to send by it? A virtual interface
    /// (veth) does only where its peer polls (NAPI): otherwise such frames are lost without a word.
    ///
    /// # Errors
    /// Of the netlink exchange; ENODEV.
    pub fn can_send(&mut self, interface: u32) -> io::Result<bool> {
        let answer = self.ask(DEV_GET, DEV_INDEX, &interface.to_ne_bytes())?;
        let features = attribute(&answer, DEV_XDP_FEATURES).and_then(|v| v.first_chunk()).copied();
        Ok(u64::from_ne_bytes(features.ok_or(io::ErrorKind::InvalidData)?) & CAN_SEND != 0)
    }

    /// One question with one attribute; the answer.
    fn ask(&mut self, command: u8, kind: u16, value: &[u8]) -> io::Result<Vec<u8>> {
        self.seq = self.seq.wrapping_add(1);
        let request = request(self.family, self.seq, command, kind, value);
        let fd = self.fd.as_raw_fd();
        // SAFETY: pointer and length describe `request`.
        sys!(libc::SYS_sendto, fd, request.as_ptr(), request.len(), 0, 0, 0)?;
        let mut answer = vec![0_u8; 4096];
        loop {
            // SAFETY: pointer and length describe `answer`.
            let n = sys!(libc::SYS_recvfrom, fd, answer.as_mut_ptr(), answer.len(), 0, 0, 0)?;
            if answer.get(8..12) != Some(&self.seq.to_ne_bytes()) {
                continue;
            }
            answer.truncate(n);
            return match (answer.get(4..6), answer.get(16..).and_then(|e| e.first_chunk())) {
                (Some(kind), Some(error)) if kind == NLMSG_ERROR.to_ne_bytes() => {
                    Err(io::Error::from_raw_os_error(i32::from_ne_bytes(*error).saturating_neg()))
                }
                _ => Ok(answer),
            };
        }
    }
}

fn request(family: u16, seq: u32, command: u8, kind: u16, value: &[u8]) -> Vec<u8> {
    let length = HEADERS + 4 + value.len();
    let mut r = Vec::with_capacity(length.next_multiple_of(4));
    r.extend((length as u32).to_ne_bytes());
    r.extend(family.to_ne_bytes());
    r.extend(NLM_F_REQUEST.to_ne_bytes());
    r.extend(seq.to_ne_bytes());
    r.extend([0; 4]);
    r.extend([command, 1, 0, 0]);
    r.extend(((4 + value.len()) as u16).to_ne_bytes());
    r.extend(kind.to_ne_bytes());
    r.extend(value);
    r.resize(length.next_multiple_of(4), 0);
    r
}

/// An attribute's value.
fn attribute(message: &[u8], wanted: u16) -> Option<&[u8]> {
    let mut rest = message.get(HEADERS..)?;
    loop {
        let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        let kind = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?);
        let value = rest.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attribute_is_found_and_a_cut_one_is_not() {
        let mut message = vec![0; HEADERS];
        for (kind, value) in [(1_u16, &[9, 9][..]), (2, &[1, 2, 3, 4, 5, 6, 7, 8])] {
            message.extend(((4 + value.len()) as u16).to_ne_bytes());
            message.extend(kind.to_ne_bytes());
            message.extend(value);
            message.resize(message.len().next_multiple_of(4), 0);
        }
        assert_eq!(attribute(&message, 1), Some(&[9, 9][..]));
        assert_eq!(attribute(&message, 2), Some(&[1, 2, 3, 4, 5, 6, 7, 8][..]));
        assert_eq!(attribute(&message, 3), None);
        for n in 0..message.len() {
            assert_eq!(attribute(&message[..n], 2), None, "{n}");
        }
        // A length of nothing must not be met for ever.
        assert_eq!(attribute(&[0; HEADERS + 8], 1), None);
    }

    #[test]
    fn the_loopback_is_known_and_no_interface_is_not() {
        let mut features = match XdpFeatures::open() {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {
                return println!("SKIPPED: this kernel has no family \"netdev\"");
            }
            other => other.expect("generic netlink"),
        };
        assert!(!features.can_send(1).expect("the loopback"), "it has no XDP of its own");
        let error = features.can_send(0x7fff_ffff).expect_err("no such interface");
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    }
}
