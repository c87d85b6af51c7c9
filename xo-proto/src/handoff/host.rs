//! The host's side.

use std::net::SocketAddr;

use crate::reason::Reason;

/// Where a hand-off stands on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HostState {
    /// Asked for by the library; nothing is touched.
    Asked,
    /// Flow held, socket about to be dumped.
    Held,
    /// `BEGIN_OFFLOAD` is out; the socket is in repair mode.
    Begun,
    /// Early order: the answer did not come in time; the target may have started the connection.
    Doubt,
    /// Redirected, `HOST_READY` is out; not known whether it arrived.
    Redirected,
    /// The target's handler has the connection.
    Offloaded,
    /// Of a connection that has moved on: its home redirects its packets by itself; what was under way is still sent on.
    Released,
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
        /// The target has started the connection (early order).
        started: bool,
        /// The answer came within the limit for it ([`super::Limits::answer`]).
        timely: bool,
    },
    /// `Redirect` failed: the entry was not there any more.
    RedirectFailed,
    /// The target refused.
    Refused(Reason),
    /// The handler has the socket, and knows that the flow is redirected.
    Handed,
    /// The channel to the target broke.
    PeerLost,
    /// The channel to the target is up again.
    PeerBack,
    /// The time limit armed by `SendBegin` ran out.
    Deadline,
    /// The time limit armed by `ArmDoubt` ran out.
    DoubtOver {
        /// The client has acknowledged bytes that this host never sent: the target's.
        served: bool,
    },
    /// The connection's TCP close has finished at the target; of a connection that has moved on also: its home redirects
    /// its packets by itself.
    Closed,
    /// The time limit armed by `ArmLinger` ran out.
    LingerOver,
    /// The connection has moved on from the target; its packets are to go there now.
    Moved(SocketAddr),
    /// The connection has come home.
    Returned,
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
    /// Replay held packets to this address, and what reached the socket after the dump; turn HOLD into REDIRECT.
    Redirect(SocketAddr),
    /// Send `HOST_READY`.
    SendHostReady,
    /// Tell the library that the connection is gone and empty the socket in place.
    Vacate,
    /// Send `ABORT`.
    SendAbort,
    /// Send `QUERY`: what has become of it?
    SendQuery,
    /// Arm the limit after which the target has certainly given an unconfirmed connection up.
    ArmDoubt,
    /// Leave repair mode, replay held packets to the local stack, remove the entry.
    TakeBack,
    /// Remove the HOLD entry; the socket was not touched.
    Unhold,
    /// Tell the library that the connection stays.
    Stay(Reason),
    /// The connection is lost: reset the client, remove the flow entry.
    Reset,
    /// Remove the REDIRECT entry.
    RemoveRedirect,
    /// Send `CLOSED_ACK`.
    SendClosedAck,
    /// Point the REDIRECT entry at this address.
    Repoint(SocketAddr),
    /// Arm the limit after which no packet is under way to this machine any more.
    ArmLinger,
    /// Tell the connection's record as a guest of this machine what has become of it.
    Guest(GuestEvent),
}

/// What happens to a guest that moves on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// Its socket is gone from here.
    Left,
    /// Its packets do not come here any more.
    Released,
    /// Its next target has lost it, or has seen its end before anybody else got to know.
    Lost,
}

/// One hand-off on the host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Host {
    state: HostState,
    early: bool,
    /// The target has started the connection before it was told that the flow is redirected.
    started: bool,
    /// The connection is another machine's, and moves on from here or goes home.
    guest: bool,
}

impl Host {
    /// A hand-off in the early order, or in the strict one.
    #[must_use]
    pub fn new(early: bool) -> Host {
        Host { state: HostState::Asked, early, started: false, guest: false }
    }

    /// The same for a guest: a connection whose home is another machine.
    #[must_use]
    pub fn of_guest(mut self) -> Host {
        self.guest = true;
        self
    }

    /// A hand-off of an earlier daemon of this machine: it was begun, and nobody knows what the target has made of it
    /// (`Doubt`), or its flow is redirected and `HOST_READY` may not have arrived (`Redirected`).
    #[must_use]
    pub fn recovered(redirected: bool) -> Host {
        let state = if redirected { HostState::Redirected } else { HostState::Doubt };
        Host { state, early: true, started: true, guest: false }
    }

    /// Where the hand-off stands.
    #[must_use]
    pub fn state(&self) -> HostState {
        self.state
    }

    /// Does `BEGIN_OFFLOAD` allow the target to start at once?
    #[must_use]
    pub fn early(&self) -> bool {
        self.early
    }

