//! What holds for every stream, however it is cut.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::generate::{self, Response};
use super::oracle;
use super::reader::{self, Kind, Pace};
use crate::http::{Head, Method, Progress, ResponseTracker, parse_head};

const CHUNKED_REQUEST: &str = "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
const CHUNKED_RESPONSE: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";

fn pace() -> impl Strategy<Value = Pace> {
    let kinds = prop_oneof![
        4 => Just(Kind::Plain),
        2 => (1_usize..50).prop_map(Kind::Pieces),
        1 => Just(Kind::Peeking),
        2 => Just(Kind::Unseen),
    ];
    // One read at least takes something.
    let kinds = vec(kinds, 0..6).prop_map(|mut kinds| {
        kinds.push(Kind::Plain);
        kinds
    });
    (generate::sizes(), generate::sizes(), kinds).prop_map(|(arrivals, wants, kinds)| Pace {
        arrivals,
        wants,
        kinds,
    })
}

/// A change of one byte: anything, or what framing is made of.
fn change() -> impl Strategy<Value = (Index, u8)> {
    let byte = prop_oneof![any::<u8>(), select(&b"\r\n \t:;,0129aAfF+-x\0"[..])];
    (any::<Index>(), byte)
}

fn joined(parts: impl Iterator<Item = Vec<u8>>) -> (Vec<u8>, Vec<usize>) {
    let (mut stream, mut ends) = (Vec::new(), Vec::new());
    for part in parts {
        stream.extend(part);
        ends.push(stream.len());
    }
    (stream, ends)
}

/// Sizes of writes, and which of them are unseen where they may be; each used in turn.
struct Writes<'s> {
    sizes: &'s [usize],
    unseen: &'s [bool],
}

/// The responses written, `each` called after every write with the position.
fn write(
    stream: &[u8],
    opaque: &[std::ops::Range<usize>],
    how: &Writes<'_>,
    t: &mut ResponseTracker,
    mut each: impl FnMut(&mut ResponseTracker, usize),
) {
    let (mut at, mut i) = (0, 0);
    while at < stream.len() {
        let n = how.sizes[i % how.sizes.len()].min(stream.len() - at);
        let hidden = opaque.iter().find(|r| r.contains(&at)).filter(|_| how.unseen[i % how.unseen.len()]);
        let n = hidden.map_or(n, |r| n.min(r.end - at));
        match hidden {
            Some(_) => t.wrote_unseen(n as u64),
            None => t.wrote(&stream[at..at + n]),
        }
        at += n;
        i += 1;
        each(t, at);
    }
}

