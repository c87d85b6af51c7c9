//! Commands as clients send them: arrays of bulk strings, or lines.

use super::commands::{self, Effect, Keys};
use super::session::Step;
use super::slot::key_slot;
use crate::reason::Reason;

/// So much of a command is looked at, bytes: keys beyond are not.
pub const MAX_HEAD: usize = 16 << 10;
/// Most arguments; Redis has no lower limit for clients that it trusts.
const MAX_ARGUMENTS: u64 = 1 << 30;
/// `*` or `$`, so many digits at the most, CR, LF.
const MAX_DIGITS: usize = 18;

/// A command, as far as it decides where it is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// The slot of its keys; `None` without keys.
    pub slot: Option<u16>,
    /// It is served where the connection is, because of what it is.
    pub stays: Option<Reason>,
    /// Its answer may take long.
    pub blocks: bool,
    pub(super) step: Step,
    /// Its bytes up to the last argument whose length is known.
    pub(super) len: u64,
    /// Arguments after that.
    pub(super) more: u32,
}

/// What the bytes after a boundary are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Parsed {
    /// So far a command; more is needed.
    Partial,
    /// So many bytes to which the server does not answer.
    Nothing(usize),
    /// Not for us: the connection is left alone.
    Refused(Reason),
    /// A command of which enough is there.
    Command(Command),
}

/// Looks at the first bytes after a boundary.
pub(super) fn parse(bytes: &[u8]) -> Parsed {
    match bytes.first() {
        None => Parsed::Partial,
        Some(b'*') => match header(bytes, b'*') {
            Header::Partial => Parsed::Partial,
            Header::Bad => null_array(bytes),
            Header::Number(0, at) => Parsed::Nothing(at),
            Header::Number(n, _) if n > MAX_ARGUMENTS => Parsed::Refused(Reason::NotRedis),
            Header::Number(n, at) => Arguments { bytes, at, left: n as u32 }.command(n as u32),
        },
        Some(_) => line(bytes),
    }
}

enum Header {
    Partial,
    Bad,
    /// The number, and where what comes after the line begins.
    Number(u64, usize),
}

/// `*` or `$`, a number as Redis takes it, CRLF.
fn header(bytes: &[u8], sign: u8) -> Header {
    let Some((first, rest)) = bytes.split_first() else { return Header::Partial };
    if *first != sign {
        return Header::Bad;
    }
    let (mut digits, mut number) = (0, 0_u64);
    while let Some(digit) = rest.get(digits).map(|b| b.wrapping_sub(b'0')).filter(|d| *d < 10)
        && digits <= MAX_DIGITS
    {
        number = number * 10 + u64::from(digit);
        digits += 1;
    }
    let leads_with_zero = digits > 1 && rest.first() == Some(&b'0');
    if digits > MAX_DIGITS || leads_with_zero {
        return Header::Bad;
    }
    match (rest.get(digits), rest.get(digits + 1)) {
        (None, _) => Header::Partial,
        (Some(b'\r'), _) if digits == 0 => Header::Bad,
        (Some(b'\r'), None) => Header::Partial,
        (Some(b'\r'), Some(b'\n')) => Header::Number(number, digits + 3),
        _ => Header::Bad,
    }
}

/// Redis passes over an array of length -1 as over an empty one.
fn null_array(bytes: &[u8]) -> Parsed {
    const NULL: &[u8] = b"*-1\r\n";
    match bytes.get(..NULL.len()) {
        Some(begin) if begin == NULL => Parsed::Nothing(NULL.len()),
        None if NULL.starts_with(bytes) => Parsed::Partial,
        _ => Parsed::Refused(Reason::NotRedis),
    }
}

/// An argument, as far as it is there.
enum Argument<'b> {
    Whole(&'b [u8]),
    /// Its end is known, and beyond what is there.
    Cut,
    /// Not even its length is there.
    Unknown,
    Bad,
}

struct Arguments<'b> {
    bytes: &'b [u8],
    /// After the last argument whose length is known; beyond `bytes` if it is cut.
    at: usize,
    left: u32,
}

