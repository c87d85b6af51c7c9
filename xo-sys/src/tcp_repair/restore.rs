//! Building a socket from a record.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use xo_proto::conn::{ConnRecord, SockOptions, TcpState, Timestamps};
use xo_proto::reason::Reason;

use super::{
    OFF_NO_PROBE, ON, RECV_QUEUE, RawAddress, RepairError, RepairWindow, SEND_QUEUE, SO_BUF_LOCK, Step,
    TCP_REPAIR_WINDOW, WINDOW_PRIORITY, address_of, set,
};
use crate::raw::{self, Fd, sys};

/// Option kinds of `TCP_REPAIR_OPTIONS` (TCPOPT_*).
const OPT_MSS: u32 = 2;
const OPT_WSCALE: u32 = 3;
const OPT_SACK: u32 = 4;
const OPT_TIMESTAMP: u32 = 8;
/// Range of TCP_MAXSEG (`TCP_MIN_MSS`, `MAX_TCP_WINDOW`).
const MSS_RANGE: (u16, u16) = (88, 32_767);
/// Bytes written into a queue at a time, and the least before giving up on a lack of memory.
const CHUNK: usize = 256 << 10;
const LEAST_CHUNK: usize = 1 << 10;
/// Queues longer than this get buffers to match before they are filled.
const SMALL_QUEUE: usize = 8 << 10;

/// How far a restored timestamp clock is set ahead: the record travels for some time, and the old socket lives until
/// shortly after the new one has begun.
const CLOCK_MARGIN: Duration = Duration::from_millis(2);

/// A restored socket in repair mode: it sends nothing, and closes without a packet when dropped.
#[derive(Debug)]
pub struct Repaired {
    fd: Fd,
    local: SocketAddr,
    unsent: Vec<u8>,
    timestamps: Option<Timestamps>,
    /// The dump, judged by the time elapsed that the clock was set with.
    dumped: Instant,
    /// `SO_BUF_LOCK` to set, where buffers were made to fit the queues.
    lock: Option<u8>,
}

/// Sockets made in advance: making one takes as long as a third of a restore.
#[derive(Debug, Default)]
pub struct SpareSockets {
    v4: Vec<Fd>,
    v6: Vec<Fd>,
}

impl SpareSockets {
    /// Makes up for those taken, to `count` of each family; what the kernel refuses is made when needed.
    pub fn refill(&mut self, count: usize) {
        for (spare, v6) in [(&mut self.v4, false), (&mut self.v6, true)] {
            while spare.len() < count {
                match fresh(v6) {
                    Ok(fd) => spare.push(fd),
                    Err(_) => break,
                }
            }
        }
    }

    fn take(&mut self, v6: bool) -> Result<Fd, RepairError> {
        let spare = if v6 { &mut self.v6 } else { &mut self.v4 };
        spare.pop().map_or_else(|| fresh(v6), Ok)
    }
}

/// A new socket in repair mode.
fn fresh(v6: bool) -> Result<Fd, RepairError> {
    let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
    // SAFETY: numbers only.
    let fd = sys!(libc::SYS_socket, family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, libc::IPPROTO_TCP)
        .step("socket", Reason::RestoreFailed)?;
    let fd = Fd::new(fd as RawFd);
    set(fd.as_raw_fd(), libc::TCP_REPAIR, ON).step("TCP_REPAIR", Reason::RestoreFailed)?;
    Ok(fd)
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RepairOption {
    code: u32,
    value: u32,
}

/// Restores a connection, bound to `bind`; `v6_socket` makes an AF_INET6 socket with v4-mapped addresses
/// out of an IPv4 connection, for servers with a dual-stack listener. `elapsed` is the time since the dump as far as
/// it is known: a socket acknowledges what arrives also in repair mode, and its timestamp clock must not be behind
/// what the old socket may have sent since, or the peer drops all that it sends (RFC 7323, 5.3). When the 4-tuple is taken, the kernel
/// chooses another port: see [`Repaired::local`].
///
/// # Errors
/// `RestoreFailed` with the step that the kernel refused.
pub fn restore(
    record: &ConnRecord,
    bind: SocketAddr,
    v6_socket: bool,
    elapsed: Duration,
    spare: &mut SpareSockets,
) -> Result<Repaired, RepairError> {
    let v6_socket = v6_socket || record.client.is_ipv6();
    match restore_at(record, bind, v6_socket, elapsed, spare) {
        Err(e) if matches!(e.source.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::EADDRINUSE)) => {
            restore_at(record, SocketAddr::new(bind.ip(), 0), v6_socket, elapsed, spare)
        }
        other => other,
    }
}

