//! Unmodified Redis servers that hold different slots serve one client connection.

use std::process::Command;
use std::time::Duration;

use xo_proto::reason::Reason;
use xo_proto::resp::{Command as Seen, Look, Requests, key_slot};
use xo_tests::Bed;
use xo_tests::counters::Counters;
use xo_tests::program::wait_for;
use xo_tests::redis::{PORT, Redis, Reply, command, holder};
use xo_tests::servers::{address, address6};

/// What the libraries on all servers have counted under a name.
fn counted(bed: &Bed, name: &str) -> u64 {
    let pointer = format!("/library/{name}");
    bed.servers()
        .iter()
        .map(|n| bed.try_status(n).and_then(|s| s.pointer(&pointer)?.as_u64()).unwrap_or(0))
        .sum()
}

fn moves(bed: &Bed) -> u64 {
    let all = ["/offloads_total", "/onward_total", "/sent_home_total"];
    bed.servers().iter().flat_map(|n| all.map(|pointer| bed.status(n, pointer))).sum()
}

fn assert_no_trouble(bed: &Bed, before: &Counters) {
    let counted = Counters::of(bed).since(before);
    println!("{}", counted.troubles());
    for node in bed.servers() {
        let status = bed.try_status(&node).expect("a status");
        println!("{node}: refused {} failed {}", status["refused_by_reason"], status["failed_by_reason"]);
        assert_eq!(status["failed_total"], 0, "{node}");
    }
    counted.no_reset(bed);
}

/// Keys of a node, straight from it.
fn held(bed: &Bed, node: &str) -> Vec<Vec<u8>> {
    let own = address(node);
    bed.on(node, move || {
        let mut c = Redis::to(&own).expect("connect");
        match c.call(&["KEYS", "*"]).expect("keys") {
            Reply::Array(keys) => keys
                .into_iter()
                .map(|k| match k {
                    Reply::Bulk(k) => k,
                    other => panic!("{other:?}"),
                })
                .collect(),
            other => panic!("{other:?}"),
        }
    })
}

fn assert_slots(bed: &Bed, keys: usize) {
    let nodes = bed.servers();
    let mut all = 0;
    for node in &nodes {
        let keys = held(bed, node);
        println!("{node} holds {} keys", keys.len());
        for key in &keys {
            assert_eq!(holder(&nodes, key), node, "{}", String::from_utf8_lossy(key));
        }
        all += keys.len();
    }
    assert_eq!(all, keys);
}

/// A value as long as the key's number says: up to a megabyte now and then.
fn value(i: usize) -> Vec<u8> {
    let len = match i % 50 {
        0 => 1 << 20,
        1 => 40_000,
        2 => 16_384,
        3 => 0,
        n => n,
    };
    (0..len).map(|n| (n * 7 + i) as u8).collect()
}

#[test]
fn slots_are_those_that_redis_cluster_says() {
    let bed = Bed::up(1, 1);
    let mut command = Command::new("redis-server");
    let config = bed.directory().join("nodes.conf");
    command.args(["--cluster-enabled", "yes", "--cluster-config-file"]).arg(config);
    let _server = bed.redis_with("host", command);
    let own = address("host");
    bed.on("client", move || {
        let mut c = Redis::to(&own).expect("connect");
        let mut keys: Vec<Vec<u8>> = (0..3000).map(|i| format!("key:{i}").into_bytes()).collect();
        keys.extend((0..=255).map(|b| vec![b, b'x', 255 - b]));
        let odd =
            ["{a}b", "{}a", "a{b", "a}b{c}", "{{a}}", "a{b}{c}", "{a", "}", "x{}y{z}", "\r\n", "{\u{e4}}"];
        keys.extend(odd.map(|k| k.as_bytes().to_vec()));
        for key in keys {
            let said = c.call(&[&b"CLUSTER"[..], b"KEYSLOT", &key]).expect("a reply");
            assert_eq!(said, Reply::Integer(key_slot(&key).into()), "{}", String::from_utf8_lossy(&key));
        }
    });
}

