//! The outbound transfer (paper 4.1.1) as two state machines: (state, event) -> actions.
//!
//! A machine never acts itself: its driver carries the actions out in order, and tells the outcome of those
//! that can fail as the next event. Time comes in as the event `Deadline`; the driver arms it where an
//! action says so. `docs/PROTOCOL.md` has the same tables in words.
//!
//! What must hold whatever is lost, late or repeated:
//! - the host's socket and the target's are never out of repair mode at the same time;
//! - as long as the host has not redirected the flow it can take everything back;
//! - after that, the target either serves the connection, or says `Refuse` and the host resets it: the client is told.

use std::net::SocketAddr;

use crate::reason::Reason;

/// Where a hand-off stands on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostState {
    /// Asked for by the library; nothing is touched.
    Asked,
    /// Flow held, socket about to be dumped.
    Held,
    /// `BEGIN_OFFLOAD` is out; the socket is in repair mode.
    Begun,
    /// Redirected, `HOST_READY` is out; not known whether it arrived.
    Redirected,
    /// The target's handler has the connection.
    Offloaded,
    /// Over, one way or another.
    Done,
}

/// What happens to a hand-off on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostEvent {
    /// The library asks and the peer is connected.
    Start,
    /// The peer cannot be reached, or another reason not to start.
    Hopeless(Reason),
    /// `Hold` worked (or why not).
    Held(Result<(), Reason>),
    /// `Dump` worked (or why not).
    Dumped(Result<(), Reason>),
    /// `TARGET_READY`.
    TargetReady {
        /// Where the client's packets are to go.
        local: SocketAddr,
        /// The host's socket has received nothing since the dump.
        still: bool,
    },
    /// `Redirect` failed: the entry was not there any more.
    RedirectFailed,
    /// The target refused.
    Refused(Reason),
    /// The handler has the socket.
    Handed,
    /// The channel to the target broke.
    PeerLost,
    /// The channel to the target is up again.
    PeerBack,
    /// The time limit armed by `SendBegin` ran out.
    Deadline,
    /// The connection's TCP close has finished at the target.
    Closed,
}

/// What the host's driver has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostAction {
    /// Insert the HOLD entry; answer with `Held`.
    Hold,
    /// Dump the socket; answer with `Dumped`.
    Dump,
    /// Send `BEGIN_OFFLOAD` and arm the time limit.
    SendBegin,
    /// Replay held packets to this address, then turn HOLD into REDIRECT.
    Redirect(SocketAddr),
    /// Send `HOST_READY`.
    SendHostReady,
    /// Tell the library that the connection is gone and empty the socket in place.
    Vacate,
    /// Send `ABORT`.
    SendAbort,
    /// Leave repair mode, replay held packets to the local stack, remove the entry.
    TakeBack,
    /// Remove the HOLD entry; the socket was not touched.
    Unhold,
    /// Tell the library that the connection stays.
    Stay(Reason),
    /// The connection is lost: reset the client, remove the REDIRECT entry.
    Reset,
    /// Remove the REDIRECT entry.
    RemoveRedirect,
    /// Send `CLOSED_ACK`.
    SendClosedAck,
}

/// One hand-off on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    state: HostState,
}

impl Default for Host {
    fn default() -> Self {
        Host { state: HostState::Asked }
    }
}

impl Host {
    /// Where the hand-off stands.
    #[must_use]
    pub fn state(&self) -> HostState {
        self.state
    }

    /// Takes an event; appends what has to be done, in order, to `actions`. Events that mean nothing in the
    /// present state (repeated, late) do nothing.
    pub fn on(&mut self, event: &HostEvent, actions: &mut Vec<HostAction>) {
        use HostAction as A;
        use HostEvent as E;
        use HostState as S;
        self.state = match (self.state, event) {
            (S::Asked, E::Start) => {
                actions.push(A::Hold);
                S::Asked
            }
            (S::Asked, E::Hopeless(r) | E::Held(Err(r))) => {
                actions.push(A::Stay(*r));
                S::Done
            }
            (S::Asked, E::Held(Ok(()))) => {
                actions.push(A::Dump);
                S::Held
            }
            (S::Held, E::Dumped(Ok(()))) => {
                actions.push(A::SendBegin);
                S::Begun
            }
            (S::Held, E::Dumped(Err(r))) => {
                actions.extend([A::Unhold, A::Stay(*r)]);
                S::Done
            }
            (S::Begun, E::TargetReady { local, still: true }) => {
                actions.extend([A::Redirect(*local), A::SendHostReady, A::Vacate]);
                S::Redirected
            }
            (S::Begun, E::TargetReady { still: false, .. }) => {
                actions.extend([A::SendAbort, A::TakeBack, A::Stay(Reason::StateMoved)]);
                S::Done
            }
            (S::Begun, E::Refused(r)) => {
                actions.extend([A::TakeBack, A::Stay(*r)]);
                S::Done
            }
            (S::Begun, E::Deadline) => {
                actions.extend([A::SendAbort, A::TakeBack, A::Stay(Reason::PeerTimeout)]);
                S::Done
            }
            (S::Begun, E::PeerLost) => {
                actions.extend([A::TakeBack, A::Stay(Reason::PeerLost)]);
                S::Done
            }
            // The driver reports this before it goes on with HOST_READY, so nothing has left yet.
            (S::Redirected, E::RedirectFailed) => {
                actions.extend([A::SendAbort, A::TakeBack, A::Stay(Reason::TableFull)]);
                S::Done
            }
            (S::Redirected, E::Handed) => S::Offloaded,
            // HOST_READY may be lost with the channel; the target answers a repeated one.
            (S::Redirected, E::PeerBack) => {
                actions.push(A::SendHostReady);
                S::Redirected
            }
            (S::Redirected, E::Refused(_)) => {
                actions.push(A::Reset);
                S::Done
            }
            (S::Redirected | S::Offloaded, E::Closed) => {
                actions.extend([A::RemoveRedirect, A::SendClosedAck]);
                S::Done
            }
            (state, _) => state,
        };
    }
}

