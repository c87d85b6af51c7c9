//! HTTPS connections of an nginx move to programs of their own, `exec` and `pool`: at the target the kernel does the record
//! layer. The client is OpenSSL, which fails on the first byte that is not right.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use xo_tests::content;
use xo_tests::counters::Counters;
use xo_tests::program::{Program, wait_for};
use xo_tests::servers::{PEER_PORT, address};
use xo_tests::tls::{Https, Interactive, SUITES, Suite};

/// A server for plain HTTP/1.1 that sends files by sendfile(2): `plain.py NODE ROOT`, with its connection as descriptor 0, or
/// with a pool's channel. What ended a connection is a line in ROOT/ends.
const PLAIN: &str = r#"
import errno, json, os, socket, sys, threading

node, root = sys.argv[1:3]

def put(c, text):
    c.sendall(text.encode())

def answer(c, stream, line):
    method, path, _ = line.decode().split()
    length, close = 0, False
    while (field := stream.readline().strip().lower()):
        length = int(field.split(b':')[1]) if field.startswith(b'content-length:') else length
        close = close or field == b'connection: close'
    if method == 'PUT':
        data = stream.read(length)
        with open(root + path, 'wb') as f:
            f.write(data)
        put(c, f'HTTP/1.1 201 Created\r\nX-Node: {node}\r\nContent-Length: 0\r\n\r\n')
    elif path.endswith('/die'):
        put(c, f'HTTP/1.1 200 OK\r\nX-Node: {node}\r\nConnection: close\r\n\r\nnot all')
        os._exit(1)
    elif path.endswith('/long'):
        # Its end is the connection's.
        put(c, f'HTTP/1.1 200 OK\r\nX-Node: {node}\r\nConnection: close\r\n\r\n')
        c.sendall(bytes(1_000_000))
        return False
    else:
        with open(root + path, 'rb') as f:
            size = os.fstat(f.fileno()).st_size
            put(c, f'HTTP/1.1 200 OK\r\nX-Node: {node}\r\nContent-Length: {size}\r\n\r\n')
            while size:
                size -= os.sendfile(c.fileno(), f.fileno(), None, size)
    return not close

def serve(c):
    end, stream = 'closed', c.makefile('rb')
    try:
        while True:
            line = stream.readline()
            if not line:
                end = 'eof'
                break
            if not answer(c, stream, line):
                break
    except OSError as e:
        end = errno.errorcode[e.errno]
    stream.close()
    c.close()
    with open(root + '/ends', 'a') as f:
        f.write(f'{node} {end}\n')

def pool(channel):
    def one(c, number):
        serve(c)
        channel.send(json.dumps({'type': 'done', 'connection': number}).encode())
    channel.send(json.dumps({'type': 'hello', 'version': 1, 'capacity': 64}).encode())
    while True:
        packet, fds, _, _ = socket.recv_fds(channel, 4096, 1)
        if not packet:
            break
        message = json.loads(packet)
        if message['type'] == 'connection':
            assert message['tls'] is True and message['waiting'] > 0, message
            c = socket.socket(fileno=fds[0])
            threading.Thread(target=one, args=(c, message['connection'])).start()

if 'XO_POOL_FD' in os.environ:
    pool(socket.socket(fileno=int(os.environ['XO_POOL_FD'])))
else:
    assert os.environ['XO_TLS'] == 'kernel'
    c = socket.socket(fileno=os.dup(0))
    os.dup2(os.open('/dev/null', os.O_RDWR), 0)
    os.dup2(0, 1)
    serve(c)
"#;

/// A host with TLS, and a target with both handlers: `/exec/` and `/pool/`.
struct Stage {
    https: Https,
    _programs: Vec<Program>,
}

