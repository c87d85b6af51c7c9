use super::matching::normalised;
use super::*;
use crate::http::{Head, RequestHead, parse_head};
use crate::protocol::Protocol;
use crate::resp::{Command, Requests};

const FILE: &str = r#"
listen = [80, 443]

[targets]
t1 = "10.3.0.2:7400"
t2 = "[fd00:4::2]:7400"

[[rule]]
path_exact = "/img/logo"
to = ["local"]

[[rule]]
path_prefix = "/img/"
to = ["t1", "t2"]
balance = "round_robin"
handler = "web"

[[rule]]
host = "*.Example.org"
method = ["PUT", "POST"]
header = { name = "x-tier", value = "gold" }
to = ["t2"]

[[rule]]
path_regex = "^/v[0-9]+/obj"
to = ["t1"]
"#;

fn head(text: &str) -> RequestHead<'_> {
    match parse_head(text.as_bytes()) {
        Head::Complete(head) => head,
        _ => panic!("{text:?}"),
    }
}

/// Rule, candidates and handler of a request that leaves the node.
fn names(policy: &Policy, node: &str, request: &str) -> Option<(usize, Vec<String>, String)> {
    let request = format!("{request}\r\n\r\n");
    let Decision::Choose(choice) = policy.decide(&head(&request)) else { return None };
    match choice.pick(&Here { node, ..Here::default() }, &Idle) {
        Pick::To(_) => {
            let names = choice.candidates.iter().map(|c| c.name.clone()).collect();
            Some((choice.rule, names, choice.handler.to_owned()))
        }
        _ => None,
    }
}

#[test]
fn the_first_matching_rule_decides() {
    let p = Policy::parse(FILE).expect("a policy");
    assert_eq!(p.listen, [80, 443]);
    let both = Some((1, vec!["t1".into(), "t2".into()], "web".into()));
    assert_eq!(names(&p, "host", "GET /img/a.png HTTP/1.1"), both);
    assert_eq!(names(&p, "host", "GET http://x/img/a.png?q HTTP/1.1"), both);
    assert_eq!(names(&p, "host", "GET /a/..//./%69mg/x HTTP/1.1"), both);
    assert_eq!(names(&p, "host", "GET /img/logo HTTP/1.1"), None);
    assert_eq!(names(&p, "host", "GET /other HTTP/1.1"), None);
    assert_eq!(names(&p, "t1", "GET /img/a.png HTTP/1.1"), None, "t1 is where it belongs");
    let gold = "PUT /x HTTP/1.1\r\nHost: A.example.ORG:80\r\nX-Tier: gold";
    assert_eq!(names(&p, "host", gold), Some((2, vec!["t2".into()], "default".into())));
    assert_eq!(names(&p, "host", &gold.replace("PUT", "GET")), None);
    assert_eq!(names(&p, "host", &gold.replace("gold", "Gold")), None);
    assert_eq!(names(&p, "host", &gold.replace("A.example.ORG", "example.org")), None);
    assert_eq!(names(&p, "host", "GET /v12/obj/3 HTTP/1.1"), Some((3, vec!["t1".into()], "default".into())));
}

const SLOTS: &str = r#"
listen = [80, { port = 6379, protocol = "redis" }]

[targets]
t1 = "10.3.0.2:7400"
t2 = "10.4.0.2:7400"

[[rule]]
slots = ["0-5460", "7000"]
to = ["t1"]
handler = "redis"

[[rule]]
path_prefix = "/img/"
to = ["t1"]

[[rule]]
slots = ["10000-16383"]
to = ["local"]

[[rule]]
slots = ["5461-9999"]
to = ["t2"]
"#;

