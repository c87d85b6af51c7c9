//! Offloads of an interface, as `ethtool -K` switches them (linux/ethtool.h).

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

const SIOCETHTOOL: libc::c_ulong = 0x8946;

/// What can be switched; the number is that of the command.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub enum Offload {
    /// Checksums of what is sent are left to the device; without it the kernel makes them, and no aggregates.
    SentChecksums = 0x17,
    /// Generic receive offload. With it a virtual interface polls (NAPI), and takes frames that its peer sends by XDP.
    Receive = 0x2c,
}

/// `struct ethtool_value`
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// Switches an offload of an interface of the calling thread's network.
///
/// # Panics
/// When the kernel refuses.
pub fn switch(interface: &str, offload: Offload, on: bool) {
    let mut value = Value { command: offload as u32, data: on.into() };
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    // SAFETY: an ifreq that points to what the command takes.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    assert_eq!(done, 0, "{interface} {offload:?}: {}", io::Error::last_os_error());
}