/// Where a hand-off stands on the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetState {
    /// `BEGIN_OFFLOAD` came in; nothing is done yet.
    New,
    /// `TARGET_READY` is out; the restored socket is in repair mode.
    Ready,
    /// The socket is live and on its way to the handler.
    Started,
    /// The handler has the socket.
    Served,
    /// The kernel has forgotten the connection; `CLOSED` is out.
    Closing,
    /// Over.
    Done,
}

/// What happens to a hand-off on the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetEvent {
    /// `BEGIN_OFFLOAD`; also when the host repeats it.
    Begin,
    /// `Restore` worked, source rewrite included (or why not).
    Restored(Result<(), Reason>),
    /// `HOST_READY`.
    HostReady,
    /// `ABORT`.
    Abort,
    /// `Start` and the hand-over to the handler worked (or not).
    Handed(Result<(), Reason>),
    /// The time limit armed by `SendReady` or `SendClosed` ran out.
    Deadline,
    /// The kernel has forgotten the connection.
    SocketGone,
    /// The channel to the host is up again.
    PeerBack,
    /// `CLOSED_ACK`.
    ClosedAck,
}

/// What the target's driver has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetAction {
    /// Restore the socket in repair mode and install the source rewrite; answer with `Restored`.
    Restore,
    /// Send `TARGET_READY` and arm the time limit.
    SendReady,
    /// Send `REFUSE`.
    Refuse(Reason),
    /// Leave repair mode and give the socket to the handler; answer with `Handed`.
    Start,
    /// Send `HANDED`.
    SendHanded,
    /// Close the socket in repair mode (silently) and remove the source rewrite.
    Discard,
    /// Send `CLOSED` and arm the time limit.
    SendClosed,
    /// Remove the source rewrite.
    RemoveRewrite,
}

/// One hand-off on the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    state: TargetState,
}

impl Default for Target {
    fn default() -> Self {
        Target { state: TargetState::New }
    }
}

impl Target {
    /// Where the hand-off stands.
    #[must_use]
    pub fn state(&self) -> TargetState {
        self.state
    }

