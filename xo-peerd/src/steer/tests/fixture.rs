//! Runs tables of fixtures: what the map has, what comes, and all that must come of it.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::Deserialize;
use xo_bpf_abi::{FLAG_CLIENT_FIN, FLAG_CLIENT_RST, FLAG_PASS, FLAG_RULE};
use xo_proto::packet::segments;

use super::super::*;
use super::bench::{Bench, Hook, INGRESS, Verdict, owner, redirect_unordered};
use super::frame::frame;
use crate::clock::now_ns;

/// Whose entry it is.
const FLOW: u64 = 0x0102_0304_0506_0708;

const MTU: usize = 1500;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    case: Vec<Case>,
}

/// Frames are written as `frame()` reads them.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    /// The map's only entry: `CLIENT LOCAL hold`, `CLIENT LOCAL to ADDRESS [ruled | left]`, `CLIENT LOCAL deliver ADDRESS`
    /// (ingress), `CLIENT LOCAL from ADDRESS` (egress).
    flow: Option<String>,
    /// The way to the flow's new address, for XDP: `back LONGEST`, by the interface that frames come in by; `round LONGEST`, by
    /// that, but as if from another one; `other LONGEST`; `old LONGEST`, not good any more.
    way: Option<String>,
    /// Frames that come first (to tc, where the case is about XDP); nobody looks at their verdicts.
    #[serde(default)]
    before: Vec<String>,
    #[serde(rename = "in")]
    frame: String,
    /// The frame is an aggregate of segments with this much payload.
    #[serde(default)]
    gso: u32,
    verdict: Verdict,
    /// The frame afterwards; absent: as before.
    out: Option<String>,
    /// Counters afterwards; all others are 0.
    #[serde(default)]
    paths: BTreeMap<String, u64>,
    /// The only packet in the ring, from its network header on, if it is held.
    held: Option<String>,
    /// What `segments()` makes of the held packet, for the target of `replay_to`.
    replayed: Option<Vec<String>>,
    replay_to: Option<SocketAddr>,
    /// The entry afterwards: `gone`, or `PACKETS BYTES [fin] [rst] [ruled] [left]`; absent: it has seen nothing.
    entry: Option<String>,
}

/// What an entry of either map has seen.
#[derive(Debug, PartialEq)]
struct Seen {
    packets: u64,
    bytes: u64,
    flags: u32,
}

/// Runs each case of a table on programs of its own.
pub(super) fn run(hook: Hook, table: &str) {
    let table: Table = toml::from_str(table).unwrap_or_else(|e| panic!("{e}"));
    let mut names: Vec<_> = table.case.iter().map(|c| c.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), table.case.len(), "two cases have one name");
    let mut failed = Vec::new();
    for case in &table.case {
        if let Err(problem) = std::panic::catch_unwind(|| case.run(hook)) {
            let text = problem.downcast_ref::<String>().map_or("(no text)", String::as_str);
            failed.push(format!("{}: {text}", case.name));
        }
    }
    assert!(failed.is_empty(), "{} of {} cases:\n{}", failed.len(), table.case.len(), failed.join("\n"));
}

impl Case {
    fn run(&self, hook: Hook) {
        let mut bench = Bench::new();
        let key = self.flow.as_deref().map(|flow| enter(&mut bench.steer, flow));
        if let Some(way) = &self.way {
            pretend(&mut bench, way, &key.expect("a flow"));
        }
        let start = now_ns();
        for earlier in &self.before {
            let hook = if matches!(hook, Hook::Egress) { hook } else { Hook::Ingress };
            bench.run(hook, &frame(earlier));
        }
        bench.held();
        let before = frame(&self.frame);
        let (verdict, after) = bench.run_aggregate(hook, &before, self.gso);
        let end = now_ns();
        assert_eq!(verdict, self.verdict);
        assert_eq!(hex(&after), hex(&self.out.as_deref().map_or(before, frame)), "the frame afterwards");
        let paths: BTreeMap<_, _> = bench.paths().into_iter().map(|(name, n)| (name.to_owned(), n)).collect();
        assert_eq!(paths, self.paths);
        self.check_held(&mut bench, key);
        match key {
            Some(key) => self.check_entry(&bench.steer, hook, &key, start..=end),
            None => assert_eq!(self.entry, None, "an entry without a flow"),
        }
    }

