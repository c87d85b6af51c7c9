//! HTTPS at the host, and targets whose servers speak plain HTTP on a port of their own: what comes there with TLS goes through
//! the library's record layer.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use serde_json::{Value, json};

use crate::content;
use crate::kinds::{Kind, Server};
use crate::program::Program;
use crate::servers::{PEER_PORT, address};
use crate::tls::{CLIENT_HEAD, Https, Suite};

/// Where the targets' servers listen.
pub const PLAIN: u16 = 8080;
/// A handler of the same name whose server has TLS itself.
pub const TLS_HANDLER: &str = "[[handler]]\nname = \"plain\"\nmode = \"attach\"\nport = 443\ntls = true\n";
/// The handler that names it.
pub const HANDLER: &str = "[[handler]]\nname = \"plain\"\nmode = \"attach\"\nport = 8080\n";

impl Https {
    /// Names of the targets.
    #[must_use]
    pub fn targets(&self) -> Vec<String> {
        self.bed.servers().into_iter().filter(|n| n != "host").collect()
    }

    /// By this policy `/img/NODE/` and `/up/NODE/` are served on that node, and what has no rule wherever it is.
    #[must_use]
    pub fn target_policy(&self) -> String {
        let mut text = "listen = [443, 8080]\n[targets]\n".to_owned();
        for t in self.targets() {
            text += &format!("{t} = \"{}:{PEER_PORT}\"\n", address(&t));
        }
        for node in self.bed.servers() {
            let to = if node == "host" { "local" } else { &node };
            for directory in ["img", "up"] {
                text += &format!(
                    "[[rule]]\npath_prefix = \"/{directory}/{node}/\"\nto = [\"{to}\"]\nhandler = \"plain\"\n"
                );
            }
        }
        text
    }

    /// A program under the library, with that policy.
    #[must_use]
    pub fn with_policy(&self, node: &str, program: &str) -> Command {
        let mut command = self.bed.preloaded(node, program);
        let policy = self.bed.file("targets.toml", &self.target_policy());
        command.env("XO_POLICY", policy).env("XO_TLS_CHECK", "1");
        command
    }

    /// All nodes have the same objects, and take uploads, below their own name, too.
    ///
    /// # Panics
    /// When a file cannot be made.
    pub fn share_objects(&self) {
        let root = self.bed.root("host");
        content::write_all(&root);
        for node in self.bed.servers() {
            if node != "host" {
                symlink(&root, self.bed.root(&node)).expect("a link");
            }
            for directory in ["img", "up"] {
                symlink(".", root.join(directory).join(&node)).expect("a link");
            }
        }
    }

    /// Daemons everywhere, nginx with TLS at the host, plain nginx on the targets.
    ///
    /// # Panics
    /// When they do not come up.
    #[must_use]
    pub fn everything(&self) -> Vec<Program> {
        let policy = self.bed.file("targets.toml", &self.target_policy());
        let mut programs = self.daemons_for(&format!("policy = \"{}\"", policy.display()), HANDLER);
        self.share_objects();
        for node in self.targets() {
            programs.push(self.plain_nginx(&node));
        }
        programs.push(self.nginx("host", self.with_policy("host", "nginx"), ""));
        self.bed.wait_connected(&self.bed.servers());
        programs
    }

    /// As [`Https::everything`], with Python's http.server at the host and on the first target.
    ///
    /// # Panics
    /// When they do not come up.
    #[must_use]
    pub fn with_python(&self) -> Vec<Program> {
        let policy = self.bed.file("targets.toml", &self.target_policy());
        let mut programs = self.daemons_for(&format!("policy = \"{}\"", policy.display()), HANDLER);
        self.share_objects();
        programs.push(self.python_on("t1", PLAIN, self.with_policy("t1", "python3")));
        for node in self.targets().iter().skip(1) {
            programs.push(self.plain_nginx(node));
        }
        programs.push(self.python("host", self.with_policy("host", "python3")));
        self.bed.wait_acceptors("t1", "plain", 1);
        self.bed.wait_connected(&self.bed.servers());
        programs
    }

    /// As [`Https::everything`], with another server with TLS at the host, and, if `at_target` names one, such a one on the first
    /// target; the other targets have nginx with TLS. Else all targets have plain nginx.
    ///
    /// # Panics
    /// When they do not come up.
    #[must_use]
    pub fn servers(&self, home: Kind, at_target: Option<Kind>) -> Vec<Server> {
        let policy = self.bed.file("targets.toml", &self.target_policy());
        let handler = if at_target.is_some() { TLS_HANDLER } else { HANDLER };
        let daemons = self.daemons_for(&format!("policy = \"{}\"", policy.display()), handler);
        let mut programs: Vec<Server> = daemons.into_iter().map(Server::from).collect();
        self.share_objects();
        for (i, node) in self.targets().iter().enumerate() {
            programs.push(match at_target {
                None => self.plain_nginx(node).into(),
                Some(kind) if i == 0 => self.tls_server(kind, node),
                Some(_) => self.tls_server(Kind::Nginx, node),
            });
            self.bed.wait_acceptors(node, "plain", 1);
        }
        programs.push(self.tls_server(home, "host"));
        self.bed.wait_connected(&self.bed.servers());
        programs
    }

