use super::*;

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let value = |d: u8| char::from(d).to_digit(16).expect("a digit") as u8;
    digits.chunks_exact(2).map(|pair| value(pair[0]) << 4 | value(pair[1])).collect()
}

fn array<const N: usize>(text: &str) -> [u8; N] {
    hex(text).try_into().expect("the right length")
}

fn tls13(number: u16) -> Suite {
    Suite::of(Version::Tls13, number).expect("a suite")
}

/// RFC 8448, 3: the client's and the server's application traffic secret, key and IV.
const RFC8448: [[&str; 3]; 2] = [
    [
        "9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5",
        "17422dda596ed5d9acd890e3c63f5051",
        "5b78923dee08579033e523d9",
    ],
    [
        "a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643",
        "9f02283b6c9c07efc26bb9f2ac92e356",
        "cf782b88dd83549aadf1e984",
    ],
];
/// There: records of both with their sequence numbers; the first of each carries the bytes from 0 to 49, the second is an
/// alert, close_notify.
const RFC8448_RECORDS: [[(u64, &str); 2]; 2] = [
    [
        (
            0,
            "1703030043a23f7054b62c94d0affafe8228ba55cbefacea42f914aa66bcab3f2b9819a8a5b46b395bd54a9a20441e2b62974e1f5a\
             6292a2977014bd1e3deae63aeebb21694915e4",
        ),
        (1, "1703030013c9872760655666b74d7ff1153efd6db6d0b0e3"),
    ],
    [
        (
            1,
            "17030300432e937e11ef4ac740e538ad36005fc4a46932fc3225d05f82aa1b36e30efaf97d90e6dffc602dcb501a59a8fcc49c4bf2\
             e5f0a21c0047c2abf332540dd032e167c2955d",
        ),
        (2, "1703030013b58fd67166ebf599d24720cfbe7efa7a8864a9"),
    ],
];

#[test]
fn the_keys_and_records_of_rfc_8448() {
    for ([secret, key, iv], records) in RFC8448.iter().zip(RFC8448_RECORDS) {
        let direction = Direction::from_secret(tls13(0x1301), &hex(secret)).expect("keys");
        assert_eq!((&direction.key[..16], &direction.iv[..]), (&hex(key)[..], &hex(iv)[..]));
        let mut opener = Opener::new(tls13(0x1301), direction.clone());
        let mut sealer = Sealer::new(tls13(0x1301), direction);
        let fifty: Vec<u8> = (0..50).collect();
        let contents = [(Content::Data, &fifty[..]), (Content::Alert, &[1, 0][..])];
        opener.seek(records[0].0);
        sealer = Sealer::new(tls13(0x1301), Direction { seq: records[0].0, ..sealer.state().clone() });
        for ((seq, record), (content, data)) in records.into_iter().zip(contents) {
            assert_eq!(opener.state().seq, seq);
            let mut record = hex(record);
            let mut sealed = Vec::new();
            sealer.seal(content, data, &mut sealed).expect("sealed");
            assert_eq!(sealed, record);
            let opened = opener.open(&mut record).expect("opened");
            assert_eq!((opened.content, &*opened.data), (content, data));
        }
    }
}

/// A connection of TLS 1.2 between two ends of OpenSSL 3.0.19: master secret and random values, the records of either side
/// from the first encrypted one (Finished) on.
struct Session {
    cipher: u16,
    master: &'static str,
    client_random: &'static str,
    server_random: &'static str,
    client: &'static [&'static str],
    server: &'static [&'static str],
}

