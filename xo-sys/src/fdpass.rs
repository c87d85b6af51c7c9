//! Unix sequenced-packet sockets that carry one message per packet, and descriptors with it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::raw::{self, Fd, sys};

/// Most descriptors in a packet.
pub const MAX_FDS: usize = 3;
/// Room for one more, so that a surplus is noticed and closed.
const ROOM: usize = MAX_FDS + 1;
const CMSG_HEADER: usize = size_of::<libc::cmsghdr>();

#[repr(C)]
struct Control {
    header: libc::cmsghdr,
    fds: [RawFd; ROOM],
}

/// Who is on the other end of a Unix socket, as the kernel vouches for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Process.
    pub pid: u32,
    /// Effective user when it connected.
    pub uid: u32,
    /// Effective group when it connected.
    pub gid: u32,
}

/// Sends one packet with at most [`MAX_FDS`] descriptors. `flags` as for sendmsg(2); MSG_NOSIGNAL is added.
///
/// # Errors
/// Of sendmsg(2); `InvalidInput` for too many descriptors.
pub fn send(sock: RawFd, bytes: &[u8], fds: &[RawFd], flags: i32) -> io::Result<()> {
    let mut passed = [-1; ROOM];
    let all = passed.get_mut(..MAX_FDS).and_then(|p| p.get_mut(..fds.len()));
    all.ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(fds);
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let len = CMSG_HEADER + size_of_val(fds);
    let control = Control {
        header: libc::cmsghdr { cmsg_len: len, cmsg_level: libc::SOL_SOCKET, cmsg_type: libc::SCM_RIGHTS },
        fds: passed,
    };
    let mut message = empty_message();
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    if !fds.is_empty() {
        message.msg_control = (&raw const control).cast_mut().cast();
        // CMSG_SPACE.
        message.msg_controllen = len.next_multiple_of(size_of::<usize>());
    }
    loop {
        // SAFETY: the message and all it points to live through the call; the kernel only reads.
        match sys!(libc::SYS_sendmsg, sock, &raw const message, flags | libc::MSG_NOSIGNAL) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other.map(drop),
        }
    }
}

/// Descriptors that came with a packet.
pub type Received = [Option<Fd>; MAX_FDS];

/// Receives one packet and its descriptors, first ones first. A length of 0 means that the other end is gone.
///
/// # Errors
/// Of recvmsg(2); `InvalidData` for a packet longer than `buf` or with more than [`MAX_FDS`] descriptors
/// (which are closed).
pub fn recv(sock: RawFd, buf: &mut [u8], flags: i32) -> io::Result<(usize, Received)> {
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let mut control =
        Control { header: libc::cmsghdr { cmsg_len: 0, cmsg_level: 0, cmsg_type: 0 }, fds: [-1; ROOM] };
    let mut message = empty_message();
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>();
    let n = loop {
        // SAFETY: the message and all it points to live through the call and may be written.
        match sys!(libc::SYS_recvmsg, sock, &raw mut message, flags | libc::MSG_CMSG_CLOEXEC) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    let rights = message.msg_controllen >= CMSG_HEADER
        && control.header.cmsg_level == libc::SOL_SOCKET
        && control.header.cmsg_type == libc::SCM_RIGHTS;
    let count =
        if rights { control.header.cmsg_len.saturating_sub(CMSG_HEADER) / size_of::<RawFd>() } else { 0 };
    let mut fds = control.fds.iter().take(count).map(|&fd| Fd::new(fd));
    let received = std::array::from_fn(|_| fds.next());
    let surplus = fds.count();
    if surplus > 0 || message.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok((n, received))
}

/// Connects to a listening socket. Does not block: a full backlog is an error.
///
/// # Errors
/// Of socket(2) and connect(2); `InvalidInput` for a path that is too long.
pub fn connect(path: &Path) -> io::Result<Fd> {
    let fd = socket(0)?;
    let (address, len) = address(path)?;
    // SAFETY: the address lives through the call.
    sys!(libc::SYS_connect, fd.as_raw_fd(), &raw const address, len)?;
    Ok(fd)
}

/// Makes a listening socket with this file mode. A socket file that nobody answers on is replaced.
///
/// # Errors
/// `AddrInUse` when somebody answers on it, or when another kind of file is there; else of the calls made.
pub fn listen(path: &Path, mode: u32) -> io::Result<Fd> {
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    if let Ok(meta) = std::fs::symlink_metadata(path) {
        if !meta.file_type().is_socket() || connect(path).is_ok() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        std::fs::remove_file(path)?;
    }
    let fd = socket(libc::SOCK_NONBLOCK)?;
    let (address, len) = address(path)?;
    // SAFETY: the address lives through the call.
    sys!(libc::SYS_bind, fd.as_raw_fd(), &raw const address, len)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    // SAFETY: numbers only.
    sys!(libc::SYS_listen, fd.as_raw_fd(), 128)?;
    Ok(fd)
}

/// Two connected sockets, non-blocking and close-on-exec.
///
/// # Errors
/// Of socketpair(2).
pub fn pair() -> io::Result<(Fd, Fd)> {
    let mut ends = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: two numbers that live through the call and may be written.
    sys!(libc::SYS_socketpair, libc::AF_UNIX, kind, 0, &raw mut ends)?;
    Ok((Fd::new(ends[0]), Fd::new(ends[1])))
}

/// Nothing more is sent or received; what is in the queues can still be read.
pub fn shut(fd: RawFd) {
    // SAFETY: numbers only.
    let _ = sys!(libc::SYS_shutdown, fd, libc::SHUT_RDWR);
}

/// Who is on the other end.
///
/// # Errors
/// Of getsockopt(2).
pub fn peer_credentials(fd: RawFd) -> io::Result<Credentials> {
    let mut c = libc::ucred { pid: 0, uid: 0, gid: 0 };
    raw::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, &mut c)?;
    Ok(Credentials { pid: c.pid as u32, uid: c.uid, gid: c.gid })
}

