//! The chunked transfer coding (RFC 9112 section 7.1), followed byte by byte and skipped data in one step.

/// Longest chunk-size line or trailer line that is followed, bytes.
const MAX_LINE: u16 = 8192;

/// Where in a chunked body the stream stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chunked {
    /// In the hexadecimal size; the digits so far.
    Size { value: u64, digits: u8 },
    /// In an extension, until the line's end.
    Extension { value: u64, seen: u16, cr: bool },
    /// After the CR of the size line.
    SizeLf { value: u64 },
    /// In the data; how much is left.
    Data { left: u64 },
    /// Before the CR after the data.
    DataCr,
    /// Before the LF after the data.
    DataLf,
    /// In the trailer section; length of the line so far, CR seen.
    Trailer { line: u16, seen: u16, cr: bool },
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

    fn step(self, byte: u8) -> Chunked {
        match (self, byte) {
            (Chunked::Size { value, digits }, _) => size(value, digits, byte),
            (Chunked::Extension { seen: MAX_LINE.., .. }, _) => Chunked::Bad,
            (Chunked::Extension { value, .. }, b'\n') => after_size(value),
            (Chunked::Extension { cr: true, .. }, _) => Chunked::Bad,
            (Chunked::Extension { value, seen, cr: false }, _) => {
                Chunked::Extension { value, seen: seen + 1, cr: byte == b'\r' }
            }
            (Chunked::SizeLf { value }, b'\n') => after_size(value),
            (Chunked::DataCr, b'\r') => Chunked::DataLf,
            // nginx and others take a bare LF here; a sender of one is not worth following.
            (Chunked::DataLf, b'\n') => Chunked::new(),
            (Chunked::Trailer { line: 0, .. }, b'\n') => Chunked::Done,
            (Chunked::Trailer { seen, .. }, b'\n') => Chunked::Trailer { line: 0, seen, cr: false },
            (Chunked::Trailer { cr: true, .. } | Chunked::Trailer { seen: MAX_LINE.., .. }, _) => {
                Chunked::Bad
            }
            (Chunked::Trailer { line, seen, cr: false }, b'\r') => Chunked::Trailer { line, seen, cr: true },
            (Chunked::Trailer { line, seen, .. }, _) => {
                Chunked::Trailer { line: line.saturating_add(1), seen: seen + 1, cr: false }
            }
            _ => Chunked::Bad,
        }
    }
}

fn size(value: u64, digits: u8, byte: u8) -> Chunked {
    match (char::from(byte).to_digit(16), byte) {
        // 15 digits are a petabyte; more is an attack on somebody's arithmetic.
        (Some(d), _) if digits < 15 => Chunked::Size { value: value << 4 | u64::from(d), digits: digits + 1 },
        (None, b'\r') if digits > 0 => Chunked::SizeLf { value },
        (None, b';' | b' ' | b'\t') if digits > 0 => Chunked::Extension { value, seen: 0, cr: false },
        _ => Chunked::Bad,
    }
}

fn after_size(value: u64) -> Chunked {
    if value == 0 { Chunked::Trailer { line: 0, seen: 0, cr: false } } else { Chunked::Data { left: value } }
}
