//! A stream of Redis commands, read as the library reads it: reads end only where a plain reading of the protocol has a
//! command's end, and before each command that belongs elsewhere.
//!
//! Input: four bytes that are sizes of arrivals, four that are sizes of reads; then the stream.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use xo_proto::{protocol, reason, resp};

#[expect(dead_code, reason = "replies are the other target's")]
#[path = "../../xo-proto/src/resp/tests/oracle.rs"]
mod oracle;
#[path = "../../xo-proto/src/resp/tests/reader.rs"]
mod reader;

fuzz_target!(|data: &[u8]| -> Corpus {
    let Some((&[a, b, c, d, e, f, g, h], stream)) = data.split_first_chunk::<8>() else {
        return Corpus::Reject;
    };
    let size = |n: u8| if n < 250 { usize::from(n) + 1 } else { 20_000 };
    let away = |c: &resp::Command| c.slot.is_some_and(|slot| slot % 2 == 1);
    let whole = [usize::MAX / 2];
    for (arrivals, wants) in [
        (whole.to_vec(), whole.to_vec()),
        (vec![size(a), size(b), size(c), size(d)], vec![size(e), size(f), size(g), size(h)]),
    ] {
        let reading = reader::read(stream, &arrivals, &wants, away);
        let mut ends = vec![0];
        while let Some(n) = oracle::command(&stream[ends[ends.len() - 1]..]) {
            ends.push(ends[ends.len() - 1] + n);
        }
        for at in &reading.boundaries {
            assert!(ends.contains(at), "a read ends at {at}, commands at {ends:?}");
        }
        for at in &reading.away {
            assert!(*at == 0 || reading.boundaries.contains(at), "{at} is read with what is before it");
        }
    }
    Corpus::Keep
});
