//! Which moved connections are worth a flow rule (a place in a NIC's table): the daemon's configuration says it, and a rule of
//! the policy may for those that it moves.

use bincode::{Decode, Encode};

/// What a connection must have come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Worth {
    /// Its home's eBPF program has redirected so many bytes, from the network header on.
    Bytes(u64),
    /// It has been away for so long, ms.
    Age(u64),
}

/// A text that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a number of bytes (\"2MiB\") or an age (\"10s\")")]
pub struct NotWorth;

impl Worth {
    /// Reads `0`, `4096`, `512KiB`, `2MiB`, `1GiB`, `500ms`, `10s`.
    ///
    /// # Errors
    /// What it should have been.
    pub fn parse(text: &str) -> Result<Worth, NotWorth> {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| NotWorth)?;
        let (make, times): (fn(u64) -> Worth, u64) = match unit {
            "" => (Worth::Bytes, 1),
            "KiB" => (Worth::Bytes, 1 << 10),
            "MiB" => (Worth::Bytes, 1 << 20),
            "GiB" => (Worth::Bytes, 1 << 30),
            "ms" => (Worth::Age, 1),
            "s" => (Worth::Age, 1000),
            _ => return Err(NotWorth),
        };
        number.checked_mul(times).map(make).ok_or(NotWorth)
    }

    /// Has a connection come to it that has been away for `age_ms`, and of which `bytes` were redirected?
    #[must_use]
    pub fn is_met(self, bytes: u64, age_ms: u64) -> bool {
        match self {
            Worth::Bytes(least) => bytes >= least,
            Worth::Age(least) => age_ms >= least,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{decode_local, encode_local};

    #[test]
    fn bytes_and_ages_have_units() {
        for (text, worth) in [
            ("0", Worth::Bytes(0)),
            ("4096", Worth::Bytes(4096)),
            ("512KiB", Worth::Bytes(512 << 10)),
            ("2MiB", Worth::Bytes(2 << 20)),
            ("1GiB", Worth::Bytes(1 << 30)),
            ("18446744073709551615", Worth::Bytes(u64::MAX)),
            ("0ms", Worth::Age(0)),
            ("500ms", Worth::Age(500)),
            ("10s", Worth::Age(10_000)),
        ] {
            assert_eq!(Worth::parse(text), Ok(worth), "{text}");
        }
        let too_large =
            ["18446744073709551616", "18446744073709551615KiB", "18446744073709552s", "17179869184GiB"];
        let not_so =
            ["", "s", "-1", "+1", "1.5s", "2 MiB", " 2MiB", "2mib", "2MB", "10m", "10s ", "1e3", "\u{661}s"];
        for text in too_large.into_iter().chain(not_so) {
            assert_eq!(Worth::parse(text), Err(NotWorth), "{text}");
        }
    }

    #[test]
    fn the_least_is_enough() {
        for (worth, bytes, age_ms, met) in [
            (Worth::Bytes(0), 0, 0, true),
            (Worth::Bytes(10), 9, u64::MAX, false),
            (Worth::Bytes(10), 10, 0, true),
            (Worth::Age(0), 0, 0, true),
            (Worth::Age(10), u64::MAX, 9, false),
            (Worth::Age(10), 0, 10, true),
        ] {
            assert_eq!(worth.is_met(bytes, age_ms), met, "{worth:?} of {bytes} bytes, {age_ms} ms");
        }
    }

    #[test]
    fn each_has_one_encoding() {
        for (worth, tag) in [(Worth::Bytes(u64::MAX - 1), 0), (Worth::Age(1_999_999_999), 1)] {
            let mut bytes = [0; 32];
            let length = encode_local(&worth, &mut bytes).expect("room");
            let (Worth::Bytes(number) | Worth::Age(number)) = worth;
            assert_eq!(bytes[..length], [&[tag, 0, 0, 0], &number.to_le_bytes()[..]].concat());
            assert_eq!(decode_local::<Worth>(&bytes[..length]), Ok(worth));
        }
    }
}
