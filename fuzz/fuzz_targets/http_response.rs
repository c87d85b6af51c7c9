//! What a server writes: followed the same however it is cut, and `Clean` only where a plain reading of the
//! specification has every response complete.
//!
//! Input: a byte for the number of requests, one whose bits say which of them are HEAD, four that are sizes of writes,
//! one whose bits say which writes are unseen; then the stream.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use xo_proto::http::{self, Method, Progress, ResponseTracker};

#[expect(dead_code, reason = "requests are the other target's")]
#[path = "../../xo-proto/src/http/tests/oracle.rs"]
mod oracle;

/// Where the stream was clean, and how it ended.
fn follow(stream: &[u8], methods: &[Method], sizes: &[usize], unseen: u8) -> (Vec<usize>, Progress) {
    let mut tracker = ResponseTracker::default();
    methods.iter().for_each(|m| tracker.asked(*m));
    let (mut at, mut i, mut cleans) = (0, 0, Vec::new());
    while at < stream.len() {
        let n = sizes[i % sizes.len()].min(stream.len() - at);
        match unseen >> (i % 8) & 1 {
            0 => tracker.wrote(&stream[at..at + n]),
            _ => tracker.wrote_unseen(n as u64),
        }
        at += n;
        i += 1;
        if tracker.progress() == Progress::Clean {
            cleans.push(at);
        }
    }
    (cleans, tracker.progress())
}

fuzz_target!(|data: &[u8]| -> Corpus {
    let Some((&[count, heads, a, b, c, d, unseen], stream)) = data.split_first_chunk::<7>() else {
        return Corpus::Reject;
    };
    let method = |i: u8| if heads >> i & 1 == 1 { Method::Head } else { Method::Other };
    let methods: Vec<_> = (0..=count % 4).map(method).collect();
    let sizes = [a, b, c, d].map(|n| usize::from(n) + 1);
    let real = oracle::responses(stream, &methods);
    let complete = real.last().filter(|_| real.len() == methods.len());
    let (_, end) = follow(stream, &methods, &[stream.len().max(1)], 0);
    let (cleans, cut_end) = follow(stream, &methods, &sizes, 0);
    assert_eq!(cut_end, end, "at another pace");
    let (cleans_unseen, _) = follow(stream, &methods, &sizes, unseen);
    for at in cleans.iter().chain(&cleans_unseen) {
        assert_eq!(complete, Some(at), "clean, but {real:?}");
    }
    Corpus::Keep
});
