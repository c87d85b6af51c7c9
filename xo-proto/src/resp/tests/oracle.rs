//! A plain reading of the protocol, against which the framing is checked: it has all bytes at once.

/// A line's end: where the line ends, and where what comes after it begins.
fn line(bytes: &[u8]) -> Option<(&[u8], usize)> {
    let end = bytes.windows(2).position(|w| w == b"\r\n")?;
    Some((&bytes[..end], end + 2))
}

fn number(text: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(text).ok()?;
    let n: i64 = text.parse().ok()?;
    // As Redis has it: no plus, no zeros before it.
    (n.to_string() == text).then_some(n)
}

/// Length of the command that begins `bytes`, if it is complete.
pub(super) fn command(bytes: &[u8]) -> Option<usize> {
    if bytes.first() != Some(&b'*') {
        return bytes.iter().position(|b| *b == b'\n').map(|n| n + 1);
    }
    let (count, mut at) = line(bytes)?;
    for _ in 0..number(&count[1..])?.max(0) {
        let (len, begin) = line(&bytes[at..])?;
        let len = usize::try_from(number(len.strip_prefix(b"$")?)?).ok()?;
        at = at.checked_add(begin)?.checked_add(len)?.checked_add(2).filter(|end| *end <= bytes.len())?;
    }
    Some(at)
}

/// Length of the value that begins `bytes`, if it is complete, and whether it is no reply but a push.
pub(super) fn value(bytes: &[u8]) -> Option<(usize, bool)> {
    let kind = *bytes.first()?;
    let (text, mut at) = match kind {
        b'+' | b'-' | b':' | b'_' | b'#' | b',' | b'(' => {
            return bytes.iter().position(|b| *b == b'\n').map(|n| (n + 1, false));
        }
        _ => line(bytes)?,
    };
    let text = text.get(1..)?;
    if matches!(kind, b'$' | b'*') && text == b"-1" {
        return Some((at, false));
    }
    if text.is_empty() || text.len() > 18 || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let n = std::str::from_utf8(text).ok()?.parse::<usize>().ok()?;
    let inside = match kind {
        b'$' | b'!' | b'=' => {
            let end = at.checked_add(n)?.checked_add(2)?;
            return (end <= bytes.len()).then_some((end, false));
        }
        b'*' | b'~' | b'>' => n,
        b'%' => n.checked_mul(2)?,
        // The value that it is about comes after it.
        b'|' => n.checked_mul(2)?.checked_add(1)?,
        _ => return None,
    };
    for _ in 0..inside {
        match value(&bytes[at..])? {
            (n, false) => at += n,
            (_, true) => return None,
        }
    }
    Some((at, kind == b'>'))
}

/// Where so many replies end, pushes between them passed over; fewer if they are not all there.
pub(super) fn replies(bytes: &[u8], count: usize) -> Vec<usize> {
    let (mut ends, mut at) = (Vec::new(), 0);
    while ends.len() < count
        && let Some((n, push)) = value(&bytes[at..])
    {
        at += n;
        if !push {
            ends.push(at);
        }
    }
    ends
}
