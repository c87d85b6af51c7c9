//! Random streams of requests: mostly valid ones, with what servers disagree about strewn in.

use crate::random::Random;

/// Some requests on one connection, every second time with a few bytes changed.
pub fn stream(r: &mut Random) -> Vec<u8> {
    let mut stream: Vec<u8> = (0..=r.below(4)).flat_map(|_| request(r)).collect();
    if r.one_in(2) {
        for _ in 0..=r.below(2) {
            let at = r.below(stream.len());
            let odd = b"\r\n \t:;,0129aF+-\0\x7f\xe4";
            let byte = odd[r.below(odd.len())];
            match r.below(3) {
                0 => stream[at] = byte,
                1 => stream.insert(at, byte),
                _ => drop(stream.remove(at)),
            }
        }
    }
    stream
}

/// A target with much to normalise.
pub fn target(r: &mut Random) -> String {
    let pieces = [
        "/", "/", "/", ".", "..", "/.", "/..", "/../", "a", "b", "...", "%61", "%2f", "%2E", "%2e.", "%25",
        "%41%42",
    ];
    let odd = ["%00", "%", "%g1", "#c", "?d", "%23", "%3f", "\u{e4}", "%e4", "+", "\\", ";x", ":", "%20"];
    let start = r.rarely(10, &["http://y", "z://y:1", "http://y/"], &["/"]);
    (0..r.below(8)).fold(start.to_owned(), |t, _| t + r.rarely(6, &odd, &pieces))
}

fn request(r: &mut Random) -> Vec<u8> {
    let end = r.rarely(80, &["\n", "\r", "\r\r\n", " \r\n"], &["\r\n"]);
    let lead = r.rarely(50, &["\n", " ", "\r", "\r\n\r\n\r\n"], &["", "", "", "\r\n", "\r\n\r\n"]);
    let method =
        r.rarely(40, &["put", "TRACE", "X Y"], &["GET", "HEAD", "POST", "PUT", "DELETE", "M-SEARCH"]);
    let target = r.rarely(
        40,
        &["*", "x", "/ ", "//%", "http:/y", "y:80", "/../", "http://"],
        &["/", "/a/b?c=d", "/plain", "/plain/x", "/%20//./", "http://y/z", "/a#b", "/x?y?z", "http://y:8?z"],
    );
    let version =
        r.rarely(25, &["HTTP/1.0", "HTTP/1.0", "HTTP/1.2", "HTTP/1.1 ", "HTTP/01.1"], &["HTTP/1.1"]);
    let mut fields = vec![format!("Host:{}x", r.of(&["", " ", "  "]))];
    for _ in 0..r.below(3) {
        let plain =
            ["X: y", "Connection: keep-alive", "Expect: 100-continue", "X-Odd!: \u{e4}", "X:", "Y:\tz\t"];
        let odd = [
            "Connection: x, close",
            "Connection: closed",
            "Content-Length: 0",
            "Content_Length: 7",
            "Transfer_Encoding: chunked",
            "Transfer-Encoding: chunked",
            "Content-Length",
            " folded: x",
            "Host: y",
        ];
        fields.push(r.rarely(8, &odd, &plain).to_owned());
    }
    let body = body(r, &mut fields);
    let last = fields.len() - 1;
    fields.swap(r.below(last + 1), last);
    let fields: String = fields.into_iter().map(|f| f + end).collect();
    [format!("{lead}{method} {target} {version}{end}{fields}{end}").into_bytes(), body].concat()
}

/// A body, or none; its framing is added to `fields`.
fn body(r: &mut Random, fields: &mut Vec<String>) -> Vec<u8> {
    let data: Vec<u8> = match r.below(4) {
        0 => (0..r.below(40)).map(|_| r.next() as u8).collect(),
        1 => b"GET /inside HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        2 => b"0\r\n\r\n".to_vec(),
        _ => vec![b'd'; r.below(6000)],
    };
    match r.below(3) {
        0 => Vec::new(),
        1 => {
            let name = r.of(&["Content-Length", "content-length"]);
            let before = r.rarely(30, &["+", "-", "0x", "\t", "1 "], &["", " ", "  ", " 0", " 000"]);
            let after = r.rarely(30, &["\t", ".0", ",", " 1"], &["", "", " ", "  "]);
            fields.push(format!("{name}:{before}{}{after}", data.len()));
            data
        }
        _ => {
            let odd = ["chunked, chunked", "x", "\tchunked", "chunked\t", "\"chunked\"", "chunked;a"];
            fields.push(format!("Transfer-Encoding:{}", r.rarely(30, &odd, &[" chunked", "Chunked  "])));
            chunked(r, &data)
        }
    }
}

fn chunked(r: &mut Random, data: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    for piece in data.chunks(1 + r.below(1500)) {
        let odd = [";a\n", " 1", ";\r", "\n", "g", "h", " a", "\r", ";\0", "\u{b}"];
        let extension = r.rarely(40, &odd, &["", "", "", ";", ";a", " ", ";a=\"b\"", " ;a", "\t"]);
        let before = r.rarely(40, &["0x", "+", "-", " ", "\r\n", "fffffffffffffff"], &["", "0", "000"]);
        let after = r.rarely(60, &["\n", "\r", "", "\r\n\r\n"], &["\r\n"]);
        body.extend(format!("{before}{:x}{extension}\r\n", piece.len()).bytes());
        body.extend(piece);
        body.extend(after.bytes());
    }
    let odd =
        ["0\r\n\n", "0\n\r\n", "0\r\nT: v\n\r\n", "0;\n\r\n", "\r\n", "0\r\n\r\r\n", "0\r\nT:\rv\r\n\r\n"];
    let plain = ["0\r\n\r\n", "0\r\n\r\n", "00;x\r\nT: v\r\n\r\n", "0\r\nT\r\n\r\n", "0 \r\nHost: z\r\n\r\n"];
    body.extend(r.rarely(30, &odd, &plain).bytes());
    body
}
