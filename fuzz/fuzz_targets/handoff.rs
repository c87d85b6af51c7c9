//! The two state machines of a hand-off, their drivers, the clock, and a channel between them that is slow and loses what
//! it likes.
//!
//! Input: a byte for the order, then each byte is something that happens. Whatever it is and in which order, the two
//! sockets are never live at the same time, each verdict is given once, nothing is done to a socket that is not there.
//! When all is quiet again, the connection is in one place, or the client has been told that it is lost.
#![no_main]

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};

use libfuzzer_sys::fuzz_target;
use xo_proto::handoff::{
    Host, HostAction, HostEvent, HostState, LIMITS, Target, TargetAction, TargetEvent, TargetState,
};
use xo_proto::reason::Reason;

/// A message that took as long is not fresh, however slow the fastest sample was.
const UNDER_WAY: u64 = (LIMITS.fresh.as_millis() + LIMITS.sample.as_millis()) as u64;
/// Each question that arrives keeps an unconfirmed connection alive for so long. So the driver must not ask when that
/// may outlast its doubt: the state machine, which has no clock, leaves this to it.
const FENCE: u64 = LIMITS.fence.as_millis() as u64;
/// The target's timers are late by so much at the most.
const LATE: u64 = 25;

/// A socket of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Socket {
    /// Not made yet.
    None,
    Live,
    /// In repair mode: it sends nothing and answers nothing.
    Quiet,
    /// Emptied in place, or closed.
    Over,
}

/// What the flow map does with the client's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    Local,
    Held,
    Redirected,
}

#[derive(Clone, Copy, Debug)]
enum ToTarget {
    Begin,
    Query,
    HostReady,
    Abort,
    ClosedAck,
}

#[derive(Clone, Copy, Debug)]
enum ToHost {
    Ready { started: bool },
    Refuse(Reason),
    Handed,
    Closed,
}

/// Both machines, as their daemons drive them.
#[derive(Debug)]
struct World {
    /// `None` once it is over: the daemons forget it.
    host: Option<Host>,
    target: Option<Target>,
    begun: bool,
    host_socket: Socket,
    target_socket: Socket,
    flow: Flow,
    rewrite: bool,
    verdicts: u32,
    starts: u32,
    reset: bool,
    /// The target stopped to wait for `CLOSED_ACK`.
    impatient: bool,
    connected: bool,
    /// With the time of sending.
    to_target: VecDeque<(u64, ToTarget)>,
    to_host: VecDeque<(u64, ToHost)>,
    /// The handler never starts early.
    exec: bool,
    /// The target has refused a hand-off that it had not seen.
    refused: bool,
    /// The client's packets have reached the target.
    redirected: bool,
    /// Milliseconds.
    now: u64,
    /// When the host asked last, when its doubt ends, when the target's fence does.
    asked: u64,
    doubt: Option<u64>,
    fence: Option<u64>,
    /// Bits that say what fails, or is otherwise unusual, next.
    coins: u32,
}

impl World {
    fn new(order: u8) -> World {
        World {
            host: Some(Host::new(order & 1 == 1)),
            target: None,
            begun: false,
            host_socket: Socket::Live,
            target_socket: Socket::None,
            flow: Flow::Local,
            rewrite: false,
            verdicts: 0,
            starts: 0,
            reset: false,
            impatient: false,
            connected: true,
            to_target: VecDeque::new(),
            to_host: VecDeque::new(),
            exec: order & 2 == 2,
            refused: false,
            redirected: false,
            now: 0,
            asked: 0,
            doubt: None,
            fence: None,
            coins: 0,
        }
    }

    fn coin(&mut self) -> bool {
        let coin = self.coins & 1 == 1;
        self.coins >>= 1;
        coin
    }

    fn works(&mut self) -> Result<(), Reason> {
        if self.coin() { Err(Reason::RestoreFailed) } else { Ok(()) }
    }

    fn host_event(&mut self, event: HostEvent) {
        let mut next = Some(event);
        while let Some(event) = next.take() {
            let Some(host) = &mut self.host else { return };
            let mut actions = Vec::new();
            host.on(&event, &mut actions);
            for action in actions {
                next = self.host_action(action);
                self.check();
                if next.is_some() {
                    break;
                }
            }
        }
        if self.host.as_ref().is_some_and(|h| h.state() == HostState::Done) {
            self.host = None;
        }
    }

