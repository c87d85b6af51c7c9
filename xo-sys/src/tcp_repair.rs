//! Moving a TCP socket: dump on one machine, restore on another (`TCP_REPAIR`, kernel `net/ipv4/tcp.c`).
//!
//! A dumped socket stays in repair mode until [`resume`] takes it back or [`vacate`] empties it. A restored
//! one stays in repair mode, mute, until [`Repaired::start`]; dropping it closes it without a packet.
//! Repair mode does not stop the stack: what arrives is still acknowledged. Block the flow first.
//!
//! Absent on purpose: half-closed and closing states, urgent data, MPTCP, upper-layer protocols other than TLS with
//! empty queues. They are refused with a reason.

mod dump;
mod restore;

use std::io;
use std::mem::size_of;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::RawFd;

use xo_proto::conn::ConnRecord;
use xo_proto::packet::Late;
use xo_proto::reason::Reason;

use crate::raw::{self, sys};

pub use dump::{Ends, dump, dump_drained, ends, options, receive_memory, unsent};
pub use restore::{Repaired, SpareSockets, apply_options, restore};

/// Leave repair mode without a window probe (`TCP_REPAIR_OFF_NO_WP`).
const OFF_NO_PROBE: i32 = -1;
const ON: i32 = 1;
const RECV_QUEUE: i32 = 1;
const SEND_QUEUE: i32 = 2;
const TCP_REPAIR_WINDOW: i32 = 29;
const TCP_ULP: i32 = 31;
const SO_BUF_LOCK: i32 = 72;
const SO_MEMINFO: i32 = 55;
/// Indices of SO_MEMINFO's numbers (linux/sock_diag.h).
const SK_MEMINFO_RMEM_ALLOC: usize = 0;
const SK_MEMINFO_RCVBUF: usize = 1;
const SK_MEMINFO_SNDBUF: usize = 3;
const SIOCOUTQNSD: i32 = 0x894b;
/// include/net/tcp_states.h.
const ESTABLISHED: u8 = 1;
const CLOSE_WAIT: u8 = 8;

/// With a congestion window in the lower half, the priority of a socket while it is connected in repair mode: the kernel asks
/// the program `xo_carry`, which sets the window. (No option does; nothing looks at the priority meanwhile.)
pub const WINDOW_PRIORITY: u32 = 0x584f_0000;

/// Bits of `tcpi_options`.
const OPT_TIMESTAMPS: u8 = 1;
const OPT_SACK: u8 = 2;
const OPT_WSCALE: u8 = 4;
const OPT_USEC_TS: u8 = 64;

/// A step that the kernel refused, or a state that cannot move.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {source}")]
pub struct RepairError {
    /// What was tried.
    step: &'static str,
    reason: Reason,
    #[source]
    source: io::Error,
}

impl RepairError {
    /// The reason under which it is counted.
    #[must_use]
    pub fn reason(&self) -> Reason {
        self.reason
    }

    fn state(step: &'static str, reason: Reason) -> RepairError {
        RepairError { step, reason, source: io::Error::other(reason.name()) }
    }
}

