//! Servers other than nginx hand their connections over, to nginx and to a server of their own kind.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use xo_tests::counters::Counters;
use xo_tests::kinds::{Kind, Server};
use xo_tests::program::{stay_on_one_processor, wait_for};
use xo_tests::servers::{PEER_PORT, PeerdOptions, address, address6};
use xo_tests::{Bed, Connection, content};

const REQUESTS: u32 = 20;
const SIZES: [(&str, usize); 4] = [("1", 1), ("1k", 1 << 10), ("64k", 64 << 10), ("1m", 1 << 20)];

/// `/img/` and `/up/` go to t1, `/own/` and `/upo/` to t2.
fn policy(bed: &Bed) -> PathBuf {
    let mut text = "listen = [80]\n[targets]\n".to_owned();
    for t in ["t1", "t2"] {
        text += &format!("{t} = \"{}:{PEER_PORT}\"\n", address(t));
    }
    for (prefix, to) in [("/img/", "t1"), ("/up/", "t1"), ("/own/", "t2"), ("/upo/", "t2")] {
        text += &format!("[[rule]]\npath_prefix = \"{prefix}\"\nto = [\"{to}\"]\nhandler = \"web\"\n");
    }
    bed.file("two-ways.toml", &text)
}

/// The usual objects, and the same under `/own/`; uploads to `/upo/` as well.
fn write_objects(bed: &Bed, node: &str) {
    use std::os::unix::fs::PermissionsExt;
    let root = bed.root(node);
    content::write_all(&root);
    fs::create_dir_all(root.join("own")).expect("a directory");
    for (name, size) in SIZES {
        let path = format!("/own/{name}");
        fs::write(root.join(&path[1..]), content::of(&path, size)).expect("an object");
    }
    fs::create_dir_all(root.join("upo")).expect("a directory");
    fs::set_permissions(root.join("upo"), fs::Permissions::from_mode(0o777)).expect("its mode");
}

fn preloaded(bed: &Bed, node: &str, kind: Kind) -> Server {
    kind.start(bed, node, |program| {
        let mut command = bed.preloaded(node, program);
        command.env("XO_POLICY", policy(bed));
        command
    })
}

/// 20 requests on a connection, some at the host, then the rest where the rules say.
fn talk(number: u32) -> std::io::Result<Vec<(String, String, usize)>> {
    let host = if number.is_multiple_of(2) { address("host") } else { address6("host") };
    let mut c = Connection::to(&host, 80)?;
    // Before it moves, a connection has up to four requests.
    let (get, put, target) = if number % 4 < 2 { ("img", "up", "t1") } else { ("own", "upo", "t2") };
    let local = number % 5;
    let mut uploads = Vec::new();
    for i in 0..REQUESTS {
        let (name, size) = SIZES[((number + i) % if i % 9 == 0 { 4 } else { 3 }) as usize];
        let (get, put) = if i < local { ("loc", "put") } else { (get, put) };
        let about =
            |e: std::io::Error| std::io::Error::other(format!("request {i} of connection {number}: {e}"));
        let response = if (number + i).is_multiple_of(3) {
            let path = format!("/{put}/{number}-{i}-{name}");
            let response = c.put(&path, &content::of(&path, size)).map_err(about)?;
            uploads.push((response.node().to_owned(), path, size));
            response
        } else {
            c.get(&format!("/{get}/{name}")).map_err(about)?
        };
        let expected = if i < local { "host" } else { target };
        if response.node() != expected {
            return Err(std::io::Error::other(format!(
                "request {i} of connection {number} was answered by {} instead of {expected}",
                response.node()
            )));
        }
    }
    Ok(uploads)
}

/// Carries out `connections`, all at once; what went wrong.
fn round(bed: &Bed, connections: u32) -> Vec<String> {
    let threads: Vec<_> = (0..connections).map(|i| bed.spawn("client", move || talk(i))).collect();
    let mut errors = Vec::new();
    for thread in threads {
        match thread.join() {
            Ok(Ok(uploads)) => {
                for (node, path, size) in uploads {
                    let stored = fs::read(bed.root(&node).join(&path[1..])).unwrap_or_default();
                    if let Err(e) = xo_tests::client::same(&path, &stored, &content::of(&path, size)) {
                        errors.push(format!("stored at {node}: {e}"));
                    }
                }
            }
            Ok(Err(e)) => errors.push(e.to_string()),
            Err(_) => errors.push("panic".into()),
        }
    }
    errors
}

