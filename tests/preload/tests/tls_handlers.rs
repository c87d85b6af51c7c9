//! HTTPS connections of an nginx move to programs of their own, `exec` and `pool`, whose records are XO's: the daemon relays. The client
//! is OpenSSL, which fails on the first byte that is not right. What the kernel does instead of the relay: vm/ktls_handlers.rs.

use std::process::Command;
use std::time::Duration;

use serde_json::json;
use xo_tests::bed::built;
use xo_tests::counters::Counters;
use xo_tests::program::wait_for;
use xo_tests::servers::address;
use xo_tests::tls::{Interactive, SUITES, Suite};
use xo_tests::tls_programs::{ENDS, HANDLERS, HELPERS, Stage, steps};

const LIBRARY: &str = "tls_records = \"library\"";
/// One of each version's ciphers.
const THREE: [Suite; 3] = [SUITES[1], SUITES[2], SUITES[3]];
/// What OpenSSL says when a connection ends without a good-bye.
const CUT: &str = "SSLError UNEXPECTED_EOF_WHILE_READING";

/// Nothing is left at the target: no connection, no rule, no descriptor.
fn nothing_left(stage: &Stage, descriptors: usize) {
    stage.all_ended();
    let same = wait_for(Duration::from_secs(20), || stage.programs[1].descriptors() <= descriptors);
    assert!(same, "{descriptors} descriptors before, {} after", stage.programs[1].descriptors());
}

#[test]
fn every_suite_moves_to_a_process_and_to_a_pool() {
    let stage = Stage::up(LIBRARY);
    let bed = &stage.https.bed;
    let status = bed.try_status("t1").expect("a status");
    assert_eq!(status["tls_records"], "library");
    assert_eq!(status["tls"], json!({ "exec": "library", "pool": "library" }));
    let descriptors = stage.programs[1].descriptors();
    for (i, suite) in SUITES.iter().enumerate() {
        for (j, handler) in HANDLERS.into_iter().enumerate() {
            // With a good-bye, and without.
            let goodbye = (i / 2 + j) % 2 == 0;
            let before = Counters::of(bed);
            let (steps, places) = steps(handler, true);
            let got = stage.https.client(443, Some(*suite), json!({ "steps": steps, "goodbye": goodbye }));
            assert_eq!(got[0]["suite"], suite.1, "{got}");
            stage.https.assert_places(&got, &places.iter().map(String::as_str).collect::<Vec<_>>());
            assert_eq!(stage.ends(1), [format!("{handler} eof")]);
            stage.all_ended();
            let counted = Counters::of(bed).since(&before);
            let about = format!("{suite:?} {handler}: {}", counted.troubles());
            println!("{about}");
            // A client that has gone without a good-bye does not take the handler's.
            let resets = ["host", "t1"].map(|node| counted.get_on(node, "OutRsts"));
            assert!(resets == [0, 0] && counted.resets() <= i64::from(!goodbye), "{about}");
        }
    }
    assert_eq!(bed.status("t1", "/accepted_total"), 2 * SUITES.len() as u64);
    stage.https.assert_nothing_refused();
    nothing_left(&stage, descriptors);
    bed.wait_idle(&["host", "t1"]);
}

#[test]
fn curl() {
    let stage = Stage::up("# by itself");
    let kernel = xo_sys::ktls::probe().is_ok();
    let status = stage.https.bed.try_status("t1").expect("a status");
    assert_eq!(status["tls_records"], if kernel { "kernel_tls12" } else { "library" });
    for version in ["1.2", "1.3"] {
        for handler in HANDLERS {
            let mut command = Command::new("curl");
            command.args(["-sk", "--http1.1", &format!("--tlsv{version}"), "--tls-max", version]);
            for size in ["1", "0", "64k", "1m", "20m"] {
                command.arg(format!("https://{}/{handler}/{size}", address("host")));
                command.args(["-o", "/dev/null", "-w", "%{http_code} %{size_download} %header{x-node}\\n"]);
            }
            let said = stage.https.bed.run("client", &mut command);
            let expected = [1, 0, 65_536, 1 << 20, 20 << 20].map(|n| format!("200 {n} {handler}\n"));
            assert_eq!(said, expected.concat(), "TLS {version}");
        }
    }
    stage.https.assert_nothing_refused();
}

