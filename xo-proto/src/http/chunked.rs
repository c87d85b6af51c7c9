//! The chunked transfer coding (RFC 9112 section 7.1), followed byte by byte and skipped data in one step.

/// Longest chunk extension or trailer section that is followed, bytes.
const MAX_LINE: u16 = 8192;

/// Where in a chunked body the stream stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chunked {
    /// In the hexadecimal size; the digits so far.
    Size { value: u64, digits: u8 },
    /// After the size: white space, and from a semicolon on an extension, until the line's end.
    Extension { value: u64, seen: u16, begun: bool },
    /// After the CR of the size line.
    SizeLf { value: u64 },
    /// In the data; how much is left.
    Data { left: u64 },
    /// Before the CR after the data.
    DataCr,
    /// Before the LF after the data.
    DataLf,
    /// In the trailer section; bytes of it so far, at the beginning of a line or not.
    Trailer { seen: u16, begin: bool },
    /// After the CR of a trailer line; `end` for the empty one.
    TrailerLf { seen: u16, end: bool },
    /// Complete.
    Done,
    /// Not the chunked coding.
    Bad,
}

impl Chunked {
    /// The beginning of a body.
    pub(super) fn new() -> Chunked {
        Chunked::Size { value: 0, digits: 0 }
    }

    /// Follows `bytes`; returns how many of them belong to the body.
    pub(super) fn follow(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        while at < bytes.len() && !matches!(self, Chunked::Done | Chunked::Bad) {
            if let Chunked::Data { left } = *self {
                let n = left.min((bytes.len() - at) as u64);
                at += n as usize;
                *self = if n == left { Chunked::DataCr } else { Chunked::Data { left: left - n } };
            } else if let Some(&byte) = bytes.get(at) {
                *self = self.step(byte);
                at += 1;
            }
        }
        at
    }

    /// Bytes of data that may pass without being looked at.
    pub(super) fn opaque(&mut self, n: u64) -> bool {
        match *self {
            Chunked::Data { left } if n < left => *self = Chunked::Data { left: left - n },
            Chunked::Data { left } if n == left => *self = Chunked::DataCr,
            _ => return n == 0,
        }
        true
    }

    /// Lines end with CRLF here and nowhere else: servers differ on what a bare CR or LF means, in an extension most
    /// of all.
    fn step(self, byte: u8) -> Chunked {
        match (self, byte) {
            (Chunked::Size { value, digits }, _) => size(value, digits, byte),
            (Chunked::Extension { value, .. }, b'\r') => Chunked::SizeLf { value },
            (Chunked::Extension { value, seen, begun }, _) if seen < MAX_LINE => match byte {
                b';' | b' ' | b'\t' => {
                    Chunked::Extension { value, seen: seen + 1, begun: begun || byte == b';' }
                }
                _ if begun && is_text(byte) => Chunked::Extension { value, seen: seen + 1, begun },
                _ => Chunked::Bad,
            },
            (Chunked::SizeLf { value: 0 }, b'\n') => Chunked::Trailer { seen: 0, begin: true },
            (Chunked::SizeLf { value }, b'\n') => Chunked::Data { left: value },
            (Chunked::DataCr, b'\r') => Chunked::DataLf,
            (Chunked::DataLf, b'\n') => Chunked::new(),
            (Chunked::Trailer { seen, begin }, b'\r') => Chunked::TrailerLf { seen, end: begin },
            (Chunked::Trailer { seen, .. }, _) if seen < MAX_LINE && is_text(byte) => {
                Chunked::Trailer { seen: seen + 1, begin: false }
            }
            (Chunked::TrailerLf { end: true, .. }, b'\n') => Chunked::Done,
            (Chunked::TrailerLf { seen, .. }, b'\n') => Chunked::Trailer { seen, begin: true },
            _ => Chunked::Bad,
        }
    }
}

fn size(value: u64, digits: u8, byte: u8) -> Chunked {
    match (char::from(byte).to_digit(16), byte) {
        // 15 digits are a petabyte; more is an attack on somebody's arithmetic.
        (Some(d), _) if digits < 15 => Chunked::Size { value: value << 4 | u64::from(d), digits: digits + 1 },
        (None, b'\r') if digits > 0 => Chunked::SizeLf { value },
        (None, b';' | b' ' | b'\t') if digits > 0 => {
            Chunked::Extension { value, seen: 0, begun: byte == b';' }
        }
        _ => Chunked::Bad,
    }
}

/// May stand in a line: no control character but the tab.
fn is_text(byte: u8) -> bool {
    byte == b'\t' || !byte.is_ascii_control()
}
