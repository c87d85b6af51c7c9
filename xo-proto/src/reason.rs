//! Why a connection stays where it is. Every reason is counted under its name, by the library in shared
//! memory and by the daemon in its metrics.

/// A reason to serve a request where the connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, bincode::Encode, bincode::Decode)]
#[repr(u8)]
pub enum Reason {
    /// The bytes on the connection are not HTTP/1.x; it is left alone for the rest of its life.
    NotHttp,
    /// The request's framing is ambiguous (two Content-Lengths, Content-Length with Transfer-Encoding ...).
    AmbiguousFraming,
    /// The request head is longer than the limit (16 KiB).
    HeadTooLong,
    /// The request head took longer to arrive than the limit.
    HeadTooSlow,
    /// CONNECT, Upgrade, or a switched protocol: the connection is left alone from here on.
    Upgraded,
    /// An earlier response is not completely written.
    NotClean,
    /// The framing of a response could not be followed; the connection is left alone from here on.
    UnknownResponse,
    /// Two threads, or two processes, use the connection in a way that the library cannot follow.
    Shared,
    /// No slot left in the library's table.
    SlotsFull,
    /// No daemon answers on `XO_SOCKET`.
    NoDaemon,
    /// The library's socket to the daemon is full.
    DaemonBusy,
    /// The policy names no target that may be used now.
    NoTarget,
    /// The target's daemon cannot be reached.
    PeerUnreachable,
    /// The target's answer did not come within the time limit.
    PeerTimeout,
    /// The target's daemon went away during the hand-off.
    PeerLost,
    /// The peer speaks another version of the protocol, or its kernel another unit of TCP timestamps.
    PeerIncompatible,
    /// The target has no handler of that name, or nobody is registered for it.
    NoHandler,
    /// The target is draining, overloaded, or told not to accept connections.
    TargetUnwilling,
    /// The target could not restore the socket.
    RestoreFailed,
    /// The flow table, the source-rewrite table, or another table is full.
    TableFull,
    /// The connection does not come in by an interface that XO steers.
    NotSteered,
    /// The socket is not an established TCP socket (half-closed, closing, closed).
    NotEstablished,
    /// The socket holds urgent data.
    UrgentData,
    /// The socket speaks MPTCP.
    Mptcp,
    /// The handshake's data (TCP Fast Open) is not settled yet.
    FastOpenPending,
    /// The socket's queues hold more than can travel.
    QueuesTooLong,
    /// Data reached the socket while its state was read.
    StateMoved,
    /// The socket carries an upper-layer protocol (kTLS ...) or an option that cannot travel.
    NotMovable,
    /// TCP_REPAIR is not permitted, or the kernel refused a step of the dump.
    DumpFailed,
    /// The server closed the connection while it was being handed over.
    Closed,
    /// XO is stopping on this machine.
    Stopping,
    /// This machine's daemon went away during the hand-off; the next one has settled it.
    DaemonLost,
    /// The request has moved several times already: policies of different machines contradict each other.
    MovedTooOften,
    /// The bytes on the connection are not Redis's protocol; it is left alone for the rest of its life.
    NotRedis,
    /// The server keeps something about the connection: a transaction, a watched key, a selected database (the request
    /// stays), a user, a subscription, a name ... (the connection is left alone from here on).
    SessionState,
    /// The keys of a command lie in several hash slots.
    CrossSlot,
    /// A command before this one blocks the connection.
    Blocking,
    /// The command runs a script.
    Script,
    /// A Redis command that is not known here; the connection is left alone from here on.
    UnknownCommand,
    /// No worker of the target's pool is there.
    NoWorker,
    /// All workers of the target's pool have as many connections as they can hold.
    PoolFull,
    /// The target cannot serve a TLS connection.
    TlsUnsupported,
    /// The channel to the target's daemon is not encrypted, or the target is not in this daemon's policy: it must not have a
    /// connection's secrets.
    TlsInsecure,
    /// The target could not read the first record with the state that it was given.
    TlsState,
    /// The server's TLS is not OpenSSL's, of version 3.0 or later, or cannot be seen (statically linked, not through sockets); the
    /// connection is left alone for the rest of its life.
    TlsLibrary,
    /// The version of TLS, the cipher suite, or a limit of records' length that the client has set (RFC 6066, 4) cannot travel; the
    /// connection is left alone.
    TlsSuite,
    /// Another protocol than HTTP/1.1 was agreed on (HTTP/2 ...); the connection is left alone.
    TlsAlpn,
    /// The server asks for the client's certificate; the connection is left alone.
    TlsClientCert,
    /// The client has sent data before the handshake was over; the connection is left alone.
    TlsEarlyData,
    /// A second handshake on the connection; it is left alone from here on.
    TlsRenegotiation,
    /// OpenSSL has given the connection's records to the kernel (kTLS); it is left alone.
    TlsKernel,
    /// OpenSSL holds bytes of the next request already; the connection is left alone from here on.
    TlsPending,
    /// The connection's records could not be followed; it is left alone from here on.
    TlsLost,
}

