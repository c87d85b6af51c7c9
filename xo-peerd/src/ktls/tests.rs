use xo_proto::tls::{Sealer, Suite as TlsSuite, Version as TlsVersion};

use super::*;

/// A state of every suite, both directions with keys of their own.
pub(crate) fn states() -> Vec<TlsState> {
    let tls13 = [0x1301, 0x1302, 0x1303].map(|cipher| (TlsVersion::Tls13, cipher));
    let tls12 = [0xc02f, 0xc030, 0xcca8].map(|cipher| (TlsVersion::Tls12, cipher));
    tls13.into_iter().chain(tls12).map(|(version, cipher)| state(version, cipher)).collect()
}

fn state(version: TlsVersion, cipher: u16) -> TlsState {
    let suite = TlsSuite::of(version, cipher).expect("a suite");
    let [mut received, mut sent] = match version {
        TlsVersion::Tls13 => [1, 2].map(|n| {
            tls::Direction::from_secret(suite, &vec![n; suite.hash_len()]).expect("a secret of that length")
        }),
        TlsVersion::Tls12 => {
            tls::Direction::from_master(suite, &[3; 48], &[4; 32], &[5; 32]).expect("TLS 1.2")
        }
    };
    (received.seq, sent.seq, sent.explicit) = (7, 1 << 33, 0x0102_0304_0506_0708);
    TlsState { version, cipher, received, sent, server_name: String::new(), alpn: Vec::new() }
}

/// What a client has sent: records of these kinds.
pub(crate) fn queue(state: &TlsState, records: &[(Content, &[u8])]) -> Vec<u8> {
    let mut sealer = Sealer::new(state.suite().expect("a suite"), state.received.clone());
    let mut bytes = Vec::new();
    for (content, data) in records {
        sealer.seal(*content, data, &mut bytes).expect("a record");
    }
    bytes
}

#[test]
fn what_waits_is_counted_as_it_will_be_read() {
    for state in states() {
        let mut bytes =
            queue(&state, &[(Content::Data, &[1; 100]), (Content::Data, &[]), (Content::Data, &[2; 9])]);
        assert_eq!(waiting(&state, &bytes), Ok(109), "{state:?}");
        // Of the last record, a part has not come yet.
        bytes.pop();
        assert_eq!(waiting(&state, &bytes), Ok(100));
        assert_eq!(waiting(&state, &bytes[..4]), Ok(0));
        let good_bye = queue(&state, &[(Content::Data, b"GET"), (Content::Alert, &CLOSE_NOTIFY)]);
        assert_eq!(waiting(&state, &good_bye), Ok(3));
    }
}

#[test]
fn what_a_program_could_not_read_is_refused() {
    for state in states() {
        let update = queue(&state, &[(Content::Data, b"GET"), (Content::Handshake, &[24, 0, 0, 1, 0])]);
        assert!(waiting(&state, &update).expect_err("a new key").contains("changed its key"));
        let mut bytes = queue(&state, &[(Content::Data, b"GET")]);
        *bytes.last_mut().expect("a byte") ^= 1;
        assert!(waiting(&state, &bytes).is_err(), "a record that cannot be opened");
        let mut bytes = queue(&state, &[(Content::Data, b"GET")]);
        bytes.extend(b"GET / HTTP/1.1\r\n");
        assert_eq!(waiting(&state, &bytes), Err("what waits is no record".into()));
    }
}

#[test]
fn keys_go_over_whole() {
    for state in states() {
        let suite = state.suite().expect("a suite");
        for direction in [&state.sent, &state.received] {
            let keys = keys(suite, direction).expect("keys");
            assert_eq!((keys.version, keys.suite), names(suite));
            assert_eq!((keys.key(), keys.seq), (&direction.key[..suite.key_len()], direction.seq));
            assert_eq!(keys.iv[..4], direction.iv[..4]);
            let rest = if suite.has_explicit_nonce() {
                direction.explicit.to_be_bytes()
            } else {
                direction.iv[4..].try_into().expect("8 bytes")
            };
            assert_eq!(keys.iv[4..], rest, "{state:?}");
        }
    }
}
