//! HTTPS connections of an nginx move to programs of their own, `exec` and `pool`: at the target the kernel does the record
//! layer, as far as the configuration wants it to. The client is OpenSSL, which fails on the first byte that is not right.

use serde_json::json;
use xo_tests::counters::Counters;
use xo_tests::tls::{Interactive, SUITES, Suite};
use xo_tests::tls_programs::{ENDS, HANDLERS, HELPERS, Stage, steps};

const KERNEL: &str = "tls_records = \"kernel\"";

#[test]
#[ignore = "needs a kernel with TLS: scripts/vm"]
fn every_suite_moves_to_a_process_and_to_a_pool() {
    let stage = Stage::up(KERNEL);
    let status = stage.https.bed.try_status("t1").expect("a status");
    assert_eq!(status["tls_records"], "kernel");
    assert_eq!(status["tls"], json!({ "exec": "kernel", "pool": "kernel" }));
    for (i, suite) in SUITES[..6].iter().enumerate() {
        let handler = HANDLERS[i % 2];
        // With a good-bye, and without.
        let goodbye = i >= 2;
        let before = Counters::of(&stage.https.bed);
        let (steps, places) = steps(handler, i % 3 == 0);
        let options = json!({ "steps": steps, "goodbye": goodbye });
        let got = stage.https.client(443, Some(*suite), options);
        assert_eq!(got[0]["suite"], suite.1, "{got}");
        stage.https.assert_places(&got, &places.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(stage.ends(1), [format!("{handler} {}", if goodbye { "EIO" } else { "eof" })]);
        let counted = Counters::of(&stage.https.bed).since(&before);
        let about = format!("{suite:?} {handler}: {}", counted.troubles());
        println!("{about}");
        // Segments are not counted: on two processors some overtake others. A client that has gone without a good-bye does not take the handler's.
        let resets = ["host", "t1"].map(|node| counted.get_on(node, "OutRsts"));
        assert!(resets == [0, 0] && counted.resets() <= i64::from(!goodbye), "{about}");
    }
    assert_eq!(stage.https.bed.status("t1", "/accepted_total"), 6);
    stage.https.assert_nothing_refused();
    stage.all_ended();
}

#[test]
#[ignore = "needs a kernel with TLS: scripts/vm"]
fn ends_are_told_as_far_as_a_program_can() {
    let stage = Stage::up(KERNEL);
    let suite = SUITES[0];
    let ends = stage.https.wire(suite, &format!("{HELPERS}{ENDS}"));
    // Nobody but the handler knows that a record was bad, and it cannot tell the client; what it leaves unread resets it.
    let bad = "ConnectionResetError";
    let cut = "SSLError UNEXPECTED_EOF_WHILE_READING";
    let expected = ["nothing", "nothing", bad, "nothing", "nothing", bad, cut];
    assert_eq!(ends, json!(expected), "{suite:?}");
    let expected = ["closed", "EIO", "EBADMSG"].iter().flat_map(|end| HANDLERS.map(|h| format!("{h} {end}")));
    let mut expected: Vec<_> = expected.collect();
    expected.sort();
    assert_eq!(stage.ends(6), expected, "{suite:?}");
    new_keys(&stage, suite);
    stage.all_ended();
}

/// The kernel of the lane cannot follow a new key of the client: its connection ends.
fn new_keys(stage: &Stage, suite: Suite) {
    for handler in HANDLERS {
        let mut client = Interactive::start(&stage.https, &format!("-tls1_3 -ciphersuites {}", suite.1));
        // Before the move it is followed.
        client.say("k\n", "KEYUPDATE");
        client.say(&format!("GET /{handler}/1 HTTP/1.1\nHost: x\n\n"), &format!("X-Node: {handler}"));
        client.say("k\n", "KEYUPDATE");
        client.say("HEAD / HTTP/1.1\nHost: x\n\n", "closed");
        assert_eq!(stage.ends(1), [format!("{handler} EIO")]);
    }
}
