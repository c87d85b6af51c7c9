//! HTTPS connections of an nginx move to targets whose servers speak plain HTTP: the library there has the record layer. The client
//! is OpenSSL, which fails on the first byte that is not right.

use serde_json::{Value, json};
use xo_tests::tls::{Https, Interactive, SUITES, Suite};

fn steps() -> Value {
    json!([
        ["GET", "/loc/64k"],
        ["GET", "/img/t1/1k"],
        ["PUT", "/up/t1/a", 100_000],
        ["GET", "/img/t1/1m"],
        ["GET", "/loc/1"],
        ["GET", "/img/t1/0"],
        ["GET", "/img/t1/64k"],
    ])
}
/// Who serves them.
const PLACES: [&str; 7] = ["host", "t1", "t1", "t1", "t1", "t1", "t1"];

#[test]
fn every_suite_moves_to_a_plain_server() {
    let https = Https::up();
    let _programs = https.everything();
    let status = https.bed.try_status("t1").expect("a status");
    assert_eq!(status["tls"]["plain"], "library", "{status}");
    for suite in SUITES {
        let got = https.client(443, Some(suite), json!({ "steps": steps() }));
        assert_eq!(got[0]["suite"], suite.1, "{got}");
        https.assert_places(&got, &PLACES);
    }
    assert_eq!(https.bed.status("host", "/offloads_total"), SUITES.len() as u64, "{}", https.all_about());
    https.assert_nothing_refused();
    https.bed.wait_idle(&["host", "t1"]);
}

#[test]
fn records_of_one_byte_and_large_bodies() {
    let https = Https::up();
    let _programs = https.everything();
    for suite in [SUITES[0], SUITES[3], SUITES[5]] {
        for (options, places) in [
            (
                json!({ "chunk": 1, "steps": [["GET", "/img/t1/1k"], ["PUT", "/up/t1/b", 500], ["GET", "/loc/1"]] }),
                3,
            ),
            (
                json!({ "chunk": 1, "pause": 0.001,
                    "steps": [["GET", "/img/t1/1k"], ["PUT", "/up/t1/b", 50], ["GET", "/loc/1"]] }),
                3,
            ),
            (json!({ "steps": [["PUT", "/up/t1/c", 5_000_000], ["PUT", "/up/t1/c", 5_000_001]] }), 2),
            (json!({ "steps": [["GET", "/img/t1/20m"], ["GET", "/img/t1/1"]] }), 2),
        ] {
            let got = https.client(443, Some(suite), options);
            https.assert_places(&got, &vec!["t1"; places]);
        }
    }
    https.assert_nothing_refused();
    https.bed.wait_idle(&["host", "t1"]);
}

/// One of each version's ciphers.
const THREE: [Suite; 3] = [SUITES[1], SUITES[2], SUITES[3]];

/// From one target to the other, each record's number right: a wrong one ends the connection.
#[test]
fn one_connection_moves_a_thousand_times() {
    let https = Https::with_targets(2);
    let _programs = https.everything();
    for suite in [SUITES[0], SUITES[4]] {
        let moves = https.wire(
            suite,
            "w, result = Wire(), 0\n\
             for i in range(1000):\n\
             \x20   place = f't{i % 2 + 1}'\n\
             \x20   assert w.get(f'/img/{place}/1k') == place, i\n\
             \x20   result += 1\n",
        );
        assert_eq!(moves, 1000);
    }
    https.assert_nothing_refused();
    let onward = ["t1", "t2"].map(|t| https.bed.status(t, "/onward_total"));
    assert_eq!(onward.iter().sum::<u64>(), 2 * 999, "{onward:?}");
    https.bed.wait_idle(&["host", "t1", "t2"]);
}

