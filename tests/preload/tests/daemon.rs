//! xo-peerd's commands and ways to start it.

use std::fs;
use std::process::{Command, Output};

use xo_tests::bed::built;
use xo_tests::pool::peerd_says;
use xo_tests::program::wait_for;
use xo_tests::servers::{PEER_PORT, PeerdOptions, address};
use xo_tests::{Bed, Connection};

fn peerd(arguments: &[&str]) -> Output {
    Command::new(built("xo-peerd")).args(arguments).output().expect("xo-peerd")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn one_request(bed: &Bed) -> String {
    bed.on("client", || {
        let mut c = Connection::to(&address("host"), 80).expect("connect");
        c.get("/img/64k").expect("a response").node().to_owned()
    })
}

#[test]
fn check_says_what_is_wrong_and_where() {
    let directory = std::env::temp_dir().join(format!("xo-check-{}", std::process::id()));
    fs::create_dir_all(&directory).expect("directory");
    let config = directory.join("peerd.toml");
    let policy = directory.join("policy.toml");
    let config_text = |more: &str| format!("node = \"n\"\ninsecure = true\npolicy = {policy:?}\n{more}");
    let run = |config_more: &str, policy_text: &str| {
        fs::write(&config, config_text(config_more)).expect("write");
        fs::write(&policy, policy_text).expect("write");
        let output = peerd(&["check", "--config", config.to_str().expect("a path")]);
        (output.status.code(), text(&output.stdout) + &text(&output.stderr))
    };
    let good = "listen = [80]\n[targets]\nt1 = \"10.0.0.1:7400\"\n[[rule]]\npath_prefix = \"/\"\nto = [\"t1\"]\nhandler = \"web\"\n";
    let (code, said) = run("", good);
    assert_eq!(code, Some(0), "{said}");

    let cases = [
        ("", good.replace("\"t1\"]", "\"t2\"]"), "policy.toml:6:7"),
        ("", good.replace("path_prefix", "path_prefx"), "policy.toml:5:1"),
        ("", good.replace("10.0.0.1:7400", "nowhere"), "policy.toml:3:6"),
        ("", good.replace("path_prefix = \"/\"", "path_regex = \"(\""), "policy.toml:5:14"),
        ("", good.replace("[80]", "[80"), "policy.toml:2:1"),
        ("listen = \"here\"\n", good.into(), "peerd.toml:4:10"),
        ("bogus = 1\n", good.into(), "peerd.toml:4:1"),
        ("[[handler]]\nname = \"web\"\nmode = \"attach\"\n", good.into(), "peerd.toml:4:1"),
        ("[[handler]]\nname = \"web\"\nmode = \"pool\"\n", good.into(), "peerd.toml:4:1"),
        (
            "[[handler]]\nname = \"web\"\nmode = \"pool\"\ncommand = [\"/bin/cat\"]\nworkers = 0\n",
            good.into(),
            "peerd.toml:8:11",
        ),
        ("[[handler]]\nname = \"web\"\nmode = \"exec\"\ncommand = []\n", good.into(), "peerd.toml:"),
    ];
    for (config_more, policy_text, place) in cases {
        let (code, said) = run(config_more, &policy_text);
        assert_eq!(code, Some(2), "{place}: {said}");
        assert!(said.contains(place), "{place}: {said}");
    }
    assert_eq!(peerd(&["check", "--config", "/nonexistent"]).status.code(), Some(2));
    assert_eq!(peerd(&["bogus"]).status.code(), Some(2));
    assert_eq!(peerd(&["status", "--socket", "/nonexistent"]).status.code(), Some(1));
    fs::remove_dir_all(directory).expect("remove");
}

#[test]
fn peers_with_certificates() {
    let bed = Bed::up(2, 1);
    let directory = bed.directory().join("certs");
    let path = directory.to_str().expect("a path");
    let made = peerd(&["certs", path, "host", "t1"]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    // t2 has a certificate of another CA.
    let foreign = bed.directory().join("foreign");
    assert!(peerd(&["certs", foreign.to_str().expect("a path"), "t2"]).status.success());
    let tls = |directory: &std::path::Path, node: &str| {
        let d = directory.display();
        let head = "# the peer channel is encrypted".to_owned();
        let sections = format!(
            "[tls]\nca = \"{d}/ca.pem\"\ncert = \"{d}/{node}.pem\"\nkey = \"{d}/{node}.key\"\n{}",
            xo_tests::servers::WEB
        );
        PeerdOptions { head, sections }
    };
    let _daemons = [
        bed.peerd("host", &tls(&directory, "host")),
        bed.peerd("t1", &tls(&directory, "t1")),
        bed.peerd("t2", &tls(&foreign, "t2")),
    ];
    let _servers = ["host", "t1", "t2"].map(|n| bed.nginx(n));
    bed.wait_acceptors("t1", "web", 4);
    bed.wait_acceptors("t2", "web", 4);
    let nodes: Vec<_> = (0..8).map(|_| one_request(&bed)).collect();
    assert!(nodes.iter().any(|n| n == "t1"), "{nodes:?}");
    assert!(nodes.iter().all(|n| n != "t2"), "a peer of another CA: {nodes:?}");
    assert!(nodes.iter().any(|n| n == "host"), "what would have gone to t2 stays: {nodes:?}");
}

#[test]
fn the_library_starts_a_daemon() {
    let bed = Bed::up(1, 1);
    let _target = bed.peerd("t1", &PeerdOptions::default());
    let _server = bed.nginx("t1");
    bed.wait_acceptors("t1", "web", 4);
    // No configuration file at all on the host: only the environment.
    let socket = bed.directory().join("embedded.sock");
    let mut command = Command::new("nginx");
    command
        .env("LD_PRELOAD", built("libxo_preload.so"))
        .env("XO_LISTEN", "80")
        .env("XO_TARGETS", format!("t1={}:{PEER_PORT}", address("t1")))
        .env("XO_RULES", "/img/ => t1 @web")
        .env("XO_PEERD", built("xo-peerd"))
        .env("XO_SOCKET", &socket)
        .env("XO_INSECURE", "1");
    let mut nginx = bed.nginx_with("host", command);
    assert!(wait_for(std::time::Duration::from_secs(10), || socket.exists()), "{}", nginx.output());
    let node = one_request(&bed);
    let status = Command::new(built("xo-peerd")).args(["status", "--json", "--socket"]).arg(&socket).output();
    assert_eq!(node, "t1", "{status:?}");
    nginx.stop();
    drop(nginx);
    let gone = wait_for(std::time::Duration::from_secs(30), || !socket.exists());
    assert!(gone, "the embedded daemon ends with its last server and connection");
}

#[test]
fn metrics_in_prometheus_text() {
    let bed = Bed::up(1, 1);
    let head = "insecure = true\nmetrics = \"127.0.0.1:9400\"".to_owned();
    let _daemons = [
        bed.peerd("host", &PeerdOptions { head, ..PeerdOptions::default() }),
        bed.peerd("t1", &PeerdOptions::default()),
    ];
    let _servers = ["host", "t1"].map(|n| bed.nginx(n));
    bed.wait_acceptors("t1", "web", 4);
    let mut served = bed.on("client", || {
        let mut c = Connection::to(&address("host"), 80).expect("connect");
        assert_eq!(c.get("/img/64k").expect("a response").node(), "t1");
        c
    });
    // What the target says of itself comes with its next report.
    let expected = [
        "xo_offloads_total 1",
        "xo_target_up{target=\"t1\"} 1",
        "xo_target_connections{target=\"t1\"} 1",
        "xo_target_serves{target=\"t1\"} 1",
        "xo_target_handler_serves{target=\"t1\",handler=\"web\"} 1",
    ];
    let page = metrics_with(&bed, &expected);
    for line in page.lines().filter(|l| !l.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').expect("name and value");
        assert!(name.starts_with("xo_") && value.parse::<f64>().is_ok(), "{line}");
    }
    let cpu = page.lines().find_map(|l| l.strip_prefix("xo_target_cpu_ratio{target=\"t1\"} "));
    assert!(cpu.is_some_and(|v| v.parse().is_ok_and(|v: f64| (0.0..=1.0).contains(&v))), "{page}");
    let table = text(&peerd_says(&bed, "host", &["status"]).stdout);
    let shown = "t1 up, 1 connections from here, serves 1 (web 1), CPU ";
    assert!(table.contains(shown), "{table}");
    served.get("/img/1k").expect("still served");
    drop(served);
    metrics_with(&bed, &["xo_target_serves{target=\"t1\"} 0"]);
}

/// The page of the host's metrics when all these lines are on it.
fn metrics_with(bed: &Bed, lines: &[&str]) -> String {
    let mut page = String::new();
    let are_there = wait_for(std::time::Duration::from_secs(20), || {
        page = bed.on("host", || {
            let mut c = Connection::to("127.0.0.1", 9400).expect("connect");
            c.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").expect("send");
            let response = c.response(false).expect("metrics");
            assert_eq!(response.status, 200);
            text(&response.body)
        });
        lines.iter().all(|line| page.lines().any(|l| l == *line))
    });
    assert!(are_there, "not all of {lines:?}: {page}");
    page
}