fn hands_over(kind: Kind, at_once: u32, rounds: u32) {
    stay_on_one_processor();
    let bed = Bed::up(2, 1);
    let nodes = ["host", "t1", "t2"];
    let _daemons = nodes.map(|n| bed.peerd(n, &PeerdOptions::default()));
    nodes.iter().for_each(|n| write_objects(&bed, n));
    let servers = [("host", kind), ("t1", Kind::Nginx), ("t2", kind)].map(|(n, k)| preloaded(&bed, n, k));
    bed.wait_acceptors("t1", "web", 4);
    bed.wait_acceptors("t2", "web", 1);
    let before = Counters::of(&bed);
    let errors = round(&bed, at_once);
    assert!(errors.is_empty(), "{errors:#?}");
    bed.wait_idle(&nodes);
    let count = || servers.iter().map(|s| s.program.descriptors()).collect::<Vec<_>>();
    let descriptors = count();
    for _ in 1..rounds {
        let errors = round(&bed, at_once);
        assert!(errors.is_empty(), "{errors:#?}");
    }
    bed.wait_idle(&nodes);
    // A closed connection's descriptor goes a moment after its end has been seen.
    let mut after = count();
    wait_for(Duration::from_secs(10), || {
        after = count();
        after.iter().zip(&descriptors).all(|(a, b)| a <= b)
    });
    assert!(
        after.iter().zip(&descriptors).all(|(a, b)| a <= b),
        "descriptors: {descriptors:?}, then {after:?}"
    );
    assert_eq!(bed.status("host", "/offloads_total"), u64::from(at_once * rounds));
    assert_eq!(bed.status("host", "/refused_total"), 0, "{:?}", bed.try_status("host"));
    let accepted: BTreeMap<_, _> = ["t1", "t2"].map(|t| (t, bed.status(t, "/accepted_total"))).into();
    assert_eq!(accepted.values().sum::<u64>(), u64::from(at_once * rounds), "{accepted:?}");
    let counted = Counters::of(&bed).since(&before);
    // HAProxy resets connections to its own backend.
    if kind == Kind::Haproxy {
        assert_eq!(counted.get_on("client", "EstabResets"), 0, "{}", counted.troubles());
    } else {
        counted.no_reset(&bed);
    }
}

#[test]
fn haproxy_hands_over() {
    hands_over(Kind::Haproxy, 40, 6);
}

#[test]
fn lighttpd_hands_over() {
    hands_over(Kind::Lighttpd, 40, 6);
}

#[test]
fn apache_with_threads_hands_over() {
    hands_over(Kind::ApacheEvent, 40, 6);
}

#[test]
fn apache_with_processes_hands_over() {
    hands_over(Kind::ApachePrefork, 16, 10);
}

#[test]
fn python_hands_over() {
    hands_over(Kind::Python, 30, 8);
}

/// How a server is started for the comparison.
const MODES: [&str; 3] = ["native", "other port", "no match"];

fn start_in_mode(bed: &Bed, kind: Kind, mode: &str) -> Server {
    kind.start(bed, "host", |program| {
        let mut command = bed.preloaded("host", program);
        let target = format!("[targets]\nt1 = \"{}:{PEER_PORT}\"\n[[rule]]\n", address("t1"));
        let (listen, rule) = if mode == "no match" {
            (80, "path_prefix = \"/nowhere/\"")
        } else {
            (9999, "path_prefix = \"/\"")
        };
        let text = format!("listen = [{listen}]\n{target}{rule}\nto = [\"t1\"]\nhandler = \"web\"\n");
        command.env("XO_POLICY", bed.file("untouched.toml", &text));
        if mode == "native" {
            command.env_remove("LD_PRELOAD");
        }
        command
    })
}

