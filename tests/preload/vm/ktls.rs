//! `xo_sys::ktls` against the kernel: both ends of a connection in it, every version and suite.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use xo_sys::ktls::{self, CLOSE_NOTIFY, Direction, Keys, KtlsError, Suite, Version, kind};
use xo_tests::content;

/// Both ends of a connection over loopback.
fn pair() -> [TcpStream; 2] {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let a = TcpStream::connect(listener.local_addr().expect("an address")).expect("connect");
    let b = listener.accept().expect("accept").0;
    for end in [&a, &b] {
        end.set_read_timeout(Some(Duration::from_secs(30))).expect("a time-out");
    }
    [a, b]
}

fn keys(version: Version, suite: Suite, name: &str, seq: u64) -> Keys {
    let iv = content::of(&format!("iv {name}"), 12).try_into().expect("12 bytes");
    Keys::new(version, suite, &content::of(name, suite.key_len()), iv, seq)
        .expect("a key of the right length")
}

/// A connection with kernel TLS at both ends, which have been at it for some time.
fn protected(version: Version, suite: Suite) -> [TcpStream; 2] {
    let ends = pair();
    let to_b = keys(version, suite, "to b", 7);
    let to_a = keys(version, suite, "to a", 1 << 33);
    for (end, send, receive) in [(&ends[0], &to_b, &to_a), (&ends[1], &to_a, &to_b)] {
        ktls::attach(end.as_raw_fd()).expect("the layer");
        ktls::install(end.as_raw_fd(), Direction::Send, send).expect("keys to send with");
        ktls::install(end.as_raw_fd(), Direction::Receive, receive).expect("keys to receive with");
    }
    ends
}

fn every_one(mut test: impl FnMut(Version, Suite)) {
    for version in Version::ALL {
        for suite in Suite::ALL {
            println!("{version:?} {suite:?}");
            test(version, suite);
        }
    }
}

/// Puts this many bytes of a file into a socket, without reading them.
fn sendfile(socket: &TcpStream, file: &File, mut size: usize) {
    while size > 0 {
        // SAFETY: open descriptors and numbers; the file's own offset is used.
        let n = unsafe { libc::sendfile(socket.as_raw_fd(), file.as_raw_fd(), std::ptr::null_mut(), size) };
        size -= usize::try_from(n).unwrap_or_else(|_| panic!("sendfile: {}", io::Error::last_os_error()));
    }
}

#[test]
#[ignore = "needs a kernel with TLS: scripts/vm"]
fn data_pass_by_write_and_sendfile_and_records_are_counted() {
    let path = std::env::temp_dir().join(format!("xo-ktls-{}", std::process::id()));
    let long = content::of("long", 150_000);
    std::fs::write(&path, &long).expect("a file");
    every_one(|version, suite| {
        let [mut a, mut b] = protected(version, suite);
        // Each write is a record, up to 16 KiB.
        for size in [1, 100, 16 << 10] {
            a.write_all(&long[..size]).expect("write");
            let mut got = vec![0; size];
            b.read_exact(&mut got).expect("read");
            assert!(got == long[..size], "{size} bytes differ");
        }
        for (end, direction) in [(&a, Direction::Send), (&b, Direction::Receive)] {
            assert_eq!(ktls::read(end.as_raw_fd(), direction).expect("state").seq, 7 + 3);
        }
        // The other way, and more than fits into one.
        let file = File::open(&path).expect("the file");
        let reader = std::thread::spawn(move || {
            let mut got = vec![0; 150_000];
            a.read_exact(&mut got).map(|()| (a, got))
        });
        sendfile(&b, &file, long.len());
        let (a, got) = reader.join().expect("no panic").expect("read");
        assert!(got == long, "what sendfile sent differs");
        let sent = ktls::read(b.as_raw_fd(), Direction::Send).expect("state");
        assert_eq!(ktls::read(a.as_raw_fd(), Direction::Receive).expect("state").seq, sent.seq);
        assert!(sent.seq >= (1 << 33) + 10, "{sent:?}");
        let first = keys(version, suite, "to a", 1 << 33);
        assert!(sent.key() == first.key() && sent.iv[..4] == first.iv[..4], "the keys are others");
        // Only AES-GCM in TLS 1.2 has a part that moves.
        let moves = version == Version::Tls12 && suite != Suite::ChaCha20Poly1305;
        assert_eq!(sent.iv != first.iv, moves, "the explicit part of the nonce");
    });
    std::fs::remove_file(path).expect("the file");
}