/// Names the step that failed.
trait Step<T> {
    fn step(self, step: &'static str, reason: Reason) -> Result<T, RepairError>;
}

impl<T> Step<T> for io::Result<T> {
    fn step(self, step: &'static str, reason: Reason) -> Result<T, RepairError> {
        self.map_err(|source| RepairError { step, reason, source })
    }
}

/// What has reached a socket since [`dump`] left it in repair mode: rare, but acknowledged and nowhere else.
///
/// # Errors
/// Of getsockopt(2) and recv(2).
pub fn arrived_since(fd: RawFd, record: &ConnRecord) -> io::Result<Option<Late>> {
    // What came before need not be as long as in the record (see `TlsState::shorten`), so it is counted from the end.
    let (news, queued, fin) = loop {
        let next = get_u32(fd, libc::TCP_QUEUE_SEQ)?;
        let news = next.wrapping_sub(record.tcp.rcv_seq) as usize;
        if news == 0 {
            return Ok(None);
        }
        let (queued, fin) = (raw::readable_bytes(fd), raw::tcp_state(fd)? == CLOSE_WAIT);
        if get_u32(fd, libc::TCP_QUEUE_SEQ)? == next {
            break (news, queued, fin);
        }
    };
    let mut data = dump::peek(fd, queued)?;
    data.truncate(queued);
    // A FIN counts, and is no byte.
    data.drain(..queued.saturating_sub(news - usize::from(fin)).min(data.len()));
    Ok(Some(Late { data, fin }))
}

/// Takes a dumped socket back into service, without sending anything.
///
/// # Errors
/// Of setsockopt(2).
pub fn resume(fd: RawFd) -> io::Result<()> {
    set(fd, libc::TCP_REPAIR, OFF_NO_PROBE)?;
    reuse_address(fd)
}

/// Empties a dumped socket in place: unhashed without a packet, it looks like a connection that has ended to
/// whoever holds a descriptor (EPOLLHUP, writes give EPIPE).
///
/// # Errors
/// Of connect(2), getsockopt(2) and setsockopt(2).
pub fn vacate(fd: RawFd) -> io::Result<()> {
    let nothing = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    // SAFETY: the address lives through the call.
    sys!(libc::SYS_connect, fd, &raw const nothing, size_of::<libc::sockaddr>())?;
    // tcp_disconnect leaves ECONNABORTED, which a server would log as an error of its client's; reading clears it.
    raw::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ERROR, &mut 0_i32)?;
    set(fd, libc::TCP_REPAIR, OFF_NO_PROBE)
}

/// As [`vacate`], for a socket that is in service.
///
/// # Errors
/// As [`vacate`].
pub fn withdraw(fd: RawFd) -> io::Result<()> {
    set(fd, libc::TCP_REPAIR, ON)?;
    vacate(fd)
}

/// Is the socket in repair mode? (Everybody may ask.)
#[must_use]
pub fn in_repair(fd: RawFd) -> bool {
    get_u32(fd, libc::TCP_REPAIR).is_ok_and(|on| on != 0)
}

/// How many bytes the peer has acknowledged in this socket's life (`tcpi_bytes_acked`, RFC 4898
/// `tcpEStatsAppHCThruOctetsAcked`).
///
/// # Errors
/// Of getsockopt(2).
pub fn acknowledged(fd: RawFd) -> io::Result<u64> {
    let mut info = [0_u64; 16];
    raw::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)?;
    Ok(info[BYTES_ACKED / 8])
}

/// Raises a fresh readiness event where data waits, also for edge-triggered epoll (`tcp_set_rcvlowat`
/// calls `tcp_data_ready`).
///
/// # Errors
/// Of setsockopt(2).
pub fn poke(fd: RawFd) -> io::Result<()> {
    raw::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, &1_i32)
}

/// Leaving repair mode clears SO_REUSEADDR; without it a restarted server could not bind its port.
///
/// # Errors
/// Of setsockopt(2).
pub fn reuse_address(fd: RawFd) -> io::Result<()> {
    raw::setsockopt(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, &1_i32)
}

fn set(fd: RawFd, name: i32, value: i32) -> io::Result<()> {
    raw::setsockopt(fd, libc::IPPROTO_TCP, name, &value)
}

fn get_u32(fd: RawFd, name: i32) -> io::Result<u32> {
    let mut value = 0_u32;
    raw::getsockopt(fd, libc::IPPROTO_TCP, name, &mut value)?;
    Ok(value)
}

