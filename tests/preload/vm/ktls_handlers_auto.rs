//! What the kernel is given to do by itself for `exec` and `pool` handlers: TLS 1.2. TLS 1.3 is the daemon's, with the client's new keys.

use serde_json::json;
use xo_tests::tls::{Interactive, SUITES};
use xo_tests::tls_programs::{HANDLERS, Stage};

#[test]
#[ignore = "needs a kernel with TLS: scripts/vm"]
fn by_itself_the_kernel_has_tls_1_2_only() {
    let stage = Stage::up("# tls_records is what it is by itself");
    let bed = &stage.https.bed;
    let status = bed.try_status("t1").expect("a status");
    assert_eq!(status["tls_records"], "kernel_tls12");
    assert_eq!(status["tls"], json!({ "exec": "kernel_tls12", "pool": "kernel_tls12" }));
    for (suite, handler, layer) in [(SUITES[4], "exec", "kernel"), (SUITES[2], "pool", "library")] {
        let steps = json!([
            ["GET", "/loc/1k"],
            ["GET", format!("/{handler}/1m")],
            ["PUT", format!("/{handler}/a"), 70_000]
        ]);
        // Who closes first has the connection in TIME-WAIT for a minute: not the kernel's.
        let goodbye = layer == "library";
        let got = stage.https.client(443, Some(suite), json!({ "steps": steps, "goodbye": goodbye }));
        stage.https.assert_places(&got, &["host", handler, handler]);
        assert_eq!(stage.ends(1), [format!("{handler} eof")], "{suite:?}");
    }
    for handler in HANDLERS {
        let go = |client: &mut Interactive| {
            client.say(&format!("GET /{handler}/1k HTTP/1.1\nHost: x\n\n"), &format!("X-Node: {handler}"));
        };
        let mut old = Interactive::start(&stage.https, "-tls1_2 -cipher ECDHE-RSA-AES128-GCM-SHA256");
        go(&mut old);
        assert_eq!(stage.layers(), ["kernel"], "{}", bed.flows("t1"));
        drop(old);
        assert_eq!(stage.ends(1), [format!("{handler} eof")]);
        stage.all_ended();
        let mut new = Interactive::start(&stage.https, "-tls1_3 -ciphersuites TLS_AES_256_GCM_SHA384");
        new.say("K\n", "KEYUPDATE");
        for command in ["K", "k", "K"] {
            go(&mut new);
            assert_eq!(stage.layers(), ["library"], "{}", bed.flows("t1"));
            new.say(&format!("{command}\n"), "KEYUPDATE");
        }
        go(&mut new);
        drop(new);
        let _ = stage.ends(1);
        stage.all_ended();
    }
    stage.https.assert_nothing_refused();
}