impl Stage {
    fn up() -> Stage {
        let https = Https::up();
        let bed = &https.bed;
        let root = bed.root("host");
        content::write_all(&root);
        fs::write(root.join("img/5m"), content::of("/img/5m", 5_000_000)).expect("an object");
        for handler in ["exec", "pool"] {
            symlink("img", root.join(handler)).expect("a link");
        }
        symlink(&root, bed.root("t1")).expect("a link");
        fs::set_permissions(root.join("img"), fs::Permissions::from_mode(0o777)).expect("its mode");
        let script = bed.file("plain.py", PLAIN);
        let mut policy = format!("listen = [443]\n[targets]\nt1 = \"{}:{PEER_PORT}\"\n", address("t1"));
        // The guest is slow, and a program is not the quickest to start.
        let mut handlers = "[limits]\ntimeout_ms = 10000\n".to_owned();
        for mode in ["exec", "pool"] {
            policy += &format!("[[rule]]\npath_prefix = \"/{mode}/\"\nto = [\"t1\"]\nhandler = \"{mode}\"\n");
            let command = ["/usr/bin/python3".into(), script.clone(), mode.into(), root.clone()];
            handlers +=
                &format!("[[handler]]\nname = \"{mode}\"\nmode = \"{mode}\"\ncommand = {command:?}\n");
        }
        let policy = bed.file("kernel.toml", &policy);
        let head = format!("tls_records = \"kernel\"\npolicy = \"{}\"", policy.display());
        let mut programs = https.daemons_for(&head, &handlers);
        let mut command = bed.preloaded("host", "nginx");
        command.env("XO_POLICY", policy).env("XO_TLS_CHECK", "1");
        programs.push(https.nginx("host", command, ""));
        bed.wait_connected(&bed.servers());
        let ready = wait_for(Duration::from_secs(20), || {
            bed.try_status("t1").is_some_and(|s| s["pools"]["pool"]["ready"] == 1)
        });
        assert!(ready, "{:?}", bed.try_status("t1"));
        Stage { https, _programs: programs }
    }

    /// How connections ended for the handlers since the last time this was asked.
    fn ends(&self, count: usize) -> Vec<String> {
        let path: PathBuf = self.https.bed.root("host").join("ends");
        let read = || fs::read_to_string(&path).unwrap_or_default();
        let all = wait_for(Duration::from_secs(20), || read().lines().count() >= count);
        let text = read();
        assert!(all, "{count} ends: {text}");
        fs::remove_file(&path).expect("the file");
        text.lines().map(str::to_owned).collect()
    }

    /// Nothing is served any more.
    fn all_ended(&self) {
        let none = wait_for(Duration::from_secs(20), || self.https.bed.status("t1", "/flows_served") == 0);
        assert!(none, "{}", self.https.bed.flows("t1"));
    }
}

/// A connection with some requests at the host, and then at a handler.
fn steps(handler: &str, large: bool) -> (Value, Vec<String>) {
    let mut steps = vec![json!(["GET", "/loc/64k"])];
    for size in ["1k", "0", "1", "64k"] {
        steps.push(json!(["GET", format!("/{handler}/{size}")]));
    }
    steps.push(json!(["PUT", format!("/{handler}/upload"), 100_000]));
    steps.push(json!(["GET", format!("/{handler}/upload")]));
    if large {
        steps.push(json!(["GET", format!("/{handler}/5m")]));
        steps.push(json!(["PUT", format!("/{handler}/upload"), 1_000_000]));
        steps.push(json!(["GET", format!("/{handler}/1")]));
    }
    let mut places = vec![handler.to_owned(); steps.len()];
    places[0] = "host".into();
    (json!(steps), places)
}

