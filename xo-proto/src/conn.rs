//! The transferable connection: everything a machine needs to continue another machine's TCP connection.

use std::fmt;
use std::net::SocketAddr;

use bincode::{Decode, Encode};

use crate::tls::TlsState;

/// A TCP connection between two request boundaries.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct ConnRecord {
    /// The client's address and port.
    pub client: SocketAddr,
    /// The address and port the client talks to: the host's, wherever the connection has been moved.
    pub local: SocketAddr,
    /// Protocol state (RFC 9293 section 3.3.1 and the negotiated options).
    pub tcp: TcpState,
    /// Sizes of its buffers.
    pub buffers: Buffers,
    /// Its TLS, if it has any: `tcp.received` then begins with the next record of the client.
    pub tls: Option<TlsState>,
}

impl TcpState {
    /// The client has acknowledged this, which another machine may have sent: a reset must say that it comes after it, or the
    /// client takes no notice (RFC 5961, 3.2).
    pub fn acknowledged(&mut self, ack: u32) {
        if (ack.wrapping_sub(self.snd_seq) as i32) > 0 {
            self.snd_seq = ack;
            self.sent.clear();
            self.unsent.clear();
        }
    }
}

/// Buffer sizes of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Encode, Decode)]
pub struct Buffers {
    /// `SO_RCVBUF` as the kernel reports it (already doubled), bytes.
    pub rcvbuf: u32,
    /// `SO_SNDBUF` as the kernel reports it (already doubled), bytes.
    pub sndbuf: u32,
    /// `SO_BUF_LOCK`: which of the two the server had fixed (1 send, 2 receive); the others keep autotuning.
    pub lock: u8,
}

/// State of an ESTABLISHED TCP socket. Sequence numbers are the *ends* of the queues, as
/// `TCP_QUEUE_SEQ` reports them in repair mode.
#[derive(Clone, PartialEq, Eq, Default, Encode, Decode)]
pub struct TcpState {
    /// SND: sequence number after the last byte the server has written (the kernel's `write_seq`).
    pub snd_seq: u32,
    /// RCV.NXT: sequence number after the last byte in `received`.
    pub rcv_seq: u32,
    /// Bytes sent and not acknowledged.
    pub sent: Vec<u8>,
    /// Bytes written by the server and not yet sent.
    pub unsent: Vec<u8>,
    /// Bytes received and not yet read by the server; begins with the request to be served.
    pub received: Vec<u8>,
    /// MSS clamp: the peer's MSS option (`TCP_MAXSEG` in repair mode), bytes.
    pub mss_clamp: u16,
    /// Effective segment size before the move (`tcpi_snd_mss`), bytes; for verification only.
    pub snd_mss: u16,
    /// Window scale: (ours to apply to what the peer advertises, ours to announce), if negotiated.
    pub wscale: Option<(u8, u8)>,
    /// SACK permitted, if negotiated.
    pub sack: bool,
    /// Timestamps, if negotiated.
    pub timestamps: Option<Timestamps>,
    /// Congestion window, segments: see [`window_to_carry`]; 0: that of a new connection.
    pub snd_cwnd: u32,
    /// Windows, as `TCP_REPAIR_WINDOW` reports them.
    pub window: Window,
}

/// A new connection's congestion window, segments (RFC 6928; the kernel's `TCP_INIT_CWND`).
const INITIAL_WINDOW: u32 = 10;

/// The congestion window with which a connection would go on that has sent nothing for some time: half for each
/// retransmission timeout, as the kernel has it (`tcp_cwnd_restart`; RFC 2861). Windows in segments, times in microseconds.
#[must_use]
pub fn window_after_idle(window: u32, idle_us: u64, timeout_us: u32) -> u32 {
    let halvings = idle_us.saturating_sub(1) / u64::from(timeout_us.max(1));
    let halved = window.checked_shr(u32::try_from(halvings).unwrap_or(u32::MAX)).unwrap_or(0);
    halved.max(window.min(INITIAL_WINDOW))
}

/// A window that may be sent at once on any path, segments.
const BURST: u32 = 256;

/// What a connection keeps of its congestion window when it moves: nothing paces the first flight afterwards, so no more than twice
/// what has been on the way (the bandwidth-delay product), for beyond that the window tells of a queue. `rate`: what has been delivered,
/// bytes a second; 0, as a round trip of 0: not known. Windows in segments of `mss` bytes.
#[must_use]
pub fn window_to_carry(window: u32, rate: u64, round_trip_us: u32, mss: u32) -> u32 {
    let bytes = u128::from(rate) * u128::from(round_trip_us) / 1_000_000;
    let segments = 2 * bytes / u128::from(mss.max(1));
    window.min(u32::try_from(segments).unwrap_or(u32::MAX).max(BURST))
}