/// What is left of a record when a part of its data has been read moves on, too. (After a long response the next request would stay,
/// while something of it has not been sent.)
#[test]
fn requests_in_one_record_go_where_each_belongs() {
    let https = Https::with_targets(2);
    let _programs = https.everything();
    for suite in SUITES {
        let nodes = https.wire(
            suite,
            "w = Wire()\n\
             paths = [f'/img/t{n}/{size}' for n, size in\n\
             \x20        [(1, '1'), (2, '1k'), (2, '0'), (1, '1k'), (2, '1'), (1, '1k'), (1, '1'), (2, '1k'), (1, '0')]]\n\
             w.push(w.seal(b''.join(request(p) for p in paths)))\n\
             result = [w.got(p) for p in paths]\n\
             data = [upload(f'/up/t{n}/pipelined{n}', 5000 * n) for n in (1, 2, 1)]\n\
             w.push(w.seal(b''.join(d[0] for d in data)))\n\
             result += [w.response()[0] for d in data]\n",
        );
        let expected = ["t1", "t2", "t2", "t1", "t2", "t1", "t1", "t2", "t1", "t1", "t2", "t1"];
        assert_eq!(nodes, json!(expected), "{}", https.all_about());
    }
    https.assert_nothing_refused();
    https.bed.wait_idle(&["host", "t1", "t2"]);
}

#[test]
fn a_record_is_cut_anywhere_by_a_move() {
    let https = Https::with_targets(2);
    let _programs = https.everything();
    for suite in THREE {
        let cuts = https.wire(
            suite,
            "w, result, k = Wire(), 0, 0\n\
             while True:\n\
             \x20   here, there = f't{k % 2 + 1}', f't{(k + 1) % 2 + 1}'\n\
             \x20   first = w.seal(request(f'/img/{here}/1'))\n\
             \x20   second = w.seal(request(f'/img/{there}/1k'))\n\
             \x20   if k >= len(second):\n\
             \x20       break\n\
             \x20   w.push(first + second[:k])\n\
             \x20   assert w.got(f'/img/{here}/1') == here, k\n\
             \x20   w.push(second[k:])\n\
             \x20   assert w.got(f'/img/{there}/1k') == there, k\n\
             \x20   k += 1\n\
             result = k\n",
        );
        assert!(cuts.as_u64().is_some_and(|n| n > 50), "{cuts}");
    }
    https.assert_nothing_refused();
    https.bed.wait_idle(&["host", "t1", "t2"]);
}

#[test]
fn requests_of_many_records_and_large_uploads_move() {
    let https = Https::with_targets(2);
    let _programs = https.everything();
    for suite in THREE {
        let got = https.client(
            443,
            Some(suite),
            json!({ "chunk": 1, "steps": [["GET", "/img/t1/1k"], ["GET", "/img/t2/1k"], ["PUT", "/up/t1/s", 90],
                ["PUT", "/up/t2/s", 90], ["GET", "/img/t1/1"]] }),
        );
        https.assert_places(&got, &["t1", "t2", "t1", "t2", "t1"]);
        let got = https.client(
            443,
            Some(suite),
            json!({ "steps": [["PUT", "/up/t1/l", 3_000_000], ["PUT", "/up/t2/l", 3_000_001], ["GET", "/img/t1/20m"],
                ["PUT", "/up/t2/l", 2_999_999], ["GET", "/img/t1/1"]] }),
        );
        https.assert_places(&got, &["t1", "t2", "t1", "t2", "t1"]);
    }
    https.assert_nothing_refused();
    https.bed.wait_idle(&["host", "t1", "t2"]);
}

/// The kernel takes parts of records only; after it, the sequence numbers are right still.
#[test]
fn a_client_that_reads_slowly() {
    let https = Https::with_targets(2);
    let _programs = https.everything();
    for suite in THREE {
        let nodes = https.wire(
            suite,
            "w, result = Wire(rcvbuf=4096), []\n\
             for place, size in (('t1', '1m'), ('t2', '1m'), ('t1', '1k')):\n\
             \x20   w.push(w.seal(request(f'/img/{place}/{size}')))\n\
             \x20   time.sleep(0.3)\n\
             \x20   result.append(w.got(f'/img/{place}/{size}'))\n",
        );
        assert_eq!(nodes, json!(["t1", "t2", "t1"]), "{}", https.all_about());
    }
    https.assert_nothing_refused();
    https.bed.wait_idle(&["host", "t1", "t2"]);
}