#[test]
fn many_connections_at_once() {
    let stage = Stage::up(&format!("{LIBRARY}\nhandoff = \"strict\""));
    let descriptors = stage.programs[1].descriptors();
    let nodes = HANDLERS.map(String::from);
    let before = Counters::of(&stage.https.bed);
    for suite in THREE {
        let said = stage.https.crowd_at(suite, &nodes, 48, 12);
        assert_eq!(said["errors"], json!([]), "{suite:?}: {}", stage.https.all_about());
        assert_eq!(said["right"], 48 * 12, "{suite:?}");
        let places = &said["places"];
        assert!(HANDLERS.iter().all(|h| places[h].as_u64().is_some_and(|n| n >= 12 * 12)), "{places}");
        assert_eq!(places.get("host"), None, "{places} {}", stage.https.all_about());
        assert!(stage.ends(48).iter().all(|end| end.ends_with(" eof")));
    }
    stage.https.assert_nothing_refused();
    nothing_left(&stage, descriptors);
    Counters::of(&stage.https.bed).since(&before).no_reset(&stage.https.bed);
}

#[test]
fn records_of_one_byte_and_pipelined_requests() {
    let stage = Stage::up(LIBRARY);
    for suite in THREE {
        for handler in HANDLERS {
            let options = json!({ "chunk": 1, "steps": [["GET", format!("/{handler}/1k")],
                ["PUT", format!("/{handler}/small"), 500], ["GET", format!("/{handler}/64k")]] });
            let got = stage.https.client(443, Some(suite), options);
            stage.https.assert_places(&got, &[handler; 3]);
            let right = stage.https.wire(
                suite,
                &format!(
                    "w = Wire()\n\
                     assert w.get('/loc/1') == 'host'\n\
                     paths = [f'/{handler}/{{size}}' for size in ('1', '64k', '0', '1k', '1m', '1')]\n\
                     wire = w.seal(b''.join(request(p) for p in paths))\n\
                     w.push(wire[:100]); time.sleep(0.05); w.push(wire[100:101]); time.sleep(0.05); w.push(wire[101:])\n\
                     result = [w.got(p) for p in paths]\n"
                ),
            );
            assert_eq!(right, json!(vec![handler; 6]), "{suite:?}");
        }
    }
    stage.https.assert_nothing_refused();
}

#[test]
fn new_keys_before_during_and_after_the_move() {
    let stage = Stage::up(LIBRARY);
    for (_, suite) in &SUITES[..3] {
        for handler in HANDLERS {
            let mut client = Interactive::start(&stage.https, &format!("-tls1_3 -ciphersuites {suite}"));
            // K asks the server for a new key, too; k does not.
            for command in ["K", "k"] {
                client.say(&format!("{command}\n"), "KEYUPDATE");
                client.say("HEAD /loc/1k HTTP/1.1\nHost: x\n\n", "X-Node: host");
            }
            let upload = |path: &str| {
                format!("PUT /{handler}/{path} HTTP/1.1\nHost: x\nContent-Length: 14\n\nhello\n")
            };
            // The head moves, and the body comes under new keys.
            client.say(&upload("keys"), "");
            for command in ["K", "k", "K"] {
                client.say(&format!("{command}\n"), "KEYUPDATE");
            }
            client.say("world\n", &format!("X-Node: {handler}"));
            for command in ["K", "", "k", "K", "K", "k"] {
                client.say(&upload("keys"), "");
                if !command.is_empty() {
                    client.say(&format!("{command}\n"), "KEYUPDATE");
                }
                client.say("world\n", &format!("X-Node: {handler}"));
                client.say(&format!("GET /{handler}/1k HTTP/1.1\nHost: x\n\n"), "Content-Length: 1024");
            }
            drop(client);
            assert_eq!(stage.ends(1), [format!("{handler} eof")]);
        }
    }
    stage.https.assert_nothing_refused();
    stage.all_ended();
}

#[test]
fn ends_are_told_both_ways() {
    let stage = Stage::up(LIBRARY);
    let descriptors = stage.programs[1].descriptors();
    for suite in THREE {
        let ends = stage.https.wire(suite, &format!("{HELPERS}{ENDS}"));
        let bad = "SSLError SSLV3_ALERT_BAD_RECORD_MAC";
        assert_eq!(ends, json!(["nothing", "nothing", bad, "nothing", "nothing", bad, CUT]), "{suite:?}");
        let expected = ["closed", "eof", "eof"].iter().flat_map(|end| HANDLERS.map(|h| format!("{h} {end}")));
        let mut expected: Vec<_> = expected.collect();
        expected.sort();
        assert_eq!(stage.ends(6), expected, "{suite:?}");
    }
    stage.https.assert_nothing_refused();
    nothing_left(&stage, descriptors);
}

