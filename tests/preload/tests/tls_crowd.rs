//! Many HTTPS connections at once between a host and two targets, each request where its path says unless an earlier response is
//! still on its way; every body is compared, and no alert, no error, no reset is let pass.

use std::process::Command;

use serde_json::{Value, json};
use xo_tests::counters::Counters;
use xo_tests::kinds::Kind;
use xo_tests::servers::address;
use xo_tests::tls::{Https, SUITES, Suite};

const CONNECTIONS: u64 = 200;
const REQUESTS: u64 = 20;

/// Nothing is wrong with any connection's TLS, on any node, and nothing failed.
fn assert_sound(https: &Https) {
    for node in https.bed.servers() {
        let status = https.bed.try_status(&node).expect("a status");
        assert_eq!(status["failed_total"], 0, "{}", https.all_about());
        for reason in
            ["tls_lost", "tls_library", "tls_pending", "tls_state", "tls_unsupported", "shared", "not_http"]
        {
            for of in ["library", "refused_by_reason"] {
                assert_eq!(
                    status[of].get(reason).and_then(Value::as_u64).unwrap_or(0),
                    0,
                    "{}",
                    https.all_about()
                );
            }
        }
    }
}

/// A host and two targets. In the strict order: in the early one a target gives a connection up that its host has not confirmed
/// within 0.3 s, which 200 clients that all begin at once can take from a small machine.
fn bed() -> Https {
    let mut https = Https::with_targets(2);
    https.head = "handoff = \"strict\"".into();
    https
}

fn crowd(https: &Https, suites: &[Suite]) {
    let before = Counters::of(&https.bed);
    for suite in suites {
        let said = https.crowd(*suite, CONNECTIONS, REQUESTS);
        let errors = said["errors"].as_array().expect("a list");
        assert!(errors.is_empty(), "{suite:?}: {errors:?} {}", https.all_about());
        assert_eq!(said["right"], json!(CONNECTIONS * REQUESTS), "{suite:?}");
        let places = said["places"].as_object().expect("places");
        for node in ["host", "t1", "t2"] {
            assert!(
                places[node].as_u64().is_some_and(|n| n > CONNECTIONS * REQUESTS / 6),
                "{suite:?}: {places:?}"
            );
        }
    }
    assert_sound(https);
    let counted = Counters::of(&https.bed).since(&before);
    counted.no_reset(&https.bed);
}

#[test]
fn tls_1_3_to_plain_servers() {
    let https = bed();
    let _programs = https.everything();
    crowd(&https, &SUITES[..3]);
}

#[test]
fn tls_1_2_to_servers_with_tls() {
    let https = bed();
    let _servers = https.servers(Kind::Nginx, Some(Kind::Nginx));
    crowd(&https, &SUITES[3..6]);
}

/// They keep to themselves what they got, but not how much and with what status.
#[test]
fn wrk_and_h2load() {
    let https = Https::with_targets(2);
    let _programs = https.everything();
    let url = |path: &str| format!("https://{}{path}", address("host"));
    let mut command = Command::new("h2load");
    command.args(["--h1", "-c", "50", "-t", "1", "-n", "3000"]);
    command.args(["t1", "host", "t2"].map(|node| url(&format!("/img/{node}/1k"))));
    let said = https.bed.run("client", &mut command);
    assert!(said.contains("3000 done, 3000 succeeded, 0 failed, 0 errored, 0 timeout"), "{said}");
    assert!(said.contains("status codes: 3000 2xx") && said.contains("TLS Protocol: TLSv1.3"), "{said}");
    let script = "local i, paths = 0, { '/img/t1/1k', '/img/t2/1', '/img/host/1k', '/img/t2/64k', '/img/t1/0' }\n\
                  function request()\n i = i % #paths + 1\n return wrk.format('GET', paths[i])\nend\n";
    let script = https.bed.file("places.lua", script);
    let mut command = Command::new("wrk");
    command.args(["-t1", "-c32", "-d3s", "--timeout", "30s", "-s"]).arg(script).arg(url("/"));
    let said = https.bed.run("client", &mut command);
    assert!(
        said.contains("requests in") && !said.contains("Socket errors") && !said.contains("Non-2xx"),
        "{said}"
    );
    assert_sound(&https);
    let moved = ["/offloads_total", "/sent_home_total"].map(|p| https.bed.status("host", p));
    assert!(moved[0] > 80, "{moved:?}");
}
