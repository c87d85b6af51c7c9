//! Connections that are on their way from target to target, or home: what clients send, or how they leave, at every moment of it.

use std::io;
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use socket2::SockRef;
use xo_tests::counters::Counters;
use xo_tests::program::{Program, stay_on_one_processor, wait_for};
use xo_tests::servers::{address, address6};
use xo_tests::{Bed, Connection, client, content};

const NODES: [&str; 3] = ["host", "t1", "t2"];
/// Where a connection is, and where its next request belongs: on, home, home from a second target, and out after it was home.
const WAYS: [[&str; 2]; 4] = [["t1", "t2"], ["t1", "host"], ["t2", "host"], ["host", "t1"]];

/// A connection that was moved to the first place of the way, by another place when it is the home.
fn placed(way: [&str; 2], number: usize) -> io::Result<Connection> {
    let host = if number.is_multiple_of(2) { address("host") } else { address6("host") };
    let mut c = Connection::to(&host, 80)?;
    let places: &[&str] = if way[0] == "host" { &["t2", "host"] } else { &way[..1] };
    for place in places {
        at(&c.get(&format!("/img/{place}/1"))?, place)?;
    }
    Ok(c)
}

/// Who must have answered.
fn at(response: &client::Response, place: &str) -> io::Result<()> {
    let node = response.node();
    if node == place { Ok(()) } else { Err(io::Error::other(format!("{node} instead of {place}"))) }
}

/// Busy for so long: sleeping takes longer than the moments that are meant.
fn spin(time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        std::hint::spin_loop();
    }
}

/// The `i`th delay of many, without a pattern: 0 to 300 us, for every second and third more.
fn delay(i: usize) -> Duration {
    let range = [300_000, 3_000_000, 12_000_000][i % 3];
    let i = u32::try_from(i).expect("a small number");
    Duration::from_nanos(u64::from(i.wrapping_mul(2_654_435_761) % range))
}

/// Three nodes; each has the objects of its own only, unless `everywhere`.
fn up(everywhere: bool) -> (Bed, Vec<Program>) {
    let bed = Bed::up(2, 1);
    let options = bed.sharded_options("");
    let mut programs: Vec<_> = NODES.iter().map(|n| bed.peerd(n, &options)).collect();
    programs.extend(bed.sharded_servers(everywhere));
    (bed, programs)
}

/// An upload of which the second part comes `delay` after the first.
fn upload(way: [&str; 2], i: usize, size: usize) -> io::Result<()> {
    let mut c = placed(way, i)?;
    let path = format!("/up/{}/{}-{i}", way[1], way[0]);
    let body = content::of(&path, size);
    let head = format!("PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n");
    c.send(&[head.as_bytes(), &body[..size / 4]].concat())?;
    spin(delay(i));
    c.send(&body[size / 4..])?;
    at(&c.stored(&path)?, way[1])
}

/// The paper's block drops what comes meanwhile: a time-out of 200 ms and more for each.
#[test]
fn data_in_the_middle_costs_no_time_out() {
    stay_on_one_processor();
    let (bed, programs) = up(false);
    for (size, count) in [(2000, 150), (300_000, 30)] {
        for way in WAYS {
            let before = Counters::of(&bed);
            bed.on("client", move || {
                for i in 0..count {
                    upload(way, i, size).unwrap_or_else(|e| panic!("{way:?}, upload {i} of {size}: {e}"));
                }
            });
            let counted = Counters::of(&bed).since(&before);
            println!("{way:?}, {size} bytes: {}", counted.troubles());
            assert_eq!(counted.get("TCPTimeouts"), 0, "{way:?}, {size} bytes: {}", counted.troubles());
            for i in 0..count {
                let path = format!("/up/{}/{}-{i}", way[1], way[0]);
                let stored = std::fs::read(bed.root(way[1]).join(&path[1..])).expect("the upload");
                client::same(&path, &stored, &content::of(&path, size)).expect("the bytes that were sent");
            }
        }
    }
    bed.wait_idle(&NODES);
    bed.nothing_refused(&NODES);
    drop(programs);
}

#[derive(Clone, Copy, Debug)]
enum Then {
    /// Ends its sending half, and reads on.
    Finish,
    /// Closes with unread data to come.
    Leave,
    /// Resets.
    Reset,
}

fn depart(way: [&str; 2], i: usize, then: Then) -> io::Result<()> {
    let mut c = placed(way, i)?;
    let path = format!("/img/{}/64k", way[1]);
    c.send(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes())?;
    spin(delay(i));
    match then {
        Then::Finish => {
            c.stream().shutdown(Shutdown::Write)?;
            // nginx may cut a response off when its client has ended; what came is what was asked for.
            let got = c.rest()?;
            let begin = got.windows(4).position(|w| w == b"\r\n\r\n").map_or(got.len(), |n| n + 4);
            if !content::of(&path, 64 << 10).starts_with(&got[begin..]) {
                return Err(io::Error::other("wrong bytes"));
            }
        }
        Then::Leave => {}
        Then::Reset => SockRef::from(c.stream()).set_linger(Some(Duration::ZERO))?,
    }
    Ok(())
}