#[test]
fn new_keys_before_and_after_a_move() {
    let https = Https::with_targets(2);
    let _programs = https.everything();
    for (_, suite) in &SUITES[..3] {
        let mut client = Interactive::start(&https, &format!("-tls1_3 -ciphersuites {suite}"));
        // K asks the server for a new key, too; k does not.
        for (i, command) in ["K", "k", "K", "K", "", "k"].into_iter().enumerate() {
            for place in ["t1", "t2"] {
                if !command.is_empty() {
                    client.say(&format!("{command}\n"), "KEYUPDATE");
                }
                client
                    .say(&format!("HEAD /img/{place}/1k HTTP/1.1\nHost: x\n\n"), &format!("X-Node: {place}"));
                if i % 2 == 0 {
                    client.say("HEAD /loc/1k HTTP/1.1\nHost: x\n\n", &format!("X-Node: {place}"));
                }
            }
        }
    }
    https.assert_nothing_refused();
}

#[test]
fn both_sides_say_goodbye() {
    let https = Https::up();
    let _programs = https.everything();
    for suite in SUITES {
        let ends = https.wire(
            suite,
            "def end(step):\n\
             \x20   try:\n\
             \x20       step()\n\
             \x20   except Exception as e:\n\
             \x20       return f'{type(e).__name__} {getattr(e, \"reason\", \"\")}'.strip()\n\
             \x20   return 'nothing'\n\
             def unwrapped(w):\n\
             \x20   while True:\n\
             \x20       try:\n\
             \x20           return w.tls.unwrap()\n\
             \x20       except ssl.SSLWantReadError:\n\
             \x20           w.push(w.outgoing.read())\n\
             \x20           w.pull()\n\
             def gone(w):\n\
             \x20   while w.socket.recv(1 << 16):\n\
             \x20       pass\n\
             result = []\n\
             w = Wire()\n\
             assert w.get('/img/t1/1k') == 't1'\n\
             w.push(w.seal(request('/img/t1/1', 'Connection: close')))\n\
             assert w.got('/img/t1/1') == 't1'\n\
             result.append(end(w.more))\n\
             w = Wire()\n\
             assert w.get('/img/t1/1k') == 't1'\n\
             result += [end(lambda: unwrapped(w)), end(lambda: gone(w))]\n\
             w = Wire()\n\
             assert w.get('/img/t1/1k') == 't1'\n\
             bad = bytearray(w.seal(request('/img/t1/1k')))\n\
             bad[-1] ^= 1\n\
             w.push(bad)\n\
             result.append(end(w.more))\n\
             w = Wire()\n\
             assert w.get('/img/t1/1k') == 't1'\n\
             w.push(b'GET / HTTP/1.1\\r\\n\\r\\n')\n\
             result.append(end(w.more))\n",
        );
        // An end without close_notify would be an error.
        let bad = ["SSLError SSLV3_ALERT_BAD_RECORD_MAC", "SSLError TLSV1_ALERT_DECODE_ERROR"];
        assert_eq!(ends, json!(["nothing", "nothing", "nothing", bad[0], bad[1]]), "{suite:?}");
    }
    // A server that closes first is in TIME_WAIT for a minute: it is not waited for.
    https.assert_nothing_refused();
}

/// Its server begins with a handshake, as it did when the connection was new; the library answers for OpenSSL.
#[test]
fn connections_come_home_to_a_server_with_tls() {
    let https = Https::with_targets(2);
    let _programs = https.everything();
    for suite in SUITES {
        let nodes = https.wire(
            suite,
            "w, result = Wire(), []\n\
             for place in ('host', 't1', 'host', 'host', 't2', 't1', 'host', 't2', 'host'):\n\
             \x20   for size in ('1k', '1', '64k'):\n\
             \x20       result.append(w.get(f'/img/{place}/{size}') == place)\n\
             \x20   data, body = upload(f'/up/{place}/home', 70000)\n\
             \x20   w.push(w.seal(data))\n\
             \x20   result.append(w.response()[0] == place)\n\
             \x20   assert open(f'{root}/up/home', 'rb').read() == body\n\
             paths = [f'/img/{n}/1k' for n in ('host', 't1', 'host', 'host', 't2', 't2', 'host')]\n\
             w.push(w.seal(b''.join(request(p) for p in paths)))\n\
             result += [w.got(p) == p.split('/')[2] for p in paths]\n",
        );
        assert_eq!(nodes, json!(vec![true; 43]), "{suite:?} {}", https.all_about());
    }
    https.assert_nothing_refused();
    https.bed.wait_idle(&["host", "t1", "t2"]);
}

