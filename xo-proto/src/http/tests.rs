use proptest::prelude::*;

use super::*;
use crate::reason::Reason;

fn complete(bytes: &[u8]) -> Box<RequestHead<'_>> {
    match parse_head(bytes) {
        Head::Complete(head) => head,
        Head::Partial => panic!("partial"),
        Head::TooLong => panic!("too long"),
        Head::Refused(r) => panic!("refused: {r}"),
    }
}

fn refused(text: &str) -> Reason {
    match parse_head(text.as_bytes()) {
        Head::Refused(r) => r,
        Head::Complete(_) => panic!("accepted: {text:?}"),
        Head::Partial => panic!("partial: {text:?}"),
        Head::TooLong => panic!("too long: {text:?}"),
    }
}

#[test]
fn heads_are_read() {
    let h = complete(b"GET /a/b?x=1 HTTP/1.1\r\nHost: example.org:80\r\nX: y\r\n\r\nrest");
    assert_eq!((h.method, h.path, h.query, h.host), ("GET", "/a/b", Some("x=1"), Some("example.org:80")));
    assert_eq!((h.len, h.body, h.close, h.upgrade, h.minor), (53, Body::None, false, false, 1));
    assert_eq!(h.header("x").collect::<Vec<_>>(), [b"y"]);
    let h = complete(
        b"POST http://other/up?q HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n",
    );
    assert_eq!((h.path, h.host, h.body, h.expect_continue), ("/up", Some("other"), Body::Length(5), true));
    let h = complete(b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nConnection: foo, Close\r\n\r\n");
    assert_eq!((h.body, h.close), (Body::Chunked, true));
    let h = complete(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    assert_eq!((h.close, h.minor), (false, 0));
    assert!(complete(b"GET / HTTP/1.0\r\n\r\n").close);
    assert!(complete(b"GET /ws HTTP/1.1\r\nUpgrade: websocket\r\n\r\n").upgrade);
    assert!(complete(b"CONNECT a:443 HTTP/1.1\r\n\r\n").upgrade);
}

#[test]
fn ambiguity_is_refused() {
    for fields in [
        "Content-Length: 3\r\nContent-Length: 3\r\n",
        "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
        "Content-Length: +3\r\n",
        "Content-Length: 3, 3\r\n",
        "Content-Length: \r\n",
        "Content-Length: 99999999999999999999\r\n",
        "Transfer-Encoding: gzip, chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "Host: a\r\nHost: b\r\n",
        "A: b\n",
    ] {
        assert_eq!(
            refused(&format!("POST / HTTP/1.1\r\n{fields}\r\n")),
            Reason::AmbiguousFraming,
            "{fields:?}"
        );
    }
    assert_eq!(refused("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n"), Reason::AmbiguousFraming);
}

#[test]
fn other_protocols_are_recognised_at_once() {
    for bytes in [&b"\x16\x03\x01\x02"[..], b"\x16", b"*1\r\n$4\r\nPING\r\n", b"\0", b" GET / HTTP/1.1\r\n"] {
        assert!(matches!(parse_head(bytes), Head::Refused(Reason::NotHttp)), "{bytes:?}");
    }
    assert!(matches!(parse_head(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), Head::Refused(Reason::NotHttp)));
    assert!(matches!(parse_head(b"PING\r\n"), Head::Refused(Reason::NotHttp)));
    assert!(matches!(parse_head(b"G"), Head::Partial));
    assert!(matches!(parse_head(b"\r\n"), Head::Partial));
    let long = format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "x".repeat(MAX_HEAD));
    assert!(matches!(parse_head(long.as_bytes()), Head::TooLong));
    let just = format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "x".repeat(MAX_HEAD - 23));
    assert_eq!(complete(just.as_bytes()).len, MAX_HEAD);
}

/// Reads a stream as a server would, `sizes` bytes at a time, and returns where requests ended.
fn ends(stream: &[u8], sizes: &[usize]) -> Vec<usize> {
    let (mut tracker, mut at, mut found) = (RequestTracker::Boundary, 0, Vec::new());
    let mut sizes = sizes.iter().cycle();
    while at < stream.len() && tracker != RequestTracker::Lost {
        let rest = &stream[at..];
        if tracker.at_boundary() {
            tracker.begin(&complete(rest));
        }
        let want = (*sizes.next().expect("a size")).min(rest.len());
        let n = match tracker.allowed() {
            Limit::Bytes(n) => want.min(n as usize),
            Limit::Peek => tracker.limit(&rest[..want]),
        };
        match tracker.allowed() {
            Limit::Bytes(_) => tracker.consumed_unseen(n as u64),
            Limit::Peek => tracker.consumed(&rest[..n]),
        }
        assert!(n > 0, "no progress at {at}");
        at += n;
        if tracker.at_boundary() {
            found.push(at);
        }
    }
    found
}

