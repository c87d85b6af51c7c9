//! A handler that is killed in the middle of a response: the client is told by an end or a reset, and nothing is left.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::thread::JoinHandle;
use std::time::Duration;

use xo_tests::program::{Program, wait_for};
use xo_tests::servers::{PeerdOptions, address};
use xo_tests::{Bed, Connection};

/// Clients with a response under way.
const CLIENTS: usize = 6;

/// Connections that have had their first bytes of `path`, which is longer than any socket's buffers, and wait.
fn in_the_middle(bed: &Bed, path: &'static str) -> Vec<Connection> {
    bed.on("client", move || {
        let begin = |_| {
            let mut c = Connection::to(&address("host"), 80).expect("connect");
            c.send(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).expect("send");
            assert_eq!(c.exactly(12).expect("a response begins"), b"HTTP/1.1 200");
            c
        };
        (0..CLIENTS).map(begin).collect()
    })
}

/// Reads to the end; how that came.
fn ends(bed: &Bed, connections: Vec<Connection>) -> Vec<JoinHandle<io::Result<usize>>> {
    let read = |mut c: Connection| bed.spawn("client", move || c.rest().map(|bytes| bytes.len()));
    connections.into_iter().map(read).collect()
}

fn kill(pid: i32) {
    // SAFETY: numbers only; the process is one that this test has started.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0, "process {pid}");
}

/// All clients see that it is over, before the response is complete.
fn all_over(ends: Vec<JoinHandle<io::Result<usize>>>) {
    for end in ends {
        match end.join().expect("no panic") {
            Ok(bytes) => assert!(bytes < 20 << 20, "{bytes} bytes: a whole response"),
            Err(e) => assert_eq!(e.kind(), io::ErrorKind::ConnectionReset),
        }
    }
}

/// A socket that its server has closed first is remembered for a minute.
const TIME_WAIT: Duration = Duration::from_secs(60);

/// The target's kernel remembers none.
fn without_time_wait(bed: &Bed) {
    bed.run("t1", Command::new("sysctl").args(["-w", "net.ipv4.tcp_max_tw_buckets=0"]));
}

fn nothing_left(bed: &Bed, programs: &[&Program], before: &[usize]) {
    bed.wait_idle_for(TIME_WAIT + Duration::from_secs(20), &["host", "t1"]);
    let now = || programs.iter().map(|p| p.descriptors()).collect::<Vec<_>>();
    assert!(wait_for(Duration::from_secs(10), || now() == before), "{before:?} before, now {:?}", now());
}

/// Who answers a new connection.
fn served_by(bed: &Bed) -> String {
    bed.on("client", || {
        let mut c = Connection::to(&address("host"), 80).expect("connect");
        c.get("/img/1k").expect("an answer").node().to_owned()
    })
}

#[test]
fn a_server_that_is_killed() {
    let bed = Bed::up(1, 1);
    let daemons = ["host", "t1"].map(|n| bed.peerd(n, &PeerdOptions::default()));
    let (host, server) = (bed.nginx("host"), bed.nginx("t1"));
    bed.wait_acceptors("t1", "web", 4);
    assert_eq!(served_by(&bed), "t1");
    bed.wait_idle(&["host", "t1"]);
    let watched = [&daemons[0], &host];
    let before: Vec<_> = watched.iter().map(|p| p.descriptors()).collect();
    let connections = in_the_middle(&bed, "/img/20m");
    assert_eq!(bed.status("host", "/flows_hosted"), CLIENTS as u64);
    // The workers, and the master with them, so that none is started again.
    drop(server);
    all_over(ends(&bed, connections));
    nothing_left(&bed, &watched, &before);
    assert_eq!(served_by(&bed), "host", "nobody listens on the target");
    let _server = bed.nginx("t1");
    bed.wait_acceptors("t1", "web", 4);
    assert_eq!(served_by(&bed), "t1");
}

/// One worker is killed and started again by its master: connections of the other go on.
#[test]
fn a_worker_that_is_killed() {
    let bed = Bed::up(1, 1);
    without_time_wait(&bed);
    let programs = bed.everything();
    assert_eq!(served_by(&bed), "t1");
    bed.wait_idle(&["host", "t1"]);
    let watched: Vec<_> = programs.iter().collect();
    let before: Vec<_> = watched.iter().map(|p| p.descriptors()).collect();
    let connections = in_the_middle(&bed, "/img/20m");
    let server = &programs[3];
    let victim = *server.processes().last().expect("a worker");
    kill(victim as i32);
    let whole = |end: &io::Result<usize>| end.as_ref().is_ok_and(|n| *n > 20 << 20);
    // What goes on does so up to its end, on a connection that is kept alive.
    let results = bed.on("client", move || {
        let read = |mut c: Connection| {
            let size = (20 << 20) + 1;
            c.exactly(size).map(|bytes| bytes.len())
        };
        connections.into_iter().map(read).collect::<Vec<_>>()
    });
    let complete = results.iter().filter(|r| whole(r)).count();
    println!("{complete} of {CLIENTS} responses are whole");
    assert!(complete < CLIENTS, "{results:?}");
    bed.wait_acceptors("t1", "web", 4);
    let served = wait_for(Duration::from_secs(10), || served_by(&bed) == "t1");
    assert!(served, "{:?}", bed.try_status("t1"));
    nothing_left(&bed, &watched, &before);
}

#[test]
fn a_handler_process_that_is_killed() {
    let bed = Bed::up(1, 1);
    without_time_wait(&bed);
    let pids = bed.directory().join("pids");
    let script = format!(
        "#!/bin/sh\nwhile read -r line && [ \"$line\" != \"$(printf '\\r')\" ]; do :; done\n\
         printf 'HTTP/1.1 200 OK\\r\\nContent-Length: 1000\\r\\n\\r\\nsome bytes'\n\
         echo $$ >> {}\nexec sleep 600 >/dev/null\n",
        pids.display()
    );
    // The exec keeps descriptor 0, which is the connection, too.
    let path = bed.file("handler", &script);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("mode");
    let sections = format!("[[handler]]\nname = \"web\"\nmode = \"exec\"\ncommand = [{path:?}]\n");
    let daemons = [
        bed.peerd("host", &PeerdOptions::default()),
        bed.peerd("t1", &PeerdOptions { sections, ..PeerdOptions::default() }),
    ];
    let host = bed.nginx("host");
    let watched = [&daemons[0], &daemons[1], &host];
    let mut before = Vec::new();
    for round in 0..2 {
        let connections = in_the_middle(&bed, "/img/64k");
        let started = || fs::read_to_string(&pids).unwrap_or_default().lines().count() == CLIENTS;
        assert!(wait_for(Duration::from_secs(10), started));
        for pid in fs::read_to_string(&pids).expect("pids").lines() {
            kill(pid.parse().expect("a number"));
        }
        fs::remove_file(&pids).expect("remove");
        all_over(ends(&bed, connections));
        // The first round opens what stays open.
        if round == 0 {
            bed.wait_idle(&["host", "t1"]);
            before = watched.iter().map(|p| p.descriptors()).collect();
        }
        nothing_left(&bed, &watched, &before);
        assert_eq!(bed.status("t1", "/flows_active"), 0);
    }
}
