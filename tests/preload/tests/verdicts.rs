//! Servers that go on doing things while it is not decided where a request is served, and after it went elsewhere.

use std::fs;
use std::time::Duration;

use xo_tests::hazards::compile;
use xo_tests::program::{Program, wait_for};
use xo_tests::servers::{PeerdOptions, address};
use xo_tests::{Bed, Connection};

struct Undecided {
    bed: Bed,
    host: Program,
    target: Program,
    _nginx: Program,
}

impl Undecided {
    fn up() -> Undecided {
        let bed = Bed::up(1, 1);
        let [host, target] = ["host", "t1"].map(|n| bed.peerd(n, &PeerdOptions::default()));
        let nginx = bed.nginx("t1");
        bed.wait_acceptors("t1", "web", 4);
        Undecided { bed, host, target, _nginx: nginx }
    }

    /// Runs a case: a request that stays, then one that is asked about while the host's daemon is stopped; the server
    /// acts meanwhile, until it has said `acted`, and the daemon goes on. Who served the second request, and a third
    /// one, and what the server said.
    fn run(&self, case: &str, acted: &str, target: bool) -> (Vec<String>, String) {
        let program = compile(&self.bed).0;
        let output = self.bed.directory().join(format!("{case}-{target}.out"));
        let mut command = self.bed.preloaded("host", program.to_str().expect("a path"));
        let mut server = self.bed.start("host", case, command.arg(case).arg(&output));
        self.bed.wait_listening("host", 80, &mut server);
        let said = || fs::read_to_string(&output).unwrap_or_default();
        let one = |mut c: Connection, path: &'static str| {
            self.bed.spawn("client", move || {
                c.send(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).expect("send");
                let node = c.response(false).expect("an answer").node().to_owned();
                (c, node)
            })
        };
        let c = self.bed.on("client", || Connection::to(&address("host"), 80).expect("connect"));
        let (c, node) = one(c, "/loc/1k").join().expect("no panic");
        assert_eq!(node, "host");
        self.host.signal(libc::SIGSTOP);
        if !target {
            self.target.signal(libc::SIGSTOP);
        }
        let waiting = one(c, "/img/1k");
        let happened = |what: &str| wait_for(Duration::from_secs(10), || said().contains(what));
        assert!(happened("pending"), "{case}: {}", said());
        assert!(happened(acted), "{case}: {}", said());
        assert!(!said().contains("served here"), "{case}: served although a verdict is out: {}", said());
        self.host.signal(libc::SIGCONT);
        let (c, second) = waiting.join().expect("no panic");
        self.target.signal(libc::SIGCONT);
        // A request that was refused is served, and the next one of its connection asked about again.
        let back = || self.bed.try_status("host").is_some_and(|s| s["peers"][0]["state"] == "connected");
        assert!(wait_for(Duration::from_secs(20), back));
        let (c, third) = one(c, "/loc/1k").join().expect("no panic");
        drop(c);
        assert!(happened("end "), "{case}: {}", said());
        self.bed.wait_idle(&["host", "t1"]);
        drop(server);
        (vec![second, third], said())
    }

    /// The request moves; the server sees an end.
    fn moves(&self, case: &str, acted: &str) -> String {
        let (nodes, said) = self.run(case, acted, true);
        assert_eq!(nodes, ["t1", "t1"], "{case}: {said}");
        assert!(!said.contains("served here"), "{case}: {said}");
        said
    }

    /// The target does not answer; the server serves the request.
    fn stays(&self, case: &str, acted: &str) -> String {
        let (nodes, said) = self.run(case, acted, false);
        assert_eq!(nodes, ["host", "host"], "{case}: {said}");
        assert_eq!(said.matches("served here").count(), 2, "{case}: {said}");
        said
    }
}

#[test]
fn a_child_that_closes_its_copy() {
    let u = Undecided::up();
    let said = u.moves("fork_close", "child 4");
    assert!(said.contains("end 0"), "{said}");
    u.stays("fork_close", "child 4");
}

#[test]
fn a_child_that_waits_for_its_parents_verdict() {
    let u = Undecided::up();
    let said = u.moves("fork_read", "waited");
    assert!(said.contains("child 5") && said.contains("end 0"), "{said}");
}

#[test]
fn epoll_in_the_meantime() {
    let u = Undecided::up();
    for case in ["pending_level", "pending_edge"] {
        let expected = "add 0\nboth 0\nwritable 1\nwrite -1 EAGAIN\nremove 0\nadd again 0\nacted\n";
        for said in [u.moves(case, "acted"), u.stays(case, "acted")] {
            assert!(said.contains(expected) && !said.contains("never woken"), "{case}: {said}");
        }
    }
}

#[test]
fn an_end_is_an_end_again_and_again() {
    let u = Undecided::up();
    let said = u.moves("after_gone", "pending");
    for line in said.lines().filter(|l| !matches!(*l, "pending" | "in a child 0" | "shutdown -1 ENOTCONN")) {
        let (call, result) = line.rsplit_once(' ').expect("a result");
        let expected = match call {
            "write -1" | "send -1" | "writev -1" => "EPIPE",
            "poll" => "1",
            _ => "0",
        };
        assert_eq!(result, expected, "{line}: {said}");
    }
    assert_eq!(said.matches("EPIPE").count(), 9, "{said}");
    assert!(said.contains("in a child 0") && said.contains("shutdown -1 ENOTCONN"), "{said}");
}
