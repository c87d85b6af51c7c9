//! HTTPS connections of a server under the library. A target that cannot serve them yet refuses them after it has opened the first
//! record with the state that came: so each refusal is a decision made in time, with a state that is right, and after it the host
//! serves the request as if nothing had been.

use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use xo_tests::kinds::Kind;
use xo_tests::program::wait_for;
use xo_tests::servers::{PeerdOptions, address};
use xo_tests::tls::{Https, Interactive, SUITES};

/// Four requests that would move, three that would not.
fn steps() -> Value {
    json!([
        ["GET", "/loc/64k"],
        ["GET", "/img/1k"],
        ["PUT", "/up/a", 100_000],
        ["GET", "/loc/1"],
        ["GET", "/img/1m"],
        ["GET", "/loc/0"],
        ["GET", "/img/64k"],
    ])
}
const WOULD_MOVE: u64 = 4;

/// All were served at the host, with the right bodies.
fn assert_served(connections: &Value, at_least: usize) {
    let all: Vec<_> = connections.as_array().into_iter().flatten().collect();
    assert!(all.len() >= at_least, "{connections}");
    for connection in all {
        for step in connection["steps"].as_array().expect("steps") {
            assert_eq!(step, &json!(["host", true]), "{connections}");
        }
    }
}

/// Nothing went wrong with any state.
fn assert_sound(https: &Https) {
    for reason in ["tls_lost", "tls_library", "tls_pending", "shared", "not_http"] {
        assert_eq!(https.counted(reason), 0, "{reason}: {}", https.about());
    }
    for reason in ["tls_state", "tls_insecure", "peer_timeout", "not_clean"] {
        assert_eq!(https.refused(reason), 0, "{reason}: {}", https.about());
    }
}

#[test]
fn every_suite_of_both_versions() {
    let https = Https::up();
    let _daemons = https.daemons();
    let _nginx = https.nginx("host", https.preloaded("host", "nginx"), "");
    let mut moves = 0;
    for suite in SUITES {
        let got = https.client(443, Some(suite), json!({ "steps": steps() }));
        assert_eq!(got[0]["suite"], suite.1, "{got}");
        assert_served(&got, 1);
        moves += WOULD_MOVE;
        assert_eq!(https.refused("tls_unsupported"), moves, "{suite:?}: {}", https.about());
        assert_eq!(https.counted("asked"), moves, "{suite:?}: {}", https.about());
        assert_sound(&https);
    }
    assert_eq!(https.bed.status("host", "/offloads_total"), 0);
    https.bed.wait_idle(&["host", "t1"]);
}

#[test]
fn curl() {
    let https = Https::up();
    let _daemons = https.daemons();
    let _nginx = https.nginx("host", https.preloaded("host", "nginx"), "");
    let url = |path: &str| format!("https://{}{path}", address("host"));
    let get = |version: &str, paths: &[&str]| {
        let mut command = Command::new("curl");
        command.args(["-sk", "--tlsv1.2", version, "-w", "%{http_version} "]);
        for path in paths {
            command.arg(url(path)).args(["-o", "/dev/null"]);
        }
        https.bed.run("client", &mut command)
    };
    // The whole handshake, request and answer in one go: the request comes right behind the client's Finished.
    assert_eq!(get("--http1.1", &["/img/64k"]), "1.1 ");
    assert_eq!(https.refused("tls_unsupported"), 1, "{}", https.about());
    assert_eq!(get("--http1.1", &["/img/64k", "/loc/1", "/img/1m"]), "1.1 1.1 1.1 ");
    assert_eq!(https.refused("tls_unsupported"), 3, "{}", https.about());
    // HTTP/2 stays.
    assert_eq!(get("--http2", &["/img/64k", "/img/1"]), "2 2 ");
    assert_eq!(https.refused("tls_unsupported"), 3, "{}", https.about());
    assert_eq!(https.counted("tls_alpn"), 1, "{}", https.about());
    assert_sound(&https);
}

#[test]
fn resumed_sessions() {
    let https = Https::up();
    let _daemons = https.daemons();
    let _nginx = https.nginx(
        "host",
        https.preloaded("host", "nginx"),
        "ssl_session_cache shared:a:1m; ssl_session_tickets on;",
    );
    let mut moves = 0;
    for suite in SUITES {
        let got = https.client(443, Some(suite), json!({ "steps": steps(), "connections": 3 }));
        assert_served(&got, 3);
        assert_eq!(
            [&got[0]["resumed"], &got[1]["resumed"], &got[2]["resumed"]],
            [false, true, true],
            "{got}"
        );
        moves += 3 * WOULD_MOVE;
        assert_eq!(https.refused("tls_unsupported"), moves, "{suite:?}: {}", https.about());
        assert_sound(&https);
    }
}