/// A client that has no more to say is still answered, a handler that has none still reads, and one that closes and lives on has meant it.
#[test]
fn half_closed_connections() {
    let stage = Stage::up(LIBRARY);
    for suite in THREE {
        let got = stage.https.wire(
            suite,
            &format!(
                "{HELPERS}\
                 def goodbye(w):\n\
                 \x20   try:\n\
                 \x20       w.tls.unwrap()\n\
                 \x20   except ssl.SSLWantReadError:\n\
                 \x20       pass\n\
                 \x20   w.push(w.outgoing.read())\n\
                 def body(w):\n\
                 \x20   try:\n\
                 \x20       while w.more():\n\
                 \x20           pass\n\
                 \x20   except ssl.SSLZeroReturnError:\n\
                 \x20       pass\n\
                 \x20   return w.plain.split(b'\\r\\n\\r\\n', 1)[1].decode()\n\
                 result = []\n\
                 for handler in ('exec', 'pool'):\n\
                 \x20   w = moved(handler)\n\
                 \x20   w.push(w.seal(request(f'/{{handler}}/half') + bytes(100_000)))\n\
                 \x20   goodbye(w)\n\
                 \x20   result.append(body(w))\n\
                 \x20   w = moved(handler)\n\
                 \x20   w.push(w.seal(request(f'/{{handler}}/early')))\n\
                 \x20   result.append(body(w))\n\
                 \x20   w.push(w.seal(bytes(100_000)))\n\
                 \x20   goodbye(w)\n\
                 \x20   w = moved(handler)\n\
                 \x20   w.push(w.seal(request(f'/{{handler}}/leave')))\n\
                 \x20   result.append(body(w))\n\
                 \x20   open(f'{{root}}/left-{{handler}}', 'w').close()\n"
            ),
        );
        let each = ["100000", "early", "left"].repeat(2);
        assert_eq!(got, json!(each), "{suite:?}");
        let ends = stage.ends(6);
        for handler in HANDLERS {
            let its: Vec<_> = ends.iter().filter_map(|e| e.strip_prefix(handler)).collect();
            assert_eq!(its, [" closed", " closed", " eof after 100000"], "{suite:?}");
        }
    }
    stage.https.assert_nothing_refused();
}

/// A worker that crashes: all its clients can tell, and the next one serves.
#[test]
fn a_crashed_worker_says_no_goodbye() {
    let stage = Stage::up(LIBRARY);
    let descriptors = stage.programs[1].descriptors();
    for suite in [SUITES[0], SUITES[3]] {
        let ends = stage.https.wire(
            suite,
            &format!(
                "{HELPERS}\
                 all_of_it = [moved('pool') for _ in range(5)]\n\
                 w = all_of_it.pop()\n\
                 w.push(w.seal(request('/pool/die')))\n\
                 result = [end(lambda: all(w, 7))] + [end(x.more) for x in all_of_it]\n"
            ),
        );
        assert_eq!(ends, json!(vec![CUT; 5]), "{suite:?}");
        stage.wait_ready();
    }
    nothing_left(&stage, descriptors);
}

