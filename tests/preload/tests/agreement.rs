//! nginx and our framing agree: what we take for n complete requests, nginx answers as the same n requests with the
//! same bodies. Anything else would be a way to smuggle a request past the policy. What we refuse is left to the server.

use std::collections::BTreeMap;

use xo_proto::http::{Head, parse_head};
use xo_proto::policy::{Decision, Policy};
use xo_proto::reason::Reason;
use xo_tests::Connection;
use xo_tests::framer::{self, Request, Stop};
use xo_tests::hostile;
use xo_tests::plain::{Plain, seen};
use xo_tests::random::{Random, setting};

/// Sent after what we take for complete: nginx must take it for a request of its own.
const SENTINEL: &str = "GET /sentinel HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";

/// How nginx took what we had framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taken {
    /// Each request was answered.
    All,
    /// So many were, the last with an error, after which nginx closed.
    Rejected(usize),
    /// So many were; the last told nginx to close. What we find behind it nobody reads.
    Closed(usize),
}

/// Frames a stream, sends nginx what was found complete and compares. The error says what differs.
fn compare(nginx: &Plain, stream: &[u8]) -> Result<(usize, Stop, Taken), String> {
    let (requests, stop) = framer::frame(stream, stream.len().max(1));
    for size in [1, 7] {
        let again = framer::frame(stream, size);
        if again != (requests.clone(), stop) {
            return Err(format!("read by {size} it is {again:?}, not {requests:?} {stop:?}"));
        }
    }
    let Some(end) = requests.last().map(|r| r.end) else { return Ok((0, stop, Taken::All)) };
    let mut connection = nginx.connect();
    // nginx may close at once after an error; what it has written is there all the same.
    let _ = connection.send(&[&stream[..end], SENTINEL.as_bytes()].concat());
    for (i, request) in requests.iter().enumerate() {
        let response = connection
            .response(request.method == "HEAD")
            .map_err(|e| format!("request {i} of {}: {e}; {}", requests.len(), nginx.last_error()))?;
        let closes = response.header("Connection") == Some("close");
        check(request, response.status, response.header("X-Seen"))
            .map_err(|e| format!("request {i}: {e}"))?;
        if closes {
            nothing_more(&mut connection)?;
            let taken = if response.status >= 400 { Taken::Rejected(i + 1) } else { Taken::Closed(i + 1) };
            return Ok((requests.len(), stop, taken));
        }
    }
    let response = connection.response(false).map_err(|e| format!("the sentinel: {e}"))?;
    if response.header("X-Seen") != Some(&seen("GET", "/sentinel", b"")) {
        return Err(format!("the sentinel was not seen as itself: {}", response.head));
    }
    nothing_more(&mut connection)?;
    Ok((requests.len(), stop, Taken::All))
}

fn nothing_more(connection: &mut Connection) -> Result<(), String> {
    let rest = connection.rest().map_err(|e| e.to_string())?;
    let text = String::from_utf8_lossy(&rest);
    if rest.is_empty() { Ok(()) } else { Err(format!("one more answer: {text:?}")) }
}

/// Was it this request that was answered?
fn check(request: &Request, status: u16, upstream: Option<&str>) -> Result<(), String> {
    let expected = seen(&request.method, &request.target, &request.body);
    // Of `http://host?` nginx makes `/`.
    let without_query = request.target.strip_suffix('?').unwrap_or(&request.target);
    let or = seen(&request.method, without_query, &request.body);
    match (status, upstream) {
        (200, Some(upstream)) if upstream == expected || upstream == or => Ok(()),
        (200, None) if request.target.starts_with("/plain") => Ok(()),
        (400..=499 | 501, None) => Ok(()),
        _ => Err(format!("status {status}, the upstream saw {upstream:?}, we {expected}: {request:?}")),
    }
}

const ALL: Taken = Taken::All;

fn left(reason: Reason) -> Stop {
    Stop::Left(reason)
}