/// The stream of all responses, where each ends, and its opaque parts.
fn stream_of(responses: &[Response]) -> (Vec<u8>, Vec<usize>, Vec<std::ops::Range<usize>>) {
    let (stream, ends) = joined(responses.iter().map(|r| r.bytes.clone()));
    let starts = [0].iter().chain(&ends);
    let shifted = responses.iter().zip(starts).flat_map(|(r, &start)| {
        r.opaque.iter().map(move |o| start + o.start..start + o.end).collect::<Vec<_>>()
    });
    let opaque = shifted.filter(|r| !r.is_empty()).collect();
    (stream, ends, opaque)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// However a stream comes in and is read, reads end where requests end, and nothing is taken for a boundary that
    /// is none. (A read that crossed one would leave its end out of the list.)
    #[test]
    fn requests_end_where_they_end(requests in generate::requests(), pace in pace()) {
        let (stream, ends) = joined(requests.iter().map(|r| r.bytes.clone()));
        let methods: Vec<_> = requests.iter().map(|r| Method::from(r.method)).collect();
        prop_assert_eq!(reader::run(&stream, &pace), (ends, methods, None));
    }

    /// A look at any part of a head says "more", never something that the whole would not say.
    #[test]
    fn a_part_of_a_head_is_partial(requests in generate::requests(), cut in any::<Index>()) {
        let (stream, _) = joined(requests.iter().map(|r| r.bytes.clone()));
        let Head::Complete(whole) = parse_head(&stream) else { return Err(TestCaseError::fail("refused")) };
        let cut = cut.index(stream.len() + 1);
        match parse_head(&stream[..cut]) {
            Head::Partial => prop_assert!(cut < whole.len),
            Head::Complete(part) => {
                prop_assert!(cut >= whole.len);
                prop_assert_eq!((part.len, part.body, part.close), (whole.len, whole.body, whole.close));
            }
            Head::Refused(reason) => prop_assert!(false, "refused: {}", reason),
            Head::TooLong => prop_assert!(false, "too long"),
        }
    }

    /// The oracle of the next test agrees on what is valid.
    #[test]
    fn the_oracle_knows_valid_requests(requests in generate::requests()) {
        for r in requests {
            prop_assert_eq!(oracle::request(&r.bytes), Some(r.bytes.len()));
        }
    }

    /// With any bytes changed, a boundary is found only where the plain reading of the specification has one, the
    /// same at any pace.
    #[test]
    fn changed_requests_are_refused_or_framed_right(
        requests in generate::requests(),
        changes in vec(change(), 1..4),
        paces in [pace(), pace()],
    ) {
        let (mut stream, _) = joined(requests.iter().map(|r| r.bytes.clone()));
        for (at, byte) in changes {
            let at = at.index(stream.len());
            stream[at] = byte;
        }
        let (ends, methods, reason) = reader::run(&stream, &paces[0]);
        let mut start = 0;
        for &end in &ends {
            prop_assert_eq!(oracle::request(&stream[start..]), Some(end - start), "from {}", start);
            start = end;
        }
        prop_assert!(methods.len() - ends.len() <= 1);
        let again = reader::run(&stream, &paces[1]);
        prop_assert_eq!((again.0, again.2), (ends, reason));
    }

    /// However responses are written, their end is known exactly.
    #[test]
    fn responses_end_where_they_end(
        responses in generate::responses(),
        sizes in generate::sizes(),
        unseen in vec(any::<bool>(), 1..6),
        pipelined in any::<bool>(),
    ) {
        let (stream, ends, opaque) = stream_of(&responses);
        let mut t = ResponseTracker::default();
        let all = if pipelined { responses.len() } else { 1 };
        responses.iter().take(all).for_each(|r| t.asked(r.method));
        let mut expected = all;
        let mut seen = Vec::new();
        // Without pipelining a response ends at the end of a write: the next request comes after it.
        let mut pieces = Vec::new();
        let mut start = 0;
        for &end in if pipelined { &ends[ends.len() - 1..] } else { &ends[..] } {
            pieces.push(start..end);
            start = end;
        }
        for piece in pieces {
            if expected < responses.len() && piece.start > 0 {
                t.asked(responses[expected].method);
                expected += 1;
            }
            let inside: Vec<_> = opaque
                .iter()
                .filter(|r| piece.contains(&r.start))
                .map(|r| r.start - piece.start..r.end - piece.start)
                .collect();
            let how = Writes { sizes: &sizes, unseen: &unseen };
            write(&stream[piece.clone()], &inside, &how, &mut t, |t, at| seen.push((piece.start + at, t.progress())));
        }
        let lasts = responses.last().is_some_and(|r| r.until_close);
        let (&(at, last), before) = seen.split_last().expect("a write");
        prop_assert_eq!((at, last), (stream.len(), if lasts { Progress::UntilClose } else { Progress::Clean }));
        for &(at, progress) in before {
            let at_end = !pipelined && ends.contains(&at);
            let since_head = lasts && opaque.last().is_some_and(|r| at >= r.start);
            let right = match progress {
                Progress::Clean => at_end,
                Progress::InProgress => !at_end && !since_head,
                Progress::UntilClose => since_head,
                Progress::Upgraded | Progress::Unknown => false,
            };
            prop_assert!(right, "{:?} at {} of {}", progress, at, stream.len());
        }
    }

    /// With any bytes changed, `Clean` is said only where the plain reading has all responses complete.
    #[test]
    fn changed_responses_are_never_clean_too_early(
        responses in generate::responses(),
        changes in vec(change(), 1..4),
        sizes in generate::sizes(),
        unseen in vec(any::<bool>(), 1..6),
    ) {
        let (mut stream, _, opaque) = stream_of(&responses);
        for (at, byte) in changes {
            let at = at.index(stream.len());
            stream[at] = byte;
        }
        let methods: Vec<_> = responses.iter().map(|r| r.method).collect();
        let real = oracle::responses(&stream, &methods);
        let mut t = ResponseTracker::default();
        methods.iter().for_each(|m| t.asked(*m));
        // What was data may now be sent unseen where it is none: to be noticed, or counted as what it is.
        let how = Writes { sizes: &sizes, unseen: &unseen };
        let mut cleans = Vec::new();
        write(&stream, &opaque, &how, &mut t, |t, at| {
            cleans.extend((t.progress() == Progress::Clean).then_some(at));
        });
        for at in cleans {
            prop_assert!(real.len() == methods.len() && real.last() == Some(&at), "clean at {}, {:?}", at, real);
        }
    }

    /// Bytes of any kind, on both sides, at any pace.
    #[test]
    fn any_bytes_are_framed_right_or_not_at_all(
        bytes in vec(prop_oneof![any::<u8>(), select(&b"\r\n\r\n01;: "[..])], 0..300),
        start in select(vec!["", "GET / HTTP/1.1\r\n", CHUNKED_REQUEST, CHUNKED_RESPONSE]),
        pace in pace(),
    ) {
        let stream = [start.as_bytes(), &bytes].concat();
        let (ends, _, _) = reader::run(&stream, &pace);
        if let Some(&first) = ends.first() {
            prop_assert_eq!(oracle::request(&stream), Some(first));
        }
        let mut t = ResponseTracker::default();
        t.asked(Method::Other);
        let real = oracle::responses(&stream, &[Method::Other]);
        let how = Writes { sizes: &pace.wants, unseen: &[false] };
        let mut cleans = Vec::new();
        write(&stream, &[], &how, &mut t, |t, at| {
            cleans.extend((t.progress() == Progress::Clean).then_some(at));
        });
        for at in cleans {
            prop_assert_eq!(&real, &[at]);
        }
    }
}