const TLS12: [Session; 3] = [
    Session {
        cipher: 0xc02b, // ECDHE-ECDSA-AES128-GCM-SHA256
        master: "fc8f4766a864bc238c6215c3d2942a42fdb878bd8f2586f5cd1d1090b8e5fa781422e8ee29769879462c15cd53\
             d48fd2",
        client_random: "c8861f20d77ef9477231d4b6c8a0ebca257cd3385a7bec6fd2c1263ff27a5e7e",
        server_random: "a827fc7f712ee6abdc9083129ce5abd31685ef5482d85d262a518032f0a2e1b2",
        client: &[
            "1603030028d07cbf29fc8a6656e283bfdf837df990ada0fe9c0d517f96ff23d927f3fc94d7d508117e74b89f30",
            "170303002ad07cbf29fc8a66578157b7c51e988b5d4244ef86072370a4641a01470ab245db60d5072185a80a12\
             b5d6",
        ],
        server: &[
            "160303002829d2e832c30aba453dc3756f268952cd948432a0e240f2789e1c039d88bfcf16c2846d8edcf84c33",
            "170303002b29d2e832c30aba461a86fa9ef69f5a8487e0bcc0e08cc0416d37aabc6839ab1c7ff29dc824d6b958\
             fbc047",
            "170303001c29d2e832c30aba47e65fe0a138eac373bf558a996c7e77d715dff46f",
        ],
    },
    Session {
        cipher: 0xc030, // ECDHE-RSA-AES256-GCM-SHA384
        master: "d82068993d881763c4d5a6ecddce164f5587a799839f20d95293a56014d5ed540674a7dc2adb45152a5fda4079\
             2f4b26",
        client_random: "9c81b82cd7be51f9c989886234c2501e1f81ab8cb1aa85f58ae8703028d444c8",
        server_random: "af09be3520a7af2ce31e936337558fe848d45dffb4cb703c8ced687a240af68b",
        client: &[
            "1603030028c3839016c3d62317a764205e5f0bcfdda5f42bfbc4172bb7351a75a88b72827316fe91d076edbe8d",
            "170303002ac3839016c3d6231879515f55638480df8aaa4a33de27caa758b2f35f135ad921521cd97e052d0076\
             abe0",
        ],
        server: &[
            "16030300280426f616bf1637980549f5bf6d1a9fa3d98595cf505adfdf35b61d61f45a1f1d1acb0b5b6ddf885b",
            "170303002b0426f616bf1637999454bc900c7b9f361ce4bec55c1512059a11848c7877e3c976139cc7f9c4b2a8\
             50504c",
            "170303001c0426f616bf16379a5afbd56418c30e91184890fdafd41d787013f572",
        ],
    },
    Session {
        cipher: 0xcca8, // ECDHE-RSA-CHACHA20-POLY1305
        master: "669895598a1490de9570f66e1760ca53c46d9b99070e5447bb6293245ce9c395b2ebee0fcfa722ba210cbfea94\
             4594cd",
        client_random: "78b0fcaef713447dd1d628f2ce767301584032ba4f955cbf36223d9682f06425",
        server_random: "0a923b8a62c8f7559c060653a848d52110f008b7bf9f9039295f681112341919",
        client: &[
            "16030300207699b311f1aca4d85559a9417f589d297720964b9c061f7402e8b43f28ce0196",
            "1703030022efc3a15d0a71c41e3f4fed2bc0c5f4d5e3f890c51b583a82a6351f31fad64a649253",
        ],
        server: &[
            "16030300209b05f1a17f22b5aad31ab944a84bd1b7f72d6d902c0b93899ad9e49e4b402dd0",
            "1703030023c648372d76c7bc6109c0a65aba24532a2459b0f4502dc29d38a06af2328ce12ec96e98",
            "17030300146df5a6adb0fb39d5783d04123eb54c9eaf657442",
        ],
    },
];

#[test]
fn records_of_openssl_under_tls_1_2() {
    let data: [&[&[u8]]; 2] = [&[b"GET / HTTP/1.1\r\n\r\n"], &[b"HTTP/1.1 200 OK\r\n\r\n", b"more"]];
    for session in TLS12 {
        let suite = Suite::of(Version::Tls12, session.cipher).expect("a suite");
        let randoms = [array(session.client_random), array(session.server_random)];
        let directions = Direction::from_master(suite, &array(session.master), &randoms[0], &randoms[1]);
        for ((direction, records), data) in
            directions.expect("keys").into_iter().zip([session.client, session.server]).zip(data)
        {
            let mut opener = Opener::new(suite, direction.clone());
            let mut first = hex(records[0]);
            assert_eq!(opener.open(&mut first).expect("Finished").content, Content::Handshake);
            let mut state = opener.state().clone();
            for (record, data) in records[1..].iter().zip(data) {
                let (original, mut record) = (hex(record), hex(record));
                let opened = opener.open(&mut record).expect("data");
                assert_eq!((opened.content, &*opened.data), (Content::Data, *data));
                // The same again, byte for byte.
                if suite.has_explicit_nonce() {
                    state.explicit = explicit_nonce(&original[HEADER..]).expect("a nonce");
                }
                let mut sealer = Sealer::new(suite, state);
                let mut sealed = Vec::new();
                sealer.seal(Content::Data, data, &mut sealed).expect("sealed");
                assert_eq!(sealed, original);
                state = sealer.state().clone();
            }
            assert_eq!(state.seq, records.len() as u64);
            if suite.has_explicit_nonce() {
                let last = records.last().map(|r| hex(r)).expect("a record");
                assert_eq!(state.explicit, explicit_nonce(&last[HEADER..]).expect("a nonce") + 1);
            }
        }
    }
}

