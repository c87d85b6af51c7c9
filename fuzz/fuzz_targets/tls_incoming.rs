//! The receiving half of the record layer: however the client's records are cut, read, and moved to another machine between two
//! reads, the server gets exactly the data that was sealed, in order, and what is no record ends it.
//!
//! Input: a suite, a byte that the secrets are made of, four sizes; then the client's records, a byte for each (and what is no
//! record, to the end).
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use xo_proto::tls::{Content, Control, Direction, Incoming, Sealer, Suite, TlsState, Version};

const SUITES: [(Version, u16); 6] = [
    (Version::Tls13, 0x1301),
    (Version::Tls13, 0x1302),
    (Version::Tls13, 0x1303),
    (Version::Tls12, 0xc02f),
    (Version::Tls12, 0xc030),
    (Version::Tls12, 0xcca8),
];
/// Level and description: warning, `user_canceled`; warning, `close_notify`.
const CANCELED: [u8; 2] = [1, 90];
const CLOSE: [u8; 2] = [1, 0];

fn state((version, cipher): (Version, u16), secret: u8) -> TlsState {
    let suite = Suite::of(version, cipher).expect("a suite");
    let [received, sent] = match version {
        Version::Tls13 => [secret, !secret]
            .map(|b| Direction::from_secret(suite, &vec![b; suite.hash_len()]).expect("keys")),
        Version::Tls12 => {
            Direction::from_master(suite, &[secret; 48], &[secret; 32], &[secret; 32]).expect("keys")
        }
    };
    TlsState { version, cipher, received, sent, server_name: String::new(), alpn: Vec::new() }
}

/// What the client sends, the data in it, and whether nothing but whole records of it is there.
fn client(state: &TlsState, script: &[u8]) -> (Vec<u8>, Vec<u8>, bool) {
    let mut sealer = Sealer::new(state.suite().expect("a suite"), state.received.clone());
    let (mut wire, mut plain) = (Vec::new(), Vec::new());
    for (i, op) in script.iter().enumerate() {
        let sealed = match op {
            0..=199 => {
                // Some records are longer than a reader takes at once.
                let length = usize::from(*op) * if op % 7 == 0 { 80 } else { 1 };
                let data: Vec<u8> = (0..length).map(|n| (n ^ i) as u8).collect();
                plain.extend_from_slice(&data);
                sealer.seal(Content::Data, &data, &mut wire)
            }
            200..=209 => sealer.seal(Content::Data, &[], &mut wire),
            210..=219 if state.version == Version::Tls13 => sealer.update(op % 2 == 1, &mut wire),
            220..=229 => {
                sealer.seal(Content::Alert, &CLOSE, &mut wire).expect("sealed");
                return (wire, plain, true);
            }
            230..=239 => sealer.seal(Content::Alert, &CANCELED, &mut wire),
            240..=249 if state.version == Version::Tls12 => sealer.seal(Content::Handshake, &[1], &mut wire),
            _ => {
                wire.extend_from_slice(script.get(i + 1..).unwrap_or_default());
                return (wire, plain, false);
            }
        };
        sealed.expect("sealed");
    }
    (wire, plain, true)
}

/// A server, and its socket's queue.
struct Server {
    state: TlsState,
    incoming: Incoming,
    queue: Vec<u8>,
    got: Vec<u8>,
}

impl Server {
    /// Opens what is there, and reads up to `most` bytes of data; did anything happen?
    fn read(&mut self, most: usize) -> bool {
        let (opened, before) = (self.incoming.opened(), self.got.len());
        let mut look = self.queue.clone();
        self.incoming.open(&mut look, most);
        let mut changed = self.incoming.opened() > opened;
        let mut left = self.incoming.data().len().min(most);
        self.got.extend_from_slice(&self.incoming.data()[..left]);
        loop {
            let (dropped, rest) = self.incoming.used(left);
            self.queue.drain(..dropped);
            left = rest;
            match self.incoming.control() {
                Some(Control::Close | Control::Alert) | None => break,
                Some(_) => {
                    let dropped = self.incoming.done();
                    self.queue.drain(..dropped);
                    changed = true;
                }
            }
        }
        assert_eq!(left, 0, "data that is there can be used up");
        changed || self.got.len() > before
    }

    /// Another machine goes on, when that is possible.
    fn moves(&mut self) {
        let Some((received, used)) = self.incoming.state() else { return };
        let state = TlsState { received, ..self.state.clone() };
        state.shorten(&mut self.queue, used).expect("the rest of a record that was opened");
        self.incoming = state.incoming().expect("a suite");
        self.state = state;
    }

    /// The queue has no room for the rest of a record.
    fn takes(&mut self) {
        if self.incoming.opened() == 0
            && self.incoming.end().is_none()
            && !self.queue.is_empty()
            && self.queue.len() < self.incoming.need()
        {
            self.incoming.take(&self.queue);
            self.queue.clear();
        }
    }
}

fuzz_target!(|data: &[u8]| -> Corpus {
    let Some((&[number, secret, a, b, c, d], script)) = data.split_first_chunk::<6>() else {
        return Corpus::Reject;
    };
    let state = state(SUITES[usize::from(number) % SUITES.len()], secret);
    let (wire, plain, whole) = client(&state, script);
    let sizes = [a, b, c, d].map(|n| usize::from(n) + 1);
    let incoming = state.incoming().expect("a suite");
    let mut server = Server { state, incoming, queue: Vec::new(), got: Vec::new() };
    let (mut at, mut turn) = (0, 0);
    while at < wire.len() {
        let n = sizes[turn % 4].min(wire.len() - at);
        server.queue.extend_from_slice(&wire[at..at + n]);
        at += n;
        server.read(sizes[(turn + 1) % 4]);
        match (sizes[(turn + 2) % 4] + turn) % 5 {
            0 => server.moves(),
            1 => server.takes(),
            _ => {}
        }
        turn += 1;
        assert!(plain.starts_with(&server.got));
    }
    while server.read(1 << 16) {}
    assert!(server.got == plain, "{} bytes of {}", server.got.len(), plain.len());
    if whole {
        assert!(matches!(server.incoming.end(), None | Some(None)), "{:?}", server.incoming);
    }
    Corpus::Keep
});