#[test]
fn records_of_one_byte_and_large_uploads() {
    let https = Https::up();
    let _daemons = https.daemons();
    let _nginx = https.nginx("host", https.preloaded("host", "nginx"), "");
    let mut moves = 0;
    for suite in [SUITES[0], SUITES[3], SUITES[5]] {
        for options in [
            json!({ "chunk": 1, "steps": [["GET", "/img/1k"], ["PUT", "/up/b", 500], ["GET", "/loc/1"]] }),
            json!({ "chunk": 1, "pause": 0.001, "steps": [["GET", "/img/1k"], ["PUT", "/up/b", 50], ["GET", "/loc/1"]] }),
            json!({ "steps": [["PUT", "/up/c", 5_000_000], ["PUT", "/up/c", 5_000_001], ["GET", "/loc/1"]] }),
        ] {
            let got = https.client(443, Some(suite), options);
            assert_served(&got, 1);
            moves += 2;
            assert_eq!(https.refused("tls_unsupported"), moves, "{suite:?}: {}", https.about());
            assert_sound(&https);
        }
    }
}

#[test]
fn connections_that_stay_are_counted() {
    let https = Https::up();
    let _daemons = https.daemons();
    let _nginx = https.nginx("host", https.preloaded("host", "nginx"), "");
    // AES-CBC.
    let got = https.client(443, Some(("TLSv1.2", "ECDHE-RSA-AES128-SHA256")), json!({ "steps": steps() }));
    assert_served(&got, 1);
    assert_eq!(https.counted("tls_suite"), 1, "{}", https.about());
    // Short records only.
    for (options, counted) in [("-tls1_2 -maxfraglen 512", 2), ("-tls1_3 -maxfraglen 1024", 3)] {
        let mut client = Interactive::start(&https, options);
        client.say("HEAD /img/1k HTTP/1.1\nHost: x\n\n", "X-Node: host");
        assert_eq!(https.counted("tls_suite"), counted, "{options}: {}", https.about());
    }
    // The server wants to know who the client is.
    let got = https.client(444, None, json!({ "steps": [["GET", "/img/64k"], ["GET", "/img/1"]] }));
    assert_served(&got, 1);
    assert_eq!(https.counted("tls_client_cert"), 1, "{}", https.about());
    assert_eq!(https.counted("asked"), 0, "{}", https.about());
    assert_sound(&https);
}

#[test]
fn new_keys_in_the_middle_of_a_connection() {
    let https = Https::up();
    let _daemons = https.daemons();
    let _nginx = https.nginx("host", https.preloaded("host", "nginx"), "");
    let mut moves = 0;
    for (_, suite) in &SUITES[..3] {
        let mut client = Interactive::start(&https, &format!("-tls1_3 -ciphersuites {suite}"));
        // K asks the server for a new key, too; k does not.
        for command in ["", "K", "k", "K", "K", "", "k"] {
            if !command.is_empty() {
                client.say(&format!("{command}\n"), "KEYUPDATE");
            }
            client.say("HEAD /img/1k HTTP/1.1\nHost: x\n\n", "X-Node: host");
            client.say("HEAD /loc/1k HTTP/1.1\nHost: x\n\n", "X-Node: host");
            moves += 1;
            assert_eq!(https.refused("tls_unsupported"), moves, "{suite} {command}: {}", https.about());
        }
        assert_sound(&https);
    }
}