/// Where a `GET` of this key goes, seen from a node: a target's name, `local`, `here`, or nothing.
fn place(policy: &Policy, node: &str, key: &str) -> Option<String> {
    let mut found = None;
    let look = |c: &Command| {
        let Decision::Choose(choice) = policy.decide(c) else { return false };
        let here = Here { node, guest: node != "host", ..Here::default() };
        found = Some(match choice.pick(&here, &Idle) {
            Pick::Here => "here".into(),
            Pick::Home => "home".into(),
            Pick::To(c) => c.name.clone(),
            Pick::Nowhere => "nowhere".into(),
        });
        false
    };
    let bytes = if key.is_empty() { "PING\r\n".into() } else { format!("GET {key}\r\n") };
    let _ = Requests::default().look(bytes.as_bytes(), false, look, |_| ());
    found
}

#[test]
fn slots_decide_about_redis_and_paths_about_http() {
    let p = Policy::parse(SLOTS).expect("a policy");
    assert_eq!(p.listen, [80, 6379]);
    assert_eq!(
        (p.protocol(80), p.protocol(6379), p.protocol(1)),
        (Some(Protocol::Http), Some(Protocol::Redis), None)
    );
    // Slots 5061, 12182 and 8363.
    for (key, node, expected) in [
        ("bar", "host", Some("t1")),
        ("bar", "t1", Some("here")),
        ("foo", "host", Some("here")),
        ("foo", "t2", Some("home")),
        ("foo{}{bar}", "t1", Some("t2")),
        ("", "host", None),
    ] {
        assert_eq!(place(&p, node, key).as_deref(), expected, "{key} on {node}");
    }
    assert_eq!(names(&p, "host", "GET /img/x HTTP/1.1").map(|d| d.0), Some(1));
    assert_eq!(names(&p, "host", "GET /bar HTTP/1.1"), None);
    let rules = "slots=0-5460|7000 => t1 @redis; slots=10000-16383 => local; slots=5461-9999 => t2";
    let line =
        Policy::load(None, Some("80,6379/redis"), Some("t1=10.3.0.2:7400,t2=10.4.0.2:7400"), Some(rules));
    let line = line.expect("valid").expect("given");
    assert_eq!((line.protocol(6379), line.protocol(80)), (Some(Protocol::Redis), Some(Protocol::Http)));
    for key in ["bar", "foo", "foo{}{bar}", ""] {
        assert_eq!(place(&line, "host", key), place(&p, "host", key), "{key}");
    }
}

#[test]
fn slots_are_the_key_of_rules_that_hash() {
    let load = |rules: &str| {
        let targets = Some("t1=10.3.0.2:7400,t2=10.4.0.2:7400");
        Policy::load(None, Some("6379/redis"), targets, Some(rules)).map(|p| p.expect("given"))
    };
    let p = load("slots=0-16383 => local,t1,t2 %hash(slot)").expect("valid");
    let all = load("=> local,t1,t2 %hash(path)").expect("valid");
    let mut counts = [0; 3];
    for i in 0..600 {
        let place = |key: String| place(&p, "host", &key).expect("a rule");
        let key = format!("k{i}");
        let found = place(key.clone());
        assert_eq!(place(format!("{{{key}}}:other")), found, "the same slot");
        assert_eq!(self::place(&all, "host", &key), Some(found.clone()), "whatever the key of HTTP");
        let n = ["here", "t1", "t2"].iter().position(|place| *place == found).expect("a place");
        counts[n] += 1;
    }
    assert!(counts.iter().all(|n| (140..260).contains(n)), "{counts:?}");
    for (rules, column, part) in [
        ("slots=0-9 => t1 %hash(path)", 18, "XO_RULES: a rule with `slots` hashes the key `slot`"),
        ("/img/ => t1 %hash(slot)", 14, "XO_RULES: `slot` is a key of Redis"),
    ] {
        let e = load(rules).expect_err(part);
        assert!(e.message.starts_with(part), "{e}");
        assert_eq!((e.line, e.column), (1, column), "{e}");
    }
    let hash = "to = [\"t2\"]\nbalance = \"hash\"\nkey = \"header:x\"";
    let e = Policy::parse(&SLOTS.replace("to = [\"t2\"]", hash)).expect_err("a key of HTTP");
    assert_eq!((e.line, e.column), (25, 7), "{e}");
}

