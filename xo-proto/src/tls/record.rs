//! Records: headers, opening, sealing.

use ring::aead::{Aad, LessSafeKey, Nonce, UnboundKey};
use std::fmt;

use super::{Direction, NONCE, Suite, TlsError, Version};

/// Length of a record's header, bytes.
pub const HEADER: usize = 5;
/// Longest content of a record, bytes (RFC 8446, 5.1).
pub const MAX_PLAINTEXT: usize = 1 << 14;
/// Most that a record is longer than its content, header included, of those that are sealed here.
pub const OVERHEAD: usize = HEADER + EXPLICIT + TAG;
/// Longest record, header included: TLS 1.2 allows more than TLS 1.3 (RFC 5246, 6.2.3; RFC 8446, 5.2).
pub const MAX_RECORD: usize = HEADER + MAX_PLAINTEXT + 2048;

/// Authentication tag of every suite here, bytes.
const TAG: usize = 16;
/// The part of the nonce that is in a record of TLS 1.2 with AES-GCM, bytes.
const EXPLICIT: usize = 8;
/// `legacy_record_version`, which is the version of TLS 1.2.
const WIRE_VERSION: [u8; 2] = [3, 3];
/// Records under one key: far below what AES-GCM allows for full-size records (RFC 8446, 5.5) a new one is made.
const MOST_RECORDS: u64 = 1 << 23;

/// What a record holds (RFC 8446, 5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Change of cipher: in TLS 1.3 only for the sake of old middleboxes, and never encrypted.
    ChangeCipherSpec,
    /// An alert.
    Alert,
    /// A handshake message: in TLS 1.3 also session tickets and changes of key.
    Handshake,
    /// Data.
    Data,
}

impl Content {
    /// By its number on the wire.
    #[must_use]
    pub fn of(number: u8) -> Option<Content> {
        match number {
            20 => Some(Content::ChangeCipherSpec),
            21 => Some(Content::Alert),
            22 => Some(Content::Handshake),
            23 => Some(Content::Data),
            _ => None,
        }
    }

    fn number(self) -> u8 {
        match self {
            Content::ChangeCipherSpec => 20,
            Content::Alert => 21,
            Content::Handshake => 22,
            Content::Data => 23,
        }
    }
}

/// A record's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it says that the record holds: of all that TLS 1.3 encrypts, data.
    pub content: Content,
    /// Length of what follows, bytes.
    pub length: usize,
}

impl Header {
    /// Reads the header that `bytes` begin with. `None` when they are too short, or nothing that TLS 1.2 or 1.3 sends.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Header> {
        let &[content, 3, minor, high, low] = bytes.first_chunk::<HEADER>()? else { return None };
        let length = usize::from(u16::from_be_bytes([high, low]));
        let content = Content::of(content)?;
        (minor <= 4 && length <= MAX_RECORD - HEADER).then_some(Header { content, length })
    }

    /// Length of the record, header included, bytes.
    #[must_use]
    pub fn total(self) -> usize {
        HEADER + self.length
    }
}

/// The explicit part of the nonce of a record of TLS 1.2 with AES-GCM, from the bytes that follow its header.
#[must_use]
pub fn explicit_nonce(after_header: &[u8]) -> Option<u64> {
    after_header.first_chunk::<EXPLICIT>().map(|bytes| u64::from_be_bytes(*bytes))
}

/// A record's content.
#[derive(Debug, PartialEq, Eq)]
pub struct Opened<'r> {
    /// What it is.
    pub content: Content,
    /// The content itself, where the record was.
    pub data: &'r mut [u8],
}

/// The common part of both directions.
struct Keyed {
    suite: Suite,
    key: LessSafeKey,
    state: Direction,
}

