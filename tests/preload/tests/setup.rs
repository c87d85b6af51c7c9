//! Wrong settings: a server under the library runs as it would without, and is told once; a daemon says what is wrong
//! and where, and does not start.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};
use xo_tests::bed::built;
use xo_tests::kinds::Kind;
use xo_tests::servers::address;
use xo_tests::{Bed, Connection};

const REQUESTS: u32 = 400;
const PYTHON: &str = "/usr/bin/python3";

/// Requests that the policy would send away, on some connections; all are answered by the host.
fn served(bed: &Bed) {
    bed.on("client", || {
        for _ in 0..4 {
            let mut c = Connection::to(&address("host"), 80).expect("connect");
            for path in ["/img/1k", "/loc/1", "/img/64k"].iter().cycle().take(REQUESTS as usize / 4) {
                assert_eq!(c.get(path).expect(path).node(), "host");
            }
        }
    });
}

/// What is wrong with a policy, and how an error must begin; `{}` stands for the file's path.
fn broken_policies(bed: &Bed) -> Vec<(PathBuf, String)> {
    let good = fs::read_to_string(bed.usual_policy()).expect("a policy");
    let file = |name: &str, text: &str, place: &str| {
        let path = bed.file(name, text);
        let begin = format!("{}:{place}", path.display());
        (path, begin)
    };
    let mut all = vec![
        file("syntax.toml", &good.replace("[80]", "[80"), "2:1: "),
        file("name.toml", &good.replace("path_prefix = \"/up/\"", "path_prefx = \"/up/\""), "9:1: "),
        file("target.toml", &good.replace("to = [\"t1\"]", "to = [\"t9\"]"), "6:7: "),
        file("address.toml", &good.replace("10.3.0.2:7400", "10.3.0.2"), "3:6: "),
        file("regex.toml", &good.replace("path_prefix = \"/img/\"", "path_regex = \"(\""), "5:14: "),
    ];
    let missing = bed.directory().join("missing.toml");
    let directory = bed.directory().to_owned();
    let binary = bed.directory().join("binary.toml");
    fs::write(&binary, [0xff, 0xfe, 0, 1]).expect("a file");
    for path in [missing, directory, binary] {
        let begin = format!("{}: ", path.display());
        all.push((path, begin));
    }
    all
}

#[test]
fn a_server_with_a_broken_policy() {
    let bed = Bed::up(1, 1);
    for (policy, begin) in broken_policies(&bed) {
        let mut command = bed.preloaded("host", "nginx");
        command.env("XO_POLICY", &policy);
        let nginx = bed.nginx_with("host", command);
        served(&bed);
        let said = nginx.output();
        let lines: Vec<_> = said.lines().filter(|l| l.starts_with("xo: ")).collect();
        assert_eq!(lines.len(), 1, "{}: {said}", policy.display());
        assert!(lines[0].contains(&begin), "{begin}: {said}");
        assert!(lines[0].ends_with("; nothing will be offloaded"), "{said}");
        drop(nginx);
        // The programs' logs are appended to.
        fs::remove_file(bed.directory().join("host-nginx.log")).expect("the log");
    }
    // One in the environment has no file, but a place.
    let mut command = bed.preloaded("host", "nginx");
    command.env_remove("XO_POLICY").env("XO_LISTEN", "80").env("XO_RULES", "/img/ => t1 @web");
    let nginx = bed.nginx_with("host", command);
    served(&bed);
    assert_eq!(nginx.output().matches("xo: ").count(), 1, "{}", nginx.output());
    assert!(nginx.output().contains("xo: environment:"), "{}", nginx.output());
}

#[test]
fn a_daemon_with_a_broken_policy() {
    let bed = Bed::up(1, 1);
    let socket = bed.socket("host");
    let peerd = |command: &str, config: &Path| -> Output {
        Command::new(built("xo-peerd")).args([command, "--config"]).arg(config).output().expect("xo-peerd")
    };
    for (policy, begin) in broken_policies(&bed) {
        let text = format!("node = \"host\"\ninsecure = true\nsocket = {socket:?}\npolicy = {policy:?}\n");
        let config = bed.file("broken.toml", &text);
        for command in ["check", "run"] {
            let output = peerd(command, &config);
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(2), "{command}: {said}");
            // A file that is not there is the fault of the one that names it.
            let expected =
                if policy.exists() { begin.clone() } else { format!("{}:4:10: ", config.display()) };
            assert_eq!(said.lines().count(), 1, "{command}: {said}");
            assert!(said.contains(&expected), "{command}, {expected}: {said}");
        }
    }
    assert!(!socket.exists(), "none has started");
}

