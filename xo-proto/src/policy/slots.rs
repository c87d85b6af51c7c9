//! Ranges of hash slots in rules.

use std::ops::RangeInclusive;

use crate::resp::SLOTS;

/// `0-5460`, or a single slot.
pub(super) fn range(text: &str) -> Result<RangeInclusive<u16>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let slot = |text: &str| {
        let slot = text.trim().parse().ok().filter(|slot| *slot < SLOTS);
        slot.ok_or_else(|| format!("`{}` is not a slot (0 to {})", text.trim(), SLOTS - 1))
    };
    let (first, last) = (slot(first)?, slot(last)?);
    if first > last { Err(format!("`{text}` ends before it begins")) } else { Ok(first..=last) }
}

/// A request without keys is in none.
pub(super) fn contain(ranges: &[RangeInclusive<u16>], slot: Option<u16>) -> bool {
    slot.is_some_and(|slot| ranges.iter().any(|range| range.contains(&slot)))
}