/// Connections that move with every request, and must not notice anything; they go on until `stop`.
fn bystanders(bed: &Bed, stop: &Arc<AtomicBool>) -> Vec<JoinHandle<io::Result<usize>>> {
    let one = |n: usize| {
        let stop = Arc::clone(stop);
        bed.spawn("client", move || {
            let mut c = Connection::to(&address("host"), 80)?;
            let mut served = 0;
            while !stop.load(Ordering::Relaxed) {
                let place = NODES[(n + served) % NODES.len()];
                // A refused hand-off is served where the connection is.
                c.get(&format!("/img/{place}/{}", if n.is_multiple_of(2) { "64k" } else { "1k" }))?;
                served += 1;
            }
            Ok(served)
        })
    };
    (0..4).map(one).collect()
}

#[test]
fn clients_that_leave_in_the_middle() {
    const AT_ONCE: usize = 30;
    const WAVES: usize = 3;
    let (bed, programs) = up(true);
    let count = || programs.iter().map(Program::descriptors).collect::<Vec<_>>();
    for way in WAYS {
        bed.on("client", move || depart(way, 0, Then::Finish)).expect("one");
    }
    bed.wait_idle(&NODES);
    let before = count();
    let stop = Arc::new(AtomicBool::new(false));
    let others = bystanders(&bed, &stop);
    for wave in 0..WAVES {
        for (way, then) in
            WAYS.into_iter().flat_map(|w| [Then::Finish, Then::Leave, Then::Reset].map(|t| (w, t)))
        {
            let one = |i| bed.spawn("client", move || depart(way, wave * AT_ONCE + i, then));
            let all: Vec<_> = (0..AT_ONCE).map(one).collect();
            for one in all {
                let result = one.join().expect("no panic");
                // The machine that refused to let the connection go serves all objects, too: to be placed may fail.
                let told = result.as_ref().is_err_and(|e| e.to_string().contains("instead of"));
                assert!(result.is_ok() || told, "{way:?} {then:?}: {result:?}");
            }
        }
    }
    stop.store(true, Ordering::Relaxed);
    for other in others {
        let served = other.join().expect("no panic");
        assert!(served.as_ref().is_ok_and(|n| *n > 0), "a bystander: {served:?}");
    }
    for node in NODES {
        let status = bed.try_status(node).expect("a status");
        println!(
            "{node}: {} out, {} on, {} home; refused {}, failed {}",
            status["offloads_total"],
            status["onward_total"],
            status["sent_home_total"],
            status["refused_by_reason"],
            status["failed_by_reason"]
        );
    }
    assert!(bed.status("t1", "/onward_total") > AT_ONCE as u64, "{:?}", bed.try_status("t1"));
    bed.wait_idle(&NODES);
    let mut after = count();
    wait_for(Duration::from_secs(10), || {
        after = count();
        after == before
    });
    assert_eq!(after, before, "descriptors of xo-peerd, then nginx, on host, t1, t2");
}