/// For each command of this server: are the keys that it says those that are found?
#[test]
fn keys_are_those_that_redis_says() {
    let bed = Bed::up(1, 1);
    let _server = bed.redis_with("host", Command::new("redis-server"));
    let own = address("host");
    let said =
        bed.on("client", move || Redis::to(&own).expect("connect").call(&["COMMAND"]).expect("commands"));
    let Reply::Array(commands) = said else { panic!("{said:?}") };
    let (mut compared, mut unknown) = (0, Vec::new());
    for about in &commands {
        let Reply::Array(about) = about else { panic!("{about:?}") };
        let [
            Reply::Bulk(name),
            _,
            Reply::Array(flags),
            Reply::Integer(first),
            Reply::Integer(last),
            Reply::Integer(step),
            ..,
        ] = &about[..]
        else {
            panic!("{about:?}")
        };
        let name = String::from_utf8_lossy(name).into_owned();
        let is = |flag: &str| flags.contains(&Reply::Status(flag.into()));
        // Keys that depend on other arguments, or on the subcommand.
        if is("movablekeys") || *first == 0 {
            continue;
        }
        const ARGUMENTS: i64 = 7;
        let last = if *last < 0 { ARGUMENTS + last } else { *last };
        let keys: Vec<_> = (*first..=last).step_by((*step).max(1) as usize).collect();
        let argument = |i: i64| if keys.contains(&i) { "{a}".to_owned() } else { format!("{{b}}{i}") };
        let mut arguments = vec![name.clone()];
        arguments.extend((1..ARGUMENTS).map(argument));
        let mut seen = None;
        let see = |c: &Seen| {
            seen = Some((c.slot, c.stays));
            false
        };
        let looked = Requests::default().look(&command(&arguments), false, see, |_| ());
        if looked == Look::Leave(Reason::SessionState) {
            continue;
        }
        // Left alone, which is never wrong.
        if looked == Look::Leave(Reason::UnknownCommand) {
            unknown.push(name);
            continue;
        }
        assert_eq!(seen, Some((Some(key_slot(b"a")), None)), "{name}: {looked:?}");
        compared += 1;
    }
    println!("{compared} of {} commands compared; unknown: {unknown:?}", commands.len());
    // For Redis's own tests, and for the moving of cluster slots.
    let expected = ["pfdebug", "restore-asking"];
    assert!(unknown.iter().all(|name| expected.contains(&name.as_str())), "{unknown:?}");
    assert!(compared > 130);
}

#[test]
fn one_connection_reaches_the_keys_of_all_servers() {
    const KEYS: usize = 1000;
    let bed = Bed::up(3, 1);
    let programs = bed.redis_servers(&[]);
    for host in [address("host"), address6("host")] {
        let before = Counters::of(&bed);
        bed.on("client", move || {
            let mut c = Redis::to(&host).expect("connect");
            for i in 0..KEYS {
                let key = format!("key:{i}").into_bytes();
                let set = c.call(&[&b"SET"[..], &key, &value(i)]);
                assert_eq!(set.unwrap_or_else(|e| panic!("{i}: {e}")), Reply::ok(), "{i}");
                let earlier = i / 2;
                let got = c.call(&["GET".into(), format!("key:{earlier}")]);
                assert!(got.unwrap_or_else(|e| panic!("{i}: {e}")) == Reply::Bulk(value(earlier)), "{i}");
            }
        });
        assert_no_trouble(&bed, &before);
    }
    assert_slots(&bed, KEYS);
    println!("{} moves", moves(&bed));
    assert!(moves(&bed) > KEYS as u64);
    bed.wait_idle(&["host", "t1", "t2", "t3"]);
    drop(programs);
}

