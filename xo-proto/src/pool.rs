//! What a pool of handler processes and the daemon say to each other, and what the daemon knows of a worker
//! (docs/HANDLERS.md).
//!
//! One message is one packet on a Unix `SOCK_SEQPACKET` socket: an object of JSON on one line. A kind of message that is not known
//! is an error, a field that is not known is none: later versions may add some.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Version of this protocol.
pub const VERSION: u16 = 1;
/// Longest message, bytes.
pub const MAX_MESSAGE: usize = 4096;
/// Most connections that a worker may offer to hold.
pub const MAX_CAPACITY: u32 = 1 << 20;

/// From a worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum FromWorker {
    /// The first message.
    Hello {
        /// [`VERSION`].
        version: u16,
        /// Connections that it can hold at once, at most [`MAX_CAPACITY`].
        capacity: u32,
    },
    /// From now on it can hold so many. 0: it wants no more; those that it has, and those that are under way to it, stay.
    Capacity {
        /// As in `Hello`.
        capacity: u32,
    },
    /// It has closed a connection.
    Done {
        /// The number that came with it.
        connection: u64,
    },
}

/// To a worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum ToWorker {
    /// The answer to `Hello`.
    Welcome {
        /// [`VERSION`].
        version: u16,
        /// The daemon's node name.
        node: String,
        /// Name of the handler.
        handler: String,
    },
    /// A connection, whose descriptor comes with the message.
    Connection {
        /// Its number; no other connection of this channel has it.
        connection: u64,
        /// The client's address.
        client: SocketAddr,
        /// The address that the client connected to.
        server: SocketAddr,
        /// Name of the handler.
        handler: String,
        /// Bytes that can be read now: at least the beginning of a request.
        waiting: u32,
        /// The client speaks TLS: the kernel makes plain bytes of its records, and records of what is written.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        tls: bool,
    },
    /// Why the channel is closed now.
    Error {
        /// For people.
        message: String,
    },
}

/// Why a worker's channel is closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// Not one of its messages.
    #[error("not a message: {0}")]
    Message(String),
    /// It speaks another version.
    #[error("the worker speaks version {0} of the protocol, the daemon {VERSION}")]
    Version(u16),
    /// It offers to hold more than anybody can.
    #[error("a capacity of {0}: at most {MAX_CAPACITY}")]
    Capacity(u32),
    /// Something else came before `hello`.
    #[error("the first message is \"hello\"")]
    NoHello,
    /// `Hello` came twice.
    #[error("a second \"hello\"")]
    SecondHello,
    /// A connection that it does not have.
    #[error("\"done\" with connection {0}, which it does not have")]
    NotIts(u64),
}

/// A message's packet.
#[must_use]
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    // Only maps with keys that are no strings, and types that refuse, fail: there are none in these messages.
    let mut bytes = serde_json::to_vec(message).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

/// The message in a packet.
///
/// # Errors
/// When it is none.
pub fn decode<T: DeserializeOwned>(packet: &[u8]) -> Result<T, Broken> {
    serde_json::from_slice(packet).map_err(|e| Broken::Message(e.to_string()))
}

/// What a worker's message means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said<K> {
    /// It is there, and to be welcomed.
    Hello,
    /// Its capacity is another.
    Capacity,
    /// It has closed this connection.
    Done(K),
}

/// What the daemon knows of a worker; `K` is the daemon's name for a connection.
#[derive(Clone, Debug)]
pub struct Book<K> {
    greeted: bool,
    capacity: u32,
    given: HashMap<u64, K>,
}

impl<K> Default for Book<K> {
    fn default() -> Self {
        Book { greeted: false, capacity: 0, given: HashMap::new() }
    }
}

impl<K> Book<K> {
    /// Has it said hello?
    #[must_use]
    pub fn is_greeted(&self) -> bool {
        self.greeted
    }

    /// How many connections it can hold; 0 before its hello.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// How many it has, or will have in a moment.
    #[must_use]
    pub fn connections(&self) -> u32 {
        self.given.len() as u32
    }

    /// It is given this connection, under a number of its own.
    pub fn give(&mut self, number: u64, key: K) {
        self.given.insert(number, key);
    }

    /// It was not given it after all.
    pub fn take_back(&mut self, number: u64) -> Option<K> {
        self.given.remove(&number)
    }

    /// It is gone; all that it had.
    #[must_use]
    pub fn into_given(self) -> HashMap<u64, K> {
        self.given
    }

    /// A message of the worker.
    ///
    /// # Errors
    /// When it breaks the protocol; its channel is to be closed.
    pub fn on(&mut self, message: &FromWorker) -> Result<Said<K>, Broken> {
        match *message {
            FromWorker::Hello { .. } if self.greeted => return Err(Broken::SecondHello),
            FromWorker::Hello { version, .. } if version != VERSION => return Err(Broken::Version(version)),
            FromWorker::Capacity { .. } | FromWorker::Done { .. } if !self.greeted => {
                return Err(Broken::NoHello);
            }
            FromWorker::Hello { capacity, .. } | FromWorker::Capacity { capacity }
                if capacity > MAX_CAPACITY =>
            {
                return Err(Broken::Capacity(capacity));
            }
            _ => {}
        }
        match *message {
            FromWorker::Hello { capacity, .. } => {
                self.greeted = true;
                self.capacity = capacity;
                Ok(Said::Hello)
            }
            FromWorker::Capacity { capacity } => {
                self.capacity = capacity;
                Ok(Said::Capacity)
            }
            FromWorker::Done { connection } => {
                self.given.remove(&connection).map(Said::Done).ok_or(Broken::NotIts(connection))
            }
        }
    }
}

