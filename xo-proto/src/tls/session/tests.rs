use super::*;
use crate::tls::tests::all;
use crate::tls::{Content, MAX_PLAINTEXT, Opener, Sealer, Version};

/// A session, and its client.
struct Pair {
    session: Session,
    sealer: Sealer,
    opener: Opener,
}

impl Pair {
    fn new(state: &TlsState) -> Pair {
        let suite = state.suite().expect("a suite");
        Pair {
            session: Session::new(state).expect("a suite"),
            sealer: Sealer::new(suite, state.received.clone()),
            opener: Opener::new(suite, state.sent.clone()),
        }
    }

    fn sealed(&mut self, content: Content, data: &[u8]) -> Vec<u8> {
        let mut wire = Vec::new();
        self.sealer.seal(content, data, &mut wire).expect("a record");
        wire
    }

    fn update(&mut self, request: bool) -> Vec<u8> {
        let mut wire = Vec::new();
        self.sealer.update(request, &mut wire).expect("a new key");
        wire
    }

    /// What the client gets: the socket takes `step` bytes at a time.
    fn gets(&mut self, step: usize) -> Vec<(Content, Vec<u8>)> {
        let mut wire = Vec::new();
        while !self.session.pending().is_empty() {
            let n = self.session.pending().len().min(step);
            wire.extend_from_slice(&self.session.pending()[..n]);
            self.session.taken(n);
        }
        let mut records = Vec::new();
        let mut rest = &mut wire[..];
        while !rest.is_empty() {
            let total = crate::tls::Header::parse(rest).expect("a header").total();
            let (record, after) = rest.split_at_mut(total);
            let opened = self.opener.open(record).expect("the next record");
            records.push((opened.content, opened.data.to_vec()));
            if opened.content == Content::Handshake {
                self.opener.update().expect("TLS 1.3");
            }
            rest = after;
        }
        records
    }

    /// What the program gets.
    fn takes(&mut self, step: usize) -> Vec<u8> {
        let mut data = Vec::new();
        while !self.session.data().is_empty() {
            let n = self.session.data().len().min(step);
            data.extend_from_slice(&self.session.data()[..n]);
            self.session.used(n);
        }
        data
    }
}

#[test]
fn data_goes_both_ways_in_any_pieces() {
    let data: Vec<u8> = (0..40_000_u32).map(|i| (i * 7 % 251) as u8).collect();
    for state in all() {
        for (step, piece) in [(1, 977), (17, 3), (100_000, 1 << 16)] {
            let mut pair = Pair::new(&state);
            let wire = pair.sealed(Content::Data, &data);
            let mut got = Vec::new();
            for part in wire.chunks(piece) {
                pair.session.receive(part);
                got.extend(pair.takes(step));
            }
            assert!(got == data && !pair.session.is_cut() && pair.session.end().is_none());
            pair.session.send(&data).expect("sealed");
            let records = pair.gets(step.max(100));
            assert!(records.iter().all(|(c, d)| *c == Content::Data && d.len() <= MAX_PLAINTEXT));
            assert!(records.into_iter().flat_map(|(_, d)| d).collect::<Vec<_>>() == data);
            assert!(pair.session.queue.capacity() <= KEPT, "an idle connection keeps no buffer");
        }
    }
}

#[test]
fn new_keys_are_followed_and_answered() {
    for state in all().filter(|s| s.version == Version::Tls13) {
        let mut pair = Pair::new(&state);
        for round in 0..20 {
            let mut wire = pair.sealed(Content::Data, b"before");
            wire.extend(pair.update(round % 2 == 0));
            wire.extend(pair.sealed(Content::Data, b"after"));
            pair.session.receive(&wire);
            assert_eq!(pair.takes(4), b"beforeafter", "{state:?}");
            pair.session.send(b"answer").expect("sealed");
            let records = pair.gets(1000);
            let update = (Content::Handshake, vec![24, 0, 0, 1, 0]);
            let answer = (Content::Data, b"answer".to_vec());
            let expected = if round % 2 == 0 { vec![update, answer] } else { vec![answer] };
            assert_eq!(records, expected, "{state:?}");
        }
    }
}

