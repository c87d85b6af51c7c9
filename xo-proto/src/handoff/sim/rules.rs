//! What the world is like.

use std::time::Duration;

use super::super::{LIMITS, Limits};

/// Time, in units of [`Rules::tick`].
pub type Ticks = u16;

/// Limits of machines and drivers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// How finely time is divided.
    pub tick: Duration,
    /// Those that both ends must agree on.
    pub limits: Limits,
    /// How long the host waits for an answer (`limits.timeout_ms`).
    pub timeout: Duration,
    /// How much later than due the target's fence may fall.
    pub late: Duration,
    /// How long a restored socket waits for `HOST_READY`.
    pub ready: Duration,
    /// How long a finished connection waits for `CLOSED_ACK`.
    pub closed: Duration,
    /// How long a target that serves, but whose daemon is away, is waited for.
    pub restart: Duration,
    /// How long a machine sends packets on after the home redirects them past it.
    pub linger: Duration,
    /// How long a packet may be under way from one machine to the next.
    pub flight: Duration,
    /// Pause before a lost channel is dialled again.
    pub redial: Duration,
    /// Most `QUERY`s about one hand-off.
    pub questions: u8,
    /// The kernel silences an unconfirmed connection when its fence falls, whether or not the daemon lives.
    pub kernel_fence: bool,
    /// Something that the drivers do wrong.
    pub flaw: Option<Flaw>,
    /// A known gap that is looked into.
    pub gap: Option<Gap>,
}

/// What can go wrong as things are; docs/PROTOCOL.md says how. Left out unless named in [`Rules::gap`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Gap {
    /// A target's daemon dies while a connection of its is not confirmed: nobody takes it away any more.
    DiesUnconfirmed,
    /// A target's daemon dies between passing a connection on and bringing it to life, and the next one runs before the
    /// handler has closed it.
    SlowHandler,
}

impl std::hash::Hash for Rules {
    // The same in all states of a run.
    fn hash<H: std::hash::Hasher>(&self, _: &mut H) {}
}

/// Ways to drive the machines wrongly; each is found out by the checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Flaw {
    /// The target starts early whatever the age of `BEGIN_OFFLOAD`.
    StartsStale,
    /// The target lets old questions keep a connection alive.
    BelievesOldQuestions,
    /// The target begins what it has refused.
    ForgetsRefusals,
    /// The target never takes an unconfirmed connection away.
    NoFence,
    /// A message's age is compared only with what came by the same channel.
    SamplesByChannel,
    /// The library takes a socket out of repair mode when its daemon dies.
    ResumesAlone,
    /// The host takes a connection back though the client has acknowledged bytes of the target.
    IgnoresAcknowledgements,
    /// A restarted host settles a hand-off before its library has shown the socket.
    SettlesUnseen,
    /// A restarted host takes back what an earlier one had begun to send to the target.
    ForgetsCommitment,
    /// The host does not ask again after a channel broke.
    NeverRepeats,
    /// Held packets are forgotten.
    ForgetsHeld,
    /// The target forgets the rewrite of what it discards.
    LeavesRewrite,
    /// A new place tells the home before it has the connection.
    TellsTooEarly,
    /// The home does not say that it redirects a connection to its new place.
    NeverAcknowledgesMoves,
    /// The home takes an older move for a newer one.
    FollowsOldMoves,
    /// A machine that a connection has left does not note that.
    ForgetsThatItLeft,
    /// A machine whose detour was given up is not told when it asks.
    GivesDetoursUp,
    /// The home notes that a connection is back before it has removed its redirect.
    NotesHomeFirst,
    /// A machine answers a question about a later visit of a connection by what it knows of an earlier one.
    AnswersOfOldVisits,
}

/// How a handler takes connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HandlerMode {
    /// The socket is passed to a process that runs already.
    Attach,
    /// A process is started; never early.
    Exec,
}

/// The size of a world, and its rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Setup {
    /// Limits.
    pub rules: Rules,
    /// The hosts begin in the early order where they may.
    pub early: bool,
    /// The targets' handlers.
    pub handler: HandlerMode,
    /// Machines that accept connections; they are the first nodes.
    pub hosts: usize,
    /// Machines that connections are moved to.
    pub targets: usize,
    /// Connections of each host.
    pub conns_per_host: usize,
    /// How often a connection may be handed off.
    pub asks: u8,
    /// How much a client sends in the middle of it all.
    pub packets: u8,
    /// Connections move on from targets, to other targets and home.
    pub guests: bool,
    /// Packets of clients take their time from machine to machine.
    pub slow_packets: bool,
    /// Daemons that can connect do, and greet and probe each other in no time: so much less can happen meanwhile.
    pub swift: bool,
    /// How often something may go wrong.
    pub faults: u8,
}

impl Rules {
    /// The limits in force, time in ticks of this length.
    #[must_use]
    pub fn real(tick: Duration) -> Rules {
        Rules {
            tick,
            limits: LIMITS,
            timeout: Duration::from_millis(100),
            late: Duration::from_millis(50),
            ready: Duration::from_secs(2),
            closed: Duration::from_secs(60),
            restart: Duration::from_secs(5),
            linger: Duration::from_secs(1),
            flight: Duration::from_millis(300),
            redial: Duration::from_millis(100),
            questions: 5,
            kernel_fence: false,
            flaw: None,
            gap: None,
        }
    }

    pub(crate) fn ticks(&self, time: Duration) -> Ticks {
        Ticks::try_from(time.as_millis() / self.tick.as_millis()).unwrap_or(Ticks::MAX)
    }

    /// The age of a message that counts as fresh, at the most.
    pub(crate) fn under_way(&self) -> Ticks {
        self.ticks(self.limits.fresh + self.limits.sample)
    }

    /// Ages beyond this are all the same.
    pub(crate) fn old(&self) -> Ticks {
        self.ticks(self.limits.doubt.max(self.limits.answer).max(self.restart)) + 1
    }

    /// So are ages of messages beyond this.
    pub(crate) fn stale(&self) -> Ticks {
        self.ticks(self.limits.fence.max(self.limits.fresh + self.limits.sample))
    }

    /// When no timer is due within this, time leaps.
    pub(crate) fn long(&self) -> Ticks {
        self.ticks(self.limits.doubt) + 4
    }
}
