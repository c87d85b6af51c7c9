//! One direction's records as they pass, from the connection's first byte on: where they end, and how many there have been
//! under the key in use.
//!
//! The bytes are OpenSSL's business; what is wanted here is the sequence number of the next record. In TLS 1.2 it follows from
//! the change of cipher, which is not encrypted. In TLS 1.3 it follows from when the secret was told: what comes after it is
//! under it, or (a server's own handshake records may still be on their way out) does not open with it.

use zeroize::Zeroize;

use super::record::{Content, HEADER, Header, Opener, explicit_nonce};
use super::{Direction, Suite, TlsError, Version};
use crate::reason::Reason;

/// Header and explicit nonce.
const HEAD: usize = HEADER + 8;
/// Records of the handshake that may come after the secret of what follows it.
const MOST_EARLIER: u32 = 16;

/// Which records are opened to see that all is well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// None.
    None,
    /// TLS 1.3: the first ones, until one of them has been opened.
    First,
    /// All of them.
    Every,
}

/// One direction.
#[derive(Debug)]
pub struct Stream {
    head: [u8; HEAD],
    /// Bytes of the record that have passed.
    passed: usize,
    /// Its length, once the header has passed.
    total: usize,
    /// The cipher has been changed.
    changed: bool,
    /// Since then, or since the key is in use.
    records: u64,
    /// Handshake messages since the cipher has been changed: Finished, in TLS 1.2.
    handshakes: u32,
    /// TLS 1.3: records since the secret was told that are not under it.
    earlier: u32,
    explicit: u64,
    keys: Option<(Suite, Direction)>,
    proof: Proof,
    /// The record so far, while it is to be opened.
    copy: Vec<u8>,
    trouble: Option<Reason>,
}

impl Stream {
    /// Of a new connection.
    #[must_use]
    pub fn new(proof: Proof) -> Stream {
        Stream {
            head: [0; HEAD],
            passed: 0,
            total: 0,
            changed: false,
            records: 0,
            handshakes: 0,
            earlier: 0,
            explicit: 0,
            keys: None,
            proof,
            copy: Vec::new(),
            trouble: None,
        }
    }

    /// Does a record begin with the next byte?
    #[must_use]
    pub fn at_boundary(&self) -> bool {
        self.passed == 0
    }

    /// How many of the bytes to come certainly belong to this record (or to its header, while its length is not known).
    #[must_use]
    pub fn rest(&self) -> usize {
        if self.passed < HEADER { HEADER - self.passed } else { self.total - self.passed }
    }

    /// Why it cannot be followed any more.
    #[must_use]
    pub fn trouble(&self) -> Option<Reason> {
        self.trouble
    }

