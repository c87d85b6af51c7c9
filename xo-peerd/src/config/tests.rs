use std::env;
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};

use xo_proto::worth::Worth;

use super::*;

/// What a configuration must have; what a case adds begins on line 3.
const BASE: &str = "node = \"t1\"\ninsecure = true\n";

/// A directory for configuration and policy; goes with the test.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Directory {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = env::temp_dir().join(format!("xo-config-{}-{number}", process::id()));
        fs::create_dir(&path).expect("a directory");
        Directory(path)
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, text).expect("a file");
        path
    }

    fn load(&self, text: &str) -> Result<Config, ConfigError> {
        Config::load(&self.file("peerd.toml", text))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn load(text: &str) -> Config {
    Directory::new().load(text).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

/// The error without the file's name: `LINE:COLUMN: message`.
fn error(text: &str) -> String {
    let directory = Directory::new();
    let Err(error) = directory.load(text) else { return "accepted".into() };
    let file = directory.0.join("peerd.toml");
    let error = error.to_string();
    let rest = error.strip_prefix(&format!("{}:", file.display()));
    rest.unwrap_or_else(|| panic!("another file's error: {error}")).to_owned()
}

/// Each text is added to [`BASE`] and must give the error.
fn errors(cases: &[(&str, &str)]) {
    let wrong: Vec<_> = cases
        .iter()
        .map(|(text, expected)| (text, expected, error(&format!("{BASE}{text}"))))
        .filter(|(_, expected, error)| error != *expected)
        .map(|(text, expected, error)| format!("{text}\n  says    {error}\n  not     {expected}"))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_is_not_said_has_its_default() {
    let c = load(BASE);
    assert_eq!(c.node, "t1");
    assert!(c.insecure && c.tls.is_none());
    assert_eq!((c.listen, c.metrics), (None, None));
    assert_eq!(c.socket, Path::new("/run/xo/peerd.sock"));
    assert!(c.interfaces.is_empty() && c.addresses.is_empty() && c.users.is_empty() && c.handlers.is_empty());
    assert_eq!(c.handoff.timeout, Duration::from_millis(100));
    assert_eq!(c.handoff.connect_timeout, Duration::from_millis(500));
    assert_eq!((c.handoff.spin, c.handoff.carry), (Duration::from_micros(250), 4096));
    assert_eq!((c.steering.max_flows, c.steering.hold_bytes), (65_536, 4_194_304));
}

#[test]
fn a_window_that_is_not_carried_has_no_limit() {
    let c = load(&format!("{BASE}[limits]\nmax_cwnd = 9\ncarry_cwnd = false\n"));
    assert_eq!(c.handoff.carry, 0);
}

#[test]
fn everything_that_can_be_said_is_taken_over() {
    let directory = Directory::new();
    let policy = directory.file("policy.toml", "listen = [80]\n");
    let text = format!(
        r#"
node = "t1.rack-2.example"
listen = "10.3.0.2:7400"
socket = "/run/other.sock"
interfaces = ["lo"]
addresses = ["10.3.0.2", "fd00:3::2"]
policy = "{}"
metrics = "[::1]:9400"
users = ["nobody", "root"]

[tls]
ca = "/etc/xo/ca.pem"
cert = "/etc/xo/t1.pem"
key = "/etc/xo/t1.key"

[[handler]]
name = "web"
mode = "attach"
port = 80

[[handler]]
name = "hello"
mode = "exec"
command = ["/bin/sh", "-c", "true"]

[limits]
timeout_ms = 250
connect_timeout_ms = 0
spin_us = 7
max_cwnd = 9

[steering]
mode = "xdp"
max_flows = 1
hold_bytes = 131_072
flower = "software"
flower_queue = 7
flower_after = "512KiB"
"#,
        policy.display()
    );
    let c = directory.load(&text).expect("a configuration");
    assert_eq!((c.node.as_str(), c.socket.as_path()), ("t1.rack-2.example", Path::new("/run/other.sock")));
    assert_eq!(c.listen, Some("10.3.0.2:7400".parse().expect("an address")));
    assert_eq!(c.metrics, Some("[::1]:9400".parse().expect("an address")));
    assert_eq!(c.interfaces, ["lo"]);
    let addresses: [IpAddr; 2] = ["10.3.0.2", "fd00:3::2"].map(|a| a.parse().expect("an address"));
    assert_eq!(c.addresses, addresses);
    assert_eq!(c.users, [65_534, 0], "in the file's order");
    assert!(!c.insecure);
    let tls = c.tls.expect("certificates");
    assert_eq!(
        [tls.ca, tls.cert, tls.key],
        ["ca.pem", "t1.pem", "t1.key"].map(|f| Path::new("/etc/xo").join(f))
    );
    let attach = Handler { name: "web".into(), mode: HandlerMode::Attach { port: 80, tls: false } };
    let command = ["/bin/sh", "-c", "true"].map(String::from).to_vec();
    let exec = Handler { name: "hello".into(), mode: HandlerMode::Exec { command } };
    assert_eq!(c.handlers, [attach, exec]);
    assert_eq!((c.handoff.timeout, c.handoff.connect_timeout), (Duration::from_millis(250), Duration::ZERO));
    assert_eq!((c.handoff.spin, c.handoff.carry), (Duration::from_micros(7), 9));
    assert_eq!(c.steering.mode, SteeringMode::Xdp);
    assert_eq!((c.steering.max_flows, c.steering.hold_bytes), (1, 131_072));
    assert_eq!((c.steering.flower, c.steering.flower_queue), (FlowerMode::Software, 7));
    assert_eq!(c.steering.flower_after, Worth::Bytes(512 << 10));
}

#[test]
fn a_flow_is_worth_a_rule_by_its_bytes_or_its_age() {
    let default = load(BASE).steering;
    assert_eq!((default.flower, default.flower_queue), (FlowerMode::Hardware, 1024));
    assert_eq!(default.flower_after, Worth::Bytes(2 << 20));
    for (text, worth) in [("0", Worth::Bytes(0)), ("500ms", Worth::Age(500))] {
        let c = load(&format!("{BASE}[steering]\nflower_after = \"{text}\"\n"));
        assert_eq!(c.steering.flower_after, worth, "{text}");
    }
}

#[test]
fn part_of_a_section_leaves_the_rest_at_its_default() {
    let c = load(&format!("{BASE}[limits]\nspin_us = 0\n[steering]\nhold_bytes = 2147483648\n"));
    assert_eq!((c.handoff.timeout, c.handoff.spin), (Duration::from_millis(100), Duration::ZERO));
    assert_eq!((c.steering.max_flows, c.steering.hold_bytes), (65_536, 1 << 31));
}

/// The daemon that a server's library starts.
#[test]
fn an_embedded_daemon_is_a_host_only() {
    for insecure in [false, true] {
        let c = Config::embedded("/tmp/x.sock".into(), insecure);
        let hostname = fs::read_to_string("/proc/sys/kernel/hostname").expect("a hostname");
        assert_eq!((c.node.as_str(), c.socket.as_path()), (hostname.trim(), Path::new("/tmp/x.sock")));
        assert_eq!((c.listen, c.insecure), (None, insecure));
        assert!(c.interfaces.is_empty() && c.handlers.is_empty() && c.users.is_empty());
        let files = c.tls.map(|t| [t.ca, t.cert, t.key]);
        let expected = ["ca.pem", "node.pem", "node.key"].map(|f| Path::new("/etc/xo").join(f));
        assert_eq!(files, (!insecure).then_some(expected));
        assert_eq!((c.steering.max_flows, c.handoff.timeout), (65_536, Duration::from_millis(100)));
    }
}

#[test]
fn certificates_go_by_the_name_of_the_node() {
    let directory = Directory::new();
    let at = |name: &str| directory.0.join(name);
    let names = |files: TlsFiles| [files.ca, files.cert, files.key];
    let unnamed = ["ca.pem", "node.pem", "node.key"].map(at);
    assert_eq!(names(TlsFiles::of(&directory.0, "t1.test")), unnamed);
    fs::write(at("t1.test.pem"), "").expect("a file");
    assert_eq!(
        names(TlsFiles::of(&directory.0, "t1.test")),
        ["ca.pem", "t1.test.pem", "t1.test.key"].map(at)
    );
    assert_eq!(names(TlsFiles::of(&directory.0, "t2.test")), unnamed);
}

#[test]
fn node_names_are_dns_names() {
    let long = |n: usize| "a".repeat(n);
    let longest = [long(63), long(63), long(63), long(61)].join(".");
    assert_eq!(longest.len(), 253);
    for name in ["t1", "a", "0", "A-b.c9", "xn--node", "10.3.0.2", &long(63), &longest] {
        assert_eq!(load(&format!("node = \"{name}\"\ninsecure = true\n")).node, *name);
    }
    let too_long = [long(63), long(63), long(63), long(62)].join(".");
    for name in [
        "",
        ".",
        "-a",
        "a-",
        "a.-b",
        "a-.b",
        "a..b",
        ".a",
        "a.",
        "a_b",
        "a b",
        "ä",
        "a/b",
        "*",
        &long(64),
        &too_long,
    ] {
        let expected = format!("2:8: node `{name}`: letters, digits, `-` and `.` make a name");
        assert_eq!(error(&format!("insecure = true\nnode = \"{name}\"\n")), expected);
    }
}

#[test]
fn peers_are_authenticated_or_the_file_says_that_they_are_not() {
    let tls = "[tls]\nca = \"/a\"\ncert = \"/b\"\nkey = \"/c\"\n";
    assert!(load(&format!("node = \"t1\"\n{tls}")).tls.is_some());
    assert!(load(&format!("node = \"t1\"\ninsecure = false\n{tls}")).tls.is_some());
    let neither = "1:1: neither [tls] nor `insecure = true`: peers could not be authenticated";
    assert_eq!(error("node = \"t1\"\n"), neither);
    assert_eq!(error("node = \"t1\"\ninsecure = false\n"), neither);
    errors(&[(tls, "3:1: [tls] has no effect with `insecure = true`")]);
}

/// A handler's section, from line 3 on.
fn handler(mode: &str, rest: &str) -> String {
    format!("[[handler]]\nname = \"a\"\nmode = \"{mode}\"\n{rest}\n")
}

#[test]
fn what_is_not_toml_says_where() {
    errors(&[
        ("listen = \"10.3.0.2\n", "3:19: invalid basic string, expected `\"`"),
        ("listen 7400\n", "3:8: key with no value, expected `=`"),
        ("[steering\n", "3:10: unclosed table, expected `]`"),
        ("node = \"t2\"\n", "3:1: duplicate key"),
        (
            "\n\n# \u{e4}\n\u{feff}users = []\n",
            "6:1: invalid unquoted key, expected letters, numbers, `-`, `_`",
        ),
    ]);
}

#[test]
fn unknown_keys_say_where_and_what_there_is() {
    let all = "`node`, `listen`, `socket`, `interfaces`, `addresses`, `policy`, `metrics`, `tls`, `insecure`, `tls_records`, \
               `users`, `handler`, `handoff`, `limits`, `steering`";
    let tls = "[tls]\nca = \"/a\"\ncert = \"/b\"\nkey = \"/c\"\nchain = \"/d\"\n";
    let handler = handler("attach", "port = 1\n  ports = 2");
    errors(&[
        ("lisen = 1\n", &format!("3:1: unknown field `lisen`, expected one of {all}")),
        (tls, "7:1: unknown field `chain`, expected one of `ca`, `cert`, `key`"),
        (
            &handler,
            "7:3: unknown field `ports`, expected one of `name`, `mode`, `port`, `command`, `workers`, `socket`, `tls`",
        ),
        (
            "[limits]\ntimeout = 5\n",
            "4:1: unknown field `timeout`, expected one of `timeout_ms`, `connect_timeout_ms`, `spin_us`, `carry_cwnd`, `max_cwnd`",
        ),
        (
            "[steering]\nmax_flows = 5\nring = 5\n",
            "5:1: unknown field `ring`, expected one of `mode`, `max_flows`, `hold_bytes`, `pin_directory`, `flower`, `flower_queue`, `flower_after`",
        ),
    ]);
}

#[test]
fn missing_keys_say_where() {
    assert_eq!(error("insecure = true\n"), "1:1: missing field `node`");
    assert_eq!(error(""), "1:1: missing field `node`");
    errors(&[
        ("[tls]\nca = \"/a\"\ncert = \"/b\"\n", "3:1: missing field `key`"),
        ("[[handler]]\nmode = \"attach\"\n", "3:1: missing field `name`"),
        ("[[handler]]\nname = \"a\"\n", "3:1: missing field `mode`"),
    ]);
}

#[test]
fn values_of_another_kind_say_where() {
    errors(&[
        ("listen = \"t1:7400\"\n", "3:10: invalid socket address syntax"),
        ("listen = 7400\n", "3:10: invalid type: integer `7400`, expected socket address"),
        ("metrics = \"9400\"\n", "3:11: invalid socket address syntax"),
        ("addresses = [\"10.3.0.2\", \"10.3.0.300\"]\n", "3:26: invalid IP address syntax"),
        ("addresses = \"10.3.0.2\"\n", "3:13: invalid type: string \"10.3.0.2\", expected a sequence"),
        ("users = \"root\"\n", "3:9: invalid type: string \"root\", expected a sequence"),
        ("interfaces = [1]\n", "3:15: invalid type: integer `1`, expected a string"),
        ("socket = 5\n", "3:10: invalid type: integer `5`, expected path string"),
        ("[handler]\nname = \"a\"\n", "3:1: invalid type: map, expected a sequence"),
        (&handler("fork", ""), "5:8: unknown variant `fork`, expected one of `attach`, `exec`, `pool`"),
        (&handler("attach", "port = 70000"), "6:8: invalid value: integer `70000`, expected u16"),
        (
            &handler("exec", "command = \"/bin/sh\""),
            "6:11: invalid type: string \"/bin/sh\", expected a sequence",
        ),
        ("[limits]\nmax_cwnd = 0\n", "4:12: invalid value: integer `0`, expected a nonzero u16"),
        ("[limits]\nspin_us = -1\n", "4:11: invalid value: integer `-1`, expected u32"),
        ("[limits]\ntimeout_ms = \"fast\"\n", "4:14: invalid type: string \"fast\", expected u32"),
        ("[steering]\nmax_flows = 4294967296\n", "4:13: invalid value: integer `4294967296`, expected u32"),
        ("[steering]\nhold_bytes = 1.5\n", "4:14: invalid type: floating point `1.5`, expected u32"),
        // Columns count characters.
        (
            "tls = { ca = \"/\u{e4}\u{1f600}\", cert = 5, key = \"/c\" }\n",
            "3:28: invalid type: integer `5`, expected path string",
        ),
    ]);
    assert_eq!(error("node = 1\n"), "1:8: invalid type: integer `1`, expected a string");
    assert_eq!(error("node = \"a\"\ninsecure = 1\n"), "2:12: invalid type: integer `1`, expected a boolean");
}

#[test]
fn interfaces_and_users_exist() {
    assert_eq!(load(&format!("{BASE}interfaces = [\"lo\", \"lo\"]\n")).interfaces, ["lo", "lo"]);
    assert_eq!(load(&format!("{BASE}users = [\"root\"]\n")).users, [0]);
    errors(&[
        ("interfaces = [\"lo\", \"no-such0\"]\n", "3:21: no interface `no-such0`"),
        ("interfaces = [\n  \"lo\",\n  \"no-such0\",\n]\n", "5:3: no interface `no-such0`"),
        // Neither of them a name, though both would be paths below /sys/class/net.
        ("interfaces = [\"\"]\n", "3:15: no interface ``"),
        ("interfaces = [\"../net/lo\"]\n", "3:15: no interface `../net/lo`"),
        ("interfaces = [\"lo\\u0000\"]\n", "3:15: no interface `lo\0`"),
        ("users = [\"root\", \"no-such-user\"]\n", "3:18: no user `no-such-user`"),
        ("users = [\"\"]\n", "3:10: no user ``"),
        ("users = [\"root\\u0000\"]\n", "3:10: no user `root\0`"),
    ]);
}

#[test]
fn a_pool_starts_its_workers_or_has_a_socket_for_them() {
    let mode = |rest: &str| load(&format!("{BASE}{}", handler("pool", rest))).handlers[0].mode.clone();
    let pool = |command: &[&str], workers, socket: Option<&str>| HandlerMode::Pool {
        command: command.iter().map(|a| (*a).to_owned()).collect(),
        workers,
        socket: socket.map(PathBuf::from),
    };
    assert_eq!(mode("command = [\"/bin/sh\", \"x\"]"), pool(&["/bin/sh", "x"], 1, None));
    assert_eq!(mode("command = [\"/bin/sh\"]\nworkers = 1024"), pool(&["/bin/sh"], 1024, None));
    assert_eq!(mode("socket = \"/run/xo/a\""), pool(&[], 0, Some("/run/xo/a")));
    let both = "socket = \"/run/xo/a\"\nworkers = 2\ncommand = [\"/bin/sh\"]";
    assert_eq!(mode(both), pool(&["/bin/sh"], 2, Some("/run/xo/a")));
    let path = "`socket` is an absolute path of at most 107 bytes";
    let long = format!("socket = \"/{}\"", "a".repeat(107));
    let twice = format!(
        "{}[[handler]]\nname = \"b\"\nmode = \"pool\"\nsocket = \"/a\"\n",
        handler("pool", "socket = \"/a\"")
    );
    errors(&[
        (&handler("pool", ""), "3:1: mode `pool` needs a `command`, or a `socket`"),
        (&handler("pool", "workers = 2"), "3:1: mode `pool` needs a `command`, or a `socket`"),
        (&handler("pool", "port = 1\nsocket = \"/a\""), "6:8: mode `pool` has no `port`"),
        (
            &handler("pool", "socket = \"/a\"\nworkers = 2"),
            "7:11: `workers` without a `command` to start them by",
        ),
        (&handler("pool", "workers = 0\ncommand = [\"/bin/sh\"]"), "6:11: `workers` is 1 to 1024"),
        (&handler("pool", "workers = 1025\ncommand = [\"/bin/sh\"]"), "6:11: `workers` is 1 to 1024"),
        (
            &handler("pool", "workers = -1\nsocket = \"/a\""),
            "6:11: invalid value: integer `-1`, expected u32",
        ),
        (
            &handler("pool", "command = [\"worker\"]"),
            "6:11: `command` begins with the absolute path of a program",
        ),
        (&handler("pool", "socket = \"a\""), &format!("6:10: {path}")),
        (&handler("pool", &long), &format!("6:10: {path}")),
        (&handler("pool", "socket = \"/run/xo/peerd.sock\""), "6:10: a second socket /run/xo/peerd.sock"),
        (&twice, "10:10: a second socket /a"),
    ]);
}

#[test]
fn a_handler_has_what_its_mode_needs_and_nothing_else() {
    let program = "`command` begins with the absolute path of a program";
    let twice = format!("{}{}", handler("attach", "port = 1"), handler("exec", "command = [\"/bin/sh\"]"));
    errors(&[
        (&handler("attach", ""), "3:1: mode `attach` needs a `port`"),
        (&handler("attach", "port = 0"), "3:1: mode `attach` needs a `port`"),
        (&handler("attach", "command = [\"/bin/sh\"]"), "6:11: mode `attach` has no `command`"),
        (&handler("attach", "port = 1\ncommand = [\"/bin/sh\"]"), "7:11: mode `attach` has no `command`"),
        (&handler("exec", ""), "3:1: mode `exec` needs a `command`"),
        (&handler("exec", "port = 1"), "6:8: mode `exec` has no `port`"),
        (&handler("exec", "port = 1\ncommand = [\"/bin/sh\"]"), "6:8: mode `exec` has no `port`"),
        (&handler("exec", "command = [\"/bin/sh\"]\nworkers = 2"), "7:11: mode `exec` has no `workers`"),
        (&handler("attach", "port = 1\nsocket = \"/x\""), "7:10: mode `attach` has no `socket`"),
        (&handler("exec", "command = [\"/bin/sh\"]\ntls = true"), "7:7: mode `exec` has no `tls`"),
        (&handler("pool", "socket = \"/x\"\ntls = true"), "7:7: mode `pool` has no `tls`"),
        (&handler("exec", "command = []"), &format!("6:11: {program}")),
        (&handler("exec", "command = [\"sh\"]"), &format!("6:11: {program}")),
        (&handler("exec", "command = [\"/no/such\"]"), &format!("6:11: {program}")),
        (&handler("exec", "command = [\"/bin\"]"), &format!("6:11: {program}")),
        (&handler("exec", "command = [\"/etc/passwd\"]"), &format!("6:11: {program}")),
        ("[[handler]]\nname = \"\"\nmode = \"attach\"\nport = 1\n", "4:8: a handler has a name"),
        (&twice, "8:8: a second handler `a`"),
    ]);
}

#[test]
fn tables_have_a_size_that_the_kernel_takes() {
    let size = "4:14: hold_bytes is a power of two, at least 131072";
    errors(&[
        ("[steering]\nmax_flows = 0\n", "4:13: max_flows is at least 1"),
        ("[steering]\nhold_bytes = 0\n", size),
        ("[steering]\nhold_bytes = 65536\n", size),
        ("[steering]\nhold_bytes = 131073\n", size),
        ("[steering]\nhold_bytes = 4294967295\n", size),
    ]);
    let after = "4:16: flower_after is a number of bytes (\"2MiB\") or an age (\"10s\")";
    errors(&[
        ("[steering]\nflower_queue = 0\n", "4:16: flower_queue is 1 to 1048576"),
        ("[steering]\nflower_after = \"\"\n", after),
        ("[steering]\nflower_after = \"2 MiB\"\n", after),
        (
            "[steering]\nflower = \"nic\"\n",
            "4:10: unknown variant `nic`, expected one of `hardware`, `software`, `off`",
        ),
    ]);
}

#[test]
fn packets_are_steered_at_tc_or_by_xdp() {
    assert_eq!(load(BASE).steering.mode, SteeringMode::Tc);
    for (text, mode) in [("tc", SteeringMode::Tc), ("xdp", SteeringMode::Xdp)] {
        let c = load(&format!("{BASE}[steering]\nmode = \"{text}\"\n"));
        assert_eq!(c.steering.mode, mode, "{text}");
    }
    let mut wrong = Vec::new();
    for text in ["XDP", "native", "xdp-generic", "tcx", "", "tc "] {
        wrong.push((
            format!("[steering]\nmode = \"{text}\"\n"),
            format!("4:8: unknown variant `{text}`, expected `tc` or `xdp`"),
        ));
    }
    wrong.push(("[steering]\nmode = 1\n".into(), "4:8: wanted string or table".into()));
    let wrong: Vec<_> = wrong.iter().map(|(text, error)| (text.as_str(), error.as_str())).collect();
    errors(&wrong);
}

#[test]
fn a_policy_is_checked_and_its_errors_are_its_own() {
    errors(&[("policy = \"/no/such\"\n", "3:10: policy /no/such: No such file or directory (os error 2)")]);
    let directory = Directory::new();
    let policy = directory.file("policy.toml", "listen = [80]\n\n[[rule]]\nto = [\"t9\"]\n");
    let text = format!("{BASE}policy = \"{}\"\n", policy.display());
    let error = directory.load(&text).expect_err("a rule without its target").to_string();
    assert_eq!(error, format!("{}:4:7: unknown target `t9`", policy.display()));
    assert_eq!(Loaded::read(&policy).expect_err("the same").to_string(), error);
    fs::write(&policy, "listen = [80, 443]\n").expect("a file");
    directory.load(&text).expect("a configuration");
    assert_eq!(Loaded::read(&policy).expect("a policy").policy.listen, [80, 443]);
    let error = directory.load(&format!("{BASE}policy = \"{}\"\n", directory.0.display()));
    let error = error.expect_err("a directory").to_string();
    assert_eq!(error, format!("{}: Is a directory (os error 21)", directory.0.display()));
}

#[test]
fn a_file_that_cannot_be_read_says_which() {
    let directory = Directory::new();
    let path = directory.0.join("none.toml");
    let error = Config::load(&path).expect_err("no file").to_string();
    assert_eq!(error, format!("{}: No such file or directory (os error 2)", path.display()));
    fs::write(&path, b"node = \"\xff\"\n").expect("a file");
    let error = Config::load(&path).expect_err("not UTF-8").to_string();
    assert_eq!(error, format!("{}: stream did not contain valid UTF-8", path.display()));
}

#[test]
fn who_does_the_record_layer() {
    assert_eq!(load(BASE).tls_records, Records::Auto);
    let said = |word: &str| Directory::new().load(&format!("{BASE}tls_records = \"{word}\"\n"));
    assert_eq!(said("library").expect("library").tls_records, Records::Library);
    match ktls::available() {
        Ok(_) => assert_eq!(said("kernel").expect("kernel").tls_records, Records::Kernel),
        Err(why) => errors(&[("tls_records = \"kernel\"\n", &format!("3:15: tls_records `kernel`: {why}"))]),
    }
    let unknown = "3:15: unknown variant `nic`, expected one of `auto`, `kernel`, `library`";
    errors(&[("tls_records = \"nic\"\n", unknown)]);
}