fn restore_at(
    record: &ConnRecord,
    bind: SocketAddr,
    v6_socket: bool,
    elapsed: Duration,
    spare: &mut SpareSockets,
) -> Result<Repaired, RepairError> {
    let begun = Instant::now();
    let failed = Reason::RestoreFailed;
    let tcp = &record.tcp;
    let fd = spare.take(v6_socket)?;
    let raw_fd = fd.as_raw_fd();
    let lock = buffers(raw_fd, record).step("buffers", failed)?;
    let (address, len) = RawAddress::new(bind, v6_socket);
    // SAFETY: the address lives through the call.
    sys!(libc::SYS_bind, raw_fd, &raw const address, len).step("bind", failed)?;
    // Sequence numbers can be set only before connect: those of the queues' beginnings.
    let rcv_start = tcp.rcv_seq.wrapping_sub(tcp.received.len() as u32);
    let snd_start = tcp.snd_seq.wrapping_sub((tcp.sent.len() + tcp.unsent.len()) as u32);
    for (queue, seq) in [(SEND_QUEUE, snd_start), (RECV_QUEUE, rcv_start)] {
        set(raw_fd, libc::TCP_REPAIR_QUEUE, queue).step("TCP_REPAIR_QUEUE", failed)?;
        set(raw_fd, libc::TCP_QUEUE_SEQ, seq as i32).step("TCP_QUEUE_SEQ", failed)?;
    }
    // Without it the restored socket starts with segments of 524 bytes, whatever the option says later.
    let mss = tcp.mss_clamp.clamp(MSS_RANGE.0, MSS_RANGE.1);
    set(raw_fd, libc::TCP_MAXSEG, mss.into()).step("TCP_MAXSEG", failed)?;
    let (address, len) = RawAddress::new(record.client, v6_socket);
    let cwnd = tcp.snd_cwnd.min(u16::MAX.into());
    let priority = |value: u32| raw::setsockopt(raw_fd, libc::SOL_SOCKET, libc::SO_PRIORITY, &value);
    if cwnd > 0 {
        priority(WINDOW_PRIORITY | cwnd).step("SO_PRIORITY", failed)?;
    }
    // SAFETY: the address lives through the call.
    sys!(libc::SYS_connect, raw_fd, &raw const address, len).step("connect", failed)?;
    if cwnd > 0 {
        priority(0).step("SO_PRIORITY", failed)?;
    }
    negotiated(raw_fd, tcp, elapsed).step("TCP_REPAIR_OPTIONS", failed)?;
    fill(raw_fd, &tcp.received).step("receive queue", failed)?;
    if !tcp.sent.is_empty() {
        set(raw_fd, libc::TCP_REPAIR_QUEUE, SEND_QUEUE).step("TCP_REPAIR_QUEUE", failed)?;
        fill(raw_fd, &tcp.sent).step("send queue", failed)?;
    }
    let w = &tcp.window;
    let window = RepairWindow {
        snd_wl1: w.snd_wl1,
        snd_wnd: w.snd_wnd,
        max_window: w.max_window,
        rcv_wnd: w.rcv_wnd,
        rcv_wup: w.rcv_wup,
    };
    raw::setsockopt(raw_fd, libc::IPPROTO_TCP, TCP_REPAIR_WINDOW, &window)
        .step("TCP_REPAIR_WINDOW", failed)?;
    let local = if bind.port() == 0 {
        address_of(raw_fd, libc::SYS_getsockname).step("getsockname", failed)?.0
    } else {
        bind
    };
    Ok(Repaired {
        fd,
        local,
        unsent: tcp.unsent.clone(),
        timestamps: tcp.timestamps,
        dumped: begun.checked_sub(elapsed).unwrap_or(begun),
        lock,
    })
}