/// Blocking sockets, a thread for each connection, no epoll: at the target in plain, and as the home.
#[test]
fn python_as_target_and_as_home() {
    let https = Https::with_targets(2);
    let _programs = https.with_python();
    for suite in [SUITES[0], SUITES[1], SUITES[2], SUITES[3], SUITES[5]] {
        let places = ["host", "t1", "t2", "t1", "host", "t2", "host", "host", "t1"];
        let mut steps = Vec::new();
        for (i, place) in places.iter().enumerate() {
            steps.push(json!(["GET", format!("/img/{place}/{}", ["1k", "1m", "0"][i % 3])]));
            steps.push(json!(["PUT", format!("/up/{place}/p"), 100_000 + i]));
        }
        let got = https.client(443, Some(suite), json!({ "steps": steps }));
        let expected: Vec<_> = places.iter().flat_map(|p| [*p, *p]).collect();
        https.assert_places(&got, &expected);
    }
    https.assert_nothing_refused();
}

/// Plain bytes come and go whatever call is used; who would see records is refused.
#[test]
fn ways_to_read_and_write() {
    let https = Https::up();
    let _programs = https.with_ways();
    for suite in [SUITES[0], SUITES[2], SUITES[4]] {
        let same = https.wire(
            suite,
            "ways = ['recv', 'bytes', 'whole', 'message', 'from', 'read', 'vectors', 'splice', 'passing', 'program', 'dup', 'timed']\n\
             w, result = Wire(), []\n\
             for way in 6 * ways[:1] + ways + ways[1:] + ['fork']:\n\
             \x20   ask = request(f'/img/t1/{way}')\n\
             \x20   w.push(w.seal(ask))\n\
             \x20   result.append(w.response() == ('t1', 200, ask))\n\
             assert w.socket.recv(100) == b'', 'the end'\n",
        );
        assert_eq!(same, json!(vec![true; 30]), "{suite:?}");
    }
    https.assert_nothing_refused();
}

/// The tickets are from connections that have moved, and those that resume with them move, too.
#[test]
fn resumed_sessions_move() {
    let https = Https::up();
    let _programs = https.everything();
    for suite in SUITES {
        let got = https.client(443, Some(suite), json!({ "steps": steps(), "connections": 3 }));
        https.assert_places(&got, &PLACES);
        let resumed = [&got[0]["resumed"], &got[1]["resumed"], &got[2]["resumed"]];
        assert_eq!(resumed, [false, true, true], "{got}");
    }
    https.assert_nothing_refused();
}

/// The client goes on with its next key in the middle of a request that moves, or has just moved.
#[test]
fn new_keys_in_the_middle_of_a_request() {
    let https = Https::with_targets(2);
    let _programs = https.everything();
    for (_, suite) in &SUITES[..3] {
        let mut client = Interactive::start(&https, &format!("-tls1_3 -ciphersuites {suite}"));
        // At the host a head that is interrupted by a new key is not followed.
        client.say("HEAD /img/t1/1k HTTP/1.1\nHost: x\n\n", "X-Node: t1");
        for command in ["K", "k"] {
            for place in ["t2", "t1", "host"] {
                client.say(&format!("HEAD /img/{place}/1k HTTP/1.1\n"), "");
                client.say(&format!("{command}\n"), "KEYUPDATE");
                client.say("Host: x\n\n", &format!("X-Node: {place}"));
                let upload = format!("PUT /up/{place}/keys HTTP/1.1\nHost: x\nContent-Length: 12\n\nhello\n");
                client.say(&upload, "");
                client.say(&format!("{command}\n"), "KEYUPDATE");
                client.say("world\n", &format!("X-Node: {place}"));
            }
        }
    }
}
