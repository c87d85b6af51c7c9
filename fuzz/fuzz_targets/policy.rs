//! Policies from a file and from one-liners, applied to requests of both protocols; errors are within the text.
//!
//! Input: up to four parts between NUL bytes: file, XO_LISTEN, XO_TARGETS, XO_RULES; an empty one is not given.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use xo_proto::http::{Head, parse_head};
use xo_proto::policy::{Candidate, Choice, Decision, Here, Pick, Policy, PolicyError, View};
use xo_proto::resp::{Command, Requests};

const REQUESTS: [&str; 4] = [
    "GET /img/a?b HTTP/1.1\r\nHost: www.example.org:80\r\nX: y\r\n\r\n",
    "PUT //a/../%2e/%69mg#c HTTP/1.1\r\nHost: \u{e4}:x\r\n\r\n",
    "POST http://a.example/ HTTP/1.1\r\n\r\n",
    "OPTIONS * HTTP/1.0\r\nHost:\r\n\r\n",
];

/// Slots 12182, 5061 and 5061, 0, several, none.
const COMMANDS: &str = "GET foo\r\nMGET bar {bar}2\r\nGET {06S}\r\nMGET foo bar\r\nPING\r\n";

struct T2IsOut;

impl View for T2IsOut {
    fn is_open(&self, candidate: &Candidate) -> bool {
        candidate.name != "t2"
    }

    fn load(&self, candidate: &Candidate) -> u32 {
        candidate.weight
    }

    fn turn(&self, rule: usize) -> u64 {
        rule as u64 * 7
    }

    fn random(&self) -> u64 {
        u64::MAX
    }
}

fn apply(policy: &Policy) {
    for request in REQUESTS {
        let Head::Complete(head) = parse_head(request.as_bytes()) else { panic!("{request:?} is refused") };
        if let Decision::Choose(choice) = policy.decide(&head) {
            pick(&choice);
        }
    }
    let mut commands = 0;
    let look = |command: &Command| {
        commands += 1;
        if let Decision::Choose(choice) = policy.decide(command) {
            pick(&choice);
        }
        false
    };
    let _ = Requests::default().look(COMMANDS.as_bytes(), false, look, |_| ());
    assert!(commands >= 3, "{commands}");
}

fn pick(choice: &Choice<'_>) {
    for (node, guest) in [("t1", true), ("t1", false), ("elsewhere", true), ("elsewhere", false)] {
        for (placed, recalled) in [(false, false), (true, false), (false, true), (true, true)] {
            let here = Here { node, guest, placed, recalled };
            match choice.pick(&here, &T2IsOut) {
                Pick::To(c) => assert!(c.name != node && c.name != "t2" && choice.candidates.contains(c)),
                Pick::Here => assert!(!recalled),
                Pick::Home => assert!(guest || recalled),
                Pick::Nowhere => assert!(!recalled),
            }
        }
    }
}

fn check(error: &PolicyError, texts: &[Option<&str>]) {
    let within = |text: &str| {
        let line = text.split('\n').nth(error.line - 1);
        line.is_some_and(|l| (1..=l.chars().count() + 1).contains(&error.column))
    };
    assert!(texts.iter().flatten().any(|t| within(t)), "{error} is nowhere");
    assert!(!error.message.contains('\n') && !error.message.is_empty(), "{error}");
}

fuzz_target!(|data: &[u8]| -> Corpus {
    let Ok(text) = std::str::from_utf8(data) else { return Corpus::Reject };
    let mut parts = text.splitn(4, '\0').map(|p| Some(p).filter(|p| !p.is_empty()));
    let mut next = || parts.next().flatten();
    let all = [next(), next(), next(), next()];
    if let [Some(file), ..] = all {
        match Policy::parse(file) {
            Ok(policy) => apply(&policy),
            Err(e) => check(&e, &[Some(file)]),
        }
    }
    match Policy::load(all[0], all[1], all[2], all[3]) {
        Ok(Some(policy)) => apply(&policy),
        Ok(None) => assert!(all[0].is_none() && all[3].is_none()),
        Err(e) => check(&e, &all),
    }
    Corpus::Keep
});
