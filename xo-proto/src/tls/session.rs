//! Both halves of a record layer in one pair of hands, without I/O: for who stands between a connection and a program that knows
//! nothing of TLS. Wire bytes are taken out of the socket as they come, and data goes on at the pace of who takes it.

use super::incoming::{Control, Incoming, KEPT, alert};
use super::{Outgoing, TlsError, TlsState};

/// How the client's direction has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By `close_notify`.
    Close,
    /// By an alert: the client has given the connection up.
    Alert,
    /// What came is no TLS of this connection; the client is to be told by this alert.
    Broken(u8),
}

/// A connection's record layer.
#[derive(Debug)]
pub struct Session {
    incoming: Incoming,
    outgoing: Outgoing,
    /// What the client has sent, from the first record on that has not been used up.
    queue: Vec<u8>,
    /// The client waits for a KeyUpdate.
    owes_update: bool,
    /// The last alert has been sealed: nothing may follow it.
    last_words: bool,
}

impl Session {
    /// Goes on with a connection.
    ///
    /// # Errors
    /// `Suite`.
    pub fn new(state: &TlsState) -> Result<Session, TlsError> {
        Ok(Session {
            incoming: state.incoming()?,
            outgoing: state.outgoing()?,
            queue: Vec::new(),
            owes_update: false,
            last_words: false,
        })
    }

    /// The client has sent this. To be called when there is no [`Session::data`] left: that bounds what is kept here.
    pub fn receive(&mut self, wire: &[u8]) {
        if self.incoming.end().is_some() {
            return;
        }
        self.queue.extend_from_slice(wire);
        self.incoming.open(&mut self.queue, usize::MAX);
        self.settle();
    }

    /// Data for the program.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        self.incoming.data()
    }

    /// It has taken `n` bytes of it.
    pub fn used(&mut self, mut n: usize) {
        while n > 0 {
            let (dropped, left) = self.incoming.used(n);
            self.drop_records(dropped);
            self.settle();
            if left == n {
                debug_assert!(false, "more than there was");
                return;
            }
            n = left;
        }
    }

    /// Nothing more will come from the client, and the program has all that came before.
    #[must_use]
    pub fn end(&self) -> Option<End> {
        if !self.data().is_empty() {
            return None;
        }
        Some(match self.incoming.end()? {
            Some(alert) => End::Broken(alert),
            None if self.incoming.control() == Some(Control::Alert) => End::Alert,
            None => End::Close,
        })
    }

    /// If the socket ends here: is it in the middle of a record?
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.incoming.end().is_none() && self.queue.len() > self.incoming.opened()
    }

    /// The program has sent this. To be called when nothing is [`Session::pending`]: that bounds what is kept here.
    ///
    /// # Errors
    /// `Exhausted`: the connection cannot go on.
    pub fn send(&mut self, data: &[u8]) -> Result<(), TlsError> {
        self.pay_update();
        self.outgoing.data(data)
    }

    /// What the socket is to take next.
    #[must_use]
    pub fn pending(&self) -> &[u8] {
        self.outgoing.pending()
    }

    /// It has taken `n` bytes.
    pub fn taken(&mut self, n: usize) {
        self.outgoing.taken(n);
        // Nobody here writes anything twice.
        self.outgoing.told(usize::MAX);
        self.pay_update();
    }

    /// `close_notify`, once.
    pub fn say_goodbye(&mut self) {
        self.last_words(false, alert::CLOSE_NOTIFY);
    }

    /// The client is told that the connection cannot go on.
    pub fn give_up(&mut self, description: u8) {
        self.last_words(true, description);
    }

    fn last_words(&mut self, fatal: bool, description: u8) {
        if !std::mem::replace(&mut self.last_words, true) {
            // Without one the client sees that the connection is cut.
            let _ = self.outgoing.alert(fatal, description);
        }
    }

    /// Records at the front that are not data.
    fn settle(&mut self) {
        while let Some(control) = self.incoming.control() {
            match control {
                // It stays: it says how the direction has ended.
                Control::Close | Control::Alert => break,
                Control::Nothing | Control::KeyUpdate { answer: false } => {}
                Control::KeyUpdate { answer: true } => self.owes_update = true,
                Control::Renegotiation => self.refuse_renegotiation(),
            }
            let dropped = self.incoming.done();
            self.drop_records(dropped);
        }
        self.pay_update();
    }

    fn drop_records(&mut self, n: usize) {
        self.queue.drain(..n.min(self.queue.len()));
        // A connection that is idle keeps no buffer.
        if self.queue.is_empty() && self.queue.capacity() > KEPT {
            self.queue = Vec::new();
        }
    }

    /// One answer is enough for all that have been asked for meanwhile (RFC 8446, 4.6.3); so a client that does not read cannot have
    /// answers pile up here.
    fn pay_update(&mut self) {
        if self.owes_update && self.may_speak() {
            self.owes_update = self.outgoing.key_update().is_err();
        }
    }

    /// There is no second handshake here.
    fn refuse_renegotiation(&mut self) {
        if self.may_speak() {
            // A client that insists gets no answer, and cannot go on either.
            let _ = self.outgoing.alert(false, alert::NO_RENEGOTIATION);
        }
    }

    fn may_speak(&self) -> bool {
        self.outgoing.pending().is_empty() && !self.last_words
    }
}

#[cfg(test)]
mod tests;
