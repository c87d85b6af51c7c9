use std::cell::Cell;
use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::*;
use crate::http::{Head, parse_head};
use crate::policy::{Decision, Policy};

/// What a test knows of the machines.
#[derive(Default)]
struct Known {
    loads: HashMap<String, u32>,
    closed: HashSet<String>,
    turns: Cell<u64>,
    random: Cell<u64>,
}

impl Known {
    fn closed(names: &[&str]) -> Known {
        Known { closed: names.iter().map(|n| (*n).to_owned()).collect(), ..Known::default() }
    }

    fn loads(loads: &[(&str, u32)]) -> Known {
        let loads = loads.iter().map(|(n, l)| ((*n).to_owned(), *l)).collect();
        Known { loads, ..Known::default() }
    }
}

impl View for Known {
    fn is_open(&self, candidate: &Candidate) -> bool {
        !self.closed.contains(&candidate.name)
    }

    fn load(&self, candidate: &Candidate) -> u32 {
        self.loads.get(&candidate.name).copied().unwrap_or_default()
    }

    fn turn(&self, _: usize) -> u64 {
        self.turns.replace(self.turns.get() + 1)
    }

    fn random(&self) -> u64 {
        self.random.replace(self.random.get() + 1);
        mixed(self.random.get())
    }
}

const HOST: Here<'_> = Here { node: "host", guest: false, placed: false, recalled: false };

fn guest_at(node: &str) -> Here<'_> {
    Here { node, guest: true, placed: true, recalled: false }
}