/// The TCP timestamp clock (RFC 7323).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Timestamps {
    /// `TCP_TIMESTAMP` as the kernel returned it; bit 0 carries the unit on kernels that know microseconds.
    pub value: u32,
    /// The unit is microseconds (`TCPI_OPT_USEC_TS`), else milliseconds.
    pub usec: bool,
}

/// `struct tcp_repair_window`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Encode, Decode)]
pub struct Window {
    /// Sequence number of the segment used for the last send-window update (SND.WL1).
    pub snd_wl1: u32,
    /// Send window, bytes (SND.WND).
    pub snd_wnd: u32,
    /// Largest send window the peer has ever offered, bytes.
    pub max_window: u32,
    /// Receive window, bytes (RCV.WND).
    pub rcv_wnd: u32,
    /// RCV.NXT when the window was last announced.
    pub rcv_wup: u32,
}

/// Socket options that travel with the connection; none would by itself. They follow the record in `HOST_READY`: reading
/// them takes a third of the time of a dump.
#[derive(Clone, Debug, PartialEq, Eq, Default, Encode, Decode)]
pub struct SockOptions {
    /// `TCP_NODELAY`.
    pub nodelay: bool,
    /// `SO_KEEPALIVE`.
    pub keepalive: bool,
    /// `TCP_KEEPIDLE`, seconds.
    pub keepidle: u32,
    /// `TCP_KEEPINTVL`, seconds.
    pub keepintvl: u32,
    /// `TCP_KEEPCNT`.
    pub keepcnt: u32,
    /// `TCP_USER_TIMEOUT`, milliseconds, 0 for the default.
    pub user_timeout: u32,
    /// `IP_TOS` or `IPV6_TCLASS`.
    pub tos: u8,
    /// `TCP_CONGESTION`, the algorithm's name; the target's default where it does not have it.
    pub congestion: String,
}

/// Payload is the client's: its length is printed, never its bytes.
impl fmt::Debug for TcpState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TcpState")
            .field("snd_seq", &self.snd_seq)
            .field("rcv_seq", &self.rcv_seq)
            .field("sent", &self.sent.len())
            .field("unsent", &self.unsent.len())
            .field("received", &self.received.len())
            .field("mss_clamp", &self.mss_clamp)
            .field("snd_mss", &self.snd_mss)
            .field("wscale", &self.wscale)
            .field("sack", &self.sack)
            .field("timestamps", &self.timestamps)
            .field("snd_cwnd", &self.snd_cwnd)
            .field("window", &self.window)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_shrinks_while_nothing_is_sent() {
        for (window, idle_us, expected) in [
            (100, 0, 100),
            (100, 200_000, 100),
            (100, 200_001, 50),
            (100, 400_001, 25),
            (100, 600_001, 12),
            (100, 800_001, 10),
            (100, u64::MAX, 10),
            (4, u64::MAX, 4),
            (0, 0, 0),
        ] {
            assert_eq!(window_after_idle(window, idle_us, 200_000), expected, "{window} {idle_us}");
        }
        assert_eq!(window_after_idle(100, 5, 0), 10, "no timeout is known");
    }

    #[test]
    fn a_window_that_moves_is_no_longer_than_the_path() {
        for (window, rate, round_trip_us, expected) in [
            // Short and fast; nothing is known; long.
            (4000, 2_500_000_000, 60, 256),
            (200, 2_500_000_000, 60, 200),
            (4000, 0, 50_000, 256),
            (4000, 40_000_000, 50_000, 2857),
            (2000, 40_000_000, 50_000, 2000),
            (u32::MAX, u64::MAX, u32::MAX, u32::MAX),
        ] {
            assert_eq!(
                window_to_carry(window, rate, round_trip_us, 1400),
                expected,
                "{window} {rate} {round_trip_us}"
            );
        }
        assert_eq!(window_to_carry(4000, 1000, 1_000_000, 0), 2000, "no segment size is known");
    }

    #[test]
    fn only_what_is_new_counts_as_acknowledged() {
        for snd_seq in [1000, u32::MAX - 3] {
            let before = TcpState { snd_seq, sent: vec![1; 5], ..TcpState::default() };
            for (ahead, sent) in [(0_u32, 5), (u32::MAX, 5), (u32::MAX - 4, 5), (1, 0), (70_000, 0)] {
                let mut state = before.clone();
                state.acknowledged(snd_seq.wrapping_add(ahead));
                let expected = if sent == 0 { snd_seq.wrapping_add(ahead) } else { snd_seq };
                assert_eq!((state.snd_seq, state.sent.len()), (expected, sent), "{snd_seq} {ahead}");
            }
        }
    }
}