impl<'b> Arguments<'b> {
    fn next(&mut self) -> Argument<'b> {
        let Some(rest) = self.bytes.get(self.at..) else { return Argument::Unknown };
        match header(rest, b'$') {
            Header::Partial => Argument::Unknown,
            Header::Bad => Argument::Bad,
            Header::Number(len, begin) => {
                let start = self.at + begin;
                let end = start.saturating_add(len as usize);
                self.at = end.saturating_add(2);
                self.left -= 1;
                // What stands in the place of the CRLF after it does not matter to Redis.
                match self.bytes.get(start..end) {
                    Some(argument) if self.at <= self.bytes.len() => Argument::Whole(argument),
                    _ => Argument::Cut,
                }
            }
        }
    }

    /// May more bytes tell more about this command? Not if what is missing lies beyond what is looked at.
    fn may_tell_more(&self) -> bool {
        self.bytes.len() < MAX_HEAD && self.at < MAX_HEAD
    }

    fn command(mut self, count: u32) -> Parsed {
        let name = match self.next() {
            Argument::Whole(name) => name,
            Argument::Bad => return Parsed::Refused(Reason::NotRedis),
            Argument::Cut | Argument::Unknown if self.may_tell_more() => return Parsed::Partial,
            Argument::Cut | Argument::Unknown => return Parsed::Refused(Reason::UnknownCommand),
        };
        let Some((keys, effect)) = commands::find(name) else {
            return Parsed::Refused(Reason::UnknownCommand);
        };
        let mut search = Search::new(keys, effect, count);
        let mut first: &[u8] = b"";
        while self.left > 0 {
            let number = count - self.left;
            match self.next() {
                Argument::Whole(argument) => {
                    if number == 1 {
                        first = argument;
                    }
                    search.argument(number, argument);
                }
                Argument::Bad => return Parsed::Refused(Reason::NotRedis),
                Argument::Cut | Argument::Unknown if search.wants(number) && self.may_tell_more() => {
                    return Parsed::Partial;
                }
                Argument::Cut => search.missed(number),
                Argument::Unknown => {
                    search.missed(number);
                    break;
                }
            }
        }
        Parsed::Command(Command {
            slot: search.slot,
            stays: search.stays(),
            blocks: effect == Effect::Blocks,
            step: Step::of(effect, count, first),
            len: self.at as u64,
            more: self.left,
        })
    }
}

/// Looks for the keys among the arguments.
struct Search {
    keys: Keys,
    script: bool,
    count: u32,
    /// Keys stand in this range (the end not included), every `step`th argument; beyond `CLOSE_ENOUGH` the range is not known yet.
    first: u32,
    end: u32,
    step: u32,
    /// The argument before this one says that this one is a key.
    store: bool,
    slot: Option<u16>,
    cross: bool,
    missed: bool,
}

impl Search {
    fn new(keys: Keys, effect: Effect, count: u32) -> Search {
        let (first, end, step) = match keys {
            Keys::Range { first, last, step } => {
                let end =
                    if last < 0 { count.saturating_sub(last.unsigned_abs() - 1) } else { last as u32 + 1 };
                (first, end.min(count), step)
            }
            // The subcommand, or the number of the database.
            Keys::None if matches!(effect, Effect::Client | Effect::Hello | Effect::Select) => (2, 2, 1),
            Keys::None => (1, 1, 1),
            Keys::Store => (1, count, 1),
            // Not known before the argument that tells it.
            Keys::Counted { .. } | Keys::Streams => (count, count, 1),
        };
        let script = effect == Effect::Script;
        Search {
            keys,
            script,
            count,
            first,
            end,
            step,
            store: false,
            slot: None,
            cross: false,
            missed: false,
        }
    }

    /// Is there anything to be learnt from this argument or one after it?
    fn wants(&self, number: u32) -> bool {
        number < self.end
    }