/// A policy of one rule.
fn policy(to: &str, choice: &str) -> Policy {
    let targets = (1..=9).map(|i| format!("t{i} = \"10.0.0.{i}:7400\"\n")).collect::<String>();
    let text =
        format!("listen = [80]\n[targets]\n{targets}[[rule]]\npath_prefix = \"/\"\nto = [{to}]\n{choice}\n");
    Policy::parse(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// The name of where a request goes; `here`, `home` or `nowhere`.
fn place(policy: &Policy, request: &str, here: &Here<'_>, known: &Known) -> String {
    let request = format!("{request}\r\n\r\n");
    let Head::Complete(head) = parse_head(request.as_bytes()) else { panic!("{request:?}") };
    let Decision::Choose(choice) = policy.decide(&head) else { return "unmatched".into() };
    match choice.pick(here, known) {
        Pick::Here => "here".into(),
        Pick::Home => "home".into(),
        Pick::Nowhere => "nowhere".into(),
        Pick::To(c) => c.name.clone(),
    }
}

fn get(policy: &Policy, path: &str, here: &Here<'_>, known: &Known) -> String {
    place(policy, &format!("GET {path} HTTP/1.1\r\nHost: x"), here, known)
}

/// How many of `n` requests go where.
fn shares(policy: &Policy, here: &Here<'_>, known: &Known, n: u32) -> HashMap<String, u32> {
    let mut counts = HashMap::new();
    for i in 0..n {
        *counts.entry(get(policy, &format!("/{i}"), here, known)).or_default() += 1;
    }
    counts
}

#[test]
fn by_turns() {
    let p = policy("\"t1\", \"t2\", \"t3\"", "");
    let known = Known::default();
    let all: Vec<_> = (0..6).map(|_| get(&p, "/", &HOST, &known)).collect();
    assert_eq!(all, ["t1", "t2", "t3", "t1", "t2", "t3"]);
    let known = Known::closed(&["t2"]);
    let all: Vec<_> = (0..4).map(|_| get(&p, "/", &HOST, &known)).collect();
    assert_eq!(all, ["t1", "t3", "t1", "t3"], "who is out is passed over");
    assert_eq!(get(&p, "/", &HOST, &Known::closed(&["t1", "t2", "t3"])), "nowhere");
    let p = policy("\"t1\", {name=\"t2\", weight=3}, \"local\"", "sticky = false");
    let counts = shares(&p, &HOST, &Known::default(), 1000);
    assert!((198..=202).contains(&counts["t1"]) && (598..=602).contains(&counts["t2"]), "{counts:?}");
    assert!((198..=202).contains(&counts["here"]), "{counts:?}");
}

#[test]
fn a_placed_connection_stays_while_its_place_is_allowed() {
    for balance in ["round_robin", "least_loaded", "random_two"] {
        let known = Known::loads(&[("t1", 100)]);
        let p = policy("\"t1\", \"t2\"", &format!("balance = \"{balance}\""));
        assert_eq!(get(&p, "/", &guest_at("t1"), &known), "here", "{balance}");
        assert_ne!(get(&p, "/", &guest_at("t3"), &known), "here", "{balance}: not a candidate");
        let recalled = Here { recalled: true, ..guest_at("t1") };
        assert_eq!(get(&p, "/", &recalled, &known), "t2", "{balance}: recalled");
        assert_eq!(get(&p, "/", &recalled, &Known::closed(&["t2"])), "home", "{balance}: nobody else");
        // Its own client's: as long as it is named.
        assert_eq!(get(&p, "/", &Here { node: "t1", ..HOST }, &known), "here", "{balance}");
    }
    let p = policy("\"t1\", \"t2\"", "sticky = false");
    let counts = shares(&p, &guest_at("t1"), &Known::default(), 10);
    assert_eq!((counts["here"], counts["t2"]), (5, 5));
}

#[test]
fn the_host_may_be_one_of_several() {
    let p = policy("\"local\", \"t1\"", "");
    let known = Known::default();
    let all: Vec<_> = (0..4).map(|_| get(&p, "/", &HOST, &known)).collect();
    assert_eq!(all, ["here", "t1", "here", "t1"]);
    assert_eq!(get(&p, "/", &Here { placed: true, ..HOST }, &known), "here");
    assert_eq!(get(&p, "/", &guest_at("t1"), &known), "here");
    let all: Vec<_> = (0..2).map(|_| get(&p, "/", &guest_at("t2"), &known)).collect();
    assert_eq!(all, ["home", "t1"]);
    assert_eq!(get(&p, "/", &HOST, &Known::closed(&["t1", "local"])), "here", "who asks is there");
    let only = policy("\"local\"", "");
    assert_eq!(get(&only, "/", &HOST, &known), "here");
    assert_eq!(get(&only, "/", &guest_at("t1"), &known), "home");
}

#[test]
fn the_least_loaded() {
    let p = policy("\"t1\", {name=\"t2\", weight=2}, \"t3\"", "balance = \"least_loaded\"");
    assert_eq!(get(&p, "/", &HOST, &Known::loads(&[("t1", 3), ("t2", 4), ("t3", 3)])), "t2");
    assert_eq!(get(&p, "/", &HOST, &Known::loads(&[("t1", 3), ("t2", 9), ("t3", 4)])), "t1");
    let idle = shares(&policy("\"t1\", \"t2\"", "balance = \"least_loaded\""), &HOST, &Known::default(), 10);
    assert_eq!((idle["t1"], idle["t2"]), (5, 5), "equals by turns");
    // What a machine already has is not an argument against it.
    let p = policy("\"t1\", \"t2\"", "balance = \"least_loaded\"\nsticky = false");
    assert_eq!(get(&p, "/", &guest_at("t1"), &Known::loads(&[("t1", 5), ("t2", 4)])), "here");
    assert_eq!(get(&p, "/", &guest_at("t1"), &Known::loads(&[("t1", 6), ("t2", 4)])), "t2");
}

#[test]
fn a_connection_leaves_a_machine_that_has_too_much_to_do() {
    let p = policy("\"t1\", {name=\"t2\", weight=2}, \"t3\"", "sticky = \"balanced\"");
    let at_t1 = |loads: &[(&str, u32)]| get(&p, "/", &guest_at("t1"), &Known::loads(loads));
    assert_eq!(at_t1(&[("t1", 20), ("t2", 40), ("t3", 20)]), "here");
    assert_eq!(at_t1(&[("t1", 25), ("t2", 40), ("t3", 19)]), "here", "25 are not more than 5/4 of 20");
    assert_eq!(at_t1(&[("t1", 26), ("t2", 40), ("t3", 19)]), "t3");
    assert_eq!(at_t1(&[("t1", 26), ("t2", 36), ("t3", 19)]), "t2", "for its weight it has less");
    assert_eq!(at_t1(&[("t1", 20), ("t2", 80), ("t3", 0)]), "here", "others have more to give away");
    assert_eq!(at_t1(&[("t1", 1)]), "here", "to move would change nothing");
    assert_eq!(at_t1(&[("t1", 2)]), "t2");
    let known = Known { closed: ["t3".into()].into(), ..Known::loads(&[("t1", 26), ("t2", 50), ("t3", 0)]) };
    assert_eq!(get(&p, "/", &guest_at("t1"), &known), "here", "who is out does not count");
    let loads = Known::loads(&[("t1", 26), ("t2", 40), ("t3", 19)]);
    assert_eq!(get(&p, "/", &Here { node: "t1", ..HOST }, &loads), "t3", "its own clients', too");
    let patient = policy("\"t1\", \"t3\"", "sticky = \"balanced\"\nimbalance = 100");
    assert_eq!(get(&patient, "/", &guest_at("t1"), &Known::loads(&[("t1", 40), ("t3", 19)])), "here");
    assert_eq!(get(&patient, "/", &guest_at("t1"), &Known::loads(&[("t1", 41), ("t3", 19)])), "t3");
    let home = policy("\"local\", \"t1\"", "sticky = \"balanced\"");
    let known = Known::loads(&[("t1", 10)]);
    assert_eq!(get(&home, "/", &guest_at("t1"), &known), "home");
    let known = Known::loads(&[("local", 10)]);
    assert_eq!(get(&home, "/", &Here { placed: true, ..HOST }, &known), "t1");
}

/// Reports are old: each machine knows of the others what they last said, and of itself what it has given away. All ask about
/// all their connections before the next report.
fn relieved(p: &Policy, loads: &mut HashMap<String, u32>) -> u32 {
    let reported = loads.clone();
    let mut moved = 0;
    for (node, count) in &reported {
        let mut known = Known { loads: reported.clone(), ..Known::default() };
        for i in 0..*count * 3 {
            let to = get(p, &format!("/{i}"), &guest_at(node), &known);
            if to == "here" {
                continue;
            }
            *known.loads.entry(node.clone()).or_default() -= 1;
            *known.loads.entry(to.clone()).or_default() += 1;
            *loads.entry(node.clone()).or_default() -= 1;
            *loads.entry(to).or_default() += 1;
            moved += 1;
        }
    }
    moved
}

#[test]
fn two_choices_are_nearly_as_even() {
    let p = policy("\"t1\", \"t2\", \"t3\", {name=\"t4\", weight=2}", "balance = \"random_two\"");
    let mut known = Known::default();
    for i in 0..1000 {
        let to = get(&p, &format!("/{i}"), &HOST, &known);
        *known.loads.entry(to).or_default() += 1;
    }
    for (name, expected) in [("t1", 200), ("t2", 200), ("t3", 200), ("t4", 400)] {
        assert!(known.loads[name].abs_diff(expected) <= 10, "{:?}", known.loads);
    }
    assert_eq!(get(&p, "/", &HOST, &Known::closed(&["t1", "t3", "t4"])), "t2");
    assert_eq!(get(&p, "/", &HOST, &Known::closed(&["t1", "t2", "t3", "t4"])), "nowhere");
}

#[test]
fn keys() {
    let at = |key: &str, request: &str| {
        let p = policy("\"t1\", \"t2\", \"t3\", \"t4\"", &format!("balance = \"hash\"\nkey = \"{key}\""));
        place(&p, request, &HOST, &Known::default())
    };
    let by = |name: &str| {
        let p = policy("\"t1\", \"t2\", \"t3\", \"t4\"", "balance = \"hash\"\nkey = \"header:k\"");
        place(&p, &format!("GET / HTTP/1.1\r\nK: {name}"), &HOST, &Known::default())
    };
    let many: HashSet<_> = (0..20).map(|i| by(&i.to_string())).collect();
    assert_eq!(many.len(), 4, "all have a part");
    for i in 0..20 {
        let value = format!("bucket-{i}");
        let expected = by(&value);
        for (key, request) in [
            ("path_segment:2", format!("GET /obj/{value}/x/y?z HTTP/1.1")),
            ("path_segment:2", format!("GET /obj//%62ucket-{i}/../{value} HTTP/1.1")),
            ("query:k", format!("GET /?ak=b&k={value}&k=d HTTP/1.1")),
            ("header:K", format!("GET / HTTP/1.1\r\nk: {value}\r\nk: other")),
            ("cookie:k", format!("GET / HTTP/1.1\r\nCookie: kk=1; k={value} ;x=2")),
            ("cookie:k", format!("GET / HTTP/1.1\r\nCookie: a=b\r\nCookie: k={value}")),
        ] {
            assert_eq!(at(key, &request), expected, "{key} of {request:?}");
        }
        assert_eq!(at("path", &format!("GET /{value}?a HTTP/1.1")), by(&format!("/{value}")));
    }
}

#[test]
fn without_its_key_a_request_is_served_by_turns() {
    let p = policy("\"t1\", \"t2\"", "balance = \"hash\"\nkey = \"query:k\"");
    for query in ["", "?k=", "?kk=1", "?k"] {
        let known = Known::default();
        let all: Vec<_> = (0..4).map(|_| get(&p, &format!("/{query}"), &HOST, &known)).collect();
        assert_eq!(all, ["t1", "t2", "t1", "t2"], "{query}");
        assert_eq!(get(&p, "/", &guest_at("t2"), &known), "here", "and stays");
    }
}

#[test]
fn a_key_decides_wherever_the_connection_is() {
    let p = policy("\"t1\", \"t2\", \"local\"", "balance = \"hash\"\nkey = \"path\"");
    let known = Known::default();
    for i in 0..100 {
        let path = format!("/{i}");
        let to = get(&p, &path, &HOST, &known);
        let home = if to == "here" { "home".to_owned() } else { to.clone() };
        let seen = |at: &str| if to == at { "here".to_owned() } else { home.clone() };
        for at in ["t1", "t2", "t3"] {
            assert_eq!(get(&p, &path, &guest_at(at), &known), seen(at), "{path} at {at}");
        }
        // While its machine is out the key is another's, and everybody else's keys stay.
        let without = get(&p, &path, &HOST, &Known::closed(&["t1"]));
        assert!(if to == "t1" { without != "t1" } else { without == to });
    }
}

/// The hash is part of the interface between machines of different versions.
#[test]
fn the_hash_is_what_it_always_was() {
    let p = policy("\"t1\", \"t2\", {name=\"t3\", weight=2}", "balance = \"hash\"\nkey = \"path\"");
    let all: Vec<_> = (0..12).map(|i| get(&p, &format!("/{i}"), &HOST, &Known::default())).collect();
    assert_eq!(all.join(" "), PINNED);
}

const PINNED: &str = "t3 t3 t3 t1 t1 t1 t2 t3 t3 t2 t2 t2";

fn all_of(n: u32) -> String {
    (1..=n).map(|i| format!("\"t{i}\"")).collect::<Vec<_>>().join(", ")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_new_machine_takes_its_share_and_nothing_else_moves(n in 2..=9_u32, salt: u32) {
        let rule = "balance = \"hash\"\nkey = \"path\"";
        let (before, after) = (policy(&all_of(n - 1), rule), policy(&all_of(n), rule));
        let (known, keys) = (Known::default(), 2000);
        let mut moved = 0;
        for i in 0..keys {
            let path = format!("/{salt}/{i}");
            let (from, to) = (get(&before, &path, &HOST, &known), get(&after, &path, &HOST, &known));
            if from != to {
                prop_assert_eq!(to, format!("t{n}"));
                moved += 1;
            }
        }
        // Five standard deviations of a binomial distribution.
        let (p, keys) = (1.0 / f64::from(n), f64::from(keys));
        let slack = 5.0 * (keys * p * (1.0 - p)).sqrt();
        prop_assert!((f64::from(moved) - keys * p).abs() < slack, "{moved} of {keys} moved to the {n}th");
    }

    #[test]
    fn keys_spread_as_the_weights_say(weights in prop::collection::vec(1..=5_u32, 1..9), salt: u32) {
        let to: Vec<_> = (1..).zip(&weights).map(|(i, w)| format!("{{name=\"t{i}\", weight={w}}}")).collect();
        let p = policy(&to.join(", "), "balance = \"hash\"\nkey = \"path_segment:2\"");
        let (known, keys) = (Known::default(), 3000);
        let mut counts: HashMap<String, u32> = HashMap::new();
        for i in 0..keys {
            *counts.entry(get(&p, &format!("/{salt}/{i}"), &HOST, &known)).or_default() += 1;
        }
        let total = f64::from(weights.iter().sum::<u32>());
        for (i, w) in (1..).zip(&weights) {
            let share = f64::from(*w) / total;
            let (expected, n) = (f64::from(keys) * share, f64::from(*counts.get(&format!("t{i}")).unwrap_or(&0)));
            prop_assert!((n - expected).abs() <= 5.0 * (expected * (1.0 - share)).sqrt() + 1.0, "{counts:?} for {weights:?}");
        }
    }

    #[test]
    fn machines_that_relieve_themselves_come_to_rest(
        counts in prop::collection::vec(0..300_u32, 2..=6),
        weights in prop::collection::vec(1..=3_u32, 6),
        imbalance in 1..=100_u32,
    ) {
        let names: Vec<_> = (1..=counts.len()).map(|i| format!("t{i}")).collect();
        let shares: Vec<_> =
            names.iter().zip(&weights).map(|(n, w)| format!("{{name=\"{n}\", weight={w}}}")).collect();
        let p = policy(&shares.join(", "), &format!("sticky = \"balanced\"\nimbalance = {imbalance}"));
        let mut loads: HashMap<_, _> = names.iter().cloned().zip(counts.iter().copied()).collect();
        let all = counts.iter().sum::<u32>();
        let mut moved = 0;
        let rounds = (1..=counts.len() + 1).find(|_| { let m = relieved(&p, &mut loads); moved += m; m == 0 });
        prop_assert!(rounds.is_some(), "{counts:?} by {weights:?}: {loads:?} after {moved} moves");
        prop_assert_eq!(loads.values().sum::<u32>(), all);
        let per_weight = |n: &String, w: &u32, more: u32| f64::from(loads[n] + more) / f64::from(*w);
        let least = names.iter().zip(&weights).map(|(n, w)| per_weight(n, w, 1)).fold(f64::MAX, f64::min);
        let mean = f64::from(all) / f64::from(weights[..names.len()].iter().sum::<u32>());
        for (n, w) in names.iter().zip(&weights) {
            let most = (least * (1.0 + f64::from(imbalance) / 100.0)).max(mean + 1.0 / f64::from(*w));
            prop_assert!(per_weight(n, w, 0) <= most + 1e-9, "{n} of {loads:?}, {weights:?}");
        }
    }

    #[test]
    fn nobody_who_is_out_is_chosen(
        closed in prop::collection::hash_set(1..=4_u32, 0..=4),
        balance in 0..4_usize,
        sticky in 0..3_usize,
        node in 0..=5_u32,
        placed: bool,
        recalled: bool,
    ) {
        let names: Vec<_> = closed.iter().map(|i| format!("t{i}")).collect();
        let known = Known::closed(&names.iter().map(String::as_str).collect::<Vec<_>>());
        let key = if balance == 3 { "key = \"path\"" } else { "" };
        let sticky = ["true", "false", if balance == 3 { "true" } else { "\"balanced\"" }][sticky];
        let rule = format!("balance = \"{}\"\nsticky = {sticky}\n{key}", Balance::NAMES[balance].0);
        let p = policy(&all_of(4), &rule);
        let node = format!("t{node}");
        let here = Here { node: &node, guest: true, placed, recalled };
        for i in 0..8 {
            let to = get(&p, &format!("/{i}"), &here, &known);
            prop_assert!(!names.contains(&to) && to != node);
            prop_assert!(!(recalled && matches!(to.as_str(), "here" | "nowhere")), "{}", to);
        }
    }
}
