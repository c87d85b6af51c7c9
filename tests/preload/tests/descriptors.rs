//! No descriptors left, in a daemon or in a server: the client is served, or waits as with any server; nothing spins,
//! and all is well when there are descriptors again.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use xo_tests::bed::built;
use xo_tests::counters::Counters;
use xo_tests::kinds::Kind;
use xo_tests::program::{Program, wait_for};
use xo_tests::servers::{PeerdOptions, address};
use xo_tests::{Bed, Connection};

/// How long clients come.
const BUSY: Duration = Duration::from_secs(1);
/// Long enough for a loop without a pause to show.
const WATCHED: Duration = Duration::from_secs(3);

/// One connection: a request that stays, then one that the policy sends away; who answered that, and after how long.
fn ask(bed: &Bed) -> JoinHandle<(String, Duration)> {
    bed.spawn("client", || {
        let mut c = Connection::to(&address("host"), 80).expect("connect");
        c.get("/loc/1").expect("local");
        let begun = Instant::now();
        let node = c.get("/img/64k").expect("an answer").node().to_owned();
        (node, begun.elapsed())
    })
}

fn asked(bed: &Bed) -> (String, Duration) {
    ask(bed).join().expect("no panic")
}

/// Daemons and servers of host and t1; connections have moved, so channels are up and what stays open is open.
fn moving() -> (Bed, Vec<Program>) {
    let bed = Bed::up(1, 1);
    let mut programs: Vec<_> = ["host", "t1"].map(|n| bed.peerd(n, &PeerdOptions::default())).into();
    programs.extend(["host", "t1"].map(|node| {
        // Only who may do anything changes the limits of another user's process.
        let text = fs::read_to_string(bed.nginx_config(node, 1)).expect("nginx's configuration");
        let config = bed.file(&format!("{node}-root.conf"), &text.replace("user www-data", "user root"));
        bed.nginx_configured(node, bed.preloaded(node, "nginx"), &config)
    }));
    bed.wait_acceptors("t1", "web", 2);
    for _ in 0..3 {
        assert_eq!(asked(&bed).0, "t1");
    }
    bed.wait_idle(&["host", "t1"]);
    (bed, programs)
}

fn descriptors(programs: &[Program]) -> Vec<usize> {
    programs.iter().map(Program::descriptors).collect()
}

/// Processor time that a program takes while nobody asks it for anything.
fn used_while_idle(program: &Program) -> Duration {
    let before = program.processor_time();
    std::thread::sleep(WATCHED);
    let used = program.processor_time() - before;
    assert!(used < WATCHED / 10, "{used:?} of processor time");
    used
}

/// Clients come for some time while a daemon, the `i`th program, can open no descriptor; all are served,
/// and soon; then there are descriptors again.
fn daemon_without(i: usize) {
    let (bed, programs) = moving();
    let (before, counters) = (descriptors(&programs), Counters::of(&bed));
    programs[i].leave_descriptors(0);
    let begun = Instant::now();
    let mut slowest = Duration::ZERO;
    let mut answers = 0;
    while begun.elapsed() < BUSY {
        let (node, took) = asked(&bed);
        // A daemon that has given something up because of it can do without for the next few.
        assert!(answers > 0 || node == "host", "served by {node}");
        slowest = slowest.max(took);
        answers += 1;
    }
    let used = used_while_idle(&programs[i]);
    println!("{answers} answers, the slowest after {slowest:?}; then {used:?} of processor time");
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    programs[i].free_descriptors();
    let moves = || asked(&bed).0 == "t1";
    assert!(wait_for(Duration::from_secs(10), moves), "{}", programs[i].output());
    bed.wait_idle(&["host", "t1"]);
    let mut after = descriptors(&programs);
    let same = wait_for(Duration::from_secs(10), || {
        after = descriptors(&programs);
        after == before
    });
    assert!(same, "{before:?} before, now {after:?}: {}", programs[i].output());
    let counted = Counters::of(&bed).since(&counters);
    assert_eq!(counted.get_on("client", "EstabResets"), 0, "{}", counted.troubles());
}

#[test]
fn none_left_in_the_hosts_daemon() {
    daemon_without(0);
}

#[test]
fn none_left_in_the_targets_daemon() {
    daemon_without(1);
}

/// A question that came while there was no descriptor for it is answered when there is one.
#[test]
fn a_waiting_question_is_answered_later() {
    let bed = Bed::up(1, 1);
    let daemon = bed.peerd("host", &PeerdOptions::default());
    daemon.leave_descriptors(0);
    let mut command = Command::new(built("xo-peerd"));
    command.args(["status", "--socket"]).arg(bed.socket("host"));
    let mut question = bed.start("host", "question", &mut command);
    assert!(!wait_for(Duration::from_millis(500), || !question.is_alive()), "{}", question.output());
    daemon.free_descriptors();
    assert!(wait_for(Duration::from_secs(5), || !question.is_alive()), "{}", daemon.output());
    assert!(question.output().contains("packets held"), "{}", question.output());
}

