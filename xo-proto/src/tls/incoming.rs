//! The receiving half of a record layer, without I/O: records stay in the queue that they came by until the content of each
//! has been used up, so that at any moment the queue and a [`Direction`] are all that another machine needs. The exception is a
//! record that the queue has no room for ([`Incoming::take`]).

use std::collections::VecDeque;

use zeroize::Zeroize;

use super::record::{Content, HEADER, Header, Opener};
use super::{Direction, Sealer, Suite, TlsError, Version};

/// Descriptions of alerts (RFC 8446, 6; RFC 5246, 7.2).
pub mod alert {
    /// The sender will send nothing more.
    pub const CLOSE_NOTIFY: u8 = 0;
    /// A message that does not belong here.
    pub const UNEXPECTED_MESSAGE: u8 = 10;
    /// A record that cannot be decrypted.
    pub const BAD_RECORD_MAC: u8 = 20;
    /// A message that cannot be parsed.
    pub const DECODE_ERROR: u8 = 50;
    /// A user of the sender has broken off: `close_notify` follows.
    pub const USER_CANCELED: u8 = 90;
    /// TLS 1.2: there will be no second handshake.
    pub const NO_RENEGOTIATION: u8 = 100;
}

/// Most requests fit: a buffer of this size is kept, bytes.
pub(super) const KEPT: usize = 1024;
/// KeyUpdate, with its length, before the byte that says whether an answer is asked for (RFC 8446, 4.6.3).
const KEY_UPDATE: [u8; 4] = [24, 0, 0, 1];

/// A record that carries no data, or none for the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// Nothing is to be done about it.
    Nothing,
    /// The client goes on with its next key; if `answer`, it wants the server to do the same.
    KeyUpdate {
        /// `update_requested`.
        answer: bool,
    },
    /// TLS 1.2: the client wants a second handshake.
    Renegotiation,
    /// `close_notify`: nothing follows.
    Close,
    /// The client has given the connection up.
    Alert,
}

#[derive(Clone, Copy)]
enum Kind {
    Data,
    Control(Control),
}

struct Record {
    /// Its length in the queue, bytes.
    wire: usize,
    /// Its data that has not been used up, bytes.
    plain: usize,
    kind: Kind,
    /// Its beginning is not in the queue any more.
    split: bool,
}

/// What has been opened of one direction.
pub struct Incoming {
    suite: Suite,
    opener: Opener,
    /// Where the direction stands at the front of the queue.
    front: Direction,
    records: VecDeque<Record>,
    /// Length of these records in the queue, bytes.
    wire: usize,
    /// How much of the first one's data has been used up, bytes.
    used: usize,
    plain: Vec<u8>,
    /// Before this, `plain` has been used up.
    from: usize,
    /// So much has to be in the queue for another record to be complete.
    need: usize,
    /// The beginning of the next record, taken from the queue.
    ahead: Vec<u8>,
    /// Nothing is opened any more: the connection has been closed by its client, or (with an alert to be sent) cannot go on.
    end: Option<Option<u8>>,
}

impl Incoming {
    /// From where the direction stands.
    #[must_use]
    pub fn new(suite: Suite, state: Direction) -> Incoming {
        let opener = Opener::new(suite, state.clone());
        Incoming {
            suite,
            opener,
            front: state,
            records: VecDeque::new(),
            wire: 0,
            used: 0,
            plain: Vec::new(),
            from: 0,
            need: HEADER,
            ahead: Vec::new(),
            end: None,
        }
    }

    /// Where the direction stands at the front of the queue, and how many bytes of the data of the record there have been
    /// used up: see [`super::TlsState::shorten`]. `None` while a part of that record is not in the queue.
    #[must_use]
    pub fn state(&self) -> Option<(Direction, usize)> {
        let split = !self.ahead.is_empty() || self.records.front().is_some_and(|r| r.split);
        (!split).then(|| (self.front.clone(), self.used))
    }

    /// Is a record's beginning kept here?
    #[must_use]
    pub fn has_taken(&self) -> bool {
        !self.ahead.is_empty()
    }

