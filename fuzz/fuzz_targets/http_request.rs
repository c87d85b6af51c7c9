//! A stream of requests, read as the library reads it: framed the same at any pace, and no boundary where a plain
//! reading of the specification has none.
//!
//! Input: four bytes that are sizes of arrivals, four that are sizes of reads, one for their kinds; then the stream.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use xo_proto::{http, reason};

#[expect(dead_code, reason = "responses are the other target's")]
#[path = "../../xo-proto/src/http/tests/oracle.rs"]
mod oracle;
#[path = "../../xo-proto/src/http/tests/reader.rs"]
mod reader;

use reader::{Kind, Pace};

fuzz_target!(|data: &[u8]| -> Corpus {
    let Some((&[a, b, c, d, e, f, g, h, kinds], stream)) = data.split_first_chunk::<9>() else {
        return Corpus::Reject;
    };
    let size = |n: u8| if n < 250 { usize::from(n) + 1 } else { 5000 };
    let kind = |bit: u8| match kinds >> bit & 3 {
        0 => Kind::Plain,
        1 => Kind::Pieces(3),
        2 => Kind::Peeking,
        _ => Kind::Unseen,
    };
    let whole =
        Pace { arrivals: vec![usize::MAX / 2], wants: vec![usize::MAX / 2], kinds: vec![Kind::Plain] };
    let cut = Pace {
        arrivals: [a, b, c, d].map(size).into(),
        wants: [e, f, g, h].map(size).into(),
        kinds: vec![Kind::Plain, kind(0), kind(2), kind(4), kind(6)],
    };
    let (ends, methods, left) = reader::run(stream, &whole);
    assert_eq!(reader::run(stream, &cut), (ends.clone(), methods, left), "{cut:?}");
    let mut start = 0;
    for end in ends {
        assert_eq!(oracle::request(&stream[start..]), Some(end - start), "from {start}");
        start = end;
    }
    Corpus::Keep
});