#[test]
#[ignore = "needs a kernel with TLS: scripts/vm"]
fn records_of_other_types_are_told_apart() {
    every_one(|version, suite| {
        let [mut a, mut b] = protected(version, suite);
        let mut buffer = [0; 100];
        a.write_all(b"data").expect("write");
        ktls::send_record(a.as_raw_fd(), kind::ALERT, &CLOSE_NOTIFY, 0).expect("an alert");
        assert_eq!(
            ktls::receive_record(b.as_raw_fd(), &mut buffer, 0).expect("data"),
            (kind::DATA, 4),
            "data first"
        );
        let e = b.read(&mut buffer).expect_err("an alert is no data");
        assert_eq!(e.raw_os_error(), Some(libc::EIO));
        let got = ktls::receive_record(b.as_raw_fd(), &mut buffer, 0).expect("the alert");
        assert_eq!((got, &buffer[..2]), ((kind::ALERT, 2), &CLOSE_NOTIFY[..]));
        drop(a);
        assert_eq!(ktls::receive_record(b.as_raw_fd(), &mut buffer, 0).expect("the end"), (kind::DATA, 0));
    });
}

#[test]
#[ignore = "needs a kernel with TLS: scripts/vm"]
fn what_does_not_fit_is_refused_by_its_name() {
    every_one(|version, suite| {
        let [a, _b] = protected(version, suite);
        let fd = a.as_raw_fd();
        assert!(matches!(ktls::attach(fd), Err(KtlsError::Taken)));
        let changed = ktls::install(fd, Direction::Send, &keys(version, suite, "new", 0));
        if version == Version::Tls13 && ktls::probe().expect("a probe").rekey {
            changed.expect("a new key");
        } else {
            assert!(matches!(changed, Err(KtlsError::NoRekey)), "{changed:?}");
        }
        // The directions must agree.
        let [a, _b] = pair();
        ktls::attach(a.as_raw_fd()).expect("the layer");
        ktls::install(a.as_raw_fd(), Direction::Send, &keys(version, suite, "some", 0)).expect("keys");
        let other = Suite::ALL.into_iter().find(|s| *s != suite).expect("another");
        let refused = ktls::install(a.as_raw_fd(), Direction::Receive, &keys(version, other, "some", 0));
        assert!(matches!(refused, Err(KtlsError::Unsupported(..))), "{refused:?}");
        assert!(matches!(ktls::read(a.as_raw_fd(), Direction::Receive), Err(KtlsError::NotInstalled)));
    });
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    assert!(matches!(ktls::attach(listener.as_raw_fd()), Err(KtlsError::NotEstablished)));
}

#[test]
#[ignore = "needs a kernel with TLS: scripts/vm"]
fn a_wrong_number_or_key_does_not_decrypt() {
    every_one(|version, suite| {
        for wrong in [keys(version, suite, "right", 6), keys(version, suite, "wrong", 5)] {
            let [mut a, mut b] = pair();
            for end in [&a, &b] {
                ktls::attach(end.as_raw_fd()).expect("the layer");
            }
            ktls::install(a.as_raw_fd(), Direction::Send, &keys(version, suite, "right", 5)).expect("keys");
            ktls::install(b.as_raw_fd(), Direction::Receive, &wrong).expect("keys");
            a.write_all(b"data").expect("write");
            let e = b.read(&mut [0; 4]).expect_err("it does not decrypt");
            assert_eq!(e.raw_os_error(), Some(libc::EBADMSG), "{e}");
        }
    });
}