impl AsRawFd for Repaired {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Repaired {
    /// Address and port that the socket is bound to.
    #[must_use]
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// A duplicate for the handler, which must wait until the socket is out of repair mode ([`super::in_repair`]).
    ///
    /// # Errors
    /// Of fcntl(2).
    pub fn try_clone(&self) -> io::Result<OwnedFd> {
        raw::duplicate_from(self.fd.as_raw_fd(), 3).map(OwnedFd::from)
    }

    /// Brings the socket to life: leaves repair mode (with a window probe if `probe`), sends what the server
    /// had written and not sent. `elapsed` is the time since the dump, better known by now.
    /// [`super::reuse_address`] is still to be set.
    ///
    /// # Errors
    /// `RestoreFailed`; the socket is then closed, which the peer notices.
    pub fn start(self, probe: bool, elapsed: Duration) -> Result<Fd, RepairError> {
        let fd = self.fd.as_raw_fd();
        if let Some(clock) = self.timestamps
            && elapsed > self.dumped.elapsed() + CLOCK_MARGIN
        {
            set(fd, libc::TCP_TIMESTAMP, later(clock, elapsed) as i32)
                .step("TCP_TIMESTAMP", Reason::RestoreFailed)?;
        }
        if let Some(lock) = self.lock {
            // What the server had not fixed grows by itself again.
            let _ = raw::setsockopt(fd, libc::SOL_SOCKET, SO_BUF_LOCK, &i32::from(lock));
        }
        let off = if probe { 0 } else { OFF_NO_PROBE };
        set(fd, libc::TCP_REPAIR, off).step("TCP_REPAIR", Reason::RestoreFailed)?;
        if !self.unsent.is_empty() {
            fill(fd, &self.unsent).step("unsent data", Reason::RestoreFailed)?;
        }
        Ok(self.fd)
    }

    /// Tells the peer that the connection is lost: a RST with the right sequence number.
    ///
    /// # Errors
    /// Of setsockopt(2).
    pub fn reset(self) -> io::Result<()> {
        let fd = self.fd.as_raw_fd();
        set(fd, libc::TCP_REPAIR, OFF_NO_PROBE)?;
        let now = libc::linger { l_onoff: 1, l_linger: 0 };
        raw::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, &now)
    }
}

/// Sets the options that the server had set on the connection's earlier socket; those that this machine does not know are
/// left out.
pub fn apply_options(fd: RawFd, options: &SockOptions) {
    let o = options;
    let tcp = |name, value: u32| {
        if value != 0 {
            let _ = set(fd, name, value as i32);
        }
    };
    tcp(libc::TCP_NODELAY, o.nodelay.into());
    tcp(libc::TCP_USER_TIMEOUT, o.user_timeout);
    if o.keepalive {
        let _ = raw::setsockopt(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, &1_i32);
        tcp(libc::TCP_KEEPIDLE, o.keepidle);
        tcp(libc::TCP_KEEPINTVL, o.keepintvl);
        tcp(libc::TCP_KEEPCNT, o.keepcnt);
    }
    if o.tos != 0 {
        let tos = i32::from(o.tos);
        let _ = raw::setsockopt(fd, libc::IPPROTO_IP, libc::IP_TOS, &tos);
        // Fails on an AF_INET socket.
        let _ = raw::setsockopt(fd, libc::IPPROTO_IPV6, libc::IPV6_TCLASS, &tos);
    }
    let mut name = [0_u8; 16];
    for (to, from) in name.iter_mut().zip(o.congestion.as_bytes()).take(15) {
        *to = *from;
    }
    if !o.congestion.is_empty() && Some(&name) != defaults().map(|d| &d.congestion) {
        let _ = raw::setsockopt(fd, libc::IPPROTO_TCP, libc::TCP_CONGESTION, &name);
    }
}

/// What a fresh socket has.
struct Defaults {
    rcvbuf: u32,
    congestion: [u8; 16],
}

