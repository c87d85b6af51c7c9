//! `policy.toml`.

use std::collections::BTreeMap;
use std::fmt::{self, Formatter};
use std::net::SocketAddr;

use regex_lite::Regex;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use toml::Spanned;

use super::key::Key;
use super::line::protocol_named;
use super::{
    At, Balance, Condition, IMBALANCE, LOCAL, MAX_IMBALANCE, Parts, Policy, PolicyError, Port, RawRule,
    Share, Sticky, check_key, check_listen, check_targets, error_at, slots,
};
use crate::protocol::Protocol;
use crate::worth::Worth;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    listen: Vec<Spanned<FilePort>>,
    #[serde(default)]
    targets: BTreeMap<Spanned<String>, Spanned<String>>,
    #[serde(default)]
    rule: Vec<FileRule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRule {
    path_prefix: Option<Spanned<String>>,
    path_exact: Option<Spanned<String>>,
    path_regex: Option<Spanned<String>>,
    host: Option<String>,
    method: Option<OneOrMore>,
    header: Option<HeaderCondition>,
    slots: Option<Spanned<Vec<Spanned<String>>>>,
    to: Spanned<Vec<Spanned<FileShare>>>,
    balance: Option<Spanned<Named>>,
    key: Option<Spanned<String>>,
    sticky: Option<Spanned<FileSticky>>,
    imbalance: Option<Spanned<u32>>,
    handler: Option<String>,
    flower_after: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HeaderCondition {
    name: String,
    value: Option<String>,
}

/// `80` or `{ port = 6379, protocol = "redis" }`.
struct FilePort(Port);

impl<'de> Deserialize<'de> for FilePort {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<FilePort, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = FilePort;

            fn expecting(&self, f: &mut Formatter<'_>) -> fmt::Result {
                f.write_str("a port or { port = ..., protocol = ... }")
            }

            fn visit_i64<E: Error>(self, number: i64) -> Result<FilePort, E> {
                let number =
                    u16::try_from(number).map_err(|_| E::custom(format!("`{number}` is not a port")))?;
                Ok(FilePort(Port { number, protocol: Protocol::default() }))
            }

            fn visit_map<M: MapAccess<'de>>(self, map: M) -> Result<FilePort, M::Error> {
                #[derive(Deserialize)]
                #[serde(deny_unknown_fields)]
                struct Table {
                    port: u16,
                    protocol: Option<NamedProtocol>,
                }
                let Table { port, protocol } = Table::deserialize(MapAccessDeserializer::new(map))?;
                Ok(FilePort(Port { number: port, protocol: protocol.map(|p| p.0).unwrap_or_default() }))
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// `"t1"` or `{ name = "t1", weight = 3 }`.
struct FileShare(Share);

impl<'de> Deserialize<'de> for FileShare {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<FileShare, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = FileShare;

            fn expecting(&self, f: &mut Formatter<'_>) -> fmt::Result {
                f.write_str("a name or { name = ..., weight = ... }")
            }

            fn visit_str<E: Error>(self, name: &str) -> Result<FileShare, E> {
                Ok(FileShare(Share { name: name.to_owned(), weight: 1 }))
            }

            fn visit_map<M: MapAccess<'de>>(self, map: M) -> Result<FileShare, M::Error> {
                #[derive(Deserialize)]
                #[serde(deny_unknown_fields)]
                struct Table {
                    name: String,
                    weight: u32,
                }
                let Table { name, weight } = Table::deserialize(MapAccessDeserializer::new(map))?;
                Ok(FileShare(Share { name, weight }))
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// `true`, `false` or `"balanced"`.
struct FileSticky(Sticky);

impl<'de> Deserialize<'de> for FileSticky {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<FileSticky, D::Error> {
        struct Either;
        impl Visitor<'_> for Either {
            type Value = FileSticky;

            fn expecting(&self, f: &mut Formatter<'_>) -> fmt::Result {
                f.write_str("true, false or \"balanced\"")
            }

            fn visit_bool<E: Error>(self, always: bool) -> Result<FileSticky, E> {
                Ok(FileSticky(if always { Sticky::Always } else { Sticky::Never }))
            }

            fn visit_str<E: Error>(self, name: &str) -> Result<FileSticky, E> {
                match name {
                    "balanced" => Ok(FileSticky(Sticky::Balanced(IMBALANCE))),
                    _ => Err(E::unknown_variant(name, &["balanced"])),
                }
            }
        }
        deserializer.deserialize_any(Either)
    }
}

struct NamedProtocol(Protocol);

impl<'de> Deserialize<'de> for NamedProtocol {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<NamedProtocol, D::Error> {
        protocol_named(&String::deserialize(deserializer)?).map(NamedProtocol).map_err(D::Error::custom)
    }
}

struct Named(Balance);

impl<'de> Deserialize<'de> for Named {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Named, D::Error> {
        const NAMES: [&str; Balance::NAMES.len()] = {
            let [a, b, c, d] = Balance::NAMES;
            [a.0, b.0, c.0, d.0]
        };
        let name = String::deserialize(deserializer)?;
        Balance::named(&name).map(Named).ok_or_else(|| D::Error::unknown_variant(&name, &NAMES))
    }
}

pub(super) fn parse(text: &str) -> Result<Policy, PolicyError> {
    parts(text)?.build(text)
}

pub(super) fn parts(text: &str) -> Result<Parts, PolicyError> {
    let file: File = toml::from_str(text).map_err(|e| {
        let offset = e.span().map_or(0, |s| s.start);
        error_at(text, offset, e.message().lines().next().unwrap_or("not TOML"))
    })?;
    let mut parts = Parts {
        listen: file.listen.iter().map(|p| At { value: p.get_ref().0, offset: p.span().start }).collect(),
        ..Parts::default()
    };
    for (name, address) in &file.targets {
        let at = At { value: name.get_ref().clone(), offset: name.span().start };
        let parsed = address.get_ref().parse::<SocketAddr>().map_err(|_| {
            error_at(text, address.span().start, format!("`{}` is not ADDRESS:PORT", address.get_ref()))
        })?;
        parts.targets.push((at, parsed));
    }
    check_listen(text, &parts.listen)?;
    check_targets(text, &parts.targets)?;
    for rule in file.rule {
        parts.rules.push(raw_rule(text, rule)?);
    }
    Ok(parts)
}

fn raw_rule(text: &str, rule: FileRule) -> Result<RawRule, PolicyError> {
    if rule.to.get_ref().is_empty() {
        return Err(error_at(text, rule.to.span().start, "`to` names no target"));
    }
    let key_at = rule.key.as_ref().map_or(0, |k| k.span().start);
    let (balance, key) = choice(text, rule.balance, rule.key)?;
    let mut conditions = Vec::new();
    for (path, make) in [
        (rule.path_prefix, Condition::Prefix as fn(String) -> Condition),
        (rule.path_exact, Condition::Exact as fn(String) -> Condition),
    ] {
        if let Some(path) = path {
            if !path.get_ref().starts_with('/') {
                return Err(error_at(text, path.span().start, "a path begins with `/`"));
            }
            conditions.push(make(path.into_inner()));
        }
    }
    if let Some(regex) = rule.path_regex {
        let compiled = Regex::new(regex.get_ref())
            .map_err(|e| error_at(text, regex.span().start, format!("path_regex: {e}")))?;
        conditions.push(Condition::Regex(compiled));
    }
    conditions.extend(rule.host.map(|h| Condition::Host(h.to_ascii_lowercase())));
    conditions.extend(rule.method.map(|m| {
        Condition::Method(match m {
            OneOrMore::One(m) => vec![m],
            OneOrMore::More(all) => all,
        })
    }));
    conditions.extend(rule.header.map(|h| Condition::Header { name: h.name, value: h.value }));
    if let Some(ranges) = rule.slots {
        if ranges.get_ref().is_empty() {
            return Err(error_at(text, ranges.span().start, "`slots` names no slot"));
        }
        let range =
            |r: &Spanned<String>| slots::range(r.get_ref()).map_err(|e| error_at(text, r.span().start, e));
        conditions.push(Condition::Slots(ranges.get_ref().iter().map(range).collect::<Result<_, _>>()?));
    }
    check_key(key.as_ref(), &conditions).map_err(|message| error_at(text, key_at, message))?;
    let to = rule.to.into_inner().into_iter();
    let to: Vec<_> = to.map(|share| At { offset: share.span().start, value: share.into_inner().0 }).collect();
    let sticky = sticky(text, balance, rule.sticky, rule.imbalance)?;
    let flower_after = rule.flower_after.map(|after| worth(text, after, &to)).transpose()?;
    Ok(RawRule { conditions, to, handler: rule.handler, balance, key, sticky, flower_after, source: None })
}

fn worth(text: &str, after: Spanned<String>, to: &[At<Share>]) -> Result<Worth, PolicyError> {
    let fail = |message| error_at(text, after.span().start, message);
    if to.iter().all(|share| share.value.name == LOCAL) {
        return Err(fail("`flower_after` has no effect where all is served locally".to_owned()));
    }
    Worth::parse(after.get_ref()).map_err(|e| fail(format!("flower_after is {e}")))
}

fn sticky(
    text: &str,
    balance: Balance,
    sticky: Option<Spanned<FileSticky>>,
    imbalance: Option<Spanned<u32>>,
) -> Result<Sticky, PolicyError> {
    let at = sticky.as_ref().map_or(0, |s| s.span().start);
    let sticky = sticky.map_or(Sticky::default(), |s| s.into_inner().0);
    if balance == Balance::Hash && matches!(sticky, Sticky::Balanced(_)) {
        return Err(error_at(text, at, "with `hash` the key decides, and nothing can be `balanced`"));
    }
    let Some(imbalance) = imbalance else { return Ok(sticky) };
    let (percent, at) = (*imbalance.get_ref(), imbalance.span().start);
    match sticky {
        Sticky::Balanced(_) if (1..=MAX_IMBALANCE).contains(&percent) => Ok(Sticky::Balanced(percent)),
        Sticky::Balanced(_) => {
            Err(error_at(text, at, format!("an imbalance is 1 to {MAX_IMBALANCE} per cent")))
        }
        _ => Err(error_at(text, at, "`imbalance` has no effect without `sticky = \"balanced\"`")),
    }
}

fn choice(
    text: &str,
    balance: Option<Spanned<Named>>,
    key: Option<Spanned<String>>,
) -> Result<(Balance, Option<Key>), PolicyError> {
    let chosen = balance.as_ref().map_or(Balance::default(), |b| b.get_ref().0);
    match (chosen, key) {
        (Balance::Hash, None) => {
            let at = balance.map_or(0, |b| b.span().start);
            Err(error_at(text, at, "`hash` needs a `key`"))
        }
        (Balance::Hash, Some(key)) => {
            let parsed = Key::parse(key.get_ref()).map_err(|m| error_at(text, key.span().start, m))?;
            Ok((chosen, Some(parsed)))
        }
        (_, Some(key)) => {
            Err(error_at(text, key.span().start, "`key` has no effect without `balance = \"hash\"`"))
        }
        (_, None) => Ok((chosen, None)),
    }
}