/// A client that asks and asks, and does not read, gets one answer when it reads.
#[test]
fn answers_do_not_pile_up() {
    for state in all().filter(|s| s.version == Version::Tls13) {
        let mut pair = Pair::new(&state);
        pair.session.send(b"on its way").expect("sealed");
        let before = pair.session.pending().len();
        for _ in 0..1000 {
            let wire = pair.update(true);
            pair.session.receive(&wire);
        }
        assert_eq!(pair.session.pending().len(), before);
        let records = pair.gets(3);
        assert_eq!(records.iter().map(|(c, _)| *c).collect::<Vec<_>>(), [Content::Data, Content::Handshake]);
    }
}

#[test]
fn a_second_handshake_is_refused() {
    for state in all().filter(|s| s.version == Version::Tls12) {
        let mut pair = Pair::new(&state);
        let mut wire = pair.sealed(Content::Handshake, &[1, 0, 0, 0]);
        wire.extend(pair.sealed(Content::Data, b"request"));
        pair.session.receive(&wire);
        assert_eq!(pair.takes(100), b"request");
        assert_eq!(pair.gets(100), [(Content::Alert, vec![1, alert::NO_RENEGOTIATION])]);
    }
}

#[test]
fn ends_come_after_the_data() {
    for state in all() {
        let alert = |level, description| (Content::Alert, vec![level, description]);
        for (last, end) in [
            (alert(1, alert::CLOSE_NOTIFY), End::Close),
            (alert(2, 80), End::Alert),
            ((Content::Handshake, vec![4, 0]), End::Broken(alert::UNEXPECTED_MESSAGE)),
        ] {
            if state.version == Version::Tls12 && matches!(end, End::Broken(_)) {
                continue;
            }
            let mut pair = Pair::new(&state);
            let mut wire = pair.sealed(Content::Data, b"data");
            wire.extend(pair.sealed(last.0, &last.1));
            pair.session.receive(&wire);
            assert_eq!(pair.session.end(), None);
            assert_eq!(pair.takes(3), b"data");
            assert_eq!(pair.session.end(), Some(end));
            // What follows is nobody's business.
            pair.session.receive(b"anything");
            assert_eq!((pair.session.data(), pair.session.is_cut()), (&b""[..], false));
        }
    }
}

#[test]
fn what_is_no_record_ends_it_and_a_cut_is_seen() {
    for state in all() {
        let mut pair = Pair::new(&state);
        let mut wire = pair.sealed(Content::Data, b"data");
        pair.session.receive(&wire[..7]);
        assert!(pair.session.is_cut());
        let last = wire.len() - 1;
        wire[last] ^= 1;
        pair.session.receive(&wire[7..]);
        assert_eq!(pair.session.end(), Some(End::Broken(alert::BAD_RECORD_MAC)));
        let mut pair = Pair::new(&state);
        pair.session.receive(b"GET / HTTP/1.1\r\n");
        assert_eq!(pair.session.end(), Some(End::Broken(alert::DECODE_ERROR)));
        pair.session.give_up(alert::DECODE_ERROR);
        pair.session.say_goodbye();
        assert_eq!(pair.gets(100), [(Content::Alert, vec![2, alert::DECODE_ERROR])]);
    }
}

/// Nothing follows the last words, also when a new key is asked for after them.
#[test]
fn goodbye_is_said_once_and_last() {
    for state in all() {
        let mut pair = Pair::new(&state);
        pair.session.send(b"all").expect("sealed");
        pair.session.say_goodbye();
        pair.session.say_goodbye();
        if state.version == Version::Tls13 {
            let wire = pair.update(true);
            pair.session.receive(&wire);
        }
        let expected = [(Content::Data, b"all".to_vec()), (Content::Alert, vec![1, alert::CLOSE_NOTIFY])];
        assert_eq!(pair.gets(10), expected);
    }
}