/// What a client gets for requests of all kinds on one connection: statuses and bodies.
fn answers(number: u32) -> std::io::Result<Vec<(u16, Vec<u8>)>> {
    let mut c = Connection::to(&address("host"), 80)?;
    let mut all = Vec::new();
    for i in 0..REQUESTS {
        let (name, size) = SIZES[(i % if i == 7 { 4 } else { 3 }) as usize];
        let response = match i % 5 {
            0 => {
                let path = format!("/put/{number}-{i}");
                c.put(&path, &content::of(&path, size))?
            }
            1 => {
                c.send(format!("HEAD /loc/{name} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes())?;
                c.response(true)?
            }
            2 => {
                c.send(b"GET /loc/nothing HTTP/1.1\r\nHost: x\r\n\r\n")?;
                c.response(false)?
            }
            _ => c.get(&format!("/loc/{name}"))?,
        };
        // Stored for the first time, or again; pages about errors and uploads name the server.
        let status = if response.status == 204 { 201 } else { response.status };
        all.push((status, if status == 200 { response.body } else { Vec::new() }));
    }
    Ok(all)
}

fn untouched(kind: Kind) {
    let bed = Bed::up(1, 1);
    let _daemon = bed.peerd("host", &PeerdOptions::default());
    write_objects(&bed, "host");
    let mut results = Vec::new();
    for mode in MODES {
        let mut server = start_in_mode(&bed, kind, mode);
        let talk = || {
            let threads: Vec<_> = (0..12).map(|i| bed.spawn("client", move || answers(i))).collect();
            let all: Result<Vec<_>, _> = threads.into_iter().map(|t| t.join().expect("no panic")).collect();
            all.unwrap_or_else(|e| panic!("{kind:?}, {mode}: {e}"))
        };
        let first = talk();
        let mut descriptors = 0;
        let settled = |server: &Server, limit: usize| {
            let mut now = 0;
            wait_for(Duration::from_secs(5), || {
                now = server.program.descriptors();
                now <= limit
            });
            now
        };
        for round in 0..4 {
            assert!(talk() == first, "{kind:?}, {mode}: answers differ between rounds");
            if round == 0 {
                // Pools have their size now; clients' ends are seen in a moment.
                std::thread::sleep(Duration::from_millis(300));
                descriptors = server.program.descriptors();
            }
        }
        let after = settled(&server, descriptors);
        assert!(after <= descriptors, "{kind:?}, {mode}: {descriptors} descriptors, then {after}");
        let library = bed.status("host", "/library/accepted");
        assert_eq!(library > 0, mode == "no match", "{mode}: {library} connections tracked");
        results.push((first, server.program.stop()));
    }
    assert!(results.windows(2).all(|w| w[0] == w[1]), "{kind:?}: not the same with the library as without");
    assert_eq!(bed.status("host", "/offloads_total"), 0);
}

#[test]
fn haproxy_untouched() {
    untouched(Kind::Haproxy);
}

#[test]
fn lighttpd_untouched() {
    untouched(Kind::Lighttpd);
}

#[test]
fn apache_with_threads_untouched() {
    untouched(Kind::ApacheEvent);
}

#[test]
fn apache_with_processes_untouched() {
    untouched(Kind::ApachePrefork);
}

#[test]
fn python_untouched() {
    untouched(Kind::Python);
}

/// Redis speaks no HTTP: on another port than the policy's it is left alone, and so is it on a tracked one.
#[test]
fn redis_untouched() {
    let bed = Bed::up(1, 1);
    let _daemon = bed.peerd("host", &PeerdOptions::default());
    let mut results = Vec::new();
    for (mode, port) in [("native", 6379_u16), ("other port", 6379), ("tracked", 80)] {
        let mut command = bed.preloaded("host", "redis-server");
        command.args([
            "--port",
            &port.to_string(),
            "--save",
            "",
            "--protected-mode",
            "no",
            "--io-threads",
            "2",
        ]);
        command.arg("--dir").arg(bed.directory());
        if mode == "native" {
            command.env_remove("LD_PRELOAD");
        }
        let mut redis = bed.start("host", &format!("redis-{port}"), &mut command);
        bed.wait_listening("host", port, &mut redis);
        let talk = || {
            bed.on("client", move || {
                let mut c = Connection::to(&address("host"), port).expect("connect");
                let mut said = Vec::new();
                for i in 0..50 {
                    let value = "v".repeat(i * 400);
                    let set =
                        format!("*3\r\n$3\r\nSET\r\n$2\r\nk{}\r\n${}\r\n{value}\r\n", i % 10, value.len());
                    c.send(set.as_bytes()).expect("send");
                    said.extend(c.exactly(5).expect("+OK"));
                    c.send(format!("*2\r\n$3\r\nGET\r\n$2\r\nk{}\r\n", i % 10).as_bytes()).expect("send");
                    said.extend(
                        c.exactly(value.len() + format!("${}\r\n\r\n", value.len()).len()).expect("value"),
                    );
                }
                said
            })
        };
        let first = talk();
        let before = redis.descriptors();
        for _ in 0..100 {
            assert!(talk() == first, "{mode}");
        }
        let mut after = 0;
        wait_for(Duration::from_secs(5), || {
            after = redis.descriptors();
            after <= before
        });
        assert!(after <= before, "{mode}: {before} descriptors, then {after}");
        results.push((first, redis.stop()));
    }
    assert!(results.windows(2).all(|w| w[0] == w[1]), "not the same with the library as without");
    assert!(bed.status("host", "/library/not_http") >= 101, "{:?}", bed.try_status("host"));
}