#[test]
fn early_data_and_second_handshakes() {
    let https = Https::up();
    let _daemons = https.daemons();
    let _nginx = https.nginx("host", https.preloaded("host", "nginx"), "ssl_early_data on;");
    // A server that would take early data is followed as long as there is none.
    let got = https.client(443, Some(SUITES[0]), json!({ "steps": steps() }));
    assert_served(&got, 1);
    assert_eq!(https.refused("tls_unsupported"), WOULD_MOVE, "{}", https.about());
    https.bed.file("request", "HEAD /img/1k HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    https.bed.file("early", "HEAD /img/1k HTTP/1.1\r\nHost: x\r\n\r\n");
    let run = |more: &str| {
        let text = format!(
            "openssl s_client -ign_eof -tls1_3 -connect {}:443 {more} 2>&1 <request || true",
            address("host")
        );
        let mut command = Command::new("sh");
        https.bed.run("client", command.current_dir(https.bed.directory()).args(["-c", &text]))
    };
    let said = run("-sess_out session");
    assert!(said.contains("X-Node: host"), "{said}");
    assert_eq!(https.refused("tls_unsupported"), WOULD_MOVE + 1, "{}", https.about());
    let said = run("-sess_in session -early_data early");
    assert!(said.contains("Early data was accepted") && said.contains("X-Node: host"), "{said}");
    assert_eq!(https.counted("tls_early_data"), 1, "{}", https.about());
    assert_eq!(https.refused("tls_unsupported"), WOULD_MOVE + 1, "{}", https.about());
    // nginx does not take part in a second handshake, but the connection is not followed beyond it.
    let mut client = Interactive::start(&https, "-tls1_2");
    client.say("HEAD /img/1k HTTP/1.1\nHost: x\n\n", "X-Node: host");
    assert_eq!(https.refused("tls_unsupported"), WOULD_MOVE + 2, "{}", https.about());
    client.say("R\n", "RENEGOTIATING");
    let counted = wait_for(Duration::from_secs(20), || https.counted("tls_renegotiation") == 1);
    assert!(counted, "{}", https.about());
    assert_sound(&https);
}

#[test]
fn python_as_the_server() {
    let https = Https::up();
    let _daemons = https.daemons();
    let _server = https.python("host", https.preloaded("host", "python3"));
    let mut moves = 0;
    for suite in [SUITES[0], SUITES[1], SUITES[2], SUITES[3], SUITES[5]] {
        let got = https.client(443, Some(suite), json!({ "steps": steps(), "connections": 2 }));
        assert_served(&got, 2);
        moves += 2 * WOULD_MOVE;
        assert_eq!(https.refused("tls_unsupported"), moves, "{suite:?}: {}", https.about());
        assert_sound(&https);
    }
}

#[test]
fn other_servers() {
    for kind in [Kind::Haproxy, Kind::ApacheEvent, Kind::ApachePrefork] {
        let https = Https::up();
        let _daemons = https.daemons();
        let _server = https.server(kind, "host");
        let mut moves = 0;
        for suite in [SUITES[0], SUITES[1], SUITES[3], SUITES[5]] {
            let got = https.client(443, Some(suite), json!({ "steps": steps(), "connections": 2 }));
            assert_served(&got, 2);
            moves += 2 * WOULD_MOVE;
            assert_eq!(https.refused("tls_unsupported"), moves, "{kind:?} {suite:?}: {}", https.about());
            assert_sound(&https);
        }
    }
}

#[test]
fn secrets_stay_where_the_channel_is_not_encrypted() {
    let https = Https::up();
    let _daemons = ["host", "t1"].map(|node| https.bed.peerd(node, &PeerdOptions::default()));
    let _nginx = https.nginx("host", https.preloaded("host", "nginx"), "");
    let got = https.client(443, None, json!({ "steps": steps() }));
    assert_served(&got, 1);
    assert_eq!(https.refused("tls_insecure"), WOULD_MOVE, "{}", https.about());
    assert_eq!(https.refused("tls_unsupported"), 0, "{}", https.about());
}

#[test]
fn the_servers_own_keylog_goes_on() {
    let https = Https::up();
    let _daemons = https.daemons();
    let log = https.bed.directory().join("keys.log");
    let mut command = https.preloaded("host", "python3");
    command.env("KEYS", &log);
    let _server = https.python("host", command);
    let got = https.client(443, Some(SUITES[0]), json!({ "steps": steps() }));
    assert_served(&got, 1);
    assert_eq!(https.refused("tls_unsupported"), WOULD_MOVE, "{}", https.about());
    let lines = std::fs::read_to_string(log).expect("a keylog");
    for label in ["CLIENT_TRAFFIC_SECRET_0", "SERVER_TRAFFIC_SECRET_0", "EXPORTER_SECRET"] {
        assert_eq!(lines.lines().filter(|l| l.starts_with(label)).count(), 1, "{lines}");
    }
}

/// OpenSSL has the second one when the first is over, and the socket does not: the connection stays for good.
#[test]
fn requests_in_one_record_stay_at_the_host() {
    let https = Https::up();
    let _daemons = https.daemons();
    let _nginx = https.nginx("host", https.preloaded("host", "nginx"), "");
    for (i, suite) in SUITES.into_iter().enumerate() {
        let served = https.wire(
            suite,
            "w = Wire()\n\
             assert w.get('/loc/1k') == 'host'\n\
             paths = ['/loc/1', '/img/1k', '/img/0']\n\
             w.push(w.seal(b''.join(request(p) for p in paths)))\n\
             result = [w.got(p) for p in paths] + [w.get('/img/64k')]\n",
        );
        assert_eq!(served, json!(["host", "host", "host", "host"]), "{suite:?}");
        assert_eq!(https.counted("tls_pending"), i as u64 + 1, "{suite:?}: {}", https.about());
        assert_eq!(https.counted("asked"), 0, "{suite:?}: {}", https.about());
    }
}
