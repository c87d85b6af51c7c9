//! Small servers that do to their descriptors and processes what real ones do: the same result with the library as
//! without, and requests that the policy sends away move where they can. The servers are in `programs/`.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use xo_tests::bed::built;
use xo_tests::hazards::compile;
use xo_tests::program::{Program, wait_for};
use xo_tests::servers::{PeerdOptions, address};
use xo_tests::{Bed, Connection};

const LOCAL: &str = "GET /loc/1 HTTP/1.1\r\nHost: x\r\n\r\n";

struct Hazards {
    bed: Bed,
    program: PathBuf,
    early: PathBuf,
    programs: Vec<Program>,
}

impl Hazards {
    fn up() -> Hazards {
        let bed = Bed::up(1, 1);
        let programs = vec![
            bed.peerd("host", &PeerdOptions::default()),
            bed.peerd("t1", &PeerdOptions::default()),
            bed.nginx("t1"),
        ];
        bed.wait_acceptors("t1", "web", 4);
        let (program, early) = compile(&bed);
        Hazards { bed, program, early, programs }
    }

    fn output(&self, case: &str, run: &str) -> PathBuf {
        self.bed.directory().join(format!("{case}-{run}.out"))
    }

    fn start(&self, case: &str, run: &str) -> Program {
        let output = self.output(case, run);
        let _ = fs::remove_file(&output);
        fs::write(&output, "").expect("the output");
        // set_user writes as another user.
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&output, fs::Permissions::from_mode(0o666)).expect("its mode");
        let mut command = Command::new(&self.program);
        command.args([case]).arg(&output);
        self.start_command(case, run, command)
    }

    fn start_command(&self, case: &str, run: &str, mut command: Command) -> Program {
        if run == "preloaded" {
            for (name, value) in self.bed.preloaded("host", "true").get_envs() {
                command.env(name, value.expect("a value"));
            }
        }
        let mut program = self.bed.start("host", &format!("{case}-{run}"), &mut command);
        self.bed.wait_listening("host", 80, &mut program);
        program
    }

    /// Some connections one after the other, each with some requests that stay; waits until the program has said so.
    fn talk(&self, case: &str, run: &str, connections: u32) -> String {
        for i in 0..connections {
            self.bed.on("client", move || {
                let mut c = Connection::to(&address("host"), 80).expect("connect");
                for _ in 0..=i % 3 {
                    c.send(LOCAL.as_bytes()).expect("send");
                    let response = c.response(false).expect("a response");
                    assert_eq!((response.node(), &response.body[..]), ("host", &b"ok"[..]));
                }
            });
        }
        self.said(case, run)
    }

    /// What the program has said, when it has nothing more to say.
    fn said(&self, case: &str, run: &str) -> String {
        let (mut text, mut same) = (String::new(), 0);
        wait_for(Duration::from_secs(10), || {
            let now = fs::read_to_string(self.output(case, run)).unwrap_or_default();
            same = if now == text { same + 1 } else { 0 };
            text = now;
            same >= 12
        });
        text
    }

    /// A connection with a request that stays and one that the policy sends away; the node that served the latter.
    fn away(&self) -> String {
        self.bed.on("client", || {
            let mut c = Connection::to(&address("host"), 80).expect("connect");
            c.send(LOCAL.as_bytes()).expect("send");
            assert_eq!(c.response(false).expect("a response").node(), "host");
            c.send(b"GET /img/1k HTTP/1.1\r\nHost: x\r\n\r\n").expect("send");
            c.response(false).expect("a response").node().to_owned()
        })
    }

    /// Ends the process that has left its parent's group.
    fn end_daemon(&self, case: &str, run: &str) {
        let path = self.output(case, run).with_extension("out.pid");
        let Some(pid) = fs::read_to_string(path).ok().and_then(|t| t.parse::<i32>().ok()) else { return };
        // SAFETY: numbers only; the process is one that this test has started.
        unsafe { libc::kill(pid, libc::SIGKILL) };
        let gone = wait_for(Duration::from_secs(5), || {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.is_empty() || stat.contains(") Z ")
        });
        assert!(gone, "the daemon {pid}");
    }

    /// A case natively and under the library.
    fn same(&self, case: &str, moves: Option<bool>) {
        let mut results = Vec::new();
        for run in ["native", "preloaded"] {
            let program = self.start(case, run);
            results.push(self.talk(case, run, 5));
            if run == "preloaded"
                && let Some(moves) = moves
            {
                let node = self.away();
                assert_eq!(
                    node,
                    if moves { "t1" } else { "host" },
                    "{case}: who serves what the policy sends away"
                );
                // The program sees an end, as of any client that leaves; and serves the next one.
                self.talk(case, run, 1);
            }
            drop(program);
            self.end_daemon(case, run);
        }
        assert!(results[0].contains("read 32") || moves.is_none(), "{case}: {}", results[0]);
        if matches!(case, "pass" | "passed_listener" | "fork_serve" | "accept_threads") {
            // Several processes or threads say what they do, each in its own time.
            for text in &mut results {
                let mut lines: Vec<_> = text.lines().collect();
                lines.sort_unstable();
                *text = lines.join("\n");
            }
        }
        assert_eq!(results[0], results[1], "{case}: native, then preloaded");
    }
}

