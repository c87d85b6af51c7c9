mod generate;
mod oracle;
mod properties;
mod reader;

use super::*;
use crate::reason::Reason;

fn complete(bytes: &[u8]) -> RequestHead<'_> {
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
    for (target, host, path) in [
        ("x+1.-://a:1/b", Some("a:1"), "/b"),
        ("HTTPS://a", Some("a"), "/"),
        ("1://a/b", None, "1://a/b"),
        ("/x://a/b", None, "/x://a/b"),
    ] {
        let text = format!("GET {target} HTTP/1.1\r\n\r\n");
        let h = complete(text.as_bytes());
        assert_eq!((h.host, h.path), (host, path), "{target}");
    }
    let h = complete(b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nConnection: foo, Close\r\n\r\n");
    assert_eq!((h.body, h.close), (Body::Chunked, true));
    let h = complete(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    assert_eq!((h.close, h.minor), (false, 0));
    assert!(complete(b"GET / HTTP/1.0\r\n\r\n").close);
    assert!(complete(b"GET / HTTP/1.0\r\nConnection: keep-alive, close\r\n\r\n").close, "close wins");
    assert!(complete(b"GET /ws HTTP/1.1\r\nUpgrade: websocket\r\n\r\n").upgrade);
    assert!(complete(b"CONNECT a:443 HTTP/1.1\r\n\r\n").upgrade);
}

#[test]
fn fields_are_found_again() {
    let text = "\r\nGET /:x HTTP/1.1\r\nA:1\r\nHost: a:80\r\na: \t x: y \t\r\nB:\r\n\r\nA: 3\r\n\r\n";
    let h = complete(text.as_bytes());
    let all = |name| h.header(name).map(|v| String::from_utf8_lossy(v).into_owned()).collect::<Vec<_>>();
    assert_eq!(
        (all("a"), all("host"), all("b")),
        (vec!["1".into(), "x: y".into()], vec!["a:80".into()], vec!["".into()])
    );
    assert!(all("get /").is_empty() && all("c").is_empty());
}

/// Every text of a few bytes, against the rule written the plain way.
#[test]
fn odd_line_ends_are_found() {
    let plain = |text: &[u8]| {
        let mut rest = text;
        loop {
            rest = match rest {
                [] => return false,
                [b'\r', b'\n', b' ' | b'\t', ..] | [b'\r' | b'\n' | 0] | [b'\n' | 0, ..] => return true,
                [b'\r', b'\n', rest @ ..] => rest,
                [b'\r', ..] => return true,
                [_, rest @ ..] => rest,
            };
        }
    };
    const BYTES: &[u8] = b"\r\n \t\0a";
    for length in 1..=6_u32 {
        for number in 0..BYTES.len().pow(length) {
            let text: Vec<u8> =
                (0..length).map(|i| BYTES[number / BYTES.len().pow(i) % BYTES.len()]).collect();
            // A head ends with a line's end, so what a last CR would be is of no matter.
            if text.last() != Some(&b'\r') {
                assert_eq!(request::oddly_written(&text), plain(&text), "{text:?}");
            }
        }
    }
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
    assert!(matches!(parse_head(b"\r\n\r\n"), Head::Partial));
    assert_eq!(complete(b"\r\n\r\nGET / HTTP/1.1\r\n\r\n").len, 22);
    assert!(matches!(parse_head(b"\r\n\r\n\r"), Head::Refused(Reason::NotHttp)));
    let long = format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "x".repeat(MAX_HEAD));
    assert!(matches!(parse_head(long.as_bytes()), Head::TooLong));
    let just = format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "x".repeat(MAX_HEAD - 23));
    assert_eq!(complete(just.as_bytes()).len, MAX_HEAD);
}

/// What a chunked body comes to that begins so: its length, or `None` for "more" and an error for "not this coding".
fn chunked(body: &str) -> Result<Option<usize>, ()> {
    let mut tracker = RequestTracker::Boundary;
    let head = "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
    tracker.begin(&complete(head.as_bytes()));
    tracker.consumed(head.as_bytes());
    let n = tracker.limit(body.as_bytes());
    tracker.consumed(body.as_bytes().get(..n).unwrap_or_default());
    match tracker {
        RequestTracker::Boundary => Ok(Some(n)),
        RequestTracker::Lost => Err(()),
        _ => Ok(None),
    }
}

