//! Valid streams of requests and responses, in every form that the framing follows.

use std::iter;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

use crate::http::Method;

/// A request as it goes over the wire.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) method: &'static str,
    pub(super) bytes: Vec<u8>,
}

/// A response as it goes over the wire.
#[derive(Clone, Debug)]
pub(super) struct Response {
    /// Of the request that it answers.
    pub(super) method: Method,
    pub(super) bytes: Vec<u8>,
    /// Parts that a server may send without letting anybody look: data of the body.
    pub(super) opaque: Vec<std::ops::Range<usize>>,
    /// Its end is the connection's.
    pub(super) until_close: bool,
}

/// Data of a body; the worst of it looks like framing.
fn data() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => vec(any::<u8>(), 1..60),
        2 => select(vec![
            &b"GET /inside HTTP/1.1\r\nHost: x\r\n\r\n"[..],
            b"0\r\n\r\n",
            b"\r\n",
            b"\r\n0\r\n\r\nPUT / HTTP/1.1\r\nContent-Length: 1\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
            b"\r",
            b"\n",
        ])
        .prop_map(<[u8]>::to_vec),
        // Longer than what is looked at in one step.
        1 => (1_usize..10_000, any::<u8>()).prop_map(|(n, b)| (0..n).map(|i| b.wrapping_add(i as u8)).collect()),
    ]
}

/// A field with white space where it is allowed, its name in any case.
fn field(name: &'static str, value: impl Strategy<Value = String>) -> impl Strategy<Value = String> {
    let before = select(vec![" ", " ", " ", "", "  ", "\t", " \t "]);
    let after = select(vec!["", "", "", " ", "\t", "  \t"]);
    (0_usize..3, before, value, after).prop_map(move |(case, before, value, after)| {
        let name = match case {
            0 => name.to_owned(),
            1 => name.to_ascii_lowercase(),
            _ => name.to_ascii_uppercase(),
        };
        format!("{name}:{before}{value}{after}\r\n")
    })
}

fn other_field() -> impl Strategy<Value = String> {
    prop_oneof![
        8 => select(vec![
            "Accept: */*\r\n",
            "X-Empty:\r\n",
            "X-Spaces:    \r\n",
            "content-length-x: 7\r\n",
            "X: Content-Length: 3\r\n",
            "Cookie: a=b; c=\"d\"\r\n",
            "X-Latin: \u{e4}\u{f6}\r\n",
            "!#$%&'*+-.^_`|~: odd but a token\r\n",
            "Connection: Keep-Alive, TE\r\n",
            "Expect: 100-continue\r\n",
        ])
        .prop_map(str::to_owned),
        // Heads that are longer than the first look.
        1 => (3000_usize..4800).prop_map(|n| format!("X-Long: {}\r\n", "x".repeat(n))),
    ]
}

/// The chunked coding of some data: the bytes, and where the data is.
fn chunked() -> impl Strategy<Value = (Vec<u8>, Vec<std::ops::Range<usize>>)> {
    let extension =
        select(vec!["", "", "", ";x", ";name=value", ";q=\"a;b\"", " ;x=y", "  ", ";;", "\t;x y"]);
    let size = (0_usize..4, any::<bool>());
    let trailer = select(vec!["Digest: abc\r\n", "X:\r\n", "Content-Length: 5\r\n", "Odd trailer\r\n"]);
    let chunks = vec((data(), size, extension.clone()), 0..5);
    (chunks, extension, 1_usize..4, vec(trailer, 0..3)).prop_map(|(chunks, extension, zeros, trailers)| {
        let (mut bytes, mut opaque) = (Vec::new(), Vec::new());
        for (data, (zeros, upper), extension) in chunks {
            let digits = if upper { format!("{:X}", data.len()) } else { format!("{:x}", data.len()) };
            bytes.extend(format!("{}{digits}{extension}\r\n", "0".repeat(zeros)).bytes());
            opaque.push(bytes.len()..bytes.len() + data.len());
            bytes.extend(data);
            bytes.extend(b"\r\n");
        }
        bytes.extend(format!("{}{extension}\r\n{}\r\n", "0".repeat(zeros), trailers.concat()).bytes());
        (bytes, opaque)
    })
}

#[derive(Clone, Debug)]
enum Body {
    None,
    Length(Vec<u8>, usize),
    Chunked(Vec<u8>, Vec<std::ops::Range<usize>>),
}

fn body() -> impl Strategy<Value = Body> {
    prop_oneof![
        3 => Just(Body::None),
        1 => (0_usize..3).prop_map(|zeros| Body::Length(Vec::new(), zeros)),
        3 => (data(), 0_usize..3).prop_map(|(data, zeros)| Body::Length(data, zeros)),
        3 => chunked().prop_map(|(bytes, opaque)| Body::Chunked(bytes, opaque)),
    ]
}