    /// Is the next record, as far as the records tell, one that holds data? In TLS 1.3 that is certain only with a key.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.keys.is_some() || (self.changed && self.handshakes == 1)
    }

    /// The keys are known.
    #[must_use]
    pub fn has_keys(&self) -> bool {
        self.keys.is_some()
    }

    /// TLS 1.3: from the next record on, but for what is still on its way out, this secret is in use.
    ///
    /// # Errors
    /// Those of [`Direction::from_secret`].
    pub fn secret(&mut self, suite: Suite, secret: &[u8]) -> Result<(), TlsError> {
        self.keys = Some((suite, Direction::from_secret(suite, secret)?));
        self.records = 0;
        Ok(())
    }

    /// TLS 1.3: a KeyUpdate has passed, and this is the secret that follows.
    ///
    /// # Errors
    /// `Secret` when it is not the one that follows; `Suite` without keys, or in TLS 1.2.
    pub fn next_secret(&mut self, secret: &[u8]) -> Result<(), TlsError> {
        let (suite, direction) = self.keys.as_ref().ok_or(TlsError::Suite)?;
        let (suite, next) = (*suite, direction.next(*suite)?);
        if next.secret.get(..secret.len()) != Some(secret) {
            return Err(TlsError::Secret);
        }
        self.keys = Some((suite, next));
        self.records = 0;
        Ok(())
    }

    /// TLS 1.2: these are the keys since the cipher was changed.
    pub fn keys(&mut self, suite: Suite, direction: Direction) {
        self.keys = Some((suite, direction));
    }

    /// Where the direction stands: before its next record. `None` within a record, without keys, or when it is lost.
    #[must_use]
    pub fn state(&self) -> Option<Direction> {
        let (_, direction) = self.keys.as_ref().filter(|_| self.at_boundary() && self.trouble.is_none())?;
        Some(Direction { seq: self.records, explicit: self.explicit, ..direction.clone() })
    }

    /// For what comes next; `None` as for [`Stream::state`].
    #[must_use]
    pub fn opener(&self) -> Option<Opener> {
        Some(Opener::new(self.keys.as_ref()?.0, self.state()?))
    }

    /// These bytes have passed.
    pub fn pass(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && self.trouble.is_none() {
            let (now, later) = bytes.split_at(self.rest().min(bytes.len()));
            self.take(now);
            bytes = later;
        }
    }

    /// Bytes of one record, or of its header.
    fn take(&mut self, bytes: &[u8]) {
        if let Some(head) = self.head.get_mut(self.passed..) {
            head.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        }
        if self.is_proving() {
            self.copy.extend_from_slice(bytes);
        }
        self.passed += bytes.len();
        if self.passed == HEADER {
            match Header::parse(&self.head) {
                Some(header) => self.total = header.total(),
                None => return self.lost(),
            }
        }
        if self.passed >= HEADER && self.passed == self.total {
            self.record();
            self.passed = 0;
            self.copy.clear();
        }
    }

    fn is_proving(&self) -> bool {
        match (self.proof, &self.keys) {
            (Proof::None, _) | (_, None) => false,
            (Proof::First, Some((suite, _))) => suite.version() == Version::Tls13 && self.records == 0,
            (Proof::Every, Some(_)) => true,
        }
    }

    /// A record is complete.
    fn record(&mut self) {
        let Some(header) = Header::parse(&self.head) else { return self.lost() };
        let tls13 = self.keys.as_ref().is_some_and(|(suite, _)| suite.version() == Version::Tls13);
        match header.content {
            // For the sake of middleboxes (RFC 8446, 5).
            Content::ChangeCipherSpec if tls13 => {}
            Content::ChangeCipherSpec if self.changed => self.trouble = Some(Reason::TlsRenegotiation),
            Content::ChangeCipherSpec => {
                self.changed = true;
                self.records = 0;
            }
            Content::Data if tls13 => self.encrypted(),
            _ if tls13 => self.lost(),
            content if self.changed => {
                self.handshakes += u32::from(content == Content::Handshake);
                if self.handshakes > 1 {
                    self.trouble = Some(Reason::TlsRenegotiation);
                    return;
                }
                self.encrypted();
                if let Some(nonce) = self.head.get(HEADER..).and_then(explicit_nonce) {
                    self.explicit = nonce.wrapping_add(1);
                }
            }
            _ => {}
        }
    }

    fn encrypted(&mut self) {
        if self.is_proving() {
            let mut copy = std::mem::take(&mut self.copy);
            // One that has begun before the keys came is not whole, and not under them in TLS 1.3.
            let tls12 = self.keys.as_ref().is_some_and(|(suite, _)| suite.version() == Version::Tls12);
            let opened = if copy.len() == self.total { self.proves(&mut copy) } else { tls12 };
            copy.zeroize();
            self.copy = copy;
            if !opened {
                self.earlier += 1;
                if self.records > 0 || self.earlier > MOST_EARLIER {
                    self.lost();
                }
                return;
            }
        }
        self.records += 1;
    }

    fn proves(&self, record: &mut [u8]) -> bool {
        let Some((suite, direction)) = &self.keys else { return false };
        let state = Direction { seq: self.records, ..direction.clone() };
        Opener::new(*suite, state).open(record).is_ok()
    }

    fn lost(&mut self) {
        self.trouble = Some(Reason::TlsLost);
    }
}