    fn host_action(&mut self, action: HostAction) -> Option<HostEvent> {
        match action {
            HostAction::Hold => {
                assert_eq!(self.flow, Flow::Local);
                let result = self.works();
                if result.is_ok() {
                    self.flow = Flow::Held;
                }
                return Some(HostEvent::Held(result));
            }
            HostAction::Dump => {
                assert_eq!((self.flow, self.host_socket), (Flow::Held, Socket::Live));
                let result = self.works();
                if result.is_ok() {
                    self.host_socket = Socket::Quiet;
                }
                return Some(HostEvent::Dumped(result));
            }
            HostAction::SendBegin => {
                assert!(!self.begun, "begun twice");
                (self.begun, self.asked) = (true, self.now);
                self.tell_target(ToTarget::Begin);
            }
            HostAction::SendQuery => {
                if self.doubt.is_none_or(|end| self.now + UNDER_WAY + FENCE + 2 * LATE < end) {
                    self.asked = self.now;
                    self.tell_target(ToTarget::Query);
                }
            }
            HostAction::ArmDoubt => self.doubt = Some(self.asked + LIMITS.doubt.as_millis() as u64),
            HostAction::Redirect(_) => {
                assert_eq!((self.flow, self.host_socket), (Flow::Held, Socket::Quiet));
                if self.works().is_err() {
                    return Some(HostEvent::RedirectFailed);
                }
                (self.flow, self.redirected) = (Flow::Redirected, true);
            }
            HostAction::SendHostReady => {
                assert_eq!(self.flow, Flow::Redirected);
                self.tell_target(ToTarget::HostReady);
            }
            HostAction::Vacate => {
                assert_eq!(self.host_socket, Socket::Quiet);
                self.host_socket = Socket::Over;
                self.verdicts += 1;
            }
            HostAction::SendAbort => self.tell_target(ToTarget::Abort),
            HostAction::TakeBack => {
                assert_eq!((self.flow, self.host_socket), (Flow::Held, Socket::Quiet));
                (self.flow, self.host_socket) = (Flow::Local, Socket::Live);
            }
            HostAction::Unhold => {
                assert_eq!((self.flow, self.host_socket), (Flow::Held, Socket::Live));
                self.flow = Flow::Local;
            }
            HostAction::Stay(_) => {
                assert_eq!(
                    (self.flow, self.host_socket),
                    (Flow::Local, Socket::Live),
                    "stays, but not as it was"
                );
                self.verdicts += 1;
            }
            HostAction::Reset => {
                assert!(self.flow != Flow::Local && self.host_socket == Socket::Over);
                (self.flow, self.reset) = (Flow::Local, true);
            }
            HostAction::RemoveRedirect => {
                assert!(self.flow != Flow::Local && self.host_socket == Socket::Over);
                self.flow = Flow::Local;
            }
            HostAction::SendClosedAck => self.tell_target(ToTarget::ClosedAck),
        }
        None
    }

    fn target_event(&mut self, event: TargetEvent) {
        let mut next = Some(event);
        while let Some(event) = next.take() {
            let Some(target) = &mut self.target else { return };
            let mut actions = Vec::new();
            target.on(&event, &mut actions);
            for action in actions {
                next = self.target_action(action);
                self.check();
                if next.is_some() {
                    break;
                }
            }
        }
        if self.target.as_ref().is_some_and(|t| t.state() == TargetState::Done) {
            self.target = None;
        }
    }

    fn target_action(&mut self, action: TargetAction) -> Option<TargetEvent> {
        match action {
            TargetAction::Restore => {
                assert_eq!(self.target_socket, Socket::None);
                let result = self.works();
                if result.is_ok() {
                    (self.target_socket, self.rewrite) = (Socket::Quiet, true);
                }
                return Some(TargetEvent::Restored(result));
            }
            TargetAction::SendReady => {
                assert_eq!(self.target_socket, Socket::Quiet);
                self.tell_host(ToHost::Ready { started: false });
            }
            TargetAction::SendStarted => {
                self.fence = Some(self.now + FENCE);
                self.tell_host(ToHost::Ready { started: true });
            }
            TargetAction::Keep => assert_ne!(self.target_socket, Socket::Quiet),
            TargetAction::Withdraw => {
                assert_eq!((self.target_socket, self.rewrite), (Socket::Live, true));
                (self.target_socket, self.rewrite) = (Socket::Over, false);
            }
            TargetAction::Refuse(reason) => self.tell_host(ToHost::Refuse(reason)),
            TargetAction::Start => {
                assert_eq!(self.target_socket, Socket::Quiet, "a zombie");
                self.starts += 1;
                let result = self.works();
                if result.is_ok() {
                    self.target_socket = Socket::Live;
                }
                return Some(TargetEvent::Handed(result));
            }
            TargetAction::SendHanded => self.tell_host(ToHost::Handed),
            TargetAction::Discard => {
                assert_eq!((self.target_socket, self.rewrite), (Socket::Quiet, true));
                (self.target_socket, self.rewrite) = (Socket::Over, false);
            }
            TargetAction::SendClosed => {
                assert_eq!(self.target_socket, Socket::Over, "closed, but open");
                self.tell_host(ToHost::Closed);
            }
            TargetAction::RemoveRewrite => {
                assert!(self.rewrite);
                self.rewrite = false;
            }
        }
        None
    }