    /// Takes an event; appends what has to be done, in order, to `actions`. Events that mean nothing in the
    /// present state (repeated, late) do nothing.
    pub fn on(&mut self, event: &HostEvent, actions: &mut Vec<HostAction>) {
        use GuestEvent as G;
        use HostAction as A;
        use HostEvent as E;
        use HostState as S;
        let (early, before, guest) = (self.early, self.started, self.guest);
        if let E::TargetReady { started, .. } = event {
            self.started |= *started;
        }
        let mut then = |next: HostState, all: &[HostAction]| {
            actions.extend(all.iter().filter(|a| guest || !matches!(a, A::Guest(_))).cloned());
            next
        };
        self.state = match (self.state, event) {
            (S::Asked, E::Start) => then(S::Asked, &[A::Hold]),
            (S::Asked, E::Hopeless(r) | E::Held(Err(r))) => then(S::Done, &[A::Stay(*r)]),
            (S::Asked, E::Held(Ok(()))) => then(S::Held, &[A::Dump]),
            (S::Held, E::Dumped(Ok(()))) => then(S::Begun, &[A::SendBegin]),
            (S::Held, E::Dumped(Err(r))) => then(S::Done, &[A::Unhold, A::Stay(*r)]),

            // The target may have given up what it was not confirmed in time: ask again.
            (S::Begun, E::TargetReady { started: true, timely: false, .. }) => {
                then(S::Doubt, &[A::ArmDoubt, A::SendQuery])
            }
            (S::Doubt, E::TargetReady { started: true, timely: false, .. }) => {
                then(S::Doubt, &[A::SendQuery])
            }
            (S::Begun | S::Doubt, E::TargetReady { local, .. }) => {
                then(S::Redirected, &[A::Redirect(*local), A::SendHostReady, A::Vacate, A::Guest(G::Left)])
            }
            // Over before the flow was redirected: the client cannot have closed it, and may not know.
            (S::Begun | S::Doubt, E::Closed) => {
                let gone = [A::Vacate, A::Reset, A::Guest(G::Left), A::Guest(G::Lost), A::SendClosedAck];
                then(S::Done, &gone)
            }
            (S::Begun | S::Doubt, E::Refused(r)) => then(S::Done, &[A::TakeBack, A::Stay(*r)]),
            (S::Begun, E::Deadline) if early => then(S::Doubt, &[A::ArmDoubt, A::SendQuery]),
            (S::Begun, E::PeerLost) if early => then(S::Doubt, &[A::ArmDoubt]),
            (S::Begun, E::Deadline) => {
                then(S::Done, &[A::SendAbort, A::TakeBack, A::Stay(Reason::PeerTimeout)])
            }
            (S::Begun, E::PeerLost) => then(S::Done, &[A::TakeBack, A::Stay(Reason::PeerLost)]),
            (S::Doubt, E::PeerBack) => then(S::Doubt, &[A::SendQuery]),
            (S::Doubt, E::DoubtOver { served: false }) => {
                then(S::Done, &[A::SendAbort, A::TakeBack, A::Stay(Reason::PeerTimeout)])
            }
            (S::Doubt, E::DoubtOver { served: true }) => {
                then(S::Done, &[A::SendAbort, A::Vacate, A::Reset, A::Guest(G::Left), A::Guest(G::Lost)])
            }

            // The driver reports this before it goes on, so nothing has left yet.
            (S::Redirected, E::RedirectFailed) if !before => {
                then(S::Done, &[A::SendAbort, A::TakeBack, A::Stay(Reason::TableFull)])
            }
            // The target has started it, and may have sent something.
            (S::Redirected, E::RedirectFailed) => {
                then(S::Done, &[A::SendAbort, A::Vacate, A::Reset, A::Guest(G::Left), A::Guest(G::Lost)])
            }
            (S::Redirected, E::Handed) => S::Offloaded,
            // HOST_READY may be lost with the channel, and so may CLOSED: the target answers a repeated one, by Refuse when
            // it does not know the connection any more.
            (S::Redirected | S::Offloaded, E::PeerBack) => then(self.state, &[A::SendHostReady]),
            (S::Redirected | S::Offloaded, E::Refused(_)) => then(S::Done, &[A::Reset, A::Guest(G::Lost)]),
            // Packets that the home had sent here before it redirected them may still be under way.
            (S::Redirected | S::Offloaded, E::Closed) if guest => then(S::Released, &[A::ArmLinger]),
            (S::Released, E::LingerOver) => {
                then(S::Done, &[A::RemoveRedirect, A::SendClosedAck, A::Guest(G::Released)])
            }
            (S::Redirected | S::Offloaded, E::Closed) => {
                then(S::Done, &[A::RemoveRedirect, A::SendClosedAck])
            }
            // Who has passed it on had it.
            (S::Redirected | S::Offloaded, E::Moved(local)) if !guest => {
                then(S::Offloaded, &[A::Repoint(*local)])
            }
            (S::Redirected | S::Offloaded, E::Returned) if !guest => then(S::Done, &[A::RemoveRedirect]),
            (state, _) => state,
        };
    }
}