/// All suites of both versions, each with some keys.
pub(super) fn all() -> impl Iterator<Item = TlsState> {
    let suites = [
        (Version::Tls13, 0x1301_u16),
        (Version::Tls13, 0x1302),
        (Version::Tls13, 0x1303),
        (Version::Tls12, 0xc02f),
        (Version::Tls12, 0xc030),
        (Version::Tls12, 0xcca8),
    ];
    suites.into_iter().map(|(version, cipher)| {
        let suite = Suite::of(version, cipher).expect("a suite");
        let [received, sent] = match version {
            Version::Tls13 => {
                [7, 8].map(|b| Direction::from_secret(suite, &vec![b; suite.hash_len()]).expect("keys"))
            }
            Version::Tls12 => {
                Direction::from_master(suite, &[7; MAX_SECRET], &[1; RANDOM], &[2; RANDOM]).expect("keys")
            }
        };
        TlsState {
            version,
            cipher,
            received,
            sent,
            server_name: "a.example".into(),
            alpn: b"http/1.1".to_vec(),
        }
    })
}

#[test]
fn what_is_sealed_can_be_opened_once_and_in_order() {
    for state in all() {
        let mut sealer = Sealer::new(state.suite().expect("a suite"), state.received.clone());
        let data: Vec<u8> = (0..40_000_u32).map(|i| (i % 251) as u8).collect();
        let mut bytes = Vec::new();
        sealer.seal(Content::Data, &data, &mut bytes).expect("sealed");
        sealer.seal(Content::Data, b"", &mut bytes).expect("sealed");
        sealer.seal(Content::Alert, &[1, 0], &mut bytes).expect("sealed");
        assert_eq!(state.fits(&bytes), Ok(()));
        let mut opener = state.opener().expect("a suite");
        let (mut got, mut kinds, mut rest) = (Vec::new(), Vec::new(), &bytes[..]);
        while let Some(header) = Header::parse(rest) {
            assert!(header.total() <= MAX_RECORD);
            let (record, after) = rest.split_at(header.total());
            for at in [0, 3, 5, record.len() / 2, record.len() - 1] {
                let mut bad = record.to_vec();
                bad[at] ^= 1;
                assert!(opener.open(&mut bad).is_err(), "{state:?}: byte {at}");
            }
            let opened =
                opener.open(&mut record.to_vec()).map(|o| (o.content, o.data.to_vec())).expect("opened");
            assert_eq!(opener.open(&mut record.to_vec()), Err(TlsError::Decrypt), "{state:?}: twice");
            kinds.push(opened.0);
            got.extend((opened.0 == Content::Data).then_some(opened.1).into_iter().flatten());
            rest = after;
        }
        assert!(rest.is_empty());
        assert_eq!(got, data);
        assert_eq!(kinds, [Content::Data, Content::Data, Content::Data, Content::Data, Content::Alert]);
        assert_eq!(opener.state(), sealer.state());
        assert_ne!(state.fits(&bytes[1..]), Ok(()));
        assert_eq!(state.fits(&bytes[..4]), Ok(()), "not one header yet");
        assert_eq!(state.fits(&bytes[..400]), Ok(()), "not one record yet");
        let other = TlsState { received: state.sent.clone(), ..state.clone() };
        assert_eq!(other.fits(&bytes), Err(TlsError::Decrypt));
    }
}

#[test]
fn after_a_key_update_both_sides_have_the_next_key() {
    for state in all() {
        let suite = state.suite().expect("a suite");
        let (mut sealer, mut opener) =
            (state.sealer().expect("a suite"), Opener::new(suite, state.sent.clone()));
        let mut bytes = Vec::new();
        if state.version == Version::Tls12 {
            assert_eq!(sealer.update(false, &mut bytes), Err(TlsError::Suite));
            assert_eq!(opener.update(), Err(TlsError::Suite));
            continue;
        }
        for round in 0..3 {
            bytes.clear();
            sealer.update(round == 1, &mut bytes).expect("updated");
            let opened = opener.open(&mut bytes).expect("under the old key");
            // RFC 8446, 4.6.3.
            assert_eq!(
                (opened.content, &*opened.data),
                (Content::Handshake, &[24, 0, 0, 1, u8::from(round == 1)][..])
            );
            opener.update().expect("updated");
            assert_eq!(opener.state(), sealer.state());
            assert_eq!(sealer.state().seq, 0);
            bytes.clear();
            sealer.seal(Content::Data, b"next", &mut bytes).expect("sealed");
            assert_eq!(&*opener.open(&mut bytes).expect("under the new key").data, b"next");
        }
    }
}

