//! Servers with TLS of their own get connections whose handshake is long over: at home and at targets. The client is OpenSSL, which
//! fails on the first byte that is not right.

use serde_json::json;
use xo_tests::kinds::Kind;
use xo_tests::tls::{Https, SUITES, Suite};

/// Requests, uploads, and several requests in one record, each in the place that its path names.
const PLACES: &str = "\
w, result = Wire(), []
for place in ('host', 't1', 'host', 'host', 't2', 't1', 'host', 't2', 'host', 't1'):
    for size in ('1k', '1', '64k', '0'):
        result.append(w.get(f'/img/{place}/{size}') == place)
    data, body = upload(f'/up/{place}/there', 70000)
    w.push(w.seal(data))
    result.append(w.response()[0] == place)
    assert open(f'{root}/up/there', 'rb').read() == body
paths = [f'/img/{n}/1k' for n in ('host', 't1', 'host', 'host', 't2', 't2', 'host')]
w.push(w.seal(b''.join(request(p) for p in paths)))
result += [w.got(p) == p.split('/')[2] for p in paths]
for place in ('t1', 'host'):
    result.append(w.get(f'/img/{place}/1m') == place)
";
const STEPS: usize = 59;
/// One or more of each version, and what Python's certificate (RSA) can do.
const FEW: [Suite; 4] = [SUITES[0], SUITES[2], SUITES[3], SUITES[5]];

fn every_request_in_its_place(home: Kind, at_target: Option<Kind>, suites: &[Suite]) {
    let https = Https::with_targets(2);
    let _servers = https.servers(home, at_target);
    for suite in suites {
        let right = https.wire(*suite, PLACES);
        assert_eq!(right, json!(vec![true; STEPS]), "{home:?} {at_target:?} {suite:?} {}", https.all_about());
    }
    https.assert_nothing_refused();
    https.bed.wait_idle(&["host", "t1", "t2"]);
}

#[test]
fn nginx_with_tls_at_targets() {
    every_request_in_its_place(Kind::Nginx, Some(Kind::Nginx), &SUITES);
}

#[test]
fn haproxy_as_home() {
    every_request_in_its_place(Kind::Haproxy, None, &FEW);
}

#[test]
fn apache_event_as_home() {
    every_request_in_its_place(Kind::ApacheEvent, None, &FEW);
}

#[test]
fn apache_prefork_as_home() {
    every_request_in_its_place(Kind::ApachePrefork, None, &FEW);
}

#[test]
fn haproxy_with_tls_at_a_target() {
    every_request_in_its_place(Kind::Nginx, Some(Kind::Haproxy), &FEW);
}

#[test]
fn apache_with_tls_at_a_target() {
    every_request_in_its_place(Kind::Nginx, Some(Kind::ApacheEvent), &FEW);
}

#[test]
fn python_with_tls_at_a_target() {
    every_request_in_its_place(Kind::Nginx, Some(Kind::Python), &FEW);
}