    fn tls_server(&self, kind: Kind, node: &str) -> Server {
        match kind {
            Kind::Nginx => self.nginx(node, self.with_policy(node, "nginx"), "").into(),
            Kind::Python => self.python(node, self.with_policy(node, "python3")).into(),
            other => self.server_as(other, node, |program| self.with_policy(node, program)),
        }
    }

    /// nginx without TLS on a target.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn plain_nginx(&self, node: &str) -> Program {
        let config = fs::read_to_string(self.bed.nginx_config(node, 2)).expect("a configuration");
        let config =
            config.replace("listen 80; listen [::]:80;", "listen 80; listen 8080; listen [::]:8080;");
        let path = self.bed.file(&format!("{node}-plain.conf"), &config);
        let program = self.bed.nginx_configured(node, self.with_policy(node, "nginx"), &path);
        self.bed.wait_acceptors(node, "plain", 4);
        program
    }

    /// Every connection's steps were served where they should have been, with the right bytes.
    ///
    /// # Panics
    /// When not.
    pub fn assert_places(&self, got: &Value, places: &[&str]) {
        for connection in got.as_array().into_iter().flatten() {
            let steps = connection["steps"].as_array().expect("steps");
            let expected: Vec<_> = places.iter().map(|p| json!([p, true])).collect();
            assert_eq!(*steps, expected, "{}", self.all_about());
        }
    }

    /// Hand-offs that were refused or failed anywhere, by reason.
    #[must_use]
    pub fn all_about(&self) -> String {
        let about = |node: &String| {
            let status = self.bed.try_status(node).unwrap_or_default();
            let [refused, failed, library] =
                ["refused_by_reason", "failed_by_reason", "library"].map(|key| &status[key]);
            format!("{node}: {refused} {failed} {library}\n")
        };
        self.bed.servers().iter().map(about).collect()
    }

    /// Nothing was refused, nothing failed, on any node.
    ///
    /// # Panics
    /// When something was.
    pub fn assert_nothing_refused(&self) {
        for node in self.bed.servers() {
            let status = self.bed.try_status(&node).expect("a status");
            let counts = ["refused_total", "failed_total"].map(|key| status[key].as_u64());
            assert_eq!(counts, [Some(0), Some(0)], "{}", self.all_about());
        }
    }
}

/// A client that has every record in its own hands: `wire.py ADDRESS PORT ROOT OPTIONS BODY`. BODY is Python; what it leaves in
/// `result` is printed.
const WIRE: &str = r#"
body = sys.argv[5]
# Python has OpenSSL take an end without close_notify for one with it.
context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF

class Wire:
    def __init__(self, rcvbuf=None):
        self.socket = socket.socket()
        if rcvbuf:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        self.socket.settimeout(30)
        self.socket.connect((address, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname='a.example')
        self.plain = b''
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.push(self.outgoing.read())
                self.pull()
        self.push(self.outgoing.read())

    # Seals data, in records of at most 16 KiB; nothing is sent.
    def seal(self, data):
        self.tls.write(data)
        return self.outgoing.read()

    def push(self, wire):
        if wire:
            self.socket.sendall(wire)

    def pull(self, most=1 << 16):
        data = self.socket.recv(most)
        if data:
            self.incoming.write(data)
        else:
            self.incoming.write_eof()

    def more(self):
        while True:
            try:
                data = self.tls.read(1 << 16)
                self.push(self.outgoing.read())
                self.plain += data
                return len(data)
            except ssl.SSLWantReadError:
                self.pull()

    # Node, status and body of the next response.
    def response(self):
        while b'\r\n\r\n' not in self.plain:
            assert self.more(), f'the end, after {self.plain!r}'
        head, self.plain = self.plain.split(b'\r\n\r\n', 1)
        lines = head.decode().split('\r\n')
        fields = dict(line.lower().split(': ', 1) for line in lines[1:])
        length = int(fields.get('content-length', 0))
        while len(self.plain) < length:
            assert self.more(), f'the end, after {len(self.plain)} of {length}'
        got, self.plain = self.plain[:length], self.plain[length:]
        return fields.get('x-node'), int(lines[0].split()[1]), got

    def get(self, path):
        self.push(self.seal(request(path)))
        return self.got(path)

    # The node that answers, when it is the right answer.
    def got(self, path):
        node, status, body = self.response()
        with open(root + path, 'rb') as f:
            assert status == 200 and f.read() == body, f'{path}: {status}, {len(body)} bytes'
        return node

def request(path, *fields):
    return '\r\n'.join([f'GET {path} HTTP/1.1', 'Host: x', *fields, '', '']).encode()

def upload(path, size):
    data = (bytes(i * 11 % 253 for i in range(65521)) * (size // 65521 + 1))[:size]
    return f'PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n'.encode() + data, data

result = None
exec(body)
print(json.dumps(result))
"#;

/// A thread for each connection; see [`Https::crowd`].
const CROWD: &str = r#"
import http.client, threading

nodes, requests = options['nodes'], options['requests']
sizes = ['0', '1', '1k', '64k', '1m', '20m']
objects = {size: open(f'{root}/img/{size}', 'rb').read() for size in sizes}
lock, right, places, errors = threading.Lock(), 0, {}, []

def one(s, number, turn):
    n = number * requests + turn
    node = nodes[(number + turn // 2) % len(nodes)]
    size = sizes[5 if n % 800 == 7 else 4 if n % 40 == 3 else n % 4]
    if n % 5 == 4 and size != '20m':
        path, body = f'/up/{node}/{number}', objects[size]
        s.sendall(f'PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n'.encode() + body)
    else:
        path, body = f'/img/{node}/{size}', None
        s.sendall(f'GET {path} HTTP/1.1\r\nHost: x\r\n\r\n'.encode())
    response = http.client.HTTPResponse(s, method='GET')
    response.begin()
    got = response.read()
    if body is not None:
        with open(root + path, 'rb') as f:
            got = f.read()
    expected = objects[size] if body is None else body
    assert response.status in (200, 201, 204) and got == expected, f'{path}: {response.status}, {len(got)} bytes'
    return response.getheader('X-Node')

def run(number):
    global right
    try:
        plain = socket.create_connection((address, port), timeout=60)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with context.wrap_socket(plain, server_hostname='a.example') as s:
            for turn in range(requests):
                node = one(s, number, turn)
                with lock:
                    right += 1
                    places[node] = places.get(node, 0) + 1
            s.unwrap().close()
    except Exception as e:
        with lock:
            errors.append(f'connection {number}: {e!r}')

threads = [threading.Thread(target=run, args=(number,)) for number in range(options['connections'])]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps({'right': right, 'places': places, 'errors': errors}))
"#;

/// A server that reads each request in the way that its path names, and answers with what it has read: `ways.py NODE PORT`.
const WAYS: &str = r#"
import array, errno, fcntl, os, socket, struct, subprocess, sys, tempfile, termios, threading

node, port = sys.argv[1], int(sys.argv[2])

def refused(call, *expected):
    try:
        call()
    except OSError as e:
        assert e.errno in expected, e
    else:
        raise AssertionError('not refused')

def splice(c, n):
    reader, writer = os.pipe()
    refused(lambda: os.splice(c.fileno(), writer, n), errno.EINVAL)
    os.write(writer, b'x')
    refused(lambda: os.splice(reader, c.fileno(), 1), errno.EINVAL)
    os.close(reader), os.close(writer)
    return c.recv(n)

def passing(c, n):
    here, there = socket.socketpair()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [c.fileno()]))]
    refused(lambda: here.sendmsg([b'x'], rights), errno.EBADF)
    here.close(), there.close()
    return c.recv(n)

def program(c, n):
    got = subprocess.run(['sh', '-c', f'cat <&{c.fileno()}; echo plain >&{c.fileno()}'], pass_fds=(c.fileno(),),
                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10)
    assert got.returncode != 0 and not got.stdout, got
    return c.recv(n)

def duplicate(c, n):
    fd = os.dup(c.fileno())
    got = os.read(fd, n)
    os.close(fd)
    return got

def vectors(c, n):
    pieces = [bytearray(5), bytearray(11), bytearray(4096)]
    got = os.readv(c.fileno(), pieces)
    return b''.join(pieces)[:got]

def timed(c, n):
    c.settimeout(5)
    got = c.recv(n)
    c.settimeout(None)
    return got

READ = {
    'recv': lambda c, n: c.recv(4096), 'bytes': lambda c, n: b''.join(c.recv(1) for _ in range(n)),
    'whole': lambda c, n: c.recv(n, socket.MSG_WAITALL), 'message': lambda c, n: c.recvmsg(4096)[0],
    'from': lambda c, n: c.recvfrom(4096)[0], 'read': lambda c, n: os.read(c.fileno(), 4096),
    'vectors': vectors, 'splice': splice, 'passing': passing, 'program': program, 'dup': duplicate, 'timed': timed,
}

def sendfile(c, data):
    with tempfile.TemporaryFile() as f:
        f.write(b'0123456789' + data)
        f.flush()
        half = len(data) // 2
        assert os.sendfile(c.fileno(), f.fileno(), 10, half) == half
        f.seek(10 + half)
        rest = len(data) - half
        assert os.sendfile(c.fileno(), f.fileno(), None, rest + 5) == rest and f.tell() == 10 + len(data)

def more(c, data):
    c.sendall(data[:10], socket.MSG_MORE)
    c.sendall(data[10:])

WRITE = [
    lambda c, data: c.sendall(data), lambda c, data: os.write(c.fileno(), data), more, sendfile,
    lambda c, data: os.writev(c.fileno(), [data[:3], b'', data[3:]]), lambda c, data: c.sendmsg([data[:30], data[30:]]),
]

def answer(c, way, turn):
    c.setblocking(True)
    seen = c.recv(4096, socket.MSG_PEEK)
    waits = struct.unpack('i', fcntl.ioctl(c.fileno(), termios.FIONREAD, b'    '))[0]
    assert waits >= len(seen), (waits, seen)
    data = READ[way](c, len(seen))
    head = f'HTTP/1.1 200 OK\r\nX-Node: {node}\r\nContent-Length: {len(data)}\r\n\r\n'
    WRITE[turn % len(WRITE)](c, head.encode() + data)

def serve(c):
    turn = 0
    while True:
        seen = c.recv(4096, socket.MSG_PEEK)
        if not seen:
            break
        way = seen.split()[1].decode().rsplit('/', 1)[1]
        if way == 'fork':
            child = os.fork()
            if not child:
                answer(c, 'recv', turn)
                os._exit(0)
            os.waitpid(child, 0)
            # The child has used it: what is known here about its records is wrong.
            refused(lambda: c.recv(1), errno.EIO)
            refused(lambda: c.send(b'wrong'), errno.EIO)
            break
        answer(c, way, turn)
        turn += 1
    c.close()

listener = socket.create_server(('', port))
while True:
    serve(listener.accept()[0])
"#;

impl Https {
    /// A server on a target that reads and writes in many ways: `/img/NODE/WAY`.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn with_ways(&self) -> Vec<Program> {
        let policy = self.bed.file("targets.toml", &self.target_policy());
        let mut programs = self.daemons_for(&format!("policy = \"{}\"", policy.display()), HANDLER);
        self.share_objects();
        let mut command = self.with_policy("t1", "python3");
        command.arg(self.bed.file("ways.py", WAYS)).args(["t1".to_owned(), PLAIN.to_string()]);
        let mut ways = self.bed.start("t1", "t1-ways", &mut command);
        self.bed.wait_listening("t1", PLAIN, &mut ways);
        self.bed.wait_acceptors("t1", "plain", 1);
        programs.push(ways);
        programs.push(self.nginx("host", self.with_policy("host", "nginx"), ""));
        self.bed.wait_connected(&self.bed.servers());
        programs
    }

    /// So many connections at once with so many requests each, of all sizes, some of them uploads: `right` (how many answers were),
    /// `places` (who answered), `errors`.
    ///
    /// # Panics
    /// When the client itself fails.
    #[must_use]
    pub fn crowd(&self, suite: Suite, connections: u64, requests: u64) -> Value {
        self.crowd_at(suite, &self.bed.servers(), connections, requests)
    }

    /// As [`Https::crowd`], with these names in the paths.
    ///
    /// # Panics
    /// As there.
    #[must_use]
    pub fn crowd_at(&self, suite: Suite, nodes: &[String], connections: u64, requests: u64) -> Value {
        let script = self.bed.file("crowd.py", &format!("{CLIENT_HEAD}{CROWD}"));
        let mut command = Command::new("python3");
        let options = json!({ "connections": connections, "requests": requests, "nodes": nodes });
        let options = self.say_suite(&mut command, suite, options);
        command.arg(script).args([address("host"), "443".into()]).arg(self.bed.root("host"));
        let output = self.bed.run("client", command.arg(options.to_string()));
        serde_json::from_str(&output).unwrap_or_else(|e| panic!("{e}: {output}"))
    }

    /// Runs this Python with a [`WIRE`] of the suite; what it leaves in `result`.
    ///
    /// # Panics
    /// When it fails.
    pub fn wire(&self, suite: Suite, body: &str) -> Value {
        let script = self.bed.file("wire.py", &format!("{CLIENT_HEAD}{WIRE}"));
        let mut command = Command::new("python3");
        let options = self.say_suite(&mut command, suite, json!({}));
        command.arg(script).args([address("host"), "443".into()]).arg(self.bed.root("host"));
        let output = self.bed.run("client", command.arg(options.to_string()).arg(body));
        serde_json::from_str(&output).unwrap_or_else(|e| panic!("{e}: {output}"))
    }
}
