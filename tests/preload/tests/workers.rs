//! Handlers of mode `pool`: long-lived workers that are passed connections, in Rust and in Python.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::path::PathBuf;
use std::process::Command;
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;
use socket2::{Domain, SockAddr, Socket, Type};
use xo_tests::bed::{built, root};
use xo_tests::client::Response;
use xo_tests::counters::Counters;
use xo_tests::program::{Program, stay_on_one_processor, wait_for};
use xo_tests::servers::{PeerdOptions, address, address6};
use xo_tests::{Bed, Connection};

/// Longer than any socket's buffers.
const LONG: usize = 40 << 20;

/// The two examples: what they call themselves, and how they are started.
fn examples() -> [(&'static str, Vec<PathBuf>); 2] {
    let python = vec!["/usr/bin/python3".into(), root().join("examples/pool/worker.py")];
    [("rust", vec![built("xo-pool-example")]), ("python", python)]
}

/// A target whose pool has `settings`, and a host with nginx.
struct Pool {
    bed: Bed,
    daemons: Vec<Program>,
    options: PeerdOptions,
    _nginx: Program,
}

impl Pool {
    fn up(settings: impl FnOnce(&Bed) -> String) -> Pool {
        Pool::with_order("early", settings)
    }

    fn with_order(order: &str, settings: impl FnOnce(&Bed) -> String) -> Pool {
        let bed = Bed::up(1, 1);
        let sections = format!("[[handler]]\nname = \"web\"\nmode = \"pool\"\n{}\n", settings(&bed));
        let options = PeerdOptions { sections, ..PeerdOptions::default() };
        let head = format!("insecure = true\nhandoff = \"{order}\"");
        let host = PeerdOptions { head, ..PeerdOptions::default() };
        let daemons = vec![bed.peerd("host", &host), bed.peerd("t1", &options)];
        let nginx = bed.nginx("host");
        Pool { bed, daemons, options, _nginx: nginx }
    }

    fn started_by_daemon(order: &str, command: &[PathBuf], workers: u32) -> Pool {
        let pool = Pool::with_order(order, |_| format!("command = {command:?}\nworkers = {workers}"));
        pool.wait_ready(workers.into());
        pool
    }

    /// With a socket for workers.
    fn with_socket() -> Pool {
        Pool::up(|bed| format!("socket = {:?}", bed.directory().join("pool.sock")))
    }

    fn socket(&self) -> PathBuf {
        self.bed.directory().join("pool.sock")
    }

    fn view(&self) -> Value {
        self.bed.try_status("t1").map_or(Value::Null, |s| s["pools"]["web"].clone())
    }

    fn number(&self, name: &str) -> u64 {
        self.view()[name].as_u64().unwrap_or_default()
    }

    fn workers(&self) -> Vec<u32> {
        let all = self.view()["workers"].as_array().cloned().unwrap_or_default();
        all.iter().filter_map(|w| w["pid"].as_u64()).map(|pid| pid as u32).collect()
    }

    /// Connections that workers have.
    fn connections(&self) -> u64 {
        let all = self.view()["workers"].as_array().cloned().unwrap_or_default();
        all.iter().filter_map(|w| w["connections"].as_u64()).sum()
    }

    fn wait_ready(&self, count: u64) {
        let ready = wait_for(Duration::from_secs(20), || self.number("ready") == count);
        assert!(ready, "{count} workers: {}", self.view());
    }

    /// Who answers a request on a connection of its own.
    fn served_by(&self) -> String {
        self.bed.on("client", || ask(&mut connect(), "/img/1k").expect("an answer").node().to_owned())
    }

    /// Requests go to the target (again): the host may have left it alone for some time.
    fn wait_served_by(&self, node: &str) {
        let served = wait_for(Duration::from_secs(20), || self.served_by() == node);
        assert!(served, "{:?}", self.bed.try_status("host"));
    }

    /// All workers have closed everything, and nobody steers anything any more.
    fn idle(&self) {
        let none = wait_for(Duration::from_secs(10), || self.connections() == 0);
        assert!(none, "{}", self.view());
        self.bed.wait_idle(&["host", "t1"]);
    }
}

fn connect() -> Connection {
    Connection::to(&address("host"), 80).expect("connect")
}

fn ask(c: &mut Connection, path: &str) -> io::Result<Response> {
    c.send(format!("GET {path} HTTP/1.1\r\nHost: xo.test\r\n\r\n").as_bytes())?;
    let response = c.response(false)?;
    if response.status == 200 { Ok(response) } else { Err(io::Error::other(response.head)) }
}

#[test]
fn several_connections_with_several_requests_each() {
    const CLIENTS: usize = 24;
    const REQUESTS: usize = 20;
    // On several, segments overtake each other, and some are sent again.
    stay_on_one_processor();
    for ((name, command), order) in examples().into_iter().zip(["early", "strict"]) {
        let pool = Pool::started_by_daemon(order, &command, 2);
        let bed = &pool.bed;
        assert_eq!(pool.served_by(), name);
        // That connection is over for everybody.
        pool.idle();
        let before = Counters::of(bed);
        let client = |number: usize| {
            let (host, own) = if number.is_multiple_of(2) {
                (address("host"), address("client"))
            } else {
                (address6("host"), address6("client"))
            };
            bed.spawn("client", move || {
                let mut c = Connection::to(&host, 80).expect("connect");
                let mut workers = BTreeSet::new();
                for i in 0..REQUESTS {
                    let path = format!("/img/{number}-{i}");
                    let response = ask(&mut c, &path).unwrap_or_else(|e| panic!("{path}: {e}"));
                    assert_eq!(response.node(), name);
                    assert_eq!(String::from_utf8_lossy(&response.body), format!("{path} for {own}\n"));
                    workers.insert(response.header("X-Worker").expect("a worker").to_owned());
                }
                assert_eq!(workers.len(), 1, "a connection stays with its worker");
                let long = ask(&mut c, "/img/bytes/300000").expect("a long one");
                assert_eq!(long.body.len(), 300_000);
                (c, workers.pop_first().expect("one"))
            })
        };
        let threads: Vec<_> = (0..CLIENTS).map(client).collect();
        let all: Vec<_> = threads.into_iter().map(|t| t.join().expect("no panic")).collect();
        let status = bed.try_status("t1").expect("a status");
        println!("{name}: {}", status["pools"]);
        // Each worker has its half, for both offer the same.
        let served: BTreeSet<_> =
            all.iter().map(|(_, worker)| worker.parse::<u32>().expect("a pid")).collect();
        assert_eq!(served, pool.workers().into_iter().collect());
        for worker in status["pools"]["web"]["workers"].as_array().expect("workers") {
            assert_eq!((&worker["connections"], &worker["state"]), (&(CLIENTS / 2).into(), &"ready".into()));
        }
        assert_eq!(bed.status("t1", "/handlers/web"), CLIENTS as u64);
        drop(all);
        pool.idle();
        let counted = Counters::of(bed).since(&before);
        counted.no_reset(bed);
        assert_eq!(counted.losses(), 0, "{}", counted.troubles());
        assert_eq!(bed.status("t1", "/accepted_total"), CLIENTS as u64 + 1);
    }
}

/// A connection that has had the beginning of a long response.
fn in_the_middle(bed: &Bed) -> (u32, Connection) {
    bed.on("client", || {
        let mut c = connect();
        let pid = ask(&mut c, "/img/1k").expect("an answer").header("X-Worker").map(str::parse::<u32>);
        c.send(format!("GET /img/bytes/{LONG} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).expect("send");
        assert_eq!(c.exactly(12).expect("a response begins"), b"HTTP/1.1 200");
        (pid.and_then(Result::ok).expect("a pid"), c)
    })
}

/// Reads to the end.
fn rest(bed: &Bed, mut c: Connection) -> JoinHandle<io::Result<usize>> {
    bed.spawn("client", move || c.rest().map(|bytes| bytes.len()))
}

fn kill(pid: u32) {
    // SAFETY: numbers only; the process is one that this test has started.
    assert_eq!(unsafe { libc::kill(pid as i32, libc::SIGKILL) }, 0, "process {pid}");
}

#[test]
fn a_worker_is_killed_in_the_middle_of_a_response() {
    for (name, command) in examples() {
        let pool = Pool::started_by_daemon("early", &command, 2);
        let bed = &pool.bed;
        // A socket that its server has closed first would be remembered for a minute.
        bed.run("t1", Command::new("sysctl").args(["-w", "net.ipv4.tcp_max_tw_buckets=0"]));
        let (victim, c) = in_the_middle(bed);
        let (other, mut bystander) = bed.on("client", || {
            let mut c = connect();
            let worker = ask(&mut c, "/img/1k").expect("an answer").header("X-Worker").map(str::to_owned);
            (worker.expect("a worker"), c)
        });
        assert_ne!(other, victim.to_string(), "the one with fewer connections is chosen");
        kill(victim);
        match rest(bed, c).join().expect("no panic") {
            Ok(bytes) => assert!(bytes < LONG, "{bytes} bytes: a whole response"),
            Err(e) => assert_eq!(e.kind(), io::ErrorKind::ConnectionReset),
        }
        // The other's connections go on, another is started in the place of the one that was killed.
        let mut bystander = bed.on("client", move || {
            assert_eq!(ask(&mut bystander, "/img/1k").expect("an answer").header("X-Worker"), Some(&*other));
            bystander
        });
        let again = wait_for(Duration::from_secs(20), || {
            pool.number("hellos_total") == 3 && pool.number("ready") == 2 && !pool.workers().contains(&victim)
        });
        assert!(again, "{}", pool.view());
        // All that is left is the bystander's.
        let left = wait_for(Duration::from_secs(20), || bed.status("host", "/flows_hosted") == 1);
        assert!(left, "{}", bed.flows("host"));
        bystander = bed.on("client", move || {
            ask(&mut bystander, "/img/1k").expect("an answer");
            bystander
        });
        let said = pool.daemons[1].output();
        assert!(said.contains(&format!("worker {victim} has ended (signal: 9 (SIGKILL)")), "{said}");
        assert_eq!(pool.served_by(), name);
        drop(bystander);
        pool.idle();
    }
}

/// A worker's channel as this test itself uses it.
struct Channel(Socket);

impl Channel {
    fn to(pool: &Pool) -> Channel {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).expect("a socket");
        socket.connect(&SockAddr::unix(pool.socket()).expect("a path")).expect("connect");
        socket.set_read_timeout(Some(Duration::from_secs(30))).expect("a time limit");
        Channel(socket)
    }

    fn say(&self, text: &[u8]) {
        self.0.send(text).expect("send");
    }

    /// The next message; `Null` at the end. A descriptor that comes with it is closed.
    fn hear(&mut self) -> Value {
        let mut buffer = [0; 4096];
        let n = self.0.read(&mut buffer).expect("a message, or the end");
        if n == 0 { Value::Null } else { serde_json::from_slice(&buffer[..n]).expect("JSON") }
    }

    fn welcomed(pool: &Pool, capacity: u32) -> Channel {
        let mut channel = Channel::to(pool);
        channel.say(format!("{{\"type\":\"hello\",\"version\":1,\"capacity\":{capacity}}}\n").as_bytes());
        let welcome = channel.hear();
        assert_eq!((&welcome["type"], &welcome["node"]), (&"welcome".into(), &"t1".into()), "{welcome}");
        assert_eq!((&welcome["version"], &welcome["handler"]), (&1.into(), &"web".into()), "{welcome}");
        channel
    }
}

/// Refusals by this reason.
fn refused(bed: &Bed, reason: &str) -> u64 {
    let status = bed.try_status("host").expect("a status");
    status["refused_by_reason"][reason].as_u64().unwrap_or(0)
}

#[test]
fn without_a_worker_the_host_serves() {
    for (name, mut command) in examples() {
        let pool = Pool::with_socket();
        let bed = &pool.bed;
        let before = Counters::of(bed);
        assert_eq!(pool.served_by(), "host");
        assert_eq!((refused(bed, "no_worker"), refused(bed, "pool_full")), (1, 0));
        // The host does not ask again before the target says that a worker is there.
        assert_eq!(pool.served_by(), "host");
        assert_eq!(refused(bed, "no_worker"), 1);
        let none = bed.status("host", "/library/no_target");
        assert_eq!(none, 1);
        // An operator starts one.
        command.push(pool.socket());
        let mut operators = Command::new(&command[0]);
        let _worker = bed.start("t1", "worker", operators.args(&command[1..]));
        pool.wait_ready(1);
        pool.wait_served_by(name);
        drop(_worker);
        pool.wait_ready(0);
        let counted = Counters::of(bed).since(&before);
        assert_eq!(
            (counted.get_on("client", "EstabResets"), counted.losses()),
            (0, 0),
            "{}",
            counted.troubles()
        );
    }
}

#[test]
fn a_full_pool_takes_no_more() {
    let pool = Pool::with_socket();
    let bed = &pool.bed;
    let mut channel = Channel::welcomed(&pool, 1);
    // This worker takes the connection and never answers.
    let waiting = bed.spawn("client", || {
        let mut c = connect();
        c.send(b"GET /img/1k HTTP/1.1\r\nHost: x\r\n\r\n").expect("send");
        let address = c.stream().local_addr().expect("an address").to_string();
        (address, c)
    });
    let (client, c) = waiting.join().expect("no panic");
    let given = channel.hear();
    assert_eq!((&given["type"], &given["handler"]), (&"connection".into(), &"web".into()), "{given}");
    assert_eq!(given["client"], client);
    assert_eq!(given["server"], format!("{}:80", address("host")));
    assert_eq!(given["waiting"], b"GET /img/1k HTTP/1.1\r\nHost: x\r\n\r\n".len());
    assert_eq!(pool.connections(), 1);
    assert_eq!(pool.served_by(), "host");
    let full = |expected| assert_eq!((refused(bed, "pool_full"), refused(bed, "no_worker")), (expected, 0));
    full(1);
    // Room for one more, and none again.
    channel.say(b"{\"type\":\"capacity\",\"capacity\":2}");
    let again = bed.spawn("client", || {
        let taken = || {
            let mut c = connect();
            c.send(b"GET /img/1k HTTP/1.1\r\nHost: x\r\n\r\n").expect("send");
            // The host answers until it hears of the room; this worker closes what it is given.
            c.exactly(12).is_err()
        };
        wait_for(Duration::from_secs(20), taken)
    });
    let second = channel.hear();
    assert_eq!(second["connection"], given["connection"].as_u64().expect("a number") + 1, "{second}");
    assert!(again.join().expect("no panic"));
    channel.say(format!("{{\"type\":\"done\",\"connection\":{}}}", second["connection"]).as_bytes());
    channel.say(b"{\"type\":\"capacity\",\"capacity\":0}");
    let none = wait_for(Duration::from_secs(10), || pool.view()["workers"][0]["capacity"] == 0);
    assert!(none, "{}", pool.view());
    assert_eq!(pool.served_by(), "host");
    // Its descriptor of the first was closed when it was received.
    drop(c);
    channel.say(format!("{{\"type\":\"done\",\"connection\":{}}}", given["connection"]).as_bytes());
    pool.idle();
}

#[test]
fn a_broken_message_closes_the_channel_and_nothing_else() {
    let pool = Pool::with_socket();
    let bed = &pool.bed;
    let (name, mut command) = examples()[1].clone();
    command.push(pool.socket());
    let _worker = bed.start("t1", "worker", Command::new(&command[0]).args(&command[1..]));
    pool.wait_ready(1);
    assert_eq!(pool.served_by(), name);
    let long = format!("{{\"type\":\"hello\",\"version\":1,\"capacity\":1,\"x\":\"{}\"}}", "x".repeat(5000));
    let hello = "{\"type\":\"hello\",\"version\":1,\"capacity\":1}";
    let cases: [(&[&[u8]], &str); 8] = [
        (&[b"hello"], "not a message: expected value at line 1 column 1"),
        (&[b"\xff\x00\xfe"], "not a message: expected value at line 1 column 1"),
        (&[b"{\"type\":\"bye\"}"], "not a message: unknown variant `bye`"),
        (&[b"{\"type\":\"done\",\"connection\":1}"], "the first message is \"hello\""),
        (
            &[b"{\"type\":\"hello\",\"version\":9,\"capacity\":1}"],
            "the worker speaks version 9 of the protocol, the daemon 1",
        ),
        (&[long.as_bytes()], "a message of more than 4096 bytes"),
        (&[hello.as_bytes(), hello.as_bytes()], "a second \"hello\""),
        (
            &[hello.as_bytes(), b"{\"type\":\"done\",\"connection\":12345}"],
            "\"done\" with connection 12345, which it does not have",
        ),
    ];
    for (number, (packets, why)) in cases.iter().enumerate() {
        let mut channel = Channel::to(&pool);
        for packet in *packets {
            channel.say(packet);
        }
        let mut heard = channel.hear();
        if heard["type"] == "welcome" {
            heard = channel.hear();
        }
        assert_eq!(heard["type"], "error", "{why}: {heard}");
        assert!(heard["message"].as_str().is_some_and(|m| m.contains(why)), "{why}: {heard}");
        assert_eq!(channel.hear(), Value::Null);
        assert_eq!(pool.number("broken_total"), number as u64 + 1);
        let said = pool.daemons[1].output();
        let line = format!("handler web: worker {}: {why}", std::process::id());
        assert!(said.contains(&line), "{line}: {said}");
    }
    // One that ends its channel, in whichever way, breaks nothing.
    drop(Channel::welcomed(&pool, 7));
    pool.wait_ready(1);
    // A flood is read a piece at a time.
    let flood = Channel::welcomed(&pool, 0);
    for _ in 0..2000 {
        flood.say(b"{\"type\":\"capacity\",\"capacity\":0}");
    }
    assert_eq!(pool.served_by(), name);
    drop(flood);
    pool.wait_ready(1);
    assert_eq!(pool.number("broken_total"), cases.len() as u64);
    pool.idle();
}

/// One request on each connection, all answered by the worker that they are at.
fn used(bed: &Bed, mut connections: Vec<(String, Connection)>) -> Vec<(String, Connection)> {
    bed.on("client", move || {
        for (worker, c) in &mut connections {
            let response = ask(c, "/img/bytes/100000").expect("an answer");
            assert_eq!((response.header("X-Worker"), response.body.len()), (Some(&**worker), 100_000));
        }
        connections
    })
}

fn opened(bed: &Bed, count: usize) -> Vec<(String, Connection)> {
    bed.on("client", move || {
        let open = |_| {
            let mut c = connect();
            let worker = ask(&mut c, "/img/1k").expect("an answer").header("X-Worker").map(str::to_owned);
            (worker.expect("a worker's answer"), c)
        };
        (0..count).map(open).collect()
    })
}

fn lives(pid: u32) -> bool {
    // A zombie has no memory.
    std::fs::read_to_string(format!("/proc/{pid}/statm")).is_ok_and(|text| !text.starts_with("0 "))
}

/// Workers of the daemon's finish what they have and end; the next daemon starts others.
#[test]
fn a_daemon_is_restarted() {
    for (name, command) in examples() {
        let mut pool = Pool::started_by_daemon("early", &command, 2);
        let mut old = Vec::new();
        for signal in [libc::SIGTERM, libc::SIGKILL] {
            let mut connections = opened(&pool.bed, 4);
            let workers = pool.workers();
            let mut daemon = pool.daemons.pop().expect("the target's");
            daemon.signal(signal);
            let ended = wait_for(Duration::from_secs(10), || !daemon.is_alive());
            assert!(ended, "{}", daemon.output());
            // Its group is killed with it: not before the end.
            old.push(daemon);
            connections = used(&pool.bed, connections);
            pool.daemons.push(pool.bed.peerd("t1", &pool.options));
            pool.wait_ready(2);
            assert_eq!(pool.bed.status("t1", "/flows_served"), 4);
            connections = used(&pool.bed, connections);
            pool.wait_served_by(name);
            assert!(workers.iter().all(|pid| lives(*pid) && !pool.workers().contains(pid)));
            drop(connections);
            let gone = wait_for(Duration::from_secs(10), || !workers.iter().any(|pid| lives(*pid)));
            assert!(gone, "{workers:?} are still there");
            pool.idle();
        }
        let said = old.iter().map(Program::output).collect::<String>();
        assert!(!said.contains("its channel is closed"), "{said}");
    }
}

/// Workers of an operator's connect again, and say how much room the connections leave that they have.
#[test]
fn a_daemon_is_restarted_under_workers_of_an_operator() {
    for (name, mut command) in examples() {
        let mut pool = Pool::with_socket();
        command.push(pool.socket());
        let worker = pool.bed.start("t1", "worker", Command::new(&command[0]).args(&command[1..]));
        pool.wait_ready(1);
        for stop in [true, false] {
            let mut connections = opened(&pool.bed, 3);
            let mut daemon = pool.daemons.pop().expect("the target's");
            if stop {
                assert_eq!(daemon.stop(), Some(0), "{}", daemon.output());
                assert!(!pool.socket().exists());
            }
            drop(daemon);
            connections = used(&pool.bed, connections);
            pool.daemons.push(pool.bed.peerd("t1", &pool.options));
            pool.wait_ready(1);
            assert_eq!(pool.workers(), [worker.pid()]);
            assert_eq!(pool.view()["workers"][0]["capacity"], 64 - 3);
            connections = used(&pool.bed, connections);
            pool.wait_served_by(name);
            drop(connections);
            let room = wait_for(Duration::from_secs(10), || pool.view()["workers"][0]["capacity"] == 64);
            assert!(room, "{}", pool.view());
            pool.idle();
        }
    }
}

/// A worker that cannot live is tried again and again, with growing pauses; the host serves meanwhile.
#[test]
fn a_worker_that_ends_at_once_is_started_with_pauses() {
    let starts =
        |bed: &Bed| std::fs::read_to_string(bed.directory().join("starts")).map_or(0, |s| s.lines().count());
    let pool = Pool::up(|bed| {
        let script = format!("echo $$ >> {}; exit 3", bed.directory().join("starts").display());
        format!("command = [\"/bin/sh\", \"-c\", {script:?}]")
    });
    assert!(wait_for(Duration::from_secs(20), || starts(&pool.bed) >= 4));
    let said = pool.daemons[1].output();
    for pause in ["100ms", "200ms", "400ms"] {
        let line = format!("has ended (exit status: 3), the next in {pause}");
        assert_eq!(said.matches(&line).count(), 1, "{line}: {said}");
    }
    assert_eq!(pool.served_by(), "host");
    assert_eq!(refused(&pool.bed, "no_worker"), 1);
}
