//! Requests of all shapes, before and after the move.

use std::net::SocketAddr;
use std::time::Duration;

use socket2::{Domain, Socket, Type};
use xo_tests::program::wait_for;
use xo_tests::servers::address;
use xo_tests::{Bed, Connection, content};

const PAUSE: Duration = Duration::from_millis(3);

/// Carries `talk` out on a fresh connection of the client, which has had one request served at the host; returns the
/// nodes that answered it.
fn with_connection(
    bed: &Bed,
    talk: impl FnOnce(&mut Connection) -> Vec<String> + Send + 'static,
) -> Vec<String> {
    bed.on("client", move || {
        let mut connection = Connection::to(&address("host"), 80).expect("connect");
        assert_eq!(connection.get("/loc/1k").expect("local").node(), "host");
        talk(&mut connection)
    })
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: xo.test\r\n\r\n")
}

fn put(path: &str, length: usize, more: &str) -> String {
    format!("PUT {path} HTTP/1.1\r\nHost: xo.test\r\nContent-Length: {length}\r\n{more}\r\n")
}

#[test]
fn requests_of_all_shapes() {
    let bed = Bed::up(1, 1);
    let _programs = bed.everything();

    // A head in many pieces is held back until it is complete, and then moves.
    let nodes = with_connection(&bed, |c| {
        c.dribble(get("/img/1k").as_bytes(), 3, PAUSE).expect("send");
        let first = c.object("/img/1k").expect("moved");
        c.dribble(get("/img/1").as_bytes(), 7, PAUSE).expect("send");
        [first, c.object("/img/1").expect("there")].map(|r| r.node().to_owned()).into()
    });
    assert_eq!(nodes, ["t1", "t1"], "a head in pieces");

    // Pipelined: the second request waits in the socket and moves with it, after the first has been answered.
    let nodes = with_connection(&bed, |c| {
        let all = get("/loc/64k") + &get("/img/64k") + &get("/loc/1") + &get("/img/1m");
        c.send(all.as_bytes()).expect("send");
        ["/loc/64k", "/img/64k", "/loc/1", "/img/1m"].map(|p| c.object(p).expect(p).node().to_owned()).into()
    });
    assert_eq!(nodes, ["host", "t1", "t1", "t1"], "pipelined");

    // The boundary lies within a segment, a body and the next head together.
    let nodes = with_connection(&bed, |c| {
        let body = content::of("/put/a", 5000);
        let all = [put("/put/a", 5000, "").as_bytes(), &body, get("/img/1k").as_bytes()].concat();
        c.dribble(&all, 1448, PAUSE).expect("send");
        let stored = c.stored("/put/a").expect("stored").node().to_owned();
        vec![stored, c.object("/img/1k").expect("moved").node().to_owned()]
    });
    assert_eq!(nodes, ["host", "t1"], "a body and the next head");
    let stored = std::fs::read(bed.root("host").join("put/a")).expect("the upload");
    assert!(stored == content::of("/put/a", 5000), "upload at the host");

    // A chunked body stays with the request that it belongs to.
    let nodes = with_connection(&bed, |c| {
        let head = "PUT /put/chunked HTTP/1.1\r\nHost: xo.test\r\nTransfer-Encoding: chunked\r\n\r\n";
        let body = "5\r\nhello\r\n6;x=\"y\"\r\n world\r\n0\r\nTrailer: 1\r\n\r\n";
        let all = head.to_owned() + body + &get("/img/1k");
        c.dribble(all.as_bytes(), 11, PAUSE).expect("send");
        let stored = c.stored("chunked").expect("stored").node().to_owned();
        vec![stored, c.object("/img/1k").expect("moved").node().to_owned()]
    });
    assert_eq!(nodes, ["host", "t1"], "chunked, then moved");
    assert_eq!(std::fs::read(bed.root("host").join("put/chunked")).expect("upload"), b"hello world");

    // All of it is there when the head is read, so nothing that comes later wakes the server again.
    let nodes = with_connection(&bed, |c| {
        let body = content::of("/put/b", 10_000);
        let head = "PUT /put/b HTTP/1.1\r\nHost: xo.test\r\nTransfer-Encoding: chunked\r\n\r\n2710\r\n";
        c.send(&[head.as_bytes(), &body, b"\r\n0\r\n\r\n"].concat()).expect("send");
        let stored = c.stored("/put/b").expect("stored").node().to_owned();
        vec![stored, c.get("/img/1k").expect("moved").node().to_owned()]
    });
    assert_eq!(nodes, ["host", "t1"], "chunked at once, then moved");
    let stored = std::fs::read(bed.root("host").join("put/b")).expect("the upload");
    assert!(stored == content::of("/put/b", 10_000), "chunked upload at the host");

    // A chunked upload is itself what moves, its body still on the way.
    let nodes = with_connection(&bed, |c| {
        let head = "PUT /up/chunked HTTP/1.1\r\nHost: xo.test\r\nTransfer-Encoding: chunked\r\n\r\n";
        c.send(head.as_bytes()).expect("send");
        c.dribble(b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n", 4, PAUSE).expect("send");
        vec![c.stored("chunked").expect("stored").node().to_owned()]
    });
    assert_eq!(nodes, ["t1"], "a chunked upload");
    assert_eq!(std::fs::read(bed.root("t1").join("up/chunked")).expect("upload"), b"hello world");

    // Expect: 100-continue. The interim response comes from whoever serves the request.
    let nodes = with_connection(&bed, |c| {
        let mut nodes = Vec::new();
        for path in ["/put/e", "/up/e"] {
            c.send(put(path, 5, "Expect: 100-continue\r\n").as_bytes()).expect("send");
            assert_eq!(c.any_response(false).expect("interim").status, 100);
            c.send(b"12345").expect("send");
            nodes.push(c.stored(path).expect("stored").node().to_owned());
        }
        nodes
    });
    assert_eq!(nodes, ["host", "t1"], "100-continue");

    // HEAD, 304 and 404 have bodies of their own kinds.
    let nodes = with_connection(&bed, |c| {
        c.send(b"HEAD /loc/1m HTTP/1.1\r\nHost: x\r\n\r\n").expect("send");
        let head = c.response(true).expect("HEAD");
        let date = head.header("Last-Modified").expect("a date").to_owned();
        let condition = format!("GET /loc/1m HTTP/1.1\r\nHost: x\r\nIf-Modified-Since: {date}\r\n\r\n");
        c.send(condition.as_bytes()).expect("send");
        let unmodified = c.response(false).expect("304");
        c.send(get("/loc/none").as_bytes()).expect("send");
        let missing = c.response(false).expect("404");
        c.send(b"HEAD /img/20m HTTP/1.1\r\nHost: x\r\n\r\n").expect("send");
        let moved = c.response(true).expect("HEAD");
        assert_eq!([&head, &unmodified, &missing, &moved].map(|r| r.status), [200, 304, 404, 200]);
        [head, unmodified, missing, moved].map(|r| r.node().to_owned()).into()
    });
    assert_eq!(nodes, ["host", "host", "host", "t1"], "responses without body");

    // Connection: close, and HTTP/1.0: the target closes after the response, and the end is clean.
    for request in
        ["GET /img/64k HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "GET /img/64k HTTP/1.0\r\n\r\n"]
    {
        let nodes = with_connection(&bed, move |c| {
            c.send(request.as_bytes()).expect("send");
            let node = c.object("/img/64k").expect("moved").node().to_owned();
            assert_eq!(c.rest().expect("a clean end"), b"");
            vec![node]
        });
        assert_eq!(nodes, ["t1"], "{request}");
    }

    // A client that is done sending before it gets its answer. (A long one nginx would cut off by itself.)
    let nodes = with_connection(&bed, |c| {
        c.send(get("/loc/1k").as_bytes()).expect("send");
        c.stream().shutdown(std::net::Shutdown::Write).expect("shutdown");
        let node = c.object("/loc/1k").expect("answer").node().to_owned();
        assert_eq!(c.rest().expect("a clean end"), b"");
        vec![node]
    });
    assert_eq!(nodes, ["host"], "half-closed");

    // What is no HTTP request, or one that cannot be followed, is the server's business.
    for (bytes, status) in [
        ("\u{16}\u{3}\u{1} certainly not\r\n\r\n".to_owned(), "400"),
        (format!("GET /img/1 HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "a".repeat(17 << 10)), "400"),
    ] {
        let nodes = with_connection(&bed, move |c| {
            c.send(bytes.as_bytes()).expect("send");
            vec![c.response(false).expect("an answer").status.to_string()]
        });
        assert_eq!(nodes, [status]);
    }
    // The two that the target closed first are in TIME_WAIT there for a minute, and are steered as long.
    let ended = wait_for(Duration::from_secs(20), || bed.status("host", "/flows_hosted") == 2);
    assert!(ended, "{:?}", bed.try_status("host"));
    assert_eq!(bed.status("host", "/refused_total"), 0, "{:?}", bed.try_status("host"));
}

/// What a server has written and the kernel not sent would go on leaving the host: the client would acknowledge it, and the
/// target not understand that.
#[test]
fn a_connection_stays_while_something_is_unsent() {
    let bed = Bed::up(1, 1);
    let _programs = bed.everything();
    let mut c = bed.on("client", || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        // The response fits into the server's buffer, and hardly any of it into the client's.
        socket.set_recv_buffer_size(4 << 10).expect("a small buffer");
        let host = SocketAddr::new(address("host").parse().expect("an address"), 80);
        socket.connect(&host.into()).expect("connect");
        let mut c = Connection::over(socket.into()).expect("a connection");
        c.send([get("/loc/64k"), get("/img/1k")].concat().as_bytes()).expect("send");
        c
    });
    // The second request has been looked at while the first response waits for the client.
    let refused = || bed.status("host", "/library/asked") == 1 && bed.status("host", "/refused_total") == 1;
    assert!(wait_for(Duration::from_secs(10), refused), "{:?}", bed.try_status("host"));
    let nodes = bed.on("client", move || {
        let [first, second] = ["/loc/64k", "/img/1k"].map(|p| c.object(p).expect(p).node().to_owned());
        [first, second, c.get("/img/64k").expect("moved").node().to_owned()]
    });
    assert_eq!(nodes, ["host", "host", "t1"]);
    assert_eq!(bed.status("host", "/refused_by_reason/not_clean"), 1);
    bed.wait_idle(&["host", "t1"]);
}

#[test]
fn a_slow_head_is_let_through_in_time() {
    let bed = Bed::up(1, 1);
    let _daemons = ["host", "t1"].map(|n| bed.peerd(n, &xo_tests::servers::PeerdOptions::default()));
    let mut command = bed.preloaded("host", "nginx");
    command.env("XO_HEAD_TIMEOUT_MS", "200");
    let _servers = [bed.nginx_with("host", command), bed.nginx("t1")];
    bed.wait_acceptors("t1", "web", 4);
    let node = bed.on("client", || {
        let mut c = Connection::to(&address("host"), 80).expect("connect");
        c.send(b"GET /img/1k HTTP/1.1\r\nHost:").expect("send");
        std::thread::sleep(Duration::from_millis(500));
        c.send(b" xo.test\r\n\r\n").expect("send");
        c.object("/img/1k").expect("answer").node().to_owned()
    });
    assert_eq!(node, "host", "a head slower than XO_HEAD_TIMEOUT_MS is served where it is");
    assert_eq!(bed.status("host", "/library/head_too_slow"), 1);
}