/// What a request says beside its path: method, header fields, body. The artifact's nginx carries only the path.
fn whole_request(way: [&str; 2], i: usize) -> io::Result<()> {
    let to = way[1];
    let (path, whole) = (format!("/img/{to}/64k"), content::of(&format!("/img/{to}/64k"), 64 << 10));
    let mut c = placed(way, i)?;
    c.send(format!("GET {path} HTTP/1.1\r\nHost: x\r\nRange: bytes=1000-1999\r\n\r\n").as_bytes())?;
    let part = c.response(false)?;
    at(&part, to)?;
    client::same("a range", &part.body, &whole[1000..2000])?;

    let mut c = placed(way, i)?;
    c.send(format!("HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes())?;
    let head = c.response(true)?;
    at(&head, to)?;
    assert_eq!((head.status, head.header("Content-Length")), (200, Some("65536")));
    let tag = head.header("ETag").expect("nginx tells one").to_owned();
    at(&c.get(&format!("/img/{}/1", way[0]))?, way[0])?;
    c.send(format!("GET {path} HTTP/1.1\r\nHost: x\r\nIf-None-Match: {tag}\r\n\r\n").as_bytes())?;
    let same = c.response(false)?;
    at(&same, to)?;
    assert_eq!(same.status, 304);

    // The client waits to be told that it may send the body: the connection must be there to tell it.
    let mut c = placed(way, i)?;
    let path = format!("/up/{to}/expected-{}-{i}", way[0]);
    let body = content::of(&path, 100_000);
    let fields = "Host: x\r\nContent-Length: 100000\r\nExpect: 100-continue";
    c.send(format!("PUT {path} HTTP/1.1\r\n{fields}\r\n\r\n").as_bytes())?;
    assert_eq!(c.any_response(false)?.status, 100);
    c.send(&body)?;
    at(&c.stored(&path)?, to)?;

    let mut c = placed(way, i)?;
    let path = format!("/up/{to}/chunked-{}-{i}", way[0]);
    c.send(format!("PUT {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n").as_bytes())?;
    for piece in content::of(&path, 100_000).chunks(7777) {
        c.send(&[format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat())?;
    }
    c.send(b"0\r\n\r\n")?;
    at(&c.stored(&path)?, to)
}

#[test]
fn method_fields_and_body_go_along() {
    let (bed, programs) = up(false);
    let before = Counters::of(&bed);
    for way in WAYS {
        bed.on("client", move || {
            (0..10).for_each(|i| whole_request(way, i).unwrap_or_else(|e| panic!("{way:?}, {i}: {e}")));
        });
        for (i, kind) in (0..10).flat_map(|i| ["expected", "chunked"].map(|k| (i, k))) {
            let path = format!("/up/{}/{kind}-{}-{i}", way[1], way[0]);
            let stored = std::fs::read(bed.root(way[1]).join(&path[1..])).expect("the upload");
            client::same(&path, &stored, &content::of(&path, 100_000)).expect("the bytes that were sent");
        }
    }
    let counted = Counters::of(&bed).since(&before);
    assert_eq!(counted.get_on("client", "EstabResets"), 0, "{}", counted.troubles());
    bed.wait_idle(&NODES);
    bed.nothing_refused(&NODES);
    drop(programs);
}

/// Requests behind each other without waiting, each for another node, with responses and bodies larger than what is under way at a
/// time, and a client that reads slowly. A connection with unsent data stays for that request, which is counted.
fn many_at_once(number: usize) -> io::Result<Vec<String>> {
    let mut c = placed(WAYS[number % WAYS.len()], number)?;
    let place = |i: usize| NODES[(number + i) % NODES.len()];
    let path = |i: usize| match i % 4 {
        0 => format!("/img/{}/1m", place(i)),
        1 => format!("/up/{}/many-{number}-{i}", place(i)),
        _ => format!("/img/{}/{}", place(i), if i % 4 == 2 { "1k" } else { "64k" }),
    };
    let request = |i: usize| match i % 4 {
        1 => {
            let head = format!("PUT {} HTTP/1.1\r\nHost: x\r\nContent-Length: 20000\r\n\r\n", path(i));
            [head.as_bytes(), &content::of(&path(i), 20_000)].concat()
        }
        _ => format!("GET {} HTTP/1.1\r\nHost: x\r\n\r\n", path(i)).into_bytes(),
    };
    let mut elsewhere = Vec::new();
    c.send(&(0..12).flat_map(request).collect::<Vec<_>>())?;
    for i in 0..12 {
        spin(delay(number + i));
        let response = if i % 4 == 1 { c.stored(&path(i))? } else { c.object(&path(i))? };
        if response.node() != place(i) {
            elsewhere.push(format!("{} by {}", path(i), response.node()));
        }
    }
    Ok(elsewhere)
}

#[test]
fn large_responses_under_way_and_unread_requests_behind() {
    stay_on_one_processor();
    let (bed, programs) = up(true);
    // One after the other first: where processes wait for a processor, time-outs mean nothing.
    let before = Counters::of(&bed);
    let mut ended: Vec<_> = (0..8).map(|n| bed.spawn("client", move || many_at_once(n)).join()).collect();
    let alone = Counters::of(&bed).since(&before);
    println!("alone: {}", alone.troubles());
    assert_eq!(alone.get("TCPTimeouts"), 0, "{}", alone.troubles());
    let clients: Vec<_> = (8..32).map(|n| bed.spawn("client", move || many_at_once(n))).collect();
    ended.extend(clients.into_iter().map(JoinHandle::join));
    let counted = Counters::of(&bed).since(&before);
    println!("{}", counted.troubles());

    let (mut elsewhere, mut refused, mut moved) = (Vec::new(), 0, 0);
    for (number, end) in ended.into_iter().enumerate() {
        elsewhere.extend(end.expect("no panic").unwrap_or_else(|e| panic!("connection {number}: {e}")));
    }
    for node in NODES {
        let status = bed.try_status(node).expect("a status");
        println!("{node}: refused {}", status["refused_by_reason"]);
        assert_eq!(status["failed_total"], 0, "{node}: {}", status["failed_by_reason"]);
        refused += bed.status(node, "/refused_total");
        moved += bed.status(node, "/onward_total");
    }
    println!("{} of 384 requests served elsewhere, {moved} moves on or home: {elsewhere:?}", elsewhere.len());
    assert!(elsewhere.len() as u64 <= refused, "{refused} refused: {elsewhere:#?}");
    assert!(moved > 32, "too few to mean anything");
    assert_eq!(counted.get_on("client", "EstabResets"), 0, "{}", counted.troubles());
    bed.wait_idle(&NODES);
    drop(programs);
}