/// Fields and body of a POST, how many requests we see, why we stop, what nginx makes of it.
fn posts() -> Vec<(&'static str, usize, Stop, Taken)> {
    use Reason::{AmbiguousFraming as Ambiguous, NotHttp};
    vec![
        // Lengths.
        ("Content-Length: 3\r\n\r\nabc", 1, Stop::End, ALL),
        ("content-length:3\r\n\r\nabc", 1, Stop::End, ALL),
        ("CONTENT-LENGTH:   0003  \r\n\r\nabc", 1, Stop::End, ALL),
        ("Content-Length: 0\r\n\r\n", 1, Stop::End, ALL),
        ("Content-Length: 4\r\n\r\nabc", 0, Stop::Incomplete, ALL),
        ("Content-Length: 999999999999999999\r\n\r\nabc", 0, Stop::Incomplete, ALL),
        ("Content-Length:\t3\r\n\r\nabc", 1, Stop::End, Taken::Rejected(1)),
        ("Content-Length: 3\t\r\n\r\nabc", 1, Stop::End, Taken::Rejected(1)),
        ("Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", 0, left(Ambiguous), ALL),
        ("Content-Length: 3\r\ncontent-length: 30\r\n\r\nabc", 0, left(Ambiguous), ALL),
        ("Content-Length: 3, 3\r\n\r\nabc", 0, left(Ambiguous), ALL),
        ("Content-Length: -3\r\n\r\nabc", 0, left(Ambiguous), ALL),
        ("Content-Length: +3\r\n\r\nabc", 0, left(Ambiguous), ALL),
        ("Content-Length: 0x3\r\n\r\nabc", 0, left(Ambiguous), ALL),
        ("Content-Length: 3 0\r\n\r\nabc", 0, left(Ambiguous), ALL),
        ("Content-Length: 3.0\r\n\r\nabc", 0, left(Ambiguous), ALL),
        ("Content-Length: \"3\"\r\n\r\nabc", 0, left(Ambiguous), ALL),
        ("Content-Length:\r\n\r\nabc", 0, left(Ambiguous), ALL),
        ("Content-Length: 18446744073709551619\r\n\r\nabc", 0, left(Ambiguous), ALL),
        ("Content_Length: 3\r\n\r\n", 1, Stop::End, ALL),
        ("X-Content-Length: 3\r\n\r\n", 1, Stop::End, ALL),
        ("X: y\r\n\tContent-Length: 3\r\n\r\n", 0, left(NotHttp), ALL),
        // Lines.
        ("Content-Length : 3\r\n\r\nabc", 0, left(NotHttp), ALL),
        ("Content-Length\t: 3\r\n\r\nabc", 0, left(NotHttp), ALL),
        (" Content-Length: 3\r\n\r\nabc", 0, left(NotHttp), ALL),
        ("Content-Length\r\n\r\n", 0, left(NotHttp), ALL),
        (": 3\r\n\r\n", 0, left(NotHttp), ALL),
        ("Content-Length: 3\n\r\nabc", 0, left(Ambiguous), ALL),
        ("Content-Length: 3\r\n\nabc", 0, left(Ambiguous), ALL),
        ("X: y\nContent-Length: 3\r\n\r\nabc", 0, left(Ambiguous), ALL),
        ("X: y\rContent-Length: 3\r\n\r\nabc", 0, left(NotHttp), ALL),
        ("X: y\0\r\n\r\n", 0, left(NotHttp), ALL),
        ("X\0: y\r\n\r\n", 0, left(NotHttp), ALL),
        ("X: \u{e4}\u{2028}\r\nContent-Length: 3\r\n\r\nabc", 1, Stop::End, ALL),
        ("X;Y: z\r\n\r\n", 0, left(NotHttp), ALL),
        // Codings.
        ("Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", 1, Stop::End, ALL),
        ("transfer-encoding:  CHUNKED \r\n\r\n03\r\nabc\r\n000\r\n\r\n", 1, Stop::End, ALL),
        ("Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 1, Stop::End, ALL),
        (
            "Transfer-Encoding: chunked\r\n\r\n3;x=\"y;z\"\r\nabc\r\n0;q\r\nTrailer: t\r\nU: v\r\n\r\n",
            1,
            Stop::End,
            ALL,
        ),
        (
            "Transfer-Encoding: chunked\r\n\r\n3  \r\nabc\r\nA \t;x\r\n0\r\n\r\nGET /\r\n0\r\n\r\n",
            1,
            Stop::End,
            ALL,
        ),
        (
            "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            0,
            left(Ambiguous),
            ALL,
        ),
        (
            "Content-Length: 13\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            0,
            left(Ambiguous),
            ALL,
        ),
        ("Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 0, left(Ambiguous), ALL),
        (
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            0,
            left(Ambiguous),
            ALL,
        ),
        ("Transfer-Encoding: identity\r\n\r\n", 0, left(Ambiguous), ALL),
        ("Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 0, left(Ambiguous), ALL),
        ("Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 0, left(Ambiguous), ALL),
        ("Transfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n", 0, left(Ambiguous), ALL),
        ("Transfer-Encoding: \u{b}chunked\r\n\r\n0\r\n\r\n", 0, left(NotHttp), ALL),
        ("Transfer-Encoding:\tchunked\r\n\r\n0\r\n\r\n", 1, Stop::End, Taken::Rejected(1)),
        ("Transfer_Encoding: chunked\r\n\r\n", 1, Stop::End, ALL),
        ("Transfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n", 0, left(Ambiguous), ALL),
        ("Transfer-Encoding: chunked\r\n\r\n3;x\nabc\r\n0\r\n\r\n", 0, left(Ambiguous), ALL),
        ("Transfer-Encoding: chunked\r\n\r\n3\r\nabc\n0\r\n\r\n", 0, left(Ambiguous), ALL),
        ("Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n", 0, left(Ambiguous), ALL),
        ("Transfer-Encoding: chunked\r\n\r\n0\r\n\nGET / HTTP/1.1\r\n\r\n", 0, left(Ambiguous), ALL),
        ("Transfer-Encoding: chunked\r\n\r\n3 4\r\nabc\r\n0\r\n\r\n", 0, left(Ambiguous), ALL),
        ("Transfer-Encoding: chunked\r\n\r\n-3\r\nabc\r\n0\r\n\r\n", 0, left(Ambiguous), ALL),
        ("Transfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n", 0, left(Ambiguous), ALL),
        ("Transfer-Encoding: chunked\r\n\r\n\r\n", 0, left(Ambiguous), ALL),
        ("Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\nabc", 0, left(Ambiguous), ALL),
        ("Transfer-Encoding: chunked\r\n\r\n10000000000000003\r\nabc\r\n0\r\n\r\n", 0, left(Ambiguous), ALL),
        ("Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n", 0, Stop::Incomplete, ALL),
        // The rest.
        ("Expect: 100-continue\r\nContent-Length: 3\r\n\r\nabc", 1, Stop::End, ALL),
        (
            "Connection: close\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\nHost: x\r\n\r\n",
            2,
            Stop::End,
            Taken::Closed(1),
        ),
        ("Connection: upgrade\r\nUpgrade: websocket\r\n\r\n", 0, left(Reason::Upgraded), ALL),
        ("Host: y\r\n\r\n", 0, left(Ambiguous), ALL),
    ]
}

/// Whole streams.
fn streams() -> Vec<(&'static str, usize, Stop, Taken)> {
    use Reason::{AmbiguousFraming as Ambiguous, NotHttp};
    vec![
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\nHEAD /a?b HTTP/1.1\r\nHost: x\r\n\r\n", 2, Stop::End, ALL),
        (
            "\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n\r\n\r\nGET /b HTTP/1.1\r\nHost: x\r\n\r\n",
            2,
            Stop::End,
            ALL,
        ),
        ("\nGET / HTTP/1.1\r\nHost: x\r\n\r\n", 0, left(Ambiguous), ALL),
        (
            "GET /plain HTTP/1.1\r\nHost: x\r\nContent-Length: 31\r\n\r\nGET /inside HTTP/1.1\r\nHost: x\r\n",
            1,
            Stop::End,
            ALL,
        ),
        (
            "PUT /plain HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5;x\r\n0\r\n\r\n\r\n0\r\nT: v\r\n\r\n",
            1,
            Stop::End,
            ALL,
        ),
        ("GET / HTTP/1.1\r\n\r\n", 1, Stop::End, Taken::Rejected(1)),
        ("GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", 0, left(Ambiguous), ALL),
        ("GET / HTTP/1.1\r\nHost: a b/\r\n\r\n", 1, Stop::End, Taken::Rejected(1)),
        ("GET / HTTP/1.0\r\n\r\nGET / HTTP/1.0\r\n\r\n", 2, Stop::End, Taken::Closed(1)),
        (
            "GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\nGET / HTTP/1.0\r\n\r\n",
            2,
            Stop::End,
            Taken::Closed(2),
        ),
        ("GET / HTTP/1.0\r\nConnection: keep-alive, close\r\n\r\n", 1, Stop::End, Taken::Closed(1)),
        ("POST / HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 3\r\n\r\nabc", 1, Stop::End, ALL),
        (
            "POST / HTTP/1.0\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            0,
            left(Ambiguous),
            ALL,
        ),
        ("GET /\r\n", 0, left(NotHttp), ALL),
        ("GET / HTTP/0.9\r\n\r\n", 0, left(NotHttp), ALL),
        ("GET / HTTP/1.2\r\nHost: x\r\n\r\n", 0, left(NotHttp), ALL),
        ("GET / HTTP/2.0\r\nHost: x\r\n\r\n", 0, left(NotHttp), ALL),
        ("GET / http/1.1\r\nHost: x\r\n\r\n", 0, left(NotHttp), ALL),
        ("GET / HTTP/1.1 \r\nHost: x\r\n\r\n", 0, left(NotHttp), ALL),
        ("GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 0, left(NotHttp), ALL),
        ("GET /  HTTP/1.1\r\nHost: x\r\n\r\n", 0, left(NotHttp), ALL),
        ("GET /a b HTTP/1.1\r\nHost: x\r\n\r\n", 0, left(NotHttp), ALL),
        ("GET\t/ HTTP/1.1\r\nHost: x\r\n\r\n", 0, left(NotHttp), ALL),
        ("GET / HTTP/1.1\nHost: x\n\n", 0, left(Ambiguous), ALL),
        ("GET / HTTP/1.1\r\r\nHost: x\r\n\r\n", 0, left(NotHttp), ALL),
        ("GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n", 0, left(NotHttp), ALL),
        ("get / HTTP/1.1\r\nHost: x\r\n\r\n", 1, Stop::End, Taken::Rejected(1)),
        ("M-SEARCH / HTTP/1.1\r\nHost: x\r\n\r\n", 1, Stop::End, ALL),
        ("TRACE / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab", 1, Stop::End, Taken::Rejected(1)),
        ("GET http://y/a?b HTTP/1.1\r\nHost: x\r\n\r\n", 1, Stop::End, ALL),
        ("GET http://y HTTP/1.1\r\nHost: x\r\n\r\n", 1, Stop::End, ALL),
        ("GET HTTPS://y:1/%2e/ HTTP/1.1\r\nHost: x\r\n\r\n", 1, Stop::End, ALL),
        ("GET x+1.-://y/z HTTP/1.1\r\nHost: x\r\n\r\n", 1, Stop::End, ALL),
        ("GET http://u@y/ HTTP/1.1\r\nHost: x\r\n\r\n", 1, Stop::End, Taken::Rejected(1)),
        ("OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 1, Stop::End, Taken::Rejected(1)),
        ("GET a HTTP/1.1\r\nHost: x\r\n\r\n", 1, Stop::End, Taken::Rejected(1)),
        ("GET /../x HTTP/1.1\r\nHost: x\r\n\r\n", 1, Stop::End, Taken::Rejected(1)),
        ("GET /%zz HTTP/1.1\r\nHost: x\r\n\r\n", 1, Stop::End, Taken::Rejected(1)),
        ("GET /\u{e4} HTTP/1.1\r\nHost: x\r\n\r\n", 1, Stop::End, ALL),
        ("CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n", 0, left(Reason::Upgraded), ALL),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 0, left(NotHttp), ALL),
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n\u{16}\u{3}\u{1}", 1, left(NotHttp), ALL),
    ]
}

#[test]
fn nginx_frames_what_we_frame() {
    let nginx = Plain::start();
    let posts = posts()
        .into_iter()
        .map(|(rest, n, stop, taken)| (format!("POST /p HTTP/1.1\r\nHost: x\r\n{rest}"), n, stop, taken));
    let streams = streams().into_iter().map(|(stream, n, stop, taken)| (stream.to_owned(), n, stop, taken));
    let long = [
        // A field of 9 KB is within our limit and beyond nginx's; a head of 17 KB is beyond ours.
        (9, 1, Stop::End, Taken::Rejected(1)),
        (17, 0, left(Reason::HeadTooLong), ALL),
    ]
    .map(|(k, n, stop, taken)| {
        (format!("GET / HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "x".repeat(k << 10)), n, stop, taken)
    });
    let mut wrong = Vec::new();
    let mut count = 0;
    for (stream, n, stop, taken) in posts.chain(streams).chain(long) {
        count += 1;
        let result = compare(&nginx, stream.as_bytes());
        if result != Ok((n, stop, taken)) {
            wrong.push(format!("{stream:?}\n  expected {n} {stop:?} {taken:?}\n  is {result:?}"));
        }
    }
    println!("{count} streams");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn nginx_frames_random_streams_as_we_do() {
    let (seed, count) = (setting("XO_SEED", 1), setting("XO_STREAMS", 10_000));
    println!("XO_SEED={seed} XO_STREAMS={count}");
    let nginx = Plain::start();
    let mut random = Random(seed);
    let mut stops: BTreeMap<String, usize> = BTreeMap::new();
    let (mut answered, mut rejected) = (0, 0);
    for i in 0..count {
        let stream = hostile::stream(&mut random);
        match compare(&nginx, &stream) {
            Ok((n, stop, taken)) => {
                *stops.entry(format!("{stop:?}")).or_default() += 1;
                match taken {
                    Taken::All => answered += n,
                    Taken::Closed(n) => answered += n,
                    Taken::Rejected(n) => {
                        answered += n - 1;
                        rejected += 1;
                    }
                }
            }
            Err(e) => panic!("stream {i} of seed {seed}: {}\n{e}", stream.escape_ascii()),
        }
    }
    println!("{answered} requests answered alike, {rejected} rejected by nginx; {stops:?}");
    assert!(answered > count as usize, "too few valid requests to tell anything: {answered}");
}

/// Does a rule for exactly this path take a request for this target?
fn rule_takes(path: &str, target: &str) -> bool {
    let policy = format!(
        "listen = [80]\n[targets]\nt = \"127.0.0.1:1\"\n[[rule]]\npath_exact = {path:?}\nto = [\"t\"]\n"
    );
    let policy = Policy::parse(&policy).unwrap_or_else(|e| panic!("{e}: {policy}"));
    let request = format!("GET {target} HTTP/1.1\r\n\r\n");
    match parse_head(request.as_bytes()) {
        Head::Complete(head) => matches!(policy.decide(&head), Decision::Choose(_)),
        _ => panic!("{target:?} is refused"),
    }
}

/// Or else a client could choose, by the way it writes a path, whether its rule applies.
#[test]
fn nginx_looks_up_the_path_that_the_policy_sees() {
    let (seed, count) = (setting("XO_SEED", 1), setting("XO_PATHS", 5000));
    println!("XO_SEED={seed} XO_PATHS={count}");
    let nginx = Plain::start();
    let mut random = Random(seed);
    let (mut wrong, mut looked_up) = (Vec::new(), 0);
    let mut connection = nginx.connect();
    for _ in 0..count {
        let target = hostile::target(&mut random);
        let target = target.replace("://y", "://path");
        connection.send(format!("GET {target} HTTP/1.1\r\nHost: path\r\n\r\n").as_bytes()).expect("send");
        let response = connection.response(false).unwrap_or_else(|e| panic!("{target:?}: {e}"));
        if response.status != 200 {
            connection = nginx.connect();
            continue;
        }
        looked_up += 1;
        let path = String::from_utf8_lossy(&response.body).into_owned();
        if !rule_takes(&path, &target) {
            wrong.push(format!("{target:?} is {path:?}"));
        }
    }
    println!("{looked_up} paths looked up");
    assert!(wrong.is_empty(), "{} of {looked_up}: {:#?}", wrong.len(), &wrong[..wrong.len().min(20)]);
    assert!(looked_up > count / 2, "too few valid paths to tell anything: {looked_up}");
}
