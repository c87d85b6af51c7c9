//! What the server may read: commands that are served here, and no byte of one that is not.

use super::command::{self, Command, Parsed};
use super::session::{Session, Step};
use crate::protocol::Limit;
use crate::reason::Reason;

/// Digits of an argument's length at the most.
const MAX_DIGITS: u8 = 18;

/// Where in the stream of commands the server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Between two commands.
    Boundary,
    /// So many bytes may be read; then so many arguments of the same command follow, whose lengths have not been seen.
    Left { bytes: u64, arguments: u32 },
    /// In the line with the length of the next of so many arguments.
    Length { arguments: u32, value: u64, seen: Seen },
    /// The arguments are not what Redis understands: it answers with an error, and closes.
    Lost,
}

/// How much of a length's line has been seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Nothing,
    Digits(u8),
    Cr,
}

/// Follows what the server reads, from one look to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Requests {
    state: State,
    session: Session,
}

/// What is seen at a boundary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// Part of a command; more is needed.
    Partial,
    /// The connection is left alone from here on.
    Leave(Reason),
    /// The first command belongs elsewhere.
    Away(Command),
    /// These are served here.
    Here(Run),
}

/// Commands that the server may read in one go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Replies that it will give.
    pub replies: u32,
    /// One of them may take long.
    pub blocks: bool,
    /// Their bytes, as far as they are known.
    pub len: u64,
    /// The state after they have been allowed.
    pub next: Requests,
}

impl Default for Requests {
    fn default() -> Self {
        Requests { state: State::Boundary, session: Session::default() }
    }
}

impl Requests {
    /// Looks at the bytes after a boundary. `away` says whether a command belongs on another machine; the first one is not
    /// asked about if it `stays`. `kept` is told why commands stay that might belong elsewhere.
    pub fn look(
        &self,
        bytes: &[u8],
        stays: bool,
        mut away: impl FnMut(&Command) -> bool,
        mut kept: impl FnMut(Reason),
    ) -> Look {
        let mut run = Run { replies: 0, blocks: false, len: 0, next: *self };
        let mut rest = bytes;
        while !rest.is_empty() {
            let first = run.len == 0;
            let command = match command::parse(rest) {
                Parsed::Partial if first => return Look::Partial,
                Parsed::Refused(reason) if first => return Look::Leave(reason),
                Parsed::Partial | Parsed::Refused(_) => break,
                Parsed::Nothing(n) => {
                    run.pass(n as u64, 0);
                    rest = rest.get(n..).unwrap_or_default();
                    continue;
                }
                Parsed::Command(command) if command.step == Step::State => {
                    if first {
                        return Look::Leave(Reason::SessionState);
                    }
                    break;
                }
                Parsed::Command(command) => command,
            };
            let held = run.next.session.holds();
            match command.stays {
                Some(reason) => kept(reason),
                None if first && stays => {}
                None if !away(&command) => {}
                None if held => kept(Reason::SessionState),
                None if first => return Look::Away(command),
                None => break,
            }
            run.take(&command);
            let seen = usize::try_from(command.len).ok().and_then(|n| rest.get(n..));
            match seen {
                Some(after) if command.more == 0 => rest = after,
                _ => break,
            }
        }
        Look::Here(run)
    }

    /// Is the next byte the first of a command?
    #[must_use]
    pub fn at_boundary(&self) -> bool {
        self.state == State::Boundary
    }

    /// Has a command turned out to be none?
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.state == State::Lost
    }

    /// How far the server may read.
    #[must_use]
    pub fn allowed(&self) -> Limit {
        match self.state {
            State::Left { bytes, .. } => Limit::Bytes(bytes),
            State::Boundary | State::Length { .. } => Limit::Peek,
            State::Lost => Limit::Bytes(u64::MAX),
        }
    }

    /// How many of these bytes, the next in the socket, belong to the command. For [`Limit::Peek`] within one.
    #[must_use]
    pub fn limit(&self, peeked: &[u8]) -> usize {
        let mut ahead = *self;
        let n = ahead.follow(peeked);
        if ahead.is_lost() { peeked.len() } else { n }
    }

    /// The server has read these bytes.
    pub fn consumed(&mut self, bytes: &[u8]) {
        if self.follow(bytes) < bytes.len() {
            self.state = State::Lost;
        }
    }

    /// The server has read so many bytes, within what [`Requests::allowed`] gave.
    pub fn consumed_unseen(&mut self, n: u64) {
        self.state = match self.state {
            state if n == 0 => state,
            State::Left { bytes, arguments } if n <= bytes => after(bytes - n, arguments),
            _ => State::Lost,
        };
    }

    /// Follows `bytes`; returns how many of them belong to the command.
    fn follow(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            match self.state {
                State::Boundary | State::Lost => break,
                State::Left { bytes: left, arguments } => {
                    let n = left.min((bytes.len() - at) as u64);
                    self.state = after(left - n, arguments);
                    at += n as usize;
                }
                State::Length { arguments, value, seen } => {
                    self.state = length(arguments, value, seen, byte);
                    at += 1;
                }
            }
        }
        at
    }
}

/// So many bytes are left before so many arguments.
fn after(bytes: u64, arguments: u32) -> State {
    match (bytes, arguments) {
        (0, 0) => State::Boundary,
        (0, arguments) => State::Length { arguments, value: 0, seen: Seen::Nothing },
        (bytes, arguments) => State::Left { bytes, arguments },
    }
}

fn length(arguments: u32, value: u64, seen: Seen, byte: u8) -> State {
    match (seen, byte) {
        (Seen::Nothing, b'$') => State::Length { arguments, value, seen: Seen::Digits(0) },
        (Seen::Digits(n), b'0'..=b'9') if n < MAX_DIGITS && (n == 0 || value > 0) => {
            let value = value * 10 + u64::from(byte - b'0');
            State::Length { arguments, value, seen: Seen::Digits(n + 1) }
        }
        (Seen::Digits(1..), b'\r') => State::Length { arguments, value, seen: Seen::Cr },
        (Seen::Cr, b'\n') => after(value + 2, arguments - 1),
        _ => State::Lost,
    }
}

impl Run {
    fn take(&mut self, command: &Command) {
        self.next.session.follow(command.step);
        self.replies = self.replies.saturating_add(1);
        self.blocks |= command.blocks;
        self.pass(command.len, command.more);
    }

    fn pass(&mut self, len: u64, arguments: u32) {
        self.len = self.len.saturating_add(len);
        self.next.state = State::Left { bytes: self.len, arguments };
    }
}