#[test]
fn processes_and_descriptors() {
    let h = Hazards::up();
    for case in [
        "fork_serve",
        "spawn",
        "set_user",
        "signals",
        "close_range",
        "closefrom",
        "close_loop",
        "dups",
        "accept_threads",
    ] {
        h.same(case, Some(true));
    }
    h.same("daemon", Some(true));
    h.same("passed_listener", Some(true));
    h.same("inherited_listener", Some(true));
    // Served by a process to which the connection was passed: seen by nobody, so it never moves.
    h.same("pass", Some(false));
    // Passed to a process that does nothing with it, among other descriptors: nobody knows what it will do.
    for case in ["pass_second", "pass_in_second_part", "pass_many"] {
        h.same(case, Some(false));
    }
}

#[test]
fn threads_that_share_a_connection() {
    let h = Hazards::up();
    let mut program = h.start("two_threads", "native");
    let native = h.talk("two_threads", "native", 5);
    drop(program);
    program = h.start("two_threads", "preloaded");
    assert_eq!(h.talk("two_threads", "preloaded", 5), native);
    assert_eq!(h.away(), "t1", "one thread reads, one writes");
    drop(program);
    let _program = h.start("both_read", "preloaded");
    for _ in 0..30 {
        // Wherever it is served, it is served once.
        h.away();
    }
    h.talk("both_read", "preloaded", 30);
}

#[test]
fn ways_to_wait() {
    let h = Hazards::up();
    for case in [
        "epoll_level",
        "epoll_edge",
        "epoll_oneshot",
        "epoll_exclusive",
        "poll",
        "ppoll",
        "select",
        "pselect",
    ] {
        h.same(case, Some(true));
        // A head in pieces is held back, and wakes the server when it is complete.
        let program = h.start(case, "preloaded");
        let node = h.bed.on("client", || {
            let mut c = Connection::to(&address("host"), 80).expect("connect");
            c.dribble(b"GET /img/1k HTTP/1.1\r\nHost: x\r\n\r\n", 5, Duration::from_millis(2)).expect("send");
            c.response(false).expect("a response").node().to_owned()
        });
        assert_eq!(node, "t1", "{case}");
        drop(program);
    }
}

#[test]
fn ways_to_read() {
    let h = Hazards::up();
    for case in ["readv", "recvmsg", "recvfrom", "peek"] {
        h.same(case, Some(true));
    }
    // More than a request asked for, bytes thrown away unseen, or several messages at once: served here, for good.
    for case in ["recvmmsg", "trunc"] {
        h.same(case, None);
    }
    let results = ["native", "preloaded"].map(|run| {
        let _program = h.start("waitall_two", run);
        h.bed.on("client", || {
            let mut c = Connection::to(&address("host"), 80).expect("connect");
            for _ in 0..2 {
                c.send(LOCAL.repeat(2).as_bytes()).expect("send");
                for _ in 0..2 {
                    assert_eq!(c.response(false).expect("a response").node(), "host");
                }
            }
        });
        h.said("waitall_two", run)
    });
    assert!(results[0].contains("read 64"), "{}", results[0]);
    assert_eq!(results[0], results[1], "native, then preloaded");
    let _program = h.start("recvmmsg", "preloaded");
    assert_eq!(h.away(), "host");
}

#[test]
fn blocking_modes() {
    let h = Hazards::up();
    h.same("modes", Some(true));
    h.same("small_reads", None);
    h.same("waitall", Some(true));
}

