//! The target's side.

use super::GuestEvent;
use crate::reason::Reason;

/// Where a hand-off stands on the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TargetState {
    /// `BEGIN_OFFLOAD` came in; nothing is done yet.
    New,
    /// Strict order: `TARGET_READY` is out; the restored socket is in repair mode.
    Ready,
    /// The socket is live and on its way to the handler.
    Started,
    /// Early order: the handler has the socket; the host has not confirmed that it redirects the flow.
    Unconfirmed,
    /// The handler has the socket.
    Served,
    /// The connection has moved on, or gone home.
    Left,
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
    /// `ABORT`: the host has taken the connection back, or reset it.
    Abort,
    /// `QUERY`, younger than [`super::Limits::fresh`].
    Query,
    /// `Start` and the hand-over to the handler worked (or not).
    Handed(Result<(), Reason>),
    /// The time limit armed by `SendReady` or `SendClosed` ran out.
    Deadline,
    /// The time limit armed by `SendStarted` ran out.
    Fence {
        /// The client has acknowledged what was sent from here: the host does redirect its packets.
        acknowledged: bool,
    },
    /// The kernel has forgotten the connection.
    SocketGone,
    /// The channel to the host is up again.
    PeerBack,
    /// `CLOSED_ACK`.
    ClosedAck,
    /// The connection moves on from here, as a hand-off of its own.
    Guest(GuestEvent),
    /// It has come home, and the machine that it came from sends on no packets any more.
    Home,
}

/// What the target's driver has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetAction {
    /// Restore the socket in repair mode and install the source rewrite; answer with `Restored`.
    Restore,
    /// Send `TARGET_READY` and arm the time limit.
    SendReady,
    /// Send `TARGET_READY` that says "started", and arm the fence.
    SendStarted,
    /// Send `REFUSE`.
    Refuse(Reason),
    /// Leave repair mode and give the socket to the handler; answer with `Handed`.
    Start,
    /// Send `HANDED`.
    SendHanded,
    /// What was kept to take the connection away again can go.
    Keep,
    /// The connection is here, for sure; may be said again.
    Confirmed,
    /// Close the socket in repair mode (silently) and remove the source rewrite.
    Discard,
    /// Take the live socket from its handler without a packet, and remove the source rewrite.
    Withdraw,
    /// Send `CLOSED` and arm the time limit.
    SendClosed,
    /// Remove the source rewrite, when nobody is to be told anything any more.
    RemoveRewrite,
    /// Note for the next daemon that the connection has left.
    NoteLeft,
}

/// One hand-off on the target.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    state: TargetState,
    early: bool,
}

impl Target {
    /// A hand-off that the host allows to start early, and that this target is willing to; or a strict one.
    #[must_use]
    pub fn new(early: bool) -> Target {
        Target { state: TargetState::New, early }
    }

    /// A connection that a handler of this machine has had since an earlier daemon's days.
    #[must_use]
    pub fn recovered() -> Target {
        Target { state: TargetState::Served, early: false }
    }

    /// One that had moved on from here in those days; `on_its_way`: its packets still came here.
    #[must_use]
    pub fn recovered_left(on_its_way: bool) -> Target {
        let state = if on_its_way { TargetState::Left } else { TargetState::Done };
        Target { state, early: false }
    }

    /// Where the hand-off stands.
    #[must_use]
    pub fn state(&self) -> TargetState {
        self.state
    }

    /// Does it start before the host has redirected the flow?
    #[must_use]
    pub fn early(&self) -> bool {
        self.early
    }

    /// As [`super::Host::on`].
    pub fn on(&mut self, event: &TargetEvent, actions: &mut Vec<TargetAction>) {
        use GuestEvent as G;
        use TargetAction as A;
        use TargetEvent as E;
        use TargetState as S;
        let early = self.early;
        let mut then = |next: TargetState, all: &[TargetAction]| {
            actions.extend_from_slice(all);
            next
        };
        self.state = match (self.state, event) {
            (S::New, E::Begin) => then(S::New, &[A::Restore]),
            (S::New, E::Restored(Ok(()))) if early => then(S::Started, &[A::Start]),
            (S::New, E::Restored(Ok(()))) => then(S::Ready, &[A::SendReady]),
            (S::New, E::Restored(Err(r))) => then(S::Done, &[A::Refuse(*r)]),
            (S::New, E::Query) => then(S::Done, &[A::Refuse(Reason::PeerTimeout)]),
            (S::Ready, E::Begin | E::Query) => then(S::Ready, &[A::SendReady]),
            (S::Ready, E::HostReady) => then(S::Started, &[A::Start]),
            (S::Ready, E::Abort | E::Deadline) => then(S::Done, &[A::Discard]),
            (S::Started, E::Handed(Ok(()))) if early => then(S::Unconfirmed, &[A::SendStarted]),
            (S::Started, E::Handed(Ok(()))) => then(S::Served, &[A::SendHanded, A::Confirmed]),
            (S::Started, E::Handed(Err(r))) => then(S::Done, &[A::Discard, A::Refuse(*r)]),
            (S::Unconfirmed, E::Begin | E::Query) => then(S::Unconfirmed, &[A::SendStarted]),
            (S::Unconfirmed, E::HostReady) => then(S::Served, &[A::Keep, A::SendHanded, A::Confirmed]),
            (S::Unconfirmed, E::Fence { acknowledged: true }) => then(S::Served, &[A::Keep, A::Confirmed]),
            (S::Unconfirmed, E::Fence { acknowledged: false } | E::Abort) => then(S::Done, &[A::Withdraw]),
            // Confirmed again: an earlier daemon may have died with that.
            (S::Served, E::HostReady) => then(S::Served, &[A::SendHanded, A::Confirmed]),
            (S::Served, E::Query) => then(S::Served, &[A::SendStarted]),
            (S::Unconfirmed, E::SocketGone) => then(S::Closing, &[A::Keep, A::SendClosed]),
            (S::Served, E::SocketGone) | (S::Closing, E::PeerBack | E::Query | E::HostReady) => {
                then(S::Closing, &[A::SendClosed])
            }
            (S::Closing, E::ClosedAck | E::Deadline) => then(S::Done, &[A::RemoveRewrite]),
            (S::Served, E::Home) => then(S::Done, &[A::RemoveRewrite]),

            (S::Served, E::Guest(G::Left)) => then(S::Left, &[A::NoteLeft]),
            // Until then a reset would have to be sent from here.
            (S::Left, E::Guest(G::Released)) => then(S::Done, &[A::RemoveRewrite]),
            (S::Left, E::Guest(G::Lost)) => then(S::Closing, &[A::SendClosed]),
            // Whoever still asks was answered once, and the answer lost.
            (S::Left, E::HostReady) => then(S::Left, &[A::SendHanded]),
            (S::Left, E::Query) => then(S::Left, &[A::SendStarted]),
            (state, _) => state,
        };
    }
}