#[test]
#[ignore = "needs a kernel with TLS: scripts/vm"]
fn every_suite_moves_to_a_process_and_to_a_pool() {
    let stage = Stage::up();
    let status = stage.https.bed.try_status("t1").expect("a status");
    assert_eq!(status["tls_records"], "kernel");
    assert_eq!(status["tls"], json!({ "exec": "kernel", "pool": "kernel" }));
    for (i, suite) in SUITES[..6].iter().enumerate() {
        let handler = ["exec", "pool"][i % 2];
        // With a good-bye, and without.
        let goodbye = i >= 2;
        let before = Counters::of(&stage.https.bed);
        let (steps, places) = steps(handler, i % 3 == 0);
        let options = json!({ "steps": steps, "goodbye": goodbye });
        let got = stage.https.client(443, Some(*suite), options);
        assert_eq!(got[0]["suite"], suite.1, "{got}");
        stage.https.assert_places(&got, &places.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(stage.ends(1), [format!("{handler} {}", if goodbye { "EIO" } else { "eof" })]);
        let counted = Counters::of(&stage.https.bed).since(&before);
        let about = format!("{suite:?} {handler}: {}", counted.troubles());
        println!("{about}");
        // Segments are not counted: on two processors some overtake others. A client that has gone without a good-bye does not take the handler's.
        let resets = ["host", "t1"].map(|node| counted.get_on(node, "OutRsts"));
        assert!(resets == [0, 0] && counted.resets() <= i64::from(!goodbye), "{about}");
    }
    assert_eq!(stage.https.bed.status("t1", "/accepted_total"), 6);
    stage.https.assert_nothing_refused();
    stage.all_ended();
}

/// What OpenSSL says at the end of a connection.
const ENDS: &str = r#"
def end(step):
    try:
        step()
    except Exception as e:
        return f'{type(e).__name__} {getattr(e, "reason", "")}'.strip()
    return 'nothing'
def unwrapped(w):
    while True:
        try:
            return w.tls.unwrap()
        except ssl.SSLWantReadError:
            w.push(w.outgoing.read())
            w.pull()
def all(w, length):
    while w.more():
        pass
    head, body = w.plain.split(b'\r\n\r\n', 1)
    assert len(body) == length, len(body)
# A guest whose processors are taken away for seconds finds its peers silent, and serves a request at home: another connection.
def moved(handler):
    for _ in range(10):
        w = Wire()
        if w.get(f'/{handler}/1k') == handler:
            return w
        time.sleep(1)
    raise AssertionError(f'nothing moves to {handler}')
result = []
for handler in ('exec', 'pool'):
    path = f'/{handler}/1k'
    # The handler's good-bye, after a response that ends with the connection.
    w = moved(handler)
    w.push(w.seal(request(f'/{handler}/long')))
    result.append(end(lambda: all(w, 1_000_000)))
    # The client's, and the handler's answer.
    w = moved(handler)
    result.append(end(lambda: unwrapped(w)))
    assert w.socket.recv(1) == b''
    # A record that cannot be opened.
    w = moved(handler)
    bad = bytearray(w.seal(request(path)))
    bad[-1] ^= 1
    w.push(bad)
    result.append(end(w.more))
w = moved('exec')
# The handler dies in the middle of it.
w.push(w.seal(request('/exec/die')))
result.append(end(lambda: all(w, 7)))
"#;

#[test]
#[ignore = "needs a kernel with TLS: scripts/vm"]
fn ends_are_told_as_far_as_a_program_can() {
    let stage = Stage::up();
    let suite = SUITES[0];
    let ends = stage.https.wire(suite, ENDS);
    // Nobody but the handler knows that a record was bad, and it cannot tell the client; what it leaves unread resets it.
    let bad = "ConnectionResetError";
    let cut = "SSLError UNEXPECTED_EOF_WHILE_READING";
    let expected = ["nothing", "nothing", bad, "nothing", "nothing", bad, cut];
    assert_eq!(ends, json!(expected), "{suite:?}");
    let mut said = stage.ends(6);
    said.sort();
    let expected =
        ["closed", "EIO", "EBADMSG"].iter().flat_map(|end| ["exec", "pool"].map(|h| format!("{h} {end}")));
    let mut expected: Vec<_> = expected.collect();
    expected.sort();
    assert_eq!(said, expected, "{suite:?}");
    new_keys(&stage, suite);
    stage.all_ended();
}

/// The kernel of the lane cannot follow a new key of the client: its connection ends.
fn new_keys(stage: &Stage, suite: Suite) {
    for handler in ["exec", "pool"] {
        let mut client = Interactive::start(&stage.https, &format!("-tls1_3 -ciphersuites {}", suite.1));
        // Before the move it is followed.
        client.say("k\n", "KEYUPDATE");
        client.say(&format!("GET /{handler}/1 HTTP/1.1\nHost: x\n\n"), &format!("X-Node: {handler}"));
        client.say("k\n", "KEYUPDATE");
        client.say("HEAD / HTTP/1.1\nHost: x\n\n", "closed");
        assert_eq!(stage.ends(1), [format!("{handler} EIO")]);
    }
}