/// A target's server that can open no descriptor: moved connections wait like others in the backlog.
#[test]
fn none_left_in_the_targets_server() {
    let (bed, programs) = moving();
    let (before, counters) = (descriptors(&programs), Counters::of(&bed));
    let server = &programs[3];
    server.leave_descriptors(0);
    let waiting: Vec<_> = (0..8).map(|_| ask(&bed)).collect();
    let used = used_while_idle(server);
    assert!(!waiting.iter().any(JoinHandle::is_finished), "served without a descriptor");
    server.free_descriptors();
    for one in waiting {
        assert_eq!(one.join().expect("served").0, "t1");
    }
    println!("{used:?} of processor time");
    assert_eq!(asked(&bed).0, "t1");
    bed.wait_idle(&["host", "t1"]);
    let same = wait_for(Duration::from_secs(10), || descriptors(&programs) == before);
    assert!(same, "{before:?} before, now {:?}", descriptors(&programs));
    let counted = Counters::of(&bed).since(&counters);
    assert_eq!(counted.get_on("client", "EstabResets"), 0, "{}", counted.troubles());
}

/// A server without epoll: the connection that wakes it may have its last descriptor.
#[test]
fn one_left_in_a_server_that_is_woken() {
    let bed = Bed::up(1, 1);
    let _daemons = ["host", "t1"].map(|n| bed.peerd(n, &PeerdOptions::default()));
    let _nginx = bed.nginx("host");
    let server = Kind::Python.start(&bed, "t1", |program| bed.preloaded("t1", program));
    bed.wait_acceptors("t1", "web", 1);
    let get = || {
        bed.on("client", || {
            let mut c = Connection::to(&address("host"), 80).expect("connect");
            c.send(b"GET /img/1k HTTP/1.1\r\nHost: x\r\n\r\n").expect("send");
            let response = c.response(false).expect("an answer");
            (response.node().to_owned(), response.status)
        })
    };
    assert_eq!(get(), ("t1".into(), 200));
    bed.wait_idle(&["host", "t1"]);
    server.program.leave_descriptors(1);
    for _ in 0..5 {
        // It cannot open the file.
        assert_eq!(get(), ("t1".into(), 404));
        bed.wait_idle(&["host", "t1"]);
    }
    server.program.free_descriptors();
    assert_eq!(get(), ("t1".into(), 200));
}

/// A host's server that can open no descriptor: what it has accepted moves, and others wait as without the library.
#[test]
fn none_left_in_the_hosts_server() {
    let (bed, programs) = moving();
    let server = &programs[2];
    let connect = || Connection::to(&address("host"), 80).expect("connect");
    let mut open = bed.on("client", move || {
        let mut c = connect();
        c.get("/loc/1").expect("local");
        c
    });
    server.leave_descriptors(0);
    let mut waiting = bed.on("client", connect);
    let node = bed.on("client", move || open.get("/img/64k").expect("moved").node().to_owned());
    assert_eq!(node, "t1");
    // It may have been accepted, with the descriptor of the one that has moved; there was none for a file.
    server.free_descriptors();
    let node = bed.on("client", move || waiting.get("/img/64k").expect("served").node().to_owned());
    assert_eq!(node, "t1");
    bed.wait_idle(&["host", "t1"]);
}

/// A process for each connection takes descriptors, too.
#[test]
fn none_left_for_handler_processes() {
    let bed = Bed::up(1, 1);
    let script = "#!/bin/sh\nwhile read -r line && [ \"$line\" != \"$(printf '\\r')\" ]; do :; done\n\
                  printf 'HTTP/1.1 200 OK\\r\\nX-Node: exec\\r\\nContent-Length: 0\\r\\n\\r\\n'\ncat\n";
    let path = bed.file("handler", script);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("mode");
    let sections = format!("[[handler]]\nname = \"web\"\nmode = \"exec\"\ncommand = [{path:?}]\n");
    let programs = [
        bed.peerd("host", &PeerdOptions::default()),
        bed.peerd("t1", &PeerdOptions { sections, ..PeerdOptions::default() }),
        bed.nginx("host"),
    ];
    let get = || {
        bed.on("client", || {
            let mut c = Connection::to(&address("host"), 80).expect("connect");
            c.send(b"GET /img/64k HTTP/1.1\r\nHost: x\r\n\r\n").expect("send");
            c.response(false).map(|r| r.node().to_owned())
        })
    };
    assert_eq!(get().expect("an answer"), "exec");
    bed.wait_idle(&["host", "t1"]);
    let before = descriptors(&programs);
    for more in 0..8 {
        programs[1].leave_descriptors(more);
        for _ in 0..3 {
            let node = get();
            println!("{more}: {node:?}");
            assert!(node.as_ref().is_ok_and(|n| n == "exec" || n == "host"), "{more} left: {node:?}");
        }
    }
    programs[1].free_descriptors();
    assert!(wait_for(Duration::from_secs(10), || get().is_ok_and(|n| n == "exec")));
    bed.wait_idle(&["host", "t1"]);
    let same = wait_for(Duration::from_secs(10), || descriptors(&programs) == before);
    assert!(same, "{before:?} before, now {:?}", descriptors(&programs));
}
