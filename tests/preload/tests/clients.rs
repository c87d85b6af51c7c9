//! What clients really send: curl, wrk, ab, and requests in all the pieces that TCP may make of them.

use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::{Duration, Instant};

use xo_tests::counters::Counters;
use xo_tests::program::{stay_on_one_processor, wait_for};
use xo_tests::servers::address;
use xo_tests::{Bed, Connection, content};

const GET: &str = "GET /img/1k HTTP/1.1\r\nHost: xo.test\r\n\r\n";

fn connect() -> Connection {
    Connection::to(&address("host"), 80).expect("connect")
}

/// Waits until the other end has acknowledged all that was sent: what is sent next is a segment of its own.
fn acknowledged(c: &Connection) {
    let done = wait_for(Duration::from_secs(10), || {
        let mut left = 0_i32;
        // SAFETY: the number lives through the call and may be written.
        unsafe { libc::ioctl(c.stream().as_raw_fd(), libc::TIOCOUTQ, &raw mut left) };
        left == 0
    });
    assert!(done, "not acknowledged");
}

#[test]
fn a_head_split_at_every_offset() {
    stay_on_one_processor();
    let bed = Bed::up(1, 1);
    let _programs = bed.everything();
    let before = Counters::of(&bed);
    let nodes = bed.on("client", || {
        let split = |at: usize| {
            let mut c = connect();
            c.send(&GET.as_bytes()[..at]).expect("send");
            acknowledged(&c);
            c.send(&GET.as_bytes()[at..]).expect("send");
            c.object("/img/1k").unwrap_or_else(|e| panic!("split at {at}: {e}")).node().to_owned()
        };
        let mut nodes: Vec<_> = (1..GET.len()).map(split).collect();
        // Byte by byte, each its own segment.
        let mut c = connect();
        for byte in GET.as_bytes() {
            c.send(&[*byte]).expect("send");
            acknowledged(&c);
        }
        nodes.push(c.object("/img/1k").expect("byte by byte").node().to_owned());
        nodes
    });
    assert!(nodes.iter().all(|n| n == "t1"), "{nodes:?}");
    assert_eq!(bed.status("host", "/offloads_total"), GET.len() as u64);
    let counted = Counters::of(&bed).since(&before);
    println!("{}", counted.troubles());
    counted.no_reset(&bed);
    assert_eq!(counted.losses(), 0, "{}", counted.troubles());
    bed.wait_idle(&["host", "t1"]);
}

/// `count` requests in one segment; the first `local` stay.
fn pipelined(count: usize, local: usize) -> Vec<String> {
    let mut c = connect();
    let paths: Vec<_> = (0..count).map(|i| if i < local { "/loc/1k" } else { "/img/1k" }).collect();
    let all: String = paths.iter().map(|p| format!("GET {p} HTTP/1.1\r\nHost: x\r\n\r\n")).collect();
    c.send(all.as_bytes()).expect("send");
    paths.iter().map(|p| c.object(p).expect("pipelined").node().to_owned()).collect()
}

fn sized_head(len: usize) -> String {
    let begin = "GET /img/1k HTTP/1.1\r\nHost: x\r\n";
    let mut head = begin.to_owned();
    // Fields shorter than nginx's limit for one.
    while len - head.len() > 4096 + 100 {
        head += &format!("X-{}: {}\r\n", head.len(), "a".repeat(4000));
    }
    let rest = len - head.len() - "X: \r\n\r\n".len();
    head += &format!("X: {}\r\n\r\n", "b".repeat(rest));
    assert_eq!(head.len(), len);
    head
}

/// A request, and whether it moves; then whether the next one, of the simplest kind, does.
const SHAPES: [(&str, &str, bool, bool); 11] = [
    (
        "two equal lengths",
        "PUT /up/a HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nhi",
        false,
        false,
    ),
    (
        "length and coding",
        "PUT /up/a HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        false,
        false,
    ),
    ("CONNECT", "CONNECT xo.test:443 HTTP/1.1\r\nHost: xo.test:443\r\n\r\n", false, false),
    (
        "upgrade",
        "GET /img/1k HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
        false,
        false,
    ),
    ("absolute", "GET http://xo.test/img/1k HTTP/1.1\r\nHost: xo.test\r\n\r\n", true, true),
    ("HTTP/1.0", "GET /img/1k HTTP/1.0\r\n\r\n", true, false),
    ("HTTP/1.0 keep-alive", "GET /img/1k HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", true, true),
    ("close", "GET /img/1k HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", true, false),
    (
        "chunked",
        "PUT /up/c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        true,
        true,
    ),
    ("missing", "GET /img/nothing HTTP/1.1\r\nHost: x\r\n\r\n", true, true),
    ("lower-case method", "get /img/1k HTTP/1.1\r\nHost: x\r\n\r\n", true, false),
];

