//! Matching a request against the rules.

use std::borrow::Cow;

use super::{Balance, Choice, Condition, LOCAL, Policy, Rule, Sticky, slots};
use crate::protocol::{Protocol, Request};

/// What the policy says about a request.
#[derive(Clone, Copy, Debug)]
pub enum Decision<'p> {
    /// No rule is about it: served where it is.
    Unmatched,
    /// To one of several machines.
    Choose(Choice<'p>),
}

impl Policy {
    /// Decides about a request.
    #[must_use]
    pub fn decide<'r>(&self, request: impl Into<Request<'r>>) -> Decision<'_> {
        let request = request.into();
        let path = match request {
            Request::Http(head) => normalised(head.path),
            Request::Redis(_) => Cow::Borrowed(""),
        };
        let found = self.rules.iter().enumerate().find(|(_, r)| r.matches(request, &path));
        match found {
            None => Decision::Unmatched,
            Some((number, rule)) => Decision::Choose(rule.choice(number, request, &path)),
        }
    }

    /// Can any request on a connection that the machine `node` accepts leave it? If not, there is no need to look at them.
    #[must_use]
    pub fn leads_away_from(&self, node: &str) -> bool {
        self.rules.iter().any(|r| r.leads_away_from(node))
    }

    /// What is spoken on a port, if it is one of `listen`.
    #[must_use]
    pub fn protocol(&self, port: u16) -> Option<Protocol> {
        let other = || self.protocols.iter().find(|(p, _)| *p == port).map(|(_, protocol)| *protocol);
        self.listen.contains(&port).then(|| other().unwrap_or_default())
    }

    /// Machines and the handlers there that rules name, `local` not among them.
    pub fn handlers(&self) -> impl Iterator<Item = (&str, &str)> {
        self.rules.iter().flat_map(|r| {
            let named = r.candidates.iter().filter(|c| !c.is_local());
            named.map(|c| (c.name.as_str(), r.handler.as_str()))
        })
    }

    /// Does it concern no connection at all? (Without rules none leaves, but restored ones may come.)
    #[must_use]
    pub fn is_inert(&self) -> bool {
        self.listen.is_empty()
    }
}

impl Rule {
    /// A request without the key that the rule hashes is served by turns, as HAProxy does it.
    fn choice(&self, rule: usize, request: Request<'_>, path: &str) -> Choice<'_> {
        let key = self.key.as_ref().and_then(|k| k.hash(request, path));
        let balance =
            if key.is_none() && self.balance == Balance::Hash { Balance::RoundRobin } else { self.balance };
        Choice {
            rule,
            candidates: &self.candidates,
            handler: &self.handler,
            balance,
            sticky: self.sticky,
            flower_after: self.flower_after,
            key,
        }
    }

    fn leads_away_from(&self, node: &str) -> bool {
        let stays = self.balance != Balance::Hash
            && self.sticky == Sticky::Always
            && self.candidates.iter().any(|c| c.name == node);
        !stays && self.candidates.iter().any(|c| c.name != node && c.name != LOCAL)
    }

    /// A condition about the one protocol is never met by a request of the other.
    fn matches(&self, request: Request<'_>, path: &str) -> bool {
        let head = match request {
            Request::Http(head) => head,
            Request::Redis(command) => {
                let is_met =
                    |c: &Condition| matches!(c, Condition::Slots(all) if slots::contain(all, command.slot));
                return self.conditions.iter().all(is_met);
            }
        };
        self.conditions.iter().all(|c| match c {
            Condition::Prefix(p) => path.starts_with(p.as_str()),
            Condition::Exact(p) => path == p,
            Condition::Regex(r) => r.is_match(path),
            Condition::Host(h) => head.host.is_some_and(|given| host_matches(h, given)),
            Condition::Method(all) => all.iter().any(|m| m == head.method),
            Condition::Header { name, value } => match value {
                Some(value) => head.header(name).any(|v| v == value.as_bytes()),
                None => head.header(name).next().is_some(),
            },
            Condition::Slots(_) => false,
        })
    }
}

/// Exact, or `*.example.org` for any name below; the port of the given host is ignored.
fn host_matches(pattern: &str, given: &str) -> bool {
    let name = match given.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => given,
    };
    match pattern.strip_prefix('*') {
        Some(suffix) => {
            let begin = name.len().checked_sub(suffix.len());
            begin.is_some_and(|at| {
                at > 0 && name.get(at..).is_some_and(|end| end.eq_ignore_ascii_case(suffix))
            })
        }
        None => name.eq_ignore_ascii_case(pattern),
    }
}

/// The path that a server would look up: escapes resolved, `//`, `/./` and `/../` too, without a fragment (which has
/// no place in a request), as nginx does. A path that needs none of it is not copied.
pub(super) fn normalised(path: &str) -> Cow<'_, str> {
    if is_normal(path) {
        return Cow::Borrowed(path);
    }
    let path = path.split_once('#').map_or(path, |(path, _)| path);
    if is_normal(path) {
        return Cow::Borrowed(path);
    }
    let decoded = decoded(path.as_bytes());
    let text = String::from_utf8_lossy(&decoded);
    let mut parts: Vec<&str> = Vec::new();
    let mut directory = false;
    for part in text.split('/').skip(1) {
        directory = matches!(part, "" | "." | "..");
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    let mut result = String::with_capacity(text.len());
    for part in &parts {
        result.push('/');
        result.push_str(part);
    }
    if directory || parts.is_empty() {
        result.push('/');
    }
    Cow::Owned(result)
}

/// Would the path come out as it is? Looked at in one pass; a no may be wrong.
fn is_normal(path: &str) -> bool {
    let mut last = 0;
    path.bytes().all(|b| {
        let normal = !matches!(b, b'%' | b'#') && (last != b'/' || !matches!(b, b'/' | b'.'));
        last = b;
        normal
    })
}

fn decoded(path: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((&byte, tail)) = rest.split_first() {
        let digit = |at: usize| tail.get(at).and_then(|b| char::from(*b).to_digit(16));
        match (byte, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => {
                out.push((high << 4 | low) as u8);
                rest = tail.get(2..).unwrap_or_default();
            }
            _ => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    out
}
