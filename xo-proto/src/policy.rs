//! The policy: which requests go where (DESIGN: the file `policy.toml`, or the one-liners `XO_LISTEN`,
//! `XO_TARGETS`, `XO_RULES`). First match wins; no match means "served where it is".
//!
//! The one-liners, in a small grammar:
//! ```text
//! XO_LISTEN  = port [ "/" protocol ] *( "," port [ "/" protocol ] )
//! XO_TARGETS = name "=" address ":" port *( "," name "=" address ":" port )
//! XO_RULES   = rule *( ";" rule )
//! rule       = *condition "=>" place *( "," place ) [ "%" balance [ "(" key ")" ] ] [ "@" handler ]
//! condition  = "/" prefix | "=" exact-path | "~" path-regex | "host=" name | "method=" name
//!            | "slots=" number [ "-" number ] *( "|" number [ "-" number ] )
//! place      = name [ "*" weight ]
//! ```
//! For example `XO_RULES="/img/ => t1,t2*3 @web; host=a.example /obj/ => t1,t2 %hash(path_segment:2); / => local"`, and
//! for Redis `XO_LISTEN=6379/redis XO_RULES="slots=0-8191 => local; slots=8192-16383 => t1,t2 %hash(slot) @redis"`.

mod choice;
mod file;
mod key;
mod line;
mod matching;
mod slots;

use std::net::SocketAddr;
use std::ops::RangeInclusive;

use regex_lite::Regex;

use key::Key;

pub use choice::{Balance, Candidate, Choice, Here, Idle, Pick, Sticky, View};
pub(crate) use key::hashed;
pub use matching::Decision;

use crate::protocol::Protocol;
use crate::worth::Worth;

/// Handler of rules that name none.
pub const DEFAULT_HANDLER: &str = "default";
/// The name in `to` that means: the host serves it.
pub const LOCAL: &str = "local";
/// Largest weight.
const MAX_WEIGHT: u32 = 1000;
/// Per cent that a machine's load is above that of the least loaded when connections leave it, unless the rule says it.
const IMBALANCE: u32 = 25;
/// Largest such number.
const MAX_IMBALANCE: u32 = 1000;

/// What is wrong with a policy, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{line}:{column}: {message}")]
pub struct PolicyError {
    /// From 1.
    pub line: usize,
    /// In characters, from 1.
    pub column: usize,
    /// One line.
    pub message: String,
}

impl PolicyError {
    fn of(self, variable: &str) -> PolicyError {
        PolicyError { message: format!("{variable}: {}", self.message), ..self }
    }
}

/// Where requests may go.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Local ports whose connections are tracked.
    pub listen: Vec<u16>,
    /// All machines that rules may name.
    pub targets: Vec<Target>,
    /// Those of `listen` on which something else than HTTP is spoken.
    protocols: Vec<(u16, Protocol)>,
    rules: Vec<Rule>,
}

/// A machine that takes connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Node name.
    pub name: String,
    /// Peer address of its daemon.
    pub address: SocketAddr,
}

#[derive(Clone, Debug)]
struct Rule {
    conditions: Vec<Condition>,
    candidates: Vec<Candidate>,
    handler: String,
    balance: Balance,
    /// Given if and only if it hashes.
    key: Option<Key>,
    sticky: Sticky,
    flower_after: Option<Worth>,
}

#[derive(Clone, Debug)]
enum Condition {
    Prefix(String),
    Exact(String),
    Regex(Regex),
    Host(String),
    Method(Vec<String>),
    Header { name: String, value: Option<String> },
    Slots(Vec<RangeInclusive<u16>>),
}

impl Condition {
    /// Whose requests can meet it.
    fn protocol(&self) -> Protocol {
        if matches!(self, Condition::Slots(_)) { Protocol::Redis } else { Protocol::Http }
    }
}

impl Policy {
    /// Reads a policy file.
    ///
    /// # Errors
    /// With line and column of what is wrong.
    pub fn parse(text: &str) -> Result<Policy, PolicyError> {
        file::parse(text)
    }

    /// Reads a policy from the file's text and the one-liners; each given one-liner replaces the file's
    /// part. `None` when neither says anything.
    ///
    /// # Errors
    /// As [`Policy::parse`]; in a one-liner the column is that of the variable's text and the line is 1.
    pub fn load(
        text: Option<&str>,
        listen: Option<&str>,
        targets: Option<&str>,
        rules: Option<&str>,
    ) -> Result<Option<Policy>, PolicyError> {
        if text.is_none() && rules.is_none() {
            return Ok(None);
        }
        let mut parts = text.map(file::parts).transpose()?.unwrap_or_default();
        if let Some(listen) = listen {
            parts.listen = line::listen(listen).map_err(|e| e.of("XO_LISTEN"))?;
        }
        if let Some(targets) = targets {
            parts.targets = line::targets(targets).map_err(|e| e.of("XO_TARGETS"))?;
        }
        if let Some(rules) = rules {
            parts.rules = line::rules(rules).map_err(|e| e.of("XO_RULES"))?;
        }
        parts.build(text.unwrap_or_default()).map(Some)
    }
}

/// A value and where it stands (byte offset into the text it came from).
#[derive(Clone, Debug)]
struct At<T> {
    value: T,
    offset: usize,
}

/// A port, and what is spoken on it.
#[derive(Clone, Copy, Debug)]
struct Port {
    number: u16,
    protocol: Protocol,
}

#[derive(Clone, Debug, Default)]
struct Parts {
    listen: Vec<At<Port>>,
    targets: Vec<(At<String>, SocketAddr)>,
    rules: Vec<RawRule>,
}