/// Fields that frame the body, among others in any order.
fn fields(body: Body) -> impl Strategy<Value = (Vec<String>, Body)> {
    let framing = match &body {
        Body::None => Just(Vec::new()).boxed(),
        Body::Length(data, zeros) => {
            let value = format!("{}{}", "0".repeat(*zeros), data.len());
            field("Content-Length", Just(value)).prop_map(|f| vec![f]).boxed()
        }
        Body::Chunked(..) => {
            let value = select(vec!["chunked", "Chunked", "CHUNKED"]).prop_map(str::to_owned);
            field("Transfer-Encoding", value).prop_map(|f| vec![f]).boxed()
        }
    };
    (framing, vec(other_field(), 0..4))
        .prop_flat_map(|(framing, others)| Just([framing, others].concat()).prop_shuffle())
        .prop_map(move |fields| (fields, body.clone()))
}

fn request() -> impl Strategy<Value = Request> {
    let method = select(vec!["GET", "HEAD", "POST", "PUT", "OPTIONS", "M-SEARCH"]);
    let target = select(vec![
        "/",
        "/a/b?x=1",
        "/%20/..//./x?",
        "http://example.org",
        "http://example.org:8080/a?b",
        "HTTPS://u@x/",
        "*",
        "/\u{e4}",
    ]);
    let lead = select(vec!["", "", "", "", "\r\n", "\r\n\r\n"]);
    let host = field("Host", Just("example.org:80".to_owned()));
    (method, target, lead, host, body().prop_flat_map(fields), any::<bool>()).prop_map(
        |(method, target, lead, host, (mut fields, body), old)| {
            let (minor, body) = match body {
                Body::None => (u8::from(!old), Vec::new()),
                Body::Length(data, _) => (u8::from(!old), data),
                Body::Chunked(bytes, _) => (1, bytes),
            };
            if minor == 0 {
                fields.push("Connection: keep-alive\r\n".into());
            }
            let head = format!("{lead}{method} {target} HTTP/1.{minor}\r\n{host}{}\r\n", fields.concat());
            Request { method, bytes: [head.as_bytes(), &body].concat() }
        },
    )
}

/// One to six requests on one connection.
pub(super) fn requests() -> impl Strategy<Value = Vec<Request>> {
    vec(request(), 1..7)
}

fn response(method: Method, last: bool) -> impl Strategy<Value = Response> {
    let interim = select(vec![
        "",
        "",
        "",
        "HTTP/1.1 100 Continue\r\n\r\n",
        "HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n",
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n",
    ]);
    let status = select(vec!["200 OK", "201 Created", "206 Partial Content", "404 Not Found", "500 ", "302"]);
    let bare = option::weighted(0.3, select(vec!["204 No Content", "304 Not Modified"]));
    (interim, status, bare, any::<bool>(), body().prop_flat_map(fields)).prop_map(
        move |(interim, status, bare, odd, (mut fields, body))| {
            let without_body = method == Method::Head || bare.is_some();
            let unframed = matches!(body, Body::None) && !without_body;
            let until_close = unframed && last && odd;
            if unframed && !until_close {
                fields.push("Content-Length: 0\r\n".into());
            }
            let minor = if matches!(body, Body::Chunked(..)) { 1 } else { u8::from(odd) };
            let status = bare.unwrap_or(status);
            let head = format!("{interim}HTTP/1.{minor} {status}\r\n{}\r\n", fields.concat());
            let mut bytes = head.into_bytes();
            let start = bytes.len();
            let whole = |n: usize| iter::once(0..n).collect::<Vec<_>>();
            let (body, ranges) = match body {
                _ if without_body => (Vec::new(), Vec::new()),
                Body::None if until_close => (b"until the end".to_vec(), whole(13)),
                Body::None => (Vec::new(), Vec::new()),
                Body::Length(data, _) => (data.clone(), whole(data.len())),
                Body::Chunked(coded, ranges) => (coded, ranges),
            };
            bytes.extend(body);
            let opaque = ranges.into_iter().map(|r| start + r.start..start + r.end).collect();
            Response { method, bytes, opaque, until_close }
        },
    )
}

/// The responses to one to six requests; only the last may end with the connection.
pub(super) fn responses() -> impl Strategy<Value = Vec<Response>> {
    let method = select(vec![Method::Other, Method::Other, Method::Other, Method::Head]);
    vec(method, 1..7).prop_flat_map(|methods| {
        let last = methods.len() - 1;
        methods.into_iter().enumerate().map(|(i, m)| response(m, i == last)).collect::<Vec<_>>()
    })
}

/// Sizes of reads, writes or arrivals, used in turn: from single bytes to everything at once.
pub(super) fn sizes() -> impl Strategy<Value = Vec<usize>> {
    vec(prop_oneof![3 => 1_usize..4, 4 => 1_usize..80, 2 => 80_usize..5000, 1 => Just(1 << 20)], 1..9)
}
