//! HTTPS at the host, and a target whose handlers are programs of their own, `exec` and `pool`: they know nothing of TLS, and there is
//! no library in them.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::bed::built;
use crate::content;
use crate::program::{Program, wait_for};
use crate::servers::{PEER_PORT, address};
use crate::tls::Https;

/// The two handlers; a path's first part names one.
pub const HANDLERS: [&str; 2] = ["exec", "pool"];

/// A server for plain HTTP/1.1 that sends files by sendfile(2): `plain.py NODE ROOT`, with its connection as descriptor 0, or
/// with a pool's channel. What ended a connection is a line in ROOT/ends.
const PROGRAM: &str = r#"
import errno, json, os, socket, sys, threading, time

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
    elif path.endswith('/half'):
        # It answers when the client has said that nothing more comes.
        rest = stream.read()
        put(c, f'HTTP/1.1 200 OK\r\nX-Node: {node}\r\nConnection: close\r\n\r\n{len(rest)}')
        return False
    elif path.endswith('/early'):
        # It has nothing more to say, and goes on reading.
        put(c, f'HTTP/1.1 200 OK\r\nX-Node: {node}\r\nConnection: close\r\n\r\nearly')
        c.shutdown(socket.SHUT_WR)
        raise EOFError(len(stream.read()))
    elif path.endswith('/leave'):
        # It closes, and lives on until its client has seen the end.
        put(c, f'HTTP/1.1 200 OK\r\nX-Node: {node}\r\nConnection: close\r\n\r\nleft')
        stream.close()
        c.close()
        for _ in range(2000):
            if os.path.exists(f'{root}/left-{node}'):
                os.remove(f'{root}/left-{node}')
                return False
            time.sleep(0.01)
        raise EOFError('all')
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
    except EOFError as e:
        end = f'eof after {e}'
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
    c = socket.socket(fileno=os.dup(0))
    assert os.environ['XO_TLS'] == ('library' if c.family == socket.AF_UNIX else 'kernel')
    os.dup2(os.open('/dev/null', os.O_RDWR), 0)
    os.dup2(0, 1)
    serve(c)
"#;

/// A host with TLS, and a target with both handlers: `/exec/` and `/pool/`, `/img/exec/` and so on.
#[derive(Debug)]
pub struct Stage {
    /// The bed.
    pub https: Https,
    /// The daemons of the host and of the target, and the host's server.
    pub programs: Vec<Program>,
    root: PathBuf,
}

impl Stage {
    /// Raises it; `head` is for the daemons' configurations.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn up(head: &str) -> Stage {
        let https = Https::up();
        let bed = &https.bed;
        let root = bed.root("host");
        content::write_all(&root);
        fs::write(root.join("img/5m"), content::of("/img/5m", 5_000_000)).expect("an object");
        for handler in HANDLERS {
            symlink("img", root.join(handler)).expect("a link");
            for directory in ["img", "up"] {
                symlink(".", root.join(directory).join(handler)).expect("a link");
            }
        }
        symlink(&root, bed.root("t1")).expect("a link");
        for directory in ["img", "up"] {
            fs::set_permissions(root.join(directory), fs::Permissions::from_mode(0o777)).expect("its mode");
        }
        let script = bed.file("plain.py", PROGRAM);
        let mut policy = format!("listen = [443]\n[targets]\nt1 = \"{}:{PEER_PORT}\"\n", address("t1"));
        // A guest is slow, and a program is not the quickest to start.
        let mut handlers = "[limits]\ntimeout_ms = 10000\n".to_owned();
        for mode in HANDLERS {
            for path in [format!("/{mode}/"), format!("/img/{mode}/"), format!("/up/{mode}/")] {
                policy +=
                    &format!("[[rule]]\npath_prefix = \"{path}\"\nto = [\"t1\"]\nhandler = \"{mode}\"\n");
            }
            let command = ["/usr/bin/python3".into(), script.clone(), mode.into(), root.clone()];
            handlers +=
                &format!("[[handler]]\nname = \"{mode}\"\nmode = \"{mode}\"\ncommand = {command:?}\n");
        }
        let policy = bed.file("programs.toml", &policy);
        let head = format!("{head}\npolicy = \"{}\"", policy.display());
        let mut programs = https.daemons_for(&head, &handlers);
        let mut command = bed.preloaded("host", "nginx");
        command.env("XO_POLICY", policy).env("XO_TLS_CHECK", "1");
        programs.push(https.nginx("host", command, ""));
        bed.wait_connected(&bed.servers());
        let stage = Stage { https, programs, root };
        stage.wait_ready();
        stage
    }

    /// The pool's worker is there.
    ///
    /// # Panics
    /// When it does not come.
    pub fn wait_ready(&self) {
        let status = || self.https.bed.try_status("t1").unwrap_or_default();
        let ready = wait_for(Duration::from_secs(20), || status()["pools"]["pool"]["ready"] == 1);
        assert!(ready, "{}", status());
    }

    /// How connections ended for the handlers since the last time this was asked, in some order.
    ///
    /// # Panics
    /// When there are not so many.
    #[must_use]
    pub fn ends(&self, count: usize) -> Vec<String> {
        let path = self.root.join("ends");
        let read = || fs::read_to_string(&path).unwrap_or_default();
        let all = wait_for(Duration::from_secs(20), || read().lines().count() >= count);
        let text = read();
        assert!(all, "{count} ends: {text}");
        fs::remove_file(&path).expect("the file");
        let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    }

    /// Nothing is served any more, nor in TIME-WAIT.
    ///
    /// # Panics
    /// When something is.
    pub fn all_ended(&self) {
        let none = wait_for(Duration::from_secs(90), || self.https.bed.status("t1", "/flows_served") == 0);
        assert!(none, "{}", self.https.bed.flows("t1"));
    }

    /// Who does the records of each connection that the target serves now.
    ///
    /// # Panics
    /// When the daemon does not answer.
    #[must_use]
    pub fn layers(&self) -> Vec<String> {
        let mut command = Command::new(built("xo-peerd"));
        command.args(["flows", "--json", "--socket"]).arg(self.https.bed.socket("t1"));
        let flows: Value = serde_json::from_str(&self.https.bed.run("t1", &mut command)).expect("JSON");
        let all = flows.as_array().expect("a list").iter();
        all.filter_map(|f| f["tls"].as_str()).map(str::to_owned).collect()
    }
}

/// A connection with some requests at the host, and then at a handler.
/// The places that are to answer come with it.
#[must_use]
pub fn steps(handler: &str, large: bool) -> (Value, Vec<String>) {
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

/// For the Python of [`Https::wire`]: how connections end.
pub const HELPERS: &str = r#"
def end(step):
    try:
        step()
    except Exception as e:
        # Newer versions have a class of its own for an end without close_notify.
        name = 'SSLError' if isinstance(e, ssl.SSLError) else type(e).__name__
        return f'{name} {getattr(e, "reason", "")}'.strip()
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
"#;

/// What OpenSSL says, for `exec` and for `pool`: to the handler's good-bye, the client's, a record that cannot be opened. Then: to a process
/// that dies. With [`HELPERS`] before it.
pub const ENDS: &str = r#"
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