#[test]
fn started_with_nothing_open() {
    let h = Hazards::up();
    let mut results = Vec::new();
    for run in ["native", "preloaded"] {
        let output = h.output("numbers", run);
        let mut command = Command::new("sh");
        let line = format!("exec {} numbers {} <&- >&- 2>&-", h.program.display(), output.display());
        command.args(["-c", &line]);
        let _program = h.start_command("numbers", run, command);
        results.push(h.talk("numbers", run, 3));
        if run == "preloaded" {
            assert_eq!(h.away(), "t1");
        }
    }
    assert!(results[0].contains("the listener is 0"), "{}", results[0]);
    assert_eq!(results[0], results[1], "native, then preloaded");
}

#[test]
fn a_constructor_that_comes_first() {
    let h = Hazards::up();
    let mut command = Command::new(&h.program);
    command.arg("numbers").arg(h.output("numbers", "early"));
    for (name, value) in h.bed.preloaded("host", "true").get_envs() {
        command.env(name, value.expect("a value"));
    }
    // What is loaded last is initialised first.
    let both = format!("{}:{}", built("libxo_preload.so").display(), h.early.display());
    command.env("LD_PRELOAD", both);
    let program = h.start_command("numbers", "early", command);
    let environment = fs::read(format!("/proc/{}/maps", program.pid())).expect("maps");
    assert!(String::from_utf8_lossy(&environment).contains("libearly.so"));
    h.talk("numbers", "early", 2);
    assert_eq!(h.away(), "t1");
}

#[test]
fn io_uring_is_noticed_once() {
    let h = Hazards::up();
    let program = h.start("ring", "preloaded");
    let said = h.talk("ring", "preloaded", 3);
    assert_eq!(said.matches("io_uring_setup a ring").count(), 3, "{said}");
    assert_eq!(program.output().matches("uses io_uring").count(), 1, "{}", program.output());
    assert_eq!(h.bed.status("host", "/library/io_uring"), 1);
    assert_eq!(h.away(), "t1", "what is read and written by calls is followed as ever");
}

/// SO_RCVTIMEO bounds a read, also while a request head is held back and while a hand-off waits for its target.
#[test]
fn reads_with_a_time_limit() {
    let h = Hazards::up();
    h.same("timeouts", None);
    let program = h.start("timeouts", "preloaded");
    let node = h.bed.on("client", || {
        let mut c = Connection::to(&address("host"), 80).expect("connect");
        c.send(&LOCAL.as_bytes()[..20]).expect("send");
        std::thread::sleep(Duration::from_millis(600));
        c.send(&LOCAL.as_bytes()[20..]).expect("send");
        c.response(false).expect("a response").node().to_owned()
    });
    assert_eq!(node, "host");
    let said = h.said("timeouts", "preloaded");
    assert!(said.contains("gave up after about its limit: -1 EAGAIN"), "{said}");
    drop(program);

    // The target's daemon is stopped, not gone: the answer is late, and the host serves the request itself.
    let program = h.start("timeouts", "preloaded");
    h.away();
    h.programs[1].signal(libc::SIGSTOP);
    let node = h.away();
    h.programs[1].signal(libc::SIGCONT);
    assert_eq!(node, "host");
    drop(program);
    assert!(h.bed.status("host", "/refused_total") > 0, "{:?}", h.bed.try_status("host"));
}

/// As a target: connections come out of its accept, though it has put its socket into the epoll before it listened.
#[test]
fn a_server_that_waits_before_it_listens() {
    let bed = Bed::up(1, 1);
    let _programs = [
        bed.peerd("host", &PeerdOptions::default()),
        bed.peerd("t1", &PeerdOptions::default()),
        bed.nginx("host"),
    ];
    let (program, _) = compile(&bed);
    let mut command = bed.preloaded("t1", program.to_str().expect("a path"));
    command.arg("epoll_first").arg(bed.directory().join("first.out"));
    let mut program = bed.start("t1", "epoll_first", &mut command);
    bed.wait_listening("t1", 80, &mut program);
    bed.wait_acceptors("t1", "web", 1);
    for _ in 0..10 {
        let body = bed.on("client", || {
            let mut c = Connection::to(&address("host"), 80).expect("connect");
            c.send(b"GET /img/1k HTTP/1.1\r\nHost: x\r\n\r\n").expect("send");
            c.response(false).expect("a response").body
        });
        assert_eq!(body, b"ok");
    }
    assert_eq!(bed.status("host", "/offloads_total"), 10);
}
