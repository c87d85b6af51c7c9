//! What a connection's TLS costs when it moves, and its records afterwards: `bench/wrk/run --tls` runs this and reads the lines
//! that begin with `row `. Nothing is asserted about times.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::{Direction, Incoming, MAX_PLAINTEXT, Outgoing, Proof, Stream, Suite, TlsState, Version};
use crate::frame;

/// Of states; of megabytes.
const STATES: usize = 20_000;
const MEGABYTES: usize = 200;
const MEGABYTE: usize = 1 << 20;
/// The numbers of the suites of TLS 1.3 (RFC 8446, B.4).
const SUITES: [(u16, &str); 3] =
    [(0x1301, "AES-128-GCM"), (0x1302, "AES-256-GCM"), (0x1303, "CHACHA20-POLY1305")];

/// The median, microseconds.
fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_nanos() as f64 / 1000.0
}

fn time(mut run: impl FnMut()) -> Duration {
    let begun = Instant::now();
    run();
    begun.elapsed()
}

fn states(mut run: impl FnMut()) -> Vec<Duration> {
    (0..STATES).map(|_| time(&mut run)).collect()
}

fn row(what: &str, suite: &str, times: Vec<Duration>) {
    let value = median(times);
    println!("row {{\"what\": \"{what}\", \"suite\": \"{suite}\", \"value\": {value:.3}}}");
}

/// A direction that is followed, as the library does beside OpenSSL.
fn stream(suite: Suite) -> Stream {
    let mut stream = Stream::new(Proof::None);
    stream.secret(suite, &[7; 64][..suite.hash_len()]).expect("a secret");
    stream
}

fn state(cipher: u16, [received, sent]: &[Stream; 2]) -> TlsState {
    TlsState {
        version: Version::Tls13,
        cipher,
        received: received.state().expect("between two records"),
        sent: sent.state().expect("between two records"),
        server_name: "bench.test".to_owned(),
        alpn: b"http/1.1".to_vec(),
    }
}

/// What one direction's records of a megabyte cost, each time: sealed, opened.
fn records(suite: Suite, direction: &Direction) -> [Vec<Duration>; 2] {
    let data = vec![b'x'; MEGABYTE];
    let (mut outgoing, mut incoming) =
        (Outgoing::new(suite, direction.clone()), Incoming::new(suite, direction.clone()));
    let mut wire = Vec::new();
    let mut sealed = Vec::new();
    let mut opened = Vec::new();
    for _ in 0..MEGABYTES {
        wire.clear();
        let mut spent = Duration::ZERO;
        // As the library writes: some records at a time.
        for part in data.chunks(4 * MAX_PLAINTEXT) {
            spent += time(|| outgoing.data(part).expect("sealed"));
            wire.extend_from_slice(outgoing.pending());
            outgoing.taken(outgoing.pending().len());
            outgoing.told(part.len());
        }
        sealed.push(spent);
        opened.push(time(|| incoming.open(&mut wire, usize::MAX)));
        assert_eq!(incoming.data().len(), MEGABYTE);
        incoming.used(MEGABYTE);
    }
    [sealed, opened]
}

#[test]
#[ignore = "a measurement: bench/wrk/run --tls"]
fn costs() {
    for (cipher, name) in SUITES {
        let suite = Suite::of(Version::Tls13, cipher).expect("a suite");
        let streams = [stream(suite), stream(suite)];
        let exported = state(cipher, &streams);
        row("export", name, states(|| drop(black_box(state(cipher, &streams)))));
        let import =
            || drop(black_box((exported.incoming().expect("keys"), exported.outgoing().expect("keys"))));
        row("import", name, states(import));
        let mut bytes = [0; frame::MAX_LOCAL_MESSAGE];
        let encode = || drop(black_box(frame::encode_local(&exported, black_box(&mut bytes))));
        row("encode", name, states(encode));
        let n = frame::encode_local(&exported, &mut bytes).expect("it has room");
        let decode = || drop(black_box(frame::decode_local::<TlsState>(black_box(&bytes[..n]))));
        row("decode", name, states(decode));
        let [sealed, opened] = records(suite, &exported.sent);
        row("seal 1 MB", name, sealed);
        row("open 1 MB", name, opened);
    }
}
