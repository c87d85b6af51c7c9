//! A second opinion on framing, written the plain way: over a whole stream, with no state and no care for speed.

use crate::http::Method;

/// Length of the request at the beginning of `bytes`, if one is there and its framing leaves no choice.
pub(super) fn request(bytes: &[u8]) -> Option<usize> {
    let lead = (0..=2).rev().map(|n| n * 2).find(|&n| bytes.starts_with(&b"\r\n\r\n"[..n]))?;
    let rest = &bytes[lead..];
    let head = &rest[..find(rest, b"\r\n\r\n")?];
    let lines: Vec<&[u8]> = split(head, b"\r\n");
    if lines.iter().any(|l| l.iter().any(|b| matches!(b, b'\r' | b'\n' | 0))) {
        return None;
    }
    let words: Vec<&[u8]> = lines[0].split(|b| *b == b' ').collect();
    let &[method, target, version] = words.as_slice() else { return None };
    let old = match version {
        b"HTTP/1.0" => true,
        b"HTTP/1.1" => false,
        _ => return None,
    };
    if method.is_empty() || target.is_empty() || method == b"CONNECT" {
        return None;
    }
    let fields = fields(&lines[1..])?;
    let all =
        |name: &str| fields.iter().filter(move |f| f.0 == name).map(|f| f.1.as_str()).collect::<Vec<_>>();
    if all("host").len() > 1 || !all("upgrade").is_empty() {
        return None;
    }
    let start = lead + head.len() + 4;
    let len = match (all("content-length").as_slice(), all("transfer-encoding").as_slice()) {
        ([], []) => 0,
        (&[n], []) => number(n)?,
        ([], &[coding]) if !old && coding.eq_ignore_ascii_case("chunked") => chunked(&bytes[start..])?,
        _ => return None,
    };
    (bytes.len() - start >= len).then_some(start + len)
}

/// Ends of the complete responses at the beginning of `bytes` that answer requests of these methods.
pub(super) fn responses(bytes: &[u8], methods: &[Method]) -> Vec<usize> {
    let (mut at, mut ends) = (0, Vec::new());
    for method in methods {
        match response(&bytes[at..], *method) {
            Some(n) => at += n,
            None => break,
        }
        ends.push(at);
    }
    ends
}

/// Servers may end lines with a bare LF and begin with empty lines: what counts is what they believe to have written.
fn response(bytes: &[u8], method: Method) -> Option<usize> {
    let lead = bytes.iter().position(|b| !matches!(b, b'\r' | b'\n'))?;
    let mut lines = Vec::new();
    let mut at = lead;
    loop {
        let n = find(&bytes[at..], b"\n")?;
        let line = &bytes[at..at + n];
        at += n + 1;
        match line.strip_suffix(b"\r").unwrap_or(line) {
            [] => break,
            line => lines.push(line),
        }
    }
    let status = lines[0].strip_prefix(b"HTTP/1.")?;
    let old = match status.first()? {
        b'0' => true,
        b'1' => false,
        _ => return None,
    };
    let code: u16 = std::str::from_utf8(status.get(2..5)?).ok()?.parse().ok()?;
    if code == 101 {
        return None;
    }
    if (100..200).contains(&code) {
        return response(&bytes[at..], method).map(|n| at + n);
    }
    if method == Method::Head || code == 204 || code == 304 {
        return Some(at);
    }
    let fields = fields(&lines[1..])?;
    let all =
        |name: &str| fields.iter().filter(move |f| f.0 == name).map(|f| f.1.as_str()).collect::<Vec<_>>();
    let len = match (all("content-length").as_slice(), all("transfer-encoding").as_slice()) {
        (&[n], []) => number(n)?,
        ([], &[coding]) if !old && coding.eq_ignore_ascii_case("chunked") => chunked(&bytes[at..])?,
        _ => return None,
    };
    (bytes.len() - at >= len).then_some(at + len)
}

/// Names in lower case and trimmed values.
fn fields(lines: &[&[u8]]) -> Option<Vec<(String, String)>> {
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    let each = lines.iter().map(|line| {
        let colon = find(line, b":")?;
        let (name, value) = (text(&line[..colon]), text(&line[colon + 1..]));
        let plain = !name.is_empty() && !name.contains([' ', '\t']);
        plain.then(|| (name.to_ascii_lowercase(), value.trim_matches([' ', '\t']).to_owned()))
    });
    each.collect()
}

fn number(text: &str) -> Option<usize> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?
}

/// Length of a chunked body.
fn chunked(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        let size = line(&bytes[at..])?;
        at += size.len() + 2;
        let digits = size.split(|b| matches!(b, b';' | b' ' | b'\t')).next().unwrap_or_default();
        let digits = std::str::from_utf8(digits).ok().filter(|d| !d.starts_with('+'))?;
        let n = usize::from_str_radix(digits, 16).ok()?;
        if n == 0 {
            break;
        }
        let data = bytes.get(at..at.checked_add(n)?.checked_add(2)?)?;
        if !data.ends_with(b"\r\n") {
            return None;
        }
        at += n + 2;
    }
    loop {
        let trailer = line(&bytes[at..])?;
        at += trailer.len() + 2;
        if trailer.is_empty() {
            return Some(at);
        }
    }
}

/// Up to the first CRLF; without any other CR or LF.
fn line(bytes: &[u8]) -> Option<&[u8]> {
    let line = &bytes[..find(bytes, b"\r\n")?];
    line.iter().all(|b| !matches!(b, b'\r' | b'\n' | 0)).then_some(line)
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|w| w == what)
}

fn split<'b>(mut bytes: &'b [u8], at: &[u8]) -> Vec<&'b [u8]> {
    let mut parts = Vec::new();
    while let Some(n) = find(bytes, at) {
        parts.push(&bytes[..n]);
        bytes = &bytes[n + at.len()..];
    }
    parts.push(bytes);
    parts
}
