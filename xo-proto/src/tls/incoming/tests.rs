use super::*;
use crate::tls::tests::all;
use crate::tls::{TlsState, Version};

/// The client's side of `state`.
fn client(state: &TlsState) -> Sealer {
    Sealer::new(state.suite().expect("a suite"), state.received.clone())
}

/// A queue, and what reads from it as a library does: data as it comes, control records when they are at the front.
struct Reader {
    incoming: Incoming,
    queue: Vec<u8>,
    controls: Vec<Control>,
}

impl Reader {
    fn new(state: &TlsState) -> Reader {
        Reader { incoming: state.incoming().expect("a suite"), queue: Vec::new(), controls: Vec::new() }
    }

    fn arrive(&mut self, bytes: &[u8]) {
        self.queue.extend_from_slice(bytes);
    }

    fn drop_bytes(&mut self, n: usize) {
        self.queue.drain(..n);
    }

    fn look(&mut self, enough: usize) -> Vec<u8> {
        self.incoming.open(&mut self.queue.clone(), enough);
        self.settle();
        self.incoming.data().to_vec()
    }

    fn settle(&mut self) {
        while let Some(control) = self.incoming.control() {
            if matches!(control, Control::Close | Control::Alert) {
                return;
            }
            self.controls.push(control);
            let n = self.incoming.done();
            self.drop_bytes(n);
        }
    }

    fn take(&mut self, most: usize) -> Vec<u8> {
        let data = self.look(most);
        let data = data[..most.min(data.len())].to_vec();
        let mut left = data.len();
        while left > 0 {
            let (dropped, rest) = self.incoming.used(left);
            assert!(dropped > 0 || rest == 0, "no progress");
            self.drop_bytes(dropped);
            self.settle();
            left = rest;
        }
        data
    }

    /// What another machine gets: the state at the front, and the queue that begins there.
    fn moved(&self, state: &TlsState) -> Reader {
        let (received, used) = self.incoming.state().expect("whole records");
        let suite = state.suite().expect("a suite");
        let mut queue = self.queue.clone();
        shorten(&mut queue, suite, &received, used).expect("shortened");
        let state = TlsState { received, ..state.clone() };
        state.fits(&queue).expect("a state that fits");
        Reader { incoming: state.incoming().expect("a suite"), queue, controls: Vec::new() }
    }
}

/// Records of several lengths, among them empty ones and, in TLS 1.3, changes of key; and the data in them.
fn stream(state: &TlsState) -> (Vec<u8>, Vec<u8>) {
    let mut client = client(state);
    let (mut wire, mut data) = (Vec::new(), Vec::new());
    for (i, length) in [1, 40, 0, 3, 17, 0, 0, 90, 2].into_iter().enumerate() {
        let part: Vec<u8> = (0..length).map(|n| (i * 50 + n) as u8).collect();
        client.seal(Content::Data, &part, &mut wire).expect("sealed");
        data.extend_from_slice(&part);
        if i % 3 == 1 && state.version == Version::Tls13 {
            client.update(i == 4, &mut wire).expect("updated");
        }
    }
    (wire, data)
}

#[test]
fn data_comes_out_whole_however_it_arrives_and_is_read() {
    for state in all() {
        let (wire, data) = stream(&state);
        for step in [1, 7, wire.len()] {
            for most in [1, 5, 33, 1000] {
                let mut reader = Reader::new(&state);
                let mut got = Vec::new();
                for bytes in wire.chunks(step) {
                    reader.arrive(bytes);
                    loop {
                        let part = reader.take(most);
                        if part.is_empty() {
                            break;
                        }
                        got.extend(part);
                    }
                    assert!(reader.incoming.need() > reader.queue.len(), "nothing complete is left");
                }
                assert_eq!(got, data);
                assert_eq!((reader.queue.len(), reader.incoming.opened()), (0, 0));
            }
        }
    }
}