    /// It cannot be seen.
    fn missed(&mut self, number: u32) {
        self.missed |= self.wants(number);
    }

    fn argument(&mut self, number: u32, argument: &[u8]) {
        if number >= self.end {
            return;
        }
        match self.keys {
            Keys::None => {}
            Keys::Range { .. } => self.in_range(number, argument),
            Keys::Counted { also, .. } if number == also => self.key(argument),
            Keys::Counted { at, .. } if number == at => {
                let keys = number_of_keys(argument);
                (self.first, self.end) = (at + 1, self.count.min((at + 1).saturating_add(keys)));
            }
            Keys::Counted { at, .. } if number < at => {}
            Keys::Streams if self.first == self.count => {
                if argument.eq_ignore_ascii_case(b"STREAMS") {
                    let rest = self.count - number - 1;
                    (self.first, self.end) = (number + 1, number + 1 + rest / 2);
                }
            }
            Keys::Counted { .. } | Keys::Streams => self.in_range(number, argument),
            Keys::Store => {
                if number == 1 || self.store {
                    self.key(argument);
                }
                let says_so =
                    argument.eq_ignore_ascii_case(b"STORE") || argument.eq_ignore_ascii_case(b"STOREDIST");
                self.store = number > 1 && !self.store && says_so;
            }
        }
    }

    fn in_range(&mut self, number: u32, argument: &[u8]) {
        if number >= self.first && (number - self.first).is_multiple_of(self.step) {
            self.key(argument);
        }
    }

    fn key(&mut self, key: &[u8]) {
        let slot = key_slot(key);
        self.cross |= self.slot.is_some_and(|s| s != slot);
        self.slot = Some(slot);
    }

    fn stays(&self) -> Option<Reason> {
        if self.script {
            Some(Reason::Script)
        } else if self.cross {
            Some(Reason::CrossSlot)
        } else if self.missed && self.slot.is_none() && self.keys != Keys::None {
            // The first key alone is too long to be seen.
            Some(Reason::HeadTooLong)
        } else {
            None
        }
    }
}

/// What the server refuses has no keys.
fn number_of_keys(argument: &[u8]) -> u32 {
    let text = std::str::from_utf8(argument).unwrap_or_default();
    text.parse().unwrap_or(0)
}

/// A command in a line, for people at a terminal.
fn line(bytes: &[u8]) -> Parsed {
    let window = bytes.get(..MAX_HEAD).unwrap_or(bytes);
    let Some(end) = window.iter().position(|b| *b == b'\n') else {
        let binary = window.iter().any(|b| b.is_ascii_control() && *b != b'\r' && *b != b'\t');
        return match (binary, bytes.len() < MAX_HEAD) {
            (true, _) => Parsed::Refused(Reason::NotRedis),
            (false, true) => Parsed::Partial,
            (false, false) => Parsed::Refused(Reason::HeadTooLong),
        };
    };
    let text = window.get(..end).unwrap_or_default();
    let text = text.strip_suffix(b"\r").unwrap_or(text);
    if text.iter().any(|b| b.is_ascii_control() && *b != b'\t') {
        return Parsed::Refused(Reason::NotRedis);
    }
    let words = || text.split(|b| matches!(b, b' ' | b'\t')).filter(|w| !w.is_empty());
    let Some(name) = words().next() else { return Parsed::Nothing(end + 1) };
    let quoted = text.iter().any(|b| matches!(b, b'"' | b'\'' | b'\\'));
    let Some((keys, effect)) = commands::find(name).filter(|_| !quoted) else {
        return Parsed::Refused(Reason::UnknownCommand);
    };
    let count = words().count() as u32;
    let mut search = Search::new(keys, effect, count);
    words().zip(0..).skip(1).for_each(|(word, number)| search.argument(number, word));
    Parsed::Command(Command {
        slot: search.slot,
        stays: search.stays(),
        blocks: effect == Effect::Blocks,
        step: Step::of(effect, count, words().nth(1).unwrap_or_default()),
        len: end as u64 + 1,
        more: 0,
    })
}
