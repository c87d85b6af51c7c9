//! Clients that leave, or go on sending, at every moment of a hand-off.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use socket2::SockRef;
use xo_tests::counters::Counters;
use xo_tests::program::{stay_on_one_processor, wait_for};
use xo_tests::servers::address;
use xo_tests::{Bed, Connection, content};

const AT_ONCE: u32 = 40;
const WAVES: u32 = 8;

#[derive(Clone, Copy, Debug)]
enum Then {
    /// Ends its sending half, and reads on.
    Finish,
    /// Closes with unread data to come.
    Leave,
    /// Resets.
    Reset,
}

/// Busy for so long: sleeping takes longer than the moments that are meant.
fn spin(time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        std::hint::spin_loop();
    }
}

/// The `i`th delay of many, without a pattern: 0 to 300 us, and for every second and third more, for on a busy machine
/// a hand-off begins later.
fn delay(i: u32) -> Duration {
    let range = [300_000, 3_000_000, 12_000_000][i as usize % 3];
    Duration::from_nanos(u64::from(i.wrapping_mul(2_654_435_761) % range))
}

fn depart(i: u32, then: Then) -> std::io::Result<()> {
    let mut c = Connection::to(&address("host"), 80)?;
    c.get("/loc/1")?;
    c.send(b"GET /img/64k HTTP/1.1\r\nHost: x\r\n\r\n")?;
    spin(delay(i));
    match then {
        Then::Finish => {
            c.stream().shutdown(std::net::Shutdown::Write)?;
            // nginx may cut a response off when its client has ended; what came is what was asked for.
            let got = c.rest()?;
            let body = content::of("/img/64k", 64 << 10);
            let begin = got.windows(4).position(|w| w == b"\r\n\r\n").map_or(got.len(), |n| n + 4);
            if !body.starts_with(&got[begin..]) {
                return Err(std::io::Error::other("wrong bytes"));
            }
        }
        Then::Leave => {}
        Then::Reset => SockRef::from(c.stream()).set_linger(Some(Duration::ZERO))?,
    }
    Ok(())
}

/// Connections that must not notice anything; they go on until `stop`.
fn bystanders(bed: &Bed, stop: &Arc<AtomicBool>) -> Vec<std::thread::JoinHandle<std::io::Result<u32>>> {
    (0..6)
        .map(|i| {
            let stop = Arc::clone(stop);
            bed.spawn("client", move || {
                let mut c = Connection::to(&address("host"), 80)?;
                let mut served = 0;
                while !stop.load(Ordering::Relaxed) {
                    c.get(if i % 2 == 0 { "/loc/64k" } else { "/img/64k" })?;
                    served += 1;
                }
                Ok(served)
            })
        })
        .collect()
}

#[test]
fn clients_that_leave_in_the_middle() {
    let bed = Bed::up(1, 1);
    let programs = bed.everything();
    let count = || programs.iter().map(|p| p.descriptors()).collect::<Vec<_>>();
    bed.on("client", || depart(0, Then::Finish)).expect("one");
    bed.wait_idle(&["t1"]);
    let before = count();
    let stop = Arc::new(AtomicBool::new(false));
    let others = bystanders(&bed, &stop);
    for wave in 0..WAVES {
        for then in [Then::Finish, Then::Leave, Then::Reset] {
            let all: Vec<_> =
                (0..AT_ONCE).map(|i| bed.spawn("client", move || depart(wave * AT_ONCE + i, then))).collect();
            for one in all {
                let result = one.join().expect("no panic");
                assert!(result.is_ok(), "{then:?}: {result:?}");
            }
        }
    }
    stop.store(true, Ordering::Relaxed);
    for other in others {
        let served = other.join().expect("no panic");
        assert!(served.as_ref().is_ok_and(|n| *n > 0), "a bystander: {served:?}");
    }
    let status = bed.try_status("host").expect("status");
    println!("offloads {} refused {}", status["offloads_total"], status["refused_by_reason"]);
    assert!(bed.status("host", "/offloads_total") > u64::from(AT_ONCE * 3), "{status}");
    assert!(bed.status("host", "/refused_total") > 0, "{status}");
    bed.wait_idle(&["host", "t1"]);
    let mut after = count();
    wait_for(Duration::from_secs(10), || {
        after = count();
        after == before
    });
    assert_eq!(after, before, "descriptors of xo-peerd on host, t1 and nginx on host, t1");
}

/// An upload whose body comes in two parts, the second `delay` after the first; how long it took.
fn upload(i: u32, directory: &str) -> std::io::Result<(String, Duration)> {
    let mut c = Connection::to(&address("host"), 80)?;
    c.get("/loc/1")?;
    let path = format!("/{directory}/{i}-2000");
    let body = content::of(&path, 2000);
    let head = format!("PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\n\r\n");
    let begun = Instant::now();
    c.send(&[head.as_bytes(), &body[..500]].concat())?;
    spin(delay(i));
    c.send(&body[500..])?;
    let node = c.stored(&path)?.node().to_owned();
    Ok((node, begun.elapsed().saturating_sub(delay(i))))
}

fn distribution(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |p: usize| times[(times.len() - 1) * p / 1000].as_micros();
    format!("p50 {} p90 {} p99 {} p99.9 {} max {} us", at(500), at(900), at(990), at(999), at(1000))
}

#[test]
fn data_in_the_middle_costs_no_time_out() {
    const N: u32 = 600;
    stay_on_one_processor();
    let bed = Bed::up(1, 1);
    let _programs = bed.everything();
    let before = Counters::of(&bed);
    let mut all = Vec::new();
    for (directory, node) in [("put", "host"), ("up", "t1")] {
        let times = bed.on("client", move || {
            (0..N)
                .map(|i| {
                    let (by, took) = upload(i, directory).unwrap_or_else(|e| panic!("{directory} {i}: {e}"));
                    assert_eq!(by, node);
                    took
                })
                .collect::<Vec<_>>()
        });
        println!("upload served by {node}: {}", distribution(times.clone()));
        all.push(times);
    }
    for i in (0..N).step_by(50) {
        let stored = std::fs::read(bed.root("t1").join(format!("up/{i}-2000"))).expect("the upload");
        assert!(stored == content::of(&format!("/up/{i}-2000"), 2000), "upload {i}");
    }
    let counted = Counters::of(&bed).since(&before);
    // The least retransmission time-out is 200 ms.
    let slow = all[1].iter().filter(|t| **t >= Duration::from_millis(200)).count();
    assert_eq!((slow, counted.get("TCPTimeouts")), (0, 0), "{}", counted.troubles());
    assert_eq!(bed.status("host", "/offloads_total"), u64::from(N));
    bed.wait_idle(&["host", "t1"]);
}