fn socket(flags: i32) -> io::Result<Fd> {
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | flags;
    // SAFETY: numbers only.
    sys!(libc::SYS_socket, libc::AF_UNIX, kind, 0).map(|fd| Fd::new(fd as RawFd))
}

fn address(path: &Path) -> io::Result<(libc::sockaddr_un, usize)> {
    let mut address = libc::sockaddr_un { sun_family: libc::AF_UNIX as u16, sun_path: [0; 108] };
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= address.sun_path.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok((address, size_of::<u16>() + bytes.len() + 1))
}

fn empty_message() -> libc::msghdr {
    libc::msghdr {
        msg_name: std::ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: std::ptr::null_mut(),
        msg_iovlen: 0,
        msg_control: std::ptr::null_mut(),
        msg_controllen: 0,
        msg_flags: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn pair(name: &str) -> (Fd, Fd, std::path::PathBuf) {
        let path = std::env::temp_dir().join(format!("xo-fdpass-{name}-{}", std::process::id()));
        let listener = listen(&path, 0o600).expect("listen");
        let client = connect(&path).expect("connect");
        // SAFETY: no address wanted.
        let fd = sys!(libc::SYS_accept4, listener.as_raw_fd(), 0, 0, libc::SOCK_CLOEXEC).expect("accept");
        (client, Fd::new(fd as RawFd), path)
    }

    #[test]
    fn a_descriptor_travels() {
        let (a, b, path) = pair("travels");
        let (mut reader, mut writer) = io::pipe().expect("a pipe");
        send(a.as_raw_fd(), b"take this", &[writer.as_raw_fd()], 0).expect("send");
        send(a.as_raw_fd(), b"and nothing", &[], 0).expect("send");
        let mut buf = [0; 64];
        let (n, [fd, ..]) = recv(b.as_raw_fd(), &mut buf, 0).expect("recv");
        assert_eq!(&buf[..n], b"take this");
        let mut theirs = std::fs::File::from(std::os::fd::OwnedFd::from(fd.expect("a descriptor")));
        theirs.write_all(b"x").expect("write");
        writer.write_all(b"y").expect("write");
        drop((theirs, writer));
        let mut text = String::new();
        reader.read_to_string(&mut text).expect("read");
        assert_eq!(text, "xy");
        let (n, [fd, ..]) = recv(b.as_raw_fd(), &mut buf, 0).expect("recv");
        assert_eq!((&buf[..n], fd.is_none()), (&b"and nothing"[..], true));
        drop(a);
        assert_eq!(recv(b.as_raw_fd(), &mut buf, 0).expect("end").0, 0);
        std::fs::remove_file(path).expect("remove");
    }

    #[test]
    fn a_pair_that_is_shut_still_gives_what_is_in_it() {
        let (a, b) = super::pair().expect("a pair");
        send(a.as_raw_fd(), b"1", &[a.as_raw_fd(), b.as_raw_fd(), a.as_raw_fd()], 0).expect("send");
        assert!(send(a.as_raw_fd(), b"2", &[0; 4], 0).is_err(), "too many");
        shut(b.as_raw_fd());
        let e = send(a.as_raw_fd(), b"3", &[], 0).expect_err("shut");
        assert_eq!(e.kind(), io::ErrorKind::BrokenPipe);
        let (n, fds) = recv(b.as_raw_fd(), &mut [0; 8], 0).expect("recv");
        assert_eq!((n, fds.iter().flatten().count()), (1, 3));
        assert_eq!(recv(b.as_raw_fd(), &mut [0; 8], 0).expect("end").0, 0);
    }

    #[test]
    fn a_long_packet_is_an_error_and_credentials_are_ours() {
        let (a, b, path) = pair("long");
        send(a.as_raw_fd(), &[1; 100], &[], 0).expect("send");
        let e = recv(b.as_raw_fd(), &mut [0; 10], 0).expect_err("too long");
        assert_eq!(e.kind(), io::ErrorKind::InvalidData);
        assert_eq!(peer_credentials(b.as_raw_fd()).expect("credentials").pid, std::process::id());
        let e = listen(&path, 0o600).err();
        assert!(e.is_none(), "a socket file without a listener is replaced: {e:?}");
        std::fs::remove_file(path).expect("remove");
    }
}
