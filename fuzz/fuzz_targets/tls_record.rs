//! TLS records: whatever the bytes are, opening them does not crash, takes what was sealed and nothing else, and leaves the
//! state as it was when it fails; a keylog line is read or it is not.
//!
//! Input: a number (a suite, or a keylog line), a byte that the secrets are made of, then records.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use xo_proto::tls::{
    Content, Direction, Header, KeylogLine, MAX_PLAINTEXT, MAX_RECORD, OVERHEAD, Opener, Sealer, Suite,
    TlsState, Version,
};

const SUITES: [(Version, u16); 6] = [
    (Version::Tls13, 0x1301),
    (Version::Tls13, 0x1302),
    (Version::Tls13, 0x1303),
    (Version::Tls12, 0xc02f),
    (Version::Tls12, 0xc030),
    (Version::Tls12, 0xcca8),
];

fn state((version, cipher): (Version, u16), secret: u8) -> (Suite, TlsState) {
    let suite = Suite::of(version, cipher).expect("a suite");
    let [received, sent] = match version {
        Version::Tls13 => [secret, !secret]
            .map(|b| Direction::from_secret(suite, &vec![b; suite.hash_len()]).expect("keys")),
        Version::Tls12 => {
            Direction::from_master(suite, &[secret; 48], &[secret; 32], &[secret; 32]).expect("keys")
        }
    };
    (suite, TlsState { version, cipher, received, sent, server_name: String::new(), alpn: Vec::new() })
}

fn records(suite: Suite, state: &TlsState, mut bytes: &[u8]) {
    let fits = state.fits(bytes);
    let mut opener = state.opener().expect("a suite");
    let mut first = true;
    while let Some(header) = Header::parse(bytes) {
        assert!(header.total() <= MAX_RECORD);
        let Some((record, rest)) = bytes.split_at_checked(header.total()) else { break };
        bytes = rest;
        let before = opener.state().clone();
        let mut opened = record.to_vec();
        let result = opener.open(&mut opened).map(|o| (o.content, o.data.to_vec()));
        if std::mem::take(&mut first) {
            assert_eq!(fits.is_ok(), result.is_ok());
        }
        match result {
            Ok((_, data)) => {
                assert!(data.len() <= MAX_PLAINTEXT && record.len() >= data.len());
                assert_eq!(opener.state().seq, before.seq + 1);
            }
            Err(_) => assert_eq!(opener.state(), &before),
        }
    }
    // What is made of the same bytes is read as the same.
    let mut sealer = Sealer::new(suite, state.sent.clone());
    let mut opener = Opener::new(suite, state.sent.clone());
    let mut sealed = Vec::new();
    sealer.seal(Content::Data, bytes, &mut sealed).expect("sealed");
    assert!(sealed.len() <= bytes.len() + (bytes.len() / MAX_PLAINTEXT + 1) * OVERHEAD);
    let mut got = Vec::new();
    let mut rest = &mut sealed[..];
    while let Some(header) = Header::parse(rest) {
        let (record, after) = rest.split_at_mut(header.total());
        got.extend_from_slice(opener.open(record).expect("what was sealed").data);
        rest = after;
    }
    assert!(rest.is_empty() && got == bytes);
    assert_eq!(opener.state(), sealer.state());
}

fuzz_target!(|data: &[u8]| -> Corpus {
    let &[number, secret, ref bytes @ ..] = data else { return Corpus::Reject };
    match SUITES.get(usize::from(number) % 7) {
        Some(suite) => {
            let (suite, state) = state(*suite, secret);
            records(suite, &state, bytes);
        }
        None => {
            if let Some(line) = KeylogLine::parse(bytes) {
                assert!(!line.secret.bytes().is_empty() && line.secret.bytes().len() <= 48);
            }
        }
    }
    Corpus::Keep
});