/// What nobody reads stays with who writes it: not in the daemon, which has nothing to do meanwhile.
#[test]
fn a_slow_client_and_a_slow_handler_cost_the_daemon_nothing() {
    let stage = Stage::up(LIBRARY);
    for suite in [SUITES[0], SUITES[3]] {
        let right = stage.https.wire(
            suite,
            "result = []\n\
             for handler in ('exec', 'pool'):\n\
             \x20   w = Wire(rcvbuf=4096)\n\
             \x20   for size in ('1m', '1k'):\n\
             \x20       w.push(w.seal(request(f'/{handler}/{size}')))\n\
             \x20       time.sleep(0.3)\n\
             \x20       result.append(w.got(f'/{handler}/{size}'))\n",
        );
        assert_eq!(right, json!(["exec", "exec", "pool", "pool"]));
    }
    let (daemon, begun) = (&stage.programs[1], stage.programs[1].processor_time());
    let got = stage.https.wire(
        SUITES[0],
        &format!(
            "def memory():\n\
             \x20   lines = open('/proc/{pid}/status').read().split('\\n')\n\
             \x20   return [int(line.split()[1]) for line in lines if line.startswith('VmRSS')][0]\n\
             def ticks():\n\
             \x20   fields = open('/proc/{pid}/stat').read().rsplit(')')[1].split()\n\
             \x20   return int(fields[11]) + int(fields[12])\n\
             before, all = memory(), []\n\
             for i in range(20):\n\
             \x20   w = Wire(rcvbuf=4096)\n\
             \x20   w.push(w.seal(request('/pool/20m')))\n\
             \x20   all.append(w)\n\
             time.sleep(2)\n\
             result = [memory() - before, ticks()]\n\
             time.sleep(3)\n\
             result[1] = ticks() - result[1]\n\
             for w in all:\n\
             \x20   assert w.got('/pool/20m') == 'pool'\n",
            pid = daemon.pid(),
        ),
    );
    println!("20 stuck downloads: {got} (KiB more; hundredths of a second of processor time in 3 s)");
    // A portion and its records each, and some pages of the allocator's; less than a tenth of a processor.
    let grown = got[0].as_i64().expect("a number");
    assert!(grown < 20 * 256 + 4096 && got[1].as_u64().is_some_and(|t| t < 30), "{got}");
    println!("400 MiB: {:?} of processor time", daemon.processor_time() - begun);
    stage.https.assert_nothing_refused();
    stage.all_ended();
}

/// Without descriptors for it a connection stays at its host, which has not let go of it yet.
#[test]
fn none_left_is_seen_in_time() {
    let stage = Stage::up(LIBRARY);
    let get = |handler: &str| {
        let got = stage.https.client(
            443,
            Some(SUITES[0]),
            json!({ "steps": [["GET", format!("/{handler}/64k")]] }),
        );
        assert_eq!(got[0]["steps"][0][1], true, "{got}");
        got[0]["steps"][0][0].as_str().expect("a node").to_owned()
    };
    for handler in HANDLERS {
        assert_eq!(get(handler), handler);
    }
    stage.all_ended();
    let descriptors = stage.programs[1].descriptors();
    for handler in HANDLERS {
        let mut at_host = 0;
        for more in 0..8 {
            stage.programs[1].leave_own_descriptors(more);
            let node = get(handler);
            assert!(node == handler || node == "host", "{more} left: {node}");
            at_host += u32::from(node == "host");
            stage.programs[1].free_descriptors();
            // A machine that has refused is left alone for some time.
            assert!(wait_for(Duration::from_secs(40), || get(handler) == handler));
        }
        println!("{handler}: {at_host} of 8 at the host");
        assert!(at_host > 0, "none was refused");
    }
    nothing_left(&stage, descriptors);
}

/// Its connections end with the daemon, and the client can tell; the next daemon finds nothing to keep.
#[test]
fn a_daemon_that_ends_takes_them_along() {
    for signal in [libc::SIGKILL, libc::SIGTERM] {
        let mut stage = Stage::up(LIBRARY);
        let mut clients: Vec<_> = HANDLERS
            .iter()
            .map(|handler| {
                let mut client = Interactive::start(&stage.https, "-tls1_3");
                client
                    .say(&format!("GET /{handler}/1k HTTP/1.1\nHost: x\n\n"), &format!("X-Node: {handler}"));
                client
            })
            .collect();
        stage.programs[1].signal(signal);
        for client in &mut clients {
            client.say("", "unexpected eof");
        }
        // The handlers see the end, too.
        assert_eq!(stage.ends(2), HANDLERS.map(|h| format!("{h} eof")));
        assert!(wait_for(Duration::from_secs(20), || !stage.programs[1].is_alive()));
        drop(clients);
        let bed = &stage.https.bed;
        let mut command = Command::new(built("xo-peerd"));
        command.args(["run", "--config"]).arg(bed.directory().join("t1.toml"));
        stage.programs[1] = bed.start("t1", "t1-peerd-again", &mut command);
        stage.wait_ready();
        if signal == libc::SIGKILL {
            // The daemon's end was the first: TIME_WAIT.
            bed.wait_idle_for(Duration::from_secs(90), &["host", "t1"]);
        }
        let got = stage.https.client(443, None, json!({ "steps": [["GET", "/pool/64k"]] }));
        stage.https.assert_places(&got, &["pool"]);
    }
}