#[test]
fn errors_about_slots_and_protocols_say_where() {
    for (from, to, line, column, part) in [
        ("\"redis\" }", "\"rediss\" }", 2, 41, "unknown protocol `rediss`; did you mean `redis`?"),
        ("port = 6379, ", "", 2, 15, "missing field `port`"),
        ("port = 6379", "port = 80", 2, 15, "stands twice"),
        ("6379,", "6379, tls = 1,", 2, 30, "unknown field `tls`"),
        ("\"7000\"", "\"16384\"", 9, 20, "`16384` is not a slot (0 to 16383)"),
        ("0-5460", "5460-0", 9, 10, "`5460-0` ends before it begins"),
        ("\"0-5460\", \"7000\"", "", 9, 9, "names no slot"),
        ("\"0-5460\"", "5460", 9, 10, "invalid type"),
    ] {
        let e = Policy::parse(&SLOTS.replacen(from, to, 1)).expect_err(to);
        assert!(e.message.contains(part), "{e}");
        assert_eq!((e.line, e.column), (line, column), "{to}: {e}");
    }
    let targets = Some("t1=10.3.0.2:7400");
    for (listen, rules, column, part) in [
        (
            "80, 6379/rediss",
            "slots=0 => t1",
            5,
            "XO_LISTEN: unknown protocol `rediss`; did you mean `redis`?",
        ),
        ("x/redis", "slots=0 => t1", 1, "XO_LISTEN: `x/redis` is not a port"),
        ("6379/redis", "slots=0-16384 => t1", 1, "XO_RULES: `16384` is not a slot"),
        ("6379/redis", "slots= => t1", 1, "XO_RULES: `` is not a slot"),
    ] {
        let e = Policy::load(None, Some(listen), targets, Some(rules)).expect_err(part);
        assert_eq!((e.line, e.column), (1, column), "{e}");
        assert!(e.message.starts_with(part), "{e}");
    }
}

#[test]
fn rules_that_lead_nowhere_else() {
    let leads = |rules, node| {
        let text = Some("t1=10.3.0.2:7400,t2=10.4.0.2:7400");
        Policy::load(None, Some("80"), text, Some(rules))
            .expect("valid")
            .expect("given")
            .leads_away_from(node)
    };
    assert!(leads("/a => local; /b => t1", "host") && leads("/b => t1; /c => t2", "t1"));
    assert!(!leads("/a => local", "host") && !leads("/b => t1; /c => t2,t1", "t1"));
    assert!(leads("/b => t1", ""), "before the node's name is known");
    assert!(leads("/b => local,t1", "host") && !leads("/b => local,t1", "t1"));
    assert!(leads("/b => t1,t2 %hash(path)", "t1"), "the key decides, though t1 is named");
    let named = "listen = [80]\n[targets]\nt1 = \"10.3.0.2:7400\"\nt2 = \"10.4.0.2:7400\"\n[[rule]]\nto = [\"t1\", \"t2\"]\n";
    let leads = |more| Policy::parse(&format!("{named}{more}")).expect("valid").leads_away_from("t2");
    assert!(!leads("") && leads("sticky = \"balanced\"\n"), "others may have less to do");
}

#[test]
fn paths_are_what_the_server_looks_up() {
    for (given, expected) in [
        ("/a/b", "/a/b"),
        ("/a//b", "/a/b"),
        ("/a/./b/", "/a/b/"),
        ("/a/../img/x", "/img/x"),
        ("/../../x", "/x"),
        ("/a/..", "/"),
        ("/%2e%2e/x%2Fy", "/x/y"),
        ("/100%", "/100%"),
        ("/a%zz", "/a%zz"),
        ("/.hidden", "/.hidden"),
        ("/a#/../b", "/a"),
        ("/a%23b", "/a#b"),
        ("*", "*"),
        ("*#/x", "*"),
    ] {
        assert_eq!(normalised(given), expected, "{given}");
    }
}