impl Keyed {
    fn new(suite: Suite, state: Direction) -> Keyed {
        let key = UnboundKey::new(suite.algorithm(), &state.key[..suite.key_len()]);
        #[expect(
            clippy::expect_used,
            reason = "the key is as long as the algorithm says, which is ring's only demand"
        )]
        let key = LessSafeKey::new(key.expect("a key of the algorithm's length"));
        Keyed { suite, key, state }
    }

    /// XOR with the sequence number (RFC 8446, 5.3; RFC 7905, 2), or salt and explicit part (RFC 5288, 3).
    fn nonce(&self, explicit: u64) -> Nonce {
        let mut nonce = self.state.iv;
        let last: &mut [u8] = &mut nonce[NONCE - 8..];
        if self.suite.has_explicit_nonce() {
            last.copy_from_slice(&explicit.to_be_bytes());
        } else {
            last.iter_mut().zip(self.state.seq.to_be_bytes()).for_each(|(n, s)| *n ^= s);
        }
        Nonce::assume_unique_for_key(nonce)
    }

    /// Additional data: the header in TLS 1.3 (RFC 8446, 5.2); sequence number, type, version and content's length in
    /// TLS 1.2 (RFC 5246, 6.2.3.3). In an array of the longer one, with the length that counts.
    fn additional(&self, header: [u8; HEADER], plain: usize) -> ([u8; 8 + HEADER], usize) {
        let mut all = [0; 8 + HEADER];
        if self.suite.version() == Version::Tls13 {
            all[..HEADER].copy_from_slice(&header);
            return (all, HEADER);
        }
        let [content, major, minor, ..] = header;
        all[..8].copy_from_slice(&self.state.seq.to_be_bytes());
        let [high, low] = (plain as u16).to_be_bytes();
        all[8..].copy_from_slice(&[content, major, minor, high, low]);
        (all, 8 + HEADER)
    }

    /// Goes on to the next record.
    fn count(&mut self) -> Result<(), TlsError> {
        self.state.seq = self.state.seq.checked_add(1).ok_or(TlsError::Exhausted)?;
        Ok(())
    }

    fn update(&mut self) -> Result<(), TlsError> {
        *self = Keyed::new(self.suite, self.state.next(self.suite)?);
        Ok(())
    }
}

/// Opens the records of one direction, one after the other.
pub struct Opener(Keyed);

impl Opener {
    /// From where the direction stands.
    #[must_use]
    pub fn new(suite: Suite, state: Direction) -> Opener {
        Opener(Keyed::new(suite, state))
    }

    /// Where the direction stands.
    #[must_use]
    pub fn state(&self) -> &Direction {
        &self.0.state
    }

    /// Begins at another record of the same key.
    pub fn seek(&mut self, seq: u64) {
        self.0.state.seq = seq;
    }

    /// Opens one complete record, header included, where it is. What is not encrypted in TLS 1.3 (a change of cipher) is no
    /// record here.
    ///
    /// # Errors
    /// `Record` when it is not exactly one encrypted record, `Decrypt` when it is not the next one of this direction; the
    /// record's bytes are then of no use, and the sequence number is as before.
    pub fn open<'r>(&mut self, record: &'r mut [u8]) -> Result<Opened<'r>, TlsError> {
        let this = &mut self.0;
        let header = Header::parse(record).filter(|h| h.total() == record.len()).ok_or(TlsError::Record)?;
        let (head, body) = record.split_first_chunk_mut::<HEADER>().ok_or(TlsError::Record)?;
        let tls13 = this.suite.version() == Version::Tls13;
        if tls13 && header.content != Content::Data {
            return Err(TlsError::Record);
        }
        let (explicit, sealed) = if this.suite.has_explicit_nonce() {
            let explicit = explicit_nonce(body).ok_or(TlsError::Record)?;
            (explicit, body.get_mut(EXPLICIT..).ok_or(TlsError::Record)?)
        } else {
            (0, body)
        };
        let plain = sealed.len().checked_sub(TAG).ok_or(TlsError::Record)?;
        // In TLS 1.3 content, its type and padding; the type is one byte more.
        if plain > MAX_PLAINTEXT + usize::from(tls13) {
            return Err(TlsError::Record);
        }
        let (additional, length) = this.additional(*head, plain);
        let nonce = this.nonce(explicit);
        let opened = this.key.open_in_place(nonce, Aad::from(&additional[..length]), sealed);
        let data = opened.map_err(|_| TlsError::Decrypt)?;
        let opened = if tls13 { inner(data)? } else { Opened { content: header.content, data } };
        if this.suite.has_explicit_nonce() {
            this.state.explicit = explicit.wrapping_add(1);
        }
        this.count()?;
        Ok(opened)
    }

    /// TLS 1.3: the other side has said KeyUpdate.
    ///
    /// # Errors
    /// `Suite` in TLS 1.2.
    pub fn update(&mut self) -> Result<(), TlsError> {
        self.0.update()
    }
}

