//! From the detour to the direct way: a connection that has moved on gets its packets by way of the machine that it came
//! from, until its home redirects them straight to its new place.
//!
//! Runs at the new place, beside [`super::Target`]. Nothing waits for it; what it says is repeated until it is answered.

/// Where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ShortcutState {
    /// The connection came from its home: there is no detour.
    Direct,
    /// The hand-off is not confirmed: the connection may still go back.
    Waiting,
    /// `MOVED` is out.
    Telling,
    /// The home redirects the packets; `CLOSED` is out to the machine that the connection came from.
    Releasing,
    /// The detour is closed.
    Done,
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShortcutEvent {
    /// The hand-off is confirmed.
    Confirmed,
    /// The channel to the home is up again, or much time has passed.
    HomeBack,
    /// `MOVED_ACK`; or the home is here and has removed its redirect.
    MovedAck,
    /// The channel to the machine that the connection came from is up again, or much time has passed.
    ViaBack,
    /// `CLOSED_ACK` of that machine.
    Released,
    /// Who is to be told is gone.
    GiveUp,
}

/// What the driver has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShortcutAction {
    /// Send `MOVED` to the home; where the home is this machine, remove its redirect and answer with `MovedAck`.
    SendMoved,
    /// Send `CLOSED` to the machine that the connection came from, and arm the limit.
    SendClosed,
    /// Nobody uses the detour any more.
    Close,
}

/// The way of one connection's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shortcut {
    state: ShortcutState,
}

impl Shortcut {
    /// For a connection that comes from its home, or by a detour.
    #[must_use]
    pub fn new(detour: bool) -> Shortcut {
        Shortcut { state: if detour { ShortcutState::Waiting } else { ShortcutState::Direct } }
    }

    /// Where it stands.
    #[must_use]
    pub fn state(self) -> ShortcutState {
        self.state
    }

    /// Is somebody still to be told?
    #[must_use]
    pub fn is_open(self) -> bool {
        matches!(self.state, ShortcutState::Telling | ShortcutState::Releasing)
    }

    /// Takes an event; says what has to be done.
    pub fn on(&mut self, event: ShortcutEvent) -> Option<ShortcutAction> {
        use ShortcutAction as A;
        use ShortcutEvent as E;
        use ShortcutState as S;
        let (next, action) = match (self.state, event) {
            (S::Waiting, E::Confirmed) | (S::Telling, E::HomeBack) => (S::Telling, Some(A::SendMoved)),
            (S::Telling, E::MovedAck) | (S::Releasing, E::ViaBack) => (S::Releasing, Some(A::SendClosed)),
            (S::Releasing, E::Released | E::GiveUp) | (S::Telling, E::GiveUp) => (S::Done, Some(A::Close)),
            (state, _) => (state, None),
        };
        self.state = next;
        action
    }
}
