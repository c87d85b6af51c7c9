//! The one-liners; grammar in the parent's documentation.

use regex_lite::Regex;

use super::key::Key;
use super::{
    At, Balance, Condition, PolicyError, Port, RawRule, Share, Sticky, check_key, check_listen,
    check_targets, error_at, slots, suggestion,
};
use crate::protocol::Protocol;

/// `XO_LISTEN`.
pub(super) fn listen(text: &str) -> Result<Vec<At<Port>>, PolicyError> {
    let listen = items(0, text, ',')
        .map(|item| {
            let value = port(item.value).map_err(|message| error_at(text, item.offset, message))?;
            Ok(At { value, offset: item.offset })
        })
        .collect::<Result<Vec<_>, _>>()?;
    check_listen(text, &listen)?;
    Ok(listen)
}

/// `80`, or `6379/redis`.
fn port(text: &str) -> Result<Port, String> {
    let (number, protocol) = text.split_once('/').unwrap_or((text, "http"));
    let number = number.trim_end().parse().map_err(|_| format!("`{text}` is not a port"))?;
    Ok(Port { number, protocol: protocol_named(protocol.trim_start())? })
}

pub(super) fn protocol_named(name: &str) -> Result<Protocol, String> {
    Protocol::named(name).ok_or_else(|| {
        let known = Protocol::NAMES.iter().map(|(n, _)| *n);
        format!("unknown protocol `{name}`{}", suggestion(name, known))
    })
}

/// `XO_TARGETS`.
pub(super) fn targets(text: &str) -> Result<Vec<(At<String>, std::net::SocketAddr)>, PolicyError> {
    let targets = items(0, text, ',')
        .map(|item| {
            let bad = || {
                let message = format!("`{}` is not NAME=ADDRESS:PORT", item.value);
                error_at(text, item.offset, message)
            };
            let (name, address) = item.value.split_once('=').ok_or_else(bad)?;
            let address = address.trim().parse().map_err(|_| bad())?;
            Ok((At { value: name.trim().to_owned(), offset: item.offset }, address))
        })
        .collect::<Result<Vec<_>, _>>()?;
    check_targets(text, &targets)?;
    Ok(targets)
}

/// `XO_RULES`.
pub(super) fn rules(text: &str) -> Result<Vec<RawRule>, PolicyError> {
    items(0, text, ';').map(|item| rule(text, item)).collect()
}

fn rule(text: &str, item: At<&str>) -> Result<RawRule, PolicyError> {
    let Some((conditions, to)) = item.value.split_once("=>") else {
        return Err(error_at(text, item.offset, format!("`{}` has no `=>`", item.value)));
    };
    let to_offset = item.offset + conditions.len() + 2;
    let (names, handler) = match to.split_once('@') {
        Some((names, handler)) => (names, Some(handler.trim().to_owned())),
        None => (to, None),
    };
    let (names, choice) = match names.split_once('%') {
        Some((names, choice)) => (names, Some(At { value: choice, offset: to_offset + names.len() + 1 })),
        None => (names, None),
    };
    let (balance, key) = match choice {
        Some(c) => self::choice(c.value.trim()).map_err(|message| error_at(text, c.offset, message))?,
        None => (Balance::default(), None),
    };
    let conditions = items(item.offset, conditions, ' ')
        .map(|c| condition(c.value).map_err(|message| error_at(text, c.offset, message)))
        .collect::<Result<Vec<_>, _>>()?;
    let choice_at = to_offset + names.len() + 1;
    check_key(key.as_ref(), &conditions).map_err(|message| error_at(text, choice_at, message))?;
    let to = items(to_offset, names, ',')
        .map(|s| Ok(At { value: share(s.value).map_err(|m| error_at(text, s.offset, m))?, offset: s.offset }))
        .collect::<Result<Vec<_>, _>>()?;
    if to.is_empty() {
        return Err(error_at(text, to_offset, "no target after `=>`"));
    }
    let (sticky, source) = (Sticky::default(), Some(text.to_owned()));
    Ok(RawRule { conditions, to, handler, balance, key, sticky, flower_after: None, source })
}

fn share(text: &str) -> Result<Share, String> {
    let Some((name, weight)) = text.split_once('*') else {
        return Ok(Share { name: text.to_owned(), weight: 1 });
    };
    let weight = weight.trim().parse().map_err(|_| format!("`{text}` is not NAME*WEIGHT"))?;
    Ok(Share { name: name.trim().to_owned(), weight })
}

/// `balance` or `hash(key)`.
fn choice(text: &str) -> Result<(Balance, Option<Key>), String> {
    let (name, key) = match text.split_once('(') {
        Some((name, rest)) => (name, Some(rest.strip_suffix(')').ok_or("`(` without `)`")?)),
        None => (text, None),
    };
    match (Balance::named(name), key) {
        (Some(Balance::Hash), Some(key)) => Ok((Balance::Hash, Some(Key::parse(key)?))),
        (Some(Balance::Hash), None) => Err("`hash` needs a key: hash(path)".into()),
        (Some(balance), None) => Ok((balance, None)),
        (Some(_), Some(_)) => Err(format!("`{name}` has no key")),
        (None, _) => {
            Err(format!("`{name}` is no way to choose (round_robin, least_loaded, random_two, hash(KEY))"))
        }
    }
}

fn condition(text: &str) -> Result<Condition, String> {
    if text.starts_with('/') {
        return Ok(Condition::Prefix(text.to_owned()));
    }
    if let Some(path) = text.strip_prefix('=').filter(|p| p.starts_with('/')) {
        return Ok(Condition::Exact(path.to_owned()));
    }
    if let Some(regex) = text.strip_prefix('~') {
        return Regex::new(regex).map(Condition::Regex).map_err(|e| e.to_string());
    }
    if let Some(host) = text.strip_prefix("host=") {
        return Ok(Condition::Host(host.to_ascii_lowercase()));
    }
    if let Some(method) = text.strip_prefix("method=") {
        return Ok(Condition::Method(method.split('|').map(str::to_owned).collect()));
    }
    if let Some(ranges) = text.strip_prefix("slots=") {
        return ranges.split('|').map(slots::range).collect::<Result<_, _>>().map(Condition::Slots);
    }
    Err(format!("`{text}` is no condition (/PREFIX =/EXACT ~REGEX host=NAME method=NAME slots=FIRST-LAST)"))
}

/// Non-empty, trimmed pieces of `part`, which begins at byte `start` of the variable, with their offsets.
fn items(start: usize, part: &str, separator: char) -> impl Iterator<Item = At<&str>> {
    let mut offset = start;
    part.split(separator).filter_map(move |piece| {
        let begin = offset + (piece.len() - piece.trim_start().len());
        offset += piece.len() + separator.len_utf8();
        let value = piece.trim();
        (!value.is_empty()).then_some(At { value, offset: begin })
    })
}