/// Number of reasons.
pub const REASONS: usize = Reason::TlsLost as usize + 1;

/// All reasons, in the order of their numbers.
pub const ALL: [Reason; REASONS] = {
    use Reason::*;
    [
        NotHttp,
        AmbiguousFraming,
        HeadTooLong,
        HeadTooSlow,
        Upgraded,
        NotClean,
        UnknownResponse,
        Shared,
        SlotsFull,
        NoDaemon,
        DaemonBusy,
        NoTarget,
        PeerUnreachable,
        PeerTimeout,
        PeerLost,
        PeerIncompatible,
        NoHandler,
        TargetUnwilling,
        RestoreFailed,
        TableFull,
        NotSteered,
        NotEstablished,
        UrgentData,
        Mptcp,
        FastOpenPending,
        QueuesTooLong,
        StateMoved,
        NotMovable,
        DumpFailed,
        Closed,
        Stopping,
        DaemonLost,
        MovedTooOften,
        NotRedis,
        SessionState,
        CrossSlot,
        Blocking,
        Script,
        UnknownCommand,
        NoWorker,
        PoolFull,
        TlsUnsupported,
        TlsInsecure,
        TlsState,
        TlsLibrary,
        TlsSuite,
        TlsAlpn,
        TlsClientCert,
        TlsEarlyData,
        TlsRenegotiation,
        TlsKernel,
        TlsPending,
        TlsLost,
    ]
};

impl Reason {
    /// The name under which the reason is counted and printed.
    #[must_use]
    pub fn name(self) -> &'static str {
        use Reason::*;
        match self {
            NotHttp => "not_http",
            AmbiguousFraming => "ambiguous_framing",
            HeadTooLong => "head_too_long",
            HeadTooSlow => "head_too_slow",
            Upgraded => "upgraded",
            NotClean => "not_clean",
            UnknownResponse => "unknown_response",
            Shared => "shared",
            SlotsFull => "slots_full",
            NoDaemon => "no_daemon",
            DaemonBusy => "daemon_busy",
            NoTarget => "no_target",
            PeerUnreachable => "peer_unreachable",
            PeerTimeout => "peer_timeout",
            PeerLost => "peer_lost",
            PeerIncompatible => "peer_incompatible",
            NoHandler => "no_handler",
            TargetUnwilling => "target_unwilling",
            RestoreFailed => "restore_failed",
            TableFull => "table_full",
            NotSteered => "not_steered",
            NotEstablished => "not_established",
            UrgentData => "urgent_data",
            Mptcp => "mptcp",
            FastOpenPending => "fast_open_pending",
            QueuesTooLong => "queues_too_long",
            StateMoved => "state_moved",
            NotMovable => "not_movable",
            DumpFailed => "dump_failed",
            Closed => "closed",
            Stopping => "stopping",
            DaemonLost => "daemon_lost",
            MovedTooOften => "moved_too_often",
            NotRedis => "not_redis",
            SessionState => "session_state",
            CrossSlot => "cross_slot",
            Blocking => "blocking",
            Script => "script",
            UnknownCommand => "unknown_command",
            NoWorker => "no_worker",
            PoolFull => "pool_full",
            TlsUnsupported => "tls_unsupported",
            TlsInsecure => "tls_insecure",
            TlsState => "tls_state",
            TlsLibrary => "tls_library",
            TlsSuite => "tls_suite",
            TlsAlpn => "tls_alpn",
            TlsClientCert => "tls_client_cert",
            TlsEarlyData => "tls_early_data",
            TlsRenegotiation => "tls_renegotiation",
            TlsKernel => "tls_kernel",
            TlsPending => "tls_pending",
            TlsLost => "tls_lost",
        }
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_are_unique() {
        for (i, r) in ALL.iter().enumerate() {
            assert_eq!(*r as usize, i, "{r}");
            assert!(ALL[..i].iter().all(|s| s.name() != r.name()), "{r} stands twice");
        }
    }
}
