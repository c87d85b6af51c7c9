//! When all replies are out: following what the server writes.

/// Digits of a length at the most.
const MAX_DIGITS: u8 = 18;
/// Most values that a reply may have left; more is an attack on somebody's arithmetic.
const MAX_VALUES: u64 = 1 << 40;

use crate::protocol::Progress;

/// Where in a value the stream stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the type of a value.
    Type,
    /// In a line that is the value.
    Line,
    /// In the length of a value of this type; the digits so far.
    Length { kind: u8, value: u64, digits: u8 },
    /// In the length -1, of which so much has been seen.
    Null(u8),
    /// In the data of a string and the line's end after it; how much is left.
    Data(u64),
    /// The server does not speak the protocol any more.
    Unknown,
}

/// Follows the replies on one connection.
#[derive(Debug)]
pub struct Replies {
    state: State,
    /// Values until the present reply, with all that is in it, is complete. Aggregates may be nested to any depth: all that
    /// matters is how many values are still to come.
    values: u64,
    /// The present value is not the reply to anything.
    push: bool,
    /// Requests that have no complete reply.
    outstanding: u32,
    /// One of them may take long.
    blocked: bool,
    /// The server has said something that nobody has asked for: it closes the connection after that.
    unasked: bool,
}

impl Default for Replies {
    fn default() -> Self {
        Replies { state: State::Type, values: 0, push: false, outstanding: 0, blocked: false, unasked: false }
    }
}

impl Replies {
    /// The server has been given so many requests; one of them may `block`.
    pub fn asked(&mut self, requests: u32, block: bool) {
        match self.outstanding.checked_add(requests) {
            Some(n) => self.outstanding = n,
            None => self.state = State::Unknown,
        }
        self.blocked |= block;
    }

    /// Where the replies stand.
    #[must_use]
    pub fn progress(&self) -> Progress {
        match self.state {
            State::Unknown => Progress::Unknown,
            _ if self.unasked => Progress::UntilClose,
            State::Type if self.outstanding == 0 && self.values == 0 => Progress::Clean,
            _ => Progress::InProgress,
        }
    }

    /// Is a command under way that may take long?
    #[must_use]
    pub fn blocked(&self) -> bool {
        self.blocked
    }

    /// The server has written these bytes.
    pub fn wrote(&mut self, mut bytes: &[u8]) {
        while let Some(&byte) = bytes.first() {
            let n = match self.state {
                State::Line => match bytes.iter().position(|b| *b == b'\n') {
                    Some(at) => {
                        self.value();
                        at + 1
                    }
                    None => return,
                },
                State::Data(left) => {
                    let n = left.min(bytes.len() as u64);
                    if n == left {
                        self.value();
                    } else {
                        self.state = State::Data(left - n);
                    }
                    n as usize
                }
                State::Unknown => return,
                State::Type => {
                    self.begin(byte);
                    1
                }
                State::Length { .. } | State::Null(_) => {
                    self.step(byte);
                    1
                }
            };
            bytes = bytes.get(n..).unwrap_or_default();
        }
    }

    /// The server has written so many bytes that cannot be looked at: data of a string.
    pub fn wrote_unseen(&mut self, n: u64) {
        self.state = match self.state {
            state if n == 0 => state,
            State::Data(left) if n < left => State::Data(left - n),
            _ => State::Unknown,
        };
    }

    fn begin(&mut self, kind: u8) {
        let first = self.values == 0;
        if first {
            self.push = kind == b'>';
            self.values = 1;
        }
        self.state = match kind {
            b'+' | b'-' | b':' | b'_' | b'#' | b',' | b'(' => State::Line,
            b'$' | b'!' | b'=' | b'*' | b'~' | b'%' | b'|' => State::Length { kind, value: 0, digits: 0 },
            // Never inside of a reply.
            b'>' if first => State::Length { kind, value: 0, digits: 0 },
            _ => State::Unknown,
        };
    }

    fn step(&mut self, byte: u8) {
        self.state = match (self.state, byte) {
            (State::Length { kind, value, digits }, b'0'..=b'9') if digits < MAX_DIGITS => {
                State::Length { kind, value: value * 10 + u64::from(byte - b'0'), digits: digits + 1 }
            }
            (State::Length { kind: b'$' | b'*', digits: 0, .. }, b'-') => State::Null(1),
            (State::Null(1), b'1') => State::Null(2),
            (State::Null(2), b'\r') => State::Null(3),
            (State::Null(3), b'\n') => return self.value(),
            // The second time is that of the line feed: the number of digits tells.
            (State::Length { kind, value, digits: 1..=MAX_DIGITS }, b'\r') => {
                State::Length { kind, value, digits: u8::MAX }
            }
            (State::Length { kind, value, digits: u8::MAX }, b'\n') => return self.length(kind, value),
            _ => State::Unknown,
        };
    }

    fn length(&mut self, kind: u8, n: u64) {
        if matches!(kind, b'$' | b'!' | b'=') {
            self.state = State::Data(n.saturating_add(2));
            return;
        }
        let values = if matches!(kind, b'%' | b'|') { n.saturating_mul(2) } else { n };
        self.values = self.values.saturating_add(values);
        if self.values > MAX_VALUES {
            self.state = State::Unknown;
        } else if kind == b'|' {
            // An attribute stands before the value that it is about.
            self.state = State::Type;
        } else {
            self.value();
        }
    }

    /// A value is complete, but for what is in it.
    fn value(&mut self) {
        self.state = State::Type;
        self.values -= 1;
        if self.values > 0 || self.push {
            return;
        }
        match self.outstanding.checked_sub(1) {
            Some(n) => self.outstanding = n,
            None => self.unasked = true,
        }
        self.blocked &= self.outstanding > 0;
    }
}
