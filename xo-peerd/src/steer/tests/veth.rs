//! A pair of virtual interfaces with the programs on one, and a sender on the other, for measurements.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

use super::super::*;
use super::tap::is_tcp;

/// Frames that one system call takes.
const BATCH: usize = 64;
/// `va` and `vb`; the programs are on `vb`. What is redirected comes back to `va`, for somebody else: it is dropped there.
pub(super) struct Veth {
    pub(super) steer: Steer,
}

impl Veth {
    pub(super) fn up() -> Veth {
        for command in [
            "link set lo up",
            "link add va address 02:00:00:00:00:02 type veth peer name vb address 02:00:00:00:00:01",
            "link set va addrgenmode none up",
            "link set vb addrgenmode none up",
            "addr add 10.2.0.2/24 dev vb",
            "neigh add 10.2.0.1 lladdr 02:00:00:00:00:09 dev vb",
            "route add default via 10.2.0.1",
        ] {
            ip(command);
        }
        let steer = Steer::load(&["vb".into()], Sizes { flows: 64, ring: 1 << 20 }, None);
        Veth { steer: steer.expect("the programs, attached") }
    }
}

/// Switches generic receive offload. With it a virtual interface polls (NAPI), and takes what its peer sends by XDP.
pub(super) fn receive_offload(interface: &str, on: bool) {
    /// `struct ethtool_value`, and the command that sets this one (linux/ethtool.h).
    #[repr(C)]
    struct Value {
        command: u32,
        data: u32,
    }
    const ETHTOOL_SGRO: u32 = 0x2c;
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    let mut value = Value { command: ETHTOOL_SGRO, data: on.into() };
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
    // SAFETY: an ifreq that points to what the command takes.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    assert_eq!(done, 0, "{interface}: {}", io::Error::last_os_error());
}

/// Runs `ip`.
pub(super) fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().expect("ip of iproute2");
    assert!(status.success(), "ip {arguments}");
}

/// A packet socket on an interface.
pub(super) struct PacketSocket(OwnedFd);

impl PacketSocket {
    pub(super) fn on(interface: &str) -> PacketSocket {
        let name = std::ffi::CString::new(interface).expect("a name");
        // All protocols (ETH_P_ALL): only then it receives.
        let protocol = 3_u16.to_be();
        // SAFETY: numbers only.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, 0) };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: a new descriptor.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: all zeroes is a valid sockaddr_ll.
        let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        to.sll_family = libc::AF_PACKET as u16;
        to.sll_protocol = protocol;
        // SAFETY: a C string.
        to.sll_ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) }.cast_signed();
        // SAFETY: a pointer to a local of the given length.
        let done = unsafe { libc::bind(fd, (&raw const to).cast(), size_of_val(&to) as u32) };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
        PacketSocket(socket)
    }

    /// The next TCP frame that comes within `patience`.
    pub(super) fn tcp(&self, patience: Duration) -> Option<Vec<u8>> {
        let end = Instant::now() + patience;
        let mut room = vec![0; 2048];
        loop {
            // SAFETY: pointer and length describe `room`.
            let n = unsafe { libc::recv(self.0.as_raw_fd(), room.as_mut_ptr().cast(), room.len(), 0) };
            match usize::try_from(n) {
                Ok(n) if is_tcp(&room[..n]) => return Some(room[..n].to_vec()),
                Ok(_) => {}
                Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(1)),
                Err(_) => return None,
            }
        }
    }
}

/// Sends one frame again and again, to the programs.
pub(super) struct Sender<'f> {
    socket: OwnedFd,
    frame: &'f [u8],
}

impl<'f> Sender<'f> {
    pub(super) fn new(frame: &'f [u8]) -> Sender<'f> {
        // SAFETY: numbers only.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: a new descriptor.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: all zeroes is a valid sockaddr_ll.
        let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        to.sll_family = libc::AF_PACKET as u16;
        // SAFETY: a C string.
        to.sll_ifindex = unsafe { libc::if_nametoindex(c"va".as_ptr()) }.cast_signed();
        let one = 1_i32;
        // SAFETY: pointers to locals of the given lengths.
        let done = unsafe {
            libc::bind(fd, (&raw const to).cast(), size_of_val(&to) as u32) == 0
                && libc::setsockopt(
                    fd,
                    libc::SOL_PACKET,
                    libc::PACKET_QDISC_BYPASS,
                    (&raw const one).cast(),
                    4,
                ) == 0
        };
        assert!(done, "{}", io::Error::last_os_error());
        Sender { socket, frame }
    }

    /// Sends one, from wherever the caller runs.
    pub(super) fn send_one(&self) {
        // SAFETY: pointer and length describe the frame.
        let n =
            unsafe { libc::send(self.socket.as_raw_fd(), self.frame.as_ptr().cast(), self.frame.len(), 0) };
        assert_eq!(n, self.frame.len().cast_signed(), "{}", io::Error::last_os_error());
    }

    /// Sends so many, on one processor; how long it took.
    pub(super) fn send(&mut self, count: usize) -> Duration {
        let mut piece =
            libc::iovec { iov_base: self.frame.as_ptr().cast_mut().cast(), iov_len: self.frame.len() };
        // SAFETY: all zeroes is a valid mmsghdr, and a valid set of processors.
        let (mut message, mut cpus): (libc::mmsghdr, libc::cpu_set_t) = unsafe { std::mem::zeroed() };
        message.msg_hdr.msg_iov = &raw mut piece;
        message.msg_hdr.msg_iovlen = 1;
        let mut messages = vec![message; BATCH];
        // SAFETY: a processor that there is; a set of its own.
        unsafe {
            libc::CPU_SET(libc::sched_getcpu() as usize, &mut cpus);
            libc::sched_setaffinity(0, size_of_val(&cpus), &raw const cpus);
        }
        let begun = Instant::now();
        for _ in 0..count / BATCH {
            // SAFETY: messages, their pieces and the frame live through the call.
            let sent =
                unsafe { libc::sendmmsg(self.socket.as_raw_fd(), messages.as_mut_ptr(), BATCH as u32, 0) };
            assert_eq!(sent, BATCH as i32, "{}", io::Error::last_os_error());
        }
        begun.elapsed()
    }
}