fn defaults() -> Option<&'static Defaults> {
    static DEFAULTS: OnceLock<Option<Defaults>> = OnceLock::new();
    DEFAULTS
        .get_or_init(|| {
            // SAFETY: numbers only.
            let fd = sys!(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0).ok()?;
            let fd = Fd::new(fd as RawFd);
            let mut d = Defaults { rcvbuf: 0, congestion: [0; 16] };
            raw::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVBUF, &mut d.rcvbuf).ok()?;
            raw::getsockopt(fd.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_CONGESTION, &mut d.congestion)
                .ok()?;
            Some(d)
        })
        .as_ref()
}

/// Buffers must hold the queues and the window that the peer may fill; a smaller one drops data. Returns the lock to set
/// when the queues are in.
fn buffers(fd: RawFd, record: &ConnRecord) -> io::Result<Option<u8>> {
    let o = &record.buffers;
    let default = defaults().map_or(0, |d| d.rcvbuf);
    let received = record.tcp.received.len() as u32;
    let wanted = if received as usize > SMALL_QUEUE {
        o.rcvbuf.max(received.saturating_mul(3).saturating_add(record.tcp.window.rcv_wnd.saturating_mul(2)))
    } else {
        o.rcvbuf
    };
    let mut set_by_us = 0;
    if wanted > default || o.lock & 2 != 0 {
        // The kernel doubles what it is given.
        raw::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &(wanted / 2))?;
        set_by_us |= 2;
    }
    let queued = record.tcp.sent.len() + record.tcp.unsent.len();
    if queued > SMALL_QUEUE || o.lock & 1 != 0 {
        let wanted = o.sndbuf.max((queued as u32).saturating_mul(3));
        raw::setsockopt(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &(wanted / 2))?;
        set_by_us |= 1;
    }
    Ok((set_by_us != o.lock).then_some(o.lock))
}

/// The timestamp clock `elapsed` later, and a little more. Bit 0 says in which unit the kernel counts.
fn later(clock: Timestamps, elapsed: Duration) -> u32 {
    let elapsed = elapsed + CLOCK_MARGIN;
    if clock.usec {
        clock.value.wrapping_add(elapsed.as_micros() as u32) | 1
    } else {
        // The dump cleared bit 0, so the clock may have been one further.
        clock.value.wrapping_add(elapsed.as_millis() as u32 + 1) & !1
    }
}

/// Only what was negotiated, and the timestamp clock.
fn negotiated(fd: RawFd, tcp: &TcpState, elapsed: Duration) -> io::Result<()> {
    let mut options = [RepairOption { code: 0, value: 0 }; 4];
    let wscale = tcp.wscale.map(|(snd, rcv)| u32::from(snd) | u32::from(rcv) << 16);
    let wanted = [
        Some((OPT_MSS, u32::from(tcp.mss_clamp))),
        wscale.map(|value| (OPT_WSCALE, value)),
        tcp.sack.then_some((OPT_SACK, 0)),
        tcp.timestamps.map(|_| (OPT_TIMESTAMP, 0)),
    ];
    let mut n = 0;
    for ((code, value), option) in wanted.into_iter().flatten().zip(&mut options) {
        *option = RepairOption { code, value };
        n += 1;
    }
    let len = n * size_of::<RepairOption>();
    // SAFETY: `len` bytes of `options` are initialised.
    sys!(libc::SYS_setsockopt, fd, libc::IPPROTO_TCP, libc::TCP_REPAIR_OPTIONS, options.as_ptr(), len)?;
    match tcp.timestamps {
        Some(clock) => set(fd, libc::TCP_TIMESTAMP, later(clock, elapsed) as i32),
        None => Ok(()),
    }
}

/// Writes into the selected queue (or, out of repair mode, to the peer). Short writes are normal; a lack of
/// memory for a long piece may not be one for a shorter.
fn fill(fd: RawFd, mut bytes: &[u8]) -> io::Result<()> {
    let mut chunk = CHUNK;
    while !bytes.is_empty() {
        let len = bytes.len().min(chunk);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: pointer and length lie within `bytes`.
        match sys!(libc::SYS_sendto, fd, bytes.as_ptr(), len, flags, 0, 0) {
            Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e)
                if matches!(e.raw_os_error(), Some(libc::ENOMEM | libc::ENOBUFS | libc::EAGAIN))
                    && chunk > LEAST_CHUNK =>
            {
                chunk /= 2;
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