    /// As [`Host::on`].
    pub fn on(&mut self, event: &TargetEvent, actions: &mut Vec<TargetAction>) {
        use TargetAction as A;
        use TargetEvent as E;
        use TargetState as S;
        self.state = match (self.state, event) {
            (S::New, E::Begin) => {
                actions.push(A::Restore);
                S::New
            }
            (S::New, E::Restored(Ok(()))) => {
                actions.push(A::SendReady);
                S::Ready
            }
            (S::New, E::Restored(Err(r))) => {
                actions.push(A::Refuse(*r));
                S::Done
            }
            (S::Ready, E::Begin) => {
                actions.push(A::SendReady);
                S::Ready
            }
            (S::Ready, E::HostReady) => {
                actions.push(A::Start);
                S::Started
            }
            (S::Ready, E::Abort | E::Deadline) => {
                actions.push(A::Discard);
                S::Done
            }
            (S::Started, E::Handed(Ok(()))) => {
                actions.push(A::SendHanded);
                S::Served
            }
            (S::Started, E::Handed(Err(r))) => {
                actions.extend([A::Discard, A::Refuse(*r)]);
                S::Done
            }
            (S::Served, E::HostReady) => {
                actions.push(A::SendHanded);
                S::Served
            }
            (S::Served, E::SocketGone) | (S::Closing, E::PeerBack) => {
                actions.push(A::SendClosed);
                S::Closing
            }
            (S::Closing, E::ClosedAck | E::Deadline) => {
                actions.push(A::RemoveRewrite);
                S::Done
            }
            (state, _) => state,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local() -> SocketAddr {
        "10.3.0.2:80".parse().expect("an address")
    }

    fn host(events: &[HostEvent]) -> (HostState, Vec<HostAction>) {
        let (mut m, mut all) = (Host::default(), Vec::new());
        for e in events {
            m.on(e, &mut all);
        }
        (m.state(), all)
    }

    fn target(events: &[TargetEvent]) -> (TargetState, Vec<TargetAction>) {
        let (mut m, mut all) = (Target::default(), Vec::new());
        for e in events {
            m.on(e, &mut all);
        }
        (m.state(), all)
    }

    const BEGUN: [HostEvent; 3] = [HostEvent::Start, HostEvent::Held(Ok(())), HostEvent::Dumped(Ok(()))];

    #[test]
    fn host_sends_the_papers_order() {
        let mut events = BEGUN.to_vec();
        events.extend([
            HostEvent::TargetReady { local: local(), still: true },
            HostEvent::Handed,
            HostEvent::Closed,
        ]);
        let (state, actions) = host(&events);
        assert_eq!(state, HostState::Done);
        use HostAction::*;
        assert_eq!(
            actions,
            [Hold, Dump, SendBegin, Redirect(local()), SendHostReady, Vacate, RemoveRedirect, SendClosedAck]
        );
    }

    /// Every way to fail before the redirect ends with the socket taken back and one verdict.
    #[test]
    fn host_takes_back_until_it_redirects() {
        use HostEvent::*;
        for (event, reason) in [
            (Refused(Reason::NoHandler), Reason::NoHandler),
            (Deadline, Reason::PeerTimeout),
            (PeerLost, Reason::PeerLost),
            (TargetReady { local: local(), still: false }, Reason::StateMoved),
        ] {
            let mut events = BEGUN.to_vec();
            events.extend([event.clone(), TargetReady { local: local(), still: true }, Handed, PeerBack]);
            let (state, actions) = host(&events);
            assert_eq!(state, HostState::Done, "{event:?}");
            assert_eq!(actions.iter().filter(|a| **a == HostAction::TakeBack).count(), 1, "{event:?}");
            assert_eq!(actions.last(), Some(&HostAction::Stay(reason)), "{event:?}");
            assert!(!actions.contains(&HostAction::Vacate), "{event:?}");
        }
    }

    #[test]
    fn host_resets_what_the_target_lost() {
        let mut events = BEGUN.to_vec();
        events.extend([
            HostEvent::TargetReady { local: local(), still: true },
            HostEvent::PeerLost,
            HostEvent::PeerBack,
            HostEvent::Refused(Reason::PeerLost),
        ]);
        let (state, actions) = host(&events);
        assert_eq!(state, HostState::Done);
        assert_eq!(actions[actions.len() - 2..], [HostAction::SendHostReady, HostAction::Reset]);
    }

    #[test]
    fn target_starts_only_after_host_ready() {
        use TargetEvent::*;
        let (state, actions) = target(&[
            Begin,
            Restored(Ok(())),
            Begin,
            HostReady,
            HostReady,
            Handed(Ok(())),
            SocketGone,
            ClosedAck,
        ]);
        assert_eq!(state, TargetState::Done);
        use TargetAction as A;
        assert_eq!(
            actions,
            [
                A::Restore,
                A::SendReady,
                A::SendReady,
                A::Start,
                A::SendHanded,
                A::SendClosed,
                A::RemoveRewrite
            ]
        );
        let (state, actions) = target(&[Begin, Restored(Ok(())), Abort, HostReady]);
        assert_eq!((state, actions.last()), (TargetState::Done, Some(&A::Discard)));
    }

    /// Small model, all orders: whatever the two machines are told, in any order of six events, the
    /// host never vacates its socket after taking it back, and the target never starts a discarded one.
    #[test]
    fn no_order_of_events_makes_two_ends_or_a_zombie() {
        use HostEvent as E;
        let alphabet = [
            E::Start,
            E::Held(Ok(())),
            E::Dumped(Ok(())),
            E::TargetReady { local: local(), still: true },
            E::Refused(Reason::NoHandler),
            E::Deadline,
            E::PeerLost,
            E::Handed,
            E::Closed,
        ];
        let mut index = [0_usize; 6];
        loop {
            let events: Vec<_> = index.iter().map(|&i| alphabet[i].clone()).collect();
            let (_, actions) = host(&events);
            let taken = actions.iter().position(|a| *a == HostAction::TakeBack);
            let vacated = actions.iter().position(|a| *a == HostAction::Vacate);
            assert!(taken.is_none() || vacated.is_none(), "{events:?}: {actions:?}");
            let verdicts =
                actions.iter().filter(|a| matches!(a, HostAction::Stay(_) | HostAction::Vacate)).count();
            assert!(verdicts <= 1, "{events:?}: {actions:?}");
            let Some(i) = index.iter().rposition(|&i| i + 1 < alphabet.len()) else { break };
            index[i] += 1;
            index[i + 1..].fill(0);
        }
    }
}