#[test]
fn lines_of_the_chunked_coding_end_with_crlf() {
    for (body, length) in [
        ("0\r\n\r\n", Ok(Some(5))),
        ("2;a=\"b\"\r\nxy\r\n0 \t;c\r\nT: v\r\nU\r\n\r\nrest", Ok(Some(31))),
        ("00000000000000A\r\n", Ok(None)),
        ("000000000000000A\r\n", Err(())),
        ("2\nxy\r\n0\r\n\r\n", Err(())),
        ("2;a\nxy\r\n0\r\n\r\n", Err(())),
        ("2;a\rb\r\nxy\r\n0\r\n\r\n", Err(())),
        ("2 3\r\nxy\r\n0\r\n\r\n", Err(())),
        ("2;\0\r\nxy\r\n0\r\n\r\n", Err(())),
        (" 2\r\nxy\r\n0\r\n\r\n", Err(())),
        ("0x2\r\nxy\r\n0\r\n\r\n", Err(())),
        ("-2\r\n", Err(())),
        (";a\r\n", Err(())),
        ("\r\n", Err(())),
        ("2\r\nxy\n0\r\n\r\n", Err(())),
        ("2\r\nxyz", Err(())),
        ("0\r\n\n", Err(())),
        ("0\r\nT: v\n\r\n", Err(())),
        ("0\r\n\rx", Err(())),
    ] {
        assert_eq!(chunked(body), length, "{body:?}");
    }
    let long = |n| chunked(&format!("1;{}", "x".repeat(n)));
    assert_eq!((long(8000), long(9000)), (Ok(None), Err(())), "an extension without end");
    let long = |n| chunked(&format!("0\r\n{}", "T: v\r\n".repeat(n)));
    assert_eq!((long(2000), long(2100)), (Ok(None), Err(())), "trailers without end");
}

#[test]
fn responses_that_end_http() {
    let wrote = |text: &str, method| {
        let mut t = ResponseTracker::default();
        t.asked(method);
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
    assert_eq!(wrote("HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\nx", o), Progress::Unknown);
    assert_eq!(
        wrote("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", o),
        Progress::Unknown,
        "HTTP/1.0 has no codings"
    );
    let mut t = ResponseTracker::default();
    t.wrote(b"HTTP/1.1 408 Request Time-out\r\n\r\n");
    assert_eq!(t.progress(), Progress::UntilClose);
}

#[test]
fn a_long_head_in_two_writes() {
    let head =
        |n: usize| format!("HTTP/1.1 200 OK\r\nA: {}\r\nContent-Length: 100000\r\n\r\n", "a".repeat(n));
    for (n, progress) in [(60_000, Progress::Clean), (70_000, Progress::Unknown)] {
        let all = head(n) + &"b".repeat(100_000);
        let mut t = ResponseTracker::default();
        t.asked(Method::Other);
        t.wrote(&all.as_bytes()[..30]);
        assert_eq!(t.progress(), Progress::InProgress);
        t.wrote(&all.as_bytes()[30..]);
        assert_eq!(t.progress(), progress, "{n}");
    }
}

#[test]
fn files_are_counted_unseen() {
    let mut t = ResponseTracker::default();
    t.asked(Method::Other);
    t.wrote(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n");
    t.wrote_unseen(400);
    assert_eq!(t.progress(), Progress::InProgress);
    t.wrote_unseen(600);
    assert_eq!(t.progress(), Progress::Clean);
    t.wrote_unseen(1);
    assert_eq!(t.progress(), Progress::Unknown);
    let mut t = ResponseTracker::default();
    (0..17).for_each(|_| t.asked(Method::Other));
    assert_eq!(t.progress(), Progress::Unknown, "too many requests outstanding");
}