    /// Takes the queue, which is the beginning of one record and has no room for the rest of it: it is to be dropped. Only when
    /// no opened record is in the queue.
    pub fn take(&mut self, queue: &[u8]) {
        debug_assert!(self.records.is_empty(), "what was opened comes first");
        self.ahead.extend_from_slice(queue);
        self.need = self.need.saturating_sub(queue.len()).max(1);
    }

    /// Data that is there.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        self.plain.get(self.from..).unwrap_or_default()
    }

    /// Length of the opened records, bytes: what follows in the queue has not been opened.
    #[must_use]
    pub fn opened(&self) -> usize {
        self.wire
    }

    /// How long the queue must be for another record to be complete, as far as is known, bytes.
    #[must_use]
    pub fn need(&self) -> usize {
        self.need
    }

    /// Nothing more will be opened. With what alert the client is to be told, if it is not its own doing.
    #[must_use]
    pub fn end(&self) -> Option<Option<u8>> {
        self.end
    }

    /// Opens the complete records of `queue`, the socket's from its front on, that have not been opened yet, but no more of them
    /// once `enough` bytes of data are there. The queue's bytes are overwritten.
    pub fn open(&mut self, queue: &mut [u8], enough: usize) {
        if !self.ahead.is_empty() && self.end.is_none() {
            self.open_split(queue);
            if !self.ahead.is_empty() {
                return;
            }
        }
        while self.end.is_none() && self.data().len() < enough {
            let rest = queue.get_mut(self.wire..).unwrap_or_default();
            let Some(header) = Header::parse(rest) else {
                self.need = self.wire + HEADER;
                if rest.len() >= HEADER {
                    self.end = Some(Some(alert::DECODE_ERROR));
                }
                return;
            };
            self.need = self.wire + header.total();
            let Some(record) = rest.get_mut(..header.total()) else { return };
            match self.record(record, header.total()) {
                Ok(()) => {
                    self.wire += header.total();
                    self.need = self.wire + HEADER;
                }
                Err(alert) => self.end = Some(Some(alert)),
            }
        }
    }

    /// The record whose beginning was taken.
    fn open_split(&mut self, queue: &[u8]) {
        let mut record = self.ahead.clone();
        record.extend_from_slice(queue);
        let Some(header) = Header::parse(&record) else {
            self.need = HEADER.saturating_sub(self.ahead.len()).max(1);
            if record.len() >= HEADER {
                self.end = Some(Some(alert::DECODE_ERROR));
            }
            return;
        };
        let missing = header.total().saturating_sub(self.ahead.len());
        self.need = missing;
        let Some(record) = record.get_mut(..header.total()) else { return };
        match self.record(record, missing) {
            Ok(()) => {
                self.ahead = Vec::new();
                self.wire = missing;
                self.need = missing + HEADER;
            }
            Err(alert) => self.end = Some(Some(alert)),
        }
    }

    /// A record of which `wire` bytes are in the queue.
    fn record(&mut self, record: &mut [u8], wire: usize) -> Result<(), u8> {
        let split = wire < record.len();
        let opened = self.opener.open(record).map_err(|e| match e {
            TlsError::Decrypt => alert::BAD_RECORD_MAC,
            _ => alert::UNEXPECTED_MESSAGE,
        })?;
        let (kind, plain) = match opened.content {
            Content::Data if opened.data.is_empty() => (Kind::Control(Control::Nothing), 0),
            Content::Data => (Kind::Data, opened.data.len()),
            content => (Kind::Control(control(self.suite.version(), content, opened.data)?), 0),
        };
        if plain > 0 {
            if self.from == self.plain.len() {
                self.forget();
            }
            self.plain.extend_from_slice(opened.data);
            opened.data.zeroize();
        }
        match kind {
            Kind::Control(Control::KeyUpdate { .. }) => {
                self.opener.update().map_err(|_| alert::UNEXPECTED_MESSAGE)?;
            }
            Kind::Control(Control::Close | Control::Alert) => self.end = Some(None),
            _ => {}
        }
        self.records.push_back(Record { wire, plain, kind, split });
        Ok(())
    }

    /// The record at the front, if it is not data: it is to be done, and then [`Incoming::done`].
    #[must_use]
    pub fn control(&self) -> Option<Control> {
        match self.records.front()?.kind {
            Kind::Control(control) => Some(control),
            Kind::Data => None,
        }
    }

    /// The record at the front has been done: so many bytes are to be dropped from the queue.
    pub fn done(&mut self) -> usize {
        match self.records.front() {
            Some(Record { kind: Kind::Control(control), .. }) => {
                let next = matches!(control, Control::KeyUpdate { .. });
                self.drop_front(next)
            }
            _ => 0,
        }
    }

    /// `n` bytes of data have been used up; so many bytes are to be dropped from the queue. Stops at the first record that is not
    /// data: do that, and go on. Also says how many bytes of `n` are left then.
    pub fn used(&mut self, mut n: usize) -> (usize, usize) {
        let mut dropped = 0;
        while let Some(Record { plain, kind: Kind::Data, .. }) = self.records.front_mut() {
            let part = n.min(*plain);
            *plain -= part;
            let over = *plain == 0;
            self.used += part;
            self.from += part;
            n -= part;
            if !over {
                break;
            }
            dropped += self.drop_front(false);
        }
        if self.from == self.plain.len() {
            self.forget();
        }
        (dropped, n)
    }

    fn drop_front(&mut self, next_key: bool) -> usize {
        let Some(record) = self.records.pop_front() else { return 0 };
        self.wire -= record.wire;
        self.need = self.need.saturating_sub(record.wire);
        self.used = 0;
        self.front.seq += 1;
        // The opener has been through the same.
        if next_key && let Ok(next) = self.front.next(self.suite) {
            self.front = next;
        }
        record.wire
    }

    fn forget(&mut self) {
        self.plain.as_mut_slice().zeroize();
        self.plain.clear();
        self.from = 0;
        // A connection that is idle keeps no buffer.
        if self.plain.capacity() > KEPT {
            self.plain = Vec::new();
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.plain.as_mut_slice().zeroize();
    }
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Incoming")
            .field("front", &self.front)
            .field("opened", &self.wire)
            .finish_non_exhaustive()
    }
}

