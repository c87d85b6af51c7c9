//! What a Redis server writes: followed the same however it is cut, and `Clean` only where a plain reading of the protocol
//! has every reply complete.
//!
//! Input: a byte for the number of commands, four that are sizes of writes; then the stream.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use xo_proto::protocol::Progress;
use xo_proto::resp::Replies;

#[expect(dead_code, reason = "commands are the other target's")]
#[path = "../../xo-proto/src/resp/tests/oracle.rs"]
mod oracle;

/// Where the stream was clean, and how it ended.
fn follow(stream: &[u8], count: u32, sizes: &[usize]) -> (Vec<usize>, Progress) {
    let mut replies = Replies::default();
    replies.asked(count, false);
    let (mut at, mut i, mut cleans) = (0, 0, Vec::new());
    while at < stream.len() {
        let n = sizes[i % sizes.len()].min(stream.len() - at);
        replies.wrote(&stream[at..at + n]);
        (at, i) = (at + n, i + 1);
        if replies.progress() == Progress::Clean {
            cleans.push(at);
        }
    }
    (cleans, replies.progress())
}

fuzz_target!(|data: &[u8]| -> Corpus {
    let Some((&[count, a, b, c, d], stream)) = data.split_first_chunk::<5>() else {
        return Corpus::Reject;
    };
    let count = u32::from(count % 4) + 1;
    let sizes = [a, b, c, d].map(|n| usize::from(n) + 1);
    let real = oracle::replies(stream, count as usize);
    let complete = real.last().filter(|_| real.len() == count as usize);
    let (_, end) = follow(stream, count, &[stream.len().max(1)]);
    let (cleans, cut_end) = follow(stream, count, &sizes);
    assert_eq!(cut_end, end, "at another pace");
    for at in cleans {
        // Pushes may come after the last reply.
        let mut rest = complete.and_then(|end| stream.get(*end..at)).expect("clean, but replies are missing");
        while let Some((n, true)) = oracle::value(rest) {
            rest = &rest[n..];
        }
        assert!(rest.is_empty(), "clean at {at}, but {real:?}");
    }
    Corpus::Keep
});