/// Servers that have no daemon and cannot start one, for this reason or that.
#[test]
fn no_daemon_and_no_way_to_start_one() {
    let bed = Bed::up(1, 1);
    let program = bed.file("not-executable", "#!/bin/sh\n");
    let denied = bed.directory().join("denied");
    fs::create_dir(&denied).expect("a directory");
    fs::set_permissions(&denied, fs::Permissions::from_mode(0o700)).expect("its mode");
    bed.run("host", Command::new("sysctl").args(["-w", "net.ipv4.ip_unprivileged_port_start=0"]));
    let cases = [
        ("another user, a directory that it may not enter", true, denied.join("peerd.sock"), None),
        ("another user, a directory that is not there", true, bed.directory().join("none/peerd.sock"), None),
        ("a daemon that is no program", false, bed.socket("host"), Some(program.as_path())),
        ("a socket below a file", false, program.join("peerd.sock"), None),
    ];
    for (case, unprivileged, socket, peerd) in cases {
        let server = Kind::Python.start(&bed, "host", |_| {
            // The one in the path may be a script that starts another, and may be root's alone.
            let mut command = bed.preloaded("host", if unprivileged { "setpriv" } else { PYTHON });
            if unprivileged {
                command.args(["--reuid=65534", "--regid=65534", "--clear-groups", PYTHON]);
            }
            if let Some(peerd) = peerd {
                command.env("XO_PEERD", peerd);
            }
            command.env("XO_SOCKET", &socket).env("XO_LOG", "warn");
            command
        });
        served(&bed);
        let said = server.program.output();
        assert_eq!(said.matches("no xo-peerd").count(), 1, "{case}: {said}");
        assert!(said.matches("xo: ").count() <= 2, "{case}: {said}");
        assert!(!socket.exists(), "{case}");
        drop(server);
        fs::remove_file(bed.directory().join("host-python.log")).expect("the log");
    }
    // nginx listens on two sockets.
    let mut command = bed.preloaded("host", "nginx");
    command.env("XO_PEERD", &program).env("XO_LOG", "warn");
    let nginx = bed.nginx_with("host", command);
    served(&bed);
    assert_eq!(nginx.output().matches("no xo-peerd").count(), 1, "{}", nginx.output());
    assert_eq!(nginx.output().matches("xo: ").count(), 2, "{}", nginx.output());
}

/// A daemon that hangs up at once is looked for now and then, not for each request.
#[test]
fn requests_without_a_daemon_cost_no_connection_each() {
    let bed = Bed::up(1, 1);
    let path = bed.socket("host");
    let listener = Socket::new(Domain::UNIX, Type::SEQPACKET, None).expect("a socket");
    listener.bind(&SockAddr::unix(&path).expect("an address")).expect("bind");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).expect("its mode");
    listener.listen(16).expect("listen");
    let attempts = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&attempts);
    std::thread::spawn(move || {
        while listener.accept().is_ok() {
            counted.fetch_add(1, Ordering::Relaxed);
        }
    });
    let mut command = bed.preloaded("host", "nginx");
    command.env("XO_PEERD", "/nonexistent");
    let nginx = bed.nginx_with("host", command);
    let begun = Instant::now();
    let before = attempts.load(Ordering::Relaxed);
    while begun.elapsed() < Duration::from_secs(3) {
        served(&bed);
    }
    let seconds = begun.elapsed().as_secs() as u32;
    let made = attempts.load(Ordering::Relaxed) - before;
    // Two workers, each once a second.
    assert!(made > 0 && made <= 2 * (seconds + 2), "{made} in {seconds} s: {}", nginx.output());
}
