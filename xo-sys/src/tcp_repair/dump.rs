//! Reading a socket's state.

use std::io;
use std::net::SocketAddr;
use std::os::fd::RawFd;

use xo_proto::conn::{
    Buffers, ConnRecord, SockOptions, TcpState, Timestamps, Window, window_after_idle, window_to_carry,
};
use xo_proto::reason::Reason;

use super::{
    ESTABLISHED, ON, OPT_SACK, OPT_TIMESTAMPS, OPT_USEC_TS, OPT_WSCALE, RECV_QUEUE, RepairError,
    RepairWindow, SEND_QUEUE, SIOCOUTQNSD, SK_MEMINFO_RCVBUF, SK_MEMINFO_RMEM_ALLOC, SK_MEMINFO_SNDBUF,
    SO_BUF_LOCK, SO_MEMINFO, Step, TCP_REPAIR_WINDOW, TCP_ULP, TcpInfo, address_of, get_u32, resume, set,
};
use crate::raw::{self, sys};

/// One packet is what may come; more do where nobody holds them.
const MOST_LOOKS: u32 = 8;

/// A connection's two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// The client; v4-mapped addresses as IPv4.
    pub client: SocketAddr,
    /// Our address, likewise.
    pub local: SocketAddr,
    /// The socket is AF_INET6.
    pub v6_socket: bool,
}

/// The ends of the connection behind a descriptor.
///
/// # Errors
/// `NotEstablished` when it is not, or not any more, a connected TCP socket.
pub fn ends(fd: RawFd) -> Result<Ends, RepairError> {
    let (client, v6_socket) =
        address_of(fd, libc::SYS_getpeername).step("getpeername", Reason::NotEstablished)?;
    let (local, _) = address_of(fd, libc::SYS_getsockname).step("getsockname", Reason::NotEstablished)?;
    Ok(Ends { client, local, v6_socket })
}

/// Dumps a connection; `limit` bounds the sum of its queues, bytes. On success the socket is in repair mode
/// with its receive queue selected (see [`super::arrived_since`]); on failure it is as before.
///
/// # Errors
/// States that cannot move, each with its reason; `DumpFailed` for what the kernel refuses, without
/// CAP_NET_ADMIN for one.
pub fn dump(fd: RawFd, ends: &Ends, limit: usize) -> Result<ConnRecord, RepairError> {
    let mut ulp = [0_u8; 16];
    if raw::getsockopt(fd, libc::IPPROTO_TCP, TCP_ULP, &mut ulp).is_ok_and(|n| n > 0) {
        return Err(RepairError::state("TCP_ULP", Reason::NotMovable));
    }
    dump_whatever(fd, ends, limit)
}

/// As [`dump`], for a socket with TLS in the kernel ([`crate::ktls`]). Its queues must be empty, as the kernel gives out
/// decrypted bytes in the place of those that are in them. Such a socket cannot be emptied in place (`tls_disconnect`):
/// instead of [`super::vacate`], close all its descriptors while it is in repair mode.
///
/// # Errors
/// As [`dump`]; `QueuesTooLong` when a record, or a part of one, has not been read, or when something sent has not been
/// acknowledged.
pub fn dump_drained(fd: RawFd, ends: &Ends) -> Result<ConnRecord, RepairError> {
    // What has been decrypted already is in none of the queues that `state` looks at; EIO: a record that is no data.
    match raw::peek(fd, &mut [0], libc::MSG_DONTWAIT) {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => dump_whatever(fd, ends, 0),
        Err(e) if e.raw_os_error() != Some(libc::EIO) => Err(e).step("TLS record", Reason::DumpFailed),
        Ok(0) => Err(RepairError::state("TCP state", Reason::NotEstablished)),
        _ => Err(RepairError::state("TLS record", Reason::QueuesTooLong)),
    }
}

/// Dumps without asking what is on top of TCP.
fn dump_whatever(fd: RawFd, ends: &Ends, limit: usize) -> Result<ConnRecord, RepairError> {
    let mut info = TcpInfo::default();
    raw::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info).step("TCP_INFO", Reason::NotMovable)?;
    if info.state != ESTABLISHED {
        return Err(RepairError::state("TCP state", Reason::NotEstablished));
    }
    set(fd, libc::TCP_REPAIR, ON).map_err(|source| {
        // An MPTCP socket does not know the option.
        let mptcp = source.raw_os_error() == Some(libc::ENOPROTOOPT);
        let reason = if mptcp { Reason::Mptcp } else { Reason::DumpFailed };
        RepairError { step: "TCP_REPAIR", reason, source }
    })?;
    let record = settled(fd, &info, limit).and_then(|tcp| {
        let buffers = buffers(fd).step("SO_MEMINFO", Reason::DumpFailed)?;
        Ok(ConnRecord { client: ends.client, local: ends.local, tcp, buffers, tls: None })
    });
    if record.is_err() {
        let _ = resume(fd);
    }
    record
}

