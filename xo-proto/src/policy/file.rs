//! `policy.toml`.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use regex_lite::Regex;
use serde::Deserialize;
use toml::Spanned;

use super::{At, Condition, Parts, Policy, PolicyError, RawRule, check_listen, check_targets, error_at};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    listen: Vec<Spanned<u16>>,
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
    to: Spanned<Vec<Spanned<String>>>,
    balance: Option<Spanned<Balance>>,
    handler: Option<String>,
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

#[derive(Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
enum Balance {
    RoundRobin,
    LeastLoaded,
    RandomTwo,
    Hash,
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
        listen: file.listen.iter().map(|p| At { value: *p.get_ref(), offset: p.span().start }).collect(),
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
    if let Some(balance) = rule.balance.filter(|b| *b.get_ref() != Balance::RoundRobin) {
        let message = "this version balances by `round_robin` only";
        return Err(error_at(text, balance.span().start, message));
    }
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
    let to = rule.to.into_inner().into_iter();
    let to = to.map(|name| At { offset: name.span().start, value: name.into_inner() }).collect();
    Ok(RawRule { conditions, to, handler: rule.handler, source: None })
}
