//! The one-liners; grammar in the parent's documentation.

use regex_lite::Regex;

use super::{
    At, Condition, PolicyError, Port, RawRule, check_listen, check_targets, error_at, slots, suggestion,
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
    let conditions = items(item.offset, conditions, ' ')
        .map(|c| condition(c.value).map_err(|message| error_at(text, c.offset, message)))
        .collect::<Result<Vec<_>, _>>()?;
    let to: Vec<_> = items(to_offset, names, ',')
        .map(|name| At { value: name.value.to_owned(), offset: name.offset })
        .collect();
    if to.is_empty() {
        return Err(error_at(text, to_offset, "no target after `=>`"));
    }
    Ok(RawRule { conditions, to, handler, source: Some(text.to_owned()) })
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