    fn check_held(&self, bench: &mut Bench, key: Option<FlowKey>) {
        let held = bench.held();
        let Some(expected) = self.held.as_deref().map(frame) else {
            assert_eq!(held.len(), 0, "packets in the ring");
            return assert_eq!(self.replayed, None, "what is not held cannot be replayed");
        };
        let [(header, packet)] = held.as_slice() else { panic!("{} packets in the ring", held.len()) };
        assert_eq!(hex(packet), hex(&expected), "the held packet");
        let expected = HeldHeader {
            key: key.expect("a flow"),
            len: expected.len() as u32,
            flow_id: FLOW,
            gso_size: self.gso,
            ip_version: (expected[0] >> 4).into(),
        };
        assert_eq!(header, &expected);
        let Some(replayed) = &self.replayed else { return };
        let mut made = Vec::new();
        let gso_size = u16::try_from(header.gso_size).expect("16 bits");
        segments(packet, gso_size, self.replay_to, MTU, &mut |s| made.push(hex(s))).expect("segments");
        assert_eq!(made, replayed.iter().map(|f| hex(&frame(f))).collect::<Vec<_>>(), "replayed");
    }

    fn check_entry(&self, steer: &Steer, hook: Hook, key: &FlowKey, run: std::ops::RangeInclusive<u64>) {
        let (seen, last_ns) = match hook {
            Hook::Ingress | Hook::Xdp => steer.flow(key).map(|e| (e.packets, e.bytes, e.flags, e.last_ns)),
            Hook::Egress => steer.rewrite_entry(key).map(|e| (e.packets, e.bytes, 0, e.last_ns)),
        }
        .map(|(packets, bytes, flags, last_ns)| (Seen { packets, bytes, flags }, last_ns))
        .unzip();
        let expected = match self.entry.as_deref() {
            Some("gone") => None,
            entry => Some(expected_entry(entry.unwrap_or("0 0"))),
        };
        assert_eq!(seen, expected, "the entry");
        assert_eq!(steer.flow_entries(), u64::from(seen.is_some()), "the count of entries");
        match (seen, last_ns) {
            (Some(seen), Some(last_ns)) if seen.packets > 0 => {
                assert!(run.contains(&last_ns), "{last_ns} {run:?}")
            }
            // Marks are made just now too.
            (Some(seen), Some(last_ns)) if seen.flags & FLAG_RULE != 0 => {
                assert!((1..=*run.start()).contains(&last_ns), "{last_ns} {run:?}")
            }
            (_, last_ns) => assert_eq!(last_ns.unwrap_or(0), 0, "a time without a packet"),
        }
    }
}

/// Makes the map's entry.
fn enter(steer: &mut Steer, flow: &str) -> FlowKey {
    let words: Vec<_> = flow.split(' ').collect();
    let address = |at: usize| -> SocketAddr {
        words.get(at).and_then(|w| w.parse().ok()).unwrap_or_else(|| panic!("flow {flow}"))
    };
    let key = flow_key(address(0), address(1));
    match words.get(2) {
        Some(&"hold") => steer.hold(&key, FLOW, 0),
        Some(&"to") => {
            redirect_unordered(steer, &key, FLOW, address(3));
            Ok(())
        }
        Some(&"deliver") => steer.deliver(&key, FLOW, 0, address(3)),
        Some(&"from") => steer.rewrite(&key, &owner(FLOW), address(3)),
        _ => panic!("flow {flow}"),
    }
    .expect("the entry");
    let marks = match words.get(4) {
        Some(&"ruled") => FLAG_RULE,
        Some(&"left") => FLAG_RULE | FLAG_PASS,
        Some(_) => panic!("flow {flow}"),
        None => return key,
    };
    steer.mark_rule(&key, FLOW, marks).expect("the entry");
    key
}

/// Makes the way.
fn pretend(bench: &mut Bench, way: &str, key: &FlowKey) {
    let to = bench.steer.flow(key).map(|e| address(e.to_addr, 0).ip()).expect("an entry");
    let (kind, longest) = way.split_once(' ').unwrap_or_else(|| panic!("way {way}"));
    let longest = longest.parse().unwrap_or_else(|_| panic!("way {way}"));
    let soon = now_ns() + 60_000_000_000;
    let (interface, back, until_ns) = match kind {
        "back" => (INGRESS, 1, soon),
        "round" => (INGRESS, 0, soon),
        "other" => (INGRESS + 1, 1, soon),
        "old" => (INGRESS, 1, now_ns()),
        _ => panic!("way {way}"),
    };
    bench.hop(to, interface, (longest, back), until_ns);
}

fn expected_entry(text: &str) -> Seen {
    let mut words = text.split(' ');
    let mut number = || words.next().and_then(|w| w.parse().ok()).unwrap_or_else(|| panic!("entry {text}"));
    let (packets, bytes) = (number(), number());
    let flags = words.map(|w| match w {
        "fin" => FLAG_CLIENT_FIN,
        "rst" => FLAG_CLIENT_RST,
        "ruled" => FLAG_RULE,
        "left" => FLAG_PASS,
        _ => panic!("entry {text}"),
    });
    Seen { packets, bytes, flags: flags.sum() }
}

/// As a reader compares them.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