/// What had passed the hook when the flow's packets began to be held may reach the socket between two looks at it: then all is looked
/// at again.
fn settled(fd: RawFd, info: &TcpInfo, limit: usize) -> Result<TcpState, RepairError> {
    let mut result = state(fd, info, limit);
    for _ in 1..MOST_LOOKS {
        match &result {
            Err(e) if matches!(e.reason, Reason::StateMoved | Reason::UrgentData) => {
                result = state(fd, info, limit);
            }
            _ => break,
        }
    }
    result
}

fn state(fd: RawFd, info: &TcpInfo, limit: usize) -> Result<TcpState, RepairError> {
    let failed = Reason::DumpFailed;
    let queued = count(fd, libc::FIONREAD as i32).step("SIOCINQ", failed)?;
    let outstanding = count(fd, libc::TIOCOUTQ as i32).step("SIOCOUTQ", failed)?;
    let unsent = if outstanding == 0 { 0 } else { unsent(fd).step("SIOCOUTQNSD", failed)? };
    if unsent > outstanding {
        return Err(RepairError::state("send queue", Reason::StateMoved));
    }
    if queued + outstanding > limit {
        return Err(RepairError::state("queues", Reason::QueuesTooLong));
    }
    let mss_clamp = get_u32(fd, libc::TCP_MAXSEG).step("TCP_MAXSEG", failed)?;
    let timestamps = if info.options & OPT_TIMESTAMPS == 0 {
        None
    } else {
        let value = get_u32(fd, libc::TCP_TIMESTAMP).step("TCP_TIMESTAMP", failed)?;
        Some(Timestamps { value, usec: info.options & OPT_USEC_TS != 0 })
    };
    let mut w = RepairWindow::default();
    raw::getsockopt(fd, libc::IPPROTO_TCP, TCP_REPAIR_WINDOW, &mut w).step("TCP_REPAIR_WINDOW", failed)?;

    set(fd, libc::TCP_REPAIR_QUEUE, SEND_QUEUE).step("TCP_REPAIR_QUEUE", failed)?;
    let snd_seq = get_u32(fd, libc::TCP_QUEUE_SEQ).step("TCP_QUEUE_SEQ", failed)?;
    let mut sent = if outstanding == 0 { Vec::new() } else { send_queue(fd, outstanding)? };
    let unsent = sent.split_off(outstanding - unsent);

    set(fd, libc::TCP_REPAIR_QUEUE, RECV_QUEUE).step("TCP_REPAIR_QUEUE", failed)?;
    let rcv_seq = get_u32(fd, libc::TCP_QUEUE_SEQ).step("TCP_QUEUE_SEQ", failed)?;
    let received = peek(fd, queued).step("receive queue", failed)?;
    if received.len() != queued {
        // SIOCINQ stops at urgent data, which a peek passes over; data in flight moves both.
        return Err(RepairError::state("receive queue", Reason::UrgentData));
    }
    let wscale = (info.options & OPT_WSCALE != 0).then_some((info.wscale & 15, info.wscale >> 4));
    Ok(TcpState {
        snd_seq,
        rcv_seq,
        sent,
        unsent,
        received,
        mss_clamp: u16::try_from(mss_clamp).unwrap_or(u16::MAX),
        snd_mss: u16::try_from(info.snd_mss).unwrap_or(u16::MAX),
        wscale,
        sack: info.options & OPT_SACK != 0,
        timestamps,
        snd_cwnd: window(info),
        window: Window {
            snd_wl1: w.snd_wl1,
            snd_wnd: w.snd_wnd,
            max_window: w.max_window,
            rcv_wnd: receive_window(&w, rcv_seq, info),
            rcv_wup: rcv_seq,
        },
    })
}

/// The congestion window to go on with.
fn window(info: &TcpInfo) -> u32 {
    let now = window_after_idle(info.snd_cwnd, u64::from(info.last_data_sent) * 1000, info.rto);
    // The kernel has the largest number where it has measured none.
    let round_trip = if info.min_rtt == u32::MAX { 0 } else { info.min_rtt };
    window_to_carry(now, info.delivery_rate, round_trip, info.snd_mss)
}

/// The most that this socket may have offered when it is emptied, from RCV.NXT on: a delayed acknowledgement can
/// still leave it, with a window up to `rcv_ssthresh` (`__tcp_select_window`), and the restored socket must take what
/// the client then sends.
fn receive_window(w: &RepairWindow, rcv_nxt: u32, info: &TcpInfo) -> u32 {
    let offered = w.rcv_wup.wrapping_add(w.rcv_wnd).wrapping_sub(rcv_nxt);
    let offered = if offered > i32::MAX as u32 { 0 } else { offered };
    offered.max(info.rcv_ssthresh.next_multiple_of(1 << (info.wscale >> 4)))
}

/// Memory that the receive queue takes, and its limit, bytes (SO_MEMINFO). The first may be many times what can be read: a
/// segment counts until all of it has been.
///
/// # Errors
/// The kernel's.
pub fn receive_memory(fd: RawFd) -> io::Result<(u32, u32)> {
    let mut memory = [0_u32; 9];
    raw::getsockopt(fd, libc::SOL_SOCKET, SO_MEMINFO, &mut memory)?;
    Ok((memory[SK_MEMINFO_RMEM_ALLOC], memory[SK_MEMINFO_RCVBUF]))
}

