//! The part of a request that decides where it goes, for rules that hash.

use crate::http::RequestHead;

/// What a rule hashes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// The path, normalised as for matching, without the query.
    Path,
    /// The n-th part of that path, from 1.
    PathSegment(usize),
    /// The first parameter of this name in the query, as sent.
    Query(String),
    /// The first field of this name.
    Header(String),
    /// The cookie of this name.
    Cookie(String),
}

impl Key {
    /// From its name in a policy.
    pub(super) fn parse(text: &str) -> Result<Key, String> {
        let (kind, argument) = text.split_once(':').unwrap_or((text, ""));
        match (kind, argument) {
            ("path", "") => Ok(Key::Path),
            ("path_segment", n) => match n.parse() {
                Ok(n @ 1..) => Ok(Key::PathSegment(n)),
                _ => Err(format!("`{text}`: the parts of a path are counted from 1 (path_segment:1)")),
            },
            ("query" | "header" | "cookie", "") => Err(format!("`{text}` needs a name ({kind}:NAME)")),
            ("query", name) => Ok(Key::Query(name.to_owned())),
            ("header", name) => Ok(Key::Header(name.to_owned())),
            ("cookie", name) => Ok(Key::Cookie(name.to_owned())),
            _ => Err(format!(
                "`{text}` is no key (path, path_segment:N, query:NAME, header:NAME, cookie:NAME)"
            )),
        }
    }

    /// Hash of the request's key; `None` when it has none, or an empty one.
    pub(super) fn hash(&self, head: &RequestHead<'_>, path: &str) -> Option<u64> {
        self.bytes(head, path).filter(|bytes| !bytes.is_empty()).map(hashed)
    }

    fn bytes<'a>(&self, head: &RequestHead<'a>, path: &'a str) -> Option<&'a [u8]> {
        match self {
            Key::Path => Some(path.as_bytes()),
            Key::PathSegment(n) => path.split('/').nth(*n).map(str::as_bytes),
            Key::Query(name) => head.query?.split('&').find_map(|pair| {
                let (given, value) = pair.split_once('=')?;
                (given == name).then_some(value.as_bytes())
            }),
            Key::Header(name) => head.header(name).next(),
            Key::Cookie(name) => head.header("cookie").find_map(|field| cookie(field, name.as_bytes())),
        }
    }
}

fn cookie<'a>(field: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    field.split(|b| *b == b';').find_map(|pair| {
        let pair = pair.trim_ascii();
        pair.strip_prefix(name)?.strip_prefix(b"=")
    })
}

/// FNV-1a, and its bits spread. All machines must come to the same result: this may never change.
pub(crate) fn hashed(bytes: &[u8]) -> u64 {
    let fnv = bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    mixed(fnv)
}

/// Spreads each bit over all (the finaliser of splitmix64).
pub(super) fn mixed(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