/// `TLSInnerPlaintext` (RFC 8446, 5.4): content, its type, any number of zeros.
fn inner(data: &mut [u8]) -> Result<Opened<'_>, TlsError> {
    let end = data.iter().rposition(|b| *b != 0).ok_or(TlsError::Record)?;
    let content = Content::of(data[end]).ok_or(TlsError::Record)?;
    Ok(Opened { content, data: &mut data[..end] })
}

/// Makes the records of one direction, one after the other.
pub struct Sealer(Keyed);

impl Sealer {
    /// From where the direction stands.
    #[must_use]
    pub fn new(suite: Suite, state: Direction) -> Sealer {
        Sealer(Keyed::new(suite, state))
    }

    /// Where the direction stands.
    #[must_use]
    pub fn state(&self) -> &Direction {
        &self.0.state
    }

    /// Is it time for a KeyUpdate (RFC 8446, 5.5)? Never in TLS 1.2, which has none.
    #[must_use]
    pub fn is_worn(&self) -> bool {
        self.0.suite.version() == Version::Tls13 && self.0.state.seq >= MOST_RECORDS
    }

    /// Appends to `out` the records that carry `data`: as many as it takes, and one for no data at all.
    ///
    /// # Errors
    /// `Exhausted`; `out` then has the records made before.
    pub fn seal(&mut self, content: Content, data: &[u8], out: &mut Vec<u8>) -> Result<(), TlsError> {
        if data.is_empty() {
            return self.seal_one(content, data, out);
        }
        data.chunks(MAX_PLAINTEXT).try_for_each(|part| self.seal_one(content, part, out))
    }

    fn seal_one(&mut self, content: Content, data: &[u8], out: &mut Vec<u8>) -> Result<(), TlsError> {
        match self.0.suite.version() {
            Version::Tls13 => self.seal_parts(Content::Data, [data, &[content.number()]], out),
            Version::Tls12 => self.seal_parts(content, [data, &[]], out),
        }
    }

    /// A record whose encrypted part is these, one after the other.
    fn seal_parts(&mut self, outer: Content, parts: [&[u8]; 2], out: &mut Vec<u8>) -> Result<(), TlsError> {
        let this = &mut self.0;
        let explicit = if this.suite.has_explicit_nonce() { EXPLICIT } else { 0 };
        let plain: usize = parts.iter().map(|p| p.len()).sum();
        let [high, low] = ((explicit + plain + TAG) as u16).to_be_bytes();
        let header = [outer.number(), WIRE_VERSION[0], WIRE_VERSION[1], high, low];
        let (additional, length) = this.additional(header, plain);
        let nonce = this.nonce(this.state.explicit);
        let start = out.len();
        out.reserve(HEADER + explicit + plain + TAG);
        out.extend_from_slice(&header);
        if explicit > 0 {
            out.extend_from_slice(&this.state.explicit.to_be_bytes());
        }
        let body = out.len();
        parts.iter().for_each(|part| out.extend_from_slice(part));
        let additional = Aad::from(&additional[..length]);
        let Ok(tag) = this.key.seal_in_place_separate_tag(nonce, additional, &mut out[body..]) else {
            out.truncate(start);
            return Err(TlsError::Exhausted);
        };
        out.extend_from_slice(tag.as_ref());
        if explicit > 0 {
            this.state.explicit = this.state.explicit.wrapping_add(1);
        }
        this.count()
    }

    /// A record of TLS 1.3 with this `TLSInnerPlaintext`.
    #[cfg(test)]
    pub(super) fn seal_inner(&mut self, inner: &[u8], out: &mut Vec<u8>) -> Result<(), TlsError> {
        self.seal_parts(Content::Data, [inner, &[]], out)
    }

    /// TLS 1.3: appends a KeyUpdate to `out` and goes on with the next key (RFC 8446, 4.6.3). With `request` the other
    /// side is to do the same.
    ///
    /// # Errors
    /// `Suite` in TLS 1.2, `Exhausted`.
    pub fn update(&mut self, request: bool, out: &mut Vec<u8>) -> Result<(), TlsError> {
        const KEY_UPDATE: u8 = 24;
        if self.0.suite.version() != Version::Tls13 {
            return Err(TlsError::Suite);
        }
        self.seal_one(Content::Handshake, &[KEY_UPDATE, 0, 0, 1, u8::from(request)], out)?;
        self.0.update()
    }
}

impl fmt::Debug for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Opener").field(&self.0.suite).field(&self.0.state).finish()
    }
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Sealer").field(&self.0.suite).field(&self.0.state).finish()
    }
}