#[test]
fn padding_is_taken_off_and_nothing_but_padding_is_no_record() {
    // RFC 8446, 5.4: a record of a peer that pads; sealed as data that looks like content, type and padding.
    let state = all().next().expect("a state");
    let suite = state.suite().expect("a suite");
    let seal = |inner: &[u8]| {
        let mut sealer = Sealer::new(suite, state.received.clone());
        let mut bytes = Vec::new();
        sealer.seal_inner(inner, &mut bytes).expect("sealed");
        bytes
    };
    let mut padded = seal(b"GET\x17\0\0\0\0");
    let opened = state.opener().expect("a suite").open(&mut padded).map(|o| (o.content, o.data.to_vec()));
    assert_eq!(opened, Ok((Content::Data, b"GET".to_vec())));
    for bad in [&b"\0\0\0"[..], b"", b"GET\x18"] {
        let result = state.opener().expect("a suite").open(&mut seal(bad)).map(|_| ());
        assert_eq!(result, Err(TlsError::Record), "{bad:?}");
    }
}

#[test]
fn headers() {
    for bad in
        ["", "17030300", "1803030001", "1302030001", "1702030001", "1703050001", "1703034801", "474554202f"]
    {
        assert_eq!(Header::parse(&hex(bad)), None, "{bad}");
    }
    let hello = Header::parse(&hex("1603010200ff")).expect("a header");
    assert_eq!((hello.content, hello.total()), (Content::Handshake, 517));
}

#[test]
fn keylog_lines() {
    let random = "a0".repeat(32);
    let line = |label: &str, secret: &str| format!("{label} {random} {secret}");
    let parse = |text: &str| KeylogLine::parse(text.as_bytes());
    for (name, label) in [
        ("CLIENT_TRAFFIC_SECRET_0", Label::Client),
        ("SERVER_TRAFFIC_SECRET_0", Label::Server),
        ("CLIENT_TRAFFIC_SECRET_N", Label::ClientNext),
        ("SERVER_TRAFFIC_SECRET_N", Label::ServerNext),
        ("CLIENT_EARLY_TRAFFIC_SECRET", Label::Early),
    ] {
        let parsed = parse(&line(name, &"Bc".repeat(32))).expect("a line");
        assert_eq!(
            (parsed.label, parsed.client_random, parsed.secret.bytes()),
            (label, [0xa0; 32], &[0xbc; 32][..])
        );
        assert!(parsed.secret.master().is_none());
        assert!(!format!("{parsed:?}").contains("188"), "{parsed:?}");
    }
    let master = parse(&(line("CLIENT_RANDOM", &"01".repeat(48)) + "\n")).expect("a line");
    assert_eq!(master.secret.master(), Some(&[1; 48]));
    for bad in [
        String::new(),
        "# comment".into(),
        line("EXPORTER_SECRET", "00"),
        line("SERVER_HANDSHAKE_TRAFFIC_SECRET", &"00".repeat(32)),
        line("CLIENT_RANDOM", ""),
        line("CLIENT_RANDOM", "0"),
        line("CLIENT_RANDOM", "0g"),
        line("CLIENT_RANDOM", &"00".repeat(49)),
        line("CLIENT_RANDOM", "00 11"),
        "CLIENT_RANDOM a0a0 00".into(),
    ] {
        assert!(parse(&bad).is_none(), "{bad}");
    }
}

#[test]
fn secrets_are_not_printed() {
    for state in all() {
        let text = format!("{state:?} {:?} {:?}", state.opener(), state.sealer());
        assert!(!text.contains("key") && !text.contains("7, 7") && !text.contains("secret"), "{text}");
    }
}

#[test]
fn a_state_of_no_suite_is_refused() {
    let mut state = all().next().expect("a state");
    state.cipher = 0xc02f;
    assert_eq!(state.suite(), Err(TlsError::Suite));
    assert_eq!(state.fits(&[]), Err(TlsError::Suite));
    state.version = Version::Tls12;
    assert!(state.suite().is_ok());
    // AES-CBC, CCM, anonymous.
    for other in [0x002f, 0xc027, 0xc09c, 0x00a6] {
        assert_eq!(Suite::of(Version::Tls12, other), None);
    }
}

/// Some records of a handshake as TLS 1.3 sends them before its keys are in use, then what `sealer` makes.
fn after_handshake(sealer: &mut Sealer, hidden: usize) -> Vec<u8> {
    let mut bytes = hex("160303000401020304140303000101");
    for _ in 0..hidden {
        bytes.extend(hex("1703030014000102030405060708090a0b0c0d0e0f00000000"));
    }
    sealer.seal(Content::Handshake, b"ticket", &mut bytes).expect("sealed");
    sealer.seal(Content::Data, &[5; 20_000], &mut bytes).expect("sealed");
    bytes
}