#[test]
fn a_connection_can_move_after_every_byte() {
    for state in all() {
        let (wire, data) = stream(&state);
        for arrived in 0..=wire.len() {
            let mut first = Reader::new(&state);
            first.arrive(&wire[..arrived]);
            // Looked at further than it has been used.
            let seen = first.look(usize::MAX).len();
            for used in (0..=seen).step_by(if arrived == wire.len() { 1 } else { 13 }) {
                let mut first = Reader::new(&state);
                first.arrive(&wire[..arrived]);
                let mut got = first.take(used);
                first.look(usize::MAX);
                let mut second = first.moved(&state);
                second.arrive(&wire[arrived..]);
                got.extend(second.take(usize::MAX));
                assert_eq!(got, data, "moved with {arrived} there and {used} used");
                assert_eq!(second.queue.len(), 0);
            }
        }
    }
}

#[test]
fn the_rest_of_a_record_fits_in_its_place() {
    for state in all() {
        let suite = state.suite().expect("a suite");
        let mut wire = Vec::new();
        client(&state).seal(Content::Data, b"first, second", &mut wire).expect("sealed");
        let length = wire.len();
        wire.extend_from_slice(b"what follows");
        shorten(&mut wire, suite, &state.received, 7).expect("shortened");
        assert_eq!(&wire[length - 7..], b"what follows");
        let mut record = wire[..length - 7].to_vec();
        assert_eq!(state.opener().expect("a suite").open(&mut record).expect("opened").data, b"second");
        // Not more than there is, not another record, not the beginning of one.
        let before = wire.clone();
        for (used, seq) in [(6, 0), (7, 0), (1, 1)] {
            let state = Direction { seq, ..state.received.clone() };
            assert!(shorten(&mut wire, suite, &state, used).is_err());
            assert_eq!(wire, before);
        }
        assert!(shorten(&mut wire[..10].to_vec(), suite, &state.received, 1).is_err());
    }
}

#[test]
fn only_as_much_is_opened_as_is_wanted() {
    for state in all() {
        let mut wire = Vec::new();
        let mut client = client(&state);
        for part in [&b"one"[..], b"two", b"three"] {
            client.seal(Content::Data, part, &mut wire).expect("sealed");
        }
        let mut incoming = state.incoming().expect("a suite");
        for (enough, data) in [(1, &b"one"[..]), (3, b"one"), (4, b"onetwo"), (100, b"onetwothree")] {
            incoming.open(&mut wire.clone(), enough);
            assert_eq!(incoming.data(), data);
        }
    }
}

#[test]
fn key_updates_and_alerts_are_met_when_they_are_at_the_front() {
    let tls13 = all().next().expect("a state");
    let mut sealer = client(&tls13);
    let mut wire = Vec::new();
    sealer.seal(Content::Data, b"a", &mut wire).expect("sealed");
    sealer.update(true, &mut wire).expect("updated");
    sealer.seal(Content::Data, b"b", &mut wire).expect("sealed");
    sealer.update(false, &mut wire).expect("updated");
    sealer.seal(Content::Alert, &[1, alert::USER_CANCELED], &mut wire).expect("sealed");
    sealer.seal(Content::Alert, &[1, alert::CLOSE_NOTIFY], &mut wire).expect("sealed");
    let closed = wire.len();
    wire.extend_from_slice(b"after the end");
    let mut reader = Reader::new(&tls13);
    reader.arrive(&wire);
    assert_eq!(reader.look(100), b"ab");
    assert_eq!(reader.controls, []);
    assert_eq!(reader.take(1), b"a");
    assert_eq!(reader.controls, [Control::KeyUpdate { answer: true }]);
    assert_eq!(reader.take(1), b"b");
    assert_eq!(reader.controls[1..], [Control::KeyUpdate { answer: false }, Control::Nothing]);
    assert_eq!((reader.incoming.control(), reader.incoming.end()), (Some(Control::Close), Some(None)));
    // It stays in the queue, so that the end is seen by whoever waits.
    assert_eq!(reader.queue.len(), wire.len() - closed + reader.incoming.opened());
    assert!(reader.incoming.opened() > 0);
    assert_eq!(reader.take(10), b"");
}