/// How long to wait before a worker that has ended is started again.
#[derive(Clone, Debug)]
pub struct Backoff {
    pause: Duration,
}

impl Backoff {
    /// First pause; it doubles.
    pub const FIRST: Duration = Duration::from_millis(100);
    /// Longest pause.
    pub const LONGEST: Duration = Duration::from_secs(30);
    /// A worker that has lived for so long has not failed at its start.
    pub const HEALTHY: Duration = Duration::from_secs(10);

    /// The pause after a worker that has lived so long.
    pub fn after(&mut self, lived: Duration) -> Duration {
        if lived >= Backoff::HEALTHY {
            self.pause = Backoff::FIRST;
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(Backoff::LONGEST);
        pause
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Backoff { pause: Backoff::FIRST }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> Result<FromWorker, Broken> {
        decode(text.as_bytes())
    }

    #[test]
    fn messages_are_lines_of_json() {
        assert_eq!(
            said("{\"type\":\"hello\",\"version\":1,\"capacity\":8}\n"),
            Ok(FromWorker::Hello { version: 1, capacity: 8 })
        );
        let later = said("{\"new\":[1],\"type\":\"done\",\"connection\":18446744073709551615}");
        assert_eq!(later, Ok(FromWorker::Done { connection: u64::MAX }));
        assert_eq!(
            said(" {\"type\":\"capacity\",\"capacity\":0} "),
            Ok(FromWorker::Capacity { capacity: 0 })
        );
        let connection = ToWorker::Connection {
            connection: 7,
            client: "[fd00:1::2]:40000".parse().expect("an address"),
            server: "10.2.0.2:80".parse().expect("an address"),
            handler: "we\"b".into(),
            waiting: 90,
            tls: false,
        };
        let packet = encode(&connection);
        let text = "{\"type\":\"connection\",\"connection\":7,\"client\":\"[fd00:1::2]:40000\",\
                    \"server\":\"10.2.0.2:80\",\"handler\":\"we\\\"b\",\"waiting\":90}\n";
        assert_eq!(String::from_utf8_lossy(&packet), text);
        assert_eq!(decode(&packet), Ok(connection));
    }

    #[test]
    fn what_is_no_message_is_said() {
        for bad in [
            "",
            "{}",
            "hello",
            "[]",
            "null",
            "{\"type\":\"hello\"}",
            "{\"type\":\"hello\",\"version\":1,\"capacity\":-1}",
            "{\"type\":\"hello\",\"version\":1,\"capacity\":4294967296}",
            "{\"type\":\"welcome\"}",
            "{\"type\":\"done\",\"connection\":1}{}",
            "{\"type\":\"done\",\"connection\":1.5}",
            "{\"type\":\"done\",\"connection\":\"1\"}",
            &"[".repeat(MAX_MESSAGE),
            "\u{0}",
        ] {
            assert!(matches!(said(bad), Err(Broken::Message(_))), "{bad}");
        }
        assert!(matches!(decode::<FromWorker>(b"\xff{"), Err(Broken::Message(_))));
    }

    #[test]
    fn the_book_knows_what_a_worker_has() {
        let mut book = Book::default();
        let hello = |version, capacity| FromWorker::Hello { version, capacity };
        let done = |connection| FromWorker::Done { connection };
        assert_eq!(book.on(&done(1)), Err(Broken::NoHello));
        assert_eq!(book.on(&FromWorker::Capacity { capacity: 1 }), Err(Broken::NoHello));
        assert_eq!(book.on(&hello(2, 1)), Err(Broken::Version(2)));
        assert_eq!(book.on(&hello(1, MAX_CAPACITY + 1)), Err(Broken::Capacity(MAX_CAPACITY + 1)));
        assert!(!book.is_greeted() && book.capacity() == 0);
        assert_eq!(book.on(&hello(1, 2)), Ok(Said::Hello));
        assert_eq!(book.on(&hello(1, 2)), Err(Broken::SecondHello));
        book.give(1, "a");
        book.give(2, "b");
        book.give(3, "c");
        assert_eq!((book.capacity(), book.connections()), (2, 3));
        assert_eq!(book.on(&done(2)), Ok(Said::Done("b")));
        assert_eq!(book.on(&done(2)), Err(Broken::NotIts(2)));
        assert_eq!(book.take_back(3), Some("c"));
        assert_eq!(book.on(&FromWorker::Capacity { capacity: 0 }), Ok(Said::Capacity));
        assert_eq!((book.capacity(), book.connections()), (0, 1));
        assert_eq!(book.into_given().into_values().collect::<Vec<_>>(), ["a"]);
    }

    #[test]
    fn the_pause_grows_until_a_worker_lives() {
        let mut backoff = Backoff::default();
        let short = Duration::from_secs(1);
        let pauses: Vec<_> = (0..11).map(|_| backoff.after(short).as_millis()).collect();
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 6400, 12_800, 25_600, 30_000, 30_000]);
        assert_eq!(backoff.after(Backoff::HEALTHY), Backoff::FIRST);
        assert_eq!(backoff.after(short), Backoff::FIRST * 2);
    }
}