#[test]
fn requests_that_move_and_requests_that_never_do() {
    let bed = Bed::up(1, 1);
    let _programs = bed.everything();
    let mut moved = 0;
    for (what, request, moves, next) in SHAPES {
        let (node, then) = bed.on("client", move || {
            let mut c = connect();
            c.send(request.as_bytes()).expect("send");
            let node = c.response(false).unwrap_or_else(|e| panic!("{what}: {e}")).node().to_owned();
            // The server may have ended the connection; then there is no next request.
            let then = c.send(GET.as_bytes()).and_then(|()| c.object("/img/1k"));
            (node, then.map(|r| r.node().to_owned()).ok())
        });
        moved += u64::from(moves);
        assert_eq!(node, if moves { "t1" } else { "host" }, "{what}");
        assert_eq!(bed.status("host", "/offloads_total"), moved, "{what}");
        if moves && next {
            assert_eq!(then.as_deref(), Some("t1"), "{what}: the next request");
        } else if let Some(then) = then {
            assert_eq!(then, "host", "{what}: the next request");
        }
    }

    let nodes =
        bed.on("client", || [pipelined(2, 1), pipelined(2, 0), pipelined(10, 3), pipelined(10, 0)].concat());
    let expected: String = "ht tt hhhttttttt tttttttttt".replace(' ', "");
    let letters: String = nodes.iter().map(|n| &n[..1]).collect();
    assert_eq!(letters, expected, "pipelined");
    moved += 4;

    for (len, node) in [(16 << 10, "t1"), ((16 << 10) + 1, "host"), (4096, "t1"), (4097, "t1"), (4095, "t1")]
    {
        let got = bed.on("client", move || {
            let mut c = connect();
            c.send(sized_head(len).as_bytes()).expect("send");
            c.object("/img/1k").unwrap_or_else(|e| panic!("{len}: {e}")).node().to_owned()
        });
        assert_eq!(got, node, "a head of {len} bytes");
        moved += u64::from(node == "t1");
    }

    // Half-close after the request: what is no longer established stays, and is served to the end.
    let node = bed.on("client", || {
        let mut c = connect();
        c.send(GET.as_bytes()).expect("send");
        c.stream().shutdown(Shutdown::Write).expect("shutdown");
        let node = c.object("/img/1k").expect("answer").node().to_owned();
        assert_eq!(c.rest().expect("a clean end"), b"");
        node
    });
    moved += u64::from(node == "t1");

    // Half a head, and then the client is done: the end does not wait for the head's time limit.
    let took = bed.on("client", || {
        let mut c = connect();
        c.send(&GET.as_bytes()[..20]).expect("send");
        acknowledged(&c);
        let begun = Instant::now();
        c.stream().shutdown(Shutdown::Write).expect("shutdown");
        let end = c.rest().expect("a clean end");
        assert!(end.is_empty() || end.starts_with(b"HTTP/1.1 400"), "{:?}", String::from_utf8_lossy(&end));
        begun.elapsed()
    });
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert_eq!(bed.status("host", "/offloads_total"), moved);
}

#[test]
fn everyday_clients() {
    let bed = Bed::up(1, 1);
    let _programs = bed.everything();
    let host = address("host");
    let url = |path: &str| format!("http://{host}{path}");
    let before = Counters::of(&bed);

    // curl: one connection for all, uploads with and without Expect.
    let body = content::of("/up/curl", 300_000);
    let upload = bed.directory().join("upload");
    std::fs::write(&upload, &body).expect("a file");
    let wanted = bed.directory().join("got");
    let mut curl = Command::new("curl");
    curl.args(["-sS", "-f", "--max-time", "30", "-w", "%{num_connects} %{http_code}\n"]);
    curl.args([
        "-o",
        wanted.to_str().expect("a path"),
        &url("/loc/1k"),
        "--next",
        "-sS",
        "-f",
        "--max-time",
        "30",
    ]);
    curl.args(["-w", "%{num_connects} %{http_code}\n", "-T", upload.to_str().expect("a path")]);
    curl.args([
        "-H",
        "Expect: 100-continue",
        &url("/up/curl"),
        "--next",
        "-sS",
        "-f",
        "-w",
        "%{num_connects} %{http_code}\n",
    ]);
    curl.args(["-o", wanted.to_str().expect("a path"), &url("/img/1m")]);
    let said = bed.run("client", &mut curl);
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines, ["1 200", "0 201", "0 200"], "the connection is used again across the move");
    assert!(std::fs::read(bed.root("t1").join("up/curl")).expect("the upload") == body);
    assert!(std::fs::read(&wanted).expect("the object") == content::of("/img/1m", 1 << 20));
    assert_eq!(bed.status("host", "/offloads_total"), 1);

    // ab: with keep-alive (HTTP/1.0), then a connection for each request.
    let ab = |arguments: &[&str]| {
        let said = bed.run("client", Command::new("ab").args(arguments).arg(url("/img/1k")));
        let failed = said.lines().find(|l| l.starts_with("Failed requests:")).unwrap_or_default().to_owned();
        assert!(failed.ends_with(" 0") && !said.contains("Non-2xx"), "{said}");
    };
    ab(&["-q", "-n", "2000", "-c", "16", "-k"]);
    assert_eq!(bed.status("host", "/offloads_total"), 17, "each connection moves once");
    ab(&["-q", "-n", "300", "-c", "8"]);
    assert_eq!(bed.status("host", "/offloads_total"), 317, "each connection moves");

    // wrk: no errors of any kind.
    let mut wrk = Command::new("wrk");
    let said = bed.run("client", wrk.args(["-t1", "-c32", "-d2s", "--timeout", "10s"]).arg(url("/img/1k")));
    assert!(!said.contains("Socket errors") && !said.contains("Non-2xx"), "{said}");
    assert_eq!(bed.status("host", "/offloads_total"), 317 + 32, "each connection moves once");
    let counted = Counters::of(&bed).since(&before);
    // wrk leaves in the middle of responses: its own kernel answers what still comes with resets.
    let resets = counted.resets() - counted.get_on("client", "OutRsts");
    assert!(resets <= counted.get_on("client", "OutRsts"), "{}", counted.troubles());
    assert_eq!(bed.status("host", "/refused_total"), 0, "{:?}", bed.try_status("host"));
}