    fn tell_target(&mut self, message: ToTarget) {
        if self.connected {
            self.to_target.push_back((self.now, message));
        }
    }

    fn tell_host(&mut self, message: ToHost) {
        if self.connected {
            self.to_host.push_back((self.now, message));
        }
    }

    fn deliver_to_target(&mut self) {
        let Some((sent, message)) = self.to_target.pop_front() else { return };
        let fresh = self.now - sent < UNDER_WAY;
        match message {
            ToTarget::Begin if self.refused => {}
            ToTarget::Begin => {
                let early = self.host.as_ref().is_some_and(Host::early) && fresh && !self.exec;
                self.target.get_or_insert_with(|| Target::new(early));
                self.target_event(TargetEvent::Begin);
            }
            ToTarget::Query if self.target.is_none() => {
                self.refused = true;
                self.tell_host(ToHost::Refuse(Reason::PeerTimeout));
            }
            ToTarget::Query if !fresh => {}
            ToTarget::Query => self.target_event(TargetEvent::Query),
            ToTarget::HostReady if self.target.is_none() => self.tell_host(ToHost::Refuse(Reason::PeerLost)),
            ToTarget::HostReady => self.target_event(TargetEvent::HostReady),
            ToTarget::Abort => self.target_event(TargetEvent::Abort),
            ToTarget::ClosedAck => self.target_event(TargetEvent::ClosedAck),
        }
    }

    fn deliver_to_host(&mut self) {
        let Some((_, message)) = self.to_host.pop_front() else { return };
        match message {
            ToHost::Ready { .. } if self.host.is_none() => self.tell_target(ToTarget::Abort),
            ToHost::Ready { started } => {
                let local = SocketAddr::from((Ipv4Addr::LOCALHOST, 80));
                let timely = self.now - self.asked < LIMITS.answer.as_millis() as u64;
                self.host_event(HostEvent::TargetReady { local, started, timely });
            }
            ToHost::Refuse(reason) => self.host_event(HostEvent::Refused(reason)),
            ToHost::Handed => self.host_event(HostEvent::Handed),
            ToHost::Closed if self.host.is_none() => self.tell_target(ToTarget::ClosedAck),
            ToHost::Closed => self.host_event(HostEvent::Closed),
        }
    }

    /// Time goes on; the target's fence falls when it is due.
    fn wait(&mut self, ms: u64) {
        let end = self.now + ms;
        while self.now < end {
            self.now = end.min(self.now + LATE);
            if self.fence.is_some_and(|due| due <= self.now) {
                self.fence = None;
                // Without the redirect nothing that the client sends reaches the target.
                let acknowledged = self.redirected && self.coin();
                self.target_event(TargetEvent::Fence { acknowledged });
            }
            self.check();
        }
    }

    /// The host may come to it later than it is due.
    fn doubt_over(&mut self) {
        if self.doubt.is_some_and(|due| due <= self.now) {
            self.doubt = None;
            let served = self.target_socket == Socket::Live && self.coin();
            self.host_event(HostEvent::DoubtOver { served });
        }
    }

    fn host_state(&self) -> HostState {
        self.host.as_ref().map_or(HostState::Done, Host::state)
    }

    fn target_state(&self) -> Option<TargetState> {
        self.target.as_ref().map(Target::state)
    }

