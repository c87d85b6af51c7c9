//! The sending half of a record layer, without I/O. The kernel may take a part of a record only; whoever writes is then told
//! that the data in it has not been written yet, and will try again with the same bytes: they are owed to it.

use std::collections::VecDeque;

use super::record::{Content, Sealer};
use super::{Direction, MAX_PLAINTEXT, Suite, TlsError, Version};

#[derive(Debug)]
struct Record {
    /// Its bytes that the kernel has not taken.
    wire: usize,
    /// Its data, bytes.
    plain: usize,
}

/// What has been sealed of one direction.
#[derive(Debug)]
pub struct Outgoing {
    suite: Suite,
    sealer: Sealer,
    out: Vec<u8>,
    /// So much of `out` the kernel has taken.
    taken: usize,
    records: VecDeque<Record>,
    /// Data that the kernel has taken and whose writer does not know, bytes.
    ready: usize,
}

impl Outgoing {
    /// From where the direction stands.
    #[must_use]
    pub fn new(suite: Suite, state: Direction) -> Outgoing {
        let sealer = Sealer::new(suite, state);
        Outgoing { suite, sealer, out: Vec::new(), taken: 0, records: VecDeque::new(), ready: 0 }
    }

    /// Where the direction stands. `None` while there is something that the kernel has not taken, or the writer has not been
    /// told.
    #[must_use]
    pub fn state(&self) -> Option<Direction> {
        (self.records.is_empty() && self.ready == 0).then(|| self.sealer.state().clone())
    }

    /// Seals data. Only when nothing is owed: it would be sealed twice.
    ///
    /// # Errors
    /// `Exhausted`.
    pub fn data(&mut self, data: &[u8]) -> Result<(), TlsError> {
        for part in data.chunks(MAX_PLAINTEXT) {
            if self.sealer.is_worn() {
                self.key_update()?;
            }
            self.seal(Content::Data, part, part.len())?;
        }
        Ok(())
    }

    /// TLS 1.3: goes on with the next key, and says so.
    ///
    /// # Errors
    /// `Suite` in TLS 1.2, `Exhausted`.
    pub fn key_update(&mut self) -> Result<(), TlsError> {
        let before = self.out.len();
        self.sealer.update(false, &mut self.out)?;
        self.records.push_back(Record { wire: self.out.len() - before, plain: 0 });
        Ok(())
    }

    /// An alert; in TLS 1.3 the level is of no meaning.
    ///
    /// # Errors
    /// `Exhausted`.
    pub fn alert(&mut self, fatal: bool, description: u8) -> Result<(), TlsError> {
        self.seal(Content::Alert, &[1 + u8::from(fatal), description], 0)
    }

    fn seal(&mut self, content: Content, data: &[u8], plain: usize) -> Result<(), TlsError> {
        let before = self.out.len();
        self.sealer.seal(content, data, &mut self.out)?;
        self.records.push_back(Record { wire: self.out.len() - before, plain });
        Ok(())
    }

    /// What the kernel is to take next.
    #[must_use]
    pub fn pending(&self) -> &[u8] {
        self.out.get(self.taken..).unwrap_or_default()
    }

    /// The kernel has taken `n` bytes.
    pub fn taken(&mut self, mut n: usize) {
        while let Some(record) = self.records.front_mut() {
            let part = n.min(record.wire);
            record.wire -= part;
            n -= part;
            self.taken += part;
            if record.wire > 0 {
                return;
            }
            self.ready += record.plain;
            self.records.pop_front();
        }
        // A connection that is idle keeps no buffer.
        self.out = Vec::new();
        self.taken = 0;
    }

    /// Tells the writer of up to `most` bytes of data that the kernel has taken.
    pub fn told(&mut self, most: usize) -> usize {
        let n = most.min(self.ready);
        self.ready -= n;
        n
    }

    /// TLS 1.3?
    #[must_use]
    pub fn has_key_updates(&self) -> bool {
        self.suite.version() == Version::Tls13
    }
}

#[cfg(test)]
mod tests;