/// Pipelines, in which neighbours seldom belong to the same server; `pieces` is how much is sent at a time.
fn pipelines(host: &str, client: usize, rounds: usize, pieces: usize) -> std::io::Result<()> {
    let mut c = Redis::to(host)?;
    let (mut bytes, mut expected) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        bytes.clear();
        expected.clear();
        for i in 0..100 {
            let number = round * 50 + i / 2;
            let key = format!("p:{client}:{number}");
            if i % 2 == 0 {
                let size = if i == 50 { 30_000 } else { i };
                bytes.extend(command(&[&b"SET"[..], key.as_bytes(), &vec![b'v'; size]]));
                expected.push(Reply::ok());
            } else if i % 10 == 1 {
                // A line.
                bytes.extend(format!("strlen {key}\r\n").bytes());
                expected.push(Reply::Integer(if i == 51 { 30_000 } else { i as i64 - 1 }));
            } else {
                bytes.extend(command(&["INCR", &format!("n:{client}:{}", i % 20)]));
                expected.push(Reply::Integer((round * 5 + i / 20 + 1) as i64));
            }
        }
        for piece in bytes.chunks(pieces) {
            c.send(piece)?;
            if pieces < 2000 {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        // The 20 counters of which 16 are used are counted five times a round.
        for (i, expected) in expected.iter().enumerate() {
            let got = c.reply()?;
            if got != *expected {
                let text =
                    format!("client {client}, round {round}, command {i}: {got:?} instead of {expected:?}");
                return Err(std::io::Error::other(text));
            }
        }
    }
    Ok(())
}

#[test]
fn pipelines_over_all_slots_are_answered_in_order() {
    let bed = Bed::up(3, 1);
    let programs = bed.redis_servers(&[]);
    let before = Counters::of(&bed);
    let clients: Vec<_> = [usize::MAX, 1400, 16_384, 100, 5000, 777]
        .into_iter()
        .enumerate()
        .map(|(number, pieces)| {
            let host = if number % 2 == 0 { address("host") } else { address6("host") };
            bed.spawn("client", move || pipelines(&host, number, 5, pieces))
        })
        .collect();
    let results: Vec<_> = clients.into_iter().map(|c| c.join().expect("no panic")).collect();
    for node in bed.servers() {
        // A hand-off that is refused leaves a command where its key is not.
        let status = bed.try_status(&node).expect("a status");
        println!("{node}: refused {}, library {}", status["refused_by_reason"], status["library"]);
    }
    results.into_iter().for_each(|r| r.unwrap_or_else(|e| panic!("{e}")));
    assert_no_trouble(&bed, &before);
    println!("{} moves", moves(&bed));
    assert_slots(&bed, 6 * (250 + 8));
    bed.wait_idle(&["host", "t1", "t2", "t3"]);
    drop(programs);
}

/// A key of this node.
fn key_of(nodes: &[String], node: &str, begin: &str) -> String {
    (0..).map(|i| format!("{begin}{i}")).find(|k| holder(nodes, k.as_bytes()) == node).expect("a key")
}

#[test]
fn what_must_not_move_stays_and_is_counted() {
    let bed = Bed::up(3, 1);
    let programs = bed.redis_servers(&[]);
    let before = Counters::of(&bed);
    let nodes = bed.servers();
    let (there, other) = (key_of(&nodes, "t1", "a"), key_of(&nodes, "t2", "b"));
    let (host, t1) = (address("host"), address("t1"));
    let (one, two) = (there.clone(), other.clone());
    let ok = Reply::ok;
    let queued = || Reply::Status("QUEUED".into());
    let count = |name: &str| counted(&bed, name);
    // Runs `work` on a connection of its own; says whether `name` was counted meanwhile.
    let with = |name: &str, work: &(dyn Fn(&mut Redis) + Sync)| {
        let before = (count(name), moves(&bed));
        let namespace = bed.namespace("client");
        std::thread::scope(|scope| {
            let run = || {
                xo_tests::bed::enter(&namespace);
                work(&mut Redis::to(&host).expect("connect"));
            };
            scope.spawn(run).join().expect("no panic");
        });
        let after = (count(name), moves(&bed));
        println!("{name}: counted {}, {} moves", after.0 - before.0, after.1 - before.1);
        assert!(after.0 > before.0, "{name} is not counted");
        after.1 - before.1
    };

    // A transaction stays where it began; after it the connection moves again.
    let transaction = with("session_state", &|c| {
        assert_eq!(c.call(&["SET", &one, "1"]).expect("set"), ok());
        assert_eq!(c.call(&["MULTI"]).expect("multi"), ok());
        assert_eq!(c.call(&["INCR", &one]).expect("incr"), queued());
        assert_eq!(c.call(&["SET", &two, "stray"]).expect("set"), queued());
        assert_eq!(c.call(&["EXEC"]).expect("exec"), Reply::Array(vec![Reply::Integer(2), ok()]));
        assert_eq!(c.call(&["GET", &two]).expect("get"), Reply::Null, "at its own server");
        assert_eq!(c.call(&["GET", &one]).expect("get"), Reply::bulk("2"));
    });
    assert_eq!(transaction, 3, "there, on, and back");
    let watch = with("session_state", &|c| {
        assert_eq!(c.call(&["WATCH", &one]).expect("watch"), ok());
        assert_eq!(c.call(&["GET", &two]).expect("get"), Reply::bulk("stray"), "where the watched key is");
        assert_eq!(c.call(&["DEL", &two]).expect("del"), Reply::Integer(1));
        assert_eq!(c.call(&["UNWATCH"]).expect("unwatch"), ok());
        assert_eq!(c.call(&["SET", &two, "x"]).expect("set"), ok());
    });
    assert_eq!(watch, 2);
    let select = with("session_state", &|c| {
        assert_eq!(c.call(&["SELECT", "3"]).expect("select"), ok());
        assert_eq!(c.call(&["SET", &one, "third"]).expect("set"), ok());
        assert_eq!(c.call(&["GET", &one]).expect("get"), Reply::bulk("third"));
        assert_eq!(c.call(&["SELECT", "0"]).expect("select"), ok());
        assert_eq!(c.call(&["GET", &one]).expect("get"), Reply::bulk("2"));
    });
    assert_eq!(select, 1);
    // States that do not end.
    let subscribed = with("session_state", &|c| {
        let said = Reply::Array(vec![Reply::bulk("subscribe"), Reply::bulk("news"), Reply::Integer(1)]);
        assert_eq!(c.call(&["SUBSCRIBE", "news"]).expect("subscribe"), said);
        let host = address("host");
        Redis::to(&host).expect("connect").call(&["PUBLISH", "news", "1"]).expect("publish");
        let message = [Reply::bulk("message"), Reply::bulk("news"), Reply::bulk("1")];
        assert_eq!(c.reply().expect("a message"), Reply::Array(message.into()));
    });
    assert_eq!(subscribed, 0);
    for arguments in [&["CLIENT", "SETNAME", "x"][..], &["HELLO", "2", "SETNAME", "y"], &["READONLY"]] {
        let stays = with("session_state", &|c| {
            c.call(arguments).expect("a reply");
            assert_eq!(c.call(&["GET", &one]).expect("get"), Reply::Null, "at the host");
        });
        assert_eq!(stays, 0);
    }
    let unknown = with("unknown_command", &|c| {
        assert!(matches!(c.call(&["NO.SUCH", &one]), Ok(Reply::Error(_))));
        assert_eq!(c.call(&["GET", &one]).expect("get"), Reply::Null, "at the host");
    });
    assert_eq!(unknown, 0);
    // Single commands that stay.
    let script = with("script", &|c| {
        let got = c.call(&["EVAL", "return redis.call('get', KEYS[1])", "1", &one]);
        assert_eq!(got.expect("eval"), Reply::Null, "at the host");
        assert_eq!(c.call(&["GET", &one]).expect("get"), Reply::bulk("2"));
    });
    assert_eq!(script, 1);
    let cross = with("cross_slot", &|c| {
        assert_eq!(
            c.call(&["MGET", &one, &two]).expect("mget"),
            Reply::Array(vec![Reply::Null, Reply::Null])
        );
        let tagged = format!("{{{one}}}:x");
        assert_eq!(
            c.call(&["MGET", &one, &tagged]).expect("mget"),
            Reply::Array(vec![Reply::bulk("2"), Reply::Null])
        );
    });
    assert_eq!(cross, 1);
    // A command that blocks, where its key is; what follows waits for it, for a while.
    let list = format!("{{{one}}}list");
    let blocked = with("blocking", &|c| {
        c.send(&[command(&["BLPOP", &list, "0"]), command(&["GET", &two])].concat()).expect("sent");
        std::thread::sleep(Duration::from_millis(1200));
        let mut straight = Redis::to(&t1).expect("connect");
        assert_eq!(straight.call(&["RPUSH", &list, "x"]).expect("push"), Reply::Integer(1));
        assert_eq!(c.reply().expect("popped"), Reply::Array(vec![Reply::bulk(&list), Reply::bulk("x")]));
        assert_eq!(c.reply().expect("get"), Reply::Null, "where the connection was blocked");
        assert_eq!(c.call(&["GET", &two]).expect("get"), Reply::bulk("x"));
    });
    assert_eq!(blocked, 2);
    assert_no_trouble(&bed, &before);
    bed.wait_idle(&["host", "t1", "t2", "t3"]);
    drop(programs);
}

#[test]
fn an_authenticated_connection_stays() {
    let bed = Bed::up(3, 1);
    let programs = bed.redis_servers(&["--requirepass", "secret"]);
    let before = Counters::of(&bed);
    let nodes = bed.servers();
    let key = key_of(&nodes, "t1", "a");
    let host = address("host");
    bed.on("client", move || {
        let mut c = Redis::to(&host).expect("connect");
        assert_eq!(c.call(&["AUTH", "secret"]).expect("auth"), Reply::ok());
        assert_eq!(c.call(&["SET", &key, "x"]).expect("set"), Reply::ok());
        let mut c = Redis::to(&host).expect("connect");
        c.call(&["HELLO", "2", "AUTH", "default", "secret"]).expect("hello");
        assert_eq!(c.call(&["GET", &key]).expect("get"), Reply::bulk("x"));
    });
    assert_eq!((counted(&bed, "session_state"), moves(&bed)), (2, 0));
    assert_no_trouble(&bed, &before);
    drop(programs);
}

#[test]
fn what_comes_with_redis_works() {
    let bed = Bed::up(3, 1);
    let programs = bed.redis_servers(&[]);
    let before = Counters::of(&bed);
    let nodes = bed.servers();
    let host = address("host");
    // One connection of redis-cli for all lines.
    let lines: String = (0..200).map(|i| format!("SET cli:{i} {i}\nGET cli:{i}\n")).collect();
    let script = bed.file("lines", &lines);
    let shell = format!("redis-cli -h {host} < {}", script.display());
    let said = bed.run("client", Command::new("sh").args(["-c", &shell]));
    let expected: String = (0..200).map(|i| format!("OK\n{i}\n")).collect();
    assert_eq!(said, expected);
    for pipeline in ["1", "16"] {
        let mut command = Command::new("redis-benchmark");
        command.args([
            "-h",
            &host,
            "-p",
            &PORT.to_string(),
            "-c",
            "20",
            "-n",
            "10000",
            "-r",
            "1000",
            "-d",
            "20",
            "-P",
            pipeline,
        ]);
        let said = bed.run(
            "client",
            command.args(["-q", "-t", "ping,set,get,incr,lpush,lpop,sadd,hset,spop,zadd,mset"]),
        );
        for line in said.replace('\r', "\n").lines().filter(|l| l.contains("p50") || l.contains("rror")) {
            println!("-P {pipeline}: {line}");
            assert!(!line.to_lowercase().contains("error"), "{line}");
        }
    }
    // MSET of ten keys at a time stays where the connection is; all others are where they belong.
    let mut strays = Vec::new();
    let settled = wait_for(Duration::from_secs(5), || {
        strays.clear();
        for node in &nodes {
            let its = held(&bed, node).into_iter();
            let its = its.filter(|k| holder(&nodes, k) != node && !k.starts_with(b"key:"));
            strays.extend(its.map(|k| format!("{} at {node}", String::from_utf8_lossy(&k))));
        }
        strays.is_empty()
    });
    let refused = || nodes.iter().map(|n| bed.try_status(n).map(|s| s["refused_by_reason"].clone()));
    assert!(settled, "{strays:?}: {:?}", refused().collect::<Vec<_>>());
    assert!(counted(&bed, "cross_slot") > 0);
    println!("{} moves", moves(&bed));
    assert_no_trouble(&bed, &before);
    bed.wait_idle(&["host", "t1", "t2", "t3"]);
    drop(programs);
}