#[test]
fn what_does_not_belong_there_is_told_by_an_alert() {
    let states: Vec<_> = all().collect();
    for state in &states {
        let sealed = |content, data: &[u8]| {
            let mut wire = Vec::new();
            client(state).seal(content, data, &mut wire).expect("sealed");
            wire
        };
        let mut other = sealed(Content::Data, b"data");
        *other.last_mut().expect("a byte") ^= 1;
        let tls13 = state.version == Version::Tls13;
        let mut cases = vec![
            (other, Err(Some(alert::BAD_RECORD_MAC))),
            (b"GET / HTTP/1.1\r\n".to_vec(), Err(Some(alert::DECODE_ERROR))),
            (sealed(Content::Alert, &[2, 40]), Ok(Control::Alert)),
            (sealed(Content::Alert, &[2]), Err(Some(alert::DECODE_ERROR))),
            (sealed(Content::Alert, &[1, 0]), Ok(Control::Close)),
            (sealed(Content::Data, b""), Ok(Control::Nothing)),
            (sealed(Content::ChangeCipherSpec, &[1]), Err(Some(alert::UNEXPECTED_MESSAGE))),
        ];
        let unexpected = Err(Some(alert::UNEXPECTED_MESSAGE));
        let hello = sealed(Content::Handshake, &[1, 0, 0, 0]);
        cases.push((hello, if tls13 { unexpected } else { Ok(Control::Renegotiation) }));
        let update = |request: u8| sealed(Content::Handshake, &[24, 0, 0, 1, request]);
        if tls13 {
            cases.push((update(2), unexpected));
            cases.push((vec![20, 3, 3, 0, 1, 1], unexpected));
        } else {
            cases.push((sealed(Content::Alert, &[1, alert::NO_RENEGOTIATION]), Ok(Control::Nothing)));
        }
        for (wire, expected) in cases {
            let mut incoming = state.incoming().expect("a suite");
            incoming.open(&mut wire.clone(), usize::MAX);
            let came = incoming.control().ok_or(incoming.end().flatten());
            assert_eq!(came, expected, "{:?} {wire:02x?}", state.version);
            assert_eq!(incoming.data(), b"");
        }
    }
}

/// A queue without room for the whole of a record: its beginning is taken, at every place, in one or two pieces.
#[test]
fn beginnings_of_records_are_taken_from_the_queue() {
    for state in all() {
        let mut records = Vec::new();
        let mut sealer = client(&state);
        for data in [&b"the first"[..], b"the second", b"the third"] {
            sealer.seal(Content::Data, data, &mut records).expect("sealed");
        }
        let first = Header::parse(&records).expect("a header").total();
        for at in 1..first {
            for second in [at, (at + first) / 2] {
                let mut r = Reader::new(&state);
                let mut begin = 0;
                for end in [at, second] {
                    r.arrive(&records[begin..end]);
                    assert_eq!(r.look(100), b"", "{at} {second}");
                    r.incoming.take(&r.queue);
                    r.queue.clear();
                    assert!(r.incoming.need() <= first - end, "{at} {second}");
                    assert!(r.incoming.state().is_none(), "another machine would not have all of it");
                    begin = end;
                }
                r.arrive(&records[begin..]);
                assert_eq!(r.look(5), b"the first", "{at} {second}");
                assert_eq!(r.take(3), b"the");
                assert!(r.incoming.state().is_none());
                assert_eq!(r.take(6), b" first");
                // From here on everything is in the queue.
                assert_eq!(
                    r.incoming.state().map(|(d, used)| (d.seq - state.received.seq, used)),
                    Some((1, 0))
                );
                assert_eq!(r.queue, records[first..]);
                assert_eq!(r.take(100), b"the secondthe third");
                assert!(r.queue.is_empty());
            }
        }
    }
}
