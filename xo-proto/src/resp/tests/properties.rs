//! What holds for every stream, however it is cut.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::oracle;
use super::reader::{self, Reading};
use crate::protocol::Progress;
use crate::resp::{Command, Replies};

fn away(command: &Command) -> bool {
    command.slot.is_some_and(|slot| slot % 2 == 1)
}

fn bulk(data: &[u8]) -> Vec<u8> {
    [format!("${}\r\n", data.len()).as_bytes(), data, b"\r\n"].concat()
}

/// Data; the worst of it looks like framing.
fn data() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => vec(any::<u8>(), 0..30),
        2 => select(vec![&b"\r\n*1\r\n$4\r\nPING\r\n"[..], b"\r\n", b"$1\r\n", b"PING\r\n", b"{a}", b"STORE"])
            .prop_map(<[u8]>::to_vec),
        1 => (1_usize..40_000, any::<u8>()).prop_map(|(n, b)| (0..n).map(|i| b.wrapping_add(i as u8)).collect()),
    ]
}

/// A command that keeps nothing, as an array, a line, or nothing at all; whether it is answered.
fn command() -> impl Strategy<Value = (Vec<u8>, bool)> {
    let key = vec(any::<u8>(), 0..20);
    let name =
        select(vec!["GET", "SET", "hset", "APPEND", "LPUSH", "setrange", "PING", "XADD", "EVAL", "Object"]);
    prop_oneof![
        8 => (name, key, vec(data(), 0..6)).prop_map(|(name, key, rest)| {
            let head = format!("*{}\r\n", rest.len() + 2);
            let all = [head.into_bytes(), bulk(name.as_bytes()), bulk(&key)];
            (all.into_iter().chain(rest.iter().map(|d| bulk(d))).flatten().collect(), true)
        }),
        1 => (0_u8..200, any::<bool>()).prop_map(|(n, cr)| {
            (format!("get  k{n} {}\n", if cr { "\r" } else { "" }).into_bytes(), true)
        }),
        1 => select(vec!["*0\r\n", "*-1\r\n", "\r\n", " \n"]).prop_map(|s| (s.into(), false)),
    ]
}

fn sizes() -> impl Strategy<Value = Vec<usize>> {
    vec(prop_oneof![1_usize..8, 1_usize..300, Just(16_384), Just(1 << 20)], 1..5)
}

fn change() -> impl Strategy<Value = (Index, u8)> {
    (any::<Index>(), prop_oneof![any::<u8>(), select(&b"\r\n*$-0123456789+ "[..])])
}

/// A value as a server writes it.
fn value() -> impl Strategy<Value = Vec<u8>> {
    let text = select(vec!["", "OK", "ERR x", "1", "-12345678901234567890", "t", "inf", "$5"]);
    let kinds = select(&b"+-:_#,("[..]);
    let leaf = prop_oneof![
        4 => (kinds, text).prop_map(|(kind, text)| format!("{}{text}\r\n", char::from(kind)).into_bytes()),
        4 => (select(&b"$!="[..]), data()).prop_map(|(kind, data)| {
            let mut bytes = bulk(&data);
            bytes[0] = kind;
            bytes
        }),
        1 => select(vec!["$-1\r\n", "*-1\r\n", "*0\r\n", "%0\r\n", "~0\r\n"]).prop_map(|s| s.into()),
    ];
    leaf.prop_recursive(6, 40, 6, |inner| {
        (select(&b"*~%|"[..]), vec(inner, 0..6)).prop_map(|(kind, values)| {
            let count = match kind {
                // The value that the attribute is about is among them.
                b'%' | b'|' => values.len() / 2,
                _ => values.len(),
            };
            let used = if matches!(kind, b'%' | b'|') { count * 2 } else { count };
            let mut bytes = format!("{}{count}\r\n", char::from(kind)).into_bytes();
            bytes.extend(values.iter().take(used).flatten());
            if kind == b'|' {
                bytes.extend(b"+about\r\n");
            }
            bytes
        })
    })
}

fn push() -> impl Strategy<Value = Vec<u8>> {
    vec(value(), 0..4).prop_map(|v| [format!(">{}\r\n", v.len()).into_bytes(), v.concat()].concat())
}