/// The head of `struct tcp_info`, as far as it is used (linux/tcp.h).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct TcpInfo {
    state: u8,
    _ca_state: u8,
    _retransmits: u8,
    _probes: u8,
    _backoff: u8,
    options: u8,
    wscale: u8,
    _flags: u8,
    rto: u32,
    _ato: u32,
    snd_mss: u32,
    _rcv_mss: u32,
    _unacked_to_fackets: [u32; 5],
    last_data_sent: u32,
    _last_ack_sent_to_pmtu: [u32; 4],
    rcv_ssthresh: u32,
    _rtt_to_ssthresh: [u32; 3],
    snd_cwnd: u32,
    _advmss_to_total_retrans: [u32; 5],
    _pacing_rate_to_bytes_received: [u64; 4],
    _segs_out_to_notsent: [u32; 3],
    /// From here on zero where the kernel is older than 4.9.
    min_rtt: u32,
    _data_segs: [u32; 2],
    delivery_rate: u64,
}

/// Offset of `tcpi_bytes_acked` in `struct tcp_info`: 8 bytes, 24 words, `tcpi_pacing_rate`, `tcpi_max_pacing_rate`.
const BYTES_ACKED: usize = 8 + 24 * 4 + 16;

/// `struct tcp_repair_window`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RepairWindow {
    snd_wl1: u32,
    snd_wnd: u32,
    max_window: u32,
    rcv_wnd: u32,
    rcv_wup: u32,
}

/// A socket address as the kernel reads and writes it, for both families.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) union RawAddress {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl RawAddress {
    /// Empty, to be filled by the kernel.
    pub(crate) fn empty() -> RawAddress {
        RawAddress {
            v6: libc::sockaddr_in6 {
                sin6_family: 0,
                sin6_port: 0,
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr { s6_addr: [0; 16] },
                sin6_scope_id: 0,
            },
        }
    }

    /// From an address; IPv4 becomes v4-mapped for an AF_INET6 socket. Returns its length too.
    pub(crate) fn new(address: SocketAddr, v6_socket: bool) -> (RawAddress, usize) {
        let port = address.port().to_be();
        match address.ip() {
            IpAddr::V4(ip) if !v6_socket => {
                let v4 = libc::sockaddr_in {
                    sin_family: libc::AF_INET as u16,
                    sin_port: port,
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(ip.octets()) },
                    sin_zero: [0; 8],
                };
                (RawAddress { v4 }, size_of::<libc::sockaddr_in>())
            }
            ip => {
                let octets = match ip {
                    IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                    IpAddr::V6(ip) => ip.octets(),
                };
                let v6 = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as u16,
                    sin6_port: port,
                    sin6_flowinfo: 0,
                    sin6_addr: libc::in6_addr { s6_addr: octets },
                    sin6_scope_id: 0,
                };
                (RawAddress { v6 }, size_of::<libc::sockaddr_in6>())
            }
        }
    }

    /// The address, v4-mapped ones as IPv4; and whether the socket is AF_INET6.
    pub(crate) fn get(&self) -> Option<(SocketAddr, bool)> {
        // SAFETY: both variants begin with the family, and every bit pattern is valid for either.
        unsafe {
            match i32::from(self.v4.sin_family) {
                libc::AF_INET => {
                    let ip = IpAddr::from(self.v4.sin_addr.s_addr.to_ne_bytes());
                    Some((SocketAddr::new(ip, u16::from_be(self.v4.sin_port)), false))
                }
                libc::AF_INET6 => {
                    let ip = IpAddr::from(self.v6.sin6_addr.s6_addr).to_canonical();
                    Some((SocketAddr::new(ip, u16::from_be(self.v6.sin6_port)), true))
                }
                _ => None,
            }
        }
    }
}

/// getsockname(2) or getpeername(2).
pub(crate) fn address_of(fd: RawFd, call: i64) -> io::Result<(SocketAddr, bool)> {
    let mut address = RawAddress::empty();
    let mut len = size_of::<RawAddress>() as u32;
    // SAFETY: address and length live through the call and may be written.
    sys!(call, fd, &raw mut address, &raw mut len)?;
    address.get().ok_or_else(|| io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests;