const REQUESTS: [&str; 5] = [
    "GET /a HTTP/1.1\r\nHost: x\r\n\r\n",
    "POST /b HTTP/1.1\r\nContent-Length: 11\r\n\r\nhello world",
    "PUT /c HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nWiki\r\nA;x=y\r\n0123456789\r\n0\r\n\r\n",
    "PUT /d HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n\r\r\n0\r\nTrailer: value\r\nB: c\r\n\r\n",
    "HEAD /e HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
];

const RESPONSES: [(&str, Method); 7] = [
    ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", Method::Other),
    ("HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n", Method::Head),
    ("HTTP/1.1 304 Not Modified\r\nETag: \"x\"\r\n\r\n", Method::Other),
    ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n", Method::Other),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", Method::Other),
    ("HTTP/1.1 204 No Content\r\n\r\n", Method::Other),
    ("HTTP/1.0 404 Not Found\r\nServer: x\r\nContent-Length: 2\r\n\r\nno", Method::Other),
];

#[test]
fn responses_that_end_http() {
    let wrote = |text: &str, method| {
        let mut t = ResponseTracker::default();
        t.expect(method);
        t.wrote(text.as_bytes());
        t.progress()
    };
    let o = Method::Other;
    assert_eq!(wrote("HTTP/1.1 200 OK\r\n\r\nuntil the end", o), Progress::UntilClose);
    assert_eq!(wrote("HTTP/1.1 101 Switching Protocols\r\n\r\n\x01\x02", o), Progress::Upgraded);
    assert_eq!(wrote("HTTP/1.1 200 OK\r\n\r\n", Method::Connect), Progress::Upgraded);
    assert_eq!(wrote("SSH-2.0-x\r\n", o), Progress::Unknown);
    assert_eq!(wrote("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz", o), Progress::Unknown);
    assert_eq!(
        wrote("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", o),
        Progress::Unknown
    );
    let mut t = ResponseTracker::default();
    t.wrote(b"HTTP/1.1 408 Request Time-out\r\n\r\n");
    assert_eq!(t.progress(), Progress::UntilClose);
}

#[test]
fn files_are_counted_unseen() {
    let mut t = ResponseTracker::default();
    t.expect(Method::Other);
    t.wrote(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n");
    t.wrote_unseen(400);
    assert_eq!(t.progress(), Progress::InProgress);
    t.wrote_unseen(600);
    assert_eq!(t.progress(), Progress::Clean);
    t.wrote_unseen(1);
    assert_eq!(t.progress(), Progress::Unknown);
    let mut t = ResponseTracker::default();
    (0..17).for_each(|_| t.expect(Method::Other));
    assert_eq!(t.progress(), Progress::Unknown, "too many requests outstanding");
}

proptest! {
    #[test]
    fn any_split_of_requests_finds_the_same_ends(
        order in prop::collection::vec(0..REQUESTS.len(), 1..8),
        sizes in prop::collection::vec(1_usize..40, 1..6),
    ) {
        let (mut stream, mut expected) = (Vec::new(), Vec::new());
        for i in order {
            stream.extend_from_slice(REQUESTS[i].as_bytes());
            expected.push(stream.len());
        }
        prop_assert_eq!(ends(&stream, &sizes), expected);
    }

    #[test]
    fn any_split_of_responses_ends_clean_and_only_at_the_end(
        order in prop::collection::vec(0..RESPONSES.len(), 1..8),
        sizes in prop::collection::vec(1_usize..60, 1..6),
    ) {
        let (mut t, mut stream) = (ResponseTracker::default(), Vec::new());
        for i in order {
            t.expect(RESPONSES[i].1);
            stream.extend_from_slice(RESPONSES[i].0.as_bytes());
        }
        let (mut at, mut sizes) = (0, sizes.iter().cycle());
        while at < stream.len() {
            prop_assert_eq!(t.progress(), Progress::InProgress, "at {} of {}", at, stream.len());
            let n = (*sizes.next().expect("a size")).min(stream.len() - at);
            t.wrote(&stream[at..at + n]);
            at += n;
        }
        prop_assert_eq!(t.progress(), Progress::Clean);
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), cut in 0_usize..300) {
        let _ = parse_head(&bytes);
        let mut t = ResponseTracker::default();
        t.expect(Method::Other);
        let cut = cut.min(bytes.len());
        t.wrote(&bytes[..cut]);
        t.wrote(&bytes[cut..]);
        let mut r = RequestTracker::Boundary;
        r.begin(&complete(REQUESTS[2].as_bytes()));
        r.consumed(&bytes);
    }

    #[test]
    fn mutated_requests_never_panic(i in 0..REQUESTS.len(), at in 0_usize..60, byte in any::<u8>()) {
        let mut bytes = REQUESTS[i].as_bytes().to_vec();
        let at = at % bytes.len();
        bytes[at] = byte;
        let _ = parse_head(&bytes);
    }
}