#[test]
fn a_stream_counts_the_records_under_its_key_however_it_is_cut() {
    let state = all().next().expect("a state");
    let suite = state.suite().expect("a suite");
    for cut in [1, 2, 5, 7, 100, 1 << 20] {
        for hidden in [0, 3] {
            for proof in [Proof::First, Proof::Every] {
                let mut sealer = state.sealer().expect("a suite");
                let bytes = after_handshake(&mut sealer, hidden);
                let (plain, sealed) = bytes.split_at(15);
                let mut stream = Stream::new(proof);
                plain.chunks(cut).for_each(|part| stream.pass(part));
                assert!(!stream.is_open() && stream.state().is_none());
                stream.secret(suite, &state.sent.secret[..32]).expect("keys");
                sealed.chunks(cut).for_each(|part| stream.pass(part));
                assert_eq!(stream.trouble(), None);
                assert_eq!(stream.state().map(|s| s.seq), Some(sealer.state().seq), "{cut} {hidden}");
                let mut update = Vec::new();
                sealer.update(false, &mut update).expect("updated");
                stream.pass(&update);
                assert_eq!(stream.next_secret(&[1; 32]), Err(TlsError::Secret));
                stream.next_secret(&sealer.state().secret[..32]).expect("the next secret");
                assert_eq!(stream.state().as_ref(), Some(sealer.state()));
                update.clear();
                sealer.seal(Content::Data, b"more", &mut update).expect("sealed");
                stream.pass(&update[..9]);
                assert!(stream.state().is_none() && stream.rest() == update.len() - 9);
                stream.pass(&update[9..]);
                assert_eq!(stream.state().as_ref(), Some(sealer.state()));
            }
        }
    }
}

#[test]
fn a_stream_of_tls_1_2_counts_from_the_change_of_cipher() {
    for session in TLS12 {
        let suite = Suite::of(Version::Tls12, session.cipher).expect("a suite");
        let randoms = [array(session.client_random), array(session.server_random)];
        let keys =
            Direction::from_master(suite, &array(session.master), &randoms[0], &randoms[1]).expect("keys");
        for (direction, records) in keys.into_iter().zip([session.client, session.server]) {
            let mut stream = Stream::new(Proof::Every);
            stream.pass(&hex("160303000401020304"));
            assert!(!stream.is_open());
            stream.pass(&hex("140303000101"));
            assert!(!stream.is_open());
            stream.pass(&hex(records[0]));
            assert!(stream.is_open() && !stream.has_keys());
            stream.keys(suite, direction);
            records[1..].iter().for_each(|record| stream.pass(&hex(record)));
            let state = stream.state().expect("keys");
            assert_eq!((state.seq, stream.trouble()), (records.len() as u64, None));
            if suite.has_explicit_nonce() {
                let last = records.last().map(|r| hex(r)).expect("a record");
                assert_eq!(Some(state.explicit - 1), explicit_nonce(&last[HEADER..]));
            }
            stream.pass(&hex("160303000401020304"));
            assert_eq!(stream.trouble(), Some(crate::reason::Reason::TlsRenegotiation));
            assert!(stream.state().is_none());
        }
    }
}

#[test]
fn a_stream_says_when_it_is_lost() {
    let state = all().next().expect("a state");
    let suite = state.suite().expect("a suite");
    let mut sealer = state.sealer().expect("a suite");
    let mut bytes = Vec::new();
    for _ in 0..3 {
        sealer.seal(Content::Data, b"data", &mut bytes).expect("sealed");
    }
    let length = bytes.len() / 3;
    let keyed = || {
        let mut stream = Stream::new(Proof::Every);
        stream.secret(suite, &state.sent.secret[..32]).expect("keys");
        stream
    };
    // A record is missing; one is not encrypted; bytes that are none.
    let mut stream = keyed();
    stream.pass(&bytes[..length]);
    stream.pass(&bytes[2 * length..]);
    assert_eq!(stream.trouble(), Some(crate::reason::Reason::TlsLost));
    for bad in ["15030300020100", "474554202f"] {
        let mut stream = keyed();
        stream.pass(&hex(bad));
        assert_eq!(stream.trouble(), Some(crate::reason::Reason::TlsLost), "{bad}");
    }
    let mut stream = keyed();
    for _ in 0..17 {
        stream.pass(&hex("1703030014000102030405060708090a0b0c0d0e0f00000000"));
    }
    assert_eq!(stream.trouble(), Some(crate::reason::Reason::TlsLost), "never the right key");
}