    fn connect(&mut self) {
        if !self.connected {
            self.connected = true;
            if matches!(self.host_state(), HostState::Redirected | HostState::Doubt) {
                self.host_event(HostEvent::PeerBack);
            }
            if self.target_state() == Some(TargetState::Closing) {
                self.target_event(TargetEvent::PeerBack);
            }
        }
    }

    fn disconnect(&mut self) {
        if self.connected {
            self.connected = false;
            self.to_target.clear();
            self.to_host.clear();
            self.host_event(HostEvent::PeerLost);
        }
    }

    /// The server at the target closes, and the kernel forgets the connection.
    fn socket_gone(&mut self) {
        if self.target_socket == Socket::Live {
            self.target_socket = Socket::Over;
            self.target_event(TargetEvent::SocketGone);
        }
    }

    fn target_deadline(&mut self) {
        match self.target_state() {
            Some(TargetState::Closing) => self.impatient = true,
            Some(TargetState::Ready) => {}
            _ => return,
        }
        self.target_event(TargetEvent::Deadline);
    }

    fn happen(&mut self, what: u8) {
        match what & 15 {
            0 => self.host_event(HostEvent::Start),
            1 => self.host_event(HostEvent::Hopeless(Reason::PeerUnreachable)),
            2 | 3 => self.deliver_to_target(),
            4 | 5 => self.deliver_to_host(),
            6 => self.wait(u64::from(what >> 4)),
            7 => self.wait(u64::from(what >> 4) * 40),
            8 => self.host_event(HostEvent::Deadline),
            9 => self.target_deadline(),
            10 => self.disconnect(),
            11 => self.connect(),
            12 => self.socket_gone(),
            13 => self.coins = u32::from(what >> 4),
            14 => self.doubt_over(),
            // Repeated, or from a peer that is confused.
            _ => match what >> 4 {
                0 if self.flow == Flow::Redirected => self.tell_target(ToTarget::HostReady),
                1 if self.target_state() == Some(TargetState::Served) => self.tell_host(ToHost::Handed),
                2 => self.target_event(TargetEvent::PeerBack),
                3 if self.target_state() != Some(TargetState::Closing) => {
                    self.target_event(TargetEvent::ClosedAck);
                }
                4 => self.target_event(TargetEvent::Abort),
                // The host never repeats it; in the early order it would keep the connection alive.
                5 if self.target_state() == Some(TargetState::Ready) => {
                    self.target_event(TargetEvent::Begin);
                }
                _ => {}
            },
        }
    }

    /// What holds after every single action.
    fn check(&self) {
        let live = |s| s == Socket::Live;
        assert!(!(live(self.host_socket) && live(self.target_socket)), "two ends: {self:?}");
        assert!(self.verdicts <= 1 && self.starts <= 1, "twice: {self:?}");
        let early = self.target.as_ref().is_some_and(Target::early);
        assert!(!live(self.target_socket) || self.flow != Flow::Held || early, "before the flip: {self:?}");
    }

    /// Nothing more happens but what must.
    fn settle(&mut self) {
        self.coins = 0;
        self.connect();
        for _ in 0..4 {
            while !self.to_target.is_empty() || !self.to_host.is_empty() {
                self.deliver_to_target();
                self.deliver_to_host();
            }
            if self.host_state() == HostState::Begun {
                self.host_event(HostEvent::Deadline);
            }
            if self.target_state() == Some(TargetState::Ready) && self.host_state() != HostState::Redirected {
                self.target_event(TargetEvent::Deadline);
            }
            self.wait(1000);
            self.doubt_over();
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((order, events)) = data.split_first() else { return };
    let mut world = World::new(*order);
    for what in events {
        world.happen(*what);
        world.check();
    }
    world.settle();
    let in_one_place = match (world.host_socket, world.target_socket) {
        (Socket::Live, Socket::None | Socket::Over) => world.flow == Flow::Local,
        (Socket::Over, Socket::Live) => world.flow == Flow::Redirected && world.rewrite,
        // The client closed there, or was told.
        (Socket::Over, Socket::None | Socket::Over) => world.starts == 1 || world.reset,
        _ => false,
    };
    assert!(in_one_place, "{world:?}");
    world.socket_gone();
    world.settle();
    // The host is not told of the end when the target has given up telling it.
    let told = world.host_state() != HostState::Offloaded || world.impatient;
    let over = matches!(world.host_state(), HostState::Asked | HostState::Done | HostState::Offloaded);
    assert!(told && over && world.target.is_none() && !world.rewrite, "{world:?}");
});
