//! What this kernel can do; looked at once, at start.

use std::{fs, io};

/// Kernel features that change what the daemon does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// `TCP_TIMESTAMP` carries the unit in bit 0 (6.7 and later; "tcp: add support for usec resolution in
    /// TCP TS values").
    pub usec_timestamps: bool,
}

impl Features {
    /// Looks at the running kernel.
    #[must_use]
    pub fn detect() -> Features {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Features { usec_timestamps: at_least(&release, (6, 7)) }
    }
}

/// Identifies this boot: processes with the same one share their monotonic clock.
///
/// # Errors
/// When `/proc` is not mounted.
pub fn boot_id() -> io::Result<[u8; 16]> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits = text.chars().filter_map(|c| c.to_digit(16));
    let value = digits.fold(0_u128, |value, digit| value << 4 | u128::from(digit));
    Ok(value.to_be_bytes())
}

fn at_least(release: &str, wanted: (u32, u32)) -> bool {
    let mut numbers = release.split(['.', '-']).map_while(|n| n.parse::<u32>().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_compare_by_number() {
        assert!(
            at_least("6.18.44-fc-v782", (6, 7)) && at_least("6.7.0", (6, 7)) && at_least("10.0-rc1", (6, 7))
        );
        assert!(!at_least("6.1.0-13-amd64", (6, 7)) && !at_least("5.15", (6, 7)) && !at_least("", (6, 7)));
        assert_ne!(boot_id().expect("proc"), [0; 16]);
    }
}