#[test]
fn a_rule_may_say_when_flow_rules_are_worth_it() {
    let text = FILE
        .replace("handler = \"web\"", "flower_after = \"2MiB\"")
        .replace("to = [\"t2\"]", "to = [\"t2\", \"local\"]\nflower_after = \"10s\"");
    let p = Policy::parse(&text).expect("a policy");
    let said: Vec<_> = p.rules.iter().map(|r| r.flower_after).collect();
    assert_eq!(said, [None, Some(Worth::Bytes(2 << 20)), Some(Worth::Age(10_000)), None]);
    let request = "GET /img/a.png HTTP/1.1\r\n\r\n";
    let Decision::Choose(choice) = p.decide(&head(request)) else { panic!("{request}") };
    assert_eq!(choice.flower_after, Some(Worth::Bytes(2 << 20)));
}

#[test]
fn errors_say_where() {
    for (from, to, line, column, part) in [
        ("to = [\"t2\"]", "to = [\"t1\", \"t3\"]", 22, 13, "unknown target `t3`; did you mean `t"),
        ("10.3.0.2:7400", "10.3.0.2", 5, 6, "not ADDRESS:PORT"),
        ("to = [\"local\"]", "to = []", 10, 6, "names no target"),
        ("handler", "handlr", 16, 1, "unknown field `handlr`"),
        ("[80, 443]", "[80, 80]", 2, 15, "stands twice"),
        ("[80, 443]", "\"80\"", 2, 10, "invalid type"),
        ("round_robin", "robin", 15, 11, "unknown variant `robin`"),
        ("round_robin", "hash", 15, 11, "`hash` needs a `key`"),
        ("handler", "key = \"path\"\nhandler", 16, 7, "no effect without"),
        ("handler", "sticky = \"balance\"\nhandler", 16, 10, "unknown variant `balance`"),
        ("handler", "sticky = 1\nhandler", 16, 10, "true, false or"),
        ("handler", "imbalance = 50\nhandler", 16, 13, "no effect without `sticky"),
        ("handler", "sticky = \"balanced\"\nimbalance = 0\nhandler", 17, 13, "1 to 1000"),
        (
            "handler",
            "flower_after = \"2MB\"\nhandler",
            16,
            16,
            "flower_after is a number of bytes (\"2MiB\") or an age (\"10s\")",
        ),
        (
            "handler",
            "flower_after = \"18446744073709552s\"\nhandler",
            16,
            16,
            "flower_after is a number of bytes",
        ),
        ("handler", "flower_after = 2\nhandler", 16, 16, "invalid type: integer `2`, expected a string"),
        (
            "[\"local\"]",
            "[\"local\"]\nflower_after = \"1s\"",
            11,
            16,
            "no effect where all is served locally",
        ),
        ("\"round_robin\"", "\"hash\"\nkey = \"path\"\nsticky = \"balanced\"", 17, 10, "the key decides"),
        ("\"round_robin\"", "\"hash\"\nkey = \"path_segment:0\"", 16, 7, "counted from 1"),
        ("\"round_robin\"", "\"hash\"\nkey = \"query\"", 16, 7, "needs a name (query:NAME)"),
        ("\"round_robin\"", "\"hash\"\nkey = \"uri\"", 16, 7, "`uri` is no key"),
        ("[\"t1\", \"t2\"]", "[\"t1\", \"t1\"]", 14, 13, "`t1` stands twice"),
        ("[\"t1\", \"t2\"]", "[\"t1\", {name=\"t2\", weight=0}]", 14, 13, "a weight is 1 to"),
        ("[\"t1\", \"t2\"]", "[\"t1\", {name=\"t2\", wait=1}]", 14, 25, "unknown field `wait`"),
        ("[\"t1\", \"t2\"]", "[\"t1\", {name=\"t2\"}]", 14, 13, "missing field `weight`"),
        ("[\"t1\", \"t2\"]", "[\"t1\", 2]", 14, 13, "a name or {"),
        ("^/v[0-9]+", "^/v[0-9+", 25, 14, "path_regex"),
        ("\"/img/\"", "\"img/\"", 13, 15, "begins with `/`"),
        ("[80, 443]", "[80, 0]", 2, 15, "`0` is not a port"),
        ("t1 = ", "local = ", 5, 1, "the host itself"),
    ] {
        let e = Policy::parse(&FILE.replacen(from, to, 1)).expect_err(to);
        assert_eq!((e.line, e.column), (line, column), "{to}: {e}");
        assert!(e.message.contains(part), "{e}");
    }
}

