//! While a verdict is out: the daemon stops, and then is gone.

use std::time::{Duration, Instant};

use xo_tests::kinds::Kind;
use xo_tests::servers::{PeerdOptions, address};
use xo_tests::{Bed, Connection};

/// A server that has asked a daemon which then dies serves the request itself, however it waits for input.
fn daemon_dies(kind: Kind) {
    let bed = Bed::up(1, 1);
    let daemon = bed.peerd("host", &PeerdOptions::default());
    let server = kind.start(&bed, "host", |program| bed.preloaded("host", program));
    let get = |path: &'static str| {
        bed.spawn("client", move || {
            let mut c = Connection::to(&address("host"), 80).expect("connect");
            c.get("/loc/1k").expect("local");
            c.get(path).map(|r| r.node().to_owned())
        })
    };
    // The library has its channel.
    assert_eq!(get("/loc/1").join().expect("no panic").expect("local"), "host");
    daemon.signal(libc::SIGSTOP);
    let waiting: Vec<_> = (0..4).map(|_| get("/img/64k")).collect();
    // Long enough to ask; the daemon cannot say that it has been asked.
    std::thread::sleep(Duration::from_millis(500));
    assert!(waiting.iter().all(|w| !w.is_finished()), "{kind:?}: served although a verdict is out");
    let begun = Instant::now();
    drop(daemon);
    for one in waiting {
        assert_eq!(one.join().expect("no panic").expect("a response"), "host", "{kind:?}");
    }
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(8), "{kind:?}: {took:?}");
    assert_eq!(get("/img/1k").join().expect("no panic").expect("without a daemon"), "host");
    drop(server);
}

#[test]
fn a_daemon_that_dies_under_nginx() {
    daemon_dies(Kind::Nginx);
}

#[test]
fn a_daemon_that_dies_under_lighttpd() {
    daemon_dies(Kind::Lighttpd);
}

#[test]
fn a_daemon_that_dies_under_python() {
    daemon_dies(Kind::Python);
}
