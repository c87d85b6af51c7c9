//! HTTPS connections of an nginx move to targets whose servers speak plain HTTP: the library there has the record layer. The client
//! is OpenSSL, which fails on the first byte that is not right.

use serde_json::{Value, json};
use xo_tests::tls::{Https, SUITES};

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
            (json!({ "chunk": 1, "steps": [["GET", "/img/t1/1k"], ["PUT", "/up/t1/b", 500], ["GET", "/loc/1"]] }), 3),
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