fn buffers(fd: RawFd) -> io::Result<Buffers> {
    let mut memory = [0_u32; 9];
    raw::getsockopt(fd, libc::SOL_SOCKET, SO_MEMINFO, &mut memory)?;
    // Kernels before 5.16 do not tell; autotuning is what servers have.
    let mut lock = 0_i32;
    let lock = raw::getsockopt(fd, libc::SOL_SOCKET, SO_BUF_LOCK, &mut lock).map_or(0, |_| lock as u8);
    Ok(Buffers { rcvbuf: memory[SK_MEMINFO_RCVBUF], sndbuf: memory[SK_MEMINFO_SNDBUF], lock })
}

/// Options that the server had set and that travel with the connection.
///
/// # Errors
/// Of getsockopt(2).
pub fn options(fd: RawFd, ends: &Ends) -> io::Result<SockOptions> {
    let int = |level, name| {
        let mut value = 0_i32;
        raw::getsockopt(fd, level, name, &mut value).map(|_| value)
    };
    let tcp = |name| get_u32(fd, name);
    let keepalive = int(libc::SOL_SOCKET, libc::SO_KEEPALIVE)? != 0;
    let times = |name| if keepalive { tcp(name) } else { Ok(0) };
    let tos = if ends.v6_socket {
        int(libc::IPPROTO_IPV6, libc::IPV6_TCLASS)?.max(int(libc::IPPROTO_IP, libc::IP_TOS).unwrap_or(0))
    } else {
        int(libc::IPPROTO_IP, libc::IP_TOS)?
    };
    let mut name = [0_u8; 16];
    let n = raw::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_CONGESTION, &mut name)?;
    let name: Vec<u8> = name.iter().take(n).copied().take_while(|&b| b != 0).collect();
    Ok(SockOptions {
        nodelay: tcp(libc::TCP_NODELAY)? != 0,
        keepalive,
        keepidle: times(libc::TCP_KEEPIDLE)?,
        keepintvl: times(libc::TCP_KEEPINTVL)?,
        keepcnt: times(libc::TCP_KEEPCNT)?,
        user_timeout: tcp(libc::TCP_USER_TIMEOUT)?,
        tos: tos as u8,
        congestion: String::from_utf8_lossy(&name).into_owned(),
    })
}

/// Bytes that were written and have never been sent. Without such a socket sends nothing new by itself.
///
/// # Errors
/// Of ioctl(2).
pub fn unsent(fd: RawFd) -> io::Result<usize> {
    count(fd, SIOCOUTQNSD)
}

/// One of the SIOC*Q ioctls.
fn count(fd: RawFd, request: i32) -> io::Result<usize> {
    let mut n = 0_i32;
    // SAFETY: the number lives through the call and may be written.
    sys!(libc::SYS_ioctl, fd, request, &raw mut n)?;
    Ok(n.max(0) as usize)
}

/// What has not been acknowledged: the last bytes of the selected send queue. The queue may begin earlier: a segment stays in it until
/// all of it has been acknowledged, and a restored socket has what several carried in one.
fn send_queue(fd: RawFd, outstanding: usize) -> Result<Vec<u8>, RepairError> {
    let moved = || RepairError::state("send queue", Reason::StateMoved);
    let mut room = outstanding;
    // What is in the queue only gets less.
    for _ in 0..2 {
        let (mut bytes, there) = peek_at_most(fd, room).step("send queue", Reason::DumpFailed)?;
        if there > bytes.len() {
            room = there;
            continue;
        }
        let first = there.checked_sub(outstanding).ok_or_else(moved)?;
        if count(fd, libc::TIOCOUTQ as i32).step("SIOCOUTQ", Reason::DumpFailed)? != outstanding {
            return Err(moved());
        }
        return Ok(bytes.split_off(first));
    }
    Err(moved())
}

/// Reads up to `expected` + 1 bytes of the selected queue and leaves them there.
pub(super) fn peek(fd: RawFd, expected: usize) -> io::Result<Vec<u8>> {
    peek_at_most(fd, expected).map(|(bytes, _)| bytes)
}

/// As [`peek`], with how many there are; of a receive queue at most `expected` + 1, of a send queue all (`tcp_peek_sndq`,
/// net/ipv4/tcp.c).
fn peek_at_most(fd: RawFd, expected: usize) -> io::Result<(Vec<u8>, usize)> {
    let mut bytes = vec![0; expected + 1];
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: pointer and length describe `bytes`.
    let n = sys!(libc::SYS_recvfrom, fd, bytes.as_mut_ptr(), bytes.len(), flags, 0, 0);
    let there = match n {
        Ok(n) => n,
        Err(e) if e.kind() == io::ErrorKind::WouldBlock && expected == 0 => 0,
        Err(e) => return Err(e),
    };
    bytes.truncate(there);
    Ok((bytes, there))
}