/// A record that is no data.
fn control(version: Version, content: Content, data: &[u8]) -> Result<Control, u8> {
    match (content, data, version) {
        (Content::Alert, [_, alert::CLOSE_NOTIFY], _) => Ok(Control::Close),
        (Content::Alert, [_, alert::USER_CANCELED], _) => Ok(Control::Nothing),
        // The level counts in TLS 1.2 only (RFC 8446, 6): 1 is a warning.
        (Content::Alert, [1, _], Version::Tls12) => Ok(Control::Nothing),
        (Content::Alert, [_, _], _) => Ok(Control::Alert),
        (Content::Alert, ..) => Err(alert::DECODE_ERROR),
        (Content::Handshake, [head @ .., request @ 0..=1], Version::Tls13) if head == KEY_UPDATE => {
            Ok(Control::KeyUpdate { answer: *request == 1 })
        }
        (Content::Handshake, _, Version::Tls12) => Ok(Control::Renegotiation),
        _ => Err(alert::UNEXPECTED_MESSAGE),
    }
}

/// See [`super::TlsState::shorten`].
pub(super) fn shorten(
    queue: &mut Vec<u8>,
    suite: Suite,
    state: &Direction,
    used: usize,
) -> Result<(), TlsError> {
    if used == 0 {
        return Ok(());
    }
    let header = Header::parse(queue).ok_or(TlsError::Record)?;
    let mut record = queue.get(..header.total()).ok_or(TlsError::Record)?.to_vec();
    let mut opener = Opener::new(suite, state.clone());
    let opened = opener.open(&mut record)?;
    let rest = opened.data.get(used..).filter(|r| !r.is_empty() && opened.content == Content::Data);
    // As it was for the record that was opened.
    let explicit = opener.state().explicit.wrapping_sub(1);
    let sealed = rest.ok_or(TlsError::Record).and_then(|rest| {
        let mut sealer = Sealer::new(suite, Direction { explicit, ..state.clone() });
        let mut sealed = Vec::with_capacity(header.total());
        sealer.seal(Content::Data, rest, &mut sealed).map(|()| sealed)
    });
    record.zeroize();
    queue.splice(..header.total(), sealed?);
    Ok(())
}

#[cfg(test)]
mod tests;