fn joined(parts: impl Iterator<Item = Vec<u8>>) -> (Vec<u8>, Vec<usize>) {
    let (mut stream, mut ends) = (Vec::new(), vec![0]);
    for part in parts {
        stream.extend(part);
        ends.push(stream.len());
    }
    (stream, ends)
}

/// Where commands end, by the oracle.
fn real_ends(stream: &[u8]) -> Vec<usize> {
    let mut ends = vec![0];
    while let Some(n) = oracle::command(&stream[ends[ends.len() - 1]..]) {
        ends.push(ends[ends.len() - 1] + n);
    }
    ends
}

/// Reads end at ends of commands only, and before each command that belongs elsewhere.
fn check(reading: &Reading, ends: &[usize]) -> Result<(), TestCaseError> {
    for at in &reading.boundaries {
        prop_assert!(ends.contains(at), "{} of {:?}", at, ends);
    }
    for at in &reading.away {
        prop_assert!(*at == 0 || reading.boundaries.contains(at), "{} is read with what is before it", at);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn any_split_frames_the_same(commands in vec(command(), 1..12), paces in [(sizes(), sizes()), (sizes(), sizes())]) {
        let answered = commands.iter().filter(|(_, answered)| *answered).count();
        let (stream, ends) = joined(commands.into_iter().map(|(bytes, _)| bytes));
        let whole = reader::read(&stream, &[usize::MAX / 2], &[usize::MAX / 2], away);
        for (arrivals, wants) in &paces {
            let reading = reader::read(&stream, arrivals, wants, away);
            prop_assert_eq!((reading.end, reading.left), (stream.len(), None));
            prop_assert_eq!(reading.replies as usize, answered);
            prop_assert_eq!(&reading.away, &whole.away);
            check(&reading, &ends)?;
        }
    }

    #[test]
    fn changed_commands_are_framed_right_or_left_alone(
        commands in vec(command(), 1..6),
        changes in vec(change(), 1..4),
        (arrivals, wants) in (sizes(), sizes()),
    ) {
        let (mut stream, _) = joined(commands.into_iter().map(|(bytes, _)| bytes));
        for (at, byte) in changes {
            let at = at.index(stream.len());
            stream[at] = byte;
        }
        check(&reader::read(&stream, &arrivals, &wants, away), &real_ends(&stream))?;
    }

    #[test]
    fn replies_end_where_they_end(
        replies in vec((value(), proptest::option::of(push())), 1..8),
        sizes in sizes(),
    ) {
        let count = replies.len();
        let (stream, _) = joined(replies.into_iter().map(|(reply, push)| [push.unwrap_or_default(), reply].concat()));
        prop_assert_eq!(oracle::replies(&stream, count).last().copied(), Some(stream.len()));
        let mut tracker = Replies::default();
        tracker.asked(count as u32, false);
        let (mut at, mut i) = (0, 0);
        while at < stream.len() {
            let n = sizes[i % sizes.len()].min(stream.len() - at);
            tracker.wrote(&stream[at..at + n]);
            (at, i) = (at + n, i + 1);
            let expected = if at == stream.len() { Progress::Clean } else { Progress::InProgress };
            prop_assert_eq!(tracker.progress(), expected, "at {} of {}", at, stream.len());
        }
    }

    #[test]
    fn changed_replies_are_never_clean_too_early(
        replies in vec(value(), 1..6),
        changes in vec(change(), 1..4),
        sizes in sizes(),
    ) {
        let count = replies.len();
        let (mut stream, _) = joined(replies.into_iter());
        for (at, byte) in changes {
            let at = at.index(stream.len());
            stream[at] = byte;
        }
        let mut tracker = Replies::default();
        tracker.asked(count as u32, false);
        let (mut at, mut i) = (0, 0);
        while at < stream.len() {
            let n = sizes[i % sizes.len()].min(stream.len() - at);
            tracker.wrote(&stream[at..at + n]);
            (at, i) = (at + n, i + 1);
            if tracker.progress() == Progress::Clean {
                let real = oracle::replies(&stream, count);
                let end = real.last().filter(|_| real.len() == count);
                let pushes_only = end.is_some_and(|end| {
                    let mut rest = &stream[*end..at];
                    while let Some((n, true)) = oracle::value(rest) {
                        rest = &rest[n..];
                    }
                    rest.is_empty()
                });
                prop_assert!(pushes_only, "clean at {}, {:?}", at, real);
            }
        }
    }
}