#[derive(Clone, Debug)]
struct RawRule {
    conditions: Vec<Condition>,
    to: Vec<At<Share>>,
    handler: Option<String>,
    balance: Balance,
    key: Option<Key>,
    sticky: Sticky,
    flower_after: Option<Worth>,
    /// Text that the offsets refer to, for one-liners.
    source: Option<String>,
}

/// A machine in `to`.
#[derive(Clone, Debug)]
struct Share {
    name: String,
    weight: u32,
}

impl Parts {
    fn build(mut self, text: &str) -> Result<Policy, PolicyError> {
        let mut rules = Vec::with_capacity(self.rules.len());
        for raw in std::mem::take(&mut self.rules) {
            let handler = raw.handler.as_deref().unwrap_or(DEFAULT_HANDLER);
            let text = raw.source.as_deref().unwrap_or(text);
            let candidates = self.candidates(text, &raw.to, handler);
            let candidates =
                candidates.map_err(|e| if raw.source.is_some() { e.of("XO_RULES") } else { e })?;
            rules.push(Rule {
                conditions: raw.conditions,
                candidates,
                handler: handler.to_owned(),
                balance: raw.balance,
                key: raw.key,
                sticky: raw.sticky,
                flower_after: raw.flower_after,
            });
        }
        let targets = self.targets.into_iter();
        let other = self.listen.iter().filter(|p| p.value.protocol != Protocol::default());
        Ok(Policy {
            listen: self.listen.iter().map(|p| p.value.number).collect(),
            protocols: other.map(|p| (p.value.number, p.value.protocol)).collect(),
            targets: targets.map(|(name, address)| Target { name: name.value, address }).collect(),
            rules,
        })
    }

    fn candidates(&self, text: &str, to: &[At<Share>], handler: &str) -> Result<Vec<Candidate>, PolicyError> {
        let mut candidates: Vec<Candidate> = Vec::with_capacity(to.len());
        for At { value: Share { name, weight }, offset } in to {
            let fail = |message: String| error_at(text, *offset, message);
            let known = self.targets.iter().find(|(n, _)| n.value == *name);
            let address = match known {
                Some((_, address)) => Some(*address),
                None if name == LOCAL => None,
                None => {
                    let known = self.targets.iter().map(|(n, _)| n.value.as_str()).chain([LOCAL]);
                    return Err(fail(format!("unknown target `{name}`{}", suggestion(name, known))));
                }
            };
            if candidates.iter().any(|c| c.name == *name) {
                return Err(fail(format!("`{name}` stands twice; a weight gives it more")));
            }
            if !(1..=MAX_WEIGHT).contains(weight) {
                return Err(fail(format!("a weight is 1 to {MAX_WEIGHT}")));
            }
            candidates.push(choice::candidate(name, address, *weight, handler));
        }
        Ok(candidates)
    }
}

/// No request that meets the conditions would have the key of another protocol.
fn check_key(key: Option<&Key>, conditions: &[Condition]) -> Result<(), String> {
    let Some(protocol) = key.map(Key::protocol) else { return Ok(()) };
    match (protocol, conditions.iter().all(|c| c.protocol() == protocol)) {
        (_, true) => Ok(()),
        (Protocol::Http, false) => Err("a rule with `slots` hashes the key `slot`".into()),
        (Protocol::Redis, false) => {
            Err("`slot` is a key of Redis, and the rule's conditions are HTTP's".into())
        }
    }
}

/// `text` is what the offsets refer to.
fn check_listen(text: &str, listen: &[At<Port>]) -> Result<(), PolicyError> {
    for (i, port) in listen.iter().enumerate() {
        let number = port.value.number;
        if number == 0 {
            return Err(error_at(text, port.offset, "`0` is not a port"));
        }
        if listen.iter().take(i).any(|p| p.value.number == number) {
            let message = format!("port {number} stands twice in `listen`");
            return Err(error_at(text, port.offset, message));
        }
    }
    Ok(())
}

/// As [`check_listen`].
fn check_targets(text: &str, targets: &[(At<String>, SocketAddr)]) -> Result<(), PolicyError> {
    for (i, (name, _)) in targets.iter().enumerate() {
        if name.value == LOCAL {
            let message = "`local` names the host itself and cannot be a target";
            return Err(error_at(text, name.offset, message));
        }
        if targets.iter().take(i).any(|(n, _)| n.value == name.value) {
            return Err(error_at(text, name.offset, format!("target `{}` stands twice", name.value)));
        }
    }
    Ok(())
}

fn error_at(text: &str, offset: usize, message: impl Into<String>) -> PolicyError {
    let (line, column) = position(text, offset);
    let mut one_line = String::new();
    // Quoted parts of the policy may hold anything.
    for c in message.into().chars() {
        if c.is_control() { one_line.extend(c.escape_default()) } else { one_line.push(c) }
    }
    PolicyError { line, column, message: one_line }
}

/// Line and column (in characters), from 1, of a byte offset.
#[must_use]
pub fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset.min(text.len())).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |i| i + 1);
    let column = before.get(line_start..).unwrap_or_default().chars().count() + 1;
    (before.matches('\n').count() + 1, column)
}

/// "; did you mean `x`?" for a name that is close to a known one.
#[must_use]
pub fn suggestion<'a>(given: &str, known: impl Iterator<Item = &'a str>) -> String {
    let best = known.map(|k| (distance(given, k), k)).min();
    match best {
        Some((d, name)) if d <= 1 + given.len() / 4 => format!("; did you mean `{name}`?"),
        _ => String::new(),
    }
}

/// Edit distance (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, cb) in b.iter().enumerate() {
            let next = (diagonal + usize::from(ca != *cb)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = std::mem::replace(&mut row[j + 1], next);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests;