#[test]
fn one_liners_mean_the_same() {
    let listen = Some("80, 8080");
    let targets = Some("t1=10.3.0.2:7400,t2=10.4.0.2:7400");
    let rules = Some("/img/ => t1,t2 @web; host=a.example method=GET|HEAD =/x => t2; / => local");
    let p = Policy::load(None, listen, targets, rules).expect("valid").expect("given");
    assert_eq!(p.listen, [80, 8080]);
    let both = Some((0, vec!["t1".into(), "t2".into()], "web".into()));
    assert_eq!(names(&p, "host", "GET /img/x HTTP/1.1"), both);
    assert_eq!(names(&p, "host", "HEAD /x HTTP/1.1\r\nHost: a.example").map(|d| d.0), Some(1));
    assert_eq!(names(&p, "host", "PUT /x HTTP/1.1\r\nHost: a.example"), None);
    assert!(Policy::load(None, listen, targets, None).expect("nothing").is_none());
    let p = Policy::load(Some(FILE), Some("8081"), None, None).expect("valid").expect("given");
    assert_eq!(p.listen, [8081], "the variable replaces the file's part");
    for (file, listen, targets, line, column, part) in [
        (None, "80, 80", "t1=10.3.0.2:7400", 1, 5, "XO_LISTEN: port 80 stands twice"),
        (Some(FILE), "80, 80", "t1=10.3.0.2:7400", 1, 5, "XO_LISTEN: port 80 stands twice"),
        (None, "80,0", "t1=10.3.0.2:7400", 1, 4, "XO_LISTEN: `0` is not a port"),
        (None, "80,\nx\n1", "t1=10.3.0.2:7400", 2, 1, "XO_LISTEN: `x\\n1` is not a port"),
        (None, "80,x", "t1=10.3.0.2:7400", 1, 4, "XO_LISTEN: `x` is not a port"),
        (None, "80", "t1=10.3.0.2:7400,t1=10.4.0.2:7400", 1, 18, "XO_TARGETS: target `t1` stands twice"),
        (None, "80", "local=10.3.0.2:7400", 1, 1, "XO_TARGETS: `local` names the host itself"),
        (None, "80", "t1=10.3.0.2", 1, 1, "XO_TARGETS: `t1=10.3.0.2` is not NAME=ADDRESS:PORT"),
        (None, "80", "t2=10.3.0.2:7400", 1, 6, "XO_RULES: unknown target `t1`; did you mean `t2`?"),
    ] {
        let e = Policy::load(file, Some(listen), Some(targets), Some("/ => t1")).expect_err(part);
        assert_eq!((e.line, e.column), (line, column), "{e}");
        assert!(e.message.starts_with(part), "{e}");
    }
    for (rules, column) in [
        ("/ => t9", 6),
        ("/ t1", 1),
        ("/ => ", 5),
        ("x => t1", 1),
        ("/ => t1; / => local; ~[ => t1", 22),
        ("/ => t1,t2*x", 9),
        ("/ => t1,t2*1001", 9),
        ("/ => t1 %hash @web", 10),
        ("/ => t1 %hash(path @web", 10),
        ("/ => t1 %hash(uri)", 10),
        ("/ => t1 %fastest", 10),
        ("/ => t1 %random_two(path)", 10),
    ] {
        let e = Policy::load(None, listen, targets, Some(rules)).expect_err(rules);
        assert_eq!((e.line, e.column), (1, column), "{rules}: {e}");
    }
}
